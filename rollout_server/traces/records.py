"""The records that trace readers return. Plain values, so that a page or a terminal needs neither DuckDB nor numpy.

A field without a comment is the column of the same name in ``schema.py``.
"""

from dataclasses import dataclass
from typing import Literal

SequenceOrder = Literal["step", "num_tokens", "num_teacher_tokens", "num_switches", "first_switch", "mean_divergence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRecord:
    """One mixed sequence, without its tokens."""

    sequence_id: str
    prompt_id: str
    epoch: int
    sample_index: int
    step: int
    policy: str
    prompt_text: str
    completion_text: str
    answer: str | None
    finish_reason: str
    num_tokens: int
    num_student_tokens: int
    num_teacher_tokens: int
    num_switches: int
    first_switch: int | None
    switches: list[int]
    num_wasted_tokens: int
    mean_divergence: float | None
    weight_version_min: int | None
    weight_version_max: int | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """One token and everything that was known when it was decided."""

    position: int
    token_id: int
    text: str
    source: Literal["student", "teacher", "dataset"]
    is_switch: bool
    divergence: float | None
    threshold: float | None
    student_rank: int | None
    student_logprob: float | None
    teacher_logprob: float | None
    student_covered_mass: float | None
    teacher_covered_mass: float | None
    student_top_ids: list[int] | None
    student_top_logprobs: list[float] | None
    teacher_top_ids: list[int] | None
    teacher_top_logprobs: list[float] | None
    weight_version: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTrace:
    """A mixed sequence and its tokens in order."""

    sequence: SequenceRecord
    tokens: list[TokenRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFilter:
    """Selects sequences. None means any."""

    first_step: int | None = None
    last_step: int | None = None
    switched: bool | None = None
    first_switch_min: int | None = None
    first_switch_max: int | None = None
    policy: str | None = None
    finish_reason: str | None = None
    text: str | None = None  # contained in prompt or completion, case-insensitive


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """Summary of one step's sequences. Divergences are nats over all positions where the student proposed."""

    step: int
    num_sequences: int
    num_tokens: int
    num_wasted_tokens: int
    switch_rate: float  # share of the sequences with a switch
    teacher_share: float  # share of the tokens
    mean_first_switch: float | None  # position, over the sequences with a switch
    divergence_mean: float | None
    divergence_p50: float | None
    divergence_p90: float | None
    divergence_p99: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedSegment:
    """An unreadable segment."""

    name: str
    reason: str  # one line
