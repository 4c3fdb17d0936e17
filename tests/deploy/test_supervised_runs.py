"""A part of a real run is ended or stopped while it works: the run goes on, and every prompt is trained once."""

import json
import logging
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from common.config.source import read_config
from common.errors import RunEnds, UserError
from deploy.preflight import prepare
from tests.support.faulty_runs import (
    FAR,
    PLAYED,
    STILLBORN,
    faults_of,
    going_on,
    processes_of_run,
    summary_of,
    trained,
    until_step,
    write_config,
)
from tests.support.played_actors import POISON
from tests.support.ray_heads import joined

NUM_STEPS, PROMPTS_PER_STEP = 6, 4

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """Yields the file that may hold a poisonous prompt."""
    poison = tmp_path_factory.mktemp("poison") / "token_ids"
    poison.write_text("")
    with joined(ray_address, runtime_env={"env_vars": {POISON: str(poison)}}):
        yield poison


@pytest.mark.parametrize(("kind", "seen_as"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "silent")])
async def test_the_run_goes_on_whoever_is_lost(
    cluster: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: signal.Signals, seen_as: str
) -> None:
    """One after the other, each while the run works."""
    caplog.set_level(logging.INFO, logger="deploy")
    everyone, num_steps = ["student engine", "teacher engine", "controller", "learner"], 9
    folder = tmp_path / "run"
    config = write_config(folder, num_steps=num_steps, prompts_per_step=PROMPTS_PER_STEP)
    async with going_on(config, actor_classes=PLAYED) as running:
        for number, who in enumerate(everyone):
            await until_step(folder, 1 + 2 * number, running)
            os.kill(processes_of_run(caplog)[who], kind)
        summary = await summary_of(running)
    faults = faults_of(folder)
    assert [(fault["who"], fault["kind"]) for fault in faults] == [(who, seen_as) for who in everyone], faults
    assert all(0.0 < fault["recovered_s"] < 60.0 for fault in faults)
    assert summary["faults"] == len(everyone)
    assert (summary["steps"], summary["sequences"]) == (num_steps, num_steps * PROMPTS_PER_STEP)
    assert set(trained(folder).values()) == {1}
    assert len(trained(folder)) == num_steps * PROMPTS_PER_STEP


async def test_a_learner_that_is_lost_before_the_first_checkpoint_begins_anew(
    cluster: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="deploy")
    config = write_config(
        tmp_path / "run", num_steps=NUM_STEPS, prompts_per_step=PROMPTS_PER_STEP, checkpoint_every=NUM_STEPS
    )
    async with going_on(config, actor_classes=PLAYED) as running:
        await until_step(tmp_path / "run", 2, running)
        os.kill(processes_of_run(caplog)["learner"], signal.SIGKILL)
        summary = await summary_of(running)
    assert (summary["steps"], summary["sequences"], summary["faults"]) == (NUM_STEPS, NUM_STEPS * PROMPTS_PER_STEP, 1)
    counts = trained(tmp_path / "run")
    assert (set(counts.values()), len(counts)) == ({1}, NUM_STEPS * PROMPTS_PER_STEP)


async def test_a_prompt_that_ends_an_engine_every_time_is_set_aside_and_all_others_are_trained(
    cluster: Path, tmp_path: Path
) -> None:
    """Two epochs: in the second one it is not even asked for."""
    config = write_config(tmp_path / "run", num_rows=8, num_steps=4, prompts_per_step=4)
    poison = prepare(read_config(config).config).prompts.take(8)[5]
    cluster.write_text(" ".join(map(str, poison.token_ids.tolist())))
    try:
        async with going_on(config, actor_classes=PLAYED) as running:
            summary = await summary_of(running)
    finally:
        cluster.write_text("")
    assert summary["prompts_set_aside"] == [poison.prompt_id]
    assert (summary["steps"], summary["sequences"]) == (4, 2 * 7)
    counts = trained(tmp_path / "run")
    assert set(counts.values()) == {1}
    assert {prompt_id for prompt_id, _ in counts} == {str(row) for row in range(8)} - {poison.prompt_id}
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "set_aside.jsonl").read_text().splitlines()]
    assert (line["prompt_id"], line["step"]) == (poison.prompt_id, 2)


async def test_an_engine_that_dies_while_it_starts_ends_the_run_with_its_name(cluster: Path, tmp_path: Path) -> None:
    async with going_on(write_config(tmp_path / "run"), actor_classes=STILLBORN) as running:
        with pytest.raises(RunEnds, match=r"^(student|teacher) engine: its process ended while it started; its log is"):
            await summary_of(running)


async def test_a_folder_that_the_learner_s_machine_does_not_share_is_refused_at_the_start(
    cluster: Path, tmp_path: Path
) -> None:
    async with going_on(write_config(tmp_path / "run"), actor_classes=FAR) as running:
        with pytest.raises(
            UserError, match=r"^run_dir: \S+/run on the machine of the learner is not the run's; expected"
        ):
            await summary_of(running)
    assert not list((tmp_path / "run").glob("*.unfinished"))
