"""Which run is gone on with, what may differ, and what of it is taken back."""

import asyncio
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config.source import ResolvedConfig, read_config
from common.errors import UserError
from common.run_dir import RunDir
from deploy.run.resume import Resumable, find_resumable, found_again, refuse_other_settings, rewind
from rollout_server.traces.writer import TraceWriter
from tests.support.trace_reader import TraceReader
from trainer.checkpoint import RunState, write_checkpoint
from trainer.prompts import PromptCursor


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., ResolvedConfig]:
    file = tmp_path / "run.yaml"
    file.write_text(f"run_dir: {tmp_path / 'demo'}\nmodels: {{student: s, teacher: t}}\ndata: {{path: p}}\n")
    return lambda *overrides: read_config(file, overrides)


def take_checkpoint(folder: RunDir, step: int, *, ahead_seconds: float | None = None) -> Path:
    async def save(unfinished: Path) -> None:
        (unfinished / "learner").mkdir()
        (unfinished / "learner" / "weights").write_bytes(b"w" * step)

    state = RunState(
        step=step,
        weight_version=step,
        cursor=PromptCursor(position=step),
        seconds=1.0,
        ahead_seconds=ahead_seconds,
    )
    path = asyncio.run(write_checkpoint(folder.checkpoints, state, save))
    assert path is not None
    return path


def test_the_newest_run_with_a_checkpoint_is_gone_on_with(resolve, caplog) -> None:
    resolved = resolve()
    folders = [RunDir.create(resolved.config.run_dir, resolved) for _ in range(11)]
    take_checkpoint(folders[1], 20)
    take_checkpoint(folders[9], 10)  # demo-10 is newer than demo-2
    with caplog.at_level(logging.WARNING):
        found = find_resumable(resolved.config)
    assert (found.folder.path.name, found.state.step, found.checkpoint.name) == ("demo-10", 10, "step-000010")
    assert "demo-11 has no checkpoint" in caplog.text


def test_without_a_checkpoint_it_says_where_it_looked(resolve) -> None:
    resolved = resolve()
    with pytest.raises(UserError, match=r"run_dir: '.*demo' has no checkpoint to resume \(no such folder\)"):
        find_resumable(resolved.config)
    folder = RunDir.create(resolved.config.run_dir, resolved)
    (folder.path.parent / "demo-old").mkdir()
    with pytest.raises(UserError, match=r"\(none of \S*/demo has one\); leave --resume out to start$"):
        find_resumable(resolved.config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.learning_rate=0.5", "trainer.learning_rate: the run in .* has 1e-05, this configuration has 0.5;"),
        ("policy.type=skd", "policy.type: the run in .* has 'adaswitch', this configuration has 'skd'"),
        ("trainer.max_staleness=1", "trainer.max_staleness: "),
        ("trainer.lora.rank=4", "trainer.lora"),
        ("seed=3", "seed: the run in .* has 0, this configuration has 3"),
    ],
)
def test_another_setting_is_refused_and_named(resolve, override: str, message: str) -> None:
    folder = RunDir.create(resolve().config.run_dir, resolve())
    with pytest.raises(UserError, match=f"^{message}"):
        refuse_other_settings(folder, resolve(override))


def test_length_placement_logging_checkpoints_and_time_outs_may_differ(resolve) -> None:
    folder = RunDir.create(resolve().config.run_dir, resolve())
    overrides = ["trainer.num_steps=7", "placement.use_gpus=false", "logging.wandb.mode=offline"]
    overrides += ["checkpoints.keep_last=5", "engines.call_timeout_s=9", "trainer.step_timeout_s=8", "sync.timeout_s=7"]
    refuse_other_settings(folder, resolve(*overrides))


@pytest.mark.parametrize(("ahead_seconds", "traced"), [(None, [1, 2]), (3.0, [1, 2, 3])])
def test_what_came_after_the_checkpoint_is_taken_back(
    resolve, decode, token_texts, make_sequence: Callable[..., Any], ahead_seconds: float | None, traced: list[int]
) -> None:
    folder = RunDir.create(resolve().config.run_dir, resolve())
    checkpoint = take_checkpoint(folder, 2, ahead_seconds=ahead_seconds)
    writer = TraceWriter(folder.traces, decode=decode, token_texts=token_texts)
    for step in (1, 2, 3, 4):
        folder.append_metrics({"step": step, "train/loss_nats": 1.0})
        writer.write_segment(step, [make_sequence(prompt_id=f"p{step}")])
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # a crash's
    folder.write_summary({"steps": 4})

    resumable = Resumable(folder=folder, checkpoint=checkpoint, state=RunState.read(checkpoint / "state.json"))
    for _ in range(2):  # as after a crash in its midst
        rewind(resumable, resolve("trainer.num_steps=9"))
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]
    with TraceReader(folder.traces) as reader:
        assert [record.step for record in reader.sequences()] == traced
    assert read_config(folder.path / "config.yaml").config.trainer.num_steps == 9
    assert folder.read_summary() is None


def test_a_checkpoint_that_came_before_the_lock_was_had_is_gone_on_from(resolve) -> None:
    """Another process went on with the run, and ended, between the look and the lock."""
    folder = RunDir.create(resolve().config.run_dir, resolve())
    take_checkpoint(folder, 2)
    found = find_resumable(resolve().config)
    assert found_again(found, 9) is found
    later = take_checkpoint(folder, 4)
    assert (found_again(found, 9).checkpoint, found_again(found, 9).state.step) == (later, 4)
    folder.write_summary({"steps": 4})
    with pytest.raises(UserError, match="another process has finished this run in the meantime"):
        found_again(found, 4)
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(UserError, match="another process has restarted this run from the beginning"):
        found_again(found, 9)


def test_a_finished_run_is_told_from_one_that_can_go_on(resolve) -> None:
    folder = RunDir.create(resolve().config.run_dir, resolve())
    checkpoint = take_checkpoint(folder, 20)
    resumable = Resumable(folder=folder, checkpoint=checkpoint, state=RunState.read(checkpoint / "state.json"))
    assert resumable.finished_summary(20) is None  # its student was not saved
    with pytest.raises(UserError, match=r"trainer.num_steps must be >= 20, .* got 10"):
        resumable.finished_summary(10)
    folder.write_summary({"steps": 20})
    assert resumable.finished_summary(20) == {"steps": 20}
    assert resumable.finished_summary(30) is None


def test_two_processes_can_t_go_on_with_one_run_and_a_killed_one_leaves_no_lock(resolve) -> None:
    folder = RunDir.create(resolve().config.run_dir, resolve())
    script = "import sys, time; from pathlib import Path; from common.run_dir import RunDir\n"
    script += "with RunDir(Path(sys.argv[1])).locked(): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder.path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="another process is using this run"), folder.locked():
            pass
        other.kill()
    with folder.locked():
        pass


def test_the_command_names_what_is_missing(tmp_path: Path, resolve) -> None:
    resolve()
    result = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "train", str(tmp_path / "run.yaml"), "--resume"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: run_dir: ")
    assert result.stderr.count("\n") == 1
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["run.yaml"]'
