"""Runs served from a store."""

import json
import shutil
import time
from pathlib import Path
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient

from common.errors import UserError
from common.storage import Store
from rollout_server.inspector.app import create_app
from rollout_server.inspector.mirror import Mirror, mirrored


def store_runs(runs: Path, url: str) -> Store:
    store = Store(url, timeout_s=20.0)
    for path in runs.rglob("*"):
        if path.is_file():
            store.put(path, str(path.relative_to(runs)))
    return store


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store(runs_dir: Path) -> Store:
    (runs_dir / "demo" / "checkpoints" / "step-000002").mkdir(parents=True)
    (runs_dir / "demo" / "checkpoints" / "step-000002" / "weights").write_bytes(b"not looked at")
    return store_runs(runs_dir, f"memory://{uuid4().hex}")


def test_the_mirror_holds_the_traces_and_the_small_files(store: Store, runs_dir: Path, tmp_path: Path) -> None:
    Mirror(store, tmp_path / "mirror").refresh()
    shutil.rmtree(runs_dir / "demo" / "checkpoints")
    assert files_of(tmp_path / "mirror" / "demo") == files_of(runs_dir / "demo")


def test_half_a_segment_is_not_shown_and_what_is_gone_or_replaced_is_followed(
    store: Store, runs_dir: Path, tmp_path: Path
) -> None:
    mirror, there = Mirror(store, tmp_path / "mirror"), tmp_path / "mirror" / "demo"
    store.remove("demo/traces/step-000003/tokens.parquet")
    mirror.refresh()
    assert sorted(path.name for path in (there / "traces").iterdir()) == ["step-000001", "step-000002"]
    store.remove("demo/traces/step-000001/tokens.parquet")
    for name in ("sequences", "tokens"):
        store.put(runs_dir / "demo/traces/step-000003" / f"{name}.parquet", f"demo/traces/step-000002/{name}.parquet")
    (tmp_path / "metrics").write_text(json.dumps({"time": 2.0, "step": 9, "train/loss_nats": 0.1}) + "\n")
    store.put(tmp_path / "metrics", "demo/metrics.jsonl")
    mirror.refresh()
    assert sorted(path.name for path in (there / "traces").iterdir()) == ["step-000002"]
    replaced = there / "traces" / "step-000002" / "tokens.parquet"
    assert replaced.read_bytes() == (runs_dir / "demo/traces/step-000003/tokens.parquet").read_bytes()
    assert (there / "metrics.jsonl").read_text() == (tmp_path / "metrics").read_text()


def test_what_has_not_changed_is_not_fetched_again(store: Store, tmp_path: Path) -> None:
    mirror = Mirror(store, tmp_path / "mirror")
    mirror.refresh()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mirror").rglob("*")}
    mirror.refresh()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mirror").rglob("*")} == before


def test_a_store_is_served_as_its_folder_would_be(store: Store, runs_dir: Path) -> None:
    def answers(folder: Path) -> list[object]:
        with TestClient(create_app(folder, hosts=["testserver"])) as client:
            paths = ("", "/demo/steps", "/demo/sequences")
            return [client.get(f"/api/v1/runs{path}").json() for path in paths[1:]]

    with mirrored(store.url) as folder:
        deadline_s = time.monotonic() + 20
        while not (folder / "demo" / "traces" / "step-000003").exists():
            assert time.monotonic() < deadline_s, "waited 20 s for the mirror"
            time.sleep(0.02)
        assert answers(folder) == answers(runs_dir)
    assert not folder.exists()


def test_a_store_that_can_t_be_used_is_said_at_once() -> None:
    with (
        pytest.raises(UserError, match="RUNS_DIR: can't use 'nope://runs': Protocol not known"),
        mirrored("nope://runs"),
    ):
        pass
