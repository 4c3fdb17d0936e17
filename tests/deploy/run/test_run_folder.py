import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.config.source import read_config
from common.run_dir import RunDir
from deploy.run.records import metrics_of, summarize_run
from trainer.evaluate import EvaluationReport
from trainer.learner import StepReport
from trainer.probe_statistics import ProbeReport
from trainer.reports import Evaluated, RolloutReport, SyncReport, Trained

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def trained(step: int, *, switch_rate: float = 0.5, mean_switch_position: float | None = 8.0) -> Trained:
    return Trained(
        step=step,
        rollout=RolloutReport(
            num_sequences=4,
            num_tokens=100,
            switch_rate=switch_rate,
            teacher_token_share=0.25,
            mean_switch_position=mean_switch_position,
            mean_divergence=0.1,
            num_wasted_tokens=3,
            num_refused=1,
            mean_staleness=0.0,
            seconds=2.0,
        ),
        training=StepReport(
            loss=0.5,
            loss_student_tokens=0.25,
            loss_teacher_tokens=1.0,
            loss_dataset_tokens=2.0,
            covered_mass=0.9,
            grad_norm=1.5,
            learning_rate=1e-3,
            num_tokens=100,
            num_micro_batches=2,
            seconds=1.0,
        ),
        sync=SyncReport(
            version=step,
            seconds=0.5,
            probe=ProbeReport(
                rms=1e-6 * step,
                p99=5e-6 * step,
                max_difference=1e-5 * step,
                text_index=0,
                position=1,
                token_id=2,
                engine_logprob=-1.0,
                learner_logprob=-1.0,
                num_compared=8,
                followed=1.0,
                followed_output_layer=0.9,
            ),
        ),
    )


def evaluated(step: int, accuracy: float | None) -> Evaluated:
    report = EvaluationReport(num_prompts=50, num_answers=50, accuracy=accuracy, mean_divergence=0.2, mean_length=38.0)
    return Evaluated(step=step, report=report, seconds=1.0)


def summary_of(records: Sequence[Trained | Evaluated]) -> dict[str, object]:
    return summarize_run([metrics_of(record) for record in records], run_dir=Path("r"), seconds=20.0, num_resumed=2)


@pytest.fixture
def resolved(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("run_dir: r\nmodels: {student: s, teacher: t}\ndata: {path: p}\n")
    return read_config(file)


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path, resolved) -> None:
    wanted = str(tmp_path / "runs" / "demo")
    first, second, third = (RunDir.create(wanted, resolved) for _ in range(3))
    assert [folder.path.name for folder in (first, second, third)] == ["demo", "demo-2", "demo-3"]


def test_an_empty_folder_is_used(tmp_path, resolved) -> None:
    (tmp_path / "demo").mkdir()
    assert RunDir.create(str(tmp_path / "demo"), resolved).path == tmp_path / "demo"


def test_the_stored_configuration_is_the_runs_own(tmp_path, resolved) -> None:
    folder = RunDir.create(str(tmp_path / "demo"), resolved)
    assert read_config(folder.path / "config.yaml").config == resolved.config


def test_metrics_are_appended_one_object_a_line(tmp_path, resolved) -> None:
    folder = RunDir.create(str(tmp_path / "demo"), resolved)
    folder.append_metrics(metrics_of(trained(1)))
    folder.append_metrics(metrics_of(evaluated(1, 0.5)))
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1]
    assert lines[0]["rollout/tokens_per_s"] == 50.0
    assert lines[1]["evaluation/accuracy"] == 0.5


def test_what_a_step_has_none_of_is_left_out() -> None:
    assert "switch/mean_position" not in metrics_of(trained(1, switch_rate=0.0, mean_switch_position=None))
    assert "evaluation/accuracy" not in metrics_of(evaluated(1, None))


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    documented = set(re.findall(r"^\| `([a-z_]+/[a-z0-9_]+)`", DOCS.read_text(), re.MULTILINE))
    assert documented == (metrics_of(trained(1)).keys() | metrics_of(evaluated(1, 0.5)).keys()) - {"step"}


def test_every_row_of_the_summary_is_documented() -> None:
    summary = summary_of([trained(1)])
    text = DOCS.read_text()
    missing = [key for key in summary if f"`{key}`" not in text and not key.endswith(("_first", "_last"))]
    assert not missing


def test_the_summary_averages_over_the_run() -> None:
    records = [
        evaluated(0, 0.4),
        trained(1, switch_rate=1.0, mean_switch_position=6.0),
        trained(2, switch_rate=0.5, mean_switch_position=12.0),
        trained(3, switch_rate=0.0, mean_switch_position=None),
        evaluated(3, 0.9),
    ]
    summary = summary_of(records)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.4, 0.9)
    assert summary["switch_rate"] == 0.5
    assert summary["mean_switch_position"] == pytest.approx((4 * 6.0 + 2 * 12.0) / 6)
    assert summary["teacher_share"] == pytest.approx(0.25)
    assert summary["tokens_per_s"] == 50.0
    assert (summary["rollout_s"], summary["train_s"], summary["sync_s"]) == (6.0, 3.0, 1.5)
    assert summary["max_probe_nats"] == pytest.approx(3e-5)
    assert summary["max_probe_rms_nats"] == pytest.approx(3e-6)


def test_a_run_without_a_switch_has_no_mean_position() -> None:
    summary = summary_of([trained(1, switch_rate=0.0, mean_switch_position=None)])
    assert summary["mean_switch_position"] is None
    assert summary["accuracy_before"] is None


def test_a_summary_is_written_whole(tmp_path, resolved) -> None:
    folder = RunDir.create(str(tmp_path / "demo"), resolved)
    folder.write_summary({"steps": 1})
    assert json.loads((folder.path / "summary.json").read_text()) == {"steps": 1}
    assert not list(folder.path.glob(".summary*"))


def test_half_a_line_that_a_crash_left_costs_no_other_line(tmp_path, resolved) -> None:
    folder = RunDir.create(str(tmp_path / "demo"), resolved)
    folder.append_fault({"who": "learner"})
    with (folder.path / "faults.jsonl").open("a") as file:
        file.write('{"who": "contr')
    assert folder.read_faults() == [{"who": "learner"}]
    folder.append_fault({"who": "student engine"})
    assert folder.read_faults() == [{"who": "learner"}, {"who": "student engine"}]
