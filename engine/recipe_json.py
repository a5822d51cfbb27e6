"""Recipes as JSON, as stored with the weights that they trained."""

import dataclasses
import json
import types
import typing
from functools import cache
from pathlib import Path

from duotone.data.refusal import Refused
from duotone.engine.conditioning.base import Facts
from duotone.engine.recipe import Recipe


def to_json(value) -> object:
    """A dataclass tree as plain JSON values; each dataclass names its type."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_json(value, kind=None) -> object:
    """The dataclass tree of a JSON value; builds only the dataclasses that a stored model can hold."""
    if isinstance(value, dict) and "type" in value:
        cls = dataclass_named(value["type"])
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: from_json(v, hints[k]) for k, v in value.items() if k in known})
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    return Path(value) if isinstance(value, str) and wants_path(kind) else value


def wants_path(kind) -> bool:
    return kind is Path or (isinstance(kind, types.UnionType) and Path in typing.get_args(kind))


def dataclass_named(name: str) -> type:
    """The dataclass of this name, whatever its file, so that files may move; older recipes also store the module."""
    found = configurations().get(str(name).rpartition(":")[2])
    if found is None:
        raise Refused(
            f"recipe names the type {name!r}, which this version of duotone does not have; if it is your own, import "
            "the file that registers it (duotone.engine.register), or give it to the command: duotone --with FILE COMMAND"
        )
    return found


@cache
def configurations() -> dict[str, type]:
    """Every dataclass that a stored model can hold, by name."""
    found: dict[str, type] = {}
    waiting: list = [Recipe, Facts]
    while waiting:
        kind = waiting.pop()
        waiting += typing.get_args(kind)
        if dataclasses.is_dataclass(kind) and kind.__name__ not in found:
            found[kind.__name__] = kind
            waiting += typing.get_type_hints(kind).values()
    return found


def register(kind: type) -> type:
    """A decorator for your own recipe parts: every process that has imported one can load the models trained with it.

    A class that is defined again, as when a notebook's cell is rerun, replaces its earlier self. Raises Refused if
    another part has its name.
    """
    known = configurations().get(kind.__name__, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise Refused(f"{kind.__module__}.{kind.__name__}: {known.__module__} has a {kind.__name__} already; rename it")
    configurations()[kind.__name__] = kind
    return kind


def refuse_unstorable(value, key: str = "recipe") -> None:
    """Raises Refused on a part that a stored model could not name, before anything is trained with it."""
    if isinstance(value, tuple | list):
        for i, part in enumerate(value):
            refuse_unstorable(part, f"{key}.{i}")
    if not dataclasses.is_dataclass(value):
        return
    name, known = type(value).__name__, configurations().get(type(value).__name__)
    if known is not type(value):
        taken = "" if known is None else f", and {known.__module__} has a {name} already: give it another name"
        raise Refused(
            f"{key} is {type(value).__module__}.{name}, which a stored recipe could not name{taken}; "
            "put @duotone.engine.register above it, or add it to the kinds at the head of engine/recipe.py"
        )
    for field in dataclasses.fields(value):
        refuse_unstorable(getattr(value, field.name), f"{key}.{field.name}")


def flat(value, prefix: str = "") -> dict[str, object]:
    """A JSON tree as dotted keys."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{prefix}{i}.").items()}
    return {prefix[:-1]: value}


def unknown_fields(stored: dict, recipe: Recipe) -> dict[str, object]:
    """The fields of a stored recipe that this version does not have, by dotted keys."""
    known = flat(to_json(recipe))
    return {name: value for name, value in flat(stored).items() if name not in known}


FREE = (
    "data.shards",
    "out",
    "fresh",
    "log.",
    "checkpoint.",
    "preview.",
    "validation.",
    "speed.",
    "zero.",
    "accumulation",
    "data.decoder",
    "data.on_bad",
    "data.threads",
)


def differences(stored: dict, recipe: Recipe) -> list[str]:
    """The fields that make a stored recipe a different run; those that do not change the numbers are ignored.

    A field that a later version of duotone added counts as having had its default when the run began.
    """
    then, now = (flat(json.loads(json.dumps(to_json(r)))) for r in (from_json(stored), recipe))
    then = flat(stored) | then  # includes fields that this version no longer has
    return unlike(then, now, (*FREE, "images") if recipe.optimizer.schedule == "constant" else FREE)


def unlike(there: dict, here: dict, free: tuple[str, ...]) -> list[str]:
    """The fields in which two flat recipes differ, except those that are free to differ."""
    keys = [key for key in sorted(there.keys() | here.keys()) if not key.startswith(free)]
    return [f"{key}: {there.get(key)} there, {here.get(key)} here" for key in keys if there.get(key) != here.get(key)]
