"""Is a sample a copy? The nearest training image of each, against how near training images are to each other.

N samples, M training images, D pixels or features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duotone.data.refusal import Refused

ROWS = 256
PAIRS = 2000  # training images whose nearest neighbour sets the scale
QUANTILE = 0.01


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The nearest training image of each sample."""

    places_N: np.ndarray
    distances_N: np.ndarray
    threshold: float
    """The distance within which one training image in a hundred has another; twins, at 0, do not count."""

    @property
    def closer(self) -> float:
        """Share of samples no farther from a training image than the threshold: about 1 % for images that are no copies."""
        return float((self.distances_N <= self.threshold).mean())

    def closest(self, count: int) -> np.ndarray:
        """The samples that lie nearest to a training image, nearest first."""
        return np.argsort(self.distances_N, kind="stable")[:count]


def nearest(samples_ND: np.ndarray, train_MD: np.ndarray) -> Nearest:
    """Euclidean neighbours; raises Refused where there is no pair of training images."""
    if len(train_MD) < 2:
        raise Refused(f"{len(train_MD)} training images have no pairs to compare with: give at least 2")
    samples, train = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) for x in (samples_ND, train_MD))
    places_N, distances_N = neighbours(samples, train)
    own = torch.arange(min(PAIRS, len(train)))
    _, between = neighbours(train[own], train, own)
    apart = between[between > 0]
    threshold = float(np.quantile(apart, QUANTILE)) if len(apart) else 0.0
    return Nearest(places_N=places_N, distances_N=distances_N, threshold=threshold)


def neighbours(x_ND: Tensor, y_MD: Tensor, never_N: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of each x the nearest y and its distance; `never_N` are places that do not count, such as its own.

    The search is by |y|^2 - 2 x.y in fp32, which cancels for near copies: the distance is then taken from the difference.
    """
    square_M = y_MD.square().sum(1)
    found = []
    for rows_R in torch.arange(len(x_ND)).split(ROWS):
        score_RM = square_M - 2 * x_ND[rows_R] @ y_MD.T
        if never_N is not None:
            score_RM.scatter_(1, never_N[rows_R, None], float("inf"))
        found.append(score_RM.argmin(1))
    places_N = torch.cat(found)
    return places_N.numpy(), (x_ND.double() - y_MD[places_N].double()).norm(dim=1).numpy()


def flat(images_NHWC: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] as vectors, fp32."""
    return images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32) / 255


def pairs(images_NHWC: np.ndarray, train_MHWC: np.ndarray, found: Nearest, columns: int = 12, rows: int = 3):
    """The closest samples, each with its neighbour below, as images for a grid of `columns`."""
    order_K = found.closest(columns * rows)
    width = min(columns, len(order_K))
    order_K = order_K[: len(order_K) // width * width].reshape(-1, width)
    sheet = [part for row in order_K for part in (images_NHWC[row], train_MHWC[found.places_N[row]])]
    return np.concatenate(sheet), width
