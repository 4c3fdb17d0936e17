"""What a check found, and ``gpu.json``: the last real outcome of every check, with the machine that gave it.

Knows neither torch nor vLLM, so that the documentation's tests can read the file anywhere.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

Outcome = Literal["passed", "failed", "not run"]


class NotRun(Exception):
    """Raised by a check that this machine can't run. Its text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number, and the bound it must keep, if it must keep one."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is a number and within its bounds."""
        too_high = self.at_most is not None and self.value > self.at_most
        too_low = self.at_least is not None and self.value < self.at_least
        return math.isfinite(self.value) and not too_high and not too_low

    def __str__(self) -> str:
        bounds = [f"at most {self.at_most:.4g}"] if self.at_most is not None else []
        bounds += [f"at least {self.at_least:.4g}"] if self.at_least is not None else []
        wanted = f" ({', '.join(bounds)})" if bounds else ""
        return f"{self.name} {self.value:.4g}{' ' * bool(self.unit)}{self.unit}{wanted}"


class Figures:
    """What a check fills in. A figure out of its bounds fails the check at its end, so that no figure is lost."""

    def __init__(self) -> None:
        self._figures: list[Figure] = []

    def add(
        self, name: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """``unit`` is empty for a ratio or a share."""
        assert all(figure.name != name for figure in self._figures), f"two figures are called {name}"
        self._figures.append(Figure(name=name, value=float(value), unit=unit, at_most=at_most, at_least=at_least))

    @property
    def all(self) -> tuple[Figure, ...]:
        return tuple(self._figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and when checks ran. One per call of ``make verify-gpu`` on a machine with a GPU."""

    date: str  # UTC, to the second: also the key in gpu.json
    gpus: tuple[str, ...]  # names, in torch's order
    gpu_memory_gib: float  # of the first
    driver: str
    versions: Mapping[str, str]  # CUDA, and packages by their distribution names
    processor: str
    cores: int
    commit: str | None = None  # of the code; None outside a checkout

    def __post_init__(self) -> None:
        assert self.gpus, "a machine without a GPU measures nothing for gpu.json"

    @property
    def card(self) -> str:
        """For a reader: ``NVIDIA H100 80GB HBM3`` or ``2 x NVIDIA L4``."""
        names = list(dict.fromkeys(self.gpus))
        return " + ".join(name if (number := self.gpus.count(name)) == 1 else f"{number} x {name}" for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRecord:
    """One check's outcome. ``measured`` is the ``Machine.date`` it belongs to, None where no GPU was there."""

    part: str
    name: str
    outcome: Outcome
    figures: tuple[Figure, ...] = ()
    reason: str | None = None  # why it failed or was not run
    seconds: float | None = None
    measured: str | None = None

    def __post_init__(self) -> None:
        assert self.outcome in get_args(Outcome), self.outcome
        assert (self.reason is None) == (self.outcome == "passed"), (self.name, self.outcome, self.reason)

    @property
    def key(self) -> tuple[str, str]:
        return (self.part, self.name)

    @property
    def was_run(self) -> bool:
        return self.outcome != "not run"


def concluded(part: str, name: str, figures: Figures, seconds: float) -> CheckRecord:
    """The record of a check that came to its end: passed where every figure holds."""
    broken = [str(figure) for figure in figures.all if not figure.holds]
    return CheckRecord(
        part=part,
        name=name,
        outcome="failed" if broken else "passed",
        figures=figures.all,
        reason="; ".join(broken) or None,
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """``gpu.json`` in memory."""

    checks: tuple[CheckRecord, ...] = ()
    machines: Mapping[str, Machine] = field(default_factory=dict)  # by date

    def merged(self, newer: "Results", catalogue: Sequence[tuple[str, str]]) -> "Results":
        """These results with newer ones put in, in the catalogue's order; checks that are not in it are dropped.

        What was measured stays until it is measured again: "not run" replaces a real outcome never, and another
        "not run" only where a GPU was there, whose reason says more.
        """
        known = {record.key: record for record in self.checks}
        for record in newer.checks:
            old = known.get(record.key)
            if old is None or record.was_run or (not old.was_run and record.measured is not None):
                known[record.key] = record
        checks = tuple(known[key] for key in catalogue if key in known)
        machines = {**self.machines, **newer.machines}
        named = sorted({record.measured for record in checks if record.measured is not None})
        return Results(checks=checks, machines={date: machines[date] for date in named})

    def measured_on(self, machine: Machine) -> "Results":
        """The same checks, as run on this machine."""
        return Results(
            checks=tuple(replace(record, measured=machine.date) for record in self.checks),
            machines={machine.date: machine},
        )

    @property
    def failed(self) -> list[CheckRecord]:
        return [record for record in self.checks if record.outcome == "failed"]


def read(path: Path) -> Results:
    """Empty where there is no file."""
    if not path.exists():
        return Results()
    content = json.loads(path.read_text())
    return Results(
        checks=tuple(record_from(row) for row in content["checks"]),
        machines={row["date"]: Machine(**{**row, "gpus": tuple(row["gpus"])}) for row in content["machines"]},
    )


def write(path: Path, results: Results) -> None:
    """Replace the file, unless it says the same already."""
    content = {
        "machines": [_without_none(asdict(machine)) for machine in results.machines.values()],
        "checks": [row_of(record) for record in results.checks],
    }
    replace_text(path, json.dumps(content, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """In one step, and only where it differs: somebody may be reading it."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def row_of(record: CheckRecord) -> dict[str, Any]:
    """A record as JSON has it: four digits, and what is not there left out. Not a number is a string there."""
    row = _without_none(asdict(record))
    row["figures"] = [_without_none(figure) for figure in row["figures"]]
    rounded: dict[str, Any] = _rounded(row)
    return rounded


def record_from(row: Mapping[str, Any]) -> CheckRecord:
    """What ``row_of`` made."""
    figures = tuple(Figure(**{**figure, "value": float(figure["value"])}) for figure in row["figures"])
    return CheckRecord(**{**row, "figures": figures})


def _without_none(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def lines(records: Iterable[CheckRecord]) -> list[str]:
    """For the terminal, one line a check."""
    return [line(record) for record in records]


def line(record: CheckRecord) -> str:
    """``learner.step_float64: passed in 3 s; loss, relative difference 1e-15 (at most 1e-09)``."""
    seconds = f" in {record.seconds:.1f} s" if record.seconds is not None and record.was_run else ""
    said = [record.reason] if record.reason is not None else []
    said += [str(figure) for figure in record.figures if str(figure) not in (record.reason or "")]
    return f"{record.part}.{record.name}: {record.outcome}{seconds}{'; ' if said else ''}{'; '.join(said)}"
