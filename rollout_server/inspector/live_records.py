"""A request to a live run and the pieces of its answer. Plain values, so that a client needs no torch."""

from dataclasses import dataclass
from typing import Literal

from common.config import Policy
from common.sequence import FinishReason
from rollout_server.traces.records import TokenRecord

RefusalKind = Literal["invalid", "busy"]


class LiveRefusal(Exception):
    """The run refuses the request: it can't be used, or too many are running already."""

    def __init__(self, kind: RefusalKind, detail: str) -> None:
        super().__init__(kind, detail)  # both, because an exception is pickled as its arguments
        self.kind = kind
        self.detail = detail


class LiveFailure(Exception):
    """Generation started and then failed. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """One prompt. None means the run's own setting."""

    prompt: str | tuple[int, ...]  # text, or token ids
    as_chat: bool | None = None  # text is a user's message, put into the chat template
    policy: Policy | None = None
    max_new_tokens: int | None = None  # None: the run's, or what the context leaves if that is less
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStart:
    """The first piece: what is about to be generated."""

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
    texts: dict[int, str]  # of the alternatives that no earlier piece has named


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEnd:
    """The last piece."""

    completion_text: str
    finish_reason: FinishReason
    num_tokens: int
    num_teacher_tokens: int
    switches: list[int]  # positions
    num_wasted_tokens: int
    mean_divergence: float | None  # nats, where the student proposed
    weight_version_min: int | None
    weight_version_max: int | None  # larger than weight_version_min if a weight sync happened meanwhile
    seconds: float


LivePiece = LiveStart | LiveTokens | LiveEnd
