"""What the inspector answers, and the list of its paths. Knows nothing of where the values come from.

Everything below ``/api/v1``; ``{run}`` is the name of a folder of runs, ``{sequence_id}`` may hold slashes.

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
                                                      ``token`` (Token) for each, ``summary`` (LiveSummary) or
                                                      ``problem`` (Problem), ``: waiting``. See live_models.py
    GET  /openapi.json
    GET  /healthz, /readyz (Readiness), /metrics      not below /api/v1

Filters: first_step, last_step, switched, first_switch_min, first_switch_max, policy, finish_reason, text (contained in
prompt or completion, case ignored). Errors are ``Problem`` as ``application/problem+json`` (RFC 9457). Where a token is
set, ``Authorization: Bearer TOKEN`` goes with every request below /api and with /metrics.
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
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Answer):
    """What went wrong, as RFC 9457 has it."""

    type: str
    """Stable name of the kind of problem: ``about:blank`` or ``urn:adaswitch:problem:...``."""
    title: str
    status: int
    detail: str
    """One line: what, what was got, what is expected."""
    errors: list[str] | None = None
    """One line for each field that can't be used."""


class Run(Answer):
    """One run in the list."""

    name: str
    """The folder's name, which is the run's name in all paths."""
    modified: datetime
    """When its folder or its metrics last changed, UTC."""
    finished: bool
    """Whether it has a summary."""
    policy: str | None
    """``policy.type`` of its config.yaml; null where that can't be read."""
    num_segments: int
    """Finished segments of its trace, readable or not."""
    last_step: int | None


class RunPage(Answer):
    """Runs, the last changed first."""

    runs: list[Run]
    next_cursor: str | None


class SkippedSegment(Answer):
    """A segment of the trace that can't be read and was left out."""

    name: str
    reason: str


class RunDetail(Answer):
    """All that is known of a run as a whole."""

    name: str
    modified: datetime
    finished: bool
    policy: Policy | None
    """The switch policy and its settings; null where config.yaml can't be read."""
    divergence: str | None
    """Type of the recorded divergences, such as ``forward_kl``; null where config.yaml can't be read."""
    config_text: str | None
    """config.yaml as it stands."""
    summary: dict[str, float | int | str | None] | None
    """summary.json; null until the run has finished."""
    num_steps: int
    num_sequences: int
    num_tokens: int
    num_wasted_tokens: int
    num_switched: int
    """Sequences with a switch."""
    switch_rate: float | None
    """Share of the sequences with a switch; null without sequences."""
    teacher_share: float | None
    """Share of the tokens that the teacher wrote."""
    mean_divergence: float | None
    """nats, over all positions the student proposed."""
    mean_first_switch: float | None
    policies: list[str]
    """Names that may be given as filter ``policy``."""
    finish_reasons: list[str]
    skipped: list[SkippedSegment]
    """Segments left out. What is counted above is without them."""
    problems: list[str]
    """What else can't be read: config.yaml, metrics.jsonl, summary.json."""


class Step(Answer):
    """One training step. The first block comes from metrics.jsonl, the second from the trace; null where one lacks."""

    step: int
    loss: float | None
    """nats per token."""
    accuracy: float | None
    """Held out, where this step was evaluated."""
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
    """nats, over all positions the student proposed; so the quantiles."""
    divergence_p50: float | None
    divergence_p90: float | None
    divergence_p99: float | None


class StepList(Answer):
    """Steps in order. Step 0 may be the evaluation before training alone."""

    steps: list[Step]


class SequenceItem(Answer):
    """One mixed sequence in the list."""

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
    """Sequences that match, in the order asked for."""

    sequences: list[SequenceItem]
    num_matching: int
    """All that match, on all pages."""
    next_cursor: str | None
    """Give it back as ``cursor`` with the same filters and order; null on the last page."""


class Sequence(SequenceItem):
    """One mixed sequence with its whole texts."""

    answer: str | None
    switches: list[int]
    seed: int


class Alternative(Answer):
    """One of a model's most probable tokens."""

    token_id: int
    text: str | None
    """null where this token was never written in this run, so that its text is not known."""
    logprob: float
    """nats."""


class Token(Answer):
    """One token and all that was known when it was decided."""

    position: int
    token_id: int
    text: str
    source: Source
    is_switch: bool
    divergence: float | None
    """nats; null where the student did not propose."""
    moving_average: float | None
    """nats, of the last ``policy.window`` divergences before this one; null where the policy has none or too few."""
    threshold: float | None
    """nats."""
    student_rank: int | None
    """Place of the student's proposal in the teacher's list, from 0; the list's length where it is outside."""
    student_logprob: float | None
    teacher_logprob: float | None
    student_covered_mass: float | None
    teacher_covered_mass: float | None
    student_top: list[Alternative] | None
    """Best first; null where the student did not propose."""
    teacher_top: list[Alternative] | None
    weight_version: int | None


class TokenList(Answer):
    """A sequence's tokens in order."""

    sequence_id: str
    step: int
    tokens: list[Token]


class Histogram(Answer):
    """How often values fall between neighbouring edges; the last bin holds its upper edge too."""

    quantity: Quantity
    edges: list[float]
    """One more than ``counts``, ascending; empty without values."""
    counts: list[int]
    num_values: int
    num_missing: int
    """Sequences (for divergence: tokens) that have no such value."""


class ReplayRequest(Answer):
    """A policy, and the sequences it is asked of."""

    policy: Annotated[Policy, Field(description="A switch policy as under `policy` of a run's settings.")]
    first_step: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    last_step: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    bins: Annotated[int, Field(ge=1, le=200)] = 20
    max_differences: Annotated[int, Field(ge=0, le=1000)] = 100


class ReplayedSequence(Answer):
    """What the policy would have done first in one sequence."""

    sequence_id: str
    step: int
    outcome: Outcome
    reason: Reason
    """Why it can't be judged, why there is no switch, or ``policy`` for a switch."""
    recorded_first_switch: int | None
    replayed_first_switch: int | None


class ReplayReport(Answer):
    """Where a policy would have taken over first, had it read the recorded sequences.

    A sequence whose teacher had taken over before the policy would have can't be judged: what the student would have
    written from there on was never recorded. It counts as ``unknown`` and is part of no rate.
    """

    policy: Policy
    num_sequences: int
    num_switch: int
    num_no_switch: int
    num_unknown: int
    reasons: dict[str, int]
    """Sequences by reason."""
    recorded_switch_rate: float | None
    """Over all the sequences asked about."""
    switch_rate: float | None
    """Over the sequences that can be judged."""
    switch_rate_min: float | None
    """Over all, were none of the unknown to switch."""
    switch_rate_max: float | None
    """Over all, were each of the unknown to switch."""
    mean_recorded_first_switch: float | None
    mean_first_switch: float | None
    recorded_histogram: Histogram
    histogram: Histogram
    """Of the replayed first switches."""
    num_earlier: int
    """Switches at an earlier position than recorded, or where none was recorded."""
    num_same: int
    """Judged sequences with the recorded outcome and position."""
    num_later_or_never: int
    differences: list[ReplayedSequence]
    """The first ``max_differences`` sequences whose outcome is not the recorded one, unknown ones included."""


class StepEvent(Answer):
    """Sent when segments were added or replaced. ``id`` of the event counts the changes of the trace."""

    steps: list[int]
    """Steps that are new or were collected again."""
    num_sequences: int
    """Of the whole run, now."""
    last_metrics_step: int | None


class SkippedSegments(Answer):
    run: str
    segments: list[SkippedSegment]


class Readiness(Answer):
    """Whether requests can be served, and what is served without."""

    ready: bool
    num_runs: int
    num_skipped_segments: int
    """In runs that were looked at since the start."""
    skipped: list[SkippedSegments]
