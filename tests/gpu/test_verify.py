"""The command itself, on a processor: the same checks on tiny models; and what it does where no GPU is."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.gpu.catalogue import PARTS, part_named
from tests.gpu.records import read

ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = {
    "learner": {"packing_flash", "loss_beside_liger", "ranks_nccl"},
    "engines": {"chunked_prefill", "score_rows_bfloat16", "prompt_logprob_memory"},
    "sync": {"ipc", "nccl"},
    "train": {f"{run}_{layout}" for run in ("demo", "shaped") for layout in ("shared_student", "spread")},
}


def verify(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_each_part_has_a_function_for_every_check(part: object) -> None:
    assert list(import_module(part.module).CHECKS) == list(part.checks)


def test_without_a_gpu_nothing_is_run_nothing_measured_is_lost_and_the_command_succeeds(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = verify("--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU here, so nothing is run: torch ")
    results = read(out)
    assert {record.outcome for record in results.checks} == {"not run"}
    assert all(record.reason for record in results.checks)
    rows = json.loads(out.read_text())
    rows["checks"][0] |= {"outcome": "failed", "reason": "measured elsewhere"}
    out.write_text(json.dumps(rows))
    assert verify("--out", str(out)).returncode == 0
    assert json.loads(out.read_text()) == rows


def test_the_committed_results_do_not_change_where_no_gpu_is() -> None:
    files = [ROOT / name for name in ("docs/benchmarks/gpu.json", "docs/gpu.md")]
    before = [file.read_bytes() for file in files]
    assert verify().returncode == 0
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    "part", ["learner", *(pytest.param(name, marks=pytest.mark.slow) for name in ("engines", "sync", "train"))]
)
def test_a_processor_passes_every_check_that_needs_no_gpu(part: str, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = verify("--device", "cpu", "--part", part, "--out", str(out), "--minutes", "9")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = {record.name: record for record in read(out).checks}
    assert found.keys() == part_named(part).checks.keys()
    assert {name for name, record in found.items() if record.outcome == "not run"} == NEEDS_A_GPU[part]
    assert all(figure.holds for record in found.values() for figure in record.figures)


def test_what_there_is_no_time_for_is_not_run(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert verify("--device", "cpu", "--part", "a", "--total-minutes", "0", "--out", str(out)).returncode == 0
    assert {record.outcome for record in read(out).checks} == {"not run"}
    assert {record.reason for record in read(out).checks} == {"the 0 minutes of part a were over"}


def test_results_of_a_processor_are_not_written_where_those_of_gpus_are() -> None:
    done = verify("--device", "cpu", "--out", "docs/benchmarks/gpu.json")
    assert done.returncode == 2
    assert "is for what GPUs give, got --device cpu" in done.stderr


def test_a_part_that_does_not_exist_is_named() -> None:
    done = verify("--part", "x")
    assert done.returncode == 2
    assert "no part 'x'; there are a (learner), b (engines)" in done.stderr
