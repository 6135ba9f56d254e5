"""The error a command shows to its user as one message, without a traceback."""


class CommandError(Exception):
    """Something the user can put right: what was found, what was expected, what to do next."""
