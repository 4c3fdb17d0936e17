"""The product's actors with instruments attached: what an engine really computed, CPU times, and offline batches."""

import asyncio
import time
from bisect import bisect
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self

import numpy as np
import psutil  # type: ignore[import-untyped]

from common.sequence import Ids, MixedSequence, Prompt
from rollout_server.actors import EngineActor, EngineAddress, RolloutActor
from rollout_server.engines.protocol import EngineFacts, EngineSpec, ScoreRequest, WriteRequest
from rollout_server.engines.remote.messages import ClientMessage, ServerMessage
from rollout_server.rollouts import RolloutSpec


@dataclass(slots=True)
class EngineCounters:
    """What vLLM's own engine process reported, dropped requests included."""

    num_generated_tokens: int = 0
    num_prefilled_tokens: int = 0
    num_requests: int = 0
    num_decoded_tokens: int = 0  # generated, but for the one that comes with a prefill
    num_decode_steps: int = 0

    @property
    def mean_decode_batch(self) -> float:
        """Sequences that a step decoded."""
        return self.num_decoded_tokens / self.num_decode_steps if self.num_decode_steps else 0.0


class Counted:
    """A dataclass of counters that only grow: the difference of two looks is what happened between them."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __sub__(self, earlier: Self) -> Self:
        names = self.__dataclass_fields__
        return type(self)(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class CPUSeconds(Counted):
    """Processor time of an engine since its start."""

    model: float  # the process that computes
    scheduler: float  # vLLM's engine process, where it is another one
    front_end: float  # the actor: requests, streams, conversion


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages(Counted):
    """Between an engine and its clients, to and fro."""

    number: int = 0
    num_bytes: int = 0  # of the arrays in them

    def and_more(self, *messages: object) -> "Messages":
        num_bytes = sum(map(num_array_bytes, messages))
        return Messages(number=self.number + len(messages), num_bytes=self.num_bytes + num_bytes)


def num_array_bytes(value: object) -> int:
    """Of all arrays in a record, however deep."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(num_array_bytes, value.values()))
    if is_dataclass(value):
        return sum(num_array_bytes(getattr(value, field.name)) for field in fields(value))
    return 0


class CountingEngineActor(EngineActor):
    """An engine that counts the messages it exchanges with its clients."""

    _messages = Messages()

    async def exchange(self, client_id: str, message: ClientMessage, wait_s: float) -> ServerMessage:
        reply = await super().exchange(client_id, message, wait_s)
        self._messages = self._messages.and_more(message, reply)
        return reply

    async def messages(self) -> Messages:
        return self._messages


class MeasuredEngineActor(CountingEngineActor):
    """An engine that also runs offline batches and counts."""

    async def start(self, spec: EngineSpec, self_test_prefix: Ids) -> EngineFacts:
        facts = await super().start(spec, self_test_prefix)
        self._counters = EngineCounters()
        self._count_outputs()
        return facts

    async def reset(self) -> None:
        """Forget every cached prefix and all counts."""
        while not await self._engine._llm.reset_prefix_cache():
            await asyncio.sleep(0.05)
        self._counters = EngineCounters()

    async def counters(self) -> EngineCounters:
        return self._counters

    async def cpu_seconds(self) -> CPUSeconds:
        by_kind = {"Worker": 0.0, "EngineCore": 0.0}
        for process in psutil.Process().children(recursive=True):
            kind = "Worker" if "Worker" in " ".join(process.cmdline()) else "EngineCore"
            by_kind[kind] += _cpu_seconds(process)
        if by_kind["Worker"] == 0.0:
            by_kind = {"Worker": by_kind["EngineCore"], "EngineCore": 0.0}
        return CPUSeconds(
            model=by_kind["Worker"], scheduler=by_kind["EngineCore"], front_end=_cpu_seconds(psutil.Process())
        )

    async def write_batch(self, requests: Sequence[WriteRequest], at_once: int | None = None) -> float:
        """Seconds for all requests as one offline batch, each written to its whole length; ``at_once`` at a time."""
        from vllm.sampling_params import RequestOutputKind

        calls = []
        for request in requests:
            params = self._engine._write_params(request, RequestOutputKind.FINAL_ONLY)
            params.stop_token_ids, params.ignore_eos = [], True
            calls.append((request.prefix, params))
        return await self._run_batch(calls, at_once)

    async def read_batch(self, requests: Sequence[ScoreRequest]) -> float:
        """Seconds for all reads as one offline batch: log-probs of the rows after the cached prefix."""
        return await self._run_batch([self._read_call(request) for request in requests])

    def _read_call(self, request: ScoreRequest) -> tuple[Ids, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        k = self._engine.facts.top_logprobs
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            logprobs=k,
            prompt_logprobs=k if request.num_rows > 1 else None,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return request.token_ids, params

    async def _run_batch(self, calls: Sequence[tuple[Ids, Any]], at_once: int | None = None) -> float:
        gate = asyncio.Semaphore(at_once or len(calls) or 1)

        async def run(text: Ids, params: Any) -> None:
            async with gate:
                await self._run(text, params)

        started_s = time.perf_counter()
        await asyncio.gather(*(run(text, params) for text, params in calls))
        return time.perf_counter() - started_s

    async def _run(self, text: Ids, params: Any) -> None:
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=text.tolist())
        async with aclosing(
            self._engine._llm.generate(prompt, params, str(next(self._engine._request_numbers)))
        ) as outputs:
            async for _ in outputs:
                pass

    def _count_outputs(self) -> None:
        """Look at every message of vLLM's engine process as it arrives, those for ended requests too."""
        processor = self._engine._llm.output_processor
        process_outputs = processor.process_outputs

        def counting(outputs: Sequence[Any], *arguments: Any, **options: Any) -> Any:
            num_decoded = 0
            for output in outputs:
                self._counters.num_generated_tokens += len(output.new_token_ids)
                if output.prefill_stats is not None:
                    self._counters.num_prefilled_tokens += output.prefill_stats.num_computed_tokens
                    self._counters.num_requests += 1
                else:
                    num_decoded += len(output.new_token_ids)
            self._counters.num_decoded_tokens += num_decoded
            self._counters.num_decode_steps += num_decoded > 0
            return process_outputs(outputs, *arguments, **options)

        processor.process_outputs = counting


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Counted):
    """What a controller has finished since its start, and when."""

    at_s: float  # on the machine's monotonic clock, which all its processes share
    cpu_s: float  # processor time of the controller's process
    num_sequences: int = 0
    num_switched: int = 0
    num_tokens: int = 0
    num_teacher_tokens: int = 0
    num_wasted_tokens: int = 0

    def and_more(self, sequences: Sequence[MixedSequence]) -> "Finished":
        return Finished(
            at_s=time.monotonic(),
            cpu_s=time.process_time(),
            num_sequences=self.num_sequences + len(sequences),
            num_switched=self.num_switched + sum(sequence.first_switch is not None for sequence in sequences),
            num_tokens=self.num_tokens + sum(map(len, sequences)),
            num_teacher_tokens=self.num_teacher_tokens + sum(each.num_teacher_tokens for each in sequences),
            num_wasted_tokens=self.num_wasted_tokens + sum(each.num_wasted_tokens for each in sequences),
        )


class MeasuredRolloutActor(RolloutActor):
    """The controller, with its processor time and what it has finished."""

    def __init__(
        self, spec: RolloutSpec, students: list[EngineAddress], teachers: list[EngineAddress], tokenizer: str
    ) -> None:
        super().__init__(spec, students, teachers, tokenizer)
        self._finished = [Finished(at_s=time.monotonic(), cpu_s=time.process_time())]

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[list[MixedSequence], None]:
        async with aclosing(super().collect(prompts, step, kept)) as batches:
            async for finished in batches:
                self._finished.append(self._finished[-1].and_more(finished))
                yield finished

    async def num_finished(self) -> int:
        return self._finished[-1].num_sequences

    async def finished_at(self, moments_s: Sequence[float]) -> list[Finished]:
        """Asked afterwards, for a busy controller answers late."""
        return [self._finished[bisect(self._finished, at_s, key=lambda each: each.at_s) - 1] for at_s in moments_s]

    async def cpu_seconds(self) -> float:
        return time.process_time()


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
