"""Fine-tuning on the same walk: given answers, an adapter, real engines. Short, but long enough to have learned."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.demo_run import DEMO, REPOSITORY, run_environment, train_command
from tests.support.trace_reader import TraceReader

STUDENT = DEMO / "models" / "student"
NUM_STEPS = 12
SETTINGS = [
    "policy.type=dataset",
    "data.answer_field=solution",
    "trainer.loss.type=cross_entropy",
    "trainer.lora.rank=8",
    "trainer.learning_rate=0.003",
    f"trainer.num_steps={NUM_STEPS}",
    "trainer.warmup_steps=2",
    "evaluation.data.max_prompts=16",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervised")
    finished = subprocess.run(
        train_command(*SETTINGS, f"run_dir={folder / 'run'}"),
        cwd=REPOSITORY,
        env=run_environment(folder),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return folder / "run"


@pytest.fixture(scope="module")
def steps(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss_nats" in line]


def test_the_student_learns_the_given_answers(steps: list[dict[str, float]]) -> None:
    losses = [line["train/loss_nats"] for line in steps]
    assert len(losses) == NUM_STEPS
    assert losses[-1] < 0.6 * losses[0]
    for line in steps:
        assert line["train/loss_dataset_tokens_nats"] == pytest.approx(line["train/loss_nats"])
        assert "train/loss_student_tokens_nats" not in line
        assert (line["switch/rate"], line["switch/teacher_token_share"]) == (0.0, 0.0)


def test_the_engine_holds_the_merged_weights_after_every_sync(steps: list[dict[str, float]]) -> None:
    probes = [line["sync/probe_nats"] for line in steps]
    assert max(probes) < 1e-3, probes


def test_the_trace_holds_the_answers_of_the_data(run: Path) -> None:
    rows = (DEMO / "data" / "train.jsonl").read_text().splitlines()
    with TraceReader(run / "traces") as reader:
        records = reader.sequences(limit=5)
        trace = reader.sequence(records[0].sequence_id)
    for record in records:
        assert record.completion_text == json.loads(rows[int(record.prompt_id)])["solution"] + "<eos>"
    assert trace is not None
    assert {token.source for token in trace.tokens} == {"dataset"}


def test_the_saved_student_is_merged_and_the_adapter_is_beside_it(run: Path) -> None:
    before, after = load_file(STUDENT / "model.safetensors"), load_file(run / "student" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if "_proj." in name}
    adapter = load_file(run / "student" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(changed)
    assert json.loads((run / "student" / "adapter" / "adapter_config.json").read_text())["r"] == 8


def test_the_run_folder_explains_itself(run: Path, steps: list[dict[str, float]]) -> None:
    assert {"config.yaml", "versions.json", "metrics.jsonl", "tensorboard", "summary.json"} <= set(os.listdir(run))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("train/loss_nats")]
    assert shown == pytest.approx([line["train/loss_nats"] for line in steps], rel=1e-5)
