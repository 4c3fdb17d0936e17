"""Checks that end in every way a check can end: what ``supervise`` is tested with."""

import os
import time
from collections.abc import Callable

from tests.gpu.context import Context
from tests.gpu.records import Figures, NotRun


def passes(context: Context, figures: Figures) -> None:
    figures.add("answer", 42.0, "", at_least=42.0)


def out_of_bounds(context: Context, figures: Figures) -> None:
    figures.add("share", 0.5, "", at_least=0.9)
    figures.add("time", 2.0, "s")


def lacks_something(context: Context, figures: Figures) -> None:
    raise NotRun("needs two GPUs, 1 is there")


def raises(context: Context, figures: Figures) -> None:
    figures.add("before", 1.0, "")
    raise ValueError("two\nlines")


def breaks_cuda(context: Context, figures: Figures) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def crashes(context: Context, figures: Figures) -> None:
    print("about to crash", flush=True)
    os.abort()


def hangs(context: Context, figures: Figures) -> None:
    time.sleep(600)


CHECKS: dict[str, Callable[[Context, Figures], None]] = {
    check.__name__: check for check in (passes, out_of_bounds, lacks_something, raises, breaks_cuda, crashes, hangs)
} | {"passes_too": passes}
