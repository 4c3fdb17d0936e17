"""What of the GPU paths works on this machine's GPUs, and how fast: ``make verify-gpu``.

    python -m tests.gpu                          all parts
    python -m tests.gpu --part a,b,c --total-minutes 9 --out /tmp/gpu.json
    python -m tests.gpu --device cpu             the same checks as far as a processor can run them; writes nothing
    python -m tests.gpu --merge /tmp/gpu.json    take over what another machine measured

Writes docs/benchmarks/gpu.json and the pages' tables; a check that was run keeps its outcome there until it is run
again. Without a GPU nothing is run. The exit code is 1 where a check failed, else 0. More in docs/gpu.md.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

from tests.gpu import pages, records
from tests.gpu.catalogue import CATALOGUE, PARTS, Part, part_named
from tests.gpu.machine import ROOT, facts
from tests.gpu.records import CheckRecord, Machine, Outcome, Results
from tests.gpu.supervise import Options, none_run, run_part

FILE = ROOT / "docs" / "benchmarks" / "gpu.json"


def main(words: list[str] | None = None) -> int:
    arguments = _parse(words)
    out = arguments.out or (FILE if arguments.device == "cuda" else None)
    if arguments.merge is not None:
        _keep(arguments.out or FILE, records.read(arguments.merge))
        return 0
    machine = facts() if arguments.device == "cuda" else None
    if isinstance(machine, str):
        print(f"no GPU here, so nothing is run: {machine}")
        results = Results(checks=tuple(record for part in arguments.part for record in none_run(part, machine)))
        _keep(out or FILE, results)
    else:
        results = _run(arguments, machine, out)
    _say(results)
    return 1 if results.failed else 0


def _run(arguments: argparse.Namespace, machine: Machine | None, out: Path | None) -> Results:
    """All parts, one after the other; on a processor (no machine) too."""
    end_s = time.monotonic() + 60.0 * arguments.total_minutes
    checks: list[CheckRecord] = []
    for part in arguments.part:
        wanted = [check for check in part.checks if not arguments.check or check in arguments.check]
        if not wanted:
            continue
        print(f"part {part.letter}, {part.title}: {', '.join(wanted)}", flush=True)
        left = (end_s - time.monotonic()) / 60.0
        minutes = round(max(0.0, min(arguments.minutes, left)), 2)
        options = Options(device=arguments.device, minutes=minutes, engine=tuple(arguments.engine))
        found = run_part(part, wanted, options)
        print(*(f"  {line}" for line in records.lines(found)), sep="\n", flush=True)
        checks += found
        if out is not None:  # at once, should a later part take this process with it
            _keep(out, _results(checks, machine))
    return _results(checks, machine)


def _results(checks: list[CheckRecord], machine: Machine | None) -> Results:
    results = Results(checks=tuple(checks))
    return results if machine is None else results.measured_on(machine)


def _keep(out: Path, results: Results) -> None:
    """Into the file; into the pages too, where it is the documentation's."""
    merged = records.read(out).merged(results, CATALOGUE)
    records.write(out, merged)
    if out.resolve() == FILE:
        pages.write(ROOT, merged)


def _say(results: Results) -> None:
    """What could not be run, by reason; what failed; how many of each."""
    reasons: dict[str, list[str]] = {}
    for record in results.checks:
        if not record.was_run:
            reasons.setdefault(record.reason or "", []).append(f"{record.part}.{record.name}")
    for reason, names in reasons.items():
        print(f"not run: {', '.join(names)}: {reason}")
    for record in results.failed:
        print(records.line(record))
    outcomes = [record.outcome for record in results.checks]
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in get_args(Outcome)))


def _parts(text: str) -> list[Part]:
    try:
        return [part_named(name) for name in text.split(",")]
    except KeyError as error:
        known = ", ".join(f"{part.letter} ({part.name})" for part in PARTS)
        raise argparse.ArgumentTypeError(f"no part {error}; there are {known}") from error


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=_parts, default=list(PARTS), help="a,b,c,d or names; default: all")
    parser.add_argument("--check", nargs="+", default=[], help="only these checks of the parts")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each part")
    parser.add_argument("--total-minutes", type=float, default=float("inf"), help="for all of them together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help=f"default: {FILE.relative_to(ROOT)}; with --device cpu: none")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="run nothing; take over this file's outcomes")
    parser.add_argument(
        "--engine", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every engine of parts b and c"
    )
    arguments = parser.parse_args(words)
    if arguments.device == "cpu" and arguments.out is not None and arguments.out.resolve() == FILE:
        parser.error(f"--out {arguments.out} is for what GPUs give, got --device cpu")
    unknown = set(arguments.check) - {check for part in arguments.part for check in part.checks}
    if unknown:
        parser.error(f"--check: no such check in these parts: {', '.join(sorted(unknown))}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
