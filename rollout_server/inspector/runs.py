"""Runs on disk: their names, the files in their folders, and an index of each trace.

A run's name is looked up in the folder's listing and never joined to a path directly, so ``..`` or a name with a slash
is a run that does not exist.
"""

import json
import math
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from common.config import Policy
from common.run_dir import CONFIG, METRICS, SUMMARY, TRACES
from rollout_server.inspector.problems import ProblemError
from rollout_server.policies import divergence_of
from rollout_server.traces.index import TraceIndex
from rollout_server.traces.segments import scan

_MAX_OPEN_INDEXES = 4
_MAX_FILE_BYTES = 64 * 2**20  # of config.yaml, metrics.jsonl, summary.json
_POLICY: TypeAdapter[Policy] = TypeAdapter(Policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """A run's files besides its trace. Unreadable parts are None or left out, and listed in ``problems``."""

    policy: Policy | None
    top_logprobs: int | None  # length of the recorded teacher's lists
    config_text: str | None
    summary: dict[str, float | int | str | None] | None
    metrics: dict[int, dict[str, float]]  # by step; evaluation and training metrics of a step are merged
    problems: list[str]

    @property
    def divergence(self) -> str | None:
        """Type of the recorded divergences."""
        return divergence_of(self.policy).type if self.policy else None


@dataclass(slots=True)
class _Cached:
    signature: tuple[tuple[int, int], ...]
    files: RunFiles


@dataclass(slots=True)
class RunStore:
    """The runs in one folder. Thread-safe."""

    folder: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _indexes: OrderedDict[str, TraceIndex] = field(default_factory=OrderedDict)
    _files: dict[str, _Cached] = field(default_factory=dict)

    def close(self) -> None:
        with self._lock:
            while self._indexes:
                self._indexes.popitem()[1].close()

    def names(self) -> list[tuple[str, float]]:
        """Name and time of the last change of every run, most recently changed first."""
        paths = [self.folder / name for name in os.listdir(self.folder)]
        runs = [(path.name, _modified(path)) for path in paths if _is_run(path)]
        return sorted(runs, key=lambda run: (-run[1], run[0]))

    def path(self, name: str) -> Path:
        """A run's folder. Raises a 404 if there is no such run."""
        if name in os.listdir(self.folder) and _is_run(self.folder / name):
            return self.folder / name
        raise ProblemError(404, "unknown-run", f"no run {name[:100]!r}")

    def index(self, name: str, timeout_s: float) -> TraceIndex:
        """The index of a run's trace, up to date. Raises a 404 or QueryTimeout."""
        path = self.path(name)
        with self._lock:
            index = self._indexes.get(name)
            if index is None:
                index = self._indexes[name] = TraceIndex(path / TRACES)
            self._indexes.move_to_end(name)
            if len(self._indexes) > _MAX_OPEN_INDEXES:
                # Not closed here, because a request may still use it. It is freed with the last reference.
                self._indexes.popitem(last=False)
        index.refresh(timeout_s)
        return index

    def opened(self) -> list[tuple[str, TraceIndex]]:
        """Recently used runs and their indexes."""
        with self._lock:
            return list(self._indexes.items())

    def files(self, name: str) -> RunFiles:
        """The present content of the run's files. Raises a 404."""
        path = self.path(name)
        signature = tuple(_stat(path / file) for file in (CONFIG, METRICS, SUMMARY))
        cached = self._files.get(name)
        if cached is None or cached.signature != signature:
            cached = self._files[name] = _Cached(signature, _read_files(path))
        return cached.files


def num_segments(path: Path) -> tuple[int, int | None]:
    """Number of finished segments in a run's trace, and the last one's step."""
    segments = scan(path / TRACES)
    return len(segments), segments[-1].step if segments else None


def _is_run(path: Path) -> bool:
    if not path.name.isprintable() or path.name.startswith("."):
        return False
    return any((path / name).exists() for name in (CONFIG, TRACES, METRICS))


def _modified(path: Path) -> float:
    return max((_stat(path / name)[1] for name in ("", METRICS, SUMMARY, TRACES)), default=0) / 1e9


def as_time(seconds: float) -> datetime:
    """UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (-1, 0)
    return stat.st_size, stat.st_mtime_ns


def _read_files(path: Path) -> RunFiles:
    problems: list[str] = []
    config_text = _text(path / CONFIG, problems)
    policy, top_logprobs = _policy(config_text, problems)
    summary_text = _text(path / SUMMARY, problems)
    summary = None
    if summary_text is not None:
        try:
            content = json.loads(summary_text, parse_constant=lambda _: None)
            summary = {str(k): v for k, v in content.items() if v is None or isinstance(v, str | int | float)}
        except (ValueError, AttributeError, RecursionError):
            problems.append("summary.json is not a JSON object")
    metrics = _metrics(_text(path / METRICS, problems), problems)
    return RunFiles(
        policy=policy,
        top_logprobs=top_logprobs,
        config_text=config_text,
        summary=summary,
        metrics=metrics,
        problems=problems,
    )


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            problems.append(f"{path.name} has more than {_MAX_FILE_BYTES} bytes")
            return None
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        problems.append(f"{path.name} can't be read")
        return None


def _policy(config_text: str | None, problems: list[str]) -> tuple[Policy | None, int | None]:
    if config_text is None:
        return None, None
    try:
        config = yaml.safe_load(config_text)
        policy = _POLICY.validate_python(config["policy"])
        top_logprobs = config.get("engines", {}).get("top_logprobs")
        return policy, top_logprobs if isinstance(top_logprobs, int) else None
    except (yaml.YAMLError, ValidationError, KeyError, TypeError, AttributeError, RecursionError):
        problems.append("config.yaml has no valid policy")
        return None, None


def _metrics(text: str | None, problems: list[str]) -> dict[int, dict[str, float]]:
    metrics: dict[int, dict[str, float]] = {}
    num_unreadable = 0
    lines = (text or "").splitlines()
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            step = record["step"]
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
            if isinstance(step, int) and 0 <= step < 2**31:
                metrics.setdefault(step, {}).update(numbers)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            num_unreadable += number < len(lines) - 1  # the last line may be incomplete
    if num_unreadable:
        problems.append(f"metrics.jsonl has {num_unreadable} unreadable line(s)")
    return metrics
