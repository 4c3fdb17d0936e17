"""Checkpoints: folders ``step-000020`` that are whole or skipped. What the run is taken up again from.

Owns the folder's names, its manifest, which one is the last good one and which are kept. Knows nothing of Ray.

The manifest is compared before anything is read: that finds damage, not malice, for who can write the folder can write
its manifest too. So nothing that is read can run code (``checkpoint_reading``), but weights can be anybody's: take up
only runs whose folder you trust.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from common.errors import UserError
from common.files import fsync
from trainer.checkpoint_reading import CheckpointPlanner, CheckpointReader
from trainer.prompts import PromptCursor
from trainer.ranks import Ranks

logger = logging.getLogger(__name__)

LEARNER, STUDENT, AHEAD = "learner", "student", "ahead.npz"
"""What a checkpoint holds besides its state and its manifest: the learner's state, the student as it can be served, and
the next step's sequences where they have been collected."""
_NAME = re.compile(r"step-(\d{6,})")


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those that were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where the run stood when the checkpoint was taken."""

    step: int
    weight_version: int
    cursor: PromptCursor
    seconds: float  # of the run so far
    accuracy: float | None = None  # held out, of these weights; None where they were not evaluated
    ahead_seconds: float | None = None  # it took to collect the next step's sequences; None where none are here

    @property
    def last_collected_step(self) -> int:
        """The last step whose sequences are trained, or are in the checkpoint."""
        return self.step if self.ahead_seconds is None else self.step + 1

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "RunState":
        fields = json.loads(path.read_text())
        return cls(**{**fields, "cursor": PromptCursor(**fields["cursor"])})


async def write_checkpoint(
    folder: Path, state: RunState, save_learner: Callable[[Path], Awaitable[None]]
) -> Path | None:
    """Write ``folder/step-NNNNNN``: what ``save_learner`` puts into the folder it is given, state.json, the manifest.

    Returns its path; None where the disk failed or is full, which is logged, leaves nothing and stops no run. Raises
    UserError where the learner's state is not there: its machine has another folder of this name.
    """
    path = folder / f"step-{state.step:06d}"
    unfinished = folder / f".{path.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        await save_learner(unfinished)
        if not (unfinished / LEARNER).is_dir():
            shutil.rmtree(unfinished)
            raise UserError(
                f"run_dir: the learner has saved its state, but not in {unfinished} as this machine sees it; expected "
                "a folder that all machines of the run share"
            )
        state.write(unfinished / "state.json")
        (unfinished / "manifest.json").write_text(json.dumps(_manifest(unfinished), indent=2) + "\n")
        for written in (*unfinished.rglob("*"), unfinished):
            fsync(written)
        if path.exists():  # a damaged one, or the run would have gone on from it
            shutil.rmtree(path)
        unfinished.rename(path)
        fsync(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        logger.warning("no checkpoint after step %d, the run goes on: %s", state.step, error)
        return None
    return path


def find_last_good(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written. Others are left where they are, with a warning."""
    for path in reversed(_checkpoints(folder)):
        try:
            check(path)
        except DamagedCheckpoint as error:
            logger.warning("skipped: %s", error)
        else:
            return path
    return None


def is_last(path: Path) -> bool:
    """Whether a checkpoint is there still, and none after it, be it damaged. Reads no file."""
    return _checkpoints(path.parent)[-1:] == [path]


def check(path: Path) -> None:
    """Raise DamagedCheckpoint naming the first file that is missing or differs from the manifest."""
    try:
        expected = json.loads((path / "manifest.json").read_text())
        found = _manifest(path)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"checkpoint {path}: {error}") from error
    if not isinstance(expected, dict):
        raise DamagedCheckpoint(f"checkpoint {path}: manifest.json holds no files")
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise DamagedCheckpoint(f"checkpoint {path}: {name} is {found.get(name)}, expected {expected.get(name)}")


def clear_after(folder: Path, step: int) -> None:
    """Make room for a run that goes on from ``step``: what was being written is removed, and later checkpoints, which
    are damaged or the run would go on from one, are named ``damaged-step-NNNNNN``, to count no more.
    """
    for unfinished in folder.glob(".step-*.unfinished"):
        shutil.rmtree(unfinished)
    for path in _checkpoints(folder):
        if _step_of(path) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, *, keep_last: int, keep_best: bool) -> None:
    """Remove all but the last ``keep_last`` and, with ``keep_best``, the one of the highest held-out accuracy.

    To be called after a checkpoint has been written, never before.
    """
    assert keep_last >= 1, keep_last
    paths = _checkpoints(folder)
    kept = set(paths[-keep_last:])
    if keep_best:
        kept |= set(_best(paths))
    for path in paths:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- the learner


def save_tensors(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: dict[str, object], ranks: Ranks
) -> None:
    """Model, optimizer, scheduler and torch's random state on the CPU: no other is drawn from. Every rank writes its
    part into the same folder, at once.

    Raises OSError, on every rank, if one can't.
    """
    try:
        save(_tensors(model, optimizer, scheduler), checkpoint_id=folder, no_dist=ranks.mesh is None)
    except CheckpointException as error:  # a BaseException, which would pass by those who handle a full disk
        raise OSError(f"can't write {folder}: {error}") from error


def load_tensors(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: dict[str, object], ranks: Ranks
) -> dict[str, object]:
    """Put back what ``save_tensors`` wrote, in place, on every rank and on whatever device the model is. Returns the
    scheduler's state.

    Raises OSError if it can't.
    """
    kernels = [group["fused"] for group in optimizer.param_groups]  # which ones is for this device to say
    tensors = _tensors(model, optimizer, scheduler)
    try:
        load(tensors, storage_reader=CheckpointReader(folder), planner=CheckpointPlanner(), no_dist=ranks.mesh is None)
    except CheckpointException as error:
        raise OSError(f"can't read {folder}: {error}") from error
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    for group, fused in zip(optimizer.param_groups, kernels, strict=True):
        group["fused"] = fused
    torch.set_rng_state(tensors["rng"])
    scheduler_state: dict[str, object] = tensors["scheduler"]
    return scheduler_state


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: dict[str, object]) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "scheduler": scheduler, "rng": torch.get_rng_state()}


def _checkpoints(folder: Path) -> list[Path]:
    """Finished ones, from old to new."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _best(paths: list[Path]) -> list[Path]:
    accuracies: dict[Path, float] = {}
    for path in paths:
        try:
            accuracy = RunState.read(path / "state.json").accuracy
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one is no best one
        if accuracy is not None:
            accuracies[path] = accuracy
    return [max(accuracies, key=accuracies.__getitem__)] if accuracies else []


def _manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file but the manifest."""
    manifest: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "manifest.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return manifest
