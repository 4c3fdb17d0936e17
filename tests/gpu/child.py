"""A part's own process: runs the checks it is told, one after the other, and writes each record as soon as it is there.

    python -m tests.gpu.child MODULE PART --device cuda --folder FOLDER --checks NAME ...

Leaves with ``BROKEN`` after an error of CUDA itself: what follows in this process would fail for that alone.
"""

import argparse
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

from tests.gpu.context import Context
from tests.gpu.records import CheckRecord, Figures, NotRun, concluded, row_of

BROKEN = 70


def main() -> int:
    arguments = _parse()
    with (arguments.folder / "lines").open("a") as lines:

        def say(**row: object) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        module = importlib.import_module(arguments.module)
        with Context(arguments.device, arguments.folder, tuple(arguments.engine)) as context:
            for name in arguments.checks:
                say(begins=name)
                record, is_broken = _run(module.CHECKS[name], arguments.part, name, context)
                say(record=row_of(record))
                if is_broken:
                    return BROKEN
    return 0


def _run(check: object, part: str, name: str, context: Context) -> tuple[CheckRecord, bool]:
    """The record, and whether the process can't go on."""
    figures, started_s = Figures(), time.perf_counter()
    assert callable(check)
    try:
        check(context, figures)
    except NotRun as why:
        return CheckRecord(part=part, name=name, outcome="not run", reason=str(why)), False
    except Exception as error:  # whatever it is, it is this check's outcome
        traceback.print_exc()
        record = CheckRecord(
            part=part,
            name=name,
            outcome="failed",
            figures=figures.all,
            reason=_one_line(error),
            seconds=time.perf_counter() - started_s,
        )
        return record, "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
    return concluded(part, name, figures, time.perf_counter() - started_s), False


def _one_line(error: Exception) -> str:
    """What and where: the last of our own lines that it came through."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module")
    parser.add_argument("part")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--checks", nargs="+", required=True)
    parser.add_argument("--engine", nargs="*", default=[])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
