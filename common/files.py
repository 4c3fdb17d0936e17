"""Files that are whole or not there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write or replace a file: after a crash the old text is there, or the new one, and no piece of either."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    fsync(unfinished)
    unfinished.rename(path)
    fsync(path.parent)


def is_passing(name: str) -> bool:
    """Whether a file or folder of this name is being written or removed, here or by who writes segments or checkpoints.

    Not every hidden one is: a checkpoint holds ``.metadata``.
    """
    return name.startswith(".") and name.endswith((".unfinished", ".dropped"))


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
