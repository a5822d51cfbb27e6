"""What a Frechet distance consists of: means or covariances, and how far vectors spread within and between their classes.

N vectors of D features, K classes.
"""

from dataclasses import dataclass

import numpy as np

from duotone.engine.evaluate.distances import Statistics, frechet_terms


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of all vectors or of one class."""

    frechet: float
    means: float
    """The part of it that lies between the means; the rest lies between the covariances."""
    spread: float
    """The trace of the covariance, as a share of the reference's: below 1 is too little variety."""


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A set of vectors against a reference, with both sets' classes."""

    whole: Part
    within: float
    """The classes' mean spread, as a share of the reference's."""
    between: float
    """The spread of the classes' means, as a share of the reference's: above 1, classes are further apart than real ones."""
    by_class: dict[str, Part]


def composition(
    x_ND: np.ndarray, labels_N: np.ndarray, reference_MD: np.ndarray, labels_M: np.ndarray, names: tuple[str, ...]
) -> Composition:
    """Every class needs two vectors or more of both sets. A class's own distance is biased by its few vectors."""
    x, reference = classes(x_ND, labels_N, len(names)), classes(reference_MD, labels_M, len(names))
    return Composition(
        whole=part(Statistics.of(x_ND), Statistics.of(reference_MD)),
        within=within(x) / within(reference),
        between=between(x) / between(reference),
        by_class={name: part(ours, theirs) for name, ours, theirs in zip(names, x, reference)},
    )


def classes(x_ND: np.ndarray, labels_N: np.ndarray, count: int) -> list[Statistics]:
    return [Statistics.of(x_ND[labels_N == k]) for k in range(count)]


def part(x: Statistics, reference: Statistics) -> Part:
    means, covariances = frechet_terms(x, reference)
    return Part(frechet=means + covariances, means=means, spread=spread(x) / spread(reference))


def spread(x: Statistics) -> float:
    return float(np.trace(x.covariance_DD))


def within(of_classes: list[Statistics]) -> float:
    return float(np.mean([spread(x) for x in of_classes]))


def between(of_classes: list[Statistics]) -> float:
    return spread(Statistics.of(np.stack([x.mean_D for x in of_classes])))
