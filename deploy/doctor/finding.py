"""The result of a check, in one line."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was checked, what was found, and what to do if there is a problem."""

    level: Level
    topic: str
    text: str


def ok(topic: str, text: str) -> Finding:
    return Finding(level="ok", topic=topic, text=text)


def warning(topic: str, text: str) -> Finding:
    """A run may work, possibly slower than it could."""
    return Finding(level="warning", topic=topic, text=text)


def failure(topic: str, text: str) -> Finding:
    """No run will work."""
    return Finding(level="failure", topic=topic, text=text)
