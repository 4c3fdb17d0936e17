"""What the documentation says of GPUs is what gpu.json says, and nothing else."""

import re
from pathlib import Path

import pytest

from tests.gpu.catalogue import CATALOGUE, PARTS
from tests.gpu.pages import MARKED, PAGES, filled, status, tables
from tests.gpu.records import CheckRecord, Figure, Machine, Results, read

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "benchmarks" / "gpu.json"
PRODUCT = ("common", "rollout_server", "trainer", "deploy")
CLAIM = re.compile(
    r"\b(not|never)\b[^.|:]{0,40}\b(run|tried|measured|tested)\b\W+(\w+\W+){0,3}GPUs?\b|\bno GPU has been\b",
    re.IGNORECASE,
)
NOTES = re.compile(r"<!-- not-run: .*? -->", re.DOTALL)


def results(**outcomes: str) -> Results:
    """Of the learner's checks."""
    machine = Machine(
        date="2026-01-02T03:04:05Z",
        gpus=("NVIDIA L4",),
        gpu_memory_gib=22.5,
        driver="580.1",
        versions={},
        processor="a processor",
        cores=8,
    )
    figures = (Figure(name="time", value=2.0, unit="s"),)
    records = [
        CheckRecord(
            part="learner",
            name=name,
            outcome=outcome,
            figures=() if outcome == "not run" else figures,
            reason=None if outcome == "passed" else "a reason | with a bar",
            measured=machine.date,
        )
        for name, outcome in outcomes.items()
    ]
    return Results(checks=tuple(records), machines={machine.date: machine})


def test_the_committed_file_knows_every_check_and_no_other() -> None:
    assert [record.key for record in read(FILE).checks] == CATALOGUE


def test_what_is_recorded_as_run_names_its_machine() -> None:
    known = read(FILE)
    assert all(record.measured in known.machines for record in known.checks if record.was_run)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_the_file_says(name: str) -> None:
    text = (ROOT / name).read_text()
    assert MARKED.search(text)
    assert filled(text, read(FILE)) == text


def test_nothing_else_says_what_was_not_run_on_a_gpu() -> None:
    """One place, made from the file: a sentence elsewhere would stay when it is no longer true."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "docs" / "benchmarks" / "README.md"]
    sources = [
        path for name in PRODUCT for pattern in ("*.py", "*.yaml", "*.md") for path in (ROOT / name).rglob(pattern)
    ]
    found = [
        f"{path.relative_to(ROOT)}: {' '.join(match[0].split())}"
        for path in (*pages, *sources)
        for match in CLAIM.finditer(NOTES.sub("", MARKED.sub("", path.read_text())))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "is_claim"),
    [
        ("**They have not been run on a GPU yet.**", True),
        ("NVIDIA GPUs. Not run on a GPU by us yet", True),
        ("No GPU has been measured yet.", True),
        ("GPU seats follow Ray's interface and have not been\n    run on a GPU.", True),
        ("NCCL between GPUs, which has not been run on a GPU.", True),
        ("Runs without a GPU, end to end.", False),
        ("needs no GPU", False),
    ],
)
def test_such_a_sentence_is_recognised(text: str, is_claim: bool) -> None:
    assert bool(CLAIM.search(text)) is is_claim


def test_the_sentence_names_parts_that_were_run_and_parts_that_were_not() -> None:
    text = status(results(loss_float64="passed", step_float64="failed", packing_flash="not run"))
    assert text.startswith("Run on GPUs: learner on CUDA: 2 of 10 checks on NVIDIA L4 on 2026-01-02, of which 1 failed")
    assert "**Never run on a GPU: engines without Ray, weight sync, whole runs.**" in text


def test_where_nothing_was_run_the_sentence_says_only_that() -> None:
    assert status(Results()).startswith("**Never run on a GPU: ")


def test_where_all_was_run_it_says_nothing_of_never() -> None:
    done = results(loss_float64="passed")
    every = tuple(
        CheckRecord(part=part.name, name=check, outcome="passed", measured=done.checks[0].measured)
        for part in PARTS
        for check in part.checks
    )
    assert "Never" not in status(Results(checks=every, machines=done.machines))


def test_a_table_has_a_row_for_every_check_and_no_broken_cell() -> None:
    text = tables(results(loss_float64="failed", step_float64="passed", bfloat16="not run"))
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(CATALOGUE)
    assert all(row.count("|") == 4 for row in rows)
    assert rows[0].endswith("| failed on NVIDIA L4 on 2026-01-02; a reason / with a bar; time 2 s |")
    assert rows[2].endswith("| never run on a GPU; NVIDIA L4 on 2026-01-02: a reason / with a bar |")
    assert rows[3].endswith("| never run on a GPU |")
