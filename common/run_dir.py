"""The run directory: names and formats of its files, and how they are read and written.

    config.yaml       every setting and where it came from
    metrics.jsonl     one line per step and per evaluation
    faults.jsonl      one line per fault
    set_aside.jsonl   quarantined prompts, which the run continues without
    summary.json      written when the run has finished
    traces/           Parquet segments, one per step
    checkpoints/      checkpoints from which the run can be resumed
    student/          the trained student, Hugging Face format

docs/run-folder.md describes every file, docs/metrics.md every metric. Does not depend on the code that uses
them.
"""

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from common.config.source import ResolvedConfig, dump_config
from common.errors import UserError
from common.files import fsync, write_whole

logger = logging.getLogger(__name__)

Metrics = dict[str, float | int]

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
FAULTS, SET_ASIDE, VERSIONS = "faults.jsonl", "set_aside.jsonl", "versions.json"
TRACES, CHECKPOINTS, STUDENT = "traces", "checkpoints", "student"
TEXT_FILES = (CONFIG, METRICS, FAULTS, SET_ASIDE, SUMMARY, VERSIONS)


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @classmethod
    def create(cls, wanted: str, resolved: ResolvedConfig, *, taken: Collection[str] = ()) -> "RunDir":
        """Make the folder and store the configuration. If a folder already holds a run, or its name is in ``taken``,
        -2, -3, ... is appended.
        """
        for number in count(1):
            path = Path(wanted if number == 1 else f"{wanted}-{number}").absolute()
            if path.name in taken:
                continue
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                if any(path.iterdir()):
                    continue
            folder = cls(path)
            folder.write_config(resolved)
            return folder
        raise AssertionError("count() does not end")

    @classmethod
    def all(cls, wanted: Path | str) -> "list[RunDir]":
        """The folders that ``create`` made for this ``run_dir``, from old to new."""
        first = Path(wanted).absolute()
        numbers = {path: run_number(path.name, first.name) for path in first.parent.glob("*") if path.is_dir()}
        return [cls(path) for number, path in sorted((number, path) for path, number in numbers.items() if number)]

    @property
    def traces(self) -> Path:
        return self.path / TRACES

    @property
    def student(self) -> Path:
        """The trained student in Hugging Face format."""
        return self.path / STUDENT

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Prevent other processes from continuing the same run. The lock ends with the process, even if it is
        killed.

        Raises UserError if another process holds the lock.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.path}: another process is using this run; wait for it or stop it") from error
            yield

    def write_config(self, resolved: ResolvedConfig) -> None:
        write_whole(self.path / CONFIG, dump_config(resolved))

    def append_metrics(self, metrics: Metrics) -> None:
        """Append the measurements of one step or one evaluation."""
        _append(self._metrics_file, {"time": time.time(), **metrics})

    def read_metrics(self) -> list[Metrics]:
        return _read(self._metrics_file)

    def append_fault(self, fault: Mapping[str, object]) -> None:
        """Append a failure of a worker, and what was done about it."""
        _append(self.path / FAULTS, fault)

    def read_faults(self) -> list[dict[str, Any]]:
        return _read(self.path / FAULTS)

    def append_set_aside(self, prompt: Mapping[str, object]) -> None:
        """Append a prompt that is quarantined for good: a resumed run leaves it out too."""
        _append(self.path / SET_ASIDE, prompt)

    def read_set_aside(self) -> list[dict[str, Any]]:
        return _read(self.path / SET_ASIDE)

    def drop_metrics_after(self, step: int) -> None:
        """Remove the lines of later steps. A run that is resumed from ``step`` measures them again."""
        kept = [metrics for metrics in self.read_metrics() if metrics["step"] <= step]
        write_whole(self._metrics_file, "".join(f"{json.dumps(metrics)}\n" for metrics in kept))

    def sync_metrics(self) -> None:
        """Wait until the metrics are on the disk. Called before a checkpoint that relies on them."""
        fsync(self._metrics_file)

    @property
    def _metrics_file(self) -> Path:
        return self.path / METRICS

    def write_summary(self, summary: dict[str, object]) -> None:
        """Write the summary atomically."""
        write_whole(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def remove_summary(self) -> None:
        """Mark the run as not finished."""
        (self.path / SUMMARY).unlink(missing_ok=True)

    def read_summary(self) -> dict[str, object] | None:
        """The summary, or None if the run has not finished."""
        path = self.path / SUMMARY
        if not path.exists():
            return None
        summary: dict[str, object] = json.loads(path.read_text())
        return summary


def run_number(name: str, first: str) -> int | None:
    """A folder's number among the runs of one ``run_dir``: 1 for ``demo``, 2 for ``demo-2``. None for any other."""
    match = re.fullmatch(rf"{re.escape(first)}(?:-([2-9]|[1-9]\d+))?", name)
    return int(match[1] or 1) if match else None


def _append(file: Path, record: Mapping[str, object]) -> None:
    """Append one line of JSON. If a crash left a partial last line, start on a new line."""
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        lines.write(json.dumps(record).encode() + b"\n")


def _read(file: Path) -> list[dict[str, Any]]:
    """All complete lines. Skips a partial last line, as a crash leaves it, and other invalid lines with a warning."""
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_text().split("\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: line %d is incomplete and is skipped", file, number)
    return records
