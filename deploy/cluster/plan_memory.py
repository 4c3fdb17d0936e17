"""GPU memory of each actor of a run under one layout. Pure.

An engine with its own GPUs lets vLLM size the KV cache, so its size here is a forecast. For engines that share a GPU
the cache size is set here, so that it does not depend on the start order or on the memory in use at that moment. The
remaining memory is divided in proportion to what each engine could use: ``max_num_seqs`` full contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.config import OWN_GPU_SHARE, EngineSettings, RunConfig
from common.errors import UserError
from common.weights import SyncBackend
from deploy.cluster.memory import (
    Part,
    cache_gib_per_sequence,
    dtype_bytes,
    engine_parts,
    learner_parts,
    total_gib,
)
from deploy.cluster.model_shape import Shapes
from deploy.cluster.placement import PlacementPlan, Slot
from rollout_server.engines.vllm_memory import GIB, Scoring, batched_tokens

Role = Literal["student", "teacher"]

KEPT_FREE = 0.05
"""Estimate: share of a learner's or a shared GPU that stays unassigned, because allocators can't use all memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """An engine's KV cache, on each of its GPUs."""

    gib: float
    gib_per_sequence: float  # for a sequence that fills the context
    max_num_seqs: int

    @property
    def num_sequences(self) -> int:
        """Number of full contexts that fit, at most ``max_num_seqs``."""
        return min(self.max_num_seqs, int(max(0.0, self.gib) / self.gib_per_sequence + 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorMemory:
    """Memory of one actor on each of its GPUs."""

    name: str  # "student engine", "teacher engine 1", "learner"
    parts: tuple[Part, ...]
    cache: Cache | None = None  # for engines
    limit_gib: float | None = None  # limit from its settings
    limit_key: str = ""  # the setting with the limit

    @property
    def gib(self) -> float:
        return total_gib(self.parts) + (self.cache.gib if self.cache is not None else 0.0)

    @property
    def least_gib(self) -> float:
        """Minimum memory: with a cache for one sequence, which vLLM needs to start."""
        return total_gib(self.parts) + (self.cache.gib_per_sequence if self.cache is not None else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleMemory:
    """GPUs on one node, and the actors that use each of them."""

    number: int  # index in Ray's placement group
    num_gpus: int
    actors: tuple[ActorMemory, ...]
    kept_free_gib: float

    @property
    def gib(self) -> float:
        return sum(actor.gib for actor in self.actors) + self.kept_free_gib

    def shortage(self, gpu_gib: float) -> str | None:
        """The memory that a GPU, or an engine's share of one, would need; None if everything fits."""
        for actor in self.actors:
            if actor.limit_gib is not None and actor.least_gib > actor.limit_gib:
                gives = f"{actor.limit_key} gives it {actor.limit_gib:.1f}"
                return f"{actor.least_gib:.1f} GiB for the {actor.name}, and {gives}"
        needed = {actor.name: actor.gib for actor in self.actors}
        needed["kept free"] = self.kept_free_gib
        total = sum(needed.values())
        if total <= gpu_gib * (1 + 1e-6):  # a cache that takes all remaining memory may exceed it by rounding
            return None
        return f"{total:.1f} GiB of one GPU ({', '.join(f'{name} {gib:.1f}' for name, gib in needed.items() if gib)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Memory settings for an engine that shares a GPU."""

    gpu_memory_gib: float
    kv_cache_gib: float
    max_num_batched_tokens: int


def plan_memory(
    config: RunConfig, shapes: Shapes, placement: PlacementPlan, backend: SyncBackend, *, gpu_gib: float
) -> tuple[tuple[BundleMemory, ...], dict[Role, Budget]]:
    """All bundles with GPUs, and the budgets of the engines that share a GPU."""
    maker = _ActorMaker(
        config=config,
        shapes=shapes,
        backend=backend,
        gpu_gib=gpu_gib,
        max_model_len=context_tokens(config, shapes),
    )
    bundles: list[BundleMemory] = []
    budgets: dict[Role, Budget] = {}
    for number, resources in enumerate(placement.bundles):
        names = _names(placement, number)
        if not names or not resources.get("GPU"):
            continue
        is_shared = len(names) > 1
        engines = [maker.engine(role, name, len(names)) for role, name in names if role != "learner"]
        learner = [maker.learner(name) for role, name in names if role == "learner"]
        kept_free_gib = KEPT_FREE * gpu_gib if is_shared or learner else 0.0
        left_gib = gpu_gib - kept_free_gib - sum(actor.gib for actor in learner)
        actors = _with_caches(engines, left_gib)
        if is_shared:
            budgets |= {engine.role: engine.budget(actor) for engine, actor in zip(engines, actors, strict=True)}
        bundles.append(
            BundleMemory(
                number=number,
                num_gpus=int(resources["GPU"]),
                actors=(*actors, *learner),
                kept_free_gib=kept_free_gib,
            )
        )
    return tuple(bundles), budgets


def context_tokens(config: RunConfig, shapes: Shapes) -> int:
    """Context length of both engines: the smaller of the two. Each is the setting, or else the model's maximum.

    Raises UserError if an engine has neither.
    """
    tokens = []
    for role, settings, shape in (
        ("student", config.engines.student, shapes.student),
        ("teacher", config.engines.teacher, shapes.teacher),
    ):
        wanted = settings.max_model_len or shape.max_position_embeddings
        if wanted is None:
            raise UserError(f"engines.{role}.max_model_len must be set: models.{role} gives no context length")
        tokens.append(wanted)
    return min(tokens)


def _names(placement: PlacementPlan, bundle: int) -> list[tuple[Literal["teacher", "student", "learner"], str]]:
    """(role, name) of the actors in a bundle, in their start order."""
    roles: list[tuple[Literal["teacher", "student", "learner"], str, list[Slot]]] = [
        ("teacher", "teacher engine", placement.teachers),
        ("student", "student engine", placement.students),
        ("learner", "learner", placement.learner),
    ]
    return [
        (role, name if len(slots) == 1 else f"{name} {number}")
        for role, name, slots in roles
        for number, slot in enumerate(slots)
        if slot.bundle == bundle
    ]


# --------------------------------------------------------------------------------------------------------- their memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """An engine whose cache size is not set yet."""

    role: Role
    name: str
    parts: tuple[Part, ...]
    num_batched_tokens: int
    gib_per_sequence: float
    max_num_seqs: int
    set_cache_gib: float | None  # from the settings
    limit_gib: float | None
    limit_key: str

    def with_cache(self, gib: float) -> ActorMemory:
        cache = Cache(gib=gib, gib_per_sequence=self.gib_per_sequence, max_num_seqs=self.max_num_seqs)
        return ActorMemory(
            name=self.name, parts=self.parts, cache=cache, limit_gib=self.limit_gib, limit_key=self.limit_key
        )

    def budget(self, actor: ActorMemory) -> Budget:
        assert actor.cache is not None
        return Budget(
            gpu_memory_gib=actor.gib if self.limit_gib is None else self.limit_gib,
            kv_cache_gib=actor.cache.gib,
            max_num_batched_tokens=self.num_batched_tokens,
        )


def _with_caches(engines: Sequence[_Engine], left_gib: float) -> list[ActorMemory]:
    """The engines of one GPU, which together have ``left_gib``. Caches that the settings don't size share the rest.
    Each gets at least one full context, even if that does not fit, and at most all that it could use.
    """
    left_gib -= sum(total_gib(engine.parts) + (engine.set_cache_gib or 0.0) for engine in engines)
    wanted_gib = sum(
        engine.max_num_seqs * engine.gib_per_sequence for engine in engines if engine.set_cache_gib is None
    )
    share = min(1.0, max(0.0, left_gib) / wanted_gib) if wanted_gib else 0.0
    return [
        engine.with_cache(
            max(1.0, share * engine.max_num_seqs) * engine.gib_per_sequence
            if engine.set_cache_gib is None
            else engine.set_cache_gib
        )
        for engine in engines
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ActorMaker:
    """Creates the actors of one run, under one layout, on GPUs of one size."""

    config: RunConfig
    shapes: Shapes
    backend: SyncBackend
    gpu_gib: float
    max_model_len: int

    def learner(self, name: str) -> ActorMemory:
        number_bytes = dtype_bytes(self.config.engines.student)
        parts = learner_parts(
            self.shapes.student, self.config.trainer, sync_backend=self.backend, engine_bytes=number_bytes
        )
        return ActorMemory(name=name, parts=parts)

    def engine(self, role: Role, name: str, num_sharers: int) -> _Engine:
        """An engine that shares each of its GPUs; ``num_sharers`` counts the actors there, including itself."""
        engines = self.config.engines
        settings, shape = (
            (engines.student, self.shapes.student) if role == "student" else (engines.teacher, self.shapes.teacher)
        )
        limit_gib, limit_key = self._limit(role, settings, is_alone=num_sharers == 1)
        scoring = Scoring(
            vocabulary=shape.vocab_size,
            top_logprobs=min(engines.top_logprobs, shape.vocab_size),
            dtype_bytes=dtype_bytes(settings),
            in_pieces=True,
        )
        num_batched_tokens = batched_tokens(
            scoring,
            setting=settings.max_num_batched_tokens,
            gpu_bytes=int(self.gpu_gib * GIB),
            engine_bytes=int((limit_gib or self.gpu_gib / num_sharers) * GIB),
            max_num_seqs=settings.max_num_seqs,
        )
        parts = engine_parts(
            shape,
            settings,
            num_batched_tokens=num_batched_tokens,
            scoring=scoring,
            joins_nccl=role == "student" and self.backend == "nccl",
        )
        set_cache_gib = settings.kv_cache_gib
        if set_cache_gib is None and limit_gib is not None:
            set_cache_gib = limit_gib - total_gib(parts)
        return _Engine(
            role=role,
            name=name,
            parts=parts,
            num_batched_tokens=num_batched_tokens,
            gib_per_sequence=cache_gib_per_sequence(shape, settings, max_model_len=self.max_model_len),
            max_num_seqs=settings.max_num_seqs,
            set_cache_gib=set_cache_gib,
            limit_gib=limit_gib if settings.kv_cache_gib is None else None,
            limit_key=limit_key,
        )

    def _limit(self, role: Role, settings: EngineSettings, *, is_alone: bool) -> tuple[float | None, str]:
        """GiB of a GPU that the settings let an engine use, and the setting that limits it."""
        if settings.gpu_memory_gib is not None:
            return settings.gpu_memory_gib, f"engines.{role}.gpu_memory_gib"
        key = f"engines.{role}.gpu_memory_utilization"
        if settings.gpu_memory_utilization is not None:
            return settings.gpu_memory_utilization * self.gpu_gib, key
        return (OWN_GPU_SHARE * self.gpu_gib, key) if is_alone else (None, "")
