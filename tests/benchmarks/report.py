"""Results as files: rollouts.json (a fixed schema), rollouts_details.json (everything measured), README.md's table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.rollouts_plot import plot
from tests.benchmarks.work import OfflineTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy on one pair: medians over the repetitions. Shares are fractions."""

    pair: str
    policy: str
    settings: dict[str, Any]
    in_flight: int
    sequences: int
    max_new_tokens: int
    chunk_tokens: int
    tokens: int
    teacher_share: float  # of the tokens
    first_switch_deciles: list[float]  # positions, over the sequences that switched
    switched: float  # share of the sequences
    wall_s: float
    walls_s: list[float]
    offline: OfflineTimes
    efficiency_serial: float
    efficiency_parallel: float
    split_efficiency_serial: float  # the teacher reading offline as it does online: prompts first, without log-probs
    split_efficiency_parallel: float
    lockstep_s_per_token: float
    wasted_student_tokens: float  # of all tokens the student engine wrote
    recomputed_teacher_tokens: float  # of the tokens the teacher had to read
    controller_us_per_token: float
    cpu_shares: dict[str, float]  # processor time of each process over the wall time
    teacher_requests: int
    teacher_decode_batch: float  # sequences in a step that decodes
    messages_per_token: float  # between the controller and both engines, to and fro
    bytes_per_token: float  # of the arrays in them

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def key(self) -> tuple[str, str, int, int]:
        return (self.pair, self.policy, self.in_flight, self.max_new_tokens)

    def overhead(self, on_policy: "PolicyResult | None") -> float | None:
        """Time a token over on-policy's."""
        return None if on_policy is None else on_policy.tokens_per_s / self.tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityResult:
    """One controller over a number of replicas of each role, in the steady state. Shares are fractions."""

    replicas: int
    student_busy: float  # of the wall time, with a step under way, over the replicas
    teacher_busy: float
    tokens_per_s: float  # in finished mixed sequences
    controller_us_per_token: float
    student_at_nominal: float  # work done, in seconds at the nominal speeds, over the wall time
    teacher_at_nominal: float
    unused_student_tokens: float  # of all tokens the student engines wrote, the share that is in no sequence
    wasted_student_tokens: float  # of what the controller got, the share past a switch
    teacher_share: float  # of the tokens
    switched: float  # share of the sequences
    sequences: int
    wall_s: float
    controller_cpu: float  # cores
    engines_cpu: float  # cores, all engine actors
    machine_cpu: float  # cores, everything
    messages_per_token: float | None = None  # between the controller and all engines, to and fro
    bytes_per_token: float | None = None  # of the arrays in them


def write(folder: Path, results: Sequence[PolicyResult]) -> None:
    """Replace the rows measured now, keep the others and the capacity table."""
    folder.mkdir(parents=True, exist_ok=True)
    details_file, summary_file = folder / "rollouts_details.json", folder / "rollouts.json"
    known = {_key(row): row for row in _read(details_file).get("results", [])}
    for result in results:
        row = _details(result, results)
        known[_key(row)] = row
    rows = [known[key] for key in sorted(known)]
    _dump(details_file, {**_read(details_file), "results": rows})
    _dump(
        summary_file,
        {
            "results": [{name: row[name] for name in _SUMMARY} for row in rows],
            "capacity": _read(summary_file).get("capacity", []),
        },
    )
    _replace_table(folder / "README.md", "rollouts", _table(rows))
    plot(rows, folder / "rollouts.svg")


def write_capacity(folder: Path, results: Sequence[CapacityResult]) -> None:
    """Replace the rows of these numbers of replicas, keep everything else."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {result.replicas: result for result in [*read_capacity(folder), *results]}
    rows = [_rounded(asdict(known[replicas])) for replicas in sorted(known)]
    details_file, summary_file = folder / "rollouts_details.json", folder / "rollouts.json"
    _dump(details_file, {**_read(details_file), "capacity": rows})
    capacity = [{name: row[name] for name in _CAPACITY_SUMMARY} for row in rows]
    _dump(summary_file, {**_read(summary_file), "capacity": capacity})
    _replace_table(folder / "README.md", "capacity", _capacity_table(rows))


def read_capacity(folder: Path) -> list[CapacityResult]:
    """What was measured before."""
    return [CapacityResult(**row) for row in _read(folder / "rollouts_details.json").get("capacity", [])]


def table(results: Sequence[PolicyResult]) -> str:
    """For the terminal and the page."""
    return _table([_details(result, results) for result in results])


_SUMMARY = (
    "pair",
    "policy",
    "in_flight",
    "sequences",
    "tokens",
    "wall_s",
    "tokens_per_s",
    "efficiency_serial",
    "efficiency_parallel",
    "overhead_vs_on_policy",
    "speedup_vs_lockstep",
    "wasted_student_tokens",
    "recomputed_teacher_tokens",
    "controller_us_per_token",
)


def _capacity_table(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "| replicas of each role | student busy | teacher busy | at nominal speed (student, teacher) | tok/s "
        "| controller us/token | messages, bytes a token | controller cores | all cores | unused |\n"
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    lines = [
        f"| {row['replicas']} | {row['student_busy']:.2f} | {row['teacher_busy']:.2f} "
        f"| {row['student_at_nominal']:.2f}, {row['teacher_at_nominal']:.2f} | {row['tokens_per_s']:.0f} "
        f"| {row['controller_us_per_token']:.1f} | {_traffic(row)} | {row['controller_cpu']:.2f} "
        f"| {row['machine_cpu']:.2f} | {row['unused_student_tokens']:.3f} |"
        for row in rows
    ]
    return "\n".join([head, *lines])


_CAPACITY_SUMMARY = (
    "replicas",
    "student_busy",
    "teacher_busy",
    "student_at_nominal",
    "teacher_at_nominal",
    "tokens_per_s",
    "controller_us_per_token",
)


def _details(result: PolicyResult, results: Sequence[PolicyResult]) -> dict[str, Any]:
    on_policy = {other.policy: other for other in results}.get("on_policy")
    row = asdict(result)
    row["tokens_per_s"] = result.tokens_per_s
    row["overhead_vs_on_policy"] = result.overhead(on_policy)
    row["speedup_vs_lockstep"] = result.lockstep_s_per_token * result.tokens_per_s
    row["bound_serial_s"], row["bound_parallel_s"] = result.offline.serial_s, result.offline.parallel_s
    row["predicted_overhead"] = None if on_policy is None else _predicted_s(result) / _predicted_s(on_policy)
    row["teacher_decode_share"] = result.offline.teacher_write_s / result.offline.split_teacher_s
    rounded: dict[str, Any] = _rounded(row)
    return rounded


def _predicted_s(result: PolicyResult) -> float:
    """Seconds a token, by the cost model."""
    return result.offline.predicted_s / result.tokens


def _key(row: dict[str, Any]) -> tuple[str, str, int, int]:
    return (row["pair"], row["policy"], row["in_flight"], row["max_new_tokens"])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "| pair | policy | in flight | new tokens | tok/s | of serial bound | of parallel bound | with split reads "
        "| overhead | predicted | teacher decode | over lockstep | wasted | recomputed | messages, bytes a token "
        "| controller us/token |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    lines = [
        f"| {row['pair']} | `{row['policy']}` | {row['in_flight']} | {row['max_new_tokens']} "
        f"| {row['tokens_per_s']:.0f} | {row['efficiency_serial']:.2f} | {row['efficiency_parallel']:.2f} "
        f"| {row['split_efficiency_serial']:.2f}, {row['split_efficiency_parallel']:.2f} "
        f"| {_or_dash(row['overhead_vs_on_policy'])} | {_or_dash(row['predicted_overhead'])} "
        f"| {row['teacher_decode_share']:.2f} "
        f"| {row['speedup_vs_lockstep']:.1f} | {row['wasted_student_tokens']:.3f} "
        f"| {row['recomputed_teacher_tokens']:.3f} | {_traffic(row)} | {row['controller_us_per_token']:.0f} |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def _traffic(row: dict[str, Any]) -> str:
    """Messages and bytes a token; a dash for a row measured before they were counted."""
    if row.get("messages_per_token") is None:
        return "-"
    return f"{row['messages_per_token']:.3f}, {row['bytes_per_token']:.0f}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _replace_table(page: Path, name: str, rows: str) -> None:
    begin, end = f"<!-- {name}: begin (written by make bench) -->", f"<!-- {name}: end -->"
    text = page.read_text() if page.exists() else "# Benchmarks\n"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}\n{rows}\n{end}{rest.partition(end)[2]}")


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return content


def _dump(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Four significant digits are more than repeat."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
