"""An app over a folder of runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rollout_server.inspector.app import create_app
from tests.support.inspected import LiveHere, start_live_run, write_runs


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    write_runs(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def live_rollouts(tmp_path: Path) -> LiveHere:
    return start_live_run(tmp_path)


@pytest.fixture
def make_client(runs_dir: Path) -> Iterator[Callable[..., TestClient]]:
    clients = []

    def make(token: str | None = None, live: LiveHere | None = None) -> TestClient:
        app = create_app(runs_dir, hosts=["testserver"], token=token, live_rollouts=live)
        client = TestClient(app, raise_server_exceptions=False)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.app.state.store.close()


@pytest.fixture
def client(make_client: Callable[..., TestClient]) -> TestClient:
    return make_client()
