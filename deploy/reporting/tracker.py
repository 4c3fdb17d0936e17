"""The interface of a tracker."""

from collections.abc import Mapping
from typing import Literal, Protocol

Metrics = Mapping[str, float | int]
Outcome = Literal["finished", "failed"]


class Tracker(Protocol):
    """A destination for metrics. After creation it is called from one thread."""

    def log(self, step: int, metrics: Metrics) -> None: ...
    def close(self, outcome: Outcome) -> None: ...
