"""Connects a run to Ray and reserves its resources. Does not know which actor uses which bundle."""

import asyncio
import logging
import os
import re
import socket
import time

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.errors import UserError, one_line
from deploy.cluster.gpus import Gpu, gpus_of_this_machine, smallest_gib
from deploy.cluster.placement import PlacementPlan
from deploy.cluster.plan import Node
from deploy.cluster.shortage import describe_shortage
from deploy.cluster.sigterm import cancel_on_sigterm

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 10.0
_ANSWER_TIMEOUT_S = 10.0
_NODE_TIMEOUT_S = 60.0  # includes starting a worker process there


def connect(address: str | None) -> None:
    """Connect to the given cluster, or start one on this machine. After this, SIGTERM cancels the current task.

    Raises UserError if no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's default of 15 other processes can starve the engines
    named = address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        try:
            _check_reachable(named)
            ray.init(
                address=named or "local",
                log_to_driver=False,
                logging_level="ERROR",
                **({} if named else {"include_dashboard": False}),
            )
        except (OSError, ValueError, RuntimeError, RayError) as error:
            if named is None:
                raise
            key = "placement.address" if address else "RAY_ADDRESS"
            reason = one_line(error)
            raise UserError(
                f"{key}: can't connect to a Ray cluster at {named!r}: {reason}; expected a running head's host:port, "
                "or auto"
            ) from error
    # Ray's SIGTERM handler would exit at once, before the actors have released their resources.
    cancel_on_sigterm()


def _check_reachable(named: str | None) -> None:
    """Raise OSError if nothing listens at the address. Ray would retry for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d+)", named or "")
    if match is not None:
        socket.create_connection((match[1], int(match[2])), timeout=_ANSWER_TIMEOUT_S).close()


def num_gpus() -> int:
    """Number of GPUs in the cluster, used or not."""
    return int(ray.cluster_resources().get("GPU", 0))


def gpu_nodes() -> tuple[Node, ...]:
    """The cluster's nodes with GPUs, each with the memory of its smallest GPU, which is queried on the node."""
    counts = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]}
    ask = ray.remote(num_cpus=0, max_retries=0)(gpus_of_this_machine)
    asked = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node, number in counts.items()
        if number
    }
    return tuple(Node(num_gpus=counts[node], gpu_gib=smallest_gib(_answer(gpus))) for node, gpus in asked.items())


def _answer(gpus: "ray.ObjectRef[list[Gpu]]") -> list[Gpu]:
    """A node's GPUs, or an empty list if it does not answer."""
    try:
        answer: list[Gpu] = ray.get(gpus, timeout=_NODE_TIMEOUT_S)
    except RayError as error:
        logger.warning("a node does not report its GPU memory: %s", one_line(error))
        return []
    return answer


async def reserve(plan: PlacementPlan, *, strategy: str, timeout_s: float) -> PlacementGroup:
    """Wait for the run's bundles, and log from time to time what is missing. Raises UserError after ``timeout_s``."""
    group = placement_group(plan.bundles, strategy=strategy)
    ready, started_s = asyncio.ensure_future(group.ready()), time.monotonic()
    try:
        while True:
            left_s = timeout_s - (time.monotonic() - started_s)
            done, _ = await asyncio.wait([ready], timeout=max(0.0, min(_REPORT_EVERY_S, left_s)))
            if done:
                ready.result()
                return group
            missing = describe_shortage(
                plan.bundles, strategy=strategy, nodes=_nodes(), free=_of_interest(ray.available_resources())
            )
            waited_s = time.monotonic() - started_s
            if waited_s >= timeout_s:
                raise UserError(
                    f"placement: waited {timeout_s:g} s for the cluster's resources: {missing}; add nodes, wait for "
                    "other runs to end, or raise placement.timeout_s"
                )
            logger.info("waiting for resources, %.0f of %g s: %s", waited_s, timeout_s, missing)
    except BaseException:
        ready.cancel()
        remove_placement_group(group)
        raise


def shortage_of(group: PlacementGroup, plan: PlacementPlan, strategy: str) -> str | None:
    """Why Ray can't find another node for bundles whose node is lost. None if all bundles have a node."""
    placed = placement_group_table(group)["bundles_to_node_id"]
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    lost = [bundle for number, bundle in enumerate(plan.bundles) if placed.get(number) not in alive]
    if not lost:
        return None
    return describe_shortage(lost, strategy=strategy, nodes=_nodes(), free=_of_interest(ray.available_resources()))


def _nodes() -> list[dict[str, float]]:
    return [_of_interest(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _of_interest(resources: dict[str, float]) -> dict[str, float]:
    return {name: resources[name] for name in ("CPU", "GPU") if name in resources}
