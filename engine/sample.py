"""sample(model, ...): from noise to images, with guidance, one solver and a seed per image.

N images, H x W pixels, C channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duotone.data.refusal import Refused
from duotone.engine import draws
from duotone.engine.artifact import Model
from duotone.engine.conditioning.base import Conditioning
from duotone.engine.guidance import Guidance, GuidedDenoiser
from duotone.engine.guiding.apg import Apg
from duotone.engine.guiding.cfg_plus_plus import CfgPlusPlus
from duotone.engine.samplers.ancestral import ancestral
from duotone.engine.samplers.dpmpp_2m import dpmpp_2m
from duotone.engine.samplers.euler import euler
from duotone.engine.samplers.heun import heun
from duotone.engine.samplers.stochastic_heun import stochastic_heun

SAMPLERS = {f.__name__: f for f in (euler, heun, dpmpp_2m, ancestral, stochastic_heun)}


def sample(
    model: Model,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int | str] | None = None,
    attributes: Sequence | None = None,
    images: Sequence | None = None,
    holes: Sequence | None = None,
    count: int | None = None,
    negative: dict[str, Sequence] | None = None,
    steps: int = 25,
    guidance: float | Sequence[float] = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    rescale: float = 0.0,
    rule: Apg | CfgPlusPlus | None = None,
    guide: Model | None = None,
    sampler: str | Callable = "heun",
    spacing: str | None = None,
    seed: int | Sequence[int] = 0,
    size: int | tuple[int, int] | None = None,
    chunk: int = 64,
    on_step: Callable | None = None,
) -> np.ndarray:
    """Images as uint8, (N, H, W, C).

    Give what the model is conditioned on, or `count` images without a condition: `prompts`; `labels` by number or name;
    `attributes`, for each image a vector of 0, 1 and None (unknown), a list of the names that are present, or a mapping
    from the known names to 0 or 1; low-resolution `images`, uint8 (h, w, C); `holes`, pairs of an image and its mask (H, W),
    true where it is to be filled. `negative` takes the same by name for the branch that guidance leads away from. `guidance` is
    a number or one per image; `seed` too: image i of a single seed uses seed and i, and its noise does not depend on the
    batch. Guidance is plain, or by a `rule` of engine/guiding; it leads away from the null state, the negative condition or,
    with a `guide`, a weaker model of the same objective (autoguidance). `on_step(step, x_NCHW, denoised_NCHW)` is called after every step. Raises Refused on what does not fit.
    """
    asked = {"prompts": prompts, "labels": labels, "attributes": attributes, "images": images, "holes": holes}
    asked = {name: list(rows) for name, rows in asked.items() if rows is not None}
    values = values_by_kind(model, asked)
    number = number_of_images(asked, count)
    scales = per_image("guidance", guidance, number)
    if "temperature" in model.network.conditioners:
        if not values and set(scales) != {1.0}:
            raise Refused("guidance needs a condition: give prompts or labels, or leave guidance at 1")
        values["temperature"], scales = temperatures(scales), [1.0] * number
    seeds = seeds_of(seed, number)
    height_width = image_shape(model, size)[1:]
    solver = sampler if callable(sampler) else solver_named(sampler)
    sigmas = sampling_sigmas(model, steps, spacing)
    negatives = negative_values(model, negative, number)
    steering = Steering(interval=interval, rescale=rescale, rule=rule, guide=guide)
    steering.check(model, negatives)
    if steering.doubles(scales) and guide is None:
        refuse_without_null(model, values, negatives)
    parts = []
    for first in range(0, number, chunk):
        rows = slice(first, first + chunk)
        here = part(values, rows), part(negatives, rows)
        steer = steering.guidance(scales[rows], sigmas, solver, model.device) if steering.doubles(scales) else None
        denoise = guided_denoiser(model, here, steering, steer, len(scales[rows]), height_width)
        parts.append(run(model, denoise, solver, sigmas, seeds[rows], height_width, on_step))
    return np.concatenate(parts)


def sweep(model: Model, scales: Sequence[float], **asked) -> np.ndarray:
    """The same images, from the same noise, at each guidance scale: uint8, (scales, N, H, W, C), a row of a grid per scale."""
    return np.stack([sample(model, **asked, guidance=scale) for scale in scales])


def run(
    model: Model, denoise, solver: Callable, sigmas: Tensor, seeds: list[tuple[int, int]], size, on_step
) -> np.ndarray:
    """One chunk of images."""
    shape = (len(seeds), *image_shape(model, size))
    x_NCHW = noise(seeds, draws.Purpose.SAMPLE_START, 0, shape, model.device)
    if sigmas[0].isfinite():
        x_NCHW = x_NCHW * sigmas[0].item()

    def fresh(step: int) -> Tensor:
        return noise(seeds, draws.Purpose.SAMPLE_STEP, step + 1, shape, model.device)

    with torch.inference_mode():
        x_NCHW = solver(denoise, x_NCHW, sigmas, noise=fresh, on_step=on_step)
    model.forwards = denoise.forwards / len(seeds)
    return pixels(x_NCHW)


def pixels(x_NCHW: Tensor) -> np.ndarray:
    """[-1, 1] to uint8, (N, H, W, C)."""
    bytes_NCHW = ((x_NCHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return bytes_NCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def noise(seeds: list[tuple[int, int]], purpose: draws.Purpose, step: int, shape: tuple, device) -> Tensor:
    """Normal noise of each image from its own (seed, number) and the step: the same whatever the batch."""
    _, c, h, w = shape
    rows = [draws.normal(seed, np.array([number * 2**32 + step]), purpose, c * h * w) for seed, number in seeds]
    return torch.cat(rows).view(len(seeds), h, w, c).permute(0, 3, 1, 2).to(device)


def image_shape(model: Model, size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    height, width = (size, size) if isinstance(size, int) else size or (model.size, model.size)
    if min(height, width) < 1:
        raise Refused(f"size = {size}: sides must be at least 1 pixel")
    return model.network.unet.config.out_channels, height, width


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How the conditional prediction is led away from another one."""

    interval: tuple[float, float]
    rescale: float
    rule: Apg | CfgPlusPlus | None
    guide: Model | None

    def check(self, model: Model, negatives: dict) -> None:
        if not 0 <= self.rescale <= 1:
            raise Refused(f"rescale = {self.rescale}: it must lie in [0, 1]")
        if self.rescale and self.rule:
            raise Refused(f"rescale belongs to plain guidance: leave it at 0 with {type(self.rule).__name__}")
        if self.guide is None:
            return
        if negatives:
            raise Refused("negative conditions and a guide are two answers to what guidance leads away from: give one")
        if self.guide.objective != model.objective:
            raise Refused("the guide was trained on another objective: autoguidance needs two models of the same one")

    def doubles(self, scales: list[float]) -> bool:
        """Whether a second prediction is needed at all."""
        return self.rule is not None or any(scale != 1 for scale in scales)

    def guidance(self, scales: list[float], sigmas: Tensor, solver: Callable, device: torch.device) -> Guidance:
        """For one chunk of images: a rule begins anew with each."""
        rule = None if self.rule is None else self.rule.begin(sigmas, solver)
        scale_N = torch.tensor(scales, dtype=torch.float32, device=device)
        return Guidance(scale_N=scale_N, interval=self.interval, rescale=self.rescale, rule=rule)


def guided_denoiser(
    model: Model, asked: tuple[dict, dict], steering: Steering, guidance: Guidance | None, images: int, size
) -> GuidedDenoiser:
    """The denoiser of one chunk: both branches' conditions in one batch, or a guide of its own."""
    values, negatives = asked
    guide = steering.guide
    both = condition(model, values, negatives, images, size, doubled=guidance is not None and guide is None)
    if guidance is None or guide is None:
        return GuidedDenoiser(model.network, model.objective, both, guidance)
    theirs = condition(guide, values, {}, images, size, doubled=False)
    return GuidedDenoiser(model.network, model.objective, both, guidance, (guide.network, theirs))


def condition(model: Model, values: dict, negatives: dict, images: int, size, *, doubled: bool) -> Conditioning:
    """The ports of N conditional rows and, where doubled, of the N rows they are led away from."""
    tensors = {}
    for kind, conditioner in model.network.conditioners.items():
        rows = values.get(kind) or [conditioner.nobody] * images
        below = negatives.get(kind) or rows
        found = conditioner.of_values(rows + below if doubled else rows, size)
        tensors[kind] = {name: tensor.to(model.device) for name, tensor in found.items()}
    keep = {kind: kept(kind, values, negatives, images, doubled).to(model.device) for kind in tensors}
    with torch.inference_mode():
        return model.network.condition(tensors, keep)


def kept(kind: str, values: dict, negatives: dict, images: int, guided: bool) -> Tensor:
    """Conditional rows are kept where given, unconditional ones only where a negative is given."""
    rows = [kind in values] * images + ([kind in negatives] * images if guided else [])
    return torch.tensor(rows, dtype=torch.bool)


def values_by_kind(model: Model, asked: dict[str, list]) -> dict[str, list]:
    """What each conditioner is given; refuses what none of them takes."""
    kinds = model.network.conditioners
    for name in asked:
        if not any(conditioner.asked == name for conditioner in kinds.values()):
            takes = ", ".join(dict.fromkeys(c.asked for c in kinds.values())) or "no condition, only count"
            raise Refused(f"this model takes no {name}: it takes {takes}")
    return {kind: asked[c.asked] for kind, c in kinds.items() if c.asked in asked}


def number_of_images(asked: dict[str, list], count: int | None) -> int:
    lengths = {name: len(rows) for name, rows in asked.items()} | ({"count": count} if count is not None else {})
    if not lengths:
        raise Refused("nothing to sample: give prompts, labels or count")
    if len(set(lengths.values())) > 1:
        raise Refused(f"these must be equally many: {', '.join(f'{n} {k}' for k, n in lengths.items())}")
    images = next(iter(lengths.values()))
    if images < 1:
        raise Refused("nothing to sample: the list is empty")
    return images


def per_image(name: str, value, images: int) -> list[float]:
    values = [float(value)] * images if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != images:
        raise Refused(f"{name} has {len(values)} entries for {images} images: give one number, or one per image")
    return values


def temperatures(scales: list[float]) -> list[float]:
    """beta of each image for a model trained to be its own guide: guidance of that scale, in one forward."""
    if min(scales) < 1:
        raise Refused(f"guidance = {min(scales)}: this model was trained guidance-free and takes 1 or more")
    return [1 / scale for scale in scales]


def seeds_of(seed: int | Sequence[int], images: int) -> list[tuple[int, int]]:
    """(seed, number) of each image: number 0 for an image with a seed of its own."""
    if isinstance(seed, int):
        return [(seed, i) for i in range(images)]
    if len(seed) != images:
        raise Refused(f"seed has {len(seed)} entries for {images} images: give one number, or one per image")
    return [(int(s), 0) for s in seed]


def solver_named(name: str) -> Callable:
    if name not in SAMPLERS:
        raise Refused(f"sampler {name!r} is unknown: there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def sampling_sigmas(model: Model, steps: int, spacing: str | None) -> Tensor:
    known = model.objective.spacings
    if steps < 1:
        raise Refused(f"steps = {steps}: it must be at least 1")
    if spacing not in (None, *known):
        raise Refused(
            f"spacing {spacing!r} is unknown to {type(model.objective).__name__}: there are {', '.join(known)}"
        )
    return falling(model.objective.sampling_sigmas(steps, spacing or known[0]))


def falling(sigmas: Tensor) -> Tensor:
    if not bool((sigmas[:-1] > sigmas[1:]).all()):
        raise Refused("noise levels must fall at every step: take fewer steps or another spacing")
    return sigmas


def negative_values(model: Model, negative: dict[str, Sequence] | None, images: int) -> dict[str, list]:
    """{"prompts": [...]} as values by kind."""
    negative = {name: list(rows) for name, rows in (negative or {}).items()}
    for name, rows in negative.items():
        if len(rows) != images:
            raise Refused(f"negative {name} has {len(rows)} entries for {images} images")
        if not any(conditioner.asked == name for conditioner in model.network.conditioners.values()):
            raise Refused(f"negative {name} given, but this model takes no {name}")
    return values_by_kind(model, negative)


def refuse_without_null(model: Model, values: dict, negatives: dict) -> None:
    """Guidance needs an unconditional branch that was trained."""
    if not values:
        raise Refused("guidance needs a condition: give prompts or labels, or leave guidance at 1")
    for kind in values:
        conditioner = model.network.conditioners[kind]
        if kind not in negatives and conditioner.dropout == 0 and model.recipe.drop_together == 0:
            raise Refused(
                f"guidance needs a null state, and this network was trained with condition dropout 0 for its {conditioner.asked}: "
                "leave guidance at 1, or train with conditioning dropout above 0"
            )


def part(values: dict[str, list], rows: slice) -> dict[str, list]:
    return {kind: v[rows] for kind, v in values.items()}
