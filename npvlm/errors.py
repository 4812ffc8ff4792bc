"""The two errors a caller may meet; each message is one sentence that says what to do next."""

import re

# What moves the cursor, ends a line, or turns the direction of the text around it.
STEERING = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_REASON = 160  # characters
_UNSHOWN = re.compile(rf"[{STEERING}\ud800-\udc7f\udd00-\udfff]")  # surrogates that are no bytes


class NpvlmError(Exception):
    """A model, a file or the machine is at fault."""

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class UsageError(NpvlmError):
    """The request itself is at fault: a flag, a prompt, an argument."""

    exit_code = 2


def why(error: object) -> str:
    """What an error of a library says, on one short line; its kind where it says nothing."""
    return " ".join(str(error).split()).rstrip(".")[:_REASON] or type(error).__name__


def shortened(name: object, most: int) -> str:
    """A name as it fits into a sentence: a file may have any."""
    said = str(name)
    said = said if said.isprintable() else repr(said)[1:-1]
    return said if len(said) <= most else f"{said[: most - 3]}..."


def shown(text: str) -> str:
    """Spell out what would steer a terminal or break a line: names in files are anybody's."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
