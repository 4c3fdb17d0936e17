"""Which actor sits where: a run's bundles, as one Ray placement group. Pure; ``cluster`` asks Ray for them.

    one bundle per engine    its GPUs
    one for the rollouts     no GPU
    one per learner rank     one GPU; or none of its own: then the only rank sits with the student engine

GPU seats follow Ray's interface and have not been run on a GPU.
"""

from dataclasses import dataclass

from common.config import EngineSettings, RunConfig

# Threads are set where they are used; Ray's CPUs only have to add up to less than the smallest machine has.
CPUS_PER_ACTOR = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One actor's place."""

    bundle: int
    num_gpus: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatingPlan:
    """A run's bundles, in Ray's terms, and every actor's seat in them."""

    bundles: list[dict[str, float]]
    students: list[Seat]
    teachers: list[Seat]
    rollouts: Seat
    learner: list[Seat]  # one per rank


def seat(config: RunConfig, *, use_gpus: bool) -> SeatingPlan:
    """The seats of one run."""
    bundles: list[dict[str, float]] = []

    def new_seat(num_gpus: float, share: float = 1.0) -> Seat:
        """A bundle of its own; ``share`` is the actor's part of the bundle's GPUs."""
        num_gpus = num_gpus if use_gpus else 0.0
        bundles.append({"CPU": CPUS_PER_ACTOR, **({"GPU": num_gpus} if num_gpus else {})})
        return Seat(bundle=len(bundles) - 1, num_gpus=num_gpus * share)

    engines = config.engines
    shares_gpu = config.placement.learner == "student_gpu"

    def engine_seats(settings: EngineSettings, share: float = 1.0) -> list[Seat]:
        return [new_seat(settings.num_gpus, share) for _ in range(settings.num_replicas)]

    students = engine_seats(engines.student, share=0.5 if shares_gpu else 1.0)
    teachers = engine_seats(engines.teacher)
    rollouts = new_seat(0)
    if shares_gpu:
        learner = students[:1]
        bundles[students[0].bundle]["CPU"] += CPUS_PER_ACTOR
    else:
        learner = [new_seat(1) for _ in range(config.trainer.num_ranks)]
    return SeatingPlan(bundles=bundles, students=students, teachers=teachers, rollouts=rollouts, learner=learner)
