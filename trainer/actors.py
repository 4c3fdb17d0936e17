"""Ray actors of the learner's ranks, and the driver's client for them. The logic is in ``learner``, ``ranks`` and
``weight_sender``.

The learner's processes import torch and vLLM's trainer half; this module does not.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from common.config import Trainer
from common.health import Health
from common.logs import set_up_logging
from common.sequence import Ids, MixedSequence, TopLogprobs
from common.waiting import WaitedTooLong
from common.weights import SyncBackend, WeightUpdate, WeightVersion
from trainer.probe_statistics import ProbeNoise, ProbeReport

if TYPE_CHECKING:
    from trainer.learner import StepReport
    from trainer.probe import ProbeLimits
    from trainer.weight_sender import WeightSender

T = TypeVar("T")

HEALTH_GROUP = "health"
"""Name of the Ray concurrency group in which a LearnerActor answers health checks."""

_ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}

_GRACE_S = 5.0  # after one rank's error, to collect the others': the first error is seldom the cause


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """Arguments of every rank of the learner."""

    student: str  # folder or hub name
    trainer: Trainer
    device: Literal["cpu", "cuda"]  # cuda: each rank's bundle has a GPU
    sync_backend: SyncBackend
    seed: int
    trust_remote_code: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSpec:
    """How the learner sends weights to the student engines."""

    students: Sequence[ActorHandle]
    backend: SyncBackend
    workers_per_engine: int  # tensor-parallel ranks
    engine_dtype: str
    timeout_s: float
    probe_tolerance: float | None  # nats, for the rms; None to derive it from ``probe_noise``
    probe_noise: ProbeNoise | None  # None until it has been measured


def allocator_settings(spec: LearnerSpec) -> dict[str, str]:
    """Environment of a learner's process: expandable segments, since steps of different lengths fragment fixed ones.

    Not for ``ipc``, because expandable segments are shared by passing file descriptors, which containers forbid
    (pytorch#165685). The user's own setting takes precedence.
    """
    if spec.device == "cpu" or spec.sync_backend == "ipc" or _ALLOCATOR_VARIABLES & os.environ.keys():
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


class LearnerRankDied(RuntimeError):
    """A rank of the learner died, and its part of model and optimizer is lost. Stops the run."""


class LearnerActor:
    """One rank of the learner in a process of its own. Call ``start`` first, and ``connect`` before ``sync``.

    All ranks get the same calls in the same order, except ``meeting_point``, which only rank 0 gets.
    """

    def __init__(self, rank: int, spec: LearnerSpec) -> None:
        set_up_logging()
        self._rank = rank
        self._spec = spec
        self._timeout_s = spec.trainer.step_timeout_s
        self._sender: WeightSender | None = None

    def health(self) -> Health:
        """Called in a concurrency group of its own (``HEALTH_GROUP``), so that it answers during a step."""
        return Health(pid=os.getpid(), is_ready=hasattr(self, "_learner"))

    def sees(self, path: Path) -> bool:
        """Whether a path exists on this rank's machine."""
        return path.exists()

    def meeting_point(self) -> str:
        """``host:port`` at which rank 0 will wait for the other ranks."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def start(self, meeting_point: str) -> None:
        """Join the other ranks and load the model, or this rank's shard of it."""
        spec = self._spec
        os.environ.update(allocator_settings(spec))  # torch reads it when it first allocates on a GPU

        from trainer.learner import Learner, learner_device
        from trainer.probe import SyncProbe
        from trainer.ranks import join

        device = learner_device(spec.device)
        ranks = join(self._rank, spec.trainer.num_ranks, meeting_point, device, timeout_s=spec.trainer.step_timeout_s)
        self._learner = Learner(
            spec.student,
            spec.trainer,
            seed=spec.seed,
            trust_remote_code=spec.trust_remote_code,
            device=device,
            ranks=ranks,
        )
        self._probe = SyncProbe(self._learner.model, self._learner.whole_copy)

    def connect(self, spec: TransferSpec) -> None:
        """Open the weight transfer to all student engines. Called again when engines were replaced."""
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

        if self._sender is not None:
            self._sender.shutdown()
        rendezvous = None
        if spec.backend == "nccl":
            rendezvous = Rendezvous.on_this_machine(num_workers=len(spec.students) * spec.workers_per_engine)
        source = LearnerWeights(self._learner.model, dtype=getattr(torch, spec.engine_dtype))
        client = OneCallClient(init=init, load=load)
        self._sender = build_sender(spec.backend, source, client, rank=self._rank, rendezvous=rendezvous)
        self._probe_tolerance, self._probe_noise = spec.probe_tolerance, spec.probe_noise
        self._engine_in_float32 = spec.engine_dtype == "float32"
        self._probe.engine_dtype = getattr(torch, spec.engine_dtype)

    def step(self, references: "Sequence[tuple[ray.ObjectRef[list[MixedSequence]], int]]") -> "StepReport":
        """``references``: for each sequence, the batch in which it arrived and its index there."""
        batches = list(dict.fromkeys(batch for batch, _ in references))
        fetched = dict(zip(batches, ray.get(batches, timeout=self._timeout_s), strict=True))
        return self._learner.step([fetched[batch][place] for batch, place in references])

    def sync(self, version: WeightVersion) -> None:
        self._connected().send(version)

    def measure_probe_noise(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> ProbeNoise:
        """Measure the probe's noise while the engines hold the same weights as this rank."""
        self._probe_noise = self._probe.measure_noise(texts, rows_of_engines, self._probe_limits())
        return self._probe_noise

    def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None:
        """Score the probe texts before a step."""
        self._probe.read_before(texts, rows_of_engines)

    def check_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> ProbeReport:
        """Compare with the engines after the step's sync."""
        return self._probe.check(texts, rows_of_engines, self._probe_limits(), self._connected().previous_weights)

    def _probe_limits(self) -> "ProbeLimits":
        from trainer.probe import ProbeLimits

        return ProbeLimits.choose(
            tolerance=self._probe_tolerance, in_float32=self._engine_in_float32, noise=self._probe_noise
        )

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def save_state(self, folder: Path) -> None:
        self._learner.save_state(folder)

    def load_state(self, folder: Path) -> None:
        self._learner.load_state(folder)

    def shutdown(self) -> None:
        """Free the shared memory."""
        self._connected().shutdown()

    def _connected(self) -> "WeightSender":
        assert self._sender is not None, f"learner rank {self._rank}: connect must be called first"
        return self._sender


class RemoteLearner:
    """The driver's client for all LearnerActors. Its calls go to all ranks together."""

    def __init__(self, ranks: Sequence[ActorHandle], *, step_timeout_s: float, sync_timeout_s: float) -> None:
        self._ranks = ranks
        self._step_timeout_s = step_timeout_s
        self._sync_timeout_s = sync_timeout_s

    async def step(self, references: Sequence[Any]) -> "StepReport":
        calls = [rank.step.remote(list(references)) for rank in self._ranks]
        return await every_rank(calls, "the learner's step", timeout_s=self._step_timeout_s)

    async def sync(self, version: WeightVersion) -> None:
        calls = [rank.sync.remote(version) for rank in self._ranks]
        await every_rank(calls, f"the sync of weight version {version}", timeout_s=self._sync_timeout_s)

    async def measure_probe_noise(
        self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]
    ) -> ProbeNoise:
        calls = [rank.measure_probe_noise.remote(texts, rows_of_engines) for rank in self._ranks]
        return await every_rank(calls, "the probe before any training", timeout_s=self._sync_timeout_s)

    async def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None:
        calls = [rank.read_probe.remote(texts, rows_of_engines) for rank in self._ranks]
        await every_rank(calls, "the learner's probe before a step", timeout_s=self._sync_timeout_s)

    async def check_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> ProbeReport:
        calls = [rank.check_probe.remote(texts, rows_of_engines) for rank in self._ranks]
        return await every_rank(calls, "the learner's probe", timeout_s=self._sync_timeout_s)

    async def save(self, folder: Path) -> None:
        calls = [rank.save.remote(folder) for rank in self._ranks]
        await every_rank(calls, f"saving the student to {folder}", timeout_s=self._step_timeout_s)

    async def save_state(self, folder: Path) -> None:
        calls = [rank.save_state.remote(folder) for rank in self._ranks]
        await every_rank(calls, f"saving the learner's state to {folder}", timeout_s=self._step_timeout_s)

    async def load_state(self, folder: Path) -> None:
        calls = [rank.load_state.remote(folder) for rank in self._ranks]
        await every_rank(calls, f"loading the learner's state from {folder}", timeout_s=self._step_timeout_s)


async def every_rank(calls: Sequence[Awaitable[T]], what: str, *, timeout_s: float) -> T:
    """Rank 0's result once every rank has finished. ``calls`` are in the order of the ranks.

    If one rank fails, the others are not waited for, because they may be waiting for it. Raises LearnerRankDied if a
    rank's process is gone, else the error of the lowest failed rank, or WaitedTooLong with the ranks that did not
    answer.
    """
    answers = [asyncio.ensure_future(call) for call in calls]
    try:
        done, _ = await asyncio.wait(answers, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        if any(answer.exception() for answer in done):
            await asyncio.wait(answers, timeout=_GRACE_S)
        errors = {rank: a.exception() for rank, a in enumerate(answers) if a.done() and a.exception()}
        for rank, error in errors.items():
            # With RayTaskError the rank is alive, and an actor that it called died.
            if isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
                raise LearnerRankDied(f"learner rank {rank} of {len(answers)} died during {what}: {error}") from error
        for error in errors.values():
            assert error is not None
            raise error
        if silent := [str(rank) for rank, answer in enumerate(answers) if not answer.done()]:
            raise WaitedTooLong(
                f"waited {timeout_s:g} s for {what}; of {len(answers)} learner ranks no answer from {', '.join(silent)}"
            )
        return answers[0].result()
    finally:
        for answer in answers:
            answer.cancel()
