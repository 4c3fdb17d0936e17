"""The learner trains the student: it takes mixed sequences, makes an optimizer step and returns a report.

Owns the model, its optimizer and its learning rate, and saves them. Does not depend on prompts, engines or Ray.
B, S, N, H, V, k are as in batch.py and loss.py.

The model is always in evaluation mode. Dropout would train another distribution than the one that the engine samples
from and that the probe compares.

With several ranks, each rank is a Learner that holds a part of the model. All ranks call every method together, with
the same arguments. Results and errors are the same on each rank, except errors of one rank's own machine.
"""

import errno
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config import Trainer
from common.errors import UserError
from common.files import fsync
from common.sequence import MixedSequence, TokenSource
from trainer.batch import MicroBatch, collate, divide, empty_micro_batch
from trainer.checkpoint import load_tensors, save_tensors
from trainer.lora import add_adapter, merged_weights
from trainer.loss import PositionLosses, Targets, distillation_losses
from trainer.pretrained import (
    hidden_states,
    listed,
    load_outline,
    load_pretrained,
    load_tokenizer,
    refuse_changed_logits,
    refuse_leaking_rows,
    use_packing,
)
from trainer.ranks import ALONE, Ranks
from trainer.sharding import checkpoint_activations, shard, whole, whole_copy, whole_weights

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Measurements of one optimizer step. None if a step has no such tokens."""

    loss: float  # nats per token, with the weights used in training
    loss_student_tokens: float | None  # nats per student token
    loss_teacher_tokens: float | None  # nats per teacher token
    loss_dataset_tokens: float | None = None  # nats per dataset answer token
    covered_mass: float  # mean probability of the teacher's top k
    grad_norm: float  # before clipping
    learning_rate: float  # of this step
    num_tokens: int  # new tokens, without prompts
    num_micro_batches: int
    seconds: float


class Learner:
    """The student with float32 master weights on one device, by default the first visible GPU, else the CPU."""

    def __init__(
        self,
        student: str,
        config: Trainer,
        *,
        seed: int,
        trust_remote_code: bool = False,
        device: torch.device | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        torch.manual_seed(seed)
        self.config = config
        self.ranks = ranks
        self.device = device or learner_device()
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads)
        self.tokenizer = load_tokenizer(student, trust_remote_code=trust_remote_code)
        self.model = self._load(student, trust_remote_code=trust_remote_code)
        self.adapter = None if config.lora is None else add_adapter(self.model, config.lora)
        self.packed = use_packing(self.model, config.packing, config.dtype)
        if self.packed:
            with self._autocast():
                refuse_leaking_rows(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.scheduler = self._schedule(num_steps_done=0)

    def step(self, sequences: list[MixedSequence]) -> StepReport:
        """One update on the weighted mean loss, sum(weight x loss) / sum(weight), over all new tokens of these
        sequences. A token's weight depends on its source. The result does not depend on the division into ranks and
        micro-batches.

        Raises FloatingPointError, before anything is changed, if the loss or the gradient is not finite.
        """
        started_s = time.perf_counter()
        division = divide(sequences, self.ranks.num_ranks, self.config.tokens_per_micro_batch, packed=self.packed)
        micro_batches = [
            collate(group, packed=self.packed) if group else empty_micro_batch(sequences[0].teacher_top.k)
            for group in division[self.ranks.rank]
        ]
        sources = torch.from_numpy(np.concatenate([sequence.sources for sequence in sequences]))
        # If every token has weight 0, the loss is 0.
        total_weight = float(self._token_weights(sources).sum()) or 1.0
        shares = [self._token_weights(micro_batch.sources) / total_weight for micro_batch in micro_batches]
        self.optimizer.zero_grad(set_to_none=True)
        positions = [
            self._backward(micro_batch, share) for micro_batch, share in zip(micro_batches, shares, strict=True)
        ]
        # Move the results once per step, because each transfer waits for all work queued on the device.
        positions = [position.to(_CPU) for position in positions]
        self._refuse_non_finite(micro_batches, positions, len(sources))
        sums = self.ranks.sum(_sums(micro_batches, shares, positions)).tolist()
        grad_norm = self._clip(sequences)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

        num_tokens = np.bincount(sources, minlength=len(TokenSource))
        means = {source: sums[source] / num_tokens[source] if num_tokens[source] else None for source in TokenSource}
        return StepReport(
            loss=sums[-2],
            loss_student_tokens=means[TokenSource.STUDENT],
            loss_teacher_tokens=means[TokenSource.TEACHER],
            loss_dataset_tokens=means[TokenSource.DATASET],
            covered_mass=sums[-1] / len(sources),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=len(sources),
            num_micro_batches=sum(1 for groups in division for group in groups if group),
            seconds=time.perf_counter() - started_s,
        )

    def position_losses(self, micro_batch: MicroBatch, shares: Tensor) -> PositionLosses:
        """The loss of each new token, and their differentiable sum weighted with ``shares`` [N]."""
        micro_batch = micro_batch.to(self.device)
        output_layer = self.model.get_output_embeddings()
        assert isinstance(output_layer, nn.Linear), type(output_layer)
        with self._autocast():
            hidden_BSH = hidden_states(
                self.model, micro_batch.input_ids, micro_batch.attention_mask, micro_batch.position_ids
            )
            hidden_NH = hidden_BSH.flatten(0, 1)[micro_batch.hidden_rows]
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

    def whole_copy(self) -> PreTrainedModel | None:
        """The unsharded model for the probe; None on ranks above 0."""
        return whole_copy(self.model, self.ranks)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer in Hugging Face format, atomically. An adapter is merged into the weights, and also
        saved in ``adapter`` in peft's format.

        An existing folder of that name is replaced. Rank 0 writes, and holds all weights on the CPU for that. Raises
        OSError if the disk fails.
        """
        weights = whole_weights(self.model, self.ranks)
        if self.ranks.rank != 0:
            return
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            self.model.save_pretrained(unfinished, state_dict=merged_weights(self.model, weights))
            if self.adapter is not None:
                self.adapter.save_pretrained(unfinished / "adapter", save_embedding_layers=False)
        except SafetensorError as error:  # not an OSError, even if the disk is full
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise OSError(number, f"can't write: {error}", str(unfinished)) from error
        self.tokenizer.save_pretrained(unfinished)
        for path in (*unfinished.rglob("*"), unfinished):
            fsync(path)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        fsync(folder.parent)

    def save_state(self, folder: Path) -> None:
        """Write all state that the next step depends on, each rank its part. Raises OSError if the disk fails."""
        save_tensors(folder, self.model, self.optimizer, self.scheduler.state_dict(), self.ranks)

    def load_state(self, folder: Path) -> None:
        """Restore what ``save_state`` wrote. The same sequences then give bitwise the same weights."""
        scheduler = load_tensors(folder, self.model, self.optimizer, self.scheduler.state_dict(), self.ranks)
        self.scheduler.load_state_dict(scheduler)
        # Rebuilt, because trainer.num_steps may have changed, which changes the next step's learning rate.
        self.scheduler = self._schedule(num_steps_done=self.scheduler.last_epoch)

    def _schedule(self, *, num_steps_done: int) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, self.config), last_epoch=num_steps_done - 1
        )

    def _load(self, student: str, *, trust_remote_code: bool) -> PreTrainedModel:
        """The student, unsharded or this rank's shard of it. Only rank 0 reads the weights."""
        if self.ranks.rank == 0:
            model = load_pretrained(student, trust_remote_code=trust_remote_code).eval()
        else:
            model = load_outline(student, trust_remote_code=trust_remote_code).eval()
        if self.ranks.num_ranks == 1:
            model = model.to(self.device)
        if self.ranks.rank == 0:
            refuse_changed_logits(model)
        if self.config.activation_checkpointing:
            checkpoint_activations(model)
        if self.ranks.num_ranks > 1:
            shard(model, self.ranks, self.device)
        return model

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def _token_weights(self, sources: Tensor) -> Tensor:
        """[N] float64. Weight of each new token in the loss, by its source."""
        by_source = torch.zeros(len(TokenSource), dtype=torch.float64)
        by_source[TokenSource.STUDENT] = self.config.student_token_weight
        by_source[TokenSource.TEACHER] = self.config.teacher_token_weight
        by_source[TokenSource.DATASET] = self.config.dataset_token_weight
        return by_source[sources.long()]

    def _backward(self, micro_batch: MicroBatch, shares: Tensor) -> PositionLosses:
        """Add this micro-batch's part of the step's gradient. The returned losses are detached."""
        positions = self.position_losses(micro_batch, shares)
        positions.total.backward()  # type: ignore[no-untyped-call]
        return positions.detached()

    def _refuse_non_finite(
        self, micro_batches: list[MicroBatch], positions: list[PositionLosses], num_tokens: int
    ) -> None:
        """Drop the gradient and name the sequences if any rank has a loss that is not finite.

        Checked once per step on all ranks together. If one rank stopped alone, the others would wait for it.
        """
        names = [
            micro_batch.sequence_id_of(token)
            for micro_batch, position in zip(micro_batches, positions, strict=True)
            for token in (~position.losses.isfinite()).nonzero().flatten().tolist()
        ]
        if names := self.ranks.gather(names):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the loss is not finite at {len(names)} of {num_tokens} tokens, in {listed(sorted(set(names)))}"
            )

    def _clip(self, sequences: list[MixedSequence]) -> float:
        """Scale the gradient down to max_grad_norm. Returns its norm before scaling, over all ranks."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
        grad_norm = float(norm)
        if not np.isfinite(grad_norm):
            self.optimizer.zero_grad(set_to_none=True)
            names = sorted(sequence.sequence_id for sequence in sequences)
            raise FloatingPointError(f"grad_norm is {grad_norm} after finite losses, in a step of {listed(names)}")
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return grad_norm


# ---------------------------------------------------------------------------------------------------------- optimizer


def make_optimizer(model: nn.Module, config: Trainer) -> torch.optim.AdamW:
    """AdamW, fused on a GPU. Weight decay is for matrices, not for biases and norms, as in the Hugging Face Trainer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True if parameters[0].device.type == "cuda" else None,
    )


def learning_rate_factor(step: int, config: Trainer) -> float:
    """Learning rate of a step (counted from 0) as a fraction of the peak: linear warm-up, constant, linear decay.

    Exactly the first warmup_steps and the last decay_fraction * num_steps steps are below the peak, and none is at 0.
    """
    num_decay_steps = round(config.decay_fraction * config.num_steps)
    warmup = (step + 1) / (config.warmup_steps + 1)
    decay = (config.num_steps - step) / (num_decay_steps + 1)
    return max(0.0, min(1.0, warmup, decay))


def learner_device(wanted: Literal["cpu", "cuda"] | None = None) -> torch.device:
    """The given device. Default: the first GPU that this process sees, else the CPU.

    Raises UserError if a GPU is wanted and torch sees none. Otherwise the learner would silently train on the CPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None:
            raise UserError(
                f"placement.use_gpus: the learner has a GPU, but torch {torch.__version__} is built without CUDA; "
                "expected the cuda environment (docs/install.md), or placement.use_gpus false"
            )
        raise UserError(
            f"placement.use_gpus: the learner has a GPU that torch {torch.__version__} can't use; expected "
            f"{driver_for(torch.version.cuda)} (see nvidia-smi), or placement.use_gpus false"
        )
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def driver_for(cuda_version: str) -> str:
    """The NVIDIA driver that a CUDA version needs, as text for an error message."""
    if cuda_version.startswith("13."):
        return f"an NVIDIA driver 580 or newer, for CUDA {cuda_version}"
    return f"an NVIDIA driver that supports CUDA {cuda_version}"


def _sums(micro_batches: list[MicroBatch], shares: list[Tensor], positions: list[PositionLosses]) -> Tensor:
    """[number of sources + 2] float64. Sum of losses for each source, weighted loss, and sum of the covered mass."""
    losses = torch.cat([position.losses for position in positions]).double()
    covered_mass = torch.cat([position.covered_mass for position in positions]).double()
    sources = torch.cat([micro_batch.sources for micro_batch in micro_batches]).long()
    by_source = torch.zeros(len(TokenSource), dtype=torch.float64).index_add_(0, sources, losses)
    return torch.cat([by_source, torch.stack([(losses * torch.cat(shares)).sum(), covered_mass.sum()])])
