"""Turns errors that end a run into one line if that is enough: out of memory, disk full, a dead process. Pure."""

import errno

import torch
from ray.exceptions import RayError, RayTaskError

from common.errors import RunEnds, one_line
from common.waiting import WaitedTooLong
from deploy.supervision.health_monitor import cause_of
from rollout_server.pool import RolloutError
from trainer.actors import LearnerRankDied
from trainer.loop import StaleSequences
from trainer.probe import WeightSyncError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLEAR = (WaitedTooLong, LearnerRankDied, WeightSyncError, StaleSequences)  # their own messages are sufficient
_TO_LOWER = {
    "student engine": "engines.student.kv_cache_gib or max_num_seqs (on GPUs gpu_memory_utilization)",
    "teacher engine": "engines.teacher.kv_cache_gib or max_num_seqs (on GPUs gpu_memory_utilization)",
    "controller": "sampling.max_in_flight",
    "learner": "trainer.tokens_per_micro_batch, or set trainer.activation_checkpointing",
}


def clear_end(error: BaseException) -> RunEnds | None:
    """A one-line error for an exception that is not a bug of ours, otherwise None."""
    cause = cause_of(error)
    if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
        return RunEnds(f"{cause.filename or 'the disk'}: {cause.strerror or cause}; free space, then resume (--resume)")
    if isinstance(cause, torch.OutOfMemoryError | MemoryError):
        reason = one_line(cause) or "out of memory"
        return RunEnds(f"{reason}; lower {_TO_LOWER['learner']}, then resume (--resume)")
    if isinstance(cause, _CLEAR):
        return RunEnds(one_line(cause))
    is_gone = isinstance(cause, RayError) and not isinstance(cause, RayTaskError)  # a process, node or object is gone
    if is_gone or isinstance(cause, RolloutError):
        return RunEnds(f"{one_line(cause)}; its log is in Ray's session folder")
    return None


def what_to_lower(who: str) -> str:
    """The settings that determine how much memory a process of the run needs."""
    return next((settings for name, settings in _TO_LOWER.items() if who.startswith(name)), "its memory use")
