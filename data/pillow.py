"""Encoded bytes -> square uint8 images with Pillow: the reference for other decoders, and the decoder without DALI."""

import io
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from PIL import Image

from duotone.data.framing import upright
from duotone.data.refusal import first_line

FORMATS = ("JPEG", "PNG", "WEBP")
MODES = {1: "L", 3: "RGB"}
FILTER = Image.Resampling.BICUBIC


class Undecodable(Exception):
    """An image that the decoder rejects: its `place` in the batch and the reason."""

    def __init__(self, place: int, reason: str):
        super().__init__(reason)
        self.place, self.reason = place, reason


class PillowDecoder:
    """Decodes a batch on a few threads; Pillow releases the GIL while it decodes and resizes."""

    name = "pillow"

    def __init__(self, side: int, channels: int, threads: int):
        self.side, self.channels, self.threads = side, channels, threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="pillow")

    def decode(self, encoded: list[np.ndarray], boxes_N4: np.ndarray, orientations_N: np.ndarray) -> torch.Tensor:
        """Images uint8 (N, side, side, channels) from N encoded images; raises Undecodable."""
        images_NHWC = np.empty((len(encoded), self.side, self.side, self.channels), dtype=np.uint8)

        def fill(places: range) -> None:
            for place in places:
                square_HWC = self._square(place, encoded[place], boxes_N4[place])
                images_NHWC[place] = upright(square_HWC, int(orientations_N[place]))

        # Each thread takes every threads-th image: one task per image would cost more than a small image itself.
        tasks = [self.pool.submit(fill, range(first, len(encoded), self.threads)) for first in range(self.threads)]
        wait(tasks)
        failures = [error for error in (task.exception() for task in tasks) if error is not None]
        if failures:  # raise for the first image in the batch, whichever thread failed first
            raise min(failures, key=lambda error: getattr(error, "place", -1))
        return torch.from_numpy(images_NHWC)

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _square(self, place: int, encoded_B: np.ndarray, box_4: np.ndarray) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(encoded_B), formats=FORMATS) as image:
                return cut(image.convert(MODES[self.channels]), box_4, self.side)
        except (
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            MemoryError,
            OverflowError,
            Image.DecompressionBombError,
        ) as error:
            raise Undecodable(place, first_line(error)) from None


def cut(image: Image.Image, box_4: np.ndarray, side: int) -> np.ndarray:
    """The box (top, left, height, width) of an image, resized to uint8 (side, side, channels)."""
    top, left, height, width = box_4.tolist()
    box = (left, top, left + width, top + height)
    square = image.crop(box) if height == width == side else image.resize((side, side), FILTER, box=box)
    square_HWC = np.asarray(square)
    return square_HWC[:, :, None] if square_HWC.ndim == 2 else square_HWC


def cut_stored(image_HWC: np.ndarray, box_4: np.ndarray, side: int, channels: int) -> np.ndarray:
    """The same from an image stored decoded; if neither size nor channels change, it is a slice, without Pillow."""
    top, left, height, width = box_4.tolist()
    if image_HWC.shape[2] == channels and height == width == side:
        return image_HWC[top : top + side, left : left + side]
    whole = Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
    return cut(whole.convert(MODES[channels]), box_4, side)


def opaque(image: Image.Image) -> Image.Image:
    """The picture laid on white: gray without transparency stays gray, everything else becomes RGB."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
