"""Loads models and tokenizers in Hugging Face format, and refuses unsupported ones with the key that names them."""

from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from common.errors import UserError, one_line

# Names of a tanh on the logits in Hugging Face configs. It changes small logits very little, so the self-check alone
# would miss it on a model with little training.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_LEAK = 0.25
"""A visible neighbor changes the states by 0.8 to 1.4 of their own spread, root mean square; bfloat16 changes them
by 0.01 to 0.06 (docs/decisions/2026-11-27-bfloat16.md). The largest state is no measure, because bfloat16 changes it
by 2."""


def load_tokenizer(
    name: str, *, key: str = "models.student", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name. Raises UserError naming the key."""
    _refuse_missing_folder(name, key)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unloadable(name, key, "a tokenizer", error) from error


def load_pretrained(name: str, *, key: str = "models.student", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder or hub name, in float32, only from safetensors. Raises UserError naming the key, also if
    weights are missing.
    """
    _refuse_missing_folder(name, key)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # pickled weights can run code
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(name, key, "a causal language model", error) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(f"{key}: {name!r} lacks weights that {type(model).__name__} needs: {listed(missing)}")
    return model


def _refuse_missing_folder(name: str, key: str) -> None:
    """Refuse a missing path at once, so that only possible hub names are looked up on the hub."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{key}: the folder {name!r} has no config.json, expected a model in Hugging Face format")
    elif looks_like_path:
        raise UserError(f"{key}: no such folder: {name!r}, expected a model in Hugging Face format or a hub name")


def _unloadable(name: str, key: str, what: str, error: Exception) -> UserError:
    reason = one_line(error)
    return UserError(f"{key}: can't load {what} from {name!r}, expected a folder or hub name that holds one: {reason}")


def load_outline(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The same model without weights (parameters on ``meta``, buffers with their values), for another rank to fill.

    Only called if another process loads the same name and reports its errors.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # moving to ``meta`` untied them
    return model


def use_packing(model: PreTrainedModel, wanted: Literal["auto"] | bool, dtype: str) -> bool:
    """Whether sequences share a row. Switches flash attention on if it is used for that. It computes in half precision
    and finds the end of a sequence from the position ids; other attention gets a mask.
    """
    flash = dtype == "bfloat16" and is_flash_attn_2_available() and bool(getattr(model, "_supports_flash_attn", False))
    if flash and wanted is not False:
        model.set_attn_implementation("flash_attention_2")
    return flash if wanted == "auto" else wanted


def hidden_states(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor | None,
    position_ids_BS: Tensor | None = None,
) -> Tensor:
    """[B, S, H] Inputs of the output layer. Without a mask, a position id of 0 starts a new sequence."""
    positions = {} if position_ids_BS is None else {"position_ids": position_ids_BS}
    states: Tensor = model.base_model(
        input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False, **positions
    ).last_hidden_state
    return states


@torch.no_grad()
def refuse_leaking_rows(model: PreTrainedModel, key: str = "trainer.packing") -> None:
    """Raise UserError unless a packed sequence has the same states as it has alone. A model that ignores position ids
    would silently let a sequence attend to its neighbor.
    """
    ids_1S = (torch.arange(12, device=model.device) % model.config.get_text_config().vocab_size)[None]
    positions_1S = (torch.arange(12, device=model.device) % 6)[None]
    packed_SH = hidden_states(model, ids_1S, None, positions_1S)[0]
    alone_SH = hidden_states(model, ids_1S[:, 6:], torch.ones_like(ids_1S[:, 6:]))[0]
    moved, spread = (packed_SH[6:] - alone_SH).float().square().mean().sqrt(), alone_SH.float().std()
    if float(moved) > _LEAK * float(spread):
        raise UserError(
            f"{key}: {type(model).__name__} lets packed sequences attend to each other, expected position ids to "
            "separate them; set it to false"
        )


@torch.no_grad()
def refuse_changed_logits(model: PreTrainedModel, key: str = "models.student") -> None:
    """Raise UserError unless the model's logits are its output layer applied to its last hidden states, as the loss
    assumes. Logits that are soft-capped, scaled or truncated would silently be trained wrongly. The loss differentiates
    the output layer itself, so it must be a plain ``torch.nn.Linear``.
    """
    output_layer = model.get_output_embeddings()
    if not isinstance(output_layer, nn.Linear):
        raise UserError(
            f"{key}: the output layer of {type(model).__name__} is a {type(output_layer).__name__}, expected a "
            "torch.nn.Linear"
        )
    text_config = model.config.get_text_config()
    capped = [name for name in SOFTCAPS if getattr(text_config, name, None) is not None]
    input_ids_BS = (torch.arange(8, device=model.device) % text_config.vocab_size)[None]
    mask_BS = torch.ones_like(input_ids_BS)
    expected = model(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False).logits
    logits = output_layer(hidden_states(model, input_ids_BS, mask_BS))
    same = logits.shape == expected.shape and torch.allclose(
        logits, expected, rtol=1e-3, atol=1e-3 * float(expected.std())
    )
    if capped or not same:
        found = f"sets {' and '.join(capped)} in its config" if capped else "changes its logits after its output layer"
        raise UserError(
            f"{key}: {type(model).__name__} {found}, expected a model whose logits are its output layer applied to its "
            "last hidden states"
        )


def listed(names: list[str], limit: int = 8) -> str:
    """The first few names, and the number of others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
