"""The one exception for input that is refused: shown as a single line, exit code 2, nothing written."""

import math
import re
from numbers import Integral, Real

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Refused(Exception):
    """Input that cannot be used; the message says what, where and the remedy, in one line."""

    def __str__(self) -> str:
        # Any message may name a file, and a file's name may hold line ends or terminal control characters.
        return CONTROL.sub(lambda found: repr(found[0])[1:-1], super().__str__())


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class SampleReplaced(UserWarning):
    """A sample could not be read, and the next good one was taken."""


def at_least(name: str, value: float, least: float) -> None:
    """Raises Refused for a setting below its least value."""
    if not (isinstance(value, Real) and value >= least):  # NaN fails this too
        raise Refused(f"{name} = {value}: it must be at least {least}")


def whole(name: str, value: int, least: int) -> None:
    """Raises Refused for a setting that is not a whole number or is below its least value."""
    if not (isinstance(value, Integral) and value >= least):
        raise Refused(f"{name} = {value}: it must be a whole number, at least {least}")


def above(name: str, value: float, least: float) -> None:
    """Raises Refused for a setting that is not a finite number above its bound."""
    if not (isinstance(value, Real) and least < value < math.inf):
        raise Refused(f"{name} = {value}: it must be above {least}, and finite")


def share(name: str, value: float, *, below_one: bool = False) -> None:
    """Raises Refused for a setting outside [0, 1], or outside [0, 1) with `below_one`."""
    if not (isinstance(value, Real) and 0 <= value <= 1) or (below_one and value == 1):
        raise Refused(f"{name} = {value}: it must lie in [0, 1{')' if below_one else ']'}")


def finite(name: str, value: float) -> None:
    """Raises Refused for a setting that is not a finite number."""
    if not (isinstance(value, Real) and math.isfinite(value)):
        raise Refused(f"{name} = {value}: it must be a finite number")
