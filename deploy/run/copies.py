"""Copies a run directory to a store while the run continues, and fetches it from there to resume elsewhere.

The copy can be read and resumed from at any moment: a segment counts when both its files are there, a checkpoint when
its manifest is, which is copied last and removed first.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

from common.config import RunConfig, Storage
from common.errors import UserError
from common.files import is_passing
from common.run_dir import RunDir
from common.storage import Store, Version
from rollout_server.traces.writer import drop_segments_after
from trainer.checkpoint import RunState, find_last_good

logger = logging.getLogger(__name__)

_LAST = "manifest.json"
_REWRITTEN_NEVER = ("traces/", "checkpoints/", "student/")
_AFTER_A_FAILURE_S = 10.0  # how long a failed run waits for its copy

_Stamp = tuple[int, int]  # bytes, modification time in ns


class Copying:
    """Copies what has changed whenever ``changed`` is called. Leaving the context waits for the rest.

    Consumes the run directory; produces its copy; waits for ``changed`` in a thread of its own; stops when the context
    is left. A failure is logged and tried again the next time: a store that is away does not end the run.
    """

    def __init__(self, folder: Path, store: Store, *, timeout_s: float) -> None:
        self._folder = folder
        self._store = store
        self._timeout_s = timeout_s
        self._copied: dict[str, _Stamp] | None = None  # None until the store has been listed
        self._at_start = _files(folder)
        self._changed, self._ending = Event(), Event()
        self._is_whole = False
        self._thread = Thread(target=self._work, daemon=True, name="copying")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def changed(self) -> None:
        """Request a copy. Returns at once; calls during a copy cause one more copy after it."""
        self._changed.set()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        timeout_s = self._timeout_s if kind is None else min(self._timeout_s, _AFTER_A_FAILURE_S)
        self._ending.set()
        self._changed.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "waited %g s for the copy of %s in %s; it is incomplete", timeout_s, self._folder, self._store.url
            )
        elif not self._is_whole:
            logger.warning("the copy of %s in %s is incomplete", self._folder, self._store.url)

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._changed.wait()
            self._changed.clear()
            is_last = self._ending.is_set()
            try:
                self._copy()
                self._is_whole = True
            except Exception as failure:  # any error of the store: the run continues
                self._is_whole = False
                logger.warning("copying to %s failed, tried again after the next step: %s", self._store.url, failure)

    def _copy(self) -> None:
        """Bring the store up to date with the run directory."""
        if self._copied is None:
            self._copied = self._already_there(self._store.versions())
        files = _files(self._folder)
        for name in sorted(files, key=_goes_last):
            if self._copied.get(name) != files[name]:
                try:
                    self._store.put(self._folder / name, name)
                except FileNotFoundError:
                    if (self._folder / name).exists():
                        raise
                    continue  # an old checkpoint that was removed
                self._copied[name] = files[name]
        for name in sorted(self._copied.keys() - _files(self._folder).keys(), key=_goes_last, reverse=True):
            self._store.remove(name)
            del self._copied[name]

    def _already_there(self, stored: dict[str, Version]) -> dict[str, _Stamp]:
        """Files that need no copy: those of the resumed run that never change. All others count as outdated."""
        return {
            name: self._at_start[name]
            if name in self._at_start
            and name.startswith(_REWRITTEN_NEVER)
            and self._at_start[name][0] == stored[name].num_bytes
            else (-1, -1)
            for name in stored
        }


@contextmanager
def kept_copied(config: Storage, folder: Path) -> Iterator[Callable[[], None]]:
    """Yields a function to call when the run directory has grown. It does nothing where no store is configured."""
    if config.url is None:
        yield lambda: None
        return
    store = Store(config.url, timeout_s=config.timeout_s).below(folder.name)
    with Copying(folder, store, timeout_s=config.timeout_s) as copying:
        copying.changed()
        yield copying.changed


def copied_names(config: Storage) -> set[str]:
    """Names of the runs in the store. Raises UserError where it can't be listed."""
    if config.url is None:
        return set()
    return {name.partition("/")[0] for name in _listed(Store(config.url, timeout_s=config.timeout_s))}


def fetch_if_ahead(config: RunConfig) -> None:
    """Fetch the run's newest copy if its last checkpoint is newer than the local one, or there is no local one.

    Local files of the same run are kept up to its own last good checkpoint. May be interrupted and called again.
    Raises UserError where another process holds the run.
    """
    if config.storage.url is None:
        return
    store = Store(config.storage.url, timeout_s=config.storage.timeout_s)
    wanted = Path(config.run_dir).absolute()
    copies = _checkpoints_of(store, wanted.name)
    if not copies:
        return
    number, last_step = max(copies.items())
    here = {_number(folder.path.name, wanted.name): folder for folder in RunDir.all(config.run_dir)}
    with_checkpoint = {number: step for number, folder in here.items() if (step := _last_step(folder)) is not None}
    if with_checkpoint and max(with_checkpoint.items()) >= (number, last_step):
        return
    folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    with RunDir(folder).locked():
        step = _last_step(RunDir(folder)) or 0
        if step >= last_step:  # another process has fetched it
            return
        logger.info("fetching %s from %s", folder, store.url)
        started_s = time.monotonic()
        # Later local segments may have the names of fetched ones and other content.
        drop_segments_after(folder / "traces", step)
        num_files = _fetch(store.below(folder.name), folder)
    logger.info("fetched %d files of %s in %.1f s", num_files, folder, time.monotonic() - started_s)


def _fetch(store: Store, folder: Path) -> int:
    """Fetch missing files and files that may have changed. Returns how many."""
    here = _files(folder) if folder.is_dir() else {}
    stored = store.versions()
    num_fetched = 0
    for name in sorted(stored, key=_goes_last):
        is_here = name in here and here[name][0] == stored[name].num_bytes and name.startswith(_REWRITTEN_NEVER)
        if not is_here:
            store.get(name, folder / name)
            num_fetched += 1
    return num_fetched


def _listed(store: Store) -> dict[str, Version]:
    try:
        return store.versions()
    except Exception as error:  # any error of the store
        raise UserError(f"storage.url: can't list {store.url}: {type(error).__name__}: {error}") from error


def _checkpoints_of(store: Store, run: str) -> dict[int, int]:
    """The step of the last complete checkpoint of each copy of a run: ``run`` under 1, ``run-2`` under 2, ..."""
    steps: dict[int, int] = {}
    for name in _listed(store):
        match = re.fullmatch(rf"([^/]+)/checkpoints/step-(\d+)/{re.escape(_LAST)}", name)
        number = _number(match[1], run) if match else None
        if match and number is not None:
            steps[number] = max(steps.get(number, 0), int(match[2]))
    return steps


def _number(name: str, run: str) -> int | None:
    """A folder's number among the runs of one ``run_dir``. None for a folder of another run_dir."""
    if name == run:
        return 1
    rest = name.removeprefix(f"{run}-")
    return int(rest) if rest != name and rest.isdecimal() else None


def _last_step(folder: RunDir) -> int | None:
    checkpoint = find_last_good(folder.checkpoints)
    return None if checkpoint is None else RunState.read(checkpoint / "state.json").step


def _files(folder: Path) -> dict[str, _Stamp]:
    """Complete files by their relative path, without the lock, which belongs to this machine."""
    found: dict[str, _Stamp] = {}
    for path in _walk(folder):
        try:
            stat = path.stat()
        except FileNotFoundError:  # it has been removed
            continue
        found[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


def _walk(folder: Path) -> Iterable[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_passing(name)]
        yield from (Path(parent, name) for name in files if not is_passing(name) and name != ".lock")


def _goes_last(name: str) -> tuple[bool, str]:
    """A manifest makes a checkpoint count, and a summary says that everything else is there."""
    return (name.endswith((f"/{_LAST}", "summary.json")), name)
