"""Ray shell around the learner, and what the driver holds of it. No logic: it is in ``learner`` and ``weight_sender``.

vLLM's trainer half and torch are imported by the learner's process, not by this module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray
from ray.actor import ActorHandle

from common.config import Trainer
from common.logs import set_up_logging
from common.sequence import Ids, MixedSequence, TopLogprobs
from common.waiting import within
from common.weights import WeightUpdate, WeightVersion

if TYPE_CHECKING:
    from trainer.learner import StepReport
    from trainer.probe import ProbeReport

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What the learner is told."""

    student: str  # folder or hub name
    trainer: Trainer
    seed: int
    trust_remote_code: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSpec:
    """How the learner reaches the student engines."""

    students: Sequence[ActorHandle]
    backend: Literal["host_memory", "nccl"]
    workers_per_engine: int  # tensor-parallel ranks
    engine_dtype: str
    timeout_s: float
    probe_tolerance: float  # nats


class LearnerActor:
    """The learner in a process of its own. ``connect`` comes before the first ``sync``."""

    def __init__(self, spec: LearnerSpec) -> None:
        set_up_logging()
        from trainer.learner import Learner

        self._timeout_s = spec.trainer.step_timeout_s
        self._learner = Learner(spec.student, spec.trainer, seed=spec.seed, trust_remote_code=spec.trust_remote_code)

    def connect(self, spec: TransferSpec) -> None:
        """Open the weight transfer to all student engines."""
        import torch

        from trainer.weight_sender import LearnerWeights, OneCallClient, Rendezvous, build_sender, replica_init_info

        def init(transfer_info: Mapping[str, object]) -> None:
            calls = [
                student.init_weight_transfer.remote(
                    replica_init_info(transfer_info, replica=replica, workers_per_replica=spec.workers_per_engine)
                )
                for replica, student in enumerate(spec.students)
            ]
            ray.get(calls, timeout=spec.timeout_s)

        def load(update: WeightUpdate) -> None:
            ray.get([student.load_weights.remote(update) for student in spec.students], timeout=spec.timeout_s)

        rendezvous = None
        if spec.backend == "nccl":
            rendezvous = Rendezvous.on_this_machine(num_workers=len(spec.students) * spec.workers_per_engine)
        source = LearnerWeights(self._learner.model, dtype=getattr(torch, spec.engine_dtype))
        client = OneCallClient(init=init, load=load)
        self._sender = build_sender(spec.backend, source, client, rendezvous=rendezvous)
        self._probe_tolerance = spec.probe_tolerance

    def step(self, references: "Sequence[ray.ObjectRef[MixedSequence]]") -> "StepReport":
        return self._learner.step(ray.get(list(references), timeout=self._timeout_s))

    def sync(self, version: WeightVersion) -> None:
        self._sender.send(version)

    def check_probe(self, texts: Sequence[Ids], rows: list[TopLogprobs]) -> "ProbeReport":
        from trainer.probe import check_sync

        previous = self._sender.previous_weights
        return check_sync(self._learner.model, previous, texts, rows, tolerance=self._probe_tolerance)

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def shutdown(self) -> None:
        """Give back the shared memory."""
        self._sender.shutdown()


class RemoteLearner:
    """The driver's side of a LearnerActor."""

    def __init__(self, handle: ActorHandle, *, step_timeout_s: float, sync_timeout_s: float) -> None:
        self._handle = handle
        self._step_timeout_s = step_timeout_s
        self._sync_timeout_s = sync_timeout_s

    async def step(self, references: Sequence[Any]) -> "StepReport":
        return await within(self._step_timeout_s, self._handle.step.remote(list(references)), "the learner's step")

    async def sync(self, version: WeightVersion) -> None:
        await within(self._sync_timeout_s, self._handle.sync.remote(version), f"the sync of weight version {version}")

    async def check_probe(self, texts: Sequence[Ids], rows: list[TopLogprobs]) -> "ProbeReport":
        return await within(self._sync_timeout_s, self._handle.check_probe.remote(texts, rows), "the learner's probe")

    async def save(self, folder: Path) -> None:
        await within(self._step_timeout_s, self._handle.save.remote(folder), f"saving the student to {folder}")
