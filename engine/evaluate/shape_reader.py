"""Reads what a picture of the captioned shapes shows from its pixels alone; it shares only names with the code that draws them."""

import colorsys
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from duotone.data.captioned_shapes import COLOURS, SHAPES, Drawing, drawing_of, generate
from duotone.data.write_shards import encode_image

MIN_CONTRAST = 40.0  # of 441, the distance from black to white
# For each ideal outline: threefold symmetry, fourfold symmetry, four times its share of its convex hull.
OUTLINES = {"circle": (0, 0, 3.75), "square": (0, 0.4, 3.6), "triangle": (0.62, 0, 3.4), "cross": (0, 0.54, 2.85)}
HUES = {"red": (320, 25), "yellow": (25, 75), "green": (75, 165), "blue": (165, 280)}  # degrees


def read_back(image_HWC: np.ndarray) -> Drawing:
    """What a picture shows, by rules on its pixels: the border's colour, the colour that stands out from it, its outline."""
    image_HW3 = image_HWC.astype(np.float64)
    background_3 = np.median(_border(image_HW3), axis=0)
    contrast_HW = np.linalg.norm(image_HW3 - background_3, axis=2)
    strongest = np.quantile(contrast_HW, 0.97)
    if strongest < MIN_CONTRAST:
        return Drawing("none", "none", name_colour(background_3))
    colour_3 = np.median(image_HW3[contrast_HW > 0.7 * strongest], axis=0)
    difference_3 = colour_3 - background_3
    inside_HW = np.clip((image_HW3 - background_3) @ difference_3 / (difference_3 @ difference_3), 0, 1)
    return Drawing(name_shape(inside_HW), name_colour(colour_3), name_colour(background_3))


def name_colour(rgb_3: np.ndarray) -> str:
    """A colour's name from its lightness, saturation and hue; "none" for grays and purples."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(np.clip(rgb_3, 0, 255) / 255).tolist())
    if value < 0.33:
        return "black"
    if saturation < 0.3:
        return "white" if value > 0.66 else "none"
    degrees = 360 * hue
    inside = [name for name, (low, high) in HUES.items() if (degrees - low) % 360 < (high - low) % 360]
    return inside[0] if inside else "none"


def name_shape(inside_HW: np.ndarray) -> str:
    """A shape's name: the nearest of four ideal outlines by symmetry and by how full its convex hull is."""
    mask_HW = np.where(inside_HW > 0.3, inside_HW, 0)
    y_HW, x_HW = np.mgrid[0 : mask_HW.shape[0], 0 : mask_HW.shape[1]]
    centre = np.average(x_HW, weights=mask_HW) + 1j * np.average(y_HW, weights=mask_HW)
    z_HW = x_HW + 1j * y_HW - centre
    found_3 = np.array([symmetry(mask_HW, z_HW, 3), symmetry(mask_HW, z_HW, 4), 4 * hull_share(mask_HW, z_HW)])
    return min(OUTLINES, key=lambda shape: np.linalg.norm(found_3 - OUTLINES[shape]))


def symmetry(mask_HW: np.ndarray, z_HW: np.ndarray, fold: int) -> float:
    """How strongly a mask repeats `fold` times around its centre, 0 to 1: |sum m z^fold| / sum m |z|^fold."""
    turned_HW = z_HW**fold
    return float(abs((mask_HW * turned_HW).sum()) / (mask_HW * abs(turned_HW)).sum())


def hull_share(mask_HW: np.ndarray, z_HW: np.ndarray) -> float:
    """Area of a mask as a share of its convex hull's, which is half the integral of h^2 - h'^2 over its reach h."""
    step = 2 * np.pi / 64
    directions_64 = np.exp(1j * step * np.arange(64))
    reach_64 = np.real(z_HW[mask_HW > 0.5][:, None] * directions_64.conj()).max(axis=0, initial=0) + 0.5
    slope_64 = (np.roll(reach_64, -1) - np.roll(reach_64, 1)) / (2 * step)
    return float(mask_HW.sum() / (0.5 * step * (reach_64**2 - slope_64**2).sum()))


def _border(image_HW3: np.ndarray) -> np.ndarray:
    edges = [image_HW3[0], image_HW3[-1], image_HW3[:, 0], image_HW3[:, -1]]
    return np.concatenate(edges)


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How the checker reads real drawings: counts by (shown, read), with a last column for "none"."""

    shape: np.ndarray  # (4, 5)
    colour: np.ndarray  # (6, 7)
    background: np.ndarray  # (6, 7)

    def accuracy(self, part: str) -> float:
        """Share read correctly, of "shape", "colour" or "background"."""
        counts = getattr(self, part)
        return float(np.trace(counts) / counts.sum())


def confusion(count: int = 1200, size: int = 32, seed: int = 2**40) -> Confusion:
    """The checker's results on `count` held-out drawings (of a seed that is not used for training), stored as JPEG and read again."""
    tables = {"shape": SHAPES, "colour": COLOURS, "background": COLOURS}
    counts = {part: np.zeros((len(names), len(names) + 1), dtype=np.int64) for part, names in tables.items()}
    for sample in generate(count, size, seed):
        shown = drawing_of(sample.captions[0])
        read = read_back(np.asarray(Image.open(io.BytesIO(encode_image(sample.image, "jpg", 95)))))
        for part, names in tables.items():
            counts[part][names.index(getattr(shown, part)), [*names, "none"].index(getattr(read, part))] += 1
    return Confusion(**counts)
