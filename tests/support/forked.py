"""``tests.support.killable_run`` in processes that start at once: forked from a server that has imported everything.

Importing takes seconds, and a test that kills a run several times starts as many processes. Forked ones share the
server's hash seed: what must not depend on it is compared with a run of ``python -m``.
"""

import multiprocessing
import os
import resource
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.killable_run"])


def start_run(
    config: Path, options: Sequence[str], *, log: Path, max_file_bytes: int | None = None
) -> ForkServerProcess:
    """``log`` gets what it writes to stderr. ``max_file_bytes``: no file may grow beyond it, as on a full disk."""
    process = _CONTEXT.Process(target=_run, args=(config, options, log, max_file_bytes), daemon=True)
    process.start()
    return process


def _run(config: Path, options: Sequence[str], log: Path, max_file_bytes: int | None) -> None:
    from tests.support import killable_run

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    killable_run.main(str(config), resume="--resume" in options)
