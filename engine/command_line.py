"""Parses command lines into dataclasses with tyro; a mistake is refused in one line with the nearest valid key."""

import contextlib
import io
import re
import sys
from dataclasses import is_dataclass
from typing import get_args, get_origin, get_type_hints

from duotone.data.field_types import refuse_other_types
from duotone.data.refusal import Refused


def parse(cls: type, arguments: list[str], *, default=None, name: str | None = None):
    """An instance of `cls` from its flags, on top of `default` if given; raises Refused on a wrong key or value."""
    import tyro

    if default is not None:
        refuse_other_types(default)  # names the field as the recipe's file does, before tyro names it in its own way
    kinds = kinds_of(cls)
    arguments = last_of_each(arguments, kinds)
    wants_help = any(a in ("-h", "--help") for a in arguments)
    errors = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(errors):
            settings = {"config": (tyro.conf.CascadeSubcommandArgs,), "registry": numbers()}
            return tyro.cli(cls, args=arguments, prog=name, **settings, **extra)
    except BrokenPipeError:  # the pager that showed --help has ended
        sys.exit(1)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        box = errors.getvalue()
        raise Refused(unknown_kind(kinds, arguments) or key_of_another_kind(kinds, box) or one_line(box)) from None


def numbers():
    """A registry that reads 1e6 as a whole number in integer fields alone: a prompt or a folder may be called 1e6."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(told) -> PrimitiveConstructorSpec | None:
        if told.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda words: whole_number(words[0]),
            is_instance=lambda value: isinstance(value, int),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def whole_number(word: str) -> int:
    """A whole number, which may be written short: 1e6 is 1000000."""
    short = re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", word) and float(word).is_integer()
    return int(float(word)) if short else int(word)


def last_of_each(arguments: list[str], kinds: dict) -> list[str]:
    """Keeps the last of a flag that is given several times, as when an override is appended to a command.

    Without fields of several kinds tyro does so itself, and positional arguments may follow a flag's value.
    """
    if not kinds:
        return arguments
    groups: list[list[str]] = [[]]
    for argument in arguments:
        if argument.startswith("--") or re.split(r"\.\d+:|:", argument)[0] in kinds and ":" in argument:
            groups.append([])
        groups[-1].append(argument)
    last = {flag_of(group[0]): place for place, group in enumerate(groups) if group}
    kept = (group for place, group in enumerate(groups) if group and last[flag_of(group[0])] == place)
    return [argument for group in kept for argument in group]


def flag_of(argument: str) -> str:
    """A flag without its value, in one spelling; --no-x counts as --x."""
    name = argument.split("=")[0].replace("_", "-")
    return re.sub(r"(^--|\.)no-", r"\1", name) if name.startswith("--") else argument


def kinds_of(cls: type) -> dict[str, dict[str, type]]:
    """Fields that take one of several dataclasses, by their command-line names: {"objective": {"edm": EDM, ...}}."""
    found = {}
    for field, hint in get_type_hints(cls).items():
        hint = get_args(hint)[0] if get_origin(hint) is tuple else hint
        kinds = [kind for kind in get_args(hint) if is_dataclass(kind)]
        if len(kinds) > 1:
            found[field] = {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind.__name__).lower(): kind for kind in kinds}
    return found


def unknown_kind(kinds: dict, arguments: list[str]) -> str | None:
    """The message for a kind that does not exist (objective:foo) or is given as a key (--objective foo), or None."""
    for argument in arguments:
        word = re.fullmatch(r"(?:--(?=[\w.]+$))?([\w.]+?)(?::([\w-]*))?", argument)
        known = kinds.get(re.sub(r"\.\d+$", "", word[1]), {}) if word else {}
        if known and word[2] not in known:
            return f"{argument} is unknown: give one of {', '.join(f'{word[1]}:{kind}' for kind in known)}"
    return None


def key_of_another_kind(kinds: dict, box: str) -> str | None:
    """The message for a key, in tyro's error box, that belongs only to kinds that were not chosen, or None."""
    for field, number, key in re.findall(r"--(\w+)(\.\d+)?\.([\w-]+) \(applied", re.sub(r"[\s│]+", " ", box)):
        name = key.replace("-", "_")
        owners = [f"{field}{number}:{k}" for k, c in kinds.get(field, {}).items() if name in c.__dataclass_fields__]
        if owners:
            return f"--{field}{number}.{key} belongs to {' and '.join(owners)}: choose that, or leave it out"
    return None


def one_line(box: str) -> str:
    """The message in tyro's error box, in one line, with the key that tyro thinks was meant."""
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
