"""The error for input that cannot be used: its text names the argument, the value and what is allowed."""


class InputError(ValueError):
    """Bad input; the command line prints its text as one line and exits with code 2."""
