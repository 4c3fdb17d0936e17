"""Lists the segments in a trace's folder, and checks whether they can be read. Independent of the queries."""

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
    """A segment's present state. ``signature`` changes when its files change."""

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
    """The current segment of every step, by step: the one with the highest attempt. A missing folder has none.

    Scans again until the folder's list is the same before and after. Otherwise a segment that is replaced during the
    scan would look broken.
    """
    while True:
        try:
            names = _names(folder)
            parsed = {name: place for name in names if (place := parse_segment_name(name)) is not None}
            newest = {parsed[name][0]: name for name in sorted(parsed, key=parsed.__getitem__)}
            segments = [Segment(name, step, _signature(folder / name)) for step, name in newest.items()]
            if _names(folder) == names:
                return segments
        except FileNotFoundError:
            return []


def _names(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if parse_segment_name(name)}
