import json
from pathlib import Path

import pytest

from tests.benchmarks.trainer_report import KEYS, Figure, read, table, write

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


def figures(**values: float) -> dict[str, Figure]:
    return {key: Figure(value=value, measured_on={"made_from": value}) for key, value in values.items()}


def test_a_part_measured_again_leaves_the_other_parts_figures_as_they_were(tmp_path: Path) -> None:
    write(tmp_path, figures(chunked_memory_ratio=0.2, chunked_time_ratio=0.7))
    write(tmp_path, figures(sync_seconds=1.0, copy_seconds=0.5))
    write(tmp_path, figures(chunked_time_ratio=0.8))
    content = read(tmp_path)
    assert {key: content[key] for key in KEYS if key in content} == {
        "chunked_memory_ratio": 0.2,
        "chunked_time_ratio": 0.8,
        "sync_seconds": 1.0,
        "copy_seconds": 0.5,
    }
    assert content["measured_on"]["chunked_time_ratio"] == {"made_from": 0.8}
    assert content["measured_on"]["copy_seconds"] == {"made_from": 0.5}


def test_the_table_replaces_the_old_one_and_nothing_else_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Benchmarks\n\nbefore\n")
    write(tmp_path, figures(step_tokens_per_s_vs_trl=1.5))
    page.write_text(page.read_text() + "\nafter\n")
    write(tmp_path, figures(step_tokens_per_s_vs_trl=1.1))
    text = page.read_text()
    assert text.startswith("# Benchmarks\n\nbefore\n")
    assert text.endswith("\nafter\n")
    assert "1.50" not in text
    assert text.count("1.10") == 1


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"step_tokens_per_s_vs_trl": 1.2}, "yes"),
        ({"step_tokens_per_s_vs_trl": 1.19}, "NO"),
        ({"chunked_memory_ratio": 0.25}, "yes"),
        ({"chunked_memory_ratio": 0.26}, "NO"),
        ({"chunked_time_ratio": 1.31}, "NO"),
        ({"sync_seconds": 1.7, "copy_seconds": 0.5}, "yes"),
        ({"sync_seconds": 1.71, "copy_seconds": 0.5}, "NO"),
    ],
)
def test_the_table_says_whether_a_bound_holds(tmp_path: Path, values: dict[str, float], verdict: str) -> None:
    write(tmp_path, figures(**values))
    assert table(tmp_path).splitlines()[2].endswith(f"| {verdict} |")


def test_the_published_file_has_exactly_the_promised_keys_and_says_what_each_was_measured_on() -> None:
    content = json.loads((DOCS / "trainer.json").read_text())
    assert tuple(content) == (*KEYS, "measured_on")
    assert tuple(content["measured_on"]) == KEYS
    assert all(isinstance(content[key], float) and content[key] > 0 for key in KEYS)
    assert all({"what", "processor", "cores", "torch"} <= content["measured_on"][key].keys() for key in KEYS)
