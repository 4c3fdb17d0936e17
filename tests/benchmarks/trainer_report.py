"""The trainer's figures as files: trainer.json (a fixed schema) and the trainer's table in README.md.

trainer.json holds one number under each key and, under ``measured_on``, what each was measured on.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

KEYS = ("chunked_memory_ratio", "chunked_time_ratio", "step_tokens_per_s_vs_trl", "sync_seconds", "copy_seconds")
_FILE = "trainer.json"
_BEGIN, _END = "<!-- trainer: begin (written by make bench) -->", "<!-- trainer: end -->"
_HEAD = "| figure | measured | wanted | |\n|---|--:|--:|---|"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of trainer.json."""

    value: float
    measured_on: dict[str, Any]  # sizes, settings, machine, and what the number was made from


def write(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Replace the figures measured now, in the file and in the page's table; keep the others."""
    assert set(figures) <= set(KEYS), figures.keys()
    folder.mkdir(parents=True, exist_ok=True)
    known = read(folder)
    values = {**known, **{key: figure.value for key, figure in figures.items()}}
    measured_on = {
        **known.get("measured_on", {}),
        **{key: figure.measured_on for key, figure in figures.items()},
    }
    content = {key: values[key] for key in KEYS if key in values}
    content["measured_on"] = {key: measured_on[key] for key in KEYS if key in measured_on}
    (folder / _FILE).write_text(json.dumps(rounded(content), indent=1) + "\n")
    _replace_table(folder / "README.md", table(folder))


def read(folder: Path) -> dict[str, Any]:
    """What has been measured so far; empty before the first time."""
    file = folder / _FILE
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return content


def table(folder: Path) -> str:
    """Every figure that is known against its bound or its peer, for the terminal and the page."""
    values = read(folder)
    # (what, measured, the bound in words, the bound, the larger the better)
    rows: list[tuple[str, float, str, float, bool]] = []
    if "chunked_memory_ratio" in values:
        rows.append(("loss: peak memory over plain", values["chunked_memory_ratio"], "at most 0.25", 0.25, False))
    if "chunked_time_ratio" in values:
        rows.append(("loss: time over plain", values["chunked_time_ratio"], "at most 1.3", 1.3, False))
    if "step_tokens_per_s_vs_trl" in values:
        rows.append(("whole step: tokens/s over TRL's", values["step_tokens_per_s_vs_trl"], "at least 1.2", 1.2, True))
    if "sync_seconds" in values and "copy_seconds" in values:
        bound = 3 * values["copy_seconds"] + 0.2
        rows.append(("weight sync, s", values["sync_seconds"], f"at most {bound:.2f}", bound, False))
        rows.append(
            ("weight sync over a plain copy", values["sync_seconds"] / values["copy_seconds"], "", float("inf"), False)
        )
        if "probe_seconds" in (sync := values.get("measured_on", {}).get("sync_seconds", {})):
            rows.append(("probe after the sync, s", sync["probe_seconds"], "", float("inf"), False))
    return "\n".join([_HEAD, *(_row(*row) for row in rows)])


def _row(what: str, measured: float, wanted: str, bound: float, larger_is_better: bool) -> str:
    holds = measured >= bound if larger_is_better else measured <= bound
    return f"| {what} | {measured:.2f} | {wanted} | {'' if not wanted else 'yes' if holds else 'NO'} |"


def machine(*distributions: str) -> dict[str, Any]:
    """Processor, cores and the versions of those distributions that are installed."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: found for name in distributions if (found := _version(name)) is not None},
    }


def rounded(value: Any) -> Any:
    """Four significant digits are more than repeat."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _replace_table(page: Path, rows: str) -> None:
    text = page.read_text() if page.exists() else "# Benchmarks\n"
    if _BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Trainer\n\n{_BEGIN}\n{_END}\n"
    before, _, rest = text.partition(_BEGIN)
    page.write_text(f"{before}{_BEGIN}\n{rows}\n{_END}{rest.partition(_END)[2]}")
