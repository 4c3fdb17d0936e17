"""A run's records as numbers: the loop's reports under their metric names, and the run's summary. Pure.

docs/metrics.md describes each metric.
"""

from collections.abc import Sequence
from pathlib import Path

from common.run_dir import Metrics
from trainer.reports import Evaluated, Trained

_EDGE_STEPS = 5  # number of first and last steps that the summary averages over


def metrics_of(record: Trained | Evaluated) -> Metrics:
    """A record's numbers under their metric names. Missing values are left out."""
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


def summarize_run(
    lines: Sequence[Metrics],
    *,
    run_dir: Path,
    seconds: float,
    num_resumed: int,
    num_faults: int = 0,
    set_aside: Sequence[str] = (),
) -> dict[str, object]:
    """The content of ``summary.json``, from all of a run's metrics. Values that a run does not have are None.

    ``seconds`` is the time of the whole run, without the time lost between a checkpoint and a crash.
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
    """The weighted mean of (value, weight) pairs."""
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
