"""Learner: the student as it is trained. Mixed sequences in, a step's report out; saved in Hugging Face format.

Owns the model, its optimizer and its learning rate. Knows nothing of prompts, engines or Ray.
B, S, N, H, V, k as in batch.py and loss.py.

The model stays in evaluation mode throughout: dropout would train another distribution than the one the engine samples
from and the probe compares.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.config import Trainer
from common.errors import UserError
from common.files import fsync
from common.sequence import MixedSequence, TokenSource
from trainer.batch import MicroBatch, make_micro_batches
from trainer.loss import PositionLosses, Targets, distillation_losses

# Names under which Hugging Face configs keep a tanh on the logits. Small logits pass it almost unchanged, so that the
# self-check alone would miss it on a model that has not learned much.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step. None where a step has no such tokens."""

    loss: float  # nats per token, weighted as it was trained on
    loss_student_tokens: float | None  # nats per token the student wrote
    loss_teacher_tokens: float | None  # nats per token the teacher wrote
    covered_mass: float  # mean probability on the teacher's listed ids
    grad_norm: float  # before clipping
    learning_rate: float  # with which the step was made
    num_tokens: int  # new tokens, prompts not counted
    num_micro_batches: int
    seconds: float


class Learner:
    """The student, in float32 master weights, on the GPU where there is one."""

    def __init__(self, student: str, config: Trainer, *, seed: int, trust_remote_code: bool = False) -> None:
        torch.manual_seed(seed)
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads)
        self.tokenizer = load_tokenizer(student, trust_remote_code=trust_remote_code)
        self.model = load_pretrained(student, trust_remote_code=trust_remote_code).to(self.device).eval()
        refuse_changed_logits(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, config)
        )

    def step(self, sequences: list[MixedSequence]) -> StepReport:
        """One update on the weighted mean loss over all new tokens of these sequences, however they fall into
        micro-batches: sum(weight x loss) / sum(weight), the weights by who wrote the token.

        Raises FloatingPointError, before anything is changed, when the loss or the gradient is not finite.
        """
        started_s = time.perf_counter()
        micro_batches = make_micro_batches(sequences, self.config.tokens_per_micro_batch)
        weights = [self._token_weights(micro_batch) for micro_batch in micro_batches]
        # Where every token has weight 0 the mean is taken to be 0.
        total_weight = float(torch.cat(weights).sum()) or 1.0
        shares = [weight / total_weight for weight in weights]
        self.optimizer.zero_grad(set_to_none=True)
        positions = [
            self._backward(micro_batch, share) for micro_batch, share in zip(micro_batches, shares, strict=True)
        ]
        grad_norm = self._clip(sequences)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

        losses = torch.cat([position.losses for position in positions])
        sources = torch.cat([micro_batch.sources for micro_batch in micro_batches])
        return StepReport(
            loss=float((losses.double() * torch.cat(shares)).sum()),
            loss_student_tokens=_mean_or_none(losses[sources == TokenSource.STUDENT]),
            loss_teacher_tokens=_mean_or_none(losses[sources == TokenSource.TEACHER]),
            covered_mass=float(torch.cat([position.covered_mass for position in positions]).mean()),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=len(losses),
            num_micro_batches=len(micro_batches),
            seconds=time.perf_counter() - started_s,
        )

    def position_losses(self, micro_batch: MicroBatch, shares: Tensor) -> PositionLosses:
        """The loss of each new token, and their sum with these shares [N], differentiable."""
        micro_batch = micro_batch.to(self.device)
        output_layer = self.model.get_output_embeddings()
        assert isinstance(output_layer, nn.Linear), type(output_layer)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            hidden_NH = hidden_states(self.model, micro_batch.input_ids, micro_batch.attention_mask).flatten(0, 1)[
                micro_batch.hidden_rows
            ]
            return distillation_losses(
                hidden_NH,
                output_layer,
                Targets(
                    token_ids=micro_batch.token_ids,
                    teacher_ids=micro_batch.teacher_ids,
                    teacher_logprobs=micro_batch.teacher_logprobs,
                    weights=shares.to(self.device),
                ),
                self.config.loss,
                self.config.positions_per_chunk,
            )

    def save(self, folder: Path) -> None:
        """Write model and tokenizer in Hugging Face format: whole under that name, or not there at all.

        A folder of that name is replaced.
        """
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        self.model.save_pretrained(unfinished)
        self.tokenizer.save_pretrained(unfinished)
        for path in (*unfinished.rglob("*"), unfinished):
            fsync(path)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        fsync(folder.parent)

    def _token_weights(self, micro_batch: MicroBatch) -> Tensor:
        """[N] float64. How much each new token counts, by who wrote it."""
        by_source = torch.zeros(len(TokenSource), dtype=torch.float64)
        by_source[TokenSource.STUDENT] = self.config.student_token_weight
        by_source[TokenSource.TEACHER] = self.config.teacher_token_weight
        return by_source[micro_batch.sources.long()]

    def _backward(self, micro_batch: MicroBatch, shares: Tensor) -> PositionLosses:
        """Add this micro-batch's share of the step's gradient. The losses come back detached, on the CPU."""
        positions = self.position_losses(micro_batch, shares)
        broken = (~positions.losses.isfinite()).nonzero().flatten().tolist()
        if broken:
            self.optimizer.zero_grad(set_to_none=True)
            names = sorted({micro_batch.sequence_id_of(token) for token in broken})
            raise FloatingPointError(
                f"the loss is not finite at {len(broken)} of {len(micro_batch)} tokens, in {_listed(names)}"
            )
        positions.total.backward()  # type: ignore[no-untyped-call]
        return PositionLosses(
            total=positions.total.detach().cpu(),
            losses=positions.losses.cpu(),
            covered_mass=positions.covered_mass.cpu(),
        )

    def _clip(self, sequences: list[MixedSequence]) -> float:
        """Scale the gradient down to max_grad_norm; its norm before."""
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if not np.isfinite(grad_norm):
            self.optimizer.zero_grad(set_to_none=True)
            names = sorted(sequence.sequence_id for sequence in sequences)
            raise FloatingPointError(f"grad_norm is {grad_norm} after finite losses, in a step of {_listed(names)}")
        return grad_norm


# ------------------------------------------------------------------------------------------------- model and optimizer


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
    """The model of a folder or hub name, in float32. Raises UserError naming the key, also when weights are missing."""
    _refuse_missing_folder(name, key)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(name, key, "a causal language model", error) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(f"{key}: {name!r} lacks weights that {type(model).__name__} needs: {_listed(missing)}")
    return model


def _refuse_missing_folder(name: str, key: str) -> None:
    """Report a path that is not there at once; only what can be a hub name is looked up there."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{key}: the folder {name!r} has no config.json, expected a model in Hugging Face format")
    elif looks_like_path:
        raise UserError(f"{key}: no such folder: {name!r}, expected a model in Hugging Face format or a hub name")


def _unloadable(name: str, key: str, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{key}: can't load {what} from {name!r}, expected a folder or hub name that holds one: {reason}")


def hidden_states(model: PreTrainedModel, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """[B, S, H] What the output layer is applied to."""
    states: Tensor = model.base_model(
        input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False
    ).last_hidden_state
    return states


@torch.no_grad()
def refuse_changed_logits(model: PreTrainedModel, key: str = "models.student") -> None:
    """Raise UserError unless the model's logits are its output layer applied to its last hidden states, as the loss has
    it: soft-capped, scaled or cut logits would be trained wrongly without a word. The loss differentiates that layer
    itself, so it must be a plain ``torch.nn.Linear``.
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


def make_optimizer(model: PreTrainedModel, config: Trainer) -> torch.optim.AdamW:
    """AdamW. Weight decay is for matrices; biases and norms go without, as in the Hugging Face Trainer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)


def learning_rate_factor(step: int, config: Trainer) -> float:
    """Share of the peak for a step counted from 0: up over warmup_steps, flat, down to 0 over the last decay_fraction.

    Exactly the first warmup_steps and the last decay_fraction * num_steps steps are below the peak, and none is at 0.
    """
    num_decay_steps = round(config.decay_fraction * config.num_steps)
    warmup = (step + 1) / (config.warmup_steps + 1)
    decay = (config.num_steps - step) / (num_decay_steps + 1)
    return max(0.0, min(1.0, warmup, decay))


def _mean_or_none(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def _listed(names: list[str], limit: int = 8) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
