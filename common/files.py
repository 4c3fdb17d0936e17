"""Writing files atomically."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write or replace a file atomically: after a crash it has the old text or the new text, never a part of one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    fsync(unfinished)
    unfinished.rename(path)
    fsync(path.parent)


def is_passing(name: str) -> bool:
    """Whether a file or folder of this name is temporary: it is being written or removed.

    This module, segments and checkpoints use such names. Other hidden names are not temporary: a checkpoint contains
    ``.metadata``.
    """
    return name.startswith(".") and name.endswith((".unfinished", ".dropped"))


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of entries, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
