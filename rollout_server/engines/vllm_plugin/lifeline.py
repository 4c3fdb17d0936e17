"""Ends vLLM's processes together with the process that started them. Linux only.

A killed engine actor can't stop them. vLLM's engine process does not notice by itself: it waits for requests forever
and holds the accelerator's memory, so the run can't be resumed on the same machine.
"""

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent exits. Does nothing in processes that multiprocessing did not
    start.

    The kernel watches the parent's *thread*: start engines on a thread that lives as long as they do.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:  # the parent exited before the call
        os.kill(os.getpid(), signal.SIGKILL)
