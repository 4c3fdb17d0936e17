"""Handles SIGTERM, which a stopped job or container receives."""

import asyncio
import signal


def cancel_on_sigterm() -> None:
    """Make SIGTERM cancel the current task, as Ctrl-C does. Replaces an earlier handler."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
