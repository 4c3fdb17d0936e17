"""Request and events of ``POST /generate``, and the response of ``GET /live``. ``models.py`` lists all paths."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config import Policy
from rollout_server.inspector.models import Answer

MAX_PROMPT_TOKENS = 16_384


class LiveState(Answer):
    """Whether prompts can be sent to live runs."""

    attached: bool
    runs: list[str]
    """Runs in training on the attached cluster. A name occurs twice if two runs have it."""


class GenerateRequest(Answer):
    """One prompt. Omitted fields use the run's settings."""

    run: Annotated[
        str | None, Field(min_length=1, max_length=255, description="May be omitted if one run is live.")
    ] = None
    prompt: Annotated[str | None, Field(min_length=1, max_length=50_000, description="Text.")] = None
    prompt_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, le=2**31 - 1)]] | None,
        Field(min_length=1, max_length=MAX_PROMPT_TOKENS, description="Instead of text."),
    ] = None
    as_chat: Annotated[bool | None, Field(description="Put the text into the chat template as a user message.")] = None
    policy: Annotated[Policy | None, Field(description="Same as `policy` in a run's settings.")] = None
    max_new_tokens: Annotated[int | None, Field(ge=1, le=2**20)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 is greedy.")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, description="Same seed and weights: same tokens.")] = 0

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.prompt_token_ids is None):
            raise ValueError("exactly one of prompt and prompt_token_ids must be given")
        return self


class LiveStarted(Answer):
    """Event ``start``: the settings of the generation."""

    policy: Policy
    prompt_text: str
    num_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


class LiveSummary(Answer):
    """Event ``summary``, the last one."""

    completion_text: str
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    num_teacher_tokens: int
    switches: list[int]
    num_wasted_tokens: int
    mean_divergence: float | None
    """nats, over the positions where the student proposed."""
    weight_version_min: int | None
    weight_version_max: int | None
    """Larger than the minimum if new weights arrived during the generation."""
    seconds: float


EVENT_SCHEMA = {
    "type": "object",
    "properties": {
        "event": {"enum": ["start", "token", "summary", "problem"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
EVENT_EXAMPLES = {
    "a token and the end": {
        "value": 'event: token\ndata: {"position":21,"token_id":14,"text":"7","source":"teacher","is_switch":true,'
        '"divergence":4.01,"moving_average":0.02,"threshold":0.5}\n\n'
        'event: summary\ndata: {"finish_reason":"stop","num_tokens":38,"num_teacher_tokens":17,"switches":[21]}\n\n'
    }
}
REQUEST_EXAMPLES = {
    "text": {"summary": "With the run's settings", "value": {"prompt": "2-6+5*4-7*4*2="}},
    "policy": {
        "summary": "Another policy, greedy",
        "value": {
            "run": "demo",
            "prompt": "2-6+5*4-7*4*2=",
            "policy": {"type": "adaswitch", "multiplier": 2, "window": 5, "floor": 0.1},
            "temperature": 0,
            "max_new_tokens": 64,
        },
    },
}
