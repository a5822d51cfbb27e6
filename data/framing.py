"""The square that is trained on: which rectangle of a stored image it is cut from, and how it is turned upright.

Boxes are (top, left, height, width) in whole pixels of the image as stored. EXIF orientation is applied to the finished
square, so decoders only have to crop and resize.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from duotone.data.refusal import Refused, at_least

Resize = Literal["crop", "squash", "none"]
Crop = Literal["random", "center"]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How an image becomes a square of pixels."""

    size: int = 128
    """Side of the training images, pixels."""
    channels: int = 3
    """3 for colour, 1 for gray."""
    resize: Resize = "crop"
    """crop: short side to size, then a square; squash: the whole image; none: stored at this size already."""
    crop: Crop = "center"
    """Which square is cut if one side is longer."""
    pad: int = 0
    """Black border inside `size`, pixels per side: size 32 with pad 2 holds images of 28."""

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise Refused(f"data.channels = {self.channels}: it must be 3 (colour) or 1 (gray)")
        at_least("data.size", self.size, 1)
        at_least("data.pad", self.pad, 0)
        if self.side < 1:
            raise Refused(f"data.size = {self.size} with data.pad = {self.pad}: at least one pixel must remain")

    @property
    def side(self) -> int:
        """Side of the image inside its border, pixels."""
        return self.size - 2 * self.pad


def boxes(sides_N2: np.ndarray, orientations_N: np.ndarray, crops_N2: np.ndarray | None, resize: Resize) -> np.ndarray:
    """Boxes int64 (N, 4) in images of heights and widths sides_N2; crops_N2 in [0, 1) place them, None: centred."""
    if resize != "crop":
        return np.concatenate([np.zeros_like(sides_N2), sides_N2], axis=1)
    square_N1 = sides_N2.min(axis=1, keepdims=True)
    room_N2 = sides_N2 - square_N1
    corners_N2 = room_N2 // 2 if crops_N2 is None else _corners(room_N2, orientations_N, crops_N2)
    return np.concatenate([corners_N2, square_N1, square_N1], axis=1)


def _corners(room_N2: np.ndarray, orientations_N: np.ndarray, crops_N2: np.ndarray) -> np.ndarray:
    """Corners drawn in the upright image, converted to the image as stored: axes swapped from 5 on, and mirrored."""
    turned_N1 = orientations_N[:, None] >= 5
    upright_room_N2 = np.where(turned_N1, room_N2[:, ::-1], room_N2)
    upright_N2 = np.minimum(np.floor(crops_N2 * (upright_room_N2 + 1)).astype(np.int64), upright_room_N2)
    corners_N2 = np.where(turned_N1, upright_N2[:, ::-1], upright_N2)
    mirrored_N2 = np.stack([np.isin(orientations_N, (3, 4, 6, 7)), np.isin(orientations_N, (2, 3, 7, 8))], axis=1)
    return np.where(mirrored_N2, room_N2 - corners_N2, corners_N2)


def upright(square_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """A square cut from an image as stored, turned upright according to its EXIF orientation, 1 to 8."""
    if orientation >= 5:
        square_HWC = square_HWC.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        square_HWC = square_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        square_HWC = square_HWC[:, ::-1]
    return square_HWC
