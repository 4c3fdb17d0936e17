"""The Grafana dashboard as code: which panel shows which metrics of ``common.metrics``.

    python -m deploy.monitoring.dashboard

writes ``grafana/dashboards/adaswitch.json``. A test compares that file with this module, and every expression with the
table of metrics.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.metrics import METRICS

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "adaswitch.json"
_SERIES = {metric.name: metric.series for metric in METRICS}
_WIDTH, _HEIGHT = 8, 8  # of a panel; a row has 24 columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart: expressions with ``{metric name}`` as a placeholder for the series, and the label of each line."""

    title: str
    lines: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: str = "timeseries"
    description: str = ""


def _of(*names: str, what: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Gauges by run, each with its own label."""
    return [(f"{{{name}}}", f"{{{{run}}}} {label}".strip()) for name, label in zip(names, what or ("",), strict=True)]


PANELS: Sequence[Panel] = (
    Panel(title="Held-out accuracy", unit="percentunit", lines=_of("evaluation/accuracy")),
    Panel(title="Loss per token, nats", lines=_of("train/loss_nats")),
    Panel(
        title="Switching",
        unit="percentunit",
        description="Share of sequences in which the teacher took over, and its share of all new tokens.",
        lines=_of("switch/rate", "switch/teacher_token_share", what=("switch rate", "teacher's tokens")),
    ),
    Panel(
        title="Position of the first switch",
        kind="heatmap",
        description="Switched sequences by position, over time.",
        lines=[("sum by (le) (increase({switch/position}[$__rate_interval]))", "{{le}}")],
    ),
    Panel(title="Mean divergence, nats", lines=_of("divergence/mean_nats")),
    Panel(
        title="Probability covered by the teacher's list",
        unit="percentunit",
        lines=_of("train/covered_mass"),
    ),
    Panel(
        title="Engine tokens per second",
        description="Generated and scored by all engines of a role.",
        lines=[
            ("sum by (run, role) (rate({engine/written_tokens}[$__rate_interval]))", "{{run}} {{role}} generated"),
            ("sum by (run, role) (rate({engine/read_positions}[$__rate_interval]))", "{{run}} {{role}} scored"),
        ],
    ),
    Panel(
        title="Requests in the engines",
        description="Waiting requests exceed engines.*.max_num_seqs.",
        lines=[
            ("sum by (run, role) ({engine/running_requests})", "{{run}} {{role}} running"),
            ("sum by (run, role) ({engine/waiting_requests})", "{{run}} {{role}} waiting"),
        ],
    ),
    Panel(
        title="Student tokens discarded at switches",
        unit="percentunit",
        description="Share of all new tokens of the step.",
        lines=[("{rollout/wasted_tokens} / {rollout/tokens}", "{{run}}")],
    ),
    Panel(
        title="Duration of a step, seconds",
        unit="s",
        lines=_of("rollout/seconds", "train/seconds", "sync/seconds", what=("rollout", "train", "sync")),
    ),
    Panel(title="Rollout, tokens per second", lines=_of("rollout/tokens_per_s")),
    Panel(
        title="Staleness, weight versions",
        description="0 is strictly on-policy.",
        lines=_of("train/staleness"),
    ),
    Panel(
        title="Probe after the weight sync, nats",
        lines=_of(
            "sync/probe_nats", "sync/probe_p99_nats", "sync/probe_rms_nats", what=("largest", "99% within", "rms")
        ),
    ),
    Panel(
        title="Share of the step in the engines",
        description="Share of the step's change in the learner's log-probs that the engines show; 1 after a good sync.",
        lines=_of("sync/followed", "sync/followed_output_layer", what=("all", "output layer")),
    ),
    Panel(title="Gradient norm", lines=_of("train/grad_norm")),
    Panel(title="Step and weight version", lines=_of("step", "sync/weight_version", what=("step", "weights"))),
    Panel(
        title="Faults and quarantined prompts",
        description="Processes that died, hung or failed; prompts that the run skips.",
        lines=_of("run/faults", "run/prompts_set_aside", what=("faults", "quarantined")),
    ),
)


def expression(template: str) -> str:
    """The expression with series in place of metric names, limited to the selected runs."""
    for name, series in _SERIES.items():
        template = template.replace(f"{{{name}}}", f'{series}{{run=~"$run"}}')
    return template


def dashboard() -> dict[str, Any]:
    """The JSON model that Grafana provisions."""
    source = {"type": "prometheus", "uid": "prometheus"}
    panels = [_panel(number, panel, source) for number, panel in enumerate(PANELS)]
    run = {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": source,
        "query": {"query": f"label_values({_SERIES['step']}, run)", "refId": "run"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": "adaswitch",
        "title": "AdaSwitch training",
        "tags": ["adaswitch"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [run]},
        "panels": panels,
    }


def _panel(number: int, panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    column, row = number % 3, number // 3
    is_heatmap = panel.kind == "heatmap"
    return {
        "id": number + 1,
        "title": panel.title,
        "description": panel.description,
        "type": panel.kind,
        "datasource": source,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"calculate": False, "yAxis": {"unit": "short"}} if is_heatmap else {"tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": source,
                "expr": expression(template),
                "legendFormat": legend,
                "format": "heatmap" if is_heatmap else "time_series",
            }
            for place, (template, legend) in enumerate(panel.lines)
        ],
    }


def main() -> None:
    DASHBOARD.write_text(json.dumps(dashboard(), indent=2) + "\n")


if __name__ == "__main__":
    main()
