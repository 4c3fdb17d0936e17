"""The inspector's app: routes, error handling, page, health checks and metrics."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rollout_server.inspector import events, live, models, page_files, replays, routes
from rollout_server.inspector.guard import Guard
from rollout_server.inspector.problems import add_handlers, add_to_document
from rollout_server.inspector.runs import RunStore


def create_app(
    runs_dir: Path, *, hosts: Collection[str], token: str | None = None, live_rollouts: live.LiveRollouts | None = None
) -> FastAPI:
    """The app for the runs in a folder. It accepts the host names ``hosts`` and requires ``token`` if one is given.

    With ``live_rollouts``, users can send prompts to runs in training.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.store.close()

    app = FastAPI(
        title="adaswitch inspector",
        version="1",
        lifespan=lifespan,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.store = RunStore(runs_dir)
    app.state.num_streams = 0
    app.state.live = live_rollouts
    app.state.num_live = 0
    add_handlers(app)
    _add_metrics(app)
    for router in (events.router, live.router, replays.router, routes.router):
        app.include_router(router)
    _add_health(app)
    add_to_document(app)
    page_files.add_to(app)
    app.add_middleware(Guard, hosts=hosts, token=token)
    return app


def _add_health(app: FastAPI) -> None:
    @app.get("/healthz", include_in_schema=False)
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    def readyz(response: Response) -> models.Readiness:
        store: RunStore = app.state.store
        skipped = [
            models.SkippedSegments(
                run=run, segments=[models.SkippedSegment(name=s.name, reason=s.reason) for s in index.skipped]
            )
            for run, index in store.opened()
            if index.skipped
        ]
        try:
            num_runs, ready = len(store.names()), True
        except OSError:
            num_runs, ready = 0, False
        response.status_code = 200 if ready else 503
        num_skipped = sum(len(run.segments) for run in skipped)
        return models.Readiness(ready=ready, num_runs=num_runs, num_skipped_segments=num_skipped, skipped=skipped)


def _add_metrics(app: FastAPI) -> None:
    registry = CollectorRegistry()
    requests = Counter(
        "adaswitch_inspector_requests", "Requests by path and status", ["path", "status"], registry=registry
    )
    seconds = Histogram("adaswitch_inspector_request_seconds", "Time to first byte", ["path"], registry=registry)
    skipped = Gauge(
        "adaswitch_inspector_skipped_segments", "Unreadable segments of recently used runs", registry=registry
    )
    store: RunStore = app.state.store
    skipped.set_function(lambda: sum(len(index.skipped) for _, index in store.opened()))

    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        start = time.monotonic()
        status = 500
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            path = getattr(request.scope.get("route"), "path", "other")
            requests.labels(path, status).inc()
            seconds.labels(path).observe(time.monotonic() - start)

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
