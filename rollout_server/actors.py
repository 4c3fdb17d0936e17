"""Ray actors around an engine and around the rollouts, and the driver's clients for them. No logic.

The logic is in ``engines/`` and ``rollouts``. vLLM is imported only in the process that runs it, not by this module.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import ray
import torch
from ray.actor import ActorHandle
from transformers import AutoTokenizer

from common.health import Health
from common.heap import freeze_heap
from common.logs import set_up_logging
from common.metrics import READ_POSITIONS, RUNNING_REQUESTS, SWITCH_POSITION, WAITING_REQUESTS, WRITTEN_TOKENS
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from common.waiting import within
from common.weights import WeightUpdate
from rollout_server.engines.protocol import EngineFacts, EngineSpec
from rollout_server.engines.remote.client import RemoteEngine
from rollout_server.engines.remote.messages import ClientMessage, ServerMessage
from rollout_server.engines.remote.server import StreamMultiplexer
from rollout_server.engines.replicas import ReplicatedEngine
from rollout_server.engines.selftest import check_engine
from rollout_server.inspector.live_records import LivePiece, LiveRefusal, LiveRequest
from rollout_server.live_writer import LiveWriter
from rollout_server.ray_metrics import Exported
from rollout_server.rollouts import Rollouts, RolloutSpec

if TYPE_CHECKING:
    from rollout_server.engines.vllm import VLLMEngine


T = TypeVar("T")

_EXPORT_EVERY_S = 2.0
_ENGINE_METRICS = (RUNNING_REQUESTS, WAITING_REQUESTS, WRITTEN_TOKENS, READ_POSITIONS)


class EngineActor:
    """Runs one engine in its own process. ``start`` must be called first.

    It must be called again after Ray restarts the actor's process.
    """

    _engine: "VLLMEngine"
    _streams: StreamMultiplexer
    _loading_since_s: float | None = None  # start of the weight load in progress

    async def start(self, spec: EngineSpec, self_test_prefix: Ids) -> EngineFacts:
        """Load the model and check the engine's numbers. Raises UserError if the check fails."""
        set_up_logging()
        self._engine = self._start_engine(spec)
        self._streams = StreamMultiplexer(self._engine)
        facts = self._engine.facts
        await check_engine(
            self._engine,
            name=spec.name,
            prefix=self_test_prefix,
            top_logprobs=facts.top_logprobs,
            dtype=facts.dtype,
        )
        self._exporting = asyncio.create_task(self._export(spec))
        freeze_heap()
        return facts

    def _start_engine(self, spec: EngineSpec) -> "VLLMEngine":
        from rollout_server.engines.vllm import VLLMEngine

        return VLLMEngine.start(spec)

    async def _export(self, spec: EngineSpec) -> None:
        """Consumes the engine's counters; produces metrics; waits some seconds in between; stops with the actor."""
        exported = Exported(_ENGINE_METRICS, {"run": spec.run, "role": spec.name})
        num_written = num_read = 0
        while True:
            running = self._engine.num_running
            exported.add(RUNNING_REQUESTS, min(running, spec.settings.max_num_seqs))
            exported.add(WAITING_REQUESTS, max(running - spec.settings.max_num_seqs, 0))
            exported.add(WRITTEN_TOKENS, self._streams.num_written_tokens - num_written)
            exported.add(READ_POSITIONS, self._streams.num_read_positions - num_read)
            num_written, num_read = self._streams.num_written_tokens, self._streams.num_read_positions
            await asyncio.sleep(_EXPORT_EVERY_S)

    async def exchange(self, client_id: str, message: ClientMessage, wait_s: float) -> ServerMessage:
        return await self._streams.exchange(client_id, message, wait_s)

    async def init_weight_transfer(self, transfer_info: Mapping[str, object]) -> None:
        await self._engine.init_weight_transfer(transfer_info)

    async def load_weights(self, update: WeightUpdate) -> None:
        self._loading_since_s = time.monotonic()
        try:
            await self._engine.load_weights(update)
        finally:
            self._loading_since_s = None

    async def num_running(self) -> int:
        return self._engine.num_running

    async def health(self) -> Health:
        if not hasattr(self, "_streams"):
            return Health(pid=os.getpid(), is_ready=False)
        return Health(
            pid=os.getpid(),
            num_busy=self._streams.num_busy + (self._loading_since_s is not None),
            still_s=max(self._streams.still_s, time.monotonic() - (self._loading_since_s or time.monotonic())),
            failure=self._engine.failure,
        )

    async def drop_calls(self) -> None:
        """Abort the calls that crashed or timed-out clients left running."""
        self._streams.drop_calls()

    async def shutdown(self) -> None:
        """Stop vLLM's own processes, which would otherwise outlive this one."""
        self._engine.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAddress:
    """How a rollout actor reaches an engine."""

    handle: ActorHandle
    name: str
    call_timeout_s: float


class RolloutActor:
    """Runs the switching controller in its own process. Without engines it waits for ``connect``."""

    def __init__(
        self, spec: RolloutSpec, students: list[EngineAddress], teachers: list[EngineAddress], tokenizer: str
    ) -> None:
        set_up_logging()
        torch.set_num_threads(1)  # the verifier's arrays are small; more threads only add overhead
        self._spec = spec
        self._addresses = (students, teachers)
        self._tokenizer = tokenizer
        self._rollouts: Rollouts | None = None
        self._live: LiveWriter | None = None
        self._exported = Exported([SWITCH_POSITION], {"run": spec.trace_folder.parent.name})

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[list[MixedSequence], None]:
        """Yields batches, because Ray fetches the next item only several turns of the event loop after the last."""
        async with aclosing(self._on_this_loop().collect(prompts, step, kept)) as batches:
            async for finished in batches:
                for sequence in finished:
                    if sequence.first_switch is not None:
                        self._exported.add(SWITCH_POSITION, sequence.first_switch)
                yield finished

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        return await self._on_this_loop().evaluate(prompts)

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        return await self._on_this_loop().probe(texts)

    async def health(self) -> Health:
        """Runs on the event loop of the rollouts, so there is no answer if that loop is blocked."""
        return Health(pid=os.getpid(), is_ready=bool(self._addresses[0]))

    async def sees(self, path: Path) -> bool:
        """Whether this process's machine can see the file."""
        return path.exists()

    async def connect(self, students: list[EngineAddress], teachers: list[EngineAddress]) -> None:
        """Use these engines from now on. Drops all calls to earlier engines, even behind the same handles."""
        self._addresses = (students, teachers)
        self._rollouts = self._live = None

    async def write_live(self, request: LiveRequest) -> AsyncGenerator[LivePiece, None]:
        """Stream one sequence to a user, concurrently with the other calls. Raises LiveRefusal or LiveFailure."""
        self._on_this_loop()
        if self._live is None:
            raise LiveRefusal("invalid", "live sequences are disabled for this run")
        async with aclosing(self._live.write(request)) as pieces:
            async for piece in pieces:
                yield piece

    def _on_this_loop(self) -> Rollouts:
        """Created at the first call, because remote engines belong to the event loop that the calls run on."""
        if self._rollouts is None:
            student, teacher = (
                ReplicatedEngine(
                    [
                        RemoteEngine(address.handle, name=address.name, call_timeout_s=address.call_timeout_s)
                        for address in addresses
                    ]
                )
                for addresses in self._addresses
            )
            decoder = AutoTokenizer.from_pretrained(self._tokenizer, trust_remote_code=self._spec.trust_remote_code)
            self._rollouts = Rollouts(self._spec, student=student, teacher=teacher, decoder=decoder)
            if self._spec.live is not None:
                self._live = LiveWriter(
                    self._spec, self._spec.live, student=student, teacher=teacher, tokenizer=decoder
                )
            freeze_heap()
        return self._rollouts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Collected:
    """A sequence for the training loop: its value, and a reference to pass it on without a copy."""

    sequence: MixedSequence
    reference: "tuple[ray.ObjectRef[list[MixedSequence]], int]"  # the batch it came in, and its index there

    @classmethod
    def put(cls, sequence: MixedSequence) -> Self:
        """For a sequence that was read from a file, so that no rollout actor holds it."""
        return cls(sequence=sequence, reference=(ray.put([sequence]), 0))


class RemoteRollouts:
    """The driver's side of a RolloutActor."""

    def __init__(self, handle: ActorHandle, *, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[Collected, None]:
        """Yield sequences as they finish. Closing the generator cancels those in progress."""
        references = self._handle.collect.options(num_returns="streaming").remote(prompts, step, kept)
        try:
            while True:
                reference = await within(self._timeout_s, anext(references), f"a sequence of step {step}")
                finished = await within(self._timeout_s, reference, "sequences")
                for place, sequence in enumerate(finished):
                    yield Collected(sequence=sequence, reference=(reference, place))
        except StopAsyncIteration:
            return
        finally:
            # Don't cancel nested calls: one exchange with an engine serves every stream of the actor.
            ray.cancel(references, recursive=False)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        return await self._answer(self._handle.evaluate.remote(prompts), "the evaluation")

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        return await self._answer(self._handle.probe.remote(texts), "the probe's rows")

    async def _answer(self, reference: "ray.ObjectRef[T]", what: str) -> T:
        """Await a call. Cancels it on time-out and cancellation."""
        try:
            return await within(self._timeout_s, reference, what)
        except (TimeoutError, asyncio.CancelledError):
            ray.cancel(reference, recursive=False)
            raise
