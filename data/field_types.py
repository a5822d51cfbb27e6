"""Checks the values of a dataclass's fields against their annotated types, which Python itself does not."""

import re
import types
import typing
from dataclasses import fields, is_dataclass

from duotone.data.refusal import Refused

OURS = __name__.partition(".")[0] + "."


def refuse_other_types(part, key: str = "") -> None:
    """Raises Refused for the first field, of a dataclass or of one nested in it, whose value has another type.

    images = 1e6 in a recipe is a float, which would pass every comparison and fail deep inside the run.
    """
    hints = typing.get_type_hints(type(part))
    for field in fields(part):
        name, value = key + field.name, getattr(part, field.name)
        if not fits(value, hints[field.name]):
            raise Refused(f"{name} = {value!r}: it must be {written(hints[field.name])}")
        inside = enumerate(value) if isinstance(value, tuple) else ()
        for there, inner in [(name, value), *((f"{name}.{i}", inner) for i, inner in inside)]:
            if is_dataclass(inner):
                refuse_other_types(inner, f"{there}.")


def fits(value, hint) -> bool:
    """Whether a value has the annotated type; a dataclass from outside this package fits any of ours."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if is_dataclass(hint):
        own = is_dataclass(value) and not isinstance(value, type) and not type(value).__module__.startswith(OURS)
        return own or isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def written(hint) -> str:
    """An annotation as written in the code, without module names."""
    return re.sub(
        r"\b[a-z_]\w*\.", "", hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    )
