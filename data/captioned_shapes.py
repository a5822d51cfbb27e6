"""The embedded data set: drawings such as "a red circle on a blue background".

Four shapes in six colours on six backgrounds, never in the background's own colour: 120 captions. Each drawing depends
only on (seed, number), so the set is the same everywhere.
"""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duotone.data.order import samples_at
from duotone.data.refusal import Refused
from duotone.data.write_shards import Sample, write_shards

SHAPES = ["circle", "square", "triangle", "cross"]
PALETTE_HSV = {
    "red": (0.0, 0.86, 0.86),
    "green": (0.36, 0.76, 0.66),
    "blue": (0.615, 0.80, 0.86),
    "yellow": (0.14, 0.84, 0.96),
    "white": (0.0, 0.02, 0.94),
    "black": (0.0, 0.04, 0.09),
}
COLOURS = list(PALETTE_HSV)
ATTRIBUTES = SHAPES + COLOURS + [f"{colour} background" for colour in COLOURS]
SIZES = range(16, 129)
DRAWS = 16  # random numbers per drawing, at most


@dataclass(frozen=True)
class Drawing:
    """What a drawing shows; a field is "none" if a checker finds nothing it can name."""

    shape: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        """The drawing's caption, a sentence."""
        return f"a {self.colour} {self.shape} on a {self.background} background"


DRAWINGS = [Drawing(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if b != c]


def captions() -> list[str]:
    """Every caption of the set."""
    return [drawing.caption for drawing in DRAWINGS]


def drawing_of(caption: str) -> Drawing:
    """The drawing that one of the set's captions describes; raises KeyError for any other sentence."""
    return {drawing.caption: drawing for drawing in DRAWINGS}[caption]


def generate(count: int, size: int = 32, seed: int = 0) -> Iterator[Sample]:
    """`count` drawings of size x size pixels, each caption once in every 120; raises Refused if either is bad."""
    if size not in SIZES or count < 1:
        raise Refused(f"captioned shapes: size is {size} and count {count}; size goes from 16 to 128, count from 1")
    order_N = samples_at(seed, np.arange(count), len(DRAWINGS))
    draws_NK = (
        np.random.Philox(key=np.array([seed % 2**64, 2**63], dtype=np.uint64)).random_raw((count, DRAWS)) / 2.0**64
    )
    for kind, draws_K in zip(order_N.tolist(), draws_NK):
        drawing = DRAWINGS[kind]
        yield Sample(
            image=render(drawing, size, draws_K),
            captions=[drawing.caption],
            label=SHAPES.index(drawing.shape),
            attributes=_attributes(drawing),
        )


def write(out: Path, count: int = 12_000, size: int = 32, seed: int = 0) -> dict:
    """Writes the set as shards (JPEG, txt, json) and returns dataset.json's content."""
    about = {"made_by": "captioned_shapes", "size": size, "seed": seed}
    return write_shards(generate(count, size, seed), out, classes=SHAPES, attributes=ATTRIBUTES, about=about)


def render(drawing: Drawing, size: int, draws_K: np.ndarray) -> np.ndarray:
    """One drawing, uint8 (size, size, 3); draws_K in [0, 1) set its scale, place, rotation and tints."""
    draws = iter(draws_K.tolist())
    radius = 0.26 + 0.11 * next(draws)  # of the circle around the shape's body, as a share of the side
    reach = 1.2 * radius + 0.05  # corners reach beyond that circle, and their soft edge a little further
    centre_x, centre_y = (reach + (1 - 2 * reach) * next(draws) for _ in "xy")
    angle = np.deg2rad(30 * next(draws) - 15)
    y_HW, x_HW = (np.mgrid[0:size, 0:size] + 0.5) / size - np.array([centre_y, centre_x])[:, None, None]
    u_HW = np.cos(angle) * x_HW + np.sin(angle) * y_HW
    v_HW = np.cos(angle) * y_HW - np.sin(angle) * x_HW
    inside_HW1 = np.clip(0.5 - size * _distance(drawing.shape, u_HW, v_HW, radius), 0, 1)[:, :, None]
    front_3, back_3 = (_tinted(colour, draws) for colour in (drawing.colour, drawing.background))
    return np.rint(255 * (inside_HW1 * front_3 + (1 - inside_HW1) * back_3)).astype(np.uint8)


def _distance(shape: str, u_HW: np.ndarray, v_HW: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline, negative inside, as a share of the image's side."""
    across_HW, along_HW = np.abs(u_HW), np.abs(v_HW)
    if shape == "circle":
        return np.hypot(u_HW, v_HW) - radius
    if shape == "square":
        return np.maximum(across_HW, along_HW) - 0.85 * radius
    if shape == "triangle":  # v points down: the tip is up
        return np.maximum(v_HW, np.sqrt(0.75) * across_HW - 0.5 * v_HW) - 0.6 * radius
    arm, half_width = radius, 0.34 * radius
    bar_HW = np.maximum(across_HW - arm, along_HW - half_width)
    return np.minimum(bar_HW, np.maximum(across_HW - half_width, along_HW - arm))


def _tinted(colour: str, draws: Iterator[float]) -> np.ndarray:
    hue, saturation, value = PALETTE_HSV[colour]
    hue = (hue + 0.04 * (next(draws) - 0.5)) % 1
    saturation = np.clip(saturation + 0.08 * (next(draws) - 0.5), 0, 1)
    value = np.clip(value + 0.12 * (next(draws) - 0.5), 0, 1)
    return np.array(colorsys.hsv_to_rgb(hue, float(saturation), float(value)))


def _attributes(drawing: Drawing) -> list[int]:
    present = {drawing.shape, drawing.colour, f"{drawing.background} background"}
    return [int(name in present) for name in ATTRIBUTES]
