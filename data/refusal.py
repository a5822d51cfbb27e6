"""The one exception for input that is refused: shown as a single line, exit code 2, nothing written."""


class Refused(Exception):
    """Input that cannot be used; the message says what, where and the remedy, in one line."""
