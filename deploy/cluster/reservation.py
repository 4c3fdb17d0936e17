"""How a run joins Ray, and what it reserves there. Knows what a run needs (``placement``), not who sits there."""

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
from deploy.cluster.placement import SeatingPlan
from deploy.cluster.plan import Node
from deploy.cluster.shortage import describe_shortage
from deploy.cluster.sigterm import end_in_order_on_sigterm

logger = logging.getLogger(__name__)

_SAY_WHAT_IS_MISSING_EVERY_S = 10.0
_ANSWERS_WITHIN_S = 10.0
_NODE_ANSWERS_WITHIN_S = 60.0  # a worker process has to start there


def connect(address: str | None) -> None:
    """Join the cluster that is named, or start one on this machine. From then on SIGTERM cancels this task.

    Raises UserError where no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other process on the machine starve engines
    named = address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        try:
            _refuse_silent(named)
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
                f"{key}: can't join a Ray cluster at {named!r}: {reason}; expected a running head's host:port, or auto"
            ) from error
    # Ray has taken SIGTERM over, and would end this process at once: no actor could give anything back.
    end_in_order_on_sigterm()


def _refuse_silent(named: str | None) -> None:
    """Raise OSError where nobody listens: Ray would go on trying for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d+)", named or "")
    if match is not None:
        socket.create_connection((match[1], int(match[2])), timeout=_ANSWERS_WITHIN_S).close()


def num_gpus() -> int:
    """Of the whole cluster, used or not."""
    return int(ray.cluster_resources().get("GPU", 0))


def gpu_nodes() -> tuple[Node, ...]:
    """The cluster's machines that have GPUs, each with the memory of its smallest, which is asked for there."""
    counts = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]}
    ask = ray.remote(num_cpus=0, max_retries=0)(gpus_of_this_machine)
    asked = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node, number in counts.items()
        if number
    }
    return tuple(Node(num_gpus=counts[node], gpu_gib=smallest_gib(_answer(gpus))) for node, gpus in asked.items())


def _answer(gpus: "ray.ObjectRef[list[Gpu]]") -> list[Gpu]:
    """What a node says of its GPUs; nothing where it does not answer."""
    try:
        answer: list[Gpu] = ray.get(gpus, timeout=_NODE_ANSWERS_WITHIN_S)
    except RayError as error:
        logger.warning("a node does not say how large its GPUs are: %s", one_line(error))
        return []
    return answer


async def reserve(plan: SeatingPlan, *, strategy: str, timeout_s: float) -> PlacementGroup:
    """Waits for the run's bundles and says now and then what is missing. Stops when they are there or time is up: then
    raises UserError.
    """
    group = placement_group(plan.bundles, strategy=strategy)
    ready, started_s = asyncio.ensure_future(group.ready()), time.monotonic()
    try:
        while True:
            left_s = timeout_s - (time.monotonic() - started_s)
            done, _ = await asyncio.wait([ready], timeout=max(0.0, min(_SAY_WHAT_IS_MISSING_EVERY_S, left_s)))
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


def shortage_of(group: PlacementGroup, plan: SeatingPlan, strategy: str) -> str | None:
    """What keeps Ray from finding another node for bundles whose node is lost. None where all have one."""
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
