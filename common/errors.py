"""Errors a user can act on. Knows no one."""


class UserError(ValueError):
    """Something the user gave can't be used. The message is one line: what, what was got, what is expected.

    The command line prints the message alone and exits with 2; every other exception is ours and keeps its traceback.
    """


class RunEnds(RuntimeError):
    """A run can't go on, for a reason outside the program: repairs are used up, memory or disk are. One line, as it is
    to be shown: what, where, what to do.

    The command line prints it alone and exits with 1; the run can be resumed.
    """


def one_line(error: object) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())
