"""Mixed sequences -> micro-batches of every rank with a limited number of tokens. Pure functions of their arguments.

B = rows of a micro-batch, S = its longest row, N = its new tokens over all sequences, k = the teacher's listed ids, P =
prompt tokens and T = new tokens of one sequence. A row is one sequence, padded on the right. A packed micro-batch has
one row, in which all sequences are concatenated.
"""

import heapq
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.sequence import MixedSequence


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """The sequences of one forward pass, and the sources and targets of their new tokens. May contain no sequence."""

    sequence_ids: tuple[str, ...]
    num_new_tokens: tuple[int, ...]  # T of each sequence
    input_ids: Tensor  # [B, S] int64, 0 at padding
    attention_mask: Tensor | None  # [B, S] int64, 1 at tokens, 0 at padding; None if packed
    position_ids: Tensor | None  # [B, S] int64, 0 at the start of a sequence; None if not packed
    hidden_rows: Tensor  # [N] int64. Row of the flat [B * S] hidden states that predicts the token
    token_ids: Tensor  # [N] int64
    sources: Tensor  # [N] uint8 TokenSource
    teacher_ids: Tensor  # [N, k] int64
    teacher_logprobs: Tensor  # [N, k] float32 nats

    def __post_init__(self) -> None:
        (layout,) = (layout for layout in (self.attention_mask, self.position_ids) if layout is not None)
        assert self.input_ids.shape == layout.shape, (self.input_ids.shape, layout.shape)
        assert sum(self.num_new_tokens) == len(self), (self.num_new_tokens, len(self))
        assert len(self.num_new_tokens) == len(self.sequence_ids), (self.num_new_tokens, self.sequence_ids)
        assert self.teacher_ids.shape == self.teacher_logprobs.shape, self.teacher_ids.shape
        for name in ("token_ids", "sources", "teacher_ids"):
            assert len(getattr(self, name)) == len(self), f"{name} must have {len(self)} rows"

    def __len__(self) -> int:
        """N."""
        return int(self.hidden_rows.numel())

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy of the micro-batch on a device."""
        names = (
            "input_ids",
            "attention_mask",
            "position_ids",
            "hidden_rows",
            "token_ids",
            "sources",
            "teacher_ids",
            "teacher_logprobs",
        )
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None})

    def sequence_id_of(self, token: int) -> str:
        """The id of the sequence that contains this one of the N tokens."""
        return self.sequence_ids[int(np.searchsorted(np.cumsum(self.num_new_tokens), token, side="right"))]


def divide(
    sequences: list[MixedSequence], num_ranks: int, tokens_per_micro_batch: int, *, packed: bool
) -> list[list[list[MixedSequence]]]:
    """The sequences of each micro-batch of each rank. All ranks have the same number of micro-batches, some of them
    empty if necessary, because ranks compute each micro-batch together.

    The longest remaining sequence goes to the rank with the fewest tokens. The result depends on the set of sequences
    and not on their order, so that every rank computes the same division.
    """
    loads = [(0, rank) for rank in range(num_ranks)]  # (tokens, rank), a heap
    sequences_by_rank: list[list[MixedSequence]] = [[] for _ in range(num_ranks)]
    for sequence in _longest_first(sequences):
        num_tokens, rank = loads[0]
        sequences_by_rank[rank].append(sequence)
        heapq.heapreplace(loads, (num_tokens + _total_length(sequence), rank))
    divided = [_groups(rank_sequences, tokens_per_micro_batch, packed=packed) for rank_sequences in sequences_by_rank]
    num_micro_batches = max(map(len, divided))
    return [groups + [[] for _ in range(num_micro_batches - len(groups))] for groups in divided]


def _groups(sequences: list[MixedSequence], tokens_per_micro_batch: int, *, packed: bool) -> list[list[MixedSequence]]:
    """Every sequence in exactly one micro-batch of at most that many tokens, prompts and padding included.

    A sequence that is longer than the limit gets a micro-batch of its own. The longest sequences come first. Neighbors
    then have similar lengths, so there is little padding, and running out of memory shows in the first micro-batch.
    """
    """The sequences of each micro-batch. A sequence that is longer than the limit is alone."""
    assert tokens_per_micro_batch >= 1, tokens_per_micro_batch
    group_of = _packed_into if packed else _padded_with
    groups: list[list[MixedSequence]] = []
    for sequence in _longest_first(sequences):
        group = group_of(groups, _total_length(sequence), tokens_per_micro_batch)
        if group is None:
            groups.append([sequence])
        else:
            group.append(sequence)
    return groups


def _padded_with(groups: list[list[MixedSequence]], length: int, budget: int) -> list[MixedSequence] | None:
    """The last group if the sequence fits. Its sequences are all padded to its first one, which is the longest."""
    fits = bool(groups) and (len(groups[-1]) + 1) * _total_length(groups[-1][0]) <= budget
    return groups[-1] if fits else None


def _packed_into(groups: list[list[MixedSequence]], length: int, budget: int) -> list[MixedSequence] | None:
    """The first group in which the sequence fits."""
    return next((group for group in groups if sum(map(_total_length, group)) + length <= budget), None)


def collate(sequences: list[MixedSequence], *, packed: bool = False) -> MicroBatch:
    """One micro-batch of these sequences, in this order.

    Token t of a sequence is the input at P + t, and is predicted by the hidden state before it, at P + t - 1.
    """
    ks = sorted({sequence.teacher_top.k for sequence in sequences})
    assert len(ks) == 1, f"all sequences must have the same number of the teacher's log-probs, got k = {ks}"
    lengths = [_total_length(sequence) for sequence in sequences]
    shape = (1, sum(lengths)) if packed else (len(sequences), max(lengths))
    starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(sequences)) * shape[1]
    input_ids, positions = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    hidden_rows = []
    for start, length, sequence in zip(starts, lengths, sequences, strict=True):
        here = slice(start, start + length)
        input_ids.reshape(-1)[here] = np.concatenate([sequence.prompt.token_ids, sequence.token_ids])
        positions.reshape(-1)[here] = np.arange(length)
        hidden_rows.append(start + np.arange(sequence.prompt.token_ids.size - 1, length - 1))
    return MicroBatch(
        sequence_ids=tuple(sequence.sequence_id for sequence in sequences),
        num_new_tokens=tuple(map(len, sequences)),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=None if packed else torch.from_numpy((positions >= 0).astype(np.int64)),
        position_ids=torch.from_numpy(positions) if packed else None,
        hidden_rows=torch.from_numpy(np.concatenate(hidden_rows)),
        token_ids=torch.from_numpy(np.concatenate([sequence.token_ids for sequence in sequences]).astype(np.int64)),
        sources=torch.from_numpy(np.concatenate([sequence.sources for sequence in sequences])),
        teacher_ids=torch.from_numpy(
            np.concatenate([sequence.teacher_top.token_ids for sequence in sequences]).astype(np.int64)
        ),
        teacher_logprobs=torch.from_numpy(np.concatenate([sequence.teacher_top.logprobs for sequence in sequences])),
    )


def empty_micro_batch(k: int) -> MicroBatch:
    """A micro-batch without a sequence and with one input token, for a rank that has fewer than others."""
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        sequence_ids=(),
        num_new_tokens=(),
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        attention_mask=torch.ones(1, 1, dtype=torch.int64),
        position_ids=None,
        hidden_rows=none,
        token_ids=none,
        sources=none.to(torch.uint8),
        teacher_ids=none.reshape(0, k),
        teacher_logprobs=torch.zeros(0, k),
    )


def _longest_first(sequences: list[MixedSequence]) -> list[MixedSequence]:
    return sorted(sequences, key=lambda sequence: (-_total_length(sequence), sequence.sequence_id))


def _total_length(sequence: MixedSequence) -> int:
    """P + T."""
    return int(sequence.prompt.token_ids.size) + len(sequence)
