"""A share of trials with its interval."""

import math
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a two-sided interval of 95 %


@dataclass(frozen=True)
class Share:
    """`right` of `trials`."""

    right: int
    trials: int

    @classmethod
    def of(cls, right_N: np.ndarray) -> "Share":
        return cls(int(right_N.sum()), int(right_N.size))

    @property
    def value(self) -> float:
        return self.right / self.trials if self.trials else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 1927: the 95 % interval of a binomial share, which stays inside [0, 1] and holds for few trials."""
        n, p = self.trials, self.value
        if not n:
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
        return {"right": self.right, "trials": self.trials, "value": value, "low": low, "high": high}

    @classmethod
    def from_json(cls, stored: dict) -> "Share":
        return cls(stored["right"], stored["trials"])
