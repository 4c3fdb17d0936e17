"""The whole way once, as a user takes it: the command, Ray, two vLLM engines, the learner, and what is left behind."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_server.traces.records import SequenceFilter
from tests.support.demo_run import DEMO, MARK, NUM_HELD_OUT, NUM_STEPS, PROMPTS_PER_STEP, DemoRun
from tests.support.marked import processes_with
from tests.support.trace_reader import TraceReader


@pytest.fixture(scope="module")
def run(demo_run: DemoRun) -> Path:
    """The run's folder."""
    return demo_run.folder


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_summary_says_what_was_done(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == NUM_STEPS
    assert summary["sequences"] == NUM_STEPS * PROMPTS_PER_STEP
    assert summary["held_out_prompts"] == NUM_HELD_OUT
    assert 0.0 <= summary["accuracy_before"] <= 1.0
    assert 0.0 <= summary["accuracy_after"] <= 1.0
    assert summary["run_dir"] == str(run)


def test_every_step_is_measured_and_the_probe_finds_the_learner_s_weights_in_the_engine(run: Path) -> None:
    metrics = read_metrics(run)
    steps = [line for line in metrics if "train/loss_nats" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["sync/weight_version"] for line in steps] == [1, 2, 3]
    assert all(line["sync/probe_nats"] < 1e-3 for line in steps), [line["sync/probe_nats"] for line in steps]
    assert all(line["train/grad_norm"] > 0 and line["train/loss_nats"] > 0 for line in steps)
    assert [line["step"] for line in metrics if "evaluation/accuracy" in line] == [0, NUM_STEPS]


def test_the_trace_holds_every_sequence_written_by_the_weights_of_the_step_before(run: Path) -> None:
    with TraceReader(run / "traces") as reader:
        assert not reader.skipped
        for step in range(1, NUM_STEPS + 1):
            records = reader.sequences(SequenceFilter(first_step=step, last_step=step))
            assert len(records) == PROMPTS_PER_STEP
            for record in records:
                assert (record.weight_version_min, record.weight_version_max) == (step - 1, step - 1)
                assert record.num_tokens == record.num_student_tokens + record.num_teacher_tokens
        everything = reader.sequences(limit=1000)
        assert len({record.prompt_id for record in everything}) == NUM_STEPS * PROMPTS_PER_STEP
        trace = reader.sequence(everything[0].sequence_id)
    assert trace is not None
    assert [token.position for token in trace.tokens] == list(range(trace.sequence.num_tokens))
    assert "".join(token.text for token in trace.tokens) == trace.sequence.completion_text


def test_the_metrics_are_the_trace_s(run: Path) -> None:
    steps = [line for line in read_metrics(run) if "train/loss_nats" in line]
    with TraceReader(run / "traces") as reader:
        summaries = reader.steps()
    for line, summary in zip(steps, summaries, strict=True):
        assert line["rollout/tokens"] == summary.num_tokens
        assert line["switch/rate"] == pytest.approx(summary.switch_rate)
        assert line["switch/teacher_token_share"] == pytest.approx(summary.teacher_share)
        assert line["divergence/mean_nats"] == pytest.approx(summary.divergence_mean, rel=1e-4)


def test_the_trained_student_loads_in_hugging_face_and_has_moved(run: Path) -> None:
    start = DEMO / "models" / "student"
    model = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    text = tokenizer("1+2*3-4+5*6-7=", return_tensors="pt")
    written = model.generate(**text, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0, text.input_ids.shape[1] :]) == "1+2="
    before, after = load_file(start / "model.safetensors"), load_file(run / "student" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.isfinite(tensor.numpy()).all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_nothing_of_the_run_goes_on_running(demo_run: DemoRun) -> None:
    deadline_s = time.monotonic() + 30
    while (left := processes_with(MARK, demo_run.mark)) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    assert not left


def test_nothing_listens_beyond_loopback(demo_run: DemoRun) -> None:
    assert demo_run.outward_listeners == frozenset()


def test_no_secret_is_written(demo_run: DemoRun) -> None:
    secret = b"not-to-be-seen"
    assert secret.decode() not in demo_run.output
    files = [file for file in demo_run.folder.rglob("*") if file.is_file()]
    assert {"config.yaml", "summary.json", "metrics.jsonl", "versions.json"} <= {file.name for file in files}
    assert [file for file in files if secret in file.read_bytes()] == []
    for file in demo_run.folder.rglob("*.parquet"):  # compressed
        assert secret.decode() not in str(pq.read_table(file).to_pydict())
