"""Real models in half precision, the whole way: SmolLM2-135M teaches its own first ten layers, engines in bfloat16.

Processors without AVX512-BF16 compute bfloat16 slowly, so the texts are short.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.smollm2 import smollm2_pair
from tests.support.trace_reader import TraceReader

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS, PROMPTS_PER_STEP, MAX_NEW_TOKENS = 3, 4, 8
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first time makes the models, too

TOPICS = ["the sea", "a cat", "bread", "winter"]
TASKS = ["Write one line about", "Ask me a question about", "What do you know of"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("smollm2")
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{task} {topic}."}]
        for task in TASKS
        for topic in TOPICS
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps({'prompt': chat})}\n" for chat in chats))
    models = smollm2_pair()
    engine = {"dtype": "bfloat16", "enforce_eager": True, "kv_cache_gib": 0.25, "max_model_len": 128, "max_num_seqs": 8}
    config = {
        "run_dir": str(folder / "run"),
        "models": {"teacher": str(models.teacher), "student": str(models.student)},
        "engines": {"teacher": engine, "student": engine},
        # The cut student is 10 nats from its teacher everywhere: only a small multiple of the average is ever exceeded.
        "policy": {"type": "adaswitch", "window": 2, "multiplier": 1, "floor": 0.1},
        "sampling": {"max_new_tokens": MAX_NEW_TOKENS, "chunk_tokens": 8},
        "data": {"path": str(folder / "prompts.jsonl")},
        "trainer": {"num_steps": NUM_STEPS, "prompts_per_step": PROMPTS_PER_STEP, "learning_rate": 1e-5},
        "sync": {"num_probe_prompts": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "deploy", "train", str(folder / "config.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["HF_DATASETS_CACHE"] = str(folder / "datasets")
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout
    return folder / "run"


def read_steps(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss_nats" in line]


def test_every_step_is_synced_and_nothing_is_refused(run: Path) -> None:
    steps = read_steps(run)
    assert [line["sync/weight_version"] for line in steps] == [1, 2, 3]
    assert all(line["rollout/sequences"] == PROMPTS_PER_STEP for line in steps)
    assert json.loads((run / "summary.json").read_text())["faults"] == 0


def test_the_probe_s_statistics_are_in_every_step_s_report(run: Path) -> None:
    for line in read_steps(run):
        assert 0.01 < line["sync/probe_rms_nats"] < 0.5, line  # rounded, as bfloat16 does
        assert line["sync/probe_rms_nats"] < line["sync/probe_p99_nats"] < line["sync/probe_nats"]
    assert json.loads((run / "summary.json").read_text())["max_probe_rms_nats"] < 0.5


def test_every_step_has_a_finite_loss_and_a_gradient(run: Path) -> None:
    """Three steps of four different prompts each at 1e-5 are too few for the loss to show that it falls."""
    for line in read_steps(run):
        assert 0 < line["train/loss_nats"] < math.inf
        assert 0 < line["train/grad_norm"] < math.inf


def test_the_texts_come_from_the_chat_template_and_both_models_write(run: Path) -> None:
    with TraceReader(run / "traces") as reader:
        records = reader.sequences(limit=100)
        trace = reader.sequence(records[0].sequence_id)
    assert len(records) == NUM_STEPS * PROMPTS_PER_STEP
    assert sum(record.num_teacher_tokens for record in records) > 0
    assert sum(record.num_student_tokens for record in records) > 0
    assert trace is not None
    assert trace.sequence.prompt_text.startswith("<|im_start|>")
