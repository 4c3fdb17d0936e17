"""The records that learner and rollout server exchange: Prompt, TopLogprobs, MixedSequence.

Arrays are numpy and are checked once, when the record is made. T = number of new tokens, P = number of prompt tokens, k
= number of listed tokens per position.
"""

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length"]


class TokenSource(IntEnum):
    """Source of a token. The names are stored in traces."""

    STUDENT = 0
    TEACHER = 1
    DATASET = 2  # part of a dataset answer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One sample to generate. ``seed`` depends only on run seed, epoch, prompt id and sample index."""

    prompt_id: str
    token_ids: Ids  # [P]
    seed: int
    epoch: int = 0
    sample_index: int = 0
    answer: str | None = None
    answer_token_ids: Ids | None = None  # [T] the dataset answer and its end token, if the policy uses it

    def __post_init__(self) -> None:
        assert self.token_ids.ndim == 1, f"token_ids must be [P], got shape {self.token_ids.shape}"
        assert self.token_ids.size > 0, f"prompt {self.prompt_id} has no tokens"
        assert self.token_ids.dtype == np.int32, f"token_ids must be int32, got {self.token_ids.dtype}"

    @property
    def sequence_id(self) -> str:
        """Unique in a run. Safe in a file name or a URL if the prompt id is."""
        return f"{self.prompt_id}.{self.epoch}.{self.sample_index}"


@dataclass(frozen=True, slots=True, eq=False)
class TopLogprobs:
    """The k most probable next tokens at each of n positions, best first. Unknown rows are all NaN.

    ``logprobs`` are nats under the model's own distribution: temperature 1, before top-p and top-k.
    """

    token_ids: Ids  # [n, k]
    logprobs: Floats  # [n, k] nats

    def __post_init__(self) -> None:
        assert self.token_ids.ndim == 2, f"token_ids must be [n, k], got shape {self.token_ids.shape}"
        assert self.token_ids.shape == self.logprobs.shape, (self.token_ids.shape, self.logprobs.shape)
        assert self.token_ids.dtype == np.int32, self.token_ids.dtype
        assert self.logprobs.dtype == np.float32, self.logprobs.dtype

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    def __getitem__(self, rows: slice) -> "TopLogprobs":
        return TopLogprobs(self.token_ids[rows], self.logprobs[rows])

    @property
    def k(self) -> int:
        return int(self.token_ids.shape[1])

    def best(self, k: int) -> "TopLogprobs":
        """The same rows, with at most the k most probable tokens of each."""
        return TopLogprobs(self.token_ids[:, :k], self.logprobs[:, :k])

    @classmethod
    def empty(cls, k: int) -> Self:
        return cls(np.empty((0, k), np.int32), np.empty((0, k), np.float32))

    @classmethod
    def unknown(cls, n: int, k: int) -> Self:
        """n unknown rows."""
        return cls(np.full((n, k), -1, np.int32), np.full((n, k), np.nan, np.float32))

    @classmethod
    def concatenate(cls, parts: "list[TopLogprobs]") -> Self:
        return cls(
            np.concatenate([part.token_ids for part in parts]), np.concatenate([part.logprobs for part in parts])
        )

    def rank_of(self, token_ids: Ids) -> Ids:
        """[n] Rank of each given token in its row's list, 0 for the best; k if the list does not contain it."""
        hit = self.token_ids == token_ids[:, None]
        return np.where(hit.any(axis=1), hit.argmax(axis=1), self.k).astype(np.int32)

    def logprob_of(self, token_ids: Ids) -> Floats:
        """[n] nats. Log-prob of each given token, NaN if its row's list does not contain it."""
        return self.logprob_at(self.rank_of(token_ids))

    def logprob_at(self, ranks: Ids) -> Floats:
        """[n] nats. Log-prob of the token at a rank of each row's list, NaN at rank k and beyond."""
        listed = np.take_along_axis(self.logprobs, np.minimum(ranks, self.k - 1)[:, None], axis=1)[:, 0]
        return np.where(ranks < self.k, listed, np.nan).astype(np.float32)

    def covered_mass(self) -> Floats:
        """[n] Total probability of the listed tokens, at most 1. NaN in unknown rows."""
        mass = np.exp(self.logprobs.astype(np.float64)).sum(axis=1)
        return np.where(mass > 1.0, 1.0, mass).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedSequence:
    """The tokens of student and teacher for one prompt, or its dataset answer. All arrays are [T]-aligned.

    Values that do not exist are NaN: the divergence where the student did not propose, the threshold if the policy has
    none in nats (or the moving average is not full yet), the student's log-prob of a token it did not generate, the
    teacher's log-prob of a kept token outside its top k.
    """

    prompt: Prompt
    policy: str  # name of the switch policy
    token_ids: Ids  # [T]
    sources: npt.NDArray[np.uint8]  # [T] TokenSource
    divergences: Floats  # [T] nats
    thresholds: Floats  # [T] nats
    student_ranks: Ids  # [T] rank of the student's proposal in the teacher's list; k if not listed, -1 if none
    student_logprobs: Floats  # [T] nats
    teacher_logprobs: Floats  # [T] nats
    student_top: TopLogprobs  # [T, k]; unknown rows where the student did not propose
    teacher_top: TopLogprobs  # [T, k]; the distribution the student is trained towards
    weight_versions: Ids  # [T] version of the student that proposed at this position; -1 if none did
    switches: Ids  # [number of switches] positions, ascending
    finish_reason: FinishReason  # "stop": a stop token was generated, "length": max_new_tokens was reached
    num_wasted_tokens: int  # student tokens that were generated past a switch and dropped

    def __post_init__(self) -> None:
        num_tokens = self.token_ids.size
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (np.ndarray, TopLogprobs)) and field.name != "switches":
                assert len(value) == num_tokens, f"{field.name} has {len(value)} rows for {num_tokens} tokens"
        assert num_tokens > 0, f"sequence {self.sequence_id} has no tokens"
        assert not np.isnan(self.teacher_top.logprobs).any(), "every token needs the teacher's distribution"
        assert (self.sources[self.switches] == TokenSource.TEACHER).all(), "a switched token belongs to the teacher"
        assert (np.diff(self.switches) > 0).all(), f"switches must ascend, got {self.switches}"

    def __len__(self) -> int:
        return int(self.token_ids.size)

    @property
    def sequence_id(self) -> str:
        return self.prompt.sequence_id

    @property
    def num_student_tokens(self) -> int:
        return int((self.sources == TokenSource.STUDENT).sum())

    @property
    def num_teacher_tokens(self) -> int:
        return int((self.sources == TokenSource.TEACHER).sum())

    @property
    def first_switch(self) -> int | None:
        return int(self.switches[0]) if self.switches.size else None

    @property
    def mean_divergence(self) -> float:
        """nats. Mean over the positions where the student proposed, NaN if there are none."""
        known = self.divergences[~np.isnan(self.divergences)]
        return float(known.mean()) if known.size else float("nan")
