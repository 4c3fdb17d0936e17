"""The interface of a tracker."""

from collections.abc import Mapping
from typing import Literal, Protocol

Metrics = Mapping[str, float | int]
Outcome = Literal["finished", "failed"]


class Tracker(Protocol):
    """One place that shows metrics. Called from one thread after it is made."""

    def log(self, step: int, metrics: Metrics) -> None: ...
    def close(self, outcome: Outcome) -> None: ...
