"""Runs a part's checks in a process of its own, and a new one when that crashes or hangs: one check is lost, not all.

Consumes the child's records as it writes them, one line of JSON each; produces a record for every check asked for;
waits for the child, at most the part's minutes and for one check at most ``check_limit_s``; stops when each check has a
record or the minutes are over.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from tests.gpu.catalogue import Part
from tests.gpu.machine import ROOT
from tests.gpu.records import CheckRecord, record_from

_POLL_S = 0.1
_BEGIN_LIMIT_S = 180.0  # imports, on a machine that is busy
_PLUGINS = "vllm.general_plugins"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a child is told besides which checks to run."""

    device: str  # "cuda" or "cpu"
    minutes: float  # for each part
    engine: tuple[str, ...] = ()  # KEY=VALUE of EngineSettings, for every engine
    check_limit_s: float = 300.0
    logs: Path = ROOT / "build" / "gpu"
    module: str | None = None  # in place of the part's own; for tests


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """How one child ended."""

    records: list[CheckRecord]
    interrupted: str | None  # the check under way when it ended
    why: str  # in words; empty where it ended as it should
    out_of_time: bool  # the part's minutes were over


def run_part(part: Part, checks: Sequence[str], options: Options) -> list[CheckRecord]:
    """A record for each of these checks, in their order."""
    deadline_s = time.monotonic() + 60.0 * options.minutes
    records: dict[str, CheckRecord] = {}
    while waiting := [check for check in checks if check not in records]:
        ended = _run_child(part, waiting, options, deadline_s)
        records |= {record.name: record for record in ended.records}
        if ended.out_of_time:
            begun = f" while {ended.interrupted} ran" if ended.interrupted is not None else ""
            why = f"the {options.minutes:g} minutes of part {part.letter} were over{begun}"
            records |= {check: _not_run(part, check, why) for check in checks if check not in records}
        elif ended.interrupted is not None:
            records[ended.interrupted] = CheckRecord(
                part=part.name, name=ended.interrupted, outcome="failed", reason=ended.why
            )
        elif not ended.records:  # it ended before its first check, as another process would
            waiting = [check for check in checks if check not in records]
            first = CheckRecord(part=part.name, name=waiting[0], outcome="failed", reason=ended.why)
            why = f"part {part.letter} could not begin: see {waiting[0]}"
            records |= {waiting[0]: first} | {check: _not_run(part, check, why) for check in waiting[1:]}
    return [records[check] for check in checks]


def none_run(part: Part, why: str) -> list[CheckRecord]:
    """Every check of a part, not run for one reason."""
    return [_not_run(part, check, why) for check in part.checks]


def _not_run(part: Part, check: str, why: str) -> CheckRecord:
    return CheckRecord(part=part.name, name=check, outcome="not run", reason=why)


def _run_child(part: Part, checks: Sequence[str], options: Options, deadline_s: float) -> _Ended:
    options.logs.mkdir(parents=True, exist_ok=True)
    log = options.logs / f"{part.name}.log"
    with tempfile.TemporaryDirectory(prefix="adaswitch-verify-") as scratch, log.open("ab") as log_file:
        folder = Path(scratch)
        (folder / "lines").touch()
        command = [sys.executable, "-m", "tests.gpu.child", options.module or part.module, part.name]
        command += ["--device", options.device, "--folder", scratch, "--checks", *checks]
        command += ["--engine", *options.engine] if options.engine else []
        log_start = log_file.tell()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(options, folder),
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its engines' processes can be ended with it
        )
        try:
            why, out_of_time = _wait(child, folder / "lines", deadline_s, options.check_limit_s)
        finally:
            _end_group(child.pid)
            child.wait()
        records, under_way = _read(folder / "lines")
    why = why or (_died(child.returncode, log, log_start) if child.returncode else "")
    return _Ended(records=records, interrupted=under_way, why=why, out_of_time=out_of_time)


def _wait(child: subprocess.Popen[bytes], lines: Path, deadline_s: float, check_limit_s: float) -> tuple[str, bool]:
    """Until it ends or takes too long. Why it must be ended, and whether the part's time is over."""
    num_done, limit_s = 0, _BEGIN_LIMIT_S
    since_s = time.monotonic()
    while child.poll() is None:
        now_s = time.monotonic()
        if (num_lines := lines.read_bytes().count(b"\n")) != num_done:
            num_done, limit_s, since_s = num_lines, check_limit_s, now_s
        if now_s > deadline_s:
            return "out of time", True
        if now_s > since_s + limit_s:
            return f"no end within {limit_s:g} s", False
        time.sleep(_POLL_S)
    return "", False


def _read(lines: Path) -> tuple[list[CheckRecord], str | None]:
    """Records, and the check that began and has none."""
    rows = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
    records = [record_from(row["record"]) for row in rows if "record" in row]
    begun = [row["begins"] for row in rows if "begins" in row]
    done = {record.name for record in records}
    return records, next((check for check in begun if check not in done), None)


def _died(code: int, log: Path, log_start: int) -> str:
    with log.open("rb") as file:
        file.seek(log_start)
        said = file.read().decode(errors="replace").strip().splitlines()
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"its process {how}; its last line: {said[-1][:300] if said else 'none'}"


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _environment(options: Options, folder: Path) -> dict[str, str]:
    """The child's: our code, our plug-in for vLLM, and no GPU where the processor is asked for."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(_plugin(folder))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _plugin(folder: Path) -> Path:
    """Metadata as an installation leaves it, where the checkout is only on the path: vLLM's own processes find our
    weight transfer by its entry point.
    """
    site = folder / "site"
    site.mkdir()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][_PLUGINS]
    if {(it.name, it.value) for it in entry_points(group=_PLUGINS)} >= set(declared.items()):
        return site
    info = site / "adaswitch_verify-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adaswitch-verify\nVersion: 0\n")
    listed = "".join(f"{name} = {target}\n" for name, target in declared.items())
    (info / "entry_points.txt").write_text(f"[{_PLUGINS}]\n{listed}")
    return site
