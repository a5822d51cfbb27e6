"""Are samples copies? The distance from each to its nearest training image, compared with those between training images.

N samples, M training images, D pixels or features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duotone.data.refusal import Refused

ROWS = 256
BYTES = 2**28  # of training images held in memory as fp32 at once
PAIRS = 2000  # training images whose nearest neighbour sets the scale
QUANTILE = 0.01


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The nearest training image of each sample."""

    places_N: np.ndarray
    distances_N: np.ndarray
    threshold: float
    """The distance within which one training image in a hundred has another. Exact duplicates, at 0, do not count; re-encoded
    ones do."""

    @property
    def closer(self) -> float:
        """Share of samples within the threshold of a training image: about 1 % for images that are not copies."""
        return float((self.distances_N <= self.threshold).mean())

    def closest(self, count: int) -> np.ndarray:
        """The samples that lie nearest to a training image, nearest first."""
        return np.argsort(self.distances_N, kind="stable")[:count]


def nearest(samples: np.ndarray, train: np.ndarray) -> Nearest:
    """Euclidean neighbours among images (uint8, compared as pixels in [0, 1]) or features; raises Refused for fewer than two
    training images."""
    if len(train) < 2:
        raise Refused(f"{len(train)} training images have no pairs to compare with: give at least 2")
    places_N, distances_N = neighbours(samples, train)
    own = np.arange(min(PAIRS, len(train)))
    _, between = neighbours(train[own], train, own)
    apart = between[between > 0]
    threshold = float(np.quantile(apart, QUANTILE)) if len(apart) else 0.0
    return Nearest(places_N=places_N, distances_N=distances_N, threshold=threshold)


def neighbours(x: np.ndarray, y: np.ndarray, never_N: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For each x, the place of the nearest y and its distance; `never_N` is a place in y that does not count, such as its own.

    The search minimises |y|^2 - 2 x.y in fp32. That cancels for near copies, so the distance itself is computed from x - y.
    """
    lowest_N, places_N = torch.full((len(x),), float("inf")), torch.zeros(len(x), dtype=torch.int64)
    for of_y in blocks(y):
        y_MD = vectors(y[of_y])
        square_M = y_MD.square().sum(1)
        for rows in blocks(x, ROWS):
            score_RM = square_M - 2 * vectors(x[rows]) @ y_MD.T
            if never_N is not None:
                hide(score_RM, never_N[rows] - of_y.start)
            score_R, place_R = score_RM.min(1)
            closer_R = score_R < lowest_N[rows]
            lowest_N[rows] = torch.where(closer_R, score_R, lowest_N[rows])
            places_N[rows] = torch.where(closer_R, place_R + of_y.start, places_N[rows])
    places_N = places_N.numpy()
    differences = ((vectors(x[rows]).double() - vectors(y[places_N[rows]]).double()) for rows in blocks(x, ROWS))
    return places_N, torch.cat([difference_RD.norm(dim=1) for difference_RD in differences]).numpy()


def hide(score_RM: Tensor, place_R: np.ndarray) -> None:
    """Excludes one place in each row from the search, if it is among these columns."""
    rows = np.flatnonzero((place_R >= 0) & (place_R < score_RM.shape[1]))
    score_RM[rows, place_R[rows]] = float("inf")


def blocks(x: np.ndarray, most: int | None = None) -> Iterator[slice]:
    """Slices of a set, by default of as many rows as fit in BYTES as fp32."""
    most = most or max(1, BYTES // (4 * max(1, x[0].size)))
    return (slice(first, min(first + most, len(x))) for first in range(0, len(x), most))


def vectors(x: np.ndarray) -> Tensor:
    """Pixels in [0, 1], or features unchanged: fp32, one row per image."""
    rows = torch.from_numpy(np.ascontiguousarray(x.reshape(len(x), -1))).float()
    return rows / 255 if x.dtype == np.uint8 else rows


def pairs(images_NHWC: np.ndarray, train_MHWC: np.ndarray, found: Nearest, columns: int = 12, rows: int = 3):
    """The closest samples, each with its neighbour below it, as images for a grid, and the grid's number of columns."""
    order_K = found.closest(columns * rows)
    width = min(columns, len(order_K))
    order_K = order_K[: len(order_K) // width * width].reshape(-1, width)
    sheet = [part for row in order_K for part in (images_NHWC[row], train_MHWC[found.places_N[row]])]
    return np.concatenate(sheet), width
