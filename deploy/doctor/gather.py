"""Gathers facts about this machine. Runs its queries concurrently, each with a time-out. Does not evaluate them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.config import RunConfig
from deploy.cluster.gpus import gpus_of_this_machine
from deploy.doctor.facts import (
    Facts,
    Hub,
    Link,
    Node,
    RayState,
    Wanted,
    needs_hub,
    parse_links,
)
from deploy.doctor.installed import flash_attention, installed_packages
from deploy.doctor.machine import compilers, printed, processor, space, toolkit
from deploy.doctor.sources import hub_home
from deploy.lock.driver import read_driver

_HUB_TIMEOUT_S = 8.0  # the request itself times out after 5 s, but name resolution may hang
_TORCH_TIMEOUT_S = 60.0
_RAY_TIMEOUT_S = 20.0


def gather(wanted: Wanted | None, config: RunConfig | None) -> Facts:
    """This machine's facts. ``config`` is the configuration behind ``wanted``, if it is valid."""
    packages = installed_packages()
    torch_build = next(package.build for package in packages if package.name == "torch")
    address = (config.placement.address if config else None) or os.environ.get("RAY_ADDRESS")
    with ThreadPoolExecutor() as threads:
        driver = threads.submit(read_driver)
        gpus = threads.submit(gpus_of_this_machine)
        links = threads.submit(_links)
        torch = threads.submit(_probe, ["torch"], _TORCH_TIMEOUT_S) if torch_build == "cuda" else None
        ray = threads.submit(_probe, ["ray", address or "-"], _RAY_TIMEOUT_S)
        hub = threads.submit(_probe, ["hub"], _HUB_TIMEOUT_S) if needs_hub(wanted) and not _is_offline() else None
    has_gpus = bool(gpus.result())
    torch_answer = torch.result() if torch and (has_gpus or driver.result()) else {}
    return Facts(
        python=sys.version_info[:3],
        packages=packages,
        flash_attention=flash_attention(),
        driver=driver.result(),
        gpus=tuple(gpus.result()),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        links=links.result(),
        torch_gpus=torch_answer.get("num_gpus"),
        torch_error=torch_answer.get("error"),
        processor=processor(),
        compilers=compilers(),
        toolkit=toolkit(),
        shm=space("/dev/shm"),
        run_space=space(wanted.run_dir if wanted else "runs"),
        hub_space=space(str(hub_home())),
        ray=_ray_state(address, ray),
        hub=Hub(is_offline=_is_offline(), has_token=_has_hub_token(), error=hub.result().get("error") if hub else None),
        wanted=wanted,
    )


def _probe(arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "deploy.doctor.probe", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:g} s"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return answer


def _links() -> tuple[Link, ...]:
    return parse_links(printed("nvidia-smi", "topo", "-m"))


def _ray_state(address: str | None, answer: Future[dict[str, Any]]) -> RayState:
    found = answer.result()
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    cluster_file = Path("/tmp/ray/ray_current_cluster")
    return RayState(
        address=address,
        nodes=tuple(Node(num_gpus=num_gpus, gpu_gib=gpu_gib) for num_gpus, gpu_gib in found.get("nodes", [])),
        error=found.get("error"),
        local_cluster=cluster_file.read_text().strip() if cluster_file.exists() else None,
        asks_for_token=os.environ.get("RAY_AUTH_MODE") == "token",
        has_token="RAY_AUTH_TOKEN" in os.environ or token_file.exists(),
    )


def _is_offline() -> bool:
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in _OFFLINE)


def _has_hub_token() -> bool:
    return bool(os.environ.get("HF_TOKEN")) or (hub_home() / "token").exists()


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
