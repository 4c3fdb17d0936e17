"""The findings as text and as JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.text import Text

from deploy.doctor.facts import Facts
from deploy.doctor.finding import Finding
from deploy.reporting.terminal import make_console

_STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def print_findings(findings: Sequence[Finding]) -> None:
    """One line per finding, and the number of problems."""
    console = make_console()
    topic_width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        line = Text.assemble(
            (f"{finding.level:<7}", _STYLES[finding.level]), f"  {finding.topic:<{topic_width}}  {finding.text}"
        )
        console.print(line, soft_wrap=True)
    console.print(summary(findings), soft_wrap=True)


def summary(findings: Sequence[Finding]) -> str:
    count = Counter(finding.level for finding in findings)
    if not count["warning"] and not count["failure"]:
        return "all ok"
    return f"{_number(count['failure'], 'failure')}, {_number(count['warning'], 'warning')}"


def as_json(facts: Facts, findings: Sequence[Finding]) -> str:
    """``findings`` (level, topic, text), and the ``facts`` behind them."""
    known = asdict(facts)
    known["processor"]["flags"] = sorted(facts.processor.flags)
    return json.dumps({"findings": [asdict(finding) for finding in findings], "facts": known}, indent=2)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
