"""Exports measurements to Ray's metrics agent, which Prometheus scrapes. Knows the transport, not the meaning.

``common.metrics`` defines what is measured. In a process without a cluster, or on a cluster without an agent, only the
export is missing.
"""

from collections.abc import Mapping, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from common.metrics import Metric


class Exported:
    """Some metrics with fixed labels. Create it once per process and label set."""

    def __init__(self, metrics: Sequence[Metric], labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._metrics = {metric.name: _make(metric) for metric in metrics}

    def add(self, metric: Metric, value: float) -> None:
        """Set a gauge, increment a counter by ``value``, or add ``value`` to a histogram."""
        exported = self._metrics[metric.name]
        match exported:
            case Gauge():
                exported.set(value, tags=self._labels)
            case Counter():
                if value > 0:  # Ray rejects 0
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
