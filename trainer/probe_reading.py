"""The learner's own log-probs on the probe texts, always in float32. Does not depend on an engine.

n = tokens of a text, m = requested ids per position, H = hidden size, V = vocabulary size. Row j of a text belongs to
position j + 1: it is the distribution of that token given tokens 0..j. The last row is for the token after the text.

Under the learner's own autocast, its rounding would be added to the engine's, and together they would hide the change
from a small step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from common.sequence import Floats, Ids
from trainer.pretrained import hidden_states
from trainer.sharding import whole

_POSITIONS_PER_CHUNK = 256  # positions whose full-vocabulary logits are in memory at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Results of scoring, one array per text."""

    logprobs: list[Floats]  # [n, m] nats
    hidden: list[Tensor]  # [n, H] inputs of the output layer


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Compute as exactly as float32 weights allow. Flash attention supports only half precision, and TF32 has only 10
    mantissa bits.
    """
    attention = model.config._attn_implementation
    precision = torch.get_float32_matmul_precision()
    exact = attention in ("sdpa", "eager")
    was_training = model.training
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        if not exact:
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        yield
    finally:
        if not exact:
            model.set_attn_implementation(attention)
        torch.set_float32_matmul_precision(precision)
        model.train(was_training)


@contextmanager
def rounded_to(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Round the model's weights as an engine does, and restore them bitwise afterwards.

    Weights that were loaded from bfloat16 are on its grid, and a small step moves few of them to the next point. The
    engine then changes far less than the float32 weights do. Needs as much memory as the weights, like the gradients.
    """
    if dtype == torch.float32:
        yield
        return
    with torch.no_grad():
        exact = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        try:
            for parameter, _ in exact:
                parameter.copy_(parameter.to(dtype))
            yield
        finally:
            for parameter, value in exact:
                parameter.copy_(value)


@torch.no_grad()
def read(model: PreTrainedModel, texts: Sequence[Ids], token_ids: Sequence[Ids]) -> Reading:
    """The model's log-probs of these ids, [n, m] per text. A collective if the model is sharded over ranks."""
    head = model.get_output_embeddings()
    with in_float32(model):
        hidden = [hidden_states(model, text[None], torch.ones_like(text)[None])[0] for text in _on_device(model, texts)]
        return Reading(logprobs=apply_output_layer(head, hidden, token_ids), hidden=hidden)


@torch.no_grad()
def apply_output_layer(head: Any, hidden: Sequence[Tensor], token_ids: Sequence[Ids]) -> list[Floats]:
    """[n, m] nats per text: log-probs from an output layer (linear, with or without a bias) and hidden states."""
    weight_VH, bias_V = whole(head.weight), None if head.bias is None else whole(head.bias)
    return [_logprobs(h, weight_VH, bias_V, ids) for h, ids in zip(hidden, token_ids, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRows:
    """Rows of an output layer in float32 on the CPU. m = number of rows."""

    token_ids: Ids  # [m] sorted
    weight: Tensor  # [m, H]
    bias: Tensor | None  # [m]

    @classmethod
    @torch.no_grad()
    def copy(cls, model: PreTrainedModel, token_ids: Sequence[Ids]) -> "OutputRows":
        """Copy the rows of these ids. The id -1 (unknown) is replaced by 0."""
        head = model.get_output_embeddings()
        unique = np.unique(np.concatenate([ids.ravel() for ids in token_ids]).clip(min=0))
        index = torch.from_numpy(unique).long().to(model.device)
        bias = None if head.bias is None else whole(head.bias)[index].float().cpu()
        return cls(token_ids=unique, weight=whole(head.weight)[index].float().cpu(), bias=bias)

    @torch.no_grad()
    def change_since(self, old: "OutputRows", hidden: Sequence[Tensor], token_ids: Sequence[Ids]) -> list[Floats]:
        """[n, k] per text: the change of these ids' logits caused by the change from the ``old`` rows."""
        weight_mH = self.weight - old.weight
        bias_m = None if self.bias is None or old.bias is None else self.bias - old.bias
        changes = []
        for hidden_nH, ids_nk in zip(hidden, token_ids, strict=True):
            logits_nm = nn.functional.linear(hidden_nH.float().cpu(), weight_mH, bias_m).numpy()
            changes.append(np.take_along_axis(logits_nm, np.searchsorted(self.token_ids, ids_nk.clip(min=0)), axis=1))
        return changes


@torch.no_grad()
def read_with(
    model: PreTrainedModel, previous: Mapping[str, Tensor], texts: Sequence[Ids], token_ids: Sequence[Ids]
) -> list[Floats]:
    """[n, m] nats per text, as if these parameters had the previous values. Names are independent: a tied output layer
    and its embedding are separate here, as they are in an engine. The model must not be sharded, and is not changed.
    """
    logprobs = []
    with in_float32(model):
        for text, ids in zip(_on_device(model, texts), token_ids, strict=True):
            inputs = {"input_ids": text[None], "use_cache": False}
            answer: Any = functional_call(model, dict(previous), kwargs=inputs, tie_weights=False)
            logprobs.append(_gathered(answer.logits[0], ids))
    return logprobs


def _on_device(model: PreTrainedModel, texts: Sequence[Ids]) -> Iterator[Tensor]:
    return (torch.from_numpy(text).long().to(model.device) for text in texts)


def _logprobs(hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, token_ids_nm: Ids) -> Floats:
    chunks = [
        _gathered(nn.functional.linear(hidden_cH, weight_VH, bias_V), token_ids_nm[first : first + len(hidden_cH)])
        for first, hidden_cH in zip(
            range(0, len(hidden_nH), _POSITIONS_PER_CHUNK), torch.split(hidden_nH, _POSITIONS_PER_CHUNK), strict=True
        )
    ]
    return np.concatenate(chunks)


def _gathered(logits_nV: Tensor, token_ids_nm: Ids) -> Floats:
    assert len(logits_nV) == len(token_ids_nm), (
        f"expected one row per position, got {len(token_ids_nm)} of {len(logits_nV)}"
    )
    ids_nm = torch.from_numpy(token_ids_nm).long().clamp(min=0).to(logits_nV.device)  # unknown rows hold -1
    logits_nV = logits_nV.float()
    logprobs: Floats = (logits_nV.gather(1, ids_nm) - logits_nV.logsumexp(dim=-1, keepdim=True)).cpu().numpy()
    return logprobs
