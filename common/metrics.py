"""What a training exports while it runs: one table. Code, docs/metrics.md and the dashboard are held against it.

Step and evaluation measurements keep the names they have in ``metrics.jsonl``. Knows no one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One measurement. Every one has the label ``run``."""

    name: str  # as in metrics.jsonl
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper edges, of a histogram

    @property
    def exported_name(self) -> str:
        """What is handed to Ray, which puts ``ray_`` before it."""
        return "adaswitch_" + self.name.replace("/", "_")

    @property
    def series(self) -> str:
        """What Prometheus stores; of a histogram what its quantiles are made of."""
        suffix = {"gauge": "", "counter": "_total", "histogram": "_bucket"}[self.kind]
        return f"ray_{self.exported_name}{suffix}"


def _gauges(*rows: tuple[str, str, str]) -> list[Metric]:
    return [Metric(name=name, kind="gauge", unit=unit, help=text) for name, unit, text in rows]


_POSITIONS = (1, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 4000)

STEP_METRICS = _gauges(
    ("rollout/sequences", "sequences", "sequences collected for the step"),
    ("rollout/tokens", "tokens", "new tokens in them, both models'"),
    ("rollout/tokens_per_s", "tokens/s", "new tokens over the seconds of the rollout"),
    ("rollout/wasted_tokens", "tokens", "student tokens that arrived past a switch and were dropped"),
    ("rollout/refused_sequences", "sequences", "sequences that were too old and were collected again"),
    ("rollout/seconds", "s", "collecting the step's sequences"),
    ("switch/rate", "share", "sequences in which the teacher took over"),
    ("switch/mean_position", "tokens", "mean position of the first switch"),
    ("switch/teacher_token_share", "share", "new tokens that the teacher wrote"),
    ("divergence/mean_nats", "nats", "mean divergence where the student proposed"),
    ("train/loss_nats", "nats", "weighted loss per token"),
    ("train/loss_student_tokens_nats", "nats", "unweighted loss over the student's tokens"),
    ("train/loss_teacher_tokens_nats", "nats", "unweighted loss over the teacher's tokens"),
    ("train/loss_dataset_tokens_nats", "nats", "unweighted loss over the tokens of given answers"),
    ("train/covered_mass", "share", "probability that the teacher's top k hold together"),
    ("train/grad_norm", "1", "gradient norm before clipping"),
    ("train/learning_rate", "1", "learning rate of the step"),
    ("train/staleness", "versions", "weight versions between a sequence's oldest proposal and the weights trained"),
    ("train/micro_batches", "batches", "micro-batches of the step, all ranks together"),
    ("train/seconds", "s", "the learner's step"),
    ("train/tokens_per_s", "tokens/s", "trained tokens over the seconds of the learner's step"),
    ("sync/seconds", "s", "sending, loading and probing new weights"),
    ("sync/probe_nats", "nats", "largest log-prob difference between trainer and engine after the sync"),
    ("sync/probe_p99_nats", "nats", "log-prob difference below which 99% of them are"),
    ("sync/probe_rms_nats", "nats", "root mean square of the log-prob differences"),
    ("sync/followed", "share", "change of the trainer's log-probs over the step that the engine's made, too"),
    ("sync/followed_output_layer", "share", "the same of what the output layer alone changed"),
    ("sync/weight_version", "version", "weights the student engines hold"),
)
EVALUATION_METRICS = _gauges(
    ("evaluation/accuracy", "share", "held-out prompts answered right"),
    ("evaluation/divergence_nats", "nats", "mean divergence to the teacher over the student's own text"),
    ("evaluation/tokens_per_sequence", "tokens", "mean length of what the student writes alone"),
    ("evaluation/prompts", "prompts", "held-out prompts"),
    ("evaluation/seconds", "s", "the evaluation"),
)
SWITCH_POSITION = Metric(
    name="switch/position",
    kind="histogram",
    unit="tokens",
    help="position of each switched sequence's first switch",
    buckets=_POSITIONS,
)
WRITTEN_TOKENS = Metric(
    name="engine/written_tokens",
    kind="counter",
    unit="tokens",
    help="tokens the engine has written",
    labels=("role",),
)
READ_POSITIONS = Metric(
    name="engine/read_positions",
    kind="counter",
    unit="positions",
    help="positions the engine has read and given log-probs for",
    labels=("role",),
)
RUNNING_REQUESTS = Metric(
    name="engine/running_requests",
    kind="gauge",
    unit="requests",
    help="unfinished requests, as many as the engine works on at once (max_num_seqs)",
    labels=("role",),
)
WAITING_REQUESTS = Metric(
    name="engine/waiting_requests",
    kind="gauge",
    unit="requests",
    help="unfinished requests beyond those, which wait their turn",
    labels=("role",),
)
FAULTS = Metric(
    name="run/faults",
    kind="counter",
    unit="faults",
    help="parts of the run that died, hung or failed, and were mended or ended it",
)
PROMPTS_SET_ASIDE = Metric(
    name="run/prompts_set_aside",
    kind="counter",
    unit="prompts",
    help="prompts that failed again and again, and that the run goes on without",
)
STEP = Metric(name="step", kind="gauge", unit="steps", help="the last step measured")

METRICS: Sequence[Metric] = (
    STEP,
    *STEP_METRICS,
    *EVALUATION_METRICS,
    SWITCH_POSITION,
    WRITTEN_TOKENS,
    READ_POSITIONS,
    RUNNING_REQUESTS,
    WAITING_REQUESTS,
    FAULTS,
    PROMPTS_SET_ASIDE,
)
