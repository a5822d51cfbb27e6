"""The parts of a Frechet distance: its means and covariances, and how far vectors spread within and between classes.

N vectors of D features, K classes.
"""

from dataclasses import dataclass

import numpy as np

from duotone.engine.evaluate.distances import Statistics, frechet_terms


@dataclass(frozen=True, kw_only=True)
class Part:
    """The distance of all vectors, or of one class."""

    frechet: float
    means: float
    """The part of the distance that is due to the means; the rest is due to the covariances."""
    spread: float
    """The trace of the covariance, as a multiple of the reference's: below 1 means too little variety."""


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A set of vectors against a reference, with both sets' classes."""

    whole: Part
    within: float
    """The mean spread within a class, as a multiple of the reference's."""
    between: float
    """The spread of the class means, as a multiple of the reference's: above 1, classes are further apart than real ones."""
    by_class: dict[str, Part]


def composition(
    x_ND: np.ndarray, labels_N: np.ndarray, reference_MD: np.ndarray, labels_M: np.ndarray, names: tuple[str, ...]
) -> Composition:
    """Every class needs at least two vectors in both sets. A single class has few vectors, which bias its distance upwards."""
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
