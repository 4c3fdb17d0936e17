"""Prints a plan to a terminal or a pipe: ``adaswitch config FILE --plan``."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from common.config import RunConfig
from common.errors import UserError
from deploy.cluster.gpus import gpus_of_this_machine, smallest_gib
from deploy.cluster.model_shape import ModelShape, Shapes, read_shapes
from deploy.cluster.plan import Node, Plan, check_fits, make_plan
from deploy.cluster.plan_memory import ActorMemory, context_tokens
from deploy.reporting.terminal import make_console


def print_plan(config: RunConfig, file: Path, *, num_nodes: int, gpus: int | None, gpu_gib: float | None) -> None:
    """Plan a run for the given GPUs, or for those of this machine, and print it.

    Raises UserError, after the table, if the run does not fit.
    """
    if gpus is not None:
        nodes = [Node(num_gpus=gpus, gpu_gib=gpu_gib)] * num_nodes
    elif found := gpus_of_this_machine():
        nodes = [Node(num_gpus=len(found), gpu_gib=smallest_gib(found))]
    else:
        raise UserError("--plan: nvidia-smi finds no GPU here; give the GPUs to plan for: --gpus 2 --gpu-gib 24")
    shapes = read_shapes(config, beside=file)
    plan = make_plan(config, shapes, nodes)
    show_plan(plan, config, shapes, nodes)
    check_fits(plan)


def show_plan(
    plan: Plan, config: RunConfig, shapes: Shapes, nodes: Sequence[Node], console: Console | None = None
) -> None:
    """The layout and the reason for it, each bundle's actors and their memory, and what else the run needs."""
    console = console or make_console()
    context = context_tokens(config, shapes)
    lines = [
        f"placement: {plan}",
        _model("student", config.models.student, shapes.student),
        _model("teacher", config.models.teacher, shapes.teacher),
        f"context: {context:,} tokens",
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
    console.print(_table(plan, context))
    for line in _notes(plan, nodes):
        console.print(line, markup=False, soft_wrap=not console.is_terminal)


def _model(role: str, name: str, shape: ModelShape) -> str:
    source = "" if shape.source == name else f", from {shape.source}"
    return f"{role}: {name}, {shape.num_parameters / 1e9:.2f} B parameters{source}"


def _table(plan: Plan, context: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("bundle", "GPUs", "actor", "on each of its GPUs"):
        table.add_column(column)
    table.add_column("GiB", justify="right")
    for bundle in plan.bundles:
        is_forecast = len(bundle.actors) == 1  # vLLM sizes the cache of an engine that does not share its GPU
        rows = [row for actor in bundle.actors for row in _actor_rows(actor, context, is_forecast=is_forecast)]
        if bundle.kept_free_gib:
            rows.append(("", "kept free *", f"{bundle.kept_free_gib:.2f}"))
        whole = f"{bundle.gib:.2f} of {plan.gpu_gib or 0.0:.1f}"
        rows.append(("", "total", whole))
        for number, row in enumerate(rows):
            ends = number == len(rows) - 1
            place = (str(bundle.number), str(bundle.num_gpus)) if number == 0 else ("", "")
            table.add_row(*place, *row, end_section=ends)
    return table


def _actor_rows(actor: ActorMemory, context: int, *, is_forecast: bool) -> list[tuple[str, str, str]]:
    """(actor, part, GiB) for each part. Only the first row has the actor's name."""
    parts = [(f"{part.name}{' *' * part.is_estimate}", part.gib) for part in actor.parts]
    if actor.cache is not None:
        cache = actor.cache
        room = f"{cache.num_sequences} of {cache.max_num_seqs} sequences of {context:,} tokens"
        parts.append((f"KV cache: {room}{' *' * is_forecast}", cache.gib))
    return [(actor.name if number == 0 else "", name, f"{gib:.2f}") for number, (name, gib) in enumerate(parts)]


def _notes(plan: Plan, nodes: Sequence[Node]) -> list[str]:
    notes = ["* an estimate; none of these has been compared with a GPU yet"]
    if plan.shared_memory_gib:
        notes.append(f"/dev/shm: {plan.shared_memory_gib:.1f} GiB, for weights being sent to the student engine")
    num_gpus = sum(node.num_gpus for node in nodes)
    used = int(sum(bundle.get("GPU", 0) for bundle in plan.placement.bundles))
    if plan.missing is None:
        idle = num_gpus - used
        more = f"; {idle} stay idle: raise engines.*.num_replicas or trainer.num_ranks" if idle else ""
        notes.append(f"it fits: {used} of {num_gpus} GPUs{more}")
    return notes
