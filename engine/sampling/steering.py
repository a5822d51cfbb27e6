"""Makes the denoiser of a chunk of images from what sample() is asked for: conditions, negatives, guidance, rule and guide.

N images; for a network's ports see engine/conditioning/base.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from duotone.data.refusal import Refused, share
from duotone.engine.artifact import Model
from duotone.engine.conditioning.base import Conditioning
from duotone.engine.sampling.guidance import Guidance, GuidedDenoiser
from duotone.engine.sampling.guiding import composed
from duotone.engine.sampling.guiding.apg import Apg
from duotone.engine.sampling.guiding.cfg_plus_plus import CfgPlusPlus
from duotone.engine.sampling.request import (
    kept,
    negative_values,
    part,
    per_image,
    refuse_other_than_model,
    refuse_steering,
    refuse_untrained_null,
    refuse_without_null,
    temperatures,
    values_by_kind,
)


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How guidance moves the conditional prediction away from another one."""

    interval: tuple[float, float] = (0.0, math.inf)
    rescale: float = 0.0
    rule: Apg | CfgPlusPlus | None = None
    guide: Model | None = None
    clip: bool = False
    """Whether the predictions that a rule combines are clipped to [-1, 1], instead of the rule's result."""

    def check(self, model: Model, negatives: dict) -> None:
        share("rescale", self.rescale)
        if not rises(self.interval):
            raise Refused(f"interval = {self.interval}: give two noise levels sigma that rise, the first at least 0")
        if self.rescale and self.rule:
            raise Refused(f"rescale belongs to plain guidance: leave it at 0 with {type(self.rule).__name__}")
        if self.rule is not None and (isinstance(self.rule, type) or not hasattr(self.rule, "begin")):
            raise Refused(f"rule = {self.rule!r}: give one of engine/sampling/guiding, such as Apg() or CfgPlusPlus()")
        if self.guide is None:
            return
        refuse_other_than_model("guide", self.guide)
        if negatives:
            raise Refused(
                "negative conditions and a guide both say what guidance moves away from: give only one of them"
            )
        if self.guide.objective != model.objective:
            raise Refused("the guide was trained on another objective: autoguidance needs two models with the same one")
        for name in ("classes", "attributes"):
            theirs, ours = getattr(self.guide.facts, name), getattr(model.facts, name)
            if theirs and ours and theirs != ours:
                raise Refused(
                    f"the guide knows other {name}, or in another order: give a guide trained with this model's {name}"
                )
        theirs, ours = (m.network.unet.config.out_channels for m in (self.guide, model))
        if theirs != ours:
            raise Refused(
                f"the guide draws images of {theirs} channels, and this model of {ours}: give a guide with {ours}"
            )

    def changes_anything(self) -> bool:
        return bool(self.rescale or self.rule or self.guide) or self.interval != (0.0, math.inf)

    def doubles(self, scales: list[float]) -> bool:
        """Whether a second prediction is needed at all."""
        return self.rule is not None or any(scale != 1 for scale in scales)

    def guidance(self, scales: list[float], sigmas: Tensor, solver: Callable) -> Guidance:
        """The guidance of one chunk of images; a rule's state is new for each chunk."""
        rule = None if self.rule is None else self.rule.begin(sigmas, solver, scales)
        scale_N = torch.tensor(scales, dtype=torch.float32)
        return Guidance(scale_N=scale_N, interval=self.interval, rescale=self.rescale, rule=rule, clip=self.clip)


def rises(interval) -> bool:
    """Whether `interval` is two noise levels of at least 0, the second not below the first."""
    pair = isinstance(interval, tuple | list) and len(interval) == 2 and all(isinstance(end, Real) for end in interval)
    return pair and 0 <= interval[0] <= interval[1]


@dataclass(frozen=True)
class Conditions:
    """The conditions, negatives and guidance of every image in one call, checked once before any image is drawn."""

    values: dict[str, list]
    negatives: dict[str, list]
    scales: list[float]
    by_attribute: dict[str, float] | None
    steering: Steering

    @classmethod
    def of(
        cls,
        model: Model,
        asked: dict[str, list],
        negative: dict[str, Sequence] | None,
        guidance: float | Sequence[float] | Mapping[str, float],
        images: int,
        steering: Steering,
    ) -> "Conditions":
        values = values_by_kind(model, asked)
        by_attribute = dict(guidance) if isinstance(guidance, Mapping) else None
        scales = per_image("guidance", 1.0 if by_attribute is not None else guidance, images)
        refuse_untrained_null(model, values)
        negatives = negative_values(model, negative, images)
        steering.check(model, negatives)
        if steering.guide is not None:
            refuse_untrained_null(steering.guide, values)
        steers = bool(negatives) or steering.changes_anything()
        if "temperature" in model.network.conditioners:
            refuse_steering(by_attribute is not None or steers)
            values["temperature"], scales = temperatures(model, values, scales), [1.0] * images
        if steering.doubles(scales) and steering.guide is None:
            refuse_without_null(model, values, negatives)
        if by_attribute is not None:
            check_composed(model, values, by_attribute, alone=not steers)
        elif not any(scales) and not steering.changes_anything():
            # Guidance 0 is the unconditional (or negative) prediction alone; the conditional one is not needed.
            values, negatives, scales = negatives, {}, [1.0] * images
        return cls(values, negatives, scales, by_attribute, steering)

    def denoiser(
        self, model: Model, rows: slice, sigmas: Tensor, solver: Callable, size: tuple[int, int]
    ) -> GuidedDenoiser | composed.ComposedDenoiser:
        """The denoiser of the images in `rows`."""
        values, scales = part(self.values, rows), self.scales[rows]
        if self.by_attribute is not None:
            return composed_denoiser(model, values, self.by_attribute, size)
        guidance = self.steering.guidance(scales, sigmas, solver) if self.steering.doubles(scales) else None
        asked = values, part(self.negatives, rows)
        return guided_denoiser(model, asked, self.steering, guidance, len(scales), size)


def check_composed(model: Model, values: dict, scales: Mapping[str, float], *, alone: bool) -> None:
    if "attributes" not in values:
        raise Refused("guidance by name is for attributes: give attributes, or guidance as a number")
    if not alone:
        raise Refused(
            "guidance by attribute does not go with negatives, interval, rescale, rule or guide: leave them out"
        )
    composed.check(model.network.conditioners["attributes"], scales, values["attributes"])


def guided_denoiser(
    model: Model, asked: tuple[dict, dict], steering: Steering, guidance: Guidance | None, images: int, size
) -> GuidedDenoiser:
    """The denoiser of one chunk: with both branches' conditions in one batch, or with a guide as the second branch."""
    values, negatives = asked
    guide = steering.guide
    both = condition(model, values, negatives, images, size, doubled=guidance is not None and guide is None)
    if guidance is None or guide is None:
        return GuidedDenoiser(model.network, model.objective, both, guidance)
    theirs = condition(guide, values, {}, images, size, doubled=False)
    return GuidedDenoiser(model.network, model.objective, both, guidance, (guide.network, theirs))


def composed_denoiser(model: Model, values: dict, scales: Mapping[str, float], size) -> composed.ComposedDenoiser:
    """The denoiser of one chunk where some attributes have their own scale: a base branch, and one for each of them."""
    names = model.network.conditioners["attributes"].names
    rows = composed.branches(values["attributes"], scales, names)
    repeated = {kind: rows if kind == "attributes" else v * (1 + len(scales)) for kind, v in values.items()}
    given = condition(model, repeated, {}, len(rows), size, doubled=False)
    return composed.ComposedDenoiser(model.network, model.objective, given, list(scales.values()))


def condition(model: Model, values: dict, negatives: dict, images: int, size, *, doubled: bool) -> Conditioning:
    """The ports of N conditional rows and, if doubled, of the N unconditional (or negative) rows after them."""
    tensors = {}
    for kind, conditioner in model.network.conditioners.items():
        rows = values.get(kind) or [conditioner.placeholder] * images
        below = negatives.get(kind) or rows
        found = conditioner.of_values(rows + below if doubled else rows, size)
        tensors[kind] = {name: tensor.to(model.device) for name, tensor in found.items()}
    keep = {kind: kept(kind, values, negatives, images, doubled).to(model.device) for kind in tensors}
    with torch.inference_mode():
        return model.network.condition(tensors, keep)
