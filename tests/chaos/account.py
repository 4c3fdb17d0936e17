"""What a run's folder says was done: every prompt trained once, by weights of the step before. Reads files alone.

Three accounts that must agree: the traces' sequences, the steps of ``metrics.jsonl``, and the place in the data at
which the last checkpoint stands. The program's own summary is not asked.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rollout_server.traces.schema import SEQUENCES_FILE, parse_segment_name

Sample = tuple[int, str, int]
"""Epoch, prompt id, sample index."""
_COLUMNS = ["epoch", "prompt_id", "sample_index", "weight_version_min", "weight_version_max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What was to be trained, what was, and everything that does not agree."""

    num_expected: int
    num_trained: int  # different samples
    num_twice: int  # samples beyond the first time
    complaints: tuple[str, ...]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All lines but one that is half written. A file that is not there has none."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def take_account(run: Path, *, num_steps: int, prompts_per_step: int, num_rows: int) -> Account:
    """Of a run with one sample of each prompt over ``num_rows`` rows, whose ids are the rows' numbers."""
    complaints: list[str] = []
    times: Counter[Sample] = Counter()
    segments = segments_of(run / "traces")
    if sorted(segments) != list(range(1, num_steps + 1)):
        complaints.append(f"traces: steps {spans(segments)}, expected 1 to {num_steps}")
    for step, segment in sorted(segments.items()):
        rows = pq.read_table(segment / SEQUENCES_FILE, columns=_COLUMNS).to_pylist()
        times.update((row["epoch"], row["prompt_id"], row["sample_index"]) for row in rows)
        if len(rows) != prompts_per_step:
            complaints.append(f"traces: step {step} has {len(rows)} sequences, expected {prompts_per_step}")
        versions = {row[column] for row in rows for column in _COLUMNS[3:]} - {None, step - 1}
        if versions:
            complaints.append(f"traces: step {step} has tokens of weight versions {sorted(versions)}")
    num_expected = num_steps * prompts_per_step
    complaints += _wrong_samples(times, num_expected, num_rows)
    complaints += _wrong_steps(run, num_steps, prompts_per_step)
    complaints += _wrong_cursor(run, num_steps, num_expected, num_rows)
    return Account(
        num_expected=num_expected,
        num_trained=len(times),
        num_twice=times.total() - len(times),
        complaints=tuple(complaints),
    )


def segments_of(traces: Path) -> dict[int, Path]:
    """Each step's newest segment."""
    newest: dict[int, tuple[int, Path]] = {}
    for path in traces.iterdir() if traces.is_dir() else ():
        if (name := parse_segment_name(path.name)) is not None:
            step, attempt = name
            newest[step] = max(newest.get(step, (-1, path)), (attempt, path))
    return {step: path for step, (_, path) in newest.items()}


def spans(numbers: Iterable[int]) -> str:
    """``1-3, 5``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found) or "none"


def _wrong_samples(times: Mapping[Sample, int], num_expected: int, num_rows: int) -> list[str]:
    """Every row once in each whole epoch, different rows in the one that was begun, nothing else."""
    complaints = [f"traces: {sample} {count} times" for sample, count in times.items() if count > 1]
    whole, begun = divmod(num_expected, num_rows)
    every_row = {str(row) for row in range(num_rows)}
    for epoch in {*range(whole + bool(begun)), *(epoch for epoch, _, _ in times)}:
        rows = {prompt_id for of_epoch, prompt_id, _ in times if of_epoch == epoch}
        wanted = num_rows if epoch < whole else begun if epoch == whole else 0
        if len(rows) != wanted or not rows <= every_row:
            complaints.append(f"traces: {len(rows)} prompts of epoch {epoch}, expected {wanted} of {num_rows}")
    return complaints


def _wrong_steps(run: Path, num_steps: int, prompts_per_step: int) -> list[str]:
    trained = [line for line in lines_of(run / "metrics.jsonl") if "train/loss_nats" in line]
    steps = [line["step"] for line in trained]
    complaints = []
    if steps != list(range(1, num_steps + 1)):
        complaints.append(f"metrics.jsonl: {len(steps)} steps ({spans(set(steps))}), expected 1 to {num_steps}, once")
    wrong = {line["step"]: line["rollout/sequences"] for line in trained}
    wrong = {step: count for step, count in wrong.items() if count != prompts_per_step}
    return [*complaints, *(f"metrics.jsonl: step {step} trained {count} sequences" for step, count in wrong.items())]


def _wrong_cursor(run: Path, num_steps: int, num_expected: int, num_rows: int) -> list[str]:
    state = run / "checkpoints" / f"step-{num_steps:06d}" / "state.json"
    if not state.exists():
        return [f"checkpoints: none after step {num_steps}"]
    cursor = json.loads(state.read_text())["cursor"]
    found = cursor["epoch"] * num_rows + cursor["position"]
    return [] if found == num_expected else [f"checkpoints: the last stands at prompt {found}, expected {num_expected}"]
