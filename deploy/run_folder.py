"""A run's folder: it explains itself. ``config.yaml``, ``metrics.jsonl``, ``traces/``, ``student/``, ``summary.json``.

Owns names and formats of these files. docs/metrics.md says what each metric means.
"""

import json
import os
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from common.config_source import ResolvedConfig, dump_config
from trainer.loop import Evaluated, Trained

_EDGE_STEPS = 5  # how many first and last steps the summary averages over


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @classmethod
    def create(cls, wanted: str, resolved: ResolvedConfig) -> "RunFolder":
        """Make the folder and store the configuration. One that holds a run is left alone: -2, -3, ... is added."""
        for number in count(1):
            path = Path(wanted if number == 1 else f"{wanted}-{number}").absolute()
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                if any(path.iterdir()):
                    continue
            folder = cls(path)
            (path / "config.yaml").write_text(dump_config(resolved))
            return folder
        raise AssertionError("count() does not end")

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def student(self) -> Path:
        """The trained student in Hugging Face format."""
        return self.path / "student"

    def append_metrics(self, metrics: dict[str, float | int]) -> None:
        """One line of JSON: what one step or one evaluation measured."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), **metrics}) + "\n")

    def write_summary(self, summary: dict[str, object]) -> None:
        """Whole or not at all."""
        unfinished = self.path / ".summary.json.unfinished"
        with unfinished.open("w") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self.path / "summary.json")


def metrics_of(record: Trained | Evaluated) -> dict[str, float | int]:
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
            "train/micro_batches": training.num_micro_batches,
            "train/seconds": training.seconds,
            "train/tokens_per_s": training.num_tokens / training.seconds,
            "sync/seconds": sync.seconds,
            "sync/probe_nats": sync.probe.max_difference,
            "sync/weight_version": sync.version,
        }
    return {name: value for name, value in metrics.items() if value is not None}


def summarise_run(records: list[Trained | Evaluated], *, run_dir: Path, seconds: float) -> dict[str, object]:
    """What the run came to: the content of ``summary.json``. None where a run has no such thing."""
    trained = [record for record in records if isinstance(record, Trained)]
    evaluated = [record for record in records if isinstance(record, Evaluated)]
    num_tokens = sum(record.rollout.num_tokens for record in trained)
    rollout_s = sum(record.rollout.seconds for record in trained)
    switched = [record.rollout for record in trained if record.rollout.mean_switch_position is not None]
    num_switched = sum(rollout.switch_rate * rollout.num_sequences for rollout in switched)
    return {
        "accuracy_before": evaluated[0].report.accuracy if evaluated else None,
        "accuracy_after": evaluated[-1].report.accuracy if evaluated else None,
        "held_out_prompts": evaluated[0].report.num_prompts if evaluated else None,
        "switch_rate": _mean([record.rollout.switch_rate for record in trained]),
        "switch_rate_first": _mean([record.rollout.switch_rate for record in trained[:_EDGE_STEPS]]),
        "switch_rate_last": _mean([record.rollout.switch_rate for record in trained[-_EDGE_STEPS:]]),
        "teacher_share": sum(r.rollout.teacher_token_share * r.rollout.num_tokens for r in trained) / num_tokens
        if num_tokens
        else None,
        "mean_switch_position": sum(
            (rollout.mean_switch_position or 0.0) * rollout.switch_rate * rollout.num_sequences for rollout in switched
        )
        / num_switched
        if switched
        else None,
        "tokens_per_s": num_tokens / rollout_s if rollout_s else None,
        "rollout_s": rollout_s,
        "train_s": sum(record.training.seconds for record in trained),
        "sync_s": sum(record.sync.seconds for record in trained),
        "max_probe_nats": max((record.sync.probe.max_difference for record in trained), default=None),
        "steps": len(trained),
        "sequences": sum(record.rollout.num_sequences for record in trained),
        "tokens": num_tokens,
        "seconds": seconds,
        "run_dir": str(run_dir),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
