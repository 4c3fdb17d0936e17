"""Mixed sequences -> micro-batches under a budget of padded tokens. Pure functions of their arguments.

B = sequences of a micro-batch, S = its longest, N = its new tokens, all sequences in a row, k = the teacher's list.
P = prompt tokens and T = new tokens of one sequence.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.sequence import MixedSequence


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Sequences that pass through the model at once, padded on the right, and what is known of their new tokens."""

    sequence_ids: tuple[str, ...]  # B of them
    input_ids: Tensor  # [B, S] int64, 0 where padded
    attention_mask: Tensor  # [B, S] int64, 1 where a token is
    hidden_rows: Tensor  # [N] int64. Row of the flat [B * S] hidden states that predicts the token
    token_ids: Tensor  # [N] int64
    sources: Tensor  # [N] uint8 TokenSource
    teacher_ids: Tensor  # [N, k] int64
    teacher_logprobs: Tensor  # [N, k] float32 nats

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.attention_mask.shape, (self.input_ids.shape, self.attention_mask.shape)
        assert self.input_ids.shape[0] == len(self.sequence_ids), (self.input_ids.shape, self.sequence_ids)
        assert self.teacher_ids.shape == self.teacher_logprobs.shape, self.teacher_ids.shape
        for name in ("token_ids", "sources", "teacher_ids"):
            assert len(getattr(self, name)) == len(self), f"{name} must have {len(self)} rows"

    def __len__(self) -> int:
        """N."""
        return int(self.hidden_rows.numel())

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device."""
        names = (
            "input_ids",
            "attention_mask",
            "hidden_rows",
            "token_ids",
            "sources",
            "teacher_ids",
            "teacher_logprobs",
        )
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def sequence_id_of(self, token: int) -> str:
        """Whose token it is, of the N."""
        return self.sequence_ids[int(self.hidden_rows[token]) // self.input_ids.shape[1]]


def make_micro_batches(sequences: list[MixedSequence], tokens_per_micro_batch: int) -> list[MicroBatch]:
    """Every sequence in exactly one micro-batch of at most that many padded tokens, prompts included.

    A sequence longer than the budget gets a micro-batch of its own. The longest come first: neighbours are alike, so
    little is padding, and running out of memory shows at once. The result depends on the set of sequences and not on
    the order in which they came back.
    """
    assert tokens_per_micro_batch >= 1, tokens_per_micro_batch
    by_length = sorted(sequences, key=lambda sequence: (-_total_length(sequence), sequence.sequence_id))
    groups: list[list[MixedSequence]] = []
    for sequence in by_length:
        if groups and (len(groups[-1]) + 1) * _total_length(groups[-1][0]) <= tokens_per_micro_batch:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return [collate(group) for group in groups]


def collate(sequences: list[MixedSequence]) -> MicroBatch:
    """One micro-batch of these sequences, in this order.

    Token t of a sequence is the input at P + t and is predicted by the hidden state one before, at P + t - 1.
    """
    ks = sorted({sequence.teacher_top.k for sequence in sequences})
    assert len(ks) == 1, f"all sequences must list as many of the teacher's log-probs, got k = {ks}"
    longest = max(_total_length(sequence) for sequence in sequences)
    input_ids = np.zeros((len(sequences), longest), np.int64)
    attention_mask = np.zeros_like(input_ids)
    hidden_rows = []
    for row, sequence in enumerate(sequences):
        length, num_prompt_tokens = _total_length(sequence), sequence.prompt.token_ids.size
        input_ids[row, :length] = np.concatenate([sequence.prompt.token_ids, sequence.token_ids])
        attention_mask[row, :length] = 1
        hidden_rows.append(row * longest + np.arange(num_prompt_tokens - 1, length - 1))
    return MicroBatch(
        sequence_ids=tuple(sequence.sequence_id for sequence in sequences),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        hidden_rows=torch.from_numpy(np.concatenate(hidden_rows)),
        token_ids=torch.from_numpy(np.concatenate([sequence.token_ids for sequence in sequences]).astype(np.int64)),
        sources=torch.from_numpy(np.concatenate([sequence.sources for sequence in sequences])),
        teacher_ids=torch.from_numpy(
            np.concatenate([sequence.teacher_top.token_ids for sequence in sequences]).astype(np.int64)
        ),
        teacher_logprobs=torch.from_numpy(np.concatenate([sequence.teacher_top.logprobs for sequence in sequences])),
    )


def _total_length(sequence: MixedSequence) -> int:
    """P + T."""
    return int(sequence.prompt.token_ids.size) + len(sequence)
