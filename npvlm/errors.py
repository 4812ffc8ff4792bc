"""The two errors a caller may meet; each message is one sentence that says what to do next."""


class NpvlmError(Exception):
    """A model, a file or the machine is at fault."""

    exit_code = 3


class UsageError(NpvlmError):
    """The request itself is at fault: a flag, a prompt, an argument."""

    exit_code = 2
