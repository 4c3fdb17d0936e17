"""What is asked of a live run and what it answers, piece by piece. Plain values, so that asking needs no torch."""

from dataclasses import dataclass
from typing import Literal

from common.config import Policy
from common.sequence import FinishReason
from rollout_server.traces.records import TokenRecord

RefusalKind = Literal["invalid", "busy"]


class LiveRefusal(Exception):
    """The run does not write this: the request can't be used, or too many are being written already."""

    def __init__(self, kind: RefusalKind, detail: str) -> None:
        super().__init__(kind, detail)  # both, for an exception travels as its arguments
        self.kind = kind
        self.detail = detail


class LiveFailure(Exception):
    """The run began to write and could not go on. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """One prompt. None: as the run has it."""

    prompt: str | tuple[int, ...]  # text, or token ids
    as_chat: bool | None = None  # text is a user's message, put into the chat template
    policy: Policy | None = None
    max_new_tokens: int | None = None  # None: the run's, or what the context leaves if that is less
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStart:
    """First of all: what is going to be written."""

    policy: Policy
    prompt_text: str
    num_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTokens:
    """Tokens that were decided since the last piece, as a trace would hold them."""

    tokens: list[TokenRecord]
    texts: dict[int, str]  # of the alternatives that no piece named before


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEnd:
    """Last of all."""

    completion_text: str
    finish_reason: FinishReason
    num_tokens: int
    num_teacher_tokens: int
    switches: list[int]  # positions
    num_wasted_tokens: int
    mean_divergence: float | None  # nats, where the student proposed
    weight_version_min: int | None
    weight_version_max: int | None  # larger than the smallest where a weight sync came in between
    seconds: float


LivePiece = LiveStart | LiveTokens | LiveEnd
