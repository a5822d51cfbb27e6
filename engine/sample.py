"""sample(model, ...): from noise to images, by a solver, with guidance and a seed per image.

N images, H x W pixels, C channels.
"""

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotone.data.refusal import Refused, whole
from duotone.engine import draws
from duotone.engine.artifact import Model
from duotone.engine.memory import in_chunks, rows_that_fit
from duotone.engine.pictures import pixels
from duotone.engine.sampling.guiding.apg import Apg
from duotone.engine.sampling.guiding.cfg_plus_plus import CfgPlusPlus
from duotone.engine.sampling.request import (
    listed,
    number_of_images,
    refuse_other_than_model,
    seeds_of,
)
from duotone.engine.sampling.samplers.clipping import clipped
from duotone.engine.sampling.samplers.named import solver_named
from duotone.engine.sampling.steering import Conditions, Steering


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
    guidance: float | Sequence[float] | Mapping[str, float] = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    rescale: float = 0.0,
    rule: Apg | CfgPlusPlus | None = None,
    guide: Model | None = None,
    sampler: str | Callable = "heun",
    spacing: str | None = None,
    clip: bool | None = None,
    seed: int | Sequence[int | tuple[int, int]] = 0,
    size: int | tuple[int, int] | None = None,
    chunk: int | None = None,
    on_step: Callable | None = None,
    progress: bool = False,
    **own: Sequence,
) -> np.ndarray:
    """Images as uint8, (N, H, W, C).

    Give the conditions that the model takes, or only a `count` for images without any: `prompts`; `labels`, by number
    or name; `attributes`, for each image a vector of 0, 1 and None (unknown), a list of the names that are present, or
    a mapping from names to 0 or 1, others being unknown; low-resolution `images`, uint8 (h, w, C); `holes`, for each
    image a pair of an image and a mask (H, W), true where the image is to be filled; elsewhere the image is kept. A
    conditioning of your own is given by the name in its `keyword`.

    `guidance` is one scale, one per image, or for attributes a scale for each name
    (engine/sampling/guiding/composed.py), applied as usual or by a `rule` of engine/sampling/guiding. It leads away
    from the null condition, from the `negative` condition, given by name as above, or from a `guide`, a weaker model of
    the same objective (autoguidance). `sampler` is a name, or a function like those of engine/sampling/samplers, such
    as functools.partial(stochastic_heun, churn=40.0) or epsilon_scaled(heun, 1.005).

    `clip` limits every step's denoised image to [-1, 1], the range of pixels (engine/sampling/samplers/clipping.py); it
    is on by default for DDPM. CFG++ steps through values that are no image: there the two predictions it combines are
    limited.

    `seed` is one number or one per image: image i of a single seed draws its noise from (seed, i), whatever the batch;
    give an image the pair (seed, i) to start it from that same noise. `chunk` images are drawn at once, by default as
    many as the free memory holds. `on_step(step, x_NCHW, denoised_NCHW)` is called after every step with a chunk's
    images, once for each image and step (ByStep in engine/pictures.py collects them), and `progress` shows a bar.
    Raises Refused on arguments that are invalid or do not fit the model.
    """
    asked = {"prompts": prompts, "labels": labels, "attributes": attributes, "images": images, "holes": holes}
    asked = listed(asked | own)
    refuse_other_than_model("model", model)
    number = number_of_images(asked, count)
    clips = model.objective.clips if clip is None else clip
    before_the_rule = clips and isinstance(rule, CfgPlusPlus)
    steering = Steering(interval=interval, rescale=rescale, rule=rule, guide=guide, clip=before_the_rule)
    conditions = Conditions.of(model, asked, negative, guidance, number, steering)
    seeds, height_width = seeds_of(seed, number), image_shape(model, size)[1:]
    solver = sampler if callable(sampler) else solver_named(sampler)
    kept_within = clipped(solver) if clips and not before_the_rule else solver
    sigmas = model.objective.falling_sigmas(steps, spacing)
    if chunk is not None:
        whole("chunk", chunk, 1)
    model.forwards = 0.0

    def draw(rows: slice, told: Callable | None) -> np.ndarray:
        denoise = conditions.denoiser(model, rows, sigmas, solver, height_width)
        images_NHWC = run(model, denoise, kept_within, sigmas, seeds[rows], height_width, told)
        model.forwards, model.evaluations = model.forwards + denoise.forwards / number, denoise.calls
        return images_NHWC

    at_once = chunk or rows_that_fit(model.network.unet, max(height_width))
    told = Steps(number * steps, on_step, shown=progress)
    images_NHWC = in_chunks(lambda rows: draw(rows, told.of(rows)), number, at_once)
    told.close()
    return filled(images_NHWC, asked["holes"]) if "holes" in asked else images_NHWC


def filled(images_NHWC: np.ndarray, holes: Sequence) -> np.ndarray:
    """Images with the drawn pixels inside the holes and the given ones around them."""
    return np.stack([around(hole, image) for hole, image in zip(holes, images_NHWC, strict=True)])


def around(hole: Sequence | None, drawn_HWC: np.ndarray) -> np.ndarray:
    """One such image; an image without a hole is all drawn."""
    if hole is None:
        return drawn_HWC
    given, inside_HW = (np.asarray(part) for part in hole)
    return np.where(inside_HW[..., None].astype(bool), drawn_HWC, given.reshape(drawn_HWC.shape))


class Steps:
    """Reports every step to the caller, and on a progress bar over all images."""

    def __init__(self, total: int, on_step: Callable | None, *, shown: bool):
        self.on_step = on_step
        self.bar = tqdm(total=total, unit="step", unit_scale=True, dynamic_ncols=True) if shown else None
        self.told: Counter[int] = Counter()
        """For each step, how many images from the first on have been reported."""

    def of(self, rows: slice) -> Callable:
        """The solver's callback for these images, some of which may be drawn again after running out of memory."""

        def told(step: int, x_NCHW: Tensor, denoised_NCHW: Tensor) -> None:
            known, self.told[step] = self.told[step], max(self.told[step], rows.stop)
            new = slice(max(0, known - rows.start), None)
            if known >= rows.stop:
                return
            if self.bar is not None:
                self.bar.update(rows.stop - max(known, rows.start))
            if self.on_step is not None:
                self.on_step(step, x_NCHW[new], denoised_NCHW[new])

        return told

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def sweep(model: Model, scales: Sequence[float], **asked) -> np.ndarray:
    """The same images, from the same noise, at each guidance scale: uint8, (scales, N, H, W, C)."""
    return np.stack([sample(model, **asked, guidance=scale) for scale in scales])


def run(
    model: Model, denoise, solver: Callable, sigmas: Tensor, seeds: list[tuple[int, int]], size, on_step
) -> np.ndarray:
    """Draws one chunk of images, one for each seed."""
    shape = (len(seeds), *image_shape(model, size))
    x_NCHW = noise(seeds, draws.Purpose.SAMPLE_START, 0, shape, model.device)
    if sigmas[0].isfinite():
        x_NCHW = x_NCHW * sigmas[0].item()

    def fresh(step: int) -> Tensor:
        return noise(seeds, draws.Purpose.SAMPLE_STEP, step + 1, shape, model.device)

    with torch.inference_mode():
        x_NCHW = solver(denoise, x_NCHW, sigmas, noise=fresh, on_step=on_step)
    lost = int((~x_NCHW.isfinite().flatten(1).all(1)).sum())
    if lost:
        warnings.warn(f"{lost} of {len(x_NCHW)} pictures have values that are not finite", NotFinite, stacklevel=3)
    return pixels(x_NCHW)


class NotFinite(UserWarning):
    """Weights or a sampler that give no picture; where sigma is infinite, a sampler's x is the noise itself."""


AT_ONCE = 2**20
"""Noise values made together: each takes a few hundred bytes while it is made."""


def noise(seeds: list[tuple[int, int]], purpose: draws.Purpose, step: int, shape: tuple, device) -> Tensor:
    """Normal noise for each image from its own (seed, number) and the step, the same whatever the batch."""
    _, c, h, w = shape
    rows, most = [], max(1, AT_ONCE // (c * h * w))
    for seed, alike in itertools.groupby(seeds, key=lambda pair: pair[0]):
        positions = [number * 2**32 + step for _, number in alike]
        for first in range(0, len(positions), most):
            some_N = np.array(positions[first : first + most])
            rows.append(draws.normal(seed, some_N, purpose, c * h * w, device))
    return torch.cat(rows).view(len(seeds), h, w, c).permute(0, 3, 1, 2)


def image_shape(model: Model, size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    given = model.size if size is None else size
    sides = given if isinstance(given, tuple | list) else (given, given)
    if isinstance(size, str) or len(sides) != 2:
        raise Refused(f"size = {size!r}: give one side, or height and width")
    height, width = sides
    for side in sides:
        whole("size: a side", side, 1)
    config = model.network.unet.config
    if config.down_pads_ends and min(height, width) < config.shrink:
        raise Refused(
            f"size = {size}: this network halves sides down to a pixel of {config.shrink}: give that many or more"
        )
    return config.out_channels, height, width
