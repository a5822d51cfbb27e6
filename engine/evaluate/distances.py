"""Distances between two sets of feature vectors, in float64: Frechet, kernel, precision and recall.

N and M vectors of D features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duotone.data.refusal import Refused

ROWS = 1024  # rows of a distance matrix held in memory at once


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and covariance of a set of features."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray
    count: int

    @classmethod
    def of(cls, x_ND: np.ndarray) -> "Statistics":
        """Raises Refused for fewer than two vectors."""
        if len(x_ND) < 2:
            raise Refused(f"{len(x_ND)} images have no covariance: give at least 2")
        covariance_DD = np.atleast_2d(np.cov(x_ND, rowvar=False))
        return cls(mean_D=x_ND.mean(0), covariance_DD=covariance_DD, count=len(x_ND))


def frechet(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)); Heusel et al. 2017, equation 6 (the squared distance)."""
    return sum(frechet_terms(a, b))


def frechet_terms(a: Statistics, b: Statistics) -> tuple[float, float]:
    """The terms that the means and the covariances contribute to the Frechet distance.

    The root has the same trace as (S_a^(1/2) S_b S_a^(1/2))^(1/2), which is symmetric: its eigenvalues are real and, except
    for rounding, not negative, even if a covariance is singular.
    """
    values_D, vectors_DD = np.linalg.eigh(a.covariance_DD)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T
    product_DD = root_DD @ b.covariance_DD @ root_DD
    of_product_D = np.linalg.eigvalsh((product_DD + product_DD.T) / 2).clip(0)
    apart = np.square(a.mean_D - b.mean_D).sum()
    traces = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
    return float(apart), float(traces - 2 * np.sqrt(of_product_D).sum())


def kernel_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3; Binkowski et al. 2018, equations 3 and 4. It may be below 0."""
    n, m = len(x_ND), len(y_MD)
    if min(n, m) < 2:
        raise Refused(f"a kernel distance of {n} and {m} images: give at least 2 of each")
    return among(x_ND) + among(y_MD) - 2 * kernel_sum(x_ND, y_MD) / (n * m)


def among(x_ND: np.ndarray) -> float:
    """The mean of k over all pairs of two different vectors."""
    n, dimensions = x_ND.shape
    of_itself_N = (np.square(x_ND).sum(1) / dimensions + 1) ** 3
    return (kernel_sum(x_ND, x_ND) - float(of_itself_N.sum())) / (n * (n - 1))


def kernel_sum(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    blocks = [x_ND[i : i + ROWS] for i in range(0, len(x_ND), ROWS)]
    return float(sum(((block @ y_MD.T / x_ND.shape[1] + 1) ** 3).sum() for block in blocks))


NEIGHBOURS = 3
"""k: the distance to the k-th nearest neighbour is the radius of a vector's ball."""


def precision_recall(real_ND: np.ndarray, made_MD: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision: the share of generated vectors inside a ball of some real one. Recall: the same with the sets exchanged.

    A ball reaches from a vector to its k-th nearest neighbour in its own set; Kynkaanniemi et al. 2019, equations 1 to 3.
    Both depend on the sizes of the sets, so compare sets of equal size.
    """
    refuse_without_neighbours(min(len(real_ND), len(made_MD)), k)
    real, made = torch.from_numpy(real_ND).double(), torch.from_numpy(made_MD).double()
    return inside(made, real, k), inside(real, made, k)


def inside(x_ND: Tensor, y_MD: Tensor, k: int) -> float:
    """The share of the x that lie in the ball of some y."""
    radii_M = torch.cat([own_M.kthvalue(k + 1, dim=1).values for own_M in distances(y_MD, y_MD)])
    within = [(to_RM <= radii_M).any(1) for to_RM in distances(x_ND, y_MD)]
    return float(torch.cat(within).double().mean())


def distances(x_ND: Tensor, y_MD: Tensor):
    """Rows of the distance matrix, ROWS at a time; taken from the differences themselves, so that equal vectors are at 0."""
    for rows_RD in x_ND.split(ROWS):
        yield torch.cdist(rows_RD, y_MD, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far one set is from a reference."""

    frechet: float
    kernel: float
    precision: float
    recall: float


def distance(x_ND: np.ndarray, reference_MD: np.ndarray, like_ND: np.ndarray, count: int) -> Distance:
    """N vectors against a reference: the Frechet distance to all of it, the other measures against part of it (`like_ND`).

    Precision and recall take the first `count` vectors of both sets, since they depend on the sizes.
    """
    precision, recall = precision_recall(like_ND[:count], x_ND[:count])
    return Distance(
        frechet=frechet(Statistics.of(x_ND), Statistics.of(reference_MD)),
        kernel=kernel_distance(x_ND, like_ND),
        precision=precision,
        recall=recall,
    )


def refuse_without_neighbours(images: int, k: int = NEIGHBOURS) -> None:
    if images <= k:
        raise Refused(
            f"precision and recall with k = {k} need more than {k} images of each kind, but there are {images}"
        )


def refuse_too_few(samples: int, width: int) -> None:
    """Raises Refused unless there are more vectors than features; otherwise the covariance is singular, the distance mostly bias."""
    if samples <= width:
        raise Refused(
            f"{samples} samples, or as many images for the floor: a Frechet distance over {width} features needs more images than "
            f"features; give --samples {width + 1} or more, and no smaller --floor"
        )
