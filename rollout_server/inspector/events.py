"""Server-sent events for a run's new steps, and downloads of its tables."""

import asyncio
from collections.abc import AsyncIterator
from itertools import chain
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from rollout_server.inspector import models
from rollout_server.inspector.problems import ProblemError, answers
from rollout_server.inspector.routes import QUERY_TIMEOUT_S, Filters, RunName, Store
from rollout_server.inspector.runs import RunStore
from rollout_server.traces import files
from rollout_server.traces.index import QueryTimeout

router = APIRouter(prefix="/api/v1")

_POLL_EVERY_S = 1.0
_KEEP_ALIVE_EVERY = 15  # polls without changes
_MAX_STREAMS = 16
_EVENT_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"const": "steps"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


@router.get(
    "/runs/{run}/events",
    response_class=StreamingResponse,
    responses={**answers(404, 503), 200: {"content": {"text/event-stream": {"schema": _EVENT_SCHEMA}}}},
)
async def follow_run(
    run: RunName,
    store: Store,
    request: Request,
    max_seconds: Annotated[float, Query(gt=0, le=3600, description="The stream ends after this time.")] = 3600.0,
) -> StreamingResponse:
    """Sends an event ``steps`` for the present trace, and another one whenever segments are added or replaced."""
    await run_in_threadpool(store.index, run, QUERY_TIMEOUT_S)  # a 404 before the stream begins
    if request.app.state.num_streams >= _MAX_STREAMS:
        raise ProblemError(503, "too-many-streams", f"at most {_MAX_STREAMS} event streams at once")
    return StreamingResponse(_events(request, store, run, max_seconds), media_type="text/event-stream")


async def _events(request: Request, store: RunStore, run: str, max_seconds: float) -> AsyncIterator[str]:
    """Consumes the trace's changes; produces events; waits 1 s between polls; stops when the client disconnects."""
    request.app.state.num_streams += 1
    try:
        generation, quiet = -1, 0
        end = asyncio.get_running_loop().time() + max_seconds
        while True:
            try:
                index = await run_in_threadpool(store.index, run, QUERY_TIMEOUT_S)
            except (QueryTimeout, ProblemError):
                return  # the run was removed or the query is too slow; the client reconnects
            if index.generation != generation:
                event = await run_in_threadpool(_step_event, store, run, generation)
                generation, quiet = index.generation, 0
                yield f"id: {generation}\nevent: steps\ndata: {event.model_dump_json()}\n\n"
            elif (quiet := quiet + 1) % _KEEP_ALIVE_EVERY == 0:
                yield ": waiting\n\n"
            left_s = end - asyncio.get_running_loop().time()
            if left_s <= 0 or await request.is_disconnected():
                return
            await asyncio.sleep(min(_POLL_EVERY_S, left_s))
    finally:
        request.app.state.num_streams -= 1


def _step_event(store: RunStore, run: str, since: int) -> models.StepEvent:
    index = store.index(run, QUERY_TIMEOUT_S)
    steps = list(index.steps.values())
    return models.StepEvent(
        steps=index.changed_since(since),
        num_sequences=sum(step.num_sequences for step in steps),
        last_metrics_step=max(store.files(run).metrics, default=None),
    )


@router.get(
    "/runs/{run}/downloads/{table}",
    response_class=StreamingResponse,
    responses={
        **answers(404, 503),
        200: {
            "content": {
                "text/csv": {"schema": {"type": "string"}},
                "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}},
            }
        },
    },
)
def download(
    run: RunName,
    table: Literal["sequences", "tokens"],
    store: Store,
    where: Filters,
    format: Annotated[Literal["csv", "parquet"], Query()] = "csv",
    step: Annotated[int | None, Query(ge=0, le=2**31 - 1, description="The step, for table `tokens`.")] = None,
) -> StreamingResponse:
    """All matching sequences, or one step's tokens, as a file."""
    index = store.index(run, QUERY_TIMEOUT_S)
    if table == "tokens" and step is None:
        raise ProblemError(422, "no-step", "step must be given for table tokens")
    if table == "sequences":
        pieces = files.sequences_file(index, where, format, QUERY_TIMEOUT_S)
        content = chain(
            [next(pieces)], pieces
        )  # fetch the first one now, while an error can still become a problem document
    else:
        tokens = files.tokens_file(index, step or 0, format)
        if tokens is None:
            raise ProblemError(404, "unknown-step", f"no step {step} in this run's trace")
        content = chain([tokens])
    media_type = "text/csv" if format == "csv" else "application/vnd.apache.parquet"
    headers = {"Content-Disposition": f'attachment; filename="{table}.{format}"'}
    return StreamingResponse(content, media_type=media_type, headers=headers)
