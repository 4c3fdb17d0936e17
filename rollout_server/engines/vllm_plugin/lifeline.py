"""vLLM's processes end with the one that started them. Linux only.

A killed engine actor can't tell them to. vLLM's engine process does not notice by itself: it waits for requests for
ever and holds the accelerator's memory, so that the run can't be resumed on the same machine.
"""

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone. Does nothing in one that multiprocessing did not
    start.

    The kernel means the parent's *thread*: engines must be started on one that lasts as long as they do.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGKILL)
