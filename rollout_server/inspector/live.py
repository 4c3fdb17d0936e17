"""Live generation: send one prompt to a run in training, and stream its decisions as they are made.

The inspector does not depend on Ray or engines: the caller that attaches it passes ``LiveRollouts``.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import Annotated, Protocol

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from common.config import Policy
from rollout_server.inspector import live_models as models
from rollout_server.inspector.live_records import (
    LiveEnd,
    LiveFailure,
    LivePiece,
    LiveRefusal,
    LiveRequest,
    LiveStart,
    LiveTokens,
)
from rollout_server.inspector.models import Problem
from rollout_server.inspector.problems import ProblemError, answers, problem_document
from rollout_server.inspector.tokens import moving_averages, shown_token

router = APIRouter(prefix="/api/v1")

MAX_STREAMS = 8
_POLL_EVERY_S = 0.25  # whether the client is still connected
_KEEP_ALIVE_EVERY = 40  # polls without output


class RunNotLive(Exception):
    """No such run is in training on the cluster. ``runs`` lists those that are."""

    def __init__(self, runs: list[str]) -> None:
        super().__init__(runs)
        self.runs = runs


class SeveralRunsLive(RunNotLive):
    """More than one run matches."""


class LiveRollouts(Protocol):
    """The runs in training on a cluster."""

    async def runs(self) -> list[str]:
        """The names of the live runs, one entry per run."""
        ...

    def generate(self, run: str | None, request: LiveRequest) -> AsyncGenerator[LivePiece, None]:
        """Yield a LiveStart, LiveTokens, a LiveEnd. Closing it cancels the requests in the run's engines.

        ``run`` may be None if one run is live. Raises RunNotLive, SeveralRunsLive or LiveRefusal before the first
        piece, LiveFailure after it.
        """
        ...


def _attached(request: Request) -> LiveRollouts:
    live: LiveRollouts | None = request.app.state.live
    if live is None:
        raise ProblemError(
            409, "not-attached", "no cluster is attached; start the inspector with: adaswitch serve RUNS_DIR --attach"
        )
    return live


@router.get("/live", responses=answers(503))
async def describe_live(request: Request) -> models.LiveState:
    """Whether prompts can be sent, and to which runs."""
    live: LiveRollouts | None = request.app.state.live
    if live is None:
        return models.LiveState(attached=False, runs=[])
    try:
        return models.LiveState(attached=True, runs=await live.runs())
    except TimeoutError as error:
        raise ProblemError(503, "cluster-silent", str(error)) from error


@router.post(
    "/generate",
    response_class=StreamingResponse,
    responses={
        **answers(404, 409, 429, 502, 503),
        200: {
            "description": "Server-sent events: `start`, `token` per token, then `summary` or `problem`.",
            "content": {"text/event-stream": {"schema": models.EVENT_SCHEMA, "examples": models.EVENT_EXAMPLES}},
        },
    },
)
async def generate(
    wanted: Annotated[models.GenerateRequest, Body(openapi_examples=models.REQUEST_EXAMPLES)],
    live: Annotated[LiveRollouts, Depends(_attached)],
    request: Request,
) -> StreamingResponse:
    """Generate one sequence under any policy with a live run's engines, and stream the decision on every token.

    It runs during training but is not part of it. If the client disconnects, the generation is aborted.
    """
    if request.app.state.num_live >= MAX_STREAMS:
        raise ProblemError(429, "too-many-streams", f"at most {MAX_STREAMS} at once", headers={"Retry-After": "5"})
    request.app.state.num_live += 1
    pieces = live.generate(wanted.run, _live_request(wanted))
    try:
        # Before the first piece an error can have an HTTP status; after it only an event can report it.
        first = await anext(pieces)
        assert isinstance(first, LiveStart), first
    except BaseException as error:
        await pieces.aclose()
        request.app.state.num_live -= 1
        raise _problem(error) from error
    return StreamingResponse(_events(request, first, pieces), media_type="text/event-stream")


def _live_request(wanted: models.GenerateRequest) -> LiveRequest:
    prompt = wanted.prompt if wanted.prompt is not None else tuple(wanted.prompt_token_ids or ())
    settings = wanted.model_dump(exclude={"run", "prompt", "prompt_token_ids", "policy"})
    return LiveRequest(prompt=prompt, policy=wanted.policy, **settings)


def _problem(error: BaseException) -> BaseException:
    """The client's error for an exception before the first piece."""
    match error:
        case SeveralRunsLive():
            return ProblemError(409, "several-runs", "several runs are live; choose one with run", errors=error.runs)
        case RunNotLive():
            return ProblemError(404, "run-not-live", "no such run is being trained", errors=error.runs)
        case LiveRefusal(kind="busy"):
            return ProblemError(429, "busy", error.detail, headers={"Retry-After": "5"})
        case LiveRefusal():
            return ProblemError(422, "invalid-request", error.detail)
        case LiveFailure():
            return ProblemError(502, "live-failure", str(error))
        case TimeoutError():
            return ProblemError(503, "cluster-silent", str(error))
    return error


async def _events(request: Request, start: LiveStart, pieces: AsyncGenerator[LivePiece, None]) -> AsyncIterator[str]:
    """Consumes pieces; produces events; waits for the run; stops at its end, or when the client disconnects."""
    shown = _Shown(start.policy)
    try:
        yield _event("start", models.LiveStarted(**asdict(start) | {"policy": start.policy}))
        async with aclosing(pieces):
            async for piece in _while_connected(request, pieces):
                if isinstance(piece, LiveTokens):
                    for token in shown.tokens(piece):
                        yield _event("token", token)
                elif isinstance(piece, LiveEnd):
                    yield _event("summary", models.LiveSummary(**asdict(piece)))
                else:
                    yield ": waiting\n\n"
    except LiveFailure as error:
        yield _event("problem", problem_document(502, str(error), kind="live-failure"))
    finally:
        request.app.state.num_live -= 1


async def _while_connected(
    request: Request, pieces: AsyncGenerator[LivePiece, None]
) -> AsyncGenerator[LivePiece | None, None]:
    """The pieces, and None from time to time while there are none. Ends early if the client disconnects."""
    quiet = 0
    waiting = asyncio.ensure_future(anext(pieces, None))
    try:
        while True:
            await asyncio.wait({waiting}, timeout=_POLL_EVERY_S)
            if await request.is_disconnected():
                return
            if not waiting.done():
                quiet += 1
                if quiet % _KEEP_ALIVE_EVERY == 0:
                    yield None
                continue
            piece = waiting.result()
            if piece is None:
                return
            quiet = 0
            yield piece
            waiting = asyncio.ensure_future(anext(pieces, None))
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await waiting


class _Shown:
    """Converts pieces to response tokens, adding the policy's moving average and the texts of alternatives."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._divergences: list[float | None] = []
        self._texts: dict[int, str] = {}

    def tokens(self, piece: LiveTokens) -> list[BaseModel]:
        first = len(self._divergences)
        self._divergences += [token.divergence for token in piece.tokens]
        self._texts |= piece.texts
        averages = moving_averages(self._policy, self._divergences, first)
        return [shown_token(t, m, self._texts) for t, m in zip(piece.tokens, averages, strict=True)]


def _event(name: str, data: BaseModel | Problem) -> str:
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n"
