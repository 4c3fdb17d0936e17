"""A run's folder: it explains itself. ``config.yaml``, ``metrics.jsonl``, ``faults.jsonl``, ``set_aside.jsonl``,
``traces/``, ``checkpoints/``, ``student/``, ``summary.json``.

Owns names and formats of these files. docs/metrics.md says what each metric means.
"""

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from common.config.source import ResolvedConfig, dump_config
from common.errors import UserError
from common.files import fsync, write_whole
from rollout_server.traces.writer import drop_segments_after
from trainer.reports import Evaluated, Trained

logger = logging.getLogger(__name__)

Metrics = dict[str, float | int]

_EDGE_STEPS = 5  # how many first and last steps the summary averages over


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @classmethod
    def create(cls, wanted: str, resolved: ResolvedConfig, *, taken: Collection[str] = ()) -> "RunFolder":
        """Make the folder and store the configuration. One that holds a run, or whose name is ``taken`` elsewhere, is
        left alone: -2, -3, ... is added.
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
    def all(cls, wanted: str) -> "list[RunFolder]":
        """Those that ``create`` made for this ``run_dir``, from old to new."""
        first = Path(wanted).absolute()
        numbered = re.compile(rf"{re.escape(first.name)}-([1-9]\d*)")
        matches = [
            match for path in first.parent.glob("*") if path.is_dir() and (match := numbered.fullmatch(path.name))
        ]
        later = sorted((match for match in matches if int(match[1]) >= 2), key=lambda match: int(match[1]))
        return [cls(path) for path in (first, *(first.parent / match[0] for match in later)) if path.is_dir()]

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def student(self) -> Path:
        """The trained student in Hugging Face format."""
        return self.path / "student"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from going on with the same run. Gone with the process, however it ends.

        Raises UserError where another process has it.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.path}: another process is at this run; wait for it, or end it") from error
            yield

    def write_config(self, resolved: ResolvedConfig) -> None:
        write_whole(self.path / "config.yaml", dump_config(resolved))

    def append_metrics(self, metrics: Metrics) -> None:
        """What one step or one evaluation measured."""
        _append(self._metrics_file, {"time": time.time(), **metrics})

    def read_metrics(self) -> list[Metrics]:
        return _read(self._metrics_file)

    def append_fault(self, fault: Mapping[str, object]) -> None:
        """What went wrong with a part of the run, and what became of it."""
        _append(self.path / "faults.jsonl", fault)

    def read_faults(self) -> list[dict[str, Any]]:
        return _read(self.path / "faults.jsonl")

    def append_set_aside(self, prompt: Mapping[str, object]) -> None:
        """A prompt that the run goes on without. Never taken back: a resumed run leaves it out too."""
        _append(self.path / "set_aside.jsonl", prompt)

    def read_set_aside(self) -> list[dict[str, Any]]:
        return _read(self.path / "set_aside.jsonl")

    def cut_after(self, step: int, *, last_collected: int) -> None:
        """Forget what was measured after ``step`` and what was traced for steps after ``last_collected``."""
        kept = [metrics for metrics in self.read_metrics() if metrics["step"] <= step]
        write_whole(self._metrics_file, "".join(f"{json.dumps(metrics)}\n" for metrics in kept))
        drop_segments_after(self.traces, last_collected)

    def sync_metrics(self) -> None:
        """Wait until what was measured is on the disk: before a checkpoint that relies on it."""
        fsync(self._metrics_file)

    @property
    def _metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def write_summary(self, summary: dict[str, object]) -> None:
        """Whole or not at all."""
        write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def remove_summary(self) -> None:
        """The run is not finished any more."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def read_summary(self) -> dict[str, object] | None:
        """None where the run has not finished."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        summary: dict[str, object] = json.loads(path.read_text())
        return summary


def _append(file: Path, record: Mapping[str, object]) -> None:
    """One line of JSON more, not behind what a crash left of another."""
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        lines.write(json.dumps(record).encode() + b"\n")


def _read(file: Path) -> list[dict[str, Any]]:
    """All lines but those that a crash left half-written; of one with others behind it, a warning."""
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_text().split("\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: line %d is not whole and is left out", file, number)
    return records


def metrics_of(record: Trained | Evaluated) -> Metrics:
    """A record's numbers under their documented names. What a step has none of is left out."""
    if isinstance(record, Evaluated):
        metrics: dict[str, float | int | None] = {
            "step": record.step,
            "evaluation/accuracy": record.report.accuracy,
            "evaluation/divergence_nats": record.report.mean_divergence,
            "evaluation/tokens_per_sequence": record.report.mean_length,
            "evaluation/prompts": record.report.num_prompts,
            "evaluation/seconds": record.seconds,
        }
    else:
        rollout, training, sync = record.rollout, record.training, record.sync
        metrics = {
            "step": record.step,
            "rollout/sequences": rollout.num_sequences,
            "rollout/tokens": rollout.num_tokens,
            "rollout/tokens_per_s": rollout.num_tokens / rollout.seconds,
            "rollout/wasted_tokens": rollout.num_wasted_tokens,
            "rollout/refused_sequences": rollout.num_refused,
            "rollout/seconds": rollout.seconds,
            "switch/rate": rollout.switch_rate,
            "switch/mean_position": rollout.mean_switch_position,
            "switch/teacher_token_share": rollout.teacher_token_share,
            "divergence/mean_nats": rollout.mean_divergence,
            "train/loss_nats": training.loss,
            "train/loss_student_tokens_nats": training.loss_student_tokens,
            "train/loss_teacher_tokens_nats": training.loss_teacher_tokens,
            "train/loss_dataset_tokens_nats": training.loss_dataset_tokens,
            "train/covered_mass": training.covered_mass,
            "train/grad_norm": training.grad_norm,
            "train/learning_rate": training.learning_rate,
            "train/staleness": rollout.mean_staleness,
            "train/micro_batches": training.num_micro_batches,
            "train/seconds": training.seconds,
            "train/tokens_per_s": training.num_tokens / training.seconds,
            "sync/seconds": sync.seconds,
            "sync/probe_nats": sync.probe.max_difference,
            "sync/probe_p99_nats": sync.probe.p99,
            "sync/probe_rms_nats": sync.probe.rms,
            "sync/followed": sync.probe.followed,
            "sync/followed_output_layer": sync.probe.followed_output_layer,
            "sync/weight_version": sync.version,
        }
    return {name: value for name, value in metrics.items() if value is not None}


def summarise_run(
    lines: Sequence[Metrics],
    *,
    run_dir: Path,
    seconds: float,
    num_resumed: int,
    num_faults: int = 0,
    set_aside: Sequence[str] = (),
) -> dict[str, object]:
    """What the run came to, from all its metrics: the content of ``summary.json``. None where a run has no such thing.

    ``seconds`` are those of the whole run but for what was lost between a checkpoint and a crash.
    """
    trained = [line for line in lines if "train/loss_nats" in line]
    evaluated = [line for line in lines if "evaluation/prompts" in line]
    switch_rates = [line["switch/rate"] for line in trained]
    num_tokens = sum(line["rollout/tokens"] for line in trained)
    rollout_s = sum(line["rollout/seconds"] for line in trained)
    teacher_shares = [(line["switch/teacher_token_share"], line["rollout/tokens"]) for line in trained]
    switch_positions = [
        (line["switch/mean_position"], line["switch/rate"] * line["rollout/sequences"])
        for line in trained
        if "switch/mean_position" in line
    ]
    return {
        "accuracy_before": evaluated[0].get("evaluation/accuracy") if evaluated else None,
        "accuracy_after": evaluated[-1].get("evaluation/accuracy") if evaluated else None,
        "held_out_prompts": evaluated[0]["evaluation/prompts"] if evaluated else None,
        "switch_rate": _mean(switch_rates),
        "switch_rate_first": _mean(switch_rates[:_EDGE_STEPS]),
        "switch_rate_last": _mean(switch_rates[-_EDGE_STEPS:]),
        "teacher_share": _weighted_mean(teacher_shares),
        "mean_switch_position": _weighted_mean(switch_positions),
        "tokens_per_s": num_tokens / rollout_s if rollout_s else None,
        "rollout_s": rollout_s,
        "train_s": sum(line["train/seconds"] for line in trained),
        "sync_s": sum(line["sync/seconds"] for line in trained),
        "max_probe_nats": max((line["sync/probe_nats"] for line in trained), default=None),
        "max_probe_rms_nats": max(
            (line["sync/probe_rms_nats"] for line in trained if "sync/probe_rms_nats" in line), default=None
        ),
        "steps": len(trained),
        "sequences": sum(line["rollout/sequences"] for line in trained),
        "tokens": num_tokens,
        "seconds": seconds,
        "resumed": num_resumed,
        "faults": num_faults,
        "prompts_set_aside": list(set_aside),
        "run_dir": str(run_dir),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Of (value, weight) pairs."""
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
