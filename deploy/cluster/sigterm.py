"""SIGTERM, as a job's stop or a container's sends it."""

import asyncio
import signal


def end_in_order_on_sigterm() -> None:
    """Let it end this task as Ctrl-C does. The last to ask for the signal gets it."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
