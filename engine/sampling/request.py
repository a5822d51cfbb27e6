"""Checks of what sample() is asked for: the values of each condition, and the scale and seed of each image."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from duotone.data.refusal import Refused, whole
from duotone.engine.artifact import Model


def listed(asked: Mapping[str, Sequence | None]) -> dict[str, list]:
    """The values that were given, as lists by name; raises Refused on a string, which would become a list of its letters."""
    for name, rows in asked.items():
        if isinstance(rows, str | bytes):
            raise Refused(f"{name} = {rows!r} is one string: give a list with an entry per image, as in [{rows!r}]")
        if rows is not None and not isinstance(rows, Iterable):
            raise Refused(f"{name} = {rows!r}: give a list with an entry per image, as in [{rows!r}]")
    return {name: list(rows) for name, rows in asked.items() if rows is not None}


def refuse_other_than_model(name: str, value) -> None:
    """Raises Refused on anything but a Model, such as the path of one."""
    if not isinstance(value, Model):
        raise Refused(f"{name} is of type {type(value).__name__}: give a Model, as load(path) returns one")


def values_by_kind(model: Model, asked: dict[str, list]) -> dict[str, list]:
    """The values for each conditioner, by its kind; raises Refused on a name that no conditioner takes."""
    kinds = model.network.conditioners
    for name in asked:
        if not any(conditioner.keyword == name for conditioner in kinds.values()):
            takes = ", ".join(dict.fromkeys(c.keyword for c in kinds.values())) or "no condition, only count"
            raise Refused(f"this model takes no {name}: it takes {takes}{MASKED.get((name, takes), '')}")
    return {kind: asked[c.keyword] for kind, c in kinds.items() if c.keyword in asked}


MASKED = {
    ("images", "holes"): " (an image and its mask: give --mask with --image)",
    ("holes", "images"): " (an image alone: leave --mask out)",
}


def number_of_images(asked: dict[str, list], count: int | None) -> int:
    if count is not None:
        whole("count", count, 1)
    lengths = {name: len(rows) for name, rows in asked.items()} | ({"count": count} if count is not None else {})
    if not lengths:
        raise Refused("nothing to sample: give prompts, labels or count")
    if len(set(lengths.values())) > 1:
        raise Refused(f"these must be equal in number: {', '.join(f'{n} {k}' for k, n in lengths.items())}")
    images = next(iter(lengths.values()))
    if images < 1:
        raise Refused("nothing to sample: the list is empty")
    return images


def per_image(name: str, value, images: int) -> list[float]:
    try:
        values = [float(value)] * images if isinstance(value, Real) else [float(v) for v in [*value]]
    except (TypeError, ValueError):
        raise Refused(f"{name} = {value!r}: give one number, or one per image") from None
    if len(values) != images:
        raise Refused(f"{name} has {len(values)} entries for {images} images: give one number, or one per image")
    if not all(map(math.isfinite, values)):
        raise Refused(f"{name} = {value}: give finite numbers")
    return values


def temperatures(model: Model, values: dict, scales: list[float]) -> list[float]:
    """beta = 1 / scale of each image, for a model trained guidance-free: guidance of that scale in one forward pass."""
    if not values and set(scales) != {1.0}:
        raise Refused("guidance needs a condition: give prompts or labels, or leave guidance at 1")
    if min(scales) < 1:
        raise Refused(f"guidance = {min(scales)}: this model was trained guidance-free and takes 1 or more")
    low = model.network.conditioners["temperature"].low
    if low * max(scales) > 1 + 1e-5:  # the tolerance admits the rounded limit that the message prints
        raise Refused(f"guidance = {max(scales)}: this model was trained guidance-free up to {1 / low:g}")
    return [1 / scale for scale in scales]


def refuse_steering(steered: bool) -> None:
    """Raises Refused if a guidance-free model is to be steered: each step has one prediction, and none to move away from."""
    if steered:
        raise Refused(
            "this model was trained guidance-free: it takes guidance as one number or one per image, and no negatives, "
            "interval, rescale, rule or guide"
        )


def seeds_of(seed: int | Sequence[int | tuple[int, int]], images: int) -> list[tuple[int, int]]:
    """(seed, number) of each image. The number is the image's index if all share one seed, else 0 unless given in a pair."""
    if isinstance(seed, Integral):
        return [(int(seed), i) for i in range(images)]
    if not isinstance(seed, Sequence | np.ndarray) or not all(map(is_seed, seed)):
        raise Refused(f"seed = {seed!r}: give a whole number, or one per image")
    if len(seed) != images:
        raise Refused(f"seed has {len(seed)} entries for {images} images: give one number, or one per image")
    return [(int(s[0]), int(s[1])) if isinstance(s, tuple) else (int(s), 0) for s in seed]


def is_seed(value) -> bool:
    pair = value if isinstance(value, tuple) else (value, 0)
    return len(pair) == 2 and all(isinstance(number, Integral) for number in pair)


def negative_values(model: Model, negative: dict[str, Sequence] | None, images: int) -> dict[str, list]:
    """Negative conditions, given as {"prompts": [...]}, as values by kind."""
    if not isinstance(negative or {}, Mapping):
        raise Refused(f'negative = {negative!r}: give it by name, as in {{"prompts": [...]}}')
    negative = listed(negative or {})
    for name, rows in negative.items():
        if len(rows) != images:
            raise Refused(f"negative {name} has {len(rows)} entries for {images} images")
        if not any(conditioner.keyword == name for conditioner in model.network.conditioners.values()):
            raise Refused(f"negative {name} given, but this model takes no {name}")
    return values_by_kind(model, negative)


def refuse_without_null(model: Model, values: dict, negatives: dict) -> None:
    """Raises Refused if guidance has no unconditional branch, or one that was never trained."""
    if not values:
        raise Refused("guidance needs a condition: give prompts or labels, or leave guidance at 1")
    for kind in values:
        if kind not in negatives and not model.null_is_trained(kind, alone=bool(negatives)):
            raise Refused(
                "guidance needs a null condition, but this network was trained with condition dropout 0 for its "
                f"{model.network.conditioners[kind].keyword}: leave guidance at 1, or train with conditioning dropout above 0"
            )


def refuse_untrained_null(model: Model, values: dict) -> None:
    """Raises Refused if a condition is not given and its null condition, which then takes its place, was never trained."""
    for kind, conditioner in model.network.conditioners.items():
        if kind not in values and not model.null_is_trained(kind, alone=bool(values)):
            others = " alone" if model.null_is_trained(kind) else ""
            raise Refused(
                f"this network was never trained without its {conditioner.keyword}{others}: give {conditioner.keyword}"
            )


def part(values: dict[str, list], rows: slice) -> dict[str, list]:
    return {kind: v[rows] for kind, v in values.items()}


def kept(kind: str, values: dict, negatives: dict, images: int, guided: bool) -> Tensor:
    """keep_N of one kind: conditional rows are kept if values are given, unconditional ones only if negatives are."""
    rows = [kind in values] * images + ([kind in negatives] * images if guided else [])
    return torch.tensor(rows, dtype=torch.bool)
