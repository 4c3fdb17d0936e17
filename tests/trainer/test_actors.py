"""A learner of two ranks as Ray actors: it trains, and a rank that dies ends the step at once."""

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from common.config import Trainer
from common.sequence import MixedSequence
from tests.support.ray_heads import joined
from trainer.actors import LearnerActor, LearnerRankDied, LearnerSpec, RemoteLearner, every_rank
from trainer.checkpoint import RunState, find_last_good, write_checkpoint
from trainer.prompts import PromptCursor

TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def cluster(ray_address: str) -> Iterator[None]:
    with joined(ray_address):
        yield


@pytest.fixture
def ranks(cluster: None, make_model: Callable[..., Any], save_model: Callable[..., str]) -> Iterator[list[ActorHandle]]:
    class LimitedLearner(LearnerActor):
        """A rank whose files may not grow beyond a limit, as where the disk is full."""

        def limit_files(self, max_bytes: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))

    spec = LearnerSpec(
        student=save_model(make_model(seed=2)),
        trainer=Trainer(num_ranks=2, num_threads=1, step_timeout_s=TIMEOUT_S),
        device="cpu",
        sync_backend="host_memory",
        seed=0,
        trust_remote_code=False,
    )
    actors = [ray.remote(LimitedLearner).options(num_cpus=0.25).remote(rank, spec) for rank in range(2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


async def test_two_ranks_train_as_one_learner_until_one_dies(
    ranks: list[ActorHandle],
    make_model: Callable[..., Any],
    written_by: Callable[..., list[MixedSequence]],
    tmp_path: Path,
) -> None:
    meeting_point = ranks[0].meeting_point.remote()
    await every_rank([rank.start.remote(meeting_point) for rank in ranks], "the start", timeout_s=TIMEOUT_S)
    learner = RemoteLearner(ranks, step_timeout_s=TIMEOUT_S, sync_timeout_s=TIMEOUT_S)
    sequences = written_by(make_model(seed=1))
    batches = [ray.put(sequences[2:]), ray.put(sequences[:2])]
    references = [(batches[1], 0), *((batches[0], place) for place in range(len(sequences) - 2)), (batches[1], 1)]
    first, second = [await learner.step(references) for _ in range(2)]
    assert second.loss < first.loss
    await learner.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()
    await take_checkpoints(learner, ranks, tmp_path / "checkpoints")

    ray.kill(ranks[1])
    started_s = time.monotonic()
    with pytest.raises(LearnerRankDied, match=r"^learner rank 1 of 2 died during the learner's step"):
        await learner.step(references)
    assert time.monotonic() - started_s < 60


async def take_checkpoints(learner: RemoteLearner, ranks: list[ActorHandle], folder: Path) -> None:
    """A disk that is full, for either rank and for either part of a checkpoint, costs that checkpoint and no more."""

    async def save(unfinished: Path) -> None:
        await learner.save_state(unfinished / "learner")
        await learner.save(unfinished / "student")

    def state(step: int) -> RunState:
        return RunState(step=step, weight_version=step, cursor=PromptCursor(), seconds=0.0)

    good = await write_checkpoint(folder, state(1), save)
    assert good is not None
    for rank in ranks:
        await rank.limit_files.remote(20_000)
        assert await write_checkpoint(folder, state(2), save) is None
        await rank.limit_files.remote(resource.RLIM_INFINITY)
    await ranks[0].limit_files.remote(20_000)
    with pytest.raises(OSError, match="can't write"):
        await learner.save(folder / "student")
    await ranks[0].limit_files.remote(resource.RLIM_INFINITY)
    assert find_last_good(folder) == good
    await learner.load_state(good / "learner")
    assert await write_checkpoint(folder, state(2), save) == folder / "step-000002"
