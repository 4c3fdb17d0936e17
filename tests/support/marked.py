"""Processes that carry a mark in their environment, their children's children included."""

from pathlib import Path


def processes_with(name: str, value: str) -> list[str]:
    """Command lines of the processes started with the variable in their environment, defunct ones left out."""
    wanted, found = f"{name}={value}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended while we looked, or is another user's
            continue
    return found
