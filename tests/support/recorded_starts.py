"""Actors that do nothing but say when they were started, and which GPUs they could see."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.health import Health
from common.sequence import Ids
from rollout_server.engines.protocol import EngineFacts, EngineSpec
from trainer.actors import LearnerSpec

FILE = "ADASWITCH_TEST_STARTS"
"""Names the file that they write to."""
TAKES_S = 0.5
"""How long a start takes, so that two of them side by side would overlap."""


def read_starts(file: Path) -> list[dict[str, Any]]:
    """Each start with ``name``, ``gpus``, ``began_s``, ``ended_s`` and what the actor was told, as they began."""
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda start: start["began_s"])


def _start(name: str, told: Mapping[str, object]) -> None:
    began_s = time.monotonic()
    time.sleep(TAKES_S)
    line = {"name": name, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "began_s": began_s}
    with Path(os.environ[FILE]).open("a") as file:
        file.write(json.dumps({**line, "ended_s": time.monotonic(), **told}) + "\n")


class RecordedEngineActor:
    """Stands for an engine."""

    def start(self, spec: EngineSpec, self_test_prefix: Ids) -> EngineFacts:
        _start(spec.name, {"settings": spec.settings.model_dump(), "backend": spec.weight_transfer_backend})
        return EngineFacts(dtype="float32", max_model_len=128, top_logprobs=spec.top_logprobs)

    def health(self) -> Health:
        return Health(pid=os.getpid())

    def drop_calls(self) -> None: ...

    def shutdown(self) -> None: ...


class RecordedLearnerActor:
    """Stands for a rank of the learner."""

    def __init__(self, rank: int, spec: LearnerSpec) -> None:
        self._spec = spec

    def meeting_point(self) -> str:
        return "nowhere"

    def start(self, meeting_point: str) -> None:
        _start("learner", {"device": self._spec.device, "backend": self._spec.sync_backend})

    def health(self) -> Health:
        return Health(pid=os.getpid())

    def connect(self, transfer: object) -> None: ...

    def shutdown(self) -> None: ...


def overlap(starts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any two of them, in the order of their beginnings, went on at the same time."""
    return any(later["began_s"] < earlier["ended_s"] for earlier, later in pairwise(starts))
