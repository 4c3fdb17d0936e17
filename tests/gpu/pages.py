"""What the documentation says of ``gpu.json``: each part's table, and the one sentence on what was never run.

A page holds a pair of comments; what stands between them is written here. Plain text in, plain text out.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from tests.gpu.catalogue import PARTS, Part
from tests.gpu.records import CheckRecord, Figure, Results, replace_text

PAGES = ("docs/gpu.md", "docs/install.md")
MARKED = re.compile(r"<!-- gpu: (\w+) -->\n.*?<!-- gpu: end -->", re.DOTALL)


def write(root: Path, results: Results) -> None:
    """Bring the pages up to date."""
    for name in PAGES:
        page = root / name
        replace_text(page, filled(page.read_text(), results))


def filled(text: str, results: Results) -> str:
    """A page's text with what belongs between its comments. KeyError where a comment names nothing known."""
    return MARKED.sub(lambda match: f"<!-- gpu: {match[1]} -->\n{blocks(results)[match[1]]}\n<!-- gpu: end -->", text)


def blocks(results: Results) -> Mapping[str, str]:
    """Everything that a page can have, by the name in its comment."""
    return {"status": status(results), "table": tables(results)}


def status(results: Results) -> str:
    """One paragraph: what was run and on which card, and what was never run on a GPU."""
    known = {record.key: record for record in results.checks}
    run, never = [], []
    for part in PARTS:
        records = [known[key] for check in part.checks if (key := (part.name, check)) in known]
        done = [record for record in records if record.was_run]
        if done:
            failed = [record.name for record in done if record.outcome == "failed"]
            said = f"{_within(part.title)}: {len(done)} of {len(part.checks)} checks on {_cards(done, results)}"
            run.append(said + (f", of which {len(failed)} failed ({', '.join(failed)})" if failed else ""))
        else:
            never.append(_within(part.title))
    sentences = [f"Run on GPUs: {'; '.join(run)}."] if run else []
    sentences += [f"**Never run on a GPU: {', '.join(never)}.**"] if never else []
    return " ".join(sentences)


def _within(title: str) -> str:
    """As it stands within a sentence."""
    return title[0].lower() + title[1:]


def tables(results: Results) -> str:
    """A heading and a table for each part."""
    return "\n\n".join(_table(part, results) for part in PARTS)


def _table(part: Part, results: Results) -> str:
    known = {record.name: record for record in results.checks if record.part == part.name}
    rows = [f"| `{name}` | {what} | {_outcome(known.get(name), results)} |" for name, what in part.checks.items()]
    head = "| check | shows that, or measures | outcome |\n|---|---|---|"
    return "\n".join([f"### {part.title} (part {part.letter})\n", head, *rows])


def _outcome(record: CheckRecord | None, results: Results) -> str:
    if record is None or record.measured is None:
        return "never run on a GPU"
    if not record.was_run:
        return _cell(f"never run on a GPU; {_cards([record], results)}: {record.reason}")
    figures = ", ".join(_figure(figure) for figure in record.figures)
    said = [record.reason or ""] if record.outcome == "failed" else []
    return _cell(
        "; ".join([f"{record.outcome} on {_cards([record], results)}", *said, *([figures] if figures else [])])
    )


def _figure(figure: Figure) -> str:
    return f"{figure.name} {figure.value:.3g}{' ' * bool(figure.unit)}{figure.unit}"


def _cards(records: list[CheckRecord], results: Results) -> str:
    """``NVIDIA L4 on 2026-01-02``, each that these checks ran on."""
    dates = dict.fromkeys(record.measured for record in records if record.measured is not None)
    machines = [results.machines[date] for date in dates]
    return ", ".join(dict.fromkeys(f"{machine.card} on {machine.date[:10]}" for machine in machines))


def _cell(text: str) -> str:
    """Without what would end a cell of a table."""
    return " ".join(text.replace("|", "/").split())
