"""Copies a run directory to a store while the run continues, and fetches it from there to resume elsewhere.

Checkpoints and segments never change once they are written, so a copy lists what the store has and puts what is
missing. It can be read and resumed from at any moment: a segment counts when both its files are there, a checkpoint
when its manifest is, which is put last and removed first.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from common.config import RunConfig, Storage
from common.files import is_passing
from common.run_dir import RunDir, run_number
from common.storage import Facts, Store
from deploy.run.resume import last_resumable
from rollout_server.traces.writer import drop_segments_after

logger = logging.getLogger(__name__)

_IMMUTABLE = ("traces/", "checkpoints/", "student/")
_MANIFEST = re.compile(r"([^/]+)/checkpoints/step-(\d+)/manifest\.json")
_AFTER_A_FAILURE_S = 10.0  # how long a failed run waits for its copy

_Stamp = tuple[int, int]  # bytes, modification time in ns


@contextmanager
def kept_copied(config: Storage, folder: Path) -> Iterator[Callable[[], None]]:
    """Yields a function to call when the run directory has grown. It does nothing if no store is configured.

    A thread consumes the run directory; produces its copy; waits for the calls, of which those during a copy cause one
    more copy after it; stops when the context is left, which waits for the rest. A failure is logged and tried again
    the next time: a store that is away does not end the run.
    """
    if config.url is None:
        yield lambda: None
        return
    store = Store(config.url, timeout_s=config.timeout_s).below(folder.name)
    at_start = _files(folder)
    changed, ending, is_whole = Event(), Event(), Event()

    def work() -> None:
        copied: dict[str, _Stamp] | None = None  # until the store has been listed
        is_last = False
        while not is_last:
            changed.wait()
            changed.clear()
            is_last = ending.is_set()
            is_whole.clear()
            try:
                if copied is None:
                    # Whatever else is there is outdated: the resumed run has rewound, and may reuse the names.
                    copied = {
                        name: at_start[name] if _is_there(name, facts, at_start) else (-1, -1)
                        for name, facts in store.files().items()
                    }
                _copy(folder, store, copied)
                is_whole.set()
            except Exception as failure:  # any error of the store: the run continues
                logger.warning("copying to %s failed, tried again after the next step: %s", store.url, failure)

    changed.set()
    thread = Thread(target=work, daemon=True, name="copying")
    thread.start()
    wait_s = min(config.timeout_s, _AFTER_A_FAILURE_S)
    try:
        yield changed.set
        wait_s = config.timeout_s
    finally:
        ending.set()
        changed.set()
        thread.join(wait_s)
        if thread.is_alive() or not is_whole.is_set():
            logger.warning("the copy of %s in %s is incomplete (waited up to %g s)", folder, store.url, wait_s)


def _copy(folder: Path, store: Store, copied: dict[str, _Stamp]) -> None:
    """Bring the store up to date with the run directory. ``copied``: what the store has, updated."""
    files = _files(folder)
    for name in sorted(files, key=_goes_last):
        if copied.get(name) != files[name]:
            try:
                store.put(folder / name, name)
            except FileNotFoundError:
                if (folder / name).exists():
                    raise
                continue  # an old checkpoint that was removed
            copied[name] = files[name]
    for name in sorted(copied.keys() - files.keys(), key=_goes_last, reverse=True):
        store.remove(name)
        del copied[name]


def copied_names(config: Storage) -> set[str]:
    """Names of the runs in the store. Raises UserError if it can't be listed."""
    if config.url is None:
        return set()
    files = Store(config.url, timeout_s=config.timeout_s).files_or_user_error()
    return {name.partition("/")[0] for name in files}


def fetch_if_ahead(config: RunConfig) -> None:
    """Fetch the run's newest copy if its last checkpoint is newer than the local one, or there is no local one.

    Local files of the same run are kept up to its own last good checkpoint. May be interrupted and called again.
    Raises UserError if another process holds the run.
    """
    if config.storage.url is None:
        return
    store = Store(config.storage.url, timeout_s=config.storage.timeout_s)
    wanted = Path(config.run_dir).absolute()
    manifests = filter(None, map(_MANIFEST.fullmatch, store.files_or_user_error()))
    copies = [(number, int(it[2]), it[1]) for it in manifests if (number := run_number(it[1], wanted.name))]
    if not copies:
        return
    number, last_step, name = max(copies)
    here = {run_number(it.path.name, wanted.name) or 0: step for it in RunDir.all(wanted) if (step := _last_step(it))}
    if here and max(here.items()) >= (number, last_step):
        return
    folder, copy = wanted.with_name(name), store.below(name)
    folder.mkdir(parents=True, exist_ok=True)
    with RunDir(folder).locked():
        step = _last_step(RunDir(folder))
        if step >= last_step:  # another process has fetched it
            return
        logger.info("fetching %s from %s", folder, store.url)
        started_s = time.monotonic()
        # Later local segments may have the names of fetched ones and other content.
        drop_segments_after(folder / "traces", step)
        files = _files(folder)
        missing = [file for file, facts in copy.files().items() if not _is_there(file, facts, files)]
        for file in sorted(missing, key=_goes_last):
            copy.get(file, folder / file)
    logger.info("fetched %d files of %s in %.1f s", len(missing), folder, time.monotonic() - started_s)


def _last_step(folder: RunDir) -> int:
    """The step of the last good checkpoint. 0 if there is none."""
    resumable = last_resumable(folder)
    return 0 if resumable is None else resumable.state.step


def _files(folder: Path) -> dict[str, _Stamp]:
    """Complete files by their relative path, without the lock, which belongs to this machine."""
    found: dict[str, _Stamp] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_passing(name)]
        for path in (Path(parent, name) for name in files if not is_passing(name) and name != ".lock"):
            with suppress(FileNotFoundError):  # it has been removed
                stat = path.stat()
                found[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


def _is_there(name: str, stored: Facts, files: dict[str, _Stamp]) -> bool:
    """Whether a stored file that never changes is among the files here."""
    return name in files and name.startswith(_IMMUTABLE) and files[name][0] == stored["size"]


def _goes_last(name: str) -> tuple[bool, str]:
    """A manifest makes a checkpoint count, and a summary says that everything else is there."""
    return (name.endswith(("/manifest.json", "summary.json")), name)
