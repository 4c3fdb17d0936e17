"""What a rollout actor does for the training loop: collect and trace, evaluate, probe. Does not know about Ray.

Owns two controllers (one with the run's policy; one with the student alone, greedy, for evaluation) and the trace.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.config import OnPolicy, Policy, Sampling, Trace
from common.sequence import Ids, MixedSequence, Prompt, TopLogprobs
from rollout_server.controller import SwitchingController
from rollout_server.engines.protocol import Engine, ScoreRequest
from rollout_server.engines.replicas import ReplicatedEngine
from rollout_server.pool import generate_all
from rollout_server.traces.writer import TraceWriter


class Decoder(Protocol):
    """Converts ids to text. The part of a tokenizer that the trace needs."""

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveContext:
    """Limits and settings for live prompts, which come from users."""

    max_model_len: int  # tokens, prompt and answer together
    prompts_as_chat: bool  # apply the chat template to prompts given as text


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """Settings of one rollout actor."""

    policy: Policy
    sampling: Sampling
    trace: Trace
    trace_folder: Path
    top_logprobs: int
    stop_token_ids: tuple[int, ...]
    live: LiveContext | None = None  # None: live sequences are disabled
    trust_remote_code: bool = False  # for the tokenizer


class Rollouts:
    """Generates mixed sequences with one student and one teacher."""

    def __init__(self, spec: RolloutSpec, *, student: ReplicatedEngine, teacher: Engine, decoder: Decoder) -> None:
        self._student = student
        self._max_in_flight = spec.sampling.max_in_flight
        self._writer: TraceWriter | None = None
        if spec.trace.enabled:
            self._writer = TraceWriter(
                spec.trace_folder,
                decode=decoder.decode,
                token_texts=lambda token_ids: [decoder.decode([token_id]) for token_id in token_ids],
                top_alternatives=spec.trace.top_alternatives,
            )

        def controller(policy: Policy, sampling: Sampling) -> SwitchingController:
            return SwitchingController(
                student=student,
                teacher=teacher,
                policy=policy,
                sampling=sampling,
                top_logprobs=spec.top_logprobs,
                stop_token_ids=spec.stop_token_ids,
            )

        self._controller = controller(spec.policy, spec.sampling)
        greedy = spec.sampling.model_copy(update={"temperature": 0.0})
        self._student_alone = controller(OnPolicy(), greedy)

    async def collect(
        self, prompts: Sequence[Prompt], step: int, kept: Sequence[MixedSequence] = ()
    ) -> AsyncGenerator[list[MixedSequence], None]:
        """Yield the step's sequences as they finish. The trace segment is written after the last one is consumed.

        ``kept`` are the step's sequences that exist already. They are not generated again; the segment includes them.
        """
        sequences = list(kept)
        generated = generate_all(self._controller, prompts, max_in_flight=self._max_in_flight)
        async with aclosing(generated) as batches:
            async for finished in batches:
                sequences.extend(finished)
                yield finished
        if self._writer is not None and sequences:
            sequences.sort(key=lambda sequence: sequence.sequence_id)  # arrival order is not meaningful
            await asyncio.to_thread(self._writer.write_segment, step, sequences)

    async def evaluate(self, prompts: Sequence[Prompt]) -> list[MixedSequence]:
        """Greedy sequences of the student alone, scored by the teacher."""
        generated = generate_all(self._student_alone, prompts, max_in_flight=self._max_in_flight)
        return [sequence async for finished in generated for sequence in finished]

    async def probe(self, texts: Sequence[Ids]) -> list[list[TopLogprobs]]:
        """Each student replica's rows at positions 1 to n of each text, to compare with the learner's rows."""
        requests = [ScoreRequest(token_ids=text, start=1) for text in texts]
        return [list(await asyncio.gather(*map(replica.score, requests))) for replica in self._student.replicas]
