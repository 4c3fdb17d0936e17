"""Runs spread over Ray nodes on this machine: each actor on one of its own, and a run that loses a node half-way."""

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from tests.support.faulty_runs import PLAYED, faults_of, going_on, summary_of, trained, until_step, write_config
from tests.support.ray_heads import DEMO, SHORT, START_TIMEOUT_S, Head, joined, started_head, wait_for

RUN_TIMEOUT_S = 240.0
SEATS = ["EngineActor", "EngineActor", "LearnerActor", "RolloutActor"]

pytestmark = pytest.mark.slow


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
    assert not four_nodes.listed("placement_groups", "CREATED")


def has_nodes(head: Head, num_nodes: int) -> bool:
    return len(head.listed("nodes", "ALIVE")) == num_nodes


def seats_of(head: Head) -> list[tuple[str, str]]:
    """(role, node id) of a run's actors."""
    actors = head.listed("actors", "ALIVE")
    return [(actor["class_name"], actor["node_id"]) for actor in actors if actor["class_name"] in SEATS]


@pytest.fixture
def three_nodes() -> Iterator[Cluster]:
    """Besides a head that has no room for actors."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 10}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick},
    )
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
        with joined(cluster.address):
            yield cluster
    finally:
        cluster.shutdown()


async def test_a_run_that_loses_the_teacher_s_node_finishes_on_the_others(three_nodes: Cluster, tmp_path: Path) -> None:
    settings = ["placement.strategy=SPREAD", f"placement.address={three_nodes.address}"]
    config = write_config(tmp_path / "run", num_steps=8)
    async with going_on(config, *settings, actor_classes=PLAYED) as running:
        await until_step(tmp_path / "run", 3, running)
        lost = node_of_teacher()
        (node,) = [node for node in three_nodes.worker_nodes if node.node_id == lost]
        await asyncio.to_thread(three_nodes.remove_node, node, allow_graceful=False)
        summary = await summary_of(running)
    assert (summary["steps"], summary["sequences"]) == (8, 8 * 4)
    assert node_of_teacher() is None, "the run gives back what it had"
    assert "teacher engine" in {fault["who"] for fault in faults_of(tmp_path / "run")}
    counts = trained(tmp_path / "run")
    assert (len(counts), set(counts.values())) == (8 * 4, {1})


def node_of_teacher() -> str | None:
    """The node of the run's second bundle. None where no run has any."""
    tables: list[dict[str, Any]] = list(placement_group_table().values())
    live = [table["bundles_to_node_id"][1] for table in tables if table["state"] == "CREATED"]
    return live[0] if live else None
