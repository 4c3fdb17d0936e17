"""Errors a user can act on. Knows no one."""


class UserError(ValueError):
    """Something the user gave can't be used. The message is one line: what, what was got, what is expected.

    The command line prints the message alone and exits with 2; every other exception is ours and keeps its traceback.
    """
