"""Errors that a user can act on. Imports nothing of ours."""


class UserError(ValueError):
    """Invalid user input. The message is one line: what, what was got, what is expected.

    The command line prints only the message and exits with 2. Any error but this and RunEnds is a bug, with its
    traceback.
    """


class RunEnds(RuntimeError):
    """The run can't continue for a reason outside the program, such as no restarts left or a full disk.

    The message is one line for the user: what, where, what to do. The command line prints only that and exits with 1;
    the run can be resumed.
    """


def one_line(error: object) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())
