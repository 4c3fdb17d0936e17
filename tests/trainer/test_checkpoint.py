import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from common.config import LoRA, Trainer
from common.errors import UserError
from common.sequence import MixedSequence
from trainer.checkpoint import (
    RunState,
    clear_after,
    find_last_good,
    load_tensors,
    prune,
    save_tensors,
    write_checkpoint,
)
from trainer.learner import Learner
from trainer.prompts import PromptCursor
from trainer.ranks import ALONE


def state(step: int, accuracy: float | None = None) -> RunState:
    cursor = PromptCursor(epoch=1, position=step)
    return RunState(step=step, weight_version=step, cursor=cursor, seconds=1.5, accuracy=accuracy)


async def save_bytes(folder: Path) -> None:
    (folder / "learner").mkdir()
    (folder / "learner" / "weights").write_bytes(b"w" * 1000)


def written(folder: Path, *states: RunState) -> list[Path]:
    paths = [asyncio.run(write_checkpoint(folder, each, save_bytes)) for each in states]
    assert None not in paths
    return [path for path in paths if path is not None]


def damage_byte(path: Path) -> None:
    (path / "learner" / "weights").write_bytes(b"v" + b"w" * 999)


def truncate(path: Path) -> None:
    (path / "learner" / "weights").write_bytes(b"w" * 999)


def remove_file(path: Path) -> None:
    (path / "state.json").unlink()


def tear_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"learner/wei')


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def leave_unfinished(path: Path) -> None:
    path.rename(path.with_name(f".{path.name}.unfinished"))


@pytest.mark.parametrize("harm", [damage_byte, truncate, remove_file, tear_manifest, remove_manifest, leave_unfinished])
def test_a_harmed_checkpoint_is_skipped_and_the_older_one_found(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    older, newer = written(tmp_path, state(999_999), state(1_000_000))
    assert find_last_good(tmp_path) == newer
    harm(newer)
    assert find_last_good(tmp_path) == older


def test_a_checkpoint_without_the_learner_s_state_is_refused_and_names_the_setting(tmp_path: Path) -> None:
    async def save_elsewhere(folder: Path) -> None:
        """On another machine."""

    with pytest.raises(UserError, match=r"^run_dir: .*this machine does not find it in .*step-000001"):
        asyncio.run(write_checkpoint(tmp_path, state(1), save_elsewhere))
    assert list(tmp_path.iterdir()) == []


def test_without_a_checkpoint_none_is_found(tmp_path: Path) -> None:
    assert find_last_good(tmp_path / "checkpoints") is None


def test_the_state_comes_back_as_it_was(tmp_path: Path) -> None:
    (path,) = written(tmp_path, state(3, accuracy=0.5))
    assert RunState.read(path / "state.json") == state(3, accuracy=0.5)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    written(tmp_path, state(1, 0.1), state(2, 0.9), state(3, 0.2), state(4), state(5, 0.3))
    prune(tmp_path, keep_last=2, keep_best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]


def test_a_damaged_checkpoint_takes_no_good_one_s_place(tmp_path: Path) -> None:
    written(tmp_path, state(1), state(2), state(3))
    damage_byte(tmp_path / "step-000003")
    (tmp_path / ".step-000004.unfinished" / "learner").mkdir(parents=True)
    clear_after(tmp_path, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["damaged-step-000003", "step-000001", "step-000002"]
    written(tmp_path, state(3))
    prune(tmp_path, keep_last=1, keep_best=False)
    assert find_last_good(tmp_path) == tmp_path / "step-000003"


def test_files_that_may_not_grow_leave_the_older_checkpoint_and_nothing_unfinished(tmp_path: Path) -> None:
    (older,) = written(tmp_path, state(1))
    script = """
        import asyncio, resource, signal, sys
        from pathlib import Path
        import torch
        from trainer.checkpoint import RunState, save_tensors, write_checkpoint
        from trainer.prompts import PromptCursor
        from trainer.ranks import ALONE

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        state = RunState(step=2, weight_version=2, cursor=PromptCursor(), seconds=0.0)
        model = torch.nn.Linear(300, 300)
        optimizer = torch.optim.AdamW(model.parameters())

        async def save(folder):
            save_tensors(folder / "learner", model, optimizer, {"last_epoch": 2}, ALONE)

        assert asyncio.run(write_checkpoint(Path(sys.argv[1]), state, save)) is None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True)
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    assert find_last_good(tmp_path) == older


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["all weights", "adapter"])
def test_a_learner_that_is_taken_up_again_ends_with_the_same_weights_bit_for_bit(
    tmp_path: Path,
    make_model: Callable[..., PreTrainedModel],
    save_model: Callable[..., str],
    written_by: Callable[..., list[MixedSequence]],
    lora: LoRA | None,
) -> None:
    student = save_model(make_model(seed=0))
    steps = [written_by(make_model(seed=1), seed=seed) for seed in range(5)]
    config = Trainer(learning_rate=1e-2, num_steps=5, warmup_steps=3, decay_fraction=0.4, weight_decay=0.1, lora=lora)

    learner = Learner(student, config, seed=0)
    for step in steps[:2]:
        learner.step(step)

    async def save(folder: Path) -> None:
        learner.save_state(folder / "learner")

    path = asyncio.run(write_checkpoint(tmp_path / "checkpoints", state(2), save))
    assert path is not None
    reports = [learner.step(step) for step in steps[2:]]

    resumed = Learner(student, config, seed=0)
    resumed.load_state(path / "learner")
    again = [resumed.step(step) for step in steps[2:]]

    assert [report.learning_rate for report in again] == [report.learning_rate for report in reports]
    assert [report.loss for report in again] == [report.loss for report in reports]
    expected = dict(learner.model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in resumed.model.named_parameters())


@pytest.mark.parametrize("fused", [True, None], ids=["as on a GPU", "as on a processor"])
def test_what_one_device_s_optimizer_stored_another_s_goes_on_with_by_its_own_kernels(
    tmp_path: Path, fused: bool | None
) -> None:
    """Processors have the fused kernel, too, which is what a GPU gets."""

    def optimized(fused: bool | None) -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)

    def step(model: nn.Linear, optimizer: torch.optim.AdamW) -> None:
        model(torch.arange(20.0).reshape(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = optimized(fused)
    step(model, optimizer)
    save_tensors(tmp_path / "learner", model, optimizer, {"last_epoch": 1}, ALONE)
    step(model, optimizer)
    other_fused = None if fused else True
    other, others = optimized(other_fused)
    load_tensors(tmp_path / "learner", other, others, {"last_epoch": 0}, ALONE)
    assert [group["fused"] for group in others.param_groups] == [other_fused]
    step(other, others)
    torch.testing.assert_close(other.weight, model.weight)


def test_a_run_that_becomes_longer_has_the_longer_run_s_learning_rate_at_once(
    tmp_path: Path,
    make_model: Callable[..., PreTrainedModel],
    save_model: Callable[..., str],
    written_by: Callable[..., list[MixedSequence]],
) -> None:
    student, sequences = save_model(make_model(seed=0)), written_by(make_model(seed=1))
    short, long = (Trainer(num_steps=steps, decay_fraction=0.5, learning_rate=1e-3) for steps in (2, 8))
    learner = Learner(student, short, seed=0)
    for _ in range(2):
        learner.step(sequences)
    learner.save_state(tmp_path / "state")
    longer = Learner(student, long, seed=0)
    longer.load_state(tmp_path / "state")
    rates = [longer.step(sequences).learning_rate for _ in range(6)]
    assert rates == pytest.approx([1e-3, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
