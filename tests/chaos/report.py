"""What came of the runs: chaos.json, a table for the terminal and the page, and every promise that was broken."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.trainer_report import rounded
from tests.chaos.faults import DISK, DRIVER, parse_fault
from tests.chaos.runs import Outcome

MAY_LOSE = 0.03
"""Accuracy by which a disturbed run may end below the worst undisturbed one: two standard errors of 500 answers with 97
in 100 right, once for each of the two runs.
"""
_BEGIN, _END = "<!-- chaos: begin (written by make chaos) -->", "<!-- chaos: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Where undisturbed runs end."""

    accuracies: tuple[float, ...]
    walls_s: tuple[float, ...]

    @property
    def lowest(self) -> float:
        """What a disturbed run must reach."""
        return min(self.accuracies) - MAY_LOSE


def broken_promises(band: Band, outcomes: Sequence[Outcome], *, wanted: int) -> list[str]:
    """One line each; none is what is hoped for. ``wanted``: faults that were to be sent."""
    found = [f"run {outcome.run}: {complaint}" for outcome in outcomes for complaint in outcome.broken]
    for outcome in outcomes:
        if outcome.accuracy is not None and outcome.accuracy < band.lowest:
            found.append(f"run {outcome.run}: accuracy {outcome.accuracy:.3f}, expected at least {band.lowest:.3f}")
    num_sent = sum(sent.fault.counts for outcome in outcomes for sent in outcome.sent)
    if num_sent < wanted:
        found.append(f"{num_sent} faults were sent and answered, expected {wanted}")
    return found


def content(band: Band, outcomes: Sequence[Outcome], broken: Sequence[str], measured_on: Mapping[str, Any]) -> Any:
    """What chaos.json holds."""
    accounts = [outcome.account for outcome in outcomes if outcome.account is not None]
    return rounded(
        {
            "faults": [
                {
                    "run": sent.run,
                    "kind": sent.fault.act,
                    "target": sent.fault.target,
                    "at_s": sent.at_s,
                    "at_step": sent.at_step,
                    "detected_s": sent.detected_s,
                    "recovered_s": sent.recovered_s,
                    "next_step_s": sent.next_step_s,
                    "blamed": [line["who"] for line in sent.lines],
                }
                for outcome in outcomes
                for sent in outcome.sent
            ],
            "runs": [
                {
                    "seed": outcome.seed,
                    "exit_codes": list(outcome.exit_codes),
                    "wall_s": outcome.wall_s,
                    "accuracy": outcome.accuracy,
                    "steps": outcome.steps,
                    "resumed": outcome.resumed,
                }
                for outcome in outcomes
            ],
            "prompts_expected": sum(account.num_expected for account in accounts),
            "prompts_trained": sum(account.num_trained for account in accounts),
            "prompts_trained_twice": sum(account.num_twice for account in accounts),
            "band": {
                "accuracies": list(band.accuracies),
                "walls_s": list(band.walls_s),
                "may_lose": MAY_LOSE,
                "lowest": band.lowest,
            },
            "broken": list(broken),
            "measured_on": dict(measured_on),
        }
    )


def read_band(folder: Path) -> Band | None:
    """The one of an earlier invocation."""
    file = folder / "chaos.json"
    if not file.exists():
        return None
    band = json.loads(file.read_text())["band"]
    return Band(accuracies=tuple(band["accuracies"]), walls_s=tuple(band["walls_s"]))


def table(found: Mapping[str, Any]) -> str:
    """One row for each kind of fault, and a few lines about the runs."""
    rows = ["| fault | target | sent | noticed, s | recovered, s | next step, s |", "|---|---|--:|--:|--:|--:|"]
    kinds = dict.fromkeys((fault["target"], fault["kind"]) for fault in sorted(found["faults"], key=_order))
    for target, kind in kinds:
        of_kind = [fault for fault in found["faults"] if (fault["target"], fault["kind"]) == (target, kind)]
        seconds = [_range(of_kind, name) for name in ("detected_s", "recovered_s", "next_step_s")]
        rows.append(f"| {kind} | {target} | {len(of_kind)} | {' | '.join(seconds)} |")
    return "\n".join([*rows, "", *_sentences(found)])


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """chaos.json and the part of README.md between its marks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chaos.json").write_text(json.dumps(found, indent=1) + "\n")
    page = folder / "README.md"
    text = page.read_text() if page.exists() else "# Benchmarks\n"
    if _BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Chaos\n\n{_BEGIN}\n{_END}\n"
    before, _, rest = text.partition(_BEGIN)
    page.write_text(f"{before}{_BEGIN}\n{table(found)}\n{_END}{rest.partition(_END)[2]}")


def _sentences(found: Mapping[str, Any]) -> list[str]:
    band, runs = found["band"], found["runs"]
    accuracies = ", ".join(f"{run['accuracy']:.3f}" if run["accuracy"] is not None else "none" for run in runs)
    undisturbed = ", ".join(f"{accuracy:.3f}" for accuracy in band["accuracies"])
    walls = ", ".join(f"{run['wall_s']:.0f}" for run in runs)
    faults = [parse_fault(f"{fault['kind']}:{fault['target']}") for fault in found["faults"]]
    num_faults, num_kills = sum(fault.counts for fault in faults), sum(fault.is_kill for fault in faults)
    return [
        f"- {num_faults} faults in {len(runs)} runs, {num_kills} of them kills.",
        f"- Held-out accuracy at the end: {accuracies}; undisturbed {undisturbed}, so at least {band['lowest']:.3f} "
        "was wanted.",
        f"- Prompts trained: {found['prompts_trained']} of {found['prompts_expected']}, "
        f"{found['prompts_trained_twice']} of them more than once.",
        f"- Seconds a run: {walls}; undisturbed {', '.join(f'{wall:.0f}' for wall in band['walls_s'])}.",
        *(f"- BROKEN: {promise}" for promise in found["broken"]),
    ]


def _order(fault: Mapping[str, Any]) -> tuple[bool, str, str]:
    return (fault["target"] in (DRIVER, DISK), fault["target"], fault["kind"])


def _range(faults: Sequence[Mapping[str, Any]], name: str) -> str:
    texts = [f"{value:.1f}" for value in sorted(fault[name] for fault in faults if fault[name] is not None)]
    return " to ".join(dict.fromkeys([*texts[:1], *texts[-1:]]))
