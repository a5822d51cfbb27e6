"""Dataclasses from command lines, by tyro; a mistake is refused in one line with the nearest valid key."""

import contextlib
import io
import re

from duotone.data.refusal import Refused


def parse(cls: type, arguments: list[str], *, default=None, name: str | None = None):
    """An instance of `cls` from its flags, over `default` where given; raises Refused on a wrong key or value."""
    import tyro

    arguments = [whole_number(a) for a in arguments]
    wants_help = any(a in ("-h", "--help") for a in arguments)
    errors = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(errors):
            return tyro.cli(cls, args=arguments, prog=name, config=(tyro.conf.CascadeSubcommandArgs,), **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise Refused(one_line(errors.getvalue())) from None


def whole_number(argument: str) -> str:
    """1e6 as 1000000, so that counts may be written the short way."""
    if re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", argument) and float(argument).is_integer():
        return str(int(float(argument)))
    return argument


def one_line(box: str) -> str:
    """The message in the library's box, and the key that it thinks was meant."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        text = re.sub(r"[│╭╮╰╯─]+", " ", line)
        if "───" in line:
            sections.append([])
        elif text.strip():
            sections[-1].append(text.strip())
    spoken = [re.sub(r"\s+", " ", " ".join(lines)) for lines in sections if lines]
    meant = re.search(r"Perhaps you meant:.*?(--[\w.-]+)", " ".join(spoken))
    hint = f"; the nearest key is {meant.group(1)}" if meant else ""
    return f"{(spoken or ['the command line cannot be read'])[0].rstrip('.')}{hint} (see --help)"
