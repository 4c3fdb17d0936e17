"""How a part of a run says that it is well. Knows no one."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """One process's answer to who asks how it is. That it comes at all says that the process runs."""

    pid: int
    is_ready: bool = True  # False for a process that Ray has put in a dead one's place and nobody has started yet
    num_busy: int = 0  # calls under way that should move by themselves
    still_s: float = 0.0  # since the last of them moved
    failure: str | None = None  # why it can't work any more, though it answers
