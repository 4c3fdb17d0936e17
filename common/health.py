"""The answer of a run's processes to a health check. Imports nothing of ours."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """One process's answer to a health check. Any answer shows that the process is running."""

    pid: int
    is_ready: bool = True  # False if Ray has replaced a dead process and the new one is not set up yet
    num_busy: int = 0  # calls in progress that should advance without further input
    still_s: float = 0.0  # time since one of them last advanced
    failure: str | None = None  # why the process can't work any more although it answers
