"""A share of trials and its confidence interval."""

import math
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class Share:
    """`right` of `trials`."""

    right: int
    trials: int
    independent: int | None = None
    """Number of independent trials, if fewer than all."""

    @classmethod
    def of(cls, right_N: np.ndarray, independent: int | None = None) -> "Share":
        return cls(int(right_N.sum()), int(right_N.size), independent)

    @property
    def value(self) -> float:
        return self.right / self.trials if self.trials else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 1927: the 95 % interval of a binomial share, which stays inside [0, 1] and is valid for few trials."""
        n, p = self.trials if self.independent is None else self.independent, self.value
        if not self.trials:
            return 0.0, 1.0
        middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]" if self.trials else "none asked for"

    def to_json(self) -> dict:
        low, high = self.interval
        value = self.value if self.trials else None
        dependent = {} if self.independent is None else {"independent": self.independent}
        return {"right": self.right, "trials": self.trials, **dependent, "value": value, "low": low, "high": high}

    @classmethod
    def from_json(cls, stored: dict) -> "Share":
        return cls(stored["right"], stored["trials"], stored.get("independent"))


def student(trials: int) -> float | None:
    """The two-sided 95 % quantile of Student's t for a mean of this many trials; None below 10, which are too few.

    Abramowitz and Stegun 1964, 26.7.5, which is within 0.001 from 10 trials on.
    """
    if trials < 10:
        return None
    v, z = trials - 1, Z
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / v**k for k, term in enumerate(terms, 1))
