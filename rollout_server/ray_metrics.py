"""Measurements to Ray's metrics agent, where Prometheus fetches them. Knows how they travel, not what they mean.

What is measured is in ``common.metrics``. A process that is on no cluster, or on one without an agent, loses nothing
but the export.
"""

from collections.abc import Mapping, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from common.metrics import Metric


class Exported:
    """Some metrics under fixed labels. To be made once in a process for each set of labels."""

    def __init__(self, metrics: Sequence[Metric], labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._metrics = {metric.name: _make(metric) for metric in metrics}

    def add(self, metric: Metric, value: float) -> None:
        """A gauge takes the value, a counter grows by it, a histogram counts it."""
        exported = self._metrics[metric.name]
        match exported:
            case Gauge():
                exported.set(value, tags=self._labels)
            case Counter():
                if value > 0:  # Ray refuses 0
                    exported.inc(value, tags=self._labels)
            case Histogram():
                exported.observe(value, tags=self._labels)


def _make(metric: Metric) -> Gauge | Counter | Histogram:
    name, text, tags = metric.exported_name, f"{metric.help} ({metric.unit})", ("run", *metric.labels)
    match metric.kind:
        case "gauge":
            return Gauge(name, description=text, tag_keys=tags)
        case "counter":
            return Counter(name, description=text, tag_keys=tags)
        case "histogram":
            return Histogram(name, description=text, boundaries=list(metric.buckets), tag_keys=tags)
