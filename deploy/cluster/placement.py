"""Which actor goes into which bundle of a run's Ray placement group. Pure; ``reservation`` requests the bundles.

    CPUs             one bundle for each engine, for each learner rank and for the rollouts, without GPUs
    spread           the same, each engine and each rank with its GPUs
    shared_student   each teacher engine with its GPUs; the student engine and the learner in one bundle with one GPU
    one_gpu          teacher, student and learner in one bundle with one GPU

Actors in one bundle with one GPU share that GPU. They start one after another, the learner last, because an engine
measures the free memory when it starts. Their GPU fractions are only Ray's bookkeeping; ``plan`` divides the memory.
"""

from dataclasses import dataclass

from common.config import EngineSettings, Layout, RunConfig

# Threads are set elsewhere; Ray's CPUs only have to sum to less than the smallest machine has.
CPUS_PER_ACTOR = 0.25
_HALF, _THIRD = 0.5, 0.3333  # Ray counts GPUs in steps of 0.0001


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The bundle and GPU fraction of one actor."""

    bundle: int
    num_gpus: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """A run's bundles, as Ray resources, and the slot of every actor."""

    bundles: list[dict[str, float]]
    students: list[Slot]
    teachers: list[Slot]
    rollouts: Slot
    learner: list[Slot]  # one per rank; empty without training

    @property
    def learner_shares_gpu(self) -> bool:
        """With the student engine, and in ``one_gpu`` also with the teacher engine."""
        return bool(self.learner) and self.learner[0].bundle == self.students[0].bundle


def place_actors(config: RunConfig, layout: Layout | None, *, with_learner: bool = True) -> PlacementPlan:
    """The placement of one run. ``layout`` None means CPUs."""
    engines = config.engines
    num_ranks = config.trainer.num_ranks if with_learner else 0
    bundles: list[dict[str, float]] = []

    def own(num_gpus: int) -> Slot:
        num_gpus = 0 if layout is None else num_gpus
        bundles.append({"CPU": CPUS_PER_ACTOR, **({"GPU": float(num_gpus)} if num_gpus else {})})
        return Slot(bundle=len(bundles) - 1, num_gpus=num_gpus)

    def engine_slots(settings: EngineSettings) -> list[Slot]:
        return [own(settings.num_gpus) for _ in range(settings.num_replicas)]

    if layout is None or layout == "spread":
        students, teachers = engine_slots(engines.student), engine_slots(engines.teacher)
        rollouts = own(0)
        learner = [own(1) for _ in range(num_ranks)]
    else:
        share = _THIRD if layout == "one_gpu" else _HALF
        num_sharers = 1 + (layout == "one_gpu") + num_ranks
        bundles.append({"CPU": num_sharers * CPUS_PER_ACTOR, "GPU": 1.0})
        shared = Slot(bundle=0, num_gpus=share)
        students, learner = [shared], [shared] * num_ranks
        teachers = [shared] if layout == "one_gpu" else engine_slots(engines.teacher)
        rollouts = own(0)
    return PlacementPlan(bundles=bundles, students=students, teachers=teachers, rollouts=rollouts, learner=learner)
