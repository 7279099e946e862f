"""What the command lines of this room ask of their options, before any work begins."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def whole(least: int, most: int = 2**62 - 1) -> Callable[[str], int]:
    """The type of an option of a command line: a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if not least <= int(text) <= most:
            bound = f"at least {least}" if int(text) < least else f"at most {most}"
            raise ArgumentTypeError(f"expected {bound}, got {text}")
        return int(text)

    return number


def folder(text: str) -> Path:
    """The same for a folder, made before the work begins whose result is to be written there."""
    made = Path(text)
    try:
        made.mkdir(parents=True, exist_ok=True)
        probe = made / ".ringref"
        probe.touch()
        probe.unlink(missing_ok=True)  # another rank's
    except OSError as error:
        raise ArgumentTypeError(f"cannot write there: {error}") from None
    return made
