"""Images as bytes, uint8 (N, H, W, C); their grids, strips and GIFs, written with Pillow."""

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from duotone.data.pillow import opaque
from duotone.data.refusal import Refused
from duotone.data.whole_file import draft_of

FILMS = {".gif", ".webp", ".png"}


def pixels(x_NCHW: Tensor) -> np.ndarray:
    """Converts [-1, 1] to uint8, (N, H, W, C)."""
    bytes_NCHW = ((x_NCHW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return bytes_NCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()


class ByStep:
    """An on_step for sample() that collects the denoised image of every step, as uint8, over all chunks.

    With the `sigmas` of the steps it collects the noisy image after each step instead, at variance-preserving scale,
    x / sqrt(1 + sigma^2). Of each row of `columns` images the first is kept.
    """

    def __init__(self, sigmas: Tensor | None = None, columns: int = 1):
        self.parts: list[list[np.ndarray]] = []
        self.told: Counter[int] = Counter()
        self.scales = None if sigmas is None else (1 + sigmas[1:] ** 2).rsqrt().tolist()
        self.columns = columns

    def __call__(self, step: int, x_NCHW: Tensor, denoised_NCHW: Tensor) -> None:
        self.parts.extend([] for _ in range(step + 1 - len(self.parts)))
        shown_NCHW = denoised_NCHW if self.scales is None else x_NCHW * self.scales[step]
        self.parts[step].append(pixels(shown_NCHW[-self.told[step] % self.columns :: self.columns]))
        self.told[step] += len(shown_NCHW)

    @property
    def images(self) -> list[np.ndarray]:
        """The images of each step, (N, H, W, C)."""
        return [np.concatenate(part) for part in self.parts]

    def strips(self, moments: int) -> np.ndarray:
        """Each image at `moments` steps from noise to picture, image by image: (N x moments, H, W, C)."""
        steps = np.linspace(0, len(self.parts) - 1, moments).round().astype(int)
        images = self.images
        frames_NM = np.stack([images[step] for step in steps], axis=1)
        return frames_NM.reshape(-1, *frames_NM.shape[2:])


GAP = 2
"""White pixels around each picture of a sheet."""


def grid(images_NHWC: np.ndarray, columns: int, *, zoom: int = 1) -> Image.Image:
    """Images in rows of `columns`, on white."""
    n, h, w, c = images_NHWC.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + GAP) + GAP, columns * (w + GAP) + GAP, c), 255, np.uint8)
    for i, image in enumerate(images_NHWC):
        top, left = GAP + (i // columns) * (h + GAP), GAP + (i % columns) * (w + GAP)
        sheet[top : top + h, left : left + w] = image
    picture = Image.fromarray(sheet if c == 3 else sheet[:, :, 0])
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def refuse_unwritable(path: Path, *, film: bool = False) -> None:
    """Makes the folder; raises Refused, before anything is drawn, if a picture or a film could not be written there."""
    kinds = Image.SAVE_ALL if film else Image.SAVE
    endings = {ending for ending, name in Image.registered_extensions().items() if name in kinds}
    if path.suffix.lower() not in endings & FILMS if film else path.suffix.lower() not in endings:
        what, such = ("film", ".gif, .webp or .png") if film else ("picture", ".png, .jpg, .webp or .gif")
        raise Refused(f"{path}: {path.suffix or 'no ending'} is not a kind of {what}; end it in {such}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{path.parent} cannot be made ({error}): give another folder") from None
    if not os.access(path.parent, os.W_OK):
        raise Refused(f"{path.parent} cannot be written to: give another folder")


def write(path: Path, picture: Image.Image, **options) -> None:
    """Writes a picture or film, whole or not at all."""
    with draft_of(path) as draft:
        picture.save(draft, format=Image.registered_extensions()[path.suffix.lower()], **options)


def opened(paths: Sequence[Path]) -> list[Image.Image]:
    """The pictures that have the size of the last one; others, and those that cannot be read, are left out."""
    pictures = []
    for path in paths:
        with contextlib.suppress(OSError, SyntaxError), Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return [picture for picture in pictures if picture.size == pictures[-1].size]


def read(path: Path, channels: int) -> np.ndarray:
    """A picture as uint8 (H, W, C), as `duotone prepare` reads it: upright, on white, grey for one channel.

    Raises Refused if it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode[:1] in "IF":  # integers or floats, which a conversion would clip at 255
                raise Refused(f"{path} has more than 8 bits per channel; 8 are supported: save it with 8")
            shown = opaque(ImageOps.exif_transpose(picture))
            converted = np.array(shown.convert("RGB" if channels == 3 else "L"))
    except (OSError, UnidentifiedImageError) as error:
        raise Refused(f"{path} is not a readable picture ({error})") from None
    return converted.reshape(*converted.shape[:2], -1)


def save_gif(path: Path, frames: Sequence[Image.Image], *, milliseconds: int = 80) -> None:
    """Writes an endless GIF that rests on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [10 * milliseconds]
    write(path, frames[0], save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)
