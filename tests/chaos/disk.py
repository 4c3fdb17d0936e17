"""A small disk of its own for a run's traces, which can be filled: a tmpfs, mounted before the first segment."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PIECE = bytes(1 << 16)


@dataclass(frozen=True, slots=True)
class Disk:
    folder: Path

    def fill(self) -> None:
        """To the last byte."""
        descriptor = os.open(self._filler, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            with contextlib.suppress(OSError):
                while os.write(descriptor, _PIECE):
                    pass
        finally:
            os.close(descriptor)

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.folder / ".filler"


@contextlib.contextmanager
def small_disk(folder: Path, *, mebibytes: int) -> Iterator[Disk]:
    """Raises CalledProcessError where this user may not mount."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "adaswitch-chaos", str(folder)]
    subprocess.run(mount, check=True, capture_output=True, timeout=30)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True, timeout=30)


def can_mount(folder: Path) -> bool:
    """Whether ``small_disk`` works here: it takes root, and in a container CAP_SYS_ADMIN."""
    try:
        with small_disk(folder, mebibytes=1):
            return True
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        folder.rmdir()
