"""Errors of a cost model as factors: log-normal, seeded, equal for equal members of a class.

Legend: N draws.
"""

import math
import zlib
from typing import Any

import numpy as np

QUANTILE = 1.645  # standard deviations of the 90 % quantile of |error|


def sigma(p90: float) -> float:
    """Standard deviation of the logarithm of a factor whose |error| is below `p90` (0.1: 10 %) in
    90 % of cases."""
    return math.log1p(p90) / QUANTILE


def factors(
    what: Any, sigma: float, draws: int, seed: int = 0, nominal: bool = False
) -> np.ndarray:
    """Log-normal factors [N] of the error of `what` (its `repr` tells it from others), equal for
    equal arguments; `nominal`: the first of them is 1."""
    rng = np.random.default_rng([seed, zlib.crc32(repr(what).encode())])
    drawn = np.exp(sigma * rng.standard_normal(draws - nominal))
    return np.r_[1.0, drawn] if nominal else drawn


def interval(ratio_N: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the draws."""
    low, high = np.quantile(ratio_N, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
