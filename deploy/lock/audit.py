"""Checks lock files against the Python Packaging Advisory Database, with pip-audit. Each pinned version is checked
once, however many files contain it.

The exit code is 1 for a finding that ``audit.toml`` does not allow, and for an expired exception. If the service is not
available, a message says that nothing was checked, and the exit code is 0 unless ``--required`` is given.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ALLOWED_FILE = Path(__file__).parent / "audit.toml"
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedAdvisory:
    """An exception for one known advisory, for a limited time."""

    id: str
    package: str
    reason: str
    until: date


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """The result of an audit."""

    num_packages: int
    num_unchecked: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def was_possible(self) -> bool:
        return self.num_unchecked < self.num_packages


def read_exceptions(file: Path) -> list[AllowedAdvisory]:
    """Raises TypeError or KeyError for an entry without id, package, reason and date."""
    return [AllowedAdvisory(**entry) for entry in tomllib.loads(file.read_text()).get("allow", [])]


def judge(packages: Sequence[dict[str, Any]], exceptions: Sequence[AllowedAdvisory], today: date) -> AuditResult:
    """``packages``: pip-audit's ``dependencies``: name and version with ``vulns``, or a ``skip_reason``."""
    valid = {(p.package, p.id) for p in exceptions if p.until >= today}
    found: dict[tuple[str, str], str] = {}
    used = set()
    for package in packages:
        for advisory in package.get("vulns", []):
            keys = {(package["name"], name) for name in (advisory["id"], *advisory.get("aliases", []))}
            if keys & valid:
                used |= keys
                continue
            fixed = ", ".join(advisory.get("fix_versions", [])) or "no version"
            found[package["name"], advisory["id"]] = (
                f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}"
            )
    ended = [f"{p.package}: the exception for {p.id} expired on {p.until}" for p in exceptions if p.until < today]
    unneeded = [p for p in exceptions if (p.package, p.id) not in used]
    unchecked = [package["name"] for package in packages if "skip_reason" in package]
    return AuditResult(
        num_packages=len(packages),
        num_unchecked=len(unchecked),
        problems=(*found.values(), *ended),
        notes=(
            *(f"{p.package}: {p.id} is allowed but was not found" for p in unneeded),
            *([f"unknown to the service: {', '.join(unchecked)}"] if unchecked else []),
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock_files", type=Path, nargs="+")
    parser.add_argument("--required", action="store_true", help="fail if the service is not available")
    options = parser.parse_args(arguments)
    packages, reason = _check_all(pins_to_check([file.read_text() for file in options.lock_files]))
    result = judge(packages, read_exceptions(ALLOWED_FILE), date.today())
    if not result.was_possible:
        print(f"audit: NOTHING WAS CHECKED, the advisory service is not available: {reason}")
        return int(options.required)
    for line in result.notes:
        print(f"audit: note: {line}")
    for line in result.problems:
        print(f"audit: {line}", file=sys.stderr)
    asked = result.num_packages - result.num_unchecked
    print(f"audit: {asked} of {result.num_packages} packages checked, {len(result.problems)} problems")
    return int(bool(result.problems))


def pins_to_check(lock_texts: Sequence[str]) -> list[list[str]]:
    """All pins, each once, in as few lists as possible: pip-audit accepts only one version per package in a list."""
    lists: list[dict[str, str]] = []
    for line in dict.fromkeys(line for text in lock_texts for line in text.splitlines()):
        if "==" in line and not line.startswith("#"):
            name = line.partition("==")[0].lower()
            free = next((pins for pins in lists if name not in pins), None)
            if free is None:
                lists.append(free := {})
            free[name] = line
    return [list(pins.values()) for pins in lists]


def _check_all(lists_of_pins: Sequence[Sequence[str]]) -> tuple[list[dict[str, Any]], str]:
    """All results, and the reason if one is missing."""
    packages: list[dict[str, Any]] = []
    reason = "it knows none of the packages"
    with tempfile.TemporaryDirectory() as folder:
        for number, pins in enumerate(lists_of_pins):
            requirements = Path(folder) / f"{number}.txt"
            requirements.write_text("\n".join(pins) + "\n")
            answers, why_not = _ask(requirements)
            if not answers:
                packages += [{"name": pin.partition("==")[0], "skip_reason": why_not} for pin in pins]
                reason = why_not
            packages += answers
    return packages, reason


def _ask(requirements: Path) -> tuple[list[dict[str, Any]], str]:
    """pip-audit's result for each package, or none, and the reason in one line."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--format", "json"]
    command += ["--progress-spinner", "off", "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return [], f"no answer within {_TIMEOUT_S:g} s"
    try:
        return json.loads(done.stdout)["dependencies"], "it knows none of the packages"
    except (json.JSONDecodeError, KeyError):
        return [], (done.stderr.strip().splitlines() or ["no answer"])[-1]


if __name__ == "__main__":
    sys.exit(main())
