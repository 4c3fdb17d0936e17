"""The inspector's routes for runs, steps, sequences and tokens. ``traces/queries.py`` does the queries."""

import base64
import binascii
import json
from dataclasses import asdict
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Path, Query, Request

from rollout_server.inspector import models
from rollout_server.inspector.problems import ProblemError, answers
from rollout_server.inspector.runs import RunStore, as_time, num_segments
from rollout_server.inspector.tokens import moving_averages, shown_token
from rollout_server.traces import queries
from rollout_server.traces.queries import PageKey
from rollout_server.traces.records import SequenceFilter, SequenceOrder, SequenceRecord, StepSummary

QUERY_TIMEOUT_S = 10.0
_EXCERPT = 200  # characters of a text in a list
_MAX_PAGE = 200

router = APIRouter(prefix="/api/v1")

RunName = Annotated[str, Path(min_length=1, max_length=255, examples=["demo"], description="Name of a run's folder.")]
SequenceId = Annotated[str, Path(min_length=1, max_length=1000, examples=["12.0.0"])]
StepNumber = Annotated[int | None, Query(ge=0, le=2**31 - 1)]
Position = Annotated[int | None, Query(ge=0, le=2**31 - 1)]
Word = Annotated[str | None, Query(max_length=200)]
Limit = Annotated[int, Query(ge=1, le=_MAX_PAGE)]
Cursor = Annotated[str | None, Query(max_length=4000, description="`next_cursor` of the previous page.")]


def _store(request: Request) -> RunStore:
    store: RunStore = request.app.state.store
    return store


Store = Annotated[RunStore, Depends(_store)]


def _filters(
    first_step: StepNumber = None,
    last_step: StepNumber = None,
    switched: Annotated[bool | None, Query(description="Whether the teacher took over.")] = None,
    first_switch_min: Position = None,
    first_switch_max: Position = None,
    policy: Word = None,
    finish_reason: Word = None,
    text: Annotated[Word, Query(description="Contained in prompt or completion, case-insensitive.")] = None,
) -> SequenceFilter:
    return SequenceFilter(
        first_step=first_step,
        last_step=last_step,
        switched=switched,
        first_switch_min=first_switch_min,
        first_switch_max=first_switch_max,
        policy=policy,
        finish_reason=finish_reason,
        text=text,
    )


Filters = Annotated[SequenceFilter, Depends(_filters)]


@router.get("/runs", responses=answers(503))
def list_runs(store: Store, limit: Limit = 50, cursor: Cursor = None) -> models.RunPage:
    """The runs, most recently changed first."""
    runs = store.names()
    start = _offset(cursor)
    shown = []
    for name, modified in runs[start : start + limit]:
        files = store.files(name)
        segments, last_step = num_segments(store.path(name))
        shown.append(
            models.Run(
                name=name,
                modified=as_time(modified),
                finished=files.summary is not None,
                policy=files.policy.type if files.policy else None,
                num_segments=segments,
                last_step=last_step,
            )
        )
    end = start + limit
    return models.RunPage(runs=shown, next_cursor=_encode([end]) if end < len(runs) else None)


@router.get("/runs/{run}", responses=answers(404, 503))
def describe_run(run: RunName, store: Store) -> models.RunDetail:
    """Everything about one run."""
    index = store.index(run, QUERY_TIMEOUT_S)
    files = store.files(run)
    totals = queries.totals(index, QUERY_TIMEOUT_S)
    policies, finish_reasons = queries.names(index, QUERY_TIMEOUT_S)
    return models.RunDetail(
        name=run,
        modified=as_time(dict(store.names()).get(run, 0.0)),
        finished=files.summary is not None,
        policy=files.policy,
        divergence=files.divergence,
        config_text=files.config_text,
        summary=files.summary,
        num_steps=len(index.steps),
        num_sequences=totals.num_sequences,
        num_tokens=totals.num_tokens,
        num_wasted_tokens=totals.num_wasted_tokens,
        num_switched=totals.num_switched,
        switch_rate=totals.num_switched / totals.num_sequences if totals.num_sequences else None,
        teacher_share=totals.num_teacher_tokens / totals.num_tokens if totals.num_tokens else None,
        mean_divergence=totals.mean_divergence,
        mean_first_switch=totals.mean_first_switch,
        policies=policies,
        finish_reasons=finish_reasons,
        skipped=[models.SkippedSegment(**asdict(segment)) for segment in index.skipped],
        problems=files.problems,
    )


@router.get("/runs/{run}/steps", responses=answers(404, 503))
def list_steps(
    run: RunName, store: Store, first_step: StepNumber = None, last_step: StepNumber = None
) -> models.StepList:
    """Each step's metrics, and a summary of its sequences."""
    summaries = dict(store.index(run, QUERY_TIMEOUT_S).steps)
    metrics = store.files(run).metrics
    first, last = first_step or 0, 2**31 if last_step is None else last_step
    steps = sorted(step for step in {*summaries, *metrics} if first <= step <= last)
    return models.StepList(steps=[_step(step, metrics.get(step, {}), summaries.get(step)) for step in steps])


@router.get("/runs/{run}/sequences", responses=answers(404, 503))
def list_sequences(
    run: RunName,
    store: Store,
    where: Filters,
    order: SequenceOrder = "step",
    descending: bool = False,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> models.SequencePage:
    """Matching sequences, page by page. Ties are ordered by step and id; sequences without a value come last."""
    index = store.index(run, QUERY_TIMEOUT_S)
    records, end, num_matching = queries.page(
        index,
        where,
        order=order,
        descending=descending,
        limit=limit,
        after=_page_key(cursor),
        timeout_s=QUERY_TIMEOUT_S,
    )
    return models.SequencePage(
        sequences=[models.SequenceItem(**_item(record, _EXCERPT)) for record in records],
        num_matching=num_matching,
        next_cursor=_encode([end.is_null, end.value, end.step, end.sequence_id]) if end else None,
    )


@router.get("/runs/{run}/sequences/{sequence_id:path}/tokens", responses=answers(404, 503))
def list_tokens(run: RunName, sequence_id: SequenceId, store: Store) -> models.TokenList:
    """A sequence's tokens: the source of each, and everything that was known when it was decided."""
    index = store.index(run, QUERY_TIMEOUT_S)
    record = queries.sequence(index, sequence_id, QUERY_TIMEOUT_S)
    tokens = queries.tokens(index, record.step, sequence_id) if record else []
    if record is None or not tokens:
        raise ProblemError(404, "unknown-sequence", f"no sequence {sequence_id[:100]!r} in this run")
    averages = moving_averages(store.files(run).policy, [token.divergence for token in tokens], 0)
    shown = [shown_token(token, mean, index.token_texts) for token, mean in zip(tokens, averages, strict=True)]
    return models.TokenList(sequence_id=sequence_id, step=record.step, tokens=shown)


@router.get("/runs/{run}/sequences/{sequence_id:path}", responses=answers(404, 503))
def describe_sequence(run: RunName, sequence_id: SequenceId, store: Store) -> models.Sequence:
    """One sequence with its full texts."""
    record = queries.sequence(store.index(run, QUERY_TIMEOUT_S), sequence_id, QUERY_TIMEOUT_S)
    if record is None:
        raise ProblemError(404, "unknown-sequence", f"no sequence {sequence_id[:100]!r} in this run")
    extra = {"answer": record.answer, "switches": record.switches, "seed": record.seed}
    return models.Sequence(**_item(record, None), **extra)


@router.get("/runs/{run}/histograms/{quantity}", responses=answers(404, 503))
def describe_distribution(
    run: RunName,
    quantity: models.Quantity,
    store: Store,
    where: Filters,
    bins: Annotated[int, Query(ge=1, le=200)] = 40,
) -> models.Histogram:
    """The distribution of a quantity over the matching sequences, or for divergence over their tokens."""
    index = store.index(run, QUERY_TIMEOUT_S)
    edges, counts, num_missing = queries.histogram(index, quantity, where, bins, QUERY_TIMEOUT_S)
    return models.Histogram(
        quantity=quantity, edges=edges, counts=counts, num_values=sum(counts), num_missing=num_missing
    )


def _step(step: int, metrics: dict[str, float], summary: StepSummary | None) -> models.Step:
    version = metrics.get("sync/weight_version")
    traced = asdict(summary) if summary else {}
    traced.pop("step", None)
    from_trace = {name: traced.get(name) for name in StepSummary.__slots__ if name != "step"}
    return models.Step(
        step=step,
        loss=metrics.get("train/loss_nats"),
        accuracy=metrics.get("evaluation/accuracy"),
        grad_norm=metrics.get("train/grad_norm"),
        learning_rate=metrics.get("train/learning_rate"),
        weight_version=None if version is None else int(version),
        rollout_s=metrics.get("rollout/seconds"),
        train_s=metrics.get("train/seconds"),
        sync_s=metrics.get("sync/seconds"),
        tokens_per_s=metrics.get("rollout/tokens_per_s"),
        **from_trace,
    )


def _item(record: SequenceRecord, excerpt: int | None) -> dict[str, object]:
    values: dict[str, object] = {
        name: getattr(record, name) for name in models.SequenceItem.model_fields if name in SequenceRecord.__slots__
    }
    values["prompt_text"] = record.prompt_text[:excerpt]
    values["completion_text"] = record.completion_text[:excerpt]
    return values


def _encode(place: list[object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _decode(cursor: str) -> list[object]:
    try:
        place = json.loads(base64.b64decode(cursor.encode(), altchars=b"-_", validate=True))
        if isinstance(place, list):
            return place
    except (ValueError, binascii.Error, RecursionError):
        pass
    raise _bad_cursor()


def _bad_cursor() -> ProblemError:
    return ProblemError(422, "bad-cursor", "cursor must be the next_cursor of a page, unchanged")


def _offset(cursor: str | None) -> int:
    if cursor is None:
        return 0
    match _decode(cursor):
        case [int(start)] if 0 <= start < 2**31:
            return start
    raise _bad_cursor()


def _page_key(cursor: str | None) -> PageKey | None:
    if cursor is None:
        return None
    match _decode(cursor):
        case [bool(is_null), float(value), int(step), str(sequence_id)] if abs(step) < 2**31 and np.isfinite(value):
            return PageKey(is_null=is_null, value=value, step=step, sequence_id=sequence_id)
    raise _bad_cursor()
