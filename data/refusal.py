"""The one exception for input that is refused: shown as a single line, exit code 2, nothing written."""


class Refused(Exception):
    """Input that cannot be used; the message says what, where and the remedy, in one line."""


def at_least(name: str, value: float, least: float) -> None:
    """Raises Refused on a setting below its least value."""
    if value < least:
        raise Refused(f"{name} = {value}: it must be at least {least}")
