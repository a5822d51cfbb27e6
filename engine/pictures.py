"""Grids, strips and GIFs of uint8 images (N, H, W, C), written with Pillow."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def grid(images_NHWC: np.ndarray, columns: int, *, gap: int = 2, zoom: int = 1) -> Image.Image:
    """Images in rows of `columns`, on white."""
    n, h, w, c = images_NHWC.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images_NHWC):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = image
    picture = Image.fromarray(sheet if c == 3 else sheet[:, :, 0])
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def opened(paths: Sequence[Path]) -> list[Image.Image]:
    """Pictures of one size: those of another size than the last are left out."""
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return [picture for picture in pictures if picture.size == pictures[-1].size]


def save_gif(path: Path, frames: Sequence[Image.Image], *, milliseconds: int = 80) -> None:
    """An endless GIF that rests on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [10 * milliseconds]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)
