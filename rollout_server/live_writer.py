"""Generates one sequence under any policy and streams its decisions as they are made. Knows nothing of Ray or HTTP.

It uses the run's engines and nothing else of the run: its sequences are not part of the trace, the batches or the
training metrics. At most ``MAX_AT_ONCE`` run concurrently, because training has priority.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np

from common.config import Policy, Sampling
from common.errors import one_line
from common.seeds import derive_seed
from common.sequence import Ids, MixedSequence, Prompt
from rollout_server.controller import SwitchingController
from rollout_server.engines.protocol import Engine
from rollout_server.inspector.live_records import (
    LiveEnd,
    LiveFailure,
    LivePiece,
    LiveRefusal,
    LiveRequest,
    LiveStart,
    LiveTokens,
)
from rollout_server.policies import make_policy
from rollout_server.rollouts import LiveContext, RolloutSpec
from rollout_server.sequence_builder import SequenceBuilder
from rollout_server.traces.columns import TokenColumns

MAX_AT_ONCE = 4
TIMEOUT_S = 600.0
_POLL_EVERY_S = 0.05  # tokens decided within this interval are sent together
_CHUNK_TOKENS = 8  # upper limit; smaller than in training, so that tokens appear early; does not change any token


class LiveWriter:
    """Belongs to one event loop, like the engines. ``tokenizer`` is the student's."""

    def __init__(
        self, spec: RolloutSpec, context: LiveContext, *, student: Engine, teacher: Engine, tokenizer: Any
    ) -> None:
        self._spec = spec
        self._context = context
        self._student = student
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._columns = TokenColumns(self._token_texts, spec.trace.top_alternatives)
        self._num_running = 0

    async def write(self, request: LiveRequest) -> AsyncGenerator[LivePiece, None]:
        """Yield a LiveStart, LiveTokens as they are decided, and a LiveEnd.

        Consumes one request; waits for the engines; stops at the sequence's end, after ``TIMEOUT_S``, or when closed.
        After closing, no request is left running. Raises LiveRefusal before the first token, LiveFailure after it.
        """
        if self._num_running >= MAX_AT_ONCE:
            raise LiveRefusal("busy", f"{MAX_AT_ONCE} live sequences are running already; training has priority")
        policy = request.policy or self._spec.policy
        token_ids = self._token_ids(request)
        sampling = self._sampling(request, token_ids.size)
        prompt = _prompt(token_ids, request, policy)
        self._num_running += 1
        controller = self._controller(policy, sampling)
        builder = controller.new_builder(prompt)
        started_s = time.perf_counter()
        writing = asyncio.create_task(controller.write(builder))
        try:
            yield _start(prompt, request, policy, sampling, self._decode(prompt.token_ids))
            known_texts: set[int] = set()
            num_shown = 0
            while True:
                left_s = started_s + TIMEOUT_S - time.perf_counter()
                await asyncio.wait({writing}, timeout=min(_POLL_EVERY_S, max(left_s, 0.0)))
                is_done = writing.done()
                if builder.num_parts > num_shown:
                    piece = self._piece(builder, policy, num_shown, known_texts)
                    num_shown = builder.num_parts
                    yield piece
                if is_done:
                    break
                if left_s <= 0:
                    raise LiveFailure(
                        f"the sequence did not finish within {TIMEOUT_S:g} s; {len(builder)} tokens were generated"
                    )
            if error := writing.exception():
                raise LiveFailure(f"{type(error).__name__}: {one_line(error)}") from error
            yield self._end(builder.seal(policy.type), seconds=time.perf_counter() - started_s)
        finally:
            self._num_running -= 1
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    def _controller(self, policy: Policy, sampling: Sampling) -> SwitchingController:
        return SwitchingController(
            student=self._student,
            teacher=self._teacher,
            policy=policy,
            sampling=sampling,
            top_logprobs=self._spec.top_logprobs,
            stop_token_ids=self._spec.stop_token_ids,
            live=True,
        )

    def _token_ids(self, request: LiveRequest) -> Ids:
        """[P] Tokenized like the run's own prompts."""
        if not isinstance(request.prompt, str):
            vocabulary_size = len(self._tokenizer)
            if not all(0 <= token_id < vocabulary_size for token_id in request.prompt):
                raise LiveRefusal("invalid", f"prompt_token_ids must be in 0..{vocabulary_size - 1}")
            return np.asarray(request.prompt, np.int32)
        as_chat = self._context.prompts_as_chat if request.as_chat is None else request.as_chat
        if not as_chat:
            return np.asarray(self._tokenizer(request.prompt).input_ids, np.int32)
        if not self._tokenizer.chat_template:
            raise LiveRefusal("invalid", "as_chat: the student's tokenizer has no chat template")
        messages = [{"role": "user", "content": request.prompt}]
        encoding = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return np.asarray(encoding["input_ids"], np.int32)

    def _sampling(self, request: LiveRequest, num_prompt_tokens: int) -> Sampling:
        """The run's sampling settings with the request's overrides, limited by the context length."""
        context = self._context.max_model_len
        room = context - num_prompt_tokens
        if num_prompt_tokens < 1 or room < 1:
            raise LiveRefusal("invalid", f"the prompt has {num_prompt_tokens} tokens, expected 1 to {context - 1}")
        if request.max_new_tokens is not None and request.max_new_tokens > room:
            raise LiveRefusal(
                "invalid",
                f"max_new_tokens must be <= {room} ({num_prompt_tokens} prompt tokens in a context of "
                f"{context}), got {request.max_new_tokens}",
            )
        wanted = {
            "max_new_tokens": request.max_new_tokens or min(self._spec.sampling.max_new_tokens, room),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "chunk_tokens": min(self._spec.sampling.chunk_tokens, _CHUNK_TOKENS),
        }
        return self._spec.sampling.model_copy(update={k: v for k, v in wanted.items() if v is not None})

    def _piece(self, builder: SequenceBuilder, policy: Policy, first_part: int, known_texts: set[int]) -> LiveTokens:
        excerpt = builder.excerpt(policy.type, first_part)
        first_position = len(builder) - len(excerpt)
        tokens = [replace(t, position=first_position + t.position) for t in self._columns.records(excerpt)]
        alternatives = {i for t in tokens for ids in (t.student_top_ids, t.teacher_top_ids) for i in ids or ()}
        texts = self._columns.texts_of(sorted(alternatives - known_texts))
        known_texts |= alternatives
        return LiveTokens(tokens=tokens, texts=texts)

    def _end(self, sequence: MixedSequence, *, seconds: float) -> LiveEnd:
        versions = sequence.weight_versions[sequence.weight_versions >= 0]
        return LiveEnd(
            completion_text=self._decode(sequence.token_ids),
            finish_reason=sequence.finish_reason,
            num_tokens=len(sequence),
            num_teacher_tokens=sequence.num_teacher_tokens,
            switches=sequence.switches.tolist(),
            num_wasted_tokens=sequence.num_wasted_tokens,
            mean_divergence=None if math.isnan(sequence.mean_divergence) else sequence.mean_divergence,
            weight_version_min=int(versions.min()) if versions.size else None,
            weight_version_max=int(versions.max()) if versions.size else None,
            seconds=seconds,
        )

    def _decode(self, token_ids: Ids) -> str:
        text: str = self._tokenizer.decode(token_ids.tolist())
        return text

    def _token_texts(self, token_ids: list[int]) -> list[str]:
        return [self._tokenizer.decode([token_id]) for token_id in token_ids]


def _prompt(token_ids: Ids, request: LiveRequest, policy: Policy) -> Prompt:
    """A prompt with a unique id. The same seed always gives the same tokens."""
    prompt = Prompt(prompt_id=f"live-{uuid4().hex}", token_ids=token_ids, seed=derive_seed("live", request.seed))
    if make_policy(policy).uses_dataset_answer(prompt.seed):
        raise LiveRefusal("invalid", f"policy {policy.type} uses dataset answers, and a live prompt has none")
    return prompt


def _start(prompt: Prompt, request: LiveRequest, policy: Policy, sampling: Sampling, text: str) -> LiveStart:
    return LiveStart(
        policy=policy,
        prompt_text=text,
        num_prompt_tokens=prompt.token_ids.size,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=request.seed,
    )
