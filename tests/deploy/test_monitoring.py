"""One table of metrics: the page that documents it, the dashboard, and what a real run measures agree with it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from common.metrics import METRICS, STEP
from deploy.monitoring.dashboard import DASHBOARD, PANELS, dashboard
from tests.data.record_demo import DEMO_RUN

REPOSITORY = Path(__file__).parents[2]
MONITORING = REPOSITORY / "deploy" / "monitoring"
# What a run may measure beside the demo's: only where something was too old, or answers were given.
SELDOM = {"rollout/refused_sequences", "train/staleness", "train/loss_dataset_tokens_nats"}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_documented_as_the_table_has_it(metric) -> None:
    labels = ", ".join(f"`{label}`" for label in ("run", *metric.labels))
    line = f"| `{metric.series}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} |"
    assert line in (REPOSITORY / "docs" / "metrics.md").read_text().splitlines()


def test_nothing_else_is_documented_as_exported() -> None:
    documented = re.findall(r"^\| `(ray_\w+)` \|", (REPOSITORY / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert documented == [metric.series for metric in METRICS]


def test_what_a_real_run_measures_is_exported() -> None:
    lines = [json.loads(line) for line in (DEMO_RUN / "metrics.jsonl").read_text().splitlines()]
    measured = {name for line in lines for name in line} - {"time"}
    gauges = {metric.name for metric in METRICS if metric.kind == "gauge" and not metric.labels}
    assert measured <= gauges
    assert gauges - measured <= SELDOM


def test_names_and_series_are_unique_and_prometheus_takes_them() -> None:
    for names in ([metric.name for metric in METRICS], [metric.series for metric in METRICS]):
        assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", metric.series) for metric in METRICS)
    assert all((metric.kind == "histogram") == bool(metric.buckets) for metric in METRICS)


def test_the_dashboard_s_file_is_the_one_its_code_makes() -> None:
    assert json.loads(DASHBOARD.read_text()) == dashboard(), "run: python -m deploy.monitoring.dashboard"


def test_every_expression_asks_for_documented_series_of_the_chosen_runs() -> None:
    known = {metric.series for metric in METRICS}
    targets = [target for panel in dashboard()["panels"] for target in panel["targets"]]
    assert len(targets) >= len(PANELS)
    for target in targets:
        found = re.findall(r"(\w+)\{([^}]*)\}", target["expr"])
        assert found, target["expr"]
        assert {series for series, _ in found} <= known, target["expr"]
        assert {selector for _, selector in found} == {'run=~"$run"'}, target["expr"]
        assert target["expr"].count("(") == target["expr"].count(")")
    assert f"label_values({STEP.series}, run)" in json.dumps(dashboard()["templating"])


def test_the_dashboard_shows_what_was_promised() -> None:
    shown = " ".join(target["expr"] for panel in dashboard()["panels"] for target in panel["targets"])
    for name in (
        "switch/rate",
        "switch/position",
        "switch/teacher_token_share",
        "divergence/mean_nats",
        "train/covered_mass",
        "rollout/wasted_tokens",
        "engine/written_tokens",
        "engine/running_requests",
        "engine/waiting_requests",
        "train/staleness",
        "sync/seconds",
        "train/seconds",
    ):
        assert next(metric.series for metric in METRICS if metric.name == name) + "{" in shown, name


def test_panels_do_not_overlap() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard()["panels"]]
    assert len(places) == len(set(places))


def test_the_provisioning_names_the_source_the_panels_use() -> None:
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert [entry["uid"] for entry in source["datasources"]] == ["prometheus"]
    assert {panel["datasource"]["uid"] for panel in dashboard()["panels"]} == {"prometheus"}
    provider = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/adaswitch.yml").read_text())
    assert provider["providers"][0]["type"] == "file"


def test_prometheus_finds_the_cluster_through_ray_s_own_file() -> None:
    jobs = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    ray = next(job for job in jobs if job["job_name"] == "ray")
    assert ray["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
