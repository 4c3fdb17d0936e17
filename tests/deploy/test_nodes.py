"""A run spread over Ray nodes on this machine: student, teacher, rollouts and learner each on one of its own."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.deploy.ray_heads import DEMO, SHORT, START_TIMEOUT_S, Head, started_head, wait_for

RUN_TIMEOUT_S = 400.0
SEATS = ["EngineActor", "EngineActor", "LearnerActor", "RolloutActor"]


@pytest.fixture(scope="module")
def four_nodes() -> Iterator[Head]:
    with started_head() as head, ExitStack() as nodes:
        for num_nodes in range(2, 5):  # one by one, for nodes of one machine would take each other's ports
            nodes.enter_context(head.node(f"--address {head.gcs_address}"))
            wait_for(partial(has_nodes, head, num_nodes), f"node {num_nodes} to join", START_TIMEOUT_S)
        yield head


def test_student_teacher_rollouts_and_learner_work_together_from_four_nodes(four_nodes: Head, tmp_path: Path) -> None:
    settings = [*SHORT, f"run_dir={tmp_path / 'run'}", "placement.strategy=STRICT_SPREAD"]
    settings.append(f"placement.address={four_nodes.gcs_address}")
    command = [sys.executable, "-m", "deploy.cli", "train", DEMO]
    for setting in settings:
        command += ["--set", setting]
    run = four_nodes.run(command)
    seats: list[tuple[str, str]] = []

    def all_seated() -> bool:
        seats[:] = seats_of(four_nodes)
        return sorted(role for role, _ in seats) == SEATS or run.poll() is not None

    wait_for(all_seated, "the run's actors", RUN_TIMEOUT_S)
    log, _ = run.communicate(timeout=RUN_TIMEOUT_S)
    assert run.returncode == 0, log
    assert len({node for _, node in seats}) == len(SEATS), seats
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["max_probe_nats"] < 1e-3
    assert not four_nodes.listed("placement-groups", "CREATED")


def has_nodes(head: Head, num_nodes: int) -> bool:
    return len(head.listed("nodes", "ALIVE")) == num_nodes


def seats_of(head: Head) -> list[tuple[str, str]]:
    """(role, node id) of a run's actors."""
    actors = head.listed("actors", "ALIVE")
    return [(actor["class_name"], actor["node_id"]) for actor in actors if actor["class_name"] in SEATS]
