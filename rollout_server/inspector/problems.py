"""Errors as problem documents (RFC 9457). Defines their form, not when they occur."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rollout_server.inspector.models import Problem
from rollout_server.traces.index import QueryTimeout

MEDIA_TYPE = "application/problem+json"
_PREFIX = "urn:adaswitch:problem:"


class ProblemError(Exception):
    """Ends a request with a problem document."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.errors = errors
        self.headers = headers


def problem_document(
    status: int, detail: str, *, kind: str | None = None, errors: Sequence[str] | None = None
) -> Problem:
    """Without a kind, the type is ``about:blank``."""
    return Problem(
        type=_PREFIX + kind if kind else "about:blank",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        errors=list(errors) if errors else None,
    )


def problem(
    status: int,
    detail: str,
    *,
    kind: str | None = None,
    errors: Sequence[str] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """The document as a response."""
    content = problem_document(status, detail, kind=kind, errors=errors).model_dump(exclude_none=True)
    return JSONResponse(content, status, headers=headers, media_type=MEDIA_TYPE)


def answers(*statuses: int) -> dict[int | str, dict[str, object]]:
    """These errors as responses in a path's OpenAPI document."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in (400, 401, 413, 422, *statuses)
    }


def add_to_document(app: FastAPI) -> None:
    """Add the schema that ``answers`` refers to, because FastAPI only lists schemas that routes return."""
    make_document = app.openapi

    def openapi() -> dict[str, Any]:
        document = make_document()
        document["components"]["schemas"].setdefault("Problem", Problem.model_json_schema())
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def add_handlers(app: FastAPI) -> None:
    """Turn every error of the app into a problem document."""

    @app.exception_handler(ProblemError)
    def _ours(request: Request, error: ProblemError) -> Response:
        return problem(error.status, str(error), kind=error.kind, errors=error.errors, headers=error.headers)

    @app.exception_handler(QueryTimeout)
    def _slow(request: Request, error: QueryTimeout) -> Response:
        return problem(503, str(error), kind="query-timeout", headers={"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: RequestValidationError) -> Response:
        lines = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()]
        return problem(422, "the request is invalid", kind="invalid-request", errors=lines)

    @app.exception_handler(Exception)
    def _failed(request: Request, error: Exception) -> Response:
        return problem(500, "the inspector failed; see its log", kind="internal")
