"""A folder in an object store, or on any file system that fsspec knows. The only importer of fsspec.

Stores and fetches whole files. Knows nothing of what they hold.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_random_exponential

from common.errors import UserError
from common.files import is_passing
from common.waiting import WaitedTooLong

T = TypeVar("T")
Facts = dict[str, Any]
"""What the store says of a file: ``size`` in bytes, and more, which differs when the content does."""

_ATTEMPTS, _LONGEST_PAUSE_S = 5, 30.0
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class Store:
    """The folder behind a URL. May be used by several threads."""

    def __init__(self, url: str, *, timeout_s: float, key: str = "storage.url") -> None:
        """``timeout_s`` is for each file and each listing; ``key`` heads errors.

        Raises UserError for an unknown protocol, and if the protocol's package is missing.
        """
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._key = key
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            protocol = urlsplit(url).scheme
            extra = _EXTRAS.get(protocol)
            hint = f"; pip install 'adaswitch[{extra}]'" if extra else ""
            raise UserError(f"{key}: {protocol}:// needs a package that is not installed ({error}){hint}") from error
        except ValueError as error:
            raise UserError(f"{key}: can't use {url!r}: {error}") from error
        self._root = str(root).rstrip("/")
        self._is_disk = "file" in self._files.protocol

    def below(self, name: str) -> "Store":
        """The store of a folder in this one."""
        return Store(f"{self.url}/{name}", timeout_s=self._timeout_s, key=self._key)

    def files(self) -> dict[str, Facts]:
        """Every whole file below, by its path from here. A folder that does not exist has none."""

        def find() -> dict[str, Facts]:
            self._files.invalidate_cache()
            found: dict[str, Facts] = self._files.find(self._root, detail=True)
            return found

        start = len(self._root) + 1
        return {
            path[start:]: facts
            for path, facts in self._tried(f"the list of {self.url}", find).items()
            if not any(part in (".", "..") or is_passing(part) for part in path[start:].split("/"))
        }

    def files_or_user_error(self) -> dict[str, Facts]:
        """``files``. Raises UserError if the store can't be listed."""
        try:
            return self.files()
        except Exception as error:  # any error of the store
            raise UserError(f"{self._key}: can't list {self.url}: {type(error).__name__}: {error}") from error

    def put(self, file: Path, name: str) -> None:
        """Store or replace a file in one step. Raises FileNotFoundError if ``file`` does not exist."""
        send = _replace if self._is_disk else self._files.put_file
        self._tried(f"{name} to be stored in {self.url}", lambda: send(str(file), f"{self._root}/{name}"))

    def get(self, name: str, file: Path) -> None:
        """Fetch or replace a file in one step. Raises FileNotFoundError if the store does not have it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.unfinished")
        self._tried(f"{name} of {self.url}", lambda: self._files.get_file(f"{self._root}/{name}", str(unfinished)))
        unfinished.rename(file)

    def remove(self, name: str) -> None:
        """Remove a file if it exists. A folder goes with its last file, as in an object store."""

        def drop() -> None:
            with suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}")

        self._tried(f"{name} to be removed from {self.url}", drop)
        if self._is_disk:
            with suppress(OSError):  # not empty
                os.removedirs(Path(self._root, name).parent)

    def _tried(self, what: str, call: Callable[[], T]) -> T:
        """The call's result. The call is repeated a few times if the store raises an error."""
        retrying = Retrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
            retry=retry_if_not_exception_type((FileNotFoundError, PermissionError, WaitedTooLong)),
            reraise=True,
        )
        result: T = retrying(_in_time, self._timeout_s, what, call)
        return result


def _replace(source: str, path: str) -> None:
    """A disk shows a file while it is written, unlike an object store: so it is renamed to its name at the end."""
    unfinished = Path(path).with_name(f".{Path(path).name}.unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, unfinished)
    unfinished.rename(path)


def _in_time(timeout_s: float, what: str, call: Callable[[], T]) -> T:
    """The call's result, or WaitedTooLong: stores have time-outs of their own, or none. A call that hangs is left
    behind in a daemon thread, which does not keep the process alive.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed to the caller, whatever it is
            future.set_exception(error)

    Thread(target=run, daemon=True, name="storage").start()
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        if future.done():
            raise
        raise WaitedTooLong(f"waited {timeout_s:g} s for {what}") from error
