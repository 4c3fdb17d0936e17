"""Actors whose engine follows a script, and whose learner is not asked whether the engine has its weights.

Ray's workers import this module to start one, and so it imports no more than an actor needs.
"""

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.sequence import Ids, TopLogprobs
from rollout_server.actors import EngineActor
from rollout_server.engines.protocol import EngineFacts, EngineSpec, GoOn, WriteRequest, Written
from rollout_server.engines.scripted import HashedScript, ScriptedEngine
from tests.support.unprobed import Unprobed
from trainer.actors import LearnerActor
from trainer.probe_statistics import ProbeNoise, ProbeReport

VOCABULARY_SIZE, EOS_TOKEN_ID = 32, 2
_SCRIPT = HashedScript(vocabulary_size=VOCABULARY_SIZE, seed=1, eos_token_id=EOS_TOKEN_ID)
POISON = "ADASWITCH_TEST_POISON"
"""Names a file with the token ids of a prompt that ends the process of the student's engine. Where there is none, no
prompt does.
"""
DELAY_S = 0.02


class PlayedEngine(ScriptedEngine):
    """A scripted engine with all that an actor asks for, and a weakness for one prompt."""

    failure: str | None = None

    def __init__(self, spec: EngineSpec) -> None:
        script = _SCRIPT if spec.name == "teacher" else _SCRIPT.student(seed=2)
        super().__init__(script, top_logprobs=spec.top_logprobs, delay=lambda: DELAY_S)
        poison = os.environ.get(POISON)
        self._poison = [int(number) for number in Path(poison).read_text().split()] if poison else None
        self.facts = EngineFacts(dtype="float32", max_model_len=128, top_logprobs=spec.top_logprobs)
        self._is_student = spec.name == "student"

    async def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        if self._is_student and self._poison and request.prefix[: len(self._poison)].tolist() == self._poison:
            os._exit(1)
        pieces = super().stream(request)
        go_on = None
        try:
            while True:
                go_on = yield await pieces.asend(go_on)
        except StopAsyncIteration:
            return
        finally:
            await pieces.aclose()

    async def init_weight_transfer(self, transfer_info: Mapping[str, object]) -> None:
        """Nothing is transferred but the version."""

    def shutdown(self) -> None:
        """Nothing outlives this process."""


class PlayedEngineActor(EngineActor):
    def _start_engine(self, spec: EngineSpec) -> Any:
        return PlayedEngine(spec)


class StillbornEngineActor(PlayedEngineActor):
    def _start_engine(self, spec: EngineSpec) -> Any:
        os._exit(1)


class UnprobedLearnerActor(LearnerActor):
    def measure_probe_noise(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> ProbeNoise:
        return ProbeNoise(rms=0.0, p99=0.0)

    def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None: ...

    def check_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> ProbeReport:
        return Unprobed.report()


class FarLearnerActor(UnprobedLearnerActor):
    """As on a machine that does not share the run's folder."""

    def sees(self, path: Path) -> bool:
        return False
