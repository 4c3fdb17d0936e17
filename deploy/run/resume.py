"""Which run ``--resume`` continues, from which checkpoint, and what is rewound first. Independent of Ray."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig
from common.config.source import ResolvedConfig, config_leaves, read_config
from common.errors import UserError
from common.run_dir import RunDir
from common.sequence import MixedSequence
from rollout_server.traces.writer import drop_segments_after
from trainer.checkpoint import AHEAD, RunState, clear_after, find_last_good, is_last
from trainer.loop import Start
from trainer.reports import Batch, Collected
from trainer.sequence_files import read_sequences

logger = logging.getLogger(__name__)

MAY_DIFFER = ("run_dir", "trainer.num_steps", "placement", "logging", "checkpoints", "storage", "supervision")
"""Settings, or groups of settings, that may change when a run is resumed. Time-outs may change too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumable:
    """A run that can be resumed, and its checkpoint."""

    folder: RunDir
    checkpoint: Path
    state: RunState

    def finished_summary(self, num_steps: int) -> dict[str, object] | None:
        """The run's summary if it has finished ``num_steps`` steps.

        Raises UserError if it has done more steps and has no summary, because steps can't be undone.
        """
        summary = self.folder.read_summary()
        if summary is None and self.state.step > num_steps:
            raise UserError(
                f"trainer.num_steps must be >= {self.state.step}, the steps that {self.folder.path} has finished, got "
                f"{num_steps}"
            )
        return summary if self.state.step >= num_steps else None

    def start(self, collected: Callable[[MixedSequence], Collected]) -> Start:
        """Where the loop starts. ``collected`` wraps a sequence from the checkpoint like those from rollouts."""
        if self.state.ahead_seconds is None:
            return Start(step=self.state.step)
        items = [collected(sequence) for sequence in read_sequences(self.checkpoint / AHEAD)]
        return Start(step=self.state.step, ahead=Batch(items=items, seconds=self.state.ahead_seconds))


def find_resumable(config: RunConfig) -> Resumable:
    """The newest run of ``run_dir``, ``run_dir-2``, ... that has a good checkpoint, with its last good one.

    Raises UserError if there is none.
    """
    folders = RunDir.all(config.run_dir)
    for folder in reversed(folders):
        resumable = last_resumable(folder)
        if resumable is not None:
            if folder != folders[-1]:
                logger.warning("%s has no checkpoint; resuming %s", folders[-1].path, folder.path)
            return resumable
    looked = f"none of {', '.join(str(folder.path) for folder in folders)} has one" if folders else "no such folder"
    raise UserError(f"run_dir: {config.run_dir!r} has no checkpoint to resume ({looked}); leave --resume out to start")


def found_again(found: Resumable, num_steps: int) -> Resumable:
    """The same run at its present last good checkpoint, because another process may have continued the run before the
    caller got its lock.

    Raises UserError if that process has finished the run, or has left no checkpoint.
    """
    if is_last(found.checkpoint):
        return found
    now = last_resumable(found.folder)
    if now is None:
        raise UserError(
            f"{found.folder.path}: another process has restarted this run from the beginning; expected its checkpoint"
        )
    if now.finished_summary(num_steps) is not None:
        raise UserError(f"{found.folder.path}: another process has finished this run in the meantime")
    return now


def refuse_other_settings(folder: RunDir, resolved: ResolvedConfig) -> None:
    """Raise UserError naming the first setting that differs from the run's and must not."""
    try:
        stored = dict(config_leaves(read_config(folder.path / "config.yaml").config))
    except UserError as error:
        raise UserError(f"{folder.path}: its settings can't be read by this version: {error}") from error
    given = dict(config_leaves(resolved.config))
    for key in [*given, *stored]:
        if stored.get(key) != given.get(key) and not _may_differ(key):
            raise UserError(
                f"{key}: the run in {folder.path} {_has(stored, key)}, this configuration {_has(given, key)}; only "
                f"{', '.join(MAY_DIFFER)} and time-outs may change when a run is resumed"
            )


def rewind(resumable: Resumable, resolved: ResolvedConfig) -> None:
    """Rewind the run's folder to the checkpoint, and store the settings that the run continues with.

    The caller holds the run's lock. After a crash in this function the run can be resumed from the same checkpoint.
    """
    folder, state = resumable.folder, resumable.state
    folder.remove_summary()
    folder.drop_metrics_after(state.step)
    drop_segments_after(folder.traces, state.last_collected_step)
    clear_after(folder.checkpoints, state.step)
    folder.write_config(resolved)


def last_resumable(folder: RunDir) -> Resumable | None:
    """The run at its last good checkpoint, or None if it has none."""
    checkpoint = find_last_good(folder.checkpoints)
    if checkpoint is None:
        return None
    return Resumable(folder=folder, checkpoint=checkpoint, state=RunState.read(checkpoint / "state.json"))


def rewind_to_beginning(folder: RunDir) -> None:
    """Rewind the run's folder to before the first step."""
    folder.drop_metrics_after(-1)
    drop_segments_after(folder.traces, 0)
    clear_after(folder.checkpoints, 0)


def _may_differ(key: str) -> bool:
    return key.endswith("timeout_s") or any(key == free or key.startswith(f"{free}.") for free in MAY_DIFFER)


def _has(leaves: Mapping[str, object], key: str) -> str:
    return f"has {leaves[key]!r}" if key in leaves else "has none"
