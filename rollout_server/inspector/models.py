"""The inspector's responses, and the list of its paths. Independent of where the values come from.

All paths are below ``/api/v1``. ``{run}`` is the name of a run's folder, ``{sequence_id}`` may contain slashes.

    GET  /runs                                        RunPage        limit, cursor
    GET  /runs/{run}                                  RunDetail
    GET  /runs/{run}/steps                            StepList       first_step, last_step
    GET  /runs/{run}/sequences                        SequencePage   filters, order, descending, limit, cursor
    GET  /runs/{run}/sequences/{sequence_id}          Sequence
    GET  /runs/{run}/sequences/{sequence_id}/tokens   TokenList
    GET  /runs/{run}/histograms/{quantity}            Histogram      filters, bins; first_switch, divergence, num_tokens
    GET  /runs/{run}/downloads/{table}                a file         sequences (filters) or tokens (step); csv, parquet
    POST /runs/{run}/replay                           ReplayReport   body ReplayRequest
    GET  /runs/{run}/events                           text/event-stream: ``steps`` (data: StepEvent), ``: waiting``
    GET  /live                                        LiveState      whether a cluster is attached, and its live runs
    POST /generate                                    text/event-stream, body GenerateRequest: ``start`` (LiveStarted),
                                                      ``token`` (Token) per token, ``summary`` (LiveSummary) or
                                                      ``problem`` (Problem), ``: waiting``. See live_models.py
    GET  /openapi.json
    GET  /healthz, /readyz (Readiness), /metrics      not below /api/v1

Filters: first_step, last_step, switched, first_switch_min, first_switch_max, policy, finish_reason, text (contained in
prompt or completion, case-insensitive). Errors are ``Problem`` as ``application/problem+json`` (RFC 9457). If a token
is set, requests below /api and to /metrics need ``Authorization: Bearer TOKEN``.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.config import Policy

Quantity = Literal["first_switch", "divergence", "num_tokens"]
Source = Literal["student", "teacher", "dataset"]
Outcome = Literal["switch", "no_switch", "unknown"]
Reason = Literal["policy", "student_finished", "length_limit", "given_answer", "teacher_had_taken_over"]


class Answer(BaseModel):
    """Base of all responses."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Answer):
    """An error, in the form of RFC 9457."""

    type: str
    """Stable identifier of the kind of error: ``about:blank`` or ``urn:adaswitch:problem:...``."""
    title: str
    status: int
    detail: str
    """One line: what is wrong, what was received, what is expected."""
    errors: list[str] | None = None
    """One line per invalid field."""


class Run(Answer):
    """One run in the list."""

    name: str
    """The folder's name, which identifies the run in all paths."""
    modified: datetime
    """Time of the last change of its folder or metrics, UTC."""
    finished: bool
    """Whether it has a summary."""
    policy: str | None
    """``policy.type`` in config.yaml; null if that can't be read."""
    num_segments: int
    """Number of finished segments in its trace, including unreadable ones."""
    last_step: int | None


class RunPage(Answer):
    """Runs, most recently changed first."""

    runs: list[Run]
    next_cursor: str | None


class SkippedSegment(Answer):
    """An unreadable segment of the trace."""

    name: str
    reason: str


class RunDetail(Answer):
    """Everything about one run."""

    name: str
    modified: datetime
    finished: bool
    policy: Policy | None
    """The switch policy and its settings; null if config.yaml can't be read."""
    divergence: str | None
    """Type of the recorded divergences, for example ``forward_kl``; null if config.yaml can't be read."""
    config_text: str | None
    """Content of config.yaml."""
    summary: dict[str, float | int | str | None] | None
    """summary.json; null until the run has finished."""
    num_steps: int
    num_sequences: int
    num_tokens: int
    num_wasted_tokens: int
    num_switched: int
    """Number of sequences with a switch."""
    switch_rate: float | None
    """Share of sequences with a switch; null without sequences."""
    teacher_share: float | None
    """Share of tokens that the teacher generated."""
    mean_divergence: float | None
    """nats, over all positions where the student proposed."""
    mean_first_switch: float | None
    policies: list[str]
    """Valid values for the filter ``policy``."""
    finish_reasons: list[str]
    skipped: list[SkippedSegment]
    """Unreadable segments. The counts above exclude them."""
    problems: list[str]
    """Other files that can't be read: config.yaml, metrics.jsonl, summary.json."""


class Step(Answer):
    """One training step. The first block comes from metrics.jsonl, the second from the trace; null if missing."""

    step: int
    loss: float | None
    """nats per token."""
    accuracy: float | None
    """On the held-out data, if this step was evaluated."""
    grad_norm: float | None
    learning_rate: float | None
    weight_version: int | None
    rollout_s: float | None
    train_s: float | None
    sync_s: float | None
    tokens_per_s: float | None

    num_sequences: int | None
    num_tokens: int | None
    num_wasted_tokens: int | None
    switch_rate: float | None
    teacher_share: float | None
    mean_first_switch: float | None
    divergence_mean: float | None
    """nats, over all positions where the student proposed, like the quantiles."""
    divergence_p50: float | None
    divergence_p90: float | None
    divergence_p99: float | None


class StepList(Answer):
    """Steps in order. Step 0 may contain only the evaluation before training."""

    steps: list[Step]


class SequenceItem(Answer):
    """One mixed sequence in a list."""

    sequence_id: str
    prompt_id: str
    epoch: int
    sample_index: int
    step: int
    policy: str
    prompt_text: str
    """The first 200 characters."""
    completion_text: str
    """The first 200 characters."""
    finish_reason: str
    num_tokens: int
    num_student_tokens: int
    num_teacher_tokens: int
    num_switches: int
    first_switch: int | None
    num_wasted_tokens: int
    mean_divergence: float | None
    """nats."""
    weight_version_min: int | None
    weight_version_max: int | None


class SequencePage(Answer):
    """Matching sequences in the requested order."""

    sequences: list[SequenceItem]
    num_matching: int
    """Number of matches on all pages."""
    next_cursor: str | None
    """Pass it as ``cursor`` with the same filters and order to get the next page; null on the last page."""


class Sequence(SequenceItem):
    """One mixed sequence with its full texts."""

    answer: str | None
    switches: list[int]
    seed: int


class Alternative(Answer):
    """One of a model's most probable tokens."""

    token_id: int
    text: str | None
    """null if this token was never generated in this run, because its text is then unknown."""
    logprob: float
    """nats."""


class Token(Answer):
    """One token and everything that was known when it was decided."""

    position: int
    token_id: int
    text: str
    source: Source
    is_switch: bool
    divergence: float | None
    """nats; null where the student made no proposal."""
    moving_average: float | None
    """nats, mean of the ``policy.window`` divergences before this one; null without such a window, or if too few."""
    threshold: float | None
    """nats."""
    student_rank: int | None
    """Rank of the student's proposal in the teacher's list, from 0; the list's length if outside."""
    student_logprob: float | None
    teacher_logprob: float | None
    student_covered_mass: float | None
    teacher_covered_mass: float | None
    student_top: list[Alternative] | None
    """Best first; null where the student made no proposal."""
    teacher_top: list[Alternative] | None
    weight_version: int | None


class TokenList(Answer):
    """A sequence's tokens in order."""

    sequence_id: str
    step: int
    tokens: list[Token]


class Histogram(Answer):
    """Number of values between neighboring edges; the last bin includes its upper edge."""

    quantity: Quantity
    edges: list[float]
    """One more than ``counts``, ascending; empty without values."""
    counts: list[int]
    num_values: int
    num_missing: int
    """Number of sequences (for divergence: tokens) without such a value."""


class ReplayRequest(Answer):
    """A policy to replay, and on which sequences."""

    policy: Annotated[Policy, Field(description="A switch policy, same as `policy` in a run's settings.")]
    first_step: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    last_step: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    bins: Annotated[int, Field(ge=1, le=200)] = 20
    max_differences: Annotated[int, Field(ge=0, le=1000)] = 100


class ReplayedSequence(Answer):
    """The policy's first decision in one sequence."""

    sequence_id: str
    step: int
    outcome: Outcome
    reason: Reason
    """``policy`` for a switch; otherwise why there is no switch, or why the outcome is unknown."""
    recorded_first_switch: int | None
    replayed_first_switch: int | None


class ReplayReport(Answer):
    """Where a policy would have switched first on the recorded sequences.

    If the recorded switch comes before the policy's, the outcome is ``unknown``, because the student's further tokens
    were never recorded. Unknown sequences are not part of ``switch_rate``.
    """

    policy: Policy
    num_sequences: int
    num_switch: int
    num_no_switch: int
    num_unknown: int
    reasons: dict[str, int]
    """Number of sequences by reason."""
    recorded_switch_rate: float | None
    """Share of all selected sequences."""
    switch_rate: float | None
    """Share of the sequences with a known outcome."""
    switch_rate_min: float | None
    """Share of all sequences if none of the unknown ones switches."""
    switch_rate_max: float | None
    """Share of all sequences if each of the unknown ones switches."""
    mean_recorded_first_switch: float | None
    mean_first_switch: float | None
    recorded_histogram: Histogram
    histogram: Histogram
    """Replayed first switches."""
    num_earlier: int
    """Switches earlier than recorded, including sequences without a recorded switch."""
    num_same: int
    """Sequences with the recorded outcome and position."""
    num_later_or_never: int
    differences: list[ReplayedSequence]
    """The first ``max_differences`` sequences whose outcome differs from the recorded one, including unknown ones."""


class StepEvent(Answer):
    """Sent when segments are added or replaced. The event's ``id`` counts the changes of the trace."""

    steps: list[int]
    """Steps that are new or have been collected again."""
    num_sequences: int
    """Present total of the run."""
    last_metrics_step: int | None


class SkippedSegments(Answer):
    run: str
    segments: list[SkippedSegment]


class Readiness(Answer):
    """Whether requests can be served, and which segments are left out."""

    ready: bool
    num_runs: int
    num_skipped_segments: int
    """In recently used runs."""
    skipped: list[SkippedSegments]
