"""Exports a run's steps and evaluations as Ray metrics for Prometheus: a tracker like TensorBoard."""

from common.metrics import EVALUATION_METRICS, STEP, STEP_METRICS
from deploy.reporting.tracker import Metrics, Outcome
from rollout_server.ray_metrics import Exported

_BY_NAME = {metric.name: metric for metric in (*STEP_METRICS, *EVALUATION_METRICS)}


class RayTracker:
    """Each measurement is a gauge that holds its value until the next one. Unknown measurements are ignored."""

    def __init__(self, run: str) -> None:
        self._exported = Exported([STEP, *_BY_NAME.values()], {"run": run})

    def log(self, step: int, metrics: Metrics) -> None:
        self._exported.add(STEP, step)
        for name, value in metrics.items():
            if name in _BY_NAME:
                self._exported.add(_BY_NAME[name], value)

    def close(self, outcome: Outcome) -> None:
        """Ray drops the gauges when the process ends."""
