"""Mirrors the runs in an object store into a local folder that the inspector can read.

It fetches only what the inspector shows: a run's small files and its trace. A segment appears at once, by a rename.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from threading import Event, Thread

from common import run_dir
from common.run_dir import TEXT_FILES
from common.storage import Facts, Store
from rollout_server.traces.schema import SEQUENCES_FILE, TOKENS_FILE, parse_segment_name

logger = logging.getLogger(__name__)

_EVERY_S = 5.0
_TIMEOUT_S = 120.0  # for one file, or for listing the store


@contextmanager
def mirrored(url: str) -> Iterator[Path]:
    """A folder with the store's runs, kept up to date. It is deleted when the block is left.

    Raises UserError where the store can't be listed.
    """
    store = Store(url, timeout_s=_TIMEOUT_S, key="RUNS_DIR")
    store.files_or_user_error()
    with tempfile.TemporaryDirectory(prefix="adaswitch-runs-") as name:
        mirror, ended = Mirror(store, Path(name)), Event()
        thread = Thread(target=_keep_up, args=(mirror, ended), daemon=True, name="mirror")
        thread.start()
        try:
            yield Path(name)
        finally:
            ended.set()
            thread.join(_EVERY_S)


def _keep_up(mirror: "Mirror", ended: Event) -> None:
    """Consumes the store's listings; produces files; waits some seconds between polls; stops when ``ended`` is set."""
    while not ended.is_set():
        try:
            mirror.refresh()
        except Exception as error:  # the present files are served until the store is available again
            logger.warning("can't update the runs of %s: %s", mirror.url, error)
        ended.wait(_EVERY_S)


class Mirror:
    """A local copy of the relevant part of a store. Not thread-safe."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._here: dict[str, list[Facts]] = {}  # what was fetched, by file or segment

    @property
    def url(self) -> str:
        return self._store.url

    def refresh(self) -> None:
        """Fetch what is new or has changed, and drop what is gone."""
        wanted = self._wanted()
        for name in self._here.keys() - wanted.keys():
            self._drop(name)
        for name, facts in sorted(wanted.items()):
            if self._here.get(name) != facts:
                self._fetch(name)
                self._here[name] = facts

    def _wanted(self) -> dict[str, list[Facts]]:
        """The store's small files and complete segments, with what the store says of their files."""
        files, wanted = self._store.files(), {}
        for name, facts in files.items():
            match PurePosixPath(name).parts:
                case (_, file) if file in TEXT_FILES:
                    wanted[name] = [facts]
                case (_, run_dir.TRACES, segment, file) if file == TOKENS_FILE and parse_segment_name(segment):
                    folder = name.removesuffix(f"/{file}")
                    if other := files.get(f"{folder}/{SEQUENCES_FILE}"):
                        wanted[folder] = [facts, other]
        return wanted

    def _fetch(self, name: str) -> None:
        place = self._folder / name
        if place.name in TEXT_FILES:
            self._store.get(name, place)
            return
        unfinished = place.with_name(f".{place.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        for file in (SEQUENCES_FILE, TOKENS_FILE):
            self._store.get(f"{name}/{file}", unfinished / file)
        if name in self._here:
            self._drop(name)
        unfinished.rename(place)

    def _drop(self, name: str) -> None:
        """Rename a folder before deleting it, so that it disappears at once."""
        place = self._folder / name
        if place.is_dir():
            dropped = place.with_name(f".{place.name}.dropped")
            place.rename(dropped)
            shutil.rmtree(dropped)
        else:
            place.unlink(missing_ok=True)
        del self._here[name]
