"""A mixed sequence under construction: tokens and their measurements are appended together, and sealed once.

Owned by one controller coroutine. Calls no engine and makes no decision.
"""

from dataclasses import dataclass, field

import numpy as np

from common.sequence import FinishReason, Floats, Ids, MixedSequence, Prompt, TokenSource, TopLogprobs
from rollout_server.engines.protocol import Written

_NO_VERSION = -1
_NO_RANK = -1
_COLUMNS = {
    "token_ids": np.int32,
    "sources": np.uint8,
    "divergences": np.float32,
    "thresholds": np.float32,
    "student_ranks": np.int32,
    "student_logprobs": np.float32,
    "teacher_logprobs": np.float32,
    "weight_versions": np.int32,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """Consecutive student tokens with the teacher's scores and the policy's thresholds. n = number of tokens."""

    token_ids: Ids  # [n]
    student_logprobs: Floats  # [n] nats
    student_top: TopLogprobs  # [n, k]
    teacher_top: TopLogprobs  # [n, k]
    divergences: Floats  # [n] nats
    thresholds: Floats  # [n] nats
    student_ranks: Ids  # [n] rank in the teacher's list, k if outside it
    weight_version: int

    def __len__(self) -> int:
        return int(self.token_ids.size)

    def __getitem__(self, rows: slice) -> "Judged":
        return Judged(
            weight_version=self.weight_version,
            **{name: getattr(self, name)[rows] for name in self.__slots__ if name != "weight_version"},
        )


class _Column:
    """An array that grows at its end. ``values`` is a contiguous view, however many pieces were appended."""

    def __init__(self, values: np.ndarray) -> None:
        self._buffer = values.copy()
        self._size = values.size

    def extend(self, values: np.ndarray) -> None:
        end = self._size + values.size
        if end > self._buffer.size:
            grown = np.empty(max(end, 2 * self._buffer.size), self._buffer.dtype)
            grown[: self._size] = self._buffer[: self._size]
            self._buffer = grown
        self._buffer[self._size : end] = values
        self._size = end

    @property
    def values(self) -> np.ndarray:
        return self._buffer[: self._size]


@dataclass(slots=True)
class SequenceBuilder:
    """Grows through ``keep`` (student) and ``take`` (teacher) until it has a finish_reason."""

    prompt: Prompt
    top_logprobs: int
    max_new_tokens: int
    finish_reason: FinishReason | None = None
    num_wasted_tokens: int = 0
    num_judged: int = 0  # proposals kept or rejected so far
    _text: _Column = field(init=False)  # the prompt followed by the column token_ids
    _columns: dict[str, _Column] = field(init=False)
    _student_top: list[TopLogprobs] = field(default_factory=list)
    _teacher_top: list[TopLogprobs] = field(default_factory=list)
    _switches: list[int] = field(default_factory=list)
    _num_tokens: int = 0

    def __post_init__(self) -> None:
        self._text = _Column(self.prompt.token_ids)
        self._columns = {name: _Column(np.empty(0, dtype)) for name, dtype in _COLUMNS.items()}

    def __len__(self) -> int:
        return self._num_tokens

    @property
    def num_left(self) -> int:
        """Tokens that may still be appended."""
        return self.max_new_tokens - len(self)

    @property
    def num_switches(self) -> int:
        return len(self._switches)

    @property
    def text(self) -> Ids:
        """[P + T so far] Prompt and new tokens. The returned view does not change while the builder grows."""
        return self._text.values

    @property
    def last_token_id(self) -> int:
        return int(self._text.values[-1])

    @property
    def divergences(self) -> Floats:
        """[T so far] nats; NaN where the teacher generated without a proposal to judge."""
        return self._columns["divergences"].values

    @property
    def student_ranks(self) -> Ids:
        """[T so far]"""
        return self._columns["student_ranks"].values

    def keep(self, judged: Judged) -> None:
        """Append student tokens that the policy accepted."""
        self.num_judged += len(judged)
        self._append(
            judged.student_top,
            judged.teacher_top,
            token_ids=judged.token_ids,
            sources=np.full(len(judged), TokenSource.STUDENT, np.uint8),
            divergences=judged.divergences,
            thresholds=judged.thresholds,
            student_ranks=judged.student_ranks,
            student_logprobs=judged.student_logprobs,
            teacher_logprobs=judged.teacher_top.logprob_at(judged.student_ranks),
            weight_versions=np.full(len(judged), judged.weight_version, np.int32),
        )

    def take(self, written: Written, refused: Judged | None, *, is_switch: bool = True) -> None:
        """Append teacher tokens from a switch on. ``refused`` is the student's proposal at the switch, if there is one.

        The divergence and threshold at the switch are stored with the teacher's token that replaces the proposal. With
        ``is_switch=False`` the tokens continue the current guidance. The sequence is finished if the teacher stopped or
        the token limit is reached.
        """
        num_tokens = len(written)
        student_top = TopLogprobs.unknown(num_tokens, self.top_logprobs)
        divergences, thresholds = np.full((2, num_tokens), np.nan, np.float32)
        student_ranks = np.full(num_tokens, _NO_RANK, np.int32)
        weight_versions = np.full(num_tokens, _NO_VERSION, np.int32)
        if refused is not None:
            self.num_judged += 1
            student_top = TopLogprobs.concatenate([refused.student_top, student_top[1:]])
            divergences[0], thresholds[0] = refused.divergences[0], refused.thresholds[0]
            student_ranks[0], weight_versions[0] = refused.student_ranks[0], refused.weight_version
        if is_switch:
            self._switches.append(len(self))
        self._append(
            student_top,
            written.top,
            token_ids=written.token_ids,
            sources=np.full(num_tokens, TokenSource.TEACHER, np.uint8),
            divergences=divergences,
            thresholds=thresholds,
            student_ranks=student_ranks,
            student_logprobs=np.full(num_tokens, np.nan, np.float32),
            teacher_logprobs=written.logprobs,
            weight_versions=weight_versions,
        )
        if written.finish_reason == "stop" or len(self) >= self.max_new_tokens:
            self.finish_reason = written.finish_reason

    def _append(self, student_top: TopLogprobs, teacher_top: TopLogprobs, **columns: np.ndarray) -> None:
        if not len(student_top):
            return  # a switch at the first token of a proposal keeps none of it
        for name, values in columns.items():
            self._columns[name].extend(values)
        self._text.extend(columns["token_ids"])
        self._student_top.append(student_top)
        self._teacher_top.append(teacher_top)
        self._num_tokens += len(student_top)

    def seal(self, policy: str) -> MixedSequence:
        """The finished sequence."""
        assert self.finish_reason is not None, f"{self.prompt.sequence_id} is not finished"
        return self._sequence(policy, self.finish_reason, first_part=0)

    @property
    def num_parts(self) -> int:
        """How many times tokens were appended."""
        return len(self._student_top)

    def excerpt(self, policy: str, first_part: int) -> MixedSequence:
        """The tokens from part ``first_part`` on, as a truncated sequence of its own whose positions start at 0."""
        return self._sequence(policy, "length", first_part=first_part)

    def _sequence(self, policy: str, finish_reason: FinishReason, *, first_part: int) -> MixedSequence:
        first_position = sum(map(len, self._student_top[:first_part]))
        switches = np.array(self._switches, np.int32) - np.int32(first_position)
        return MixedSequence(
            prompt=self.prompt,
            policy=policy,
            student_top=TopLogprobs.concatenate(self._student_top[first_part:]),
            teacher_top=TopLogprobs.concatenate(self._teacher_top[first_part:]),
            switches=switches[switches >= 0],
            finish_reason=finish_reason,
            num_wasted_tokens=self.num_wasted_tokens,
            **{name: column.values[first_position:].copy() for name, column in self._columns.items()},
        )
