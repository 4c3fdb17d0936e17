"""Checkpoints: folders ``step-000020`` from which a run resumes. Incomplete or damaged ones are skipped.

Owns the folder's names, its manifest, which checkpoint is the last good one and which are kept. Does not depend on Ray.

The manifest is checked before anything is read. That detects damage but not tampering, because whoever can write the
folder can write its manifest too. Reading never runs code from a file (``checkpoint_reading``), but the weights could
be anyone's, so resume only runs whose folder you trust.
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
"""Parts of a checkpoint besides its state and its manifest: the learner's state, the student for serving, and the next
step's sequences if they were collected."""
_NAME = re.compile(r"step-(\d{6,})")


class DamagedCheckpoint(ValueError):
    """The files of a checkpoint differ from those that were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """State of the run when the checkpoint was taken."""

    step: int
    weight_version: int
    cursor: PromptCursor
    seconds: float  # of the run so far
    accuracy: float | None = None  # held-out accuracy of these weights; None if they were not evaluated
    ahead_seconds: float | None = None  # time to collect the next step's sequences; None if there are none

    @property
    def last_collected_step(self) -> int:
        """The last step whose sequences are trained or are in the checkpoint."""
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
    """Write ``folder/step-NNNNNN``: the files that ``save_learner`` writes to its argument, state.json, the
    manifest.

    Returns its path. If the disk failed or is full, logs a warning, leaves no files and returns None; the run
    continues. Raises UserError if the learner's state is missing: its machine has another folder of this name.
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
                f"run_dir: the learner has saved its state, but this machine does not find it in {unfinished}; "
                "expected a folder that all machines of the run share"
            )
        state.write(unfinished / "state.json")
        (unfinished / "manifest.json").write_text(json.dumps(_manifest(unfinished), indent=2) + "\n")
        for written in (*unfinished.rglob("*"), unfinished):
            fsync(written)
        if path.exists():  # it is damaged, or the run would have resumed from it
            shutil.rmtree(path)
        unfinished.rename(path)
        fsync(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        logger.warning("no checkpoint after step %d, the run continues: %s", state.step, error)
        return None
    return path


def find_last_good(folder: Path) -> Path | None:
    """The newest checkpoint whose files are intact. Others stay where they are, with a warning."""
    for path in reversed(_checkpoints(folder)):
        try:
            check(path)
        except DamagedCheckpoint as error:
            logger.warning("skipped: %s", error)
        else:
            return path
    return None


def is_last(path: Path) -> bool:
    """Whether a checkpoint exists and no later one does, damaged or not. Reads no file."""
    return _checkpoints(path.parent)[-1:] == [path]


def check(path: Path) -> None:
    """Raise DamagedCheckpoint naming the first file that is missing or differs from the manifest."""
    try:
        expected = json.loads((path / "manifest.json").read_text())
        found = _manifest(path)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"checkpoint {path}: {error}") from error
    if not isinstance(expected, dict):
        raise DamagedCheckpoint(f"checkpoint {path}: manifest.json does not list files")
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise DamagedCheckpoint(f"checkpoint {path}: {name} is {found.get(name)}, expected {expected.get(name)}")


def clear_after(folder: Path, step: int) -> None:
    """Prepare for a run that resumes from ``step``: remove unfinished checkpoints, and rename later ones to
    ``damaged-step-NNNNNN``, so that they are ignored. They must be damaged, or the run would resume from one of them.
    """
    for unfinished in folder.glob(".step-*.unfinished"):
        shutil.rmtree(unfinished)
    for path in _checkpoints(folder):
        if _step_of(path) > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, *, keep_last: int, keep_best: bool) -> None:
    """Remove all but the last ``keep_last`` and, with ``keep_best``, the checkpoint with the highest held-out
    accuracy.

    Call it only after a checkpoint has been written.
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
    """Save model, optimizer, scheduler and torch's CPU random state, which is the only one in use. Every rank writes
    its part into the same folder at the same time.

    Raises OSError on every rank if one rank can't write.
    """
    try:
        save(_tensors(model, optimizer, scheduler), checkpoint_id=folder, no_dist=ranks.mesh is None)
    except CheckpointException as error:  # a BaseException, which handlers of a full disk don't catch
        raise OSError(f"can't write {folder}: {error}") from error


def load_tensors(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: dict[str, object], ranks: Ranks
) -> dict[str, object]:
    """Restore what ``save_tensors`` wrote, in place, on every rank and any device. Returns the scheduler's state.

    Raises OSError if the files can't be read.
    """
    kernels = [group["fused"] for group in optimizer.param_groups]  # depends on this device, not on the checkpoint
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
    """Finished checkpoints, from old to new."""
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
            continue  # damaged
        if accuracy is not None:
            accuracies[path] = accuracy
    return [max(accuracies, key=accuracies.__getitem__)] if accuracies else []


def _manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file except the manifest."""
    manifest: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "manifest.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return manifest
