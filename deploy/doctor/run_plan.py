"""Describes the plan of a configured run on this machine or its cluster.

Reads the models' ``config.json``, from the hub if they are not local; starts nothing. Imports torch and transformers to
count the parameters, so it is used only if both are installed.
"""

from pathlib import Path
from typing import Literal

from common.config import RunConfig
from common.errors import UserError, one_line
from deploy.cluster.builds import Builds, choose_device
from deploy.cluster.gpus import smallest_gib
from deploy.cluster.memory import adapter_parameters, sent_parameters, shared_memory_gib
from deploy.cluster.model_shape import ModelShape, Shapes, read_shapes
from deploy.cluster.plan import Node, Plan, make_plan, processor_plan
from deploy.cluster.plan_memory import BundleMemory
from deploy.doctor.facts import GIB, Facts, PlanFacts

_HUB_BYTES = 2
"""Bytes per parameter of most stored models."""


def plan_facts_of(config: RunConfig, file: Path, facts: Facts) -> PlanFacts:
    """The plan for these facts. If there is none, ``missing`` says why."""
    nodes = nodes_of(facts)
    try:
        shapes = read_shapes(config, beside=file)
        device = choose_device(
            config.placement.use_gpus, num_gpus=sum(node.num_gpus for node in nodes), builds=_builds(facts)
        )
        plan = make_plan(config, shapes, nodes) if device.use_gpus else processor_plan(config, device.why)
    except UserError as error:
        return PlanFacts(missing=one_line(error))
    return describe(plan, config, shapes, facts)


def nodes_of(facts: Facts) -> list[Node]:
    """The configured cluster's nodes, or this machine as one node."""
    if facts.ray.address:
        return [Node(num_gpus=node.num_gpus, gpu_gib=node.gpu_gib) for node in facts.ray.nodes if node.num_gpus]
    num_gpus = len(facts.gpus) if facts.torch_gpus is None else min(facts.torch_gpus, len(facts.gpus))
    return [Node(num_gpus=num_gpus, gpu_gib=smallest_gib(facts.gpus))] if num_gpus else []


def describe(plan: Plan, config: RunConfig, shapes: Shapes, facts: Facts) -> PlanFacts:
    """The plan in words, and the memory and disk space that its run needs besides GPUs."""
    shm_gib = plan.shared_memory_gib
    if plan.layout is None:
        shm_gib = shared_memory_gib(shapes.student, engine_bytes=_processor_bytes(config, facts))
    to_fetch = {source.key for source in facts.wanted.sources if source.place == "hub"} if facts.wanted else set()
    by_key = {"models.student": shapes.student, "models.teacher": shapes.teacher}
    return PlanFacts(
        summary=str(plan),
        bundles=tuple(_line(bundle, plan.gpu_gib or 0.0) for bundle in plan.bundles),
        missing=plan.missing,
        shm_bytes=int(shm_gib * GIB),
        checkpoints_bytes=_checkpoint_bytes(config, shapes.student) * _num_checkpoints(config),
        download_bytes=sum(_HUB_BYTES * shape.num_parameters for key, shape in by_key.items() if key in to_fetch),
    )


def _line(bundle: BundleMemory, gpu_gib: float) -> str:
    """For example ``1 GPU: student engine 9.9 + learner 11.6 + kept free 4.0 = 25.5 of 79.6 GiB``."""
    held = [f"{actor.name} {actor.gib:.1f}" for actor in bundle.actors]
    held += [f"kept free {bundle.kept_free_gib:.1f}"] if bundle.kept_free_gib else []
    number, each = ("1 GPU", "") if bundle.num_gpus == 1 else (f"{bundle.num_gpus} GPUs", " each")
    return f"{number}: {' + '.join(held)} = {bundle.gib:.1f} of {gpu_gib:.1f} GiB{each}"


def _builds(facts: Facts) -> Builds:
    def build(package: str) -> Literal["CPU", "CUDA"]:
        return "CUDA" if facts.package(package).build == "cuda" else "CPU"

    return Builds(torch=build("torch"), vllm=build("vllm"))


def _processor_bytes(config: RunConfig, facts: Facts) -> int:
    """Bytes per number of a student engine on CPUs."""
    wanted = config.engines.student.dtype
    if wanted == "auto":
        return 2 if "avx512_bf16" in facts.processor.flags else 4
    return 4 if wanted == "float32" else 2


def _checkpoint_bytes(config: RunConfig, student: ModelShape) -> int:
    """Float32 weights and two moments of the trained parameters, and the student for serving (docs/sizing.md)."""
    lora = config.trainer.lora
    trained = student.num_parameters if lora is None else adapter_parameters(student, config.trainer)
    return 12 * trained + 4 * sent_parameters(student)


def _num_checkpoints(config: RunConfig) -> int:
    """The newest ones, the best one, and the one being written."""
    kept = config.checkpoints
    return 0 if kept.every_steps is None else kept.keep_last + int(kept.keep_best) + 1
