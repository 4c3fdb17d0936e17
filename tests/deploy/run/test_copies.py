"""A run's folder and its copy: what is copied when, what a broken store costs, and what is fetched."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from common.config import Storage
from common.config.source import ResolvedConfig, read_config
from common.errors import UserError
from common.run_dir import RunDir
from common.storage import Store
from deploy.run.copies import copied_names, fetch_if_ahead, kept_copied
from tests.deploy.run.test_resume import take_checkpoint


class Watched(MemoryFileSystem):  # type: ignore[misc]
    """Says what was done to it, and may be out of order."""

    protocol = "watched"
    done: list[str] = []  # noqa: RUF012
    error: Exception | None = None
    slow_s = 0.0

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        time.sleep(Watched.slow_s)
        if Watched.error is not None:
            raise Watched.error
        super().put_file(lpath, rpath, **options)
        Watched.done.append(f"put {rpath.partition('demo/')[2]}")

    def rm_file(self, path: str) -> None:
        super().rm_file(path)
        Watched.done.append(f"remove {path.partition('demo/')[2]}")


fsspec.register_implementation("watched", Watched, clobber=True)


@pytest.fixture
def url() -> Iterator[str]:
    Watched.done, Watched.error, Watched.slow_s = [], None, 0.0
    yield f"watched://{uuid4().hex}"
    Watched.error, Watched.slow_s = None, 0.0


@pytest.fixture
def resolve(tmp_path: Path, url: str) -> Callable[[str], ResolvedConfig]:
    """The configuration of a machine: its folder for runs."""

    def config(machine: str) -> ResolvedConfig:
        file = tmp_path / f"{machine}.yaml"
        file.write_text(
            f"run_dir: {tmp_path / machine / 'demo'}\nmodels: {{student: s, teacher: t}}\ndata: {{path: p}}\n"
            f"storage: {{url: '{url}', timeout_s: 20}}\n"
        )
        return read_config(file, [])

    return config


def new_run(resolved: ResolvedConfig) -> RunDir:
    return RunDir.create(resolved.config.run_dir, resolved)


def write_segment(folder: RunDir, step: int, content: str = "rows") -> None:
    segment = folder.traces / f"step-{step:06d}"
    segment.mkdir(parents=True)
    for name in ("sequences.parquet", "tokens.parquet"):
        (segment / name).write_text(content)


def files_of(folder: Path) -> dict[str, bytes]:
    """All but the lock, which is each machine's own."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def copied(config: Storage, folder: RunDir) -> None:
    with kept_copied(config, folder.path):
        pass


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "waited 20 s"
        time.sleep(0.01)


def test_what_is_there_is_copied_then_what_has_changed_and_what_is_gone_is_removed(resolve: Any, url: str) -> None:
    resolved = resolve("here")
    folder = new_run(resolved)
    take_checkpoint(folder, 10)
    write_segment(folder, 1)
    (folder.traces / ".step-000002.unfinished").mkdir()
    (folder.traces / ".step-000002.unfinished" / "tokens.parquet").write_text("half")
    store = Store(f"{url}/demo", timeout_s=20.0)
    with kept_copied(resolved.config.storage, folder.path) as changed:
        until(lambda: "put checkpoints/step-000010/manifest.json" in Watched.done)
        Watched.done.clear()
        folder.append_metrics({"step": 1})
        changed()
        until(lambda: Watched.done)
        assert Watched.done == ["put metrics.jsonl"]
        shutil.rmtree(folder.checkpoints / "step-000010")
        folder.write_summary({"steps": 1})
    assert Watched.done[1:] == [
        "put summary.json",
        "remove checkpoints/step-000010/manifest.json",
        "remove checkpoints/step-000010/state.json",
        "remove checkpoints/step-000010/learner/weights",
    ]
    assert store.files().keys() == files_of(folder.path).keys() - {".lock"} - {
        "traces/.step-000002.unfinished/tokens.parquet"
    }


def test_a_checkpoint_s_manifest_goes_last_and_the_summary_after_all(resolve: Any) -> None:
    resolved = resolve("here")
    folder = new_run(resolved)
    take_checkpoint(folder, 10)
    write_segment(folder, 1)
    folder.write_summary({"steps": 1})
    copied(resolved.config.storage, folder)
    assert Watched.done[-2:] == ["put checkpoints/step-000010/manifest.json", "put summary.json"]


def test_a_resumed_run_copies_only_what_is_not_there(resolve: Any) -> None:
    resolved = resolve("here")
    folder = new_run(resolved)
    write_segment(folder, 1)
    write_segment(folder, 2)
    copied(resolved.config.storage, folder)
    Watched.done.clear()
    for file in (folder.traces / "step-000002").iterdir():
        file.write_text("rows of another attempt")
    write_segment(folder, 3)
    copied(resolved.config.storage, folder)
    assert sorted(Watched.done) == [
        "put config.yaml",
        *(f"put traces/step-00000{step}/{name}.parquet" for step in (2, 3) for name in ("sequences", "tokens")),
    ]


def test_a_store_that_is_away_ends_no_run_and_gets_everything_when_it_is_back(resolve: Any, url: str, caplog) -> None:
    resolved = resolve("here")
    folder = new_run(resolved)
    Watched.error = PermissionError("the key is not valid now")
    with caplog.at_level(logging.WARNING), kept_copied(resolved.config.storage, folder.path) as changed:
        until(lambda: "the key is not valid now" in caplog.text)
        write_segment(folder, 1)
        Watched.error = None
        changed()
    assert Store(f"{url}/demo", timeout_s=20.0).files().keys() == files_of(folder.path).keys()
    assert "is incomplete" not in caplog.text


def test_a_copy_that_is_not_whole_in_the_end_is_said(resolve: Any, caplog) -> None:
    resolved = resolve("here")
    Watched.error = PermissionError("no")
    with caplog.at_level(logging.WARNING):
        copied(resolved.config.storage, new_run(resolved))
    assert "is incomplete" in caplog.text


def test_the_end_waits_for_the_copy_only_so_long(resolve: Any, url: str, caplog) -> None:
    folder = new_run(resolve("here"))
    Watched.slow_s = 5.0
    started_s = time.monotonic()
    with caplog.at_level(logging.WARNING):
        copied(Storage(url=url, timeout_s=0.3), folder)
    assert time.monotonic() - started_s < 2.0
    assert "is incomplete (waited up to 0.3 s)" in caplog.text


def test_a_run_that_fails_waits_for_its_copy_at_most_10_s(resolve: Any, caplog, monkeypatch) -> None:
    resolved = resolve("here")
    Watched.slow_s = 5.0
    monkeypatch.setattr("deploy.run.copies._AFTER_A_FAILURE_S", 0.3)
    started_s = time.monotonic()
    with pytest.raises(ZeroDivisionError), kept_copied(resolved.config.storage, new_run(resolved).path):
        raise ZeroDivisionError
    assert time.monotonic() - started_s < 2.0
    assert "is incomplete (waited up to 0.3 s)" in caplog.text


def test_a_run_that_is_nowhere_here_is_fetched_whole(resolve: Any) -> None:
    there = resolve("there")
    folder = new_run(there)
    take_checkpoint(folder, 10)
    write_segment(folder, 1)
    (folder.path / "tensorboard").mkdir()
    (folder.path / "tensorboard" / ".hidden").write_text("a file of others")
    folder.append_metrics({"step": 1})
    copied(there.config.storage, folder)
    here = resolve("here")
    fetch_if_ahead(here.config)
    assert files_of(Path(here.config.run_dir)) == files_of(folder.path)


def test_a_run_that_another_process_is_at_is_not_fetched_into(resolve: Any) -> None:
    there, here = resolve("there"), resolve("here")
    folder, behind = new_run(there), new_run(here)
    take_checkpoint(folder, 10)
    copied(there.config.storage, folder)
    before = files_of(behind.path)
    with behind.locked(), pytest.raises(UserError, match="another process is using this run"):
        fetch_if_ahead(here.config)
    assert files_of(behind.path) == before


def test_a_run_that_is_behind_keeps_what_its_last_checkpoint_stands_for_and_fetches_the_rest(resolve: Any) -> None:
    there, here = resolve("there"), resolve("here")
    theirs, ours = new_run(there), new_run(here)
    for folder in (theirs, ours):
        take_checkpoint(folder, 1)
        write_segment(folder, 1, "same")
    write_segment(ours, 2, "ours")  # of as many bytes as theirs
    write_segment(theirs, 2, "them")
    take_checkpoint(theirs, 2)
    copied(there.config.storage, theirs)
    untouched = (ours.traces / "step-000001" / "tokens.parquet").stat()
    fetch_if_ahead(here.config)
    assert (ours.traces / "step-000002" / "tokens.parquet").read_text() == "them"
    assert (ours.traces / "step-000001" / "tokens.parquet").stat().st_mtime_ns == untouched.st_mtime_ns
    assert files_of(ours.checkpoints) == files_of(theirs.checkpoints)


def test_a_run_that_is_as_far_here_is_left_as_it_is(resolve: Any) -> None:
    there, here = resolve("there"), resolve("here")
    theirs, ours = new_run(there), new_run(here)
    take_checkpoint(theirs, 10)
    take_checkpoint(ours, 10)
    ours.append_metrics({"step": 10})
    copied(there.config.storage, theirs)
    before = files_of(ours.path)
    fetch_if_ahead(here.config)
    assert files_of(ours.path) == before


def test_half_of_a_checkpoint_is_not_resumed_from(resolve: Any, url: str) -> None:
    there, here = resolve("there"), resolve("here")
    folder = new_run(there)
    take_checkpoint(folder, 10)
    copied(there.config.storage, folder)
    Store(f"{url}/demo", timeout_s=20.0).remove("checkpoints/step-000010/manifest.json")
    fetch_if_ahead(here.config)
    assert not Path(here.config.run_dir).exists()


def test_the_newest_run_of_a_name_is_fetched_into_a_folder_of_its_own_name(resolve: Any) -> None:
    there, here = resolve("there"), resolve("here")
    for step in (20, 10):
        folder = new_run(there)
        take_checkpoint(folder, step)
        copied(there.config.storage, folder)
    fetch_if_ahead(here.config)
    assert [path.name for path in Path(here.config.run_dir).parent.iterdir()] == ["demo-2"]
    assert RunDir.all(here.config.run_dir)[0].path.name == "demo-2"


def test_a_new_run_takes_no_name_that_a_copy_has(resolve: Any) -> None:
    there, here = resolve("there"), resolve("here")
    copied(there.config.storage, new_run(there))
    taken = copied_names(here.config.storage)
    assert taken == {"demo"}
    assert RunDir.create(here.config.run_dir, here, taken=taken).path.name == "demo-2"


def test_a_store_that_can_t_be_listed_is_said_before_the_run_begins(resolve: Any, monkeypatch) -> None:
    monkeypatch.setattr(Watched, "find", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(UserError, match=r"storage.url: can't list watched://.*: PermissionError: no"):
        copied_names(resolve("here").config.storage)


def test_without_a_store_nothing_happens(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"run_dir: {tmp_path / 'demo'}\nmodels: {{student: s, teacher: t}}\ndata: {{path: p}}\n")
    config = read_config(file, []).config
    fetch_if_ahead(config)
    assert copied_names(config.storage) == set()
    with kept_copied(config.storage, tmp_path) as changed:
        changed()
    assert json.loads(config.storage.model_dump_json()) == {"url": None, "timeout_s": 600.0}


def test_a_password_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "run_dir: r\nmodels: {student: s, teacher: t}\ndata: {path: p}\nstorage: {url: 's3://key:secret@b'}"
    )
    with pytest.raises(UserError, match=r"storage.*url must not contain a user or a password"):
        read_config(file, [])
