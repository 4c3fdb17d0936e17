from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from common.errors import UserError
from common.storage import Store
from common.waiting import WaitedTooLong


class Troubled(MemoryFileSystem):  # type: ignore[misc]
    """Fails, or hangs, as often as it is told to."""

    protocol = "troubled"
    errors: list[Exception] = []  # noqa: RUF012
    hangs_s = 0.0

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        sleep(Troubled.hangs_s)
        if Troubled.errors:
            raise Troubled.errors.pop()
        super().put_file(lpath, rpath, **options)


fsspec.register_implementation("troubled", Troubled, clobber=True)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(f"{request.param}://{tmp_path}/store", timeout_s=20.0)


@pytest.fixture
def troubled() -> Iterator[Store]:
    yield Store(f"troubled://{uuid4().hex}", timeout_s=0.5)
    Troubled.errors, Troubled.hangs_s = [], 0.0


def test_what_is_put_is_listed_and_comes_back(store: Store, tmp_path: Path) -> None:
    assert store.files() == {}
    file, back = tmp_path / "file", tmp_path / "some" / "where" / "back"
    file.write_bytes(b"one")
    store.put(file, "run/a")
    store.below("run").put(file, "deeper/b")
    assert {name: facts["size"] for name, facts in store.files().items()} == {"run/a": 3, "run/deeper/b": 3}
    assert store.below("run").files().keys() == {"a", "deeper/b"}
    store.get("run/deeper/b", back)
    assert back.read_bytes() == b"one"
    store.remove("run/a")
    store.remove("run/a")
    assert store.files().keys() == {"run/deeper/b"}
    store.remove("run/deeper/b")
    assert store.files() == {}
    assert not (tmp_path / "store" / "run").exists()


def test_the_store_s_own_folder_stays_when_its_last_file_goes(tmp_path: Path) -> None:
    folder = tmp_path / "outer" / "store"
    store = Store(str(folder), timeout_s=30.0)
    (tmp_path / "file").write_text("a")
    store.put(tmp_path / "file", "run/deeper/a")
    store.remove("run/deeper/a")
    assert list(folder.iterdir()) == []


def test_a_file_of_other_content_is_told_apart(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    listed = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        store.put(file, "a")
        listed.append(store.files()["a"])
        assert store.files()["a"] == listed[-1]
    assert listed[0] != listed[1]


def test_what_is_being_written_or_leads_elsewhere_is_not_listed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in (".a.unfinished", "b/.c.dropped/d", "b/.metadata", "e"):
        store.put(tmp_path / "file", name)
    assert store.files().keys() == {"b/.metadata", "e"}


def test_a_key_of_an_object_can_t_lead_out_of_the_folder_it_is_fetched_into(tmp_path: Path) -> None:
    MemoryFileSystem.store["/keys/run/../../x"] = MemoryFile(path="/keys/run/../../x", data=b"x")
    MemoryFileSystem.store["/keys/run/y"] = MemoryFile(path="/keys/run/y", data=b"y")
    assert Store("memory://keys/run", timeout_s=20.0).files().keys() == {"y"}


def test_a_file_that_is_not_there_is_said_at_once(store: Store, tmp_path: Path) -> None:
    started_s = monotonic()
    with pytest.raises(FileNotFoundError):
        store.put(tmp_path / "nothing", "a")
    with pytest.raises(FileNotFoundError):
        store.get("nothing", tmp_path / "a")
    assert monotonic() - started_s < 0.4
    assert store.files() == {}
    assert not (tmp_path / "a").exists()


def test_an_error_of_the_store_s_is_tried_again(troubled: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    Troubled.errors = [OSError("away"), OSError("away")]
    troubled.put(tmp_path / "file", "a")
    assert troubled.files().keys() == {"a"}


def test_who_may_not_write_is_told_so_at_once(troubled: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    Troubled.errors = [PermissionError("no"), PermissionError("no")]
    with pytest.raises(PermissionError):
        troubled.put(tmp_path / "file", "a")
    assert len(Troubled.errors) == 1


def test_a_store_that_hangs_is_not_waited_for(troubled: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    Troubled.hangs_s = 2.0
    with pytest.raises(WaitedTooLong, match=r"waited 0\.5 s for a to be stored in troubled://"):
        troubled.put(tmp_path / "file", "a")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope://bucket/runs", "storage.url: can't use 'nope://bucket/runs': Protocol not known"),
        ("s3://bucket/runs", r"storage.url: s3:// needs a package .*s3fs.*pip install 'adaswitch\[s3\]'"),
        ("gs://bucket/runs", r"storage.url: gs:// needs a package .*gcsfs.*pip install 'adaswitch\[gcs\]'"),
    ],
)
def test_a_url_that_can_t_be_used_names_what_is_missing(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Store(url, timeout_s=1.0)
