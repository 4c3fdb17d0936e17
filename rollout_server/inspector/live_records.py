"""A request to a live run and the pieces of its response. Plain values, so that a client does not need torch."""

from dataclasses import dataclass
from typing import Literal

from common.config import Policy
from common.sequence import FinishReason
from rollout_server.traces.records import TokenRecord

RefusalKind = Literal["invalid", "busy"]


class LiveRefusal(Exception):
    """The run rejects the request: it is invalid, or too many are running already."""

    def __init__(self, kind: RefusalKind, detail: str) -> None:
        super().__init__(kind, detail)  # both, because an exception is pickled as its arguments
        self.kind = kind
        self.detail = detail


class LiveFailure(Exception):
    """Generation failed after it started. The message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """One prompt. None means the run's own setting."""

    prompt: str | tuple[int, ...]  # text, or token ids
    as_chat: bool | None = None  # put the text into the chat template as a user message
    policy: Policy | None = None
    max_new_tokens: int | None = None  # None: the run's value, limited by the context length
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStart:
    """The first piece: the settings of the generation."""

    policy: Policy
    prompt_text: str
    num_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTokens:
    """Tokens decided since the last piece, in the form of a trace."""

    tokens: list[TokenRecord]
    texts: dict[int, str]  # of alternatives that were not in earlier pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEnd:
    """The last piece."""

    completion_text: str
    finish_reason: FinishReason
    num_tokens: int
    num_teacher_tokens: int
    switches: list[int]  # positions
    num_wasted_tokens: int
    mean_divergence: float | None  # nats, over the positions where the student proposed
    weight_version_min: int | None
    weight_version_max: int | None  # larger than weight_version_min if a weight sync happened in between
    seconds: float


LivePiece = LiveStart | LiveTokens | LiveEnd
