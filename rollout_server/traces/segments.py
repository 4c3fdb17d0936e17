"""Which segments a trace's folder holds now, and whether they can be read. Knows nothing of what is asked of them."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import one_line
from rollout_server.traces.schema import SEQUENCES, SEQUENCES_FILE, TOKENS, TOKENS_FILE, VERSION_KEY, parse_segment_name


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment as it lies there now. ``signature`` changes when its files do."""

    name: str
    step: int
    signature: tuple[tuple[int, int], ...]  # (bytes, modification time in ns) of both files, empty if one is missing


def _signature(segment: Path) -> tuple[tuple[int, int], ...]:
    with suppress(FileNotFoundError):
        stats = [(segment / file).stat() for file in (SEQUENCES_FILE, TOKENS_FILE)]
        return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    return ()


def incompleteness(segment: Path) -> str | None:
    for file, expected in ((SEQUENCES_FILE, SEQUENCES), (TOKENS_FILE, TOKENS)):
        try:
            schema = pq.read_schema(segment / file)
        except FileNotFoundError:
            return f"{file} is missing"
        except (OSError, pa.ArrowException) as error:
            return f"{file}: {one_line(error)}"
        if not schema.equals(expected) or (schema.metadata or {}).get(VERSION_KEY) != expected.metadata[VERSION_KEY]:
            return f"{file} is not of schema version {expected.metadata[VERSION_KEY].decode()}"
    return None


def scan(folder: Path) -> list[Segment]:
    """The segment that counts of every step, by step: the one of the highest attempt. A folder that is not there yet
    holds none.

    Looks again until the folder held the same names before and after, for one that is replaced meanwhile would be
    taken for a broken one.
    """
    while True:
        try:
            names = _names(folder)
            newest = {step: name for (step, _), name in sorted((attempt, name) for name, attempt in names.items())}
            segments = [Segment(name, step, _signature(folder / name)) for step, name in newest.items()]
            if _names(folder) == names:
                return segments
        except FileNotFoundError:
            return []


def _names(folder: Path) -> dict[str, tuple[int, int]]:
    """Each segment's name, with its step and attempt."""
    return {name: parsed for name in os.listdir(folder) if (parsed := parse_segment_name(name))}
