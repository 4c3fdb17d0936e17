"""Whatever the document allows, and what it does not, is answered as the document says, and never with a 5xx."""

import json
import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rollout_server.inspector.app import create_app
from tests.support.inspected import start_live_run, write_runs

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    ("GET", "/api/v1/runs"),
    ("GET", "/api/v1/runs/{run}"),
    ("GET", "/api/v1/runs/{run}/steps"),
    ("GET", "/api/v1/runs/{run}/sequences"),
    ("GET", "/api/v1/runs/{run}/sequences/{sequence_id}"),
    ("GET", "/api/v1/runs/{run}/sequences/{sequence_id}/tokens"),
    ("GET", "/api/v1/runs/{run}/histograms/{quantity}"),
    ("GET", "/api/v1/runs/{run}/downloads/{table}"),
    ("GET", "/api/v1/runs/{run}/events"),
    ("POST", "/api/v1/runs/{run}/replay"),
    ("GET", "/api/v1/live"),
    ("POST", "/api/v1/generate"),
]
HOSTS = ["testserver", "localhost", "127.0.0.1"]


MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
# /live takes nothing that could be wrong; a cluster makes a difference to two operations.
CASES = [
    *(("files alone", *operation, mode) for operation in OPERATIONS for mode in MODES),
    *(("attached", *operation, mode) for operation in OPERATIONS[-2:] for mode in MODES),
]
CASES = [case for case in CASES if case[2:] != ("/api/v1/live", GenerationMode.NEGATIVE)]


@pytest.fixture(scope="module", params=["files alone", "attached"])
def schema(request, tmp_path_factory: pytest.TempPathFactory):
    """Nothing that is asked changes the runs."""
    folder = tmp_path_factory.mktemp("inspected")
    write_runs(folder / "runs")
    attached = start_live_run(folder) if request.param == "attached" else None
    app = create_app(folder / "runs", hosts=HOSTS, live_rollouts=attached)
    yield schemathesis.openapi.from_asgi("/api/v1/openapi.json", app)
    app.state.store.close()


def test_every_operation_is_listed_here(schema) -> None:
    documented = {(method.upper(), path) for path, item in schema.raw_schema["paths"].items() for method in item}
    assert documented == {*OPERATIONS}


def test_the_document_holds_every_schema_it_refers_to(schema) -> None:
    referred = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema.raw_schema)))
    assert referred
    assert referred <= schema.raw_schema["components"]["schemas"].keys()


@pytest.mark.parametrize(("schema", "method", "path", "mode"), CASES, indirect=["schema"])
def test_the_service_keeps_to_its_document(schema, method: str, path: str, mode: GenerationMode) -> None:
    operation = schema[path][method]
    is_slow = path.endswith("/events") or schema.app.state.live is not None

    @settings(
        max_examples=settings().max_examples // (3 if is_slow else 1),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode), name=st.sampled_from(["demo", None]))
    def check(case, name: str | None) -> None:
        if name and "run" in (case.path_parameters or {}):
            case.path_parameters["run"] = name
        if path.endswith("/events"):  # lasts an hour where it is not told otherwise
            given = {} if mode == GenerationMode.POSITIVE else dict(case.query or {})
            case.query = {"max_seconds": 0.01, **given}
        response = case.call()
        case.validate_response(response, checks=CHECKS)

    check()
