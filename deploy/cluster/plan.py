"""Which layout a run has on a cluster's GPUs, and whether it fits into memory. Pure: no Ray, no GPU, nothing started.

    make_plan(config, shapes, nodes) -> Plan      shown by `adaswitch config --plan`, and used to start a run

Chooses the layout and the weight-transfer backend. ``plan_memory`` computes the actors' memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from common.config import LAYOUTS, Layout, RunConfig
from common.errors import UserError
from common.weights import SyncBackend
from deploy.cluster.memory import dtype_bytes, shared_memory_gib
from deploy.cluster.model_shape import Shapes
from deploy.cluster.placement import PlacementPlan, place_actors
from deploy.cluster.plan_memory import Budget, BundleMemory, Role, plan_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    num_gpus: int
    gpu_gib: float | None  # of the smallest GPU; None if unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a run's actors are placed and how much memory they use."""

    layout: Layout | None  # None on CPUs
    why: str
    placement: PlacementPlan
    sync_backend: SyncBackend
    gpu_gib: float | None = None  # of the cluster's smallest GPU; all are treated as if they had this size
    bundles: tuple[BundleMemory, ...] = ()  # those with GPUs; empty if the GPUs' memory is unknown
    budgets: dict[Role, Budget] = field(default_factory=dict)  # for engines that share a GPU
    shared_memory_gib: float = 0.0  # in /dev/shm on the learner's node, for the weight transfer
    missing: str | None = None  # why the run does not fit, naming the key; None if it fits

    def __str__(self) -> str:
        return f"{self.layout or 'processors'} ({self.why}), weights by {self.sync_backend}"


def processor_plan(config: RunConfig, why: str, *, with_learner: bool = True) -> Plan:
    """A run without GPUs. Raises UserError if the sync backend needs GPUs."""
    if config.sync.backend in ("ipc", "nccl"):
        raise UserError(f"sync.backend must be host_memory or auto on CPUs ({why}), got {config.sync.backend}")
    placement = place_actors(config, None, with_learner=with_learner)
    return Plan(layout=None, why=why, placement=placement, sync_backend="host_memory")


def make_plan(config: RunConfig, shapes: Shapes, nodes: Sequence[Node], *, with_learner: bool = True) -> Plan:
    """The requested layout, or for auto the first one that fits. ``missing`` says why it does not fit.

    Raises UserError if neither the settings nor the models give a context length.
    """
    found = _found(nodes)
    if config.placement.layout != "auto":
        plan = _with_layout(config, config.placement.layout, shapes, nodes, with_learner=with_learner)
        missing = None if plan.missing is None else f"placement.layout: {plan.missing}; there is {found}"
        return replace(plan, why=f"set by placement.layout; {found}", missing=missing)
    refused: list[str] = []
    plans: list[Plan] = []
    for layout in LAYOUTS:
        if (conflict := config.layout_conflict(layout)) is not None:
            refused.append(conflict)
            continue
        plan = _with_layout(config, layout, shapes, nodes, with_learner=with_learner)
        if plan.missing is None:
            return replace(plan, why="; ".join([found, *refused]))
        plans.append(plan)
        refused.append(plan.missing)
    assert plans, "no valid settings conflict with every layout"
    # Show the layout that needs the least memory per GPU, among those for which there are enough GPUs.
    enough = [plan for plan in plans if _too_few(plan.placement, nodes, config.placement.strategy) is None]
    shown = enough[0] if enough else plans[-1]
    return replace(shown, why=found, missing=f"placement.layout: no layout fits {found}: {'; '.join(refused)}")


def check_fits(plan: Plan) -> None:
    """Raise a one-line UserError for a plan that does not fit."""
    if plan.missing is not None:
        raise UserError(plan.missing)


def _with_layout(
    config: RunConfig, layout: Layout, shapes: Shapes, nodes: Sequence[Node], *, with_learner: bool
) -> Plan:
    """A plan with one layout, whether it fits or not. ``why`` is set later."""
    placement = place_actors(config, layout, with_learner=with_learner)
    backend = _sync_backend(config, layout)
    too_few = _too_few(placement, nodes, config.placement.strategy)
    plan = Plan(
        layout=layout,
        why="",
        placement=placement,
        sync_backend=backend,
        shared_memory_gib=(
            shared_memory_gib(shapes.student, engine_bytes=dtype_bytes(config.engines.student))
            if backend == "host_memory" and with_learner
            else 0.0
        ),
        missing=None if too_few is None else f"{layout} needs {too_few}",
    )
    sizes = [node.gpu_gib for node in nodes if node.num_gpus]
    known = [size for size in sizes if size is not None]
    if not known or len(known) < len(sizes):
        if layout == "spread":  # each engine measures its own GPU
            return plan
        return replace(plan, missing=plan.missing or f"{layout} divides a GPU whose memory nvidia-smi does not report")
    bundles, budgets = plan_memory(config, shapes, placement, backend, gpu_gib=min(known))
    too_small = [f"{layout} needs {bundle.shortage(min(known))}" for bundle in bundles if bundle.shortage(min(known))]
    return replace(
        plan, gpu_gib=min(known), bundles=bundles, budgets=budgets, missing=plan.missing or next(iter(too_small), None)
    )


def _sync_backend(config: RunConfig, layout: Layout) -> SyncBackend:
    """NCCL can't connect two processes on one GPU. IPC could, but has not been tested; host memory needs no GPU."""
    if config.sync.backend != "auto":
        return config.sync.backend
    return "nccl" if layout == "spread" else "host_memory"


def _found(nodes: Sequence[Node]) -> str:
    """The cluster's GPUs, for example ``2 GPUs of 24.0 GiB``, ``16 GPUs of 80.0 GiB on 2 nodes``."""
    with_gpus = [node for node in nodes if node.num_gpus]
    number = sum(node.num_gpus for node in with_gpus)
    if not number:
        return "no GPU"
    sizes = sorted({node.gpu_gib for node in with_gpus if node.gpu_gib is not None})
    memory = f" of {' to '.join(f'{size:.1f}' for size in dict.fromkeys((sizes[0], sizes[-1])))} GiB" if sizes else ""
    where = f" on {len(with_gpus)} nodes" if len(with_gpus) > 1 else ""
    return f"{number} GPU{'s' if number > 1 else ''}{memory}{where}"


def _too_few(placement: PlacementPlan, nodes: Sequence[Node], strategy: str) -> str | None:
    """The GPUs that are needed, if there are too few or too few on one node; otherwise None."""
    bundles = sorted((int(bundle.get("GPU", 0)) for bundle in placement.bundles), reverse=True)
    free = sorted((node.num_gpus for node in nodes), reverse=True)
    if sum(bundles) > sum(free):
        return _gpus(sum(bundles))
    if strategy == "STRICT_PACK":
        return None if sum(bundles) <= free[0] else f"{_gpus(sum(bundles))} on one node (STRICT_PACK)"
    if strategy == "STRICT_SPREAD":
        fits = len(bundles) <= len(free) and all(map(int.__le__, bundles, free))
        return None if fits else f"{len(bundles)} nodes with {bundles} GPUs (STRICT_SPREAD)"
    for bundle in bundles:
        free.sort(reverse=True)
        if bundle > free[0]:
            return f"{_gpus(bundle)} on one node for one of its bundles of {bundles} GPUs"
        free[0] -= bundle
    return None


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' if number > 1 else ''}"
