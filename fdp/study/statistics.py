"""Intervals over few seeds.

A percentile bootstrap of 2, 3 or 5 values covers 50, 76 or 82 % where it says 95: it cannot reach
beyond what it has seen. Student's t does; from ten values on the bootstrap needs no assumption.
"""

import functools
import math
import warnings
from collections.abc import Sequence

import numpy as np

FEW = 10  # seeds from which on the bootstrap is used


def interval(
    values: Sequence[float], baseline: Sequence[float] | None = None, level: float = 0.95
) -> tuple[float, float] | None:
    """Interval of the mean over seeds, or None below two seeds.

    With `baseline`, values of the same seeds in the same order: of the paired ratio mean(values) /
    mean(baseline). Below FEW seeds: Student's t with n - 1 degrees of freedom, of the mean or of the
    logarithm of the ratio (to first order, which centres the interval on the ratio itself; a ratio
    of numbers that are not all positive is taken as it is); else a bias-corrected bootstrap. Raises
    ValueError for unequal counts."""
    x_N = np.asarray(values, float)
    if baseline is not None and np.shape(baseline) != x_N.shape:
        raise ValueError(
            f"a paired ratio needs one baseline per seed: {x_N.size} values, {np.size(baseline)} "
            "baselines"
        )
    if x_N.size < 2:
        return None
    y_N = np.ones_like(x_N) if baseline is None else np.asarray(baseline, float)
    centre, base = x_N.mean() / y_N.mean(), y_N.mean()
    # What each seed adds to the deviation of the ratio, to first order.
    spread = (x_N - centre * y_N).std(ddof=1) / abs(base)
    if not math.isfinite(spread) or spread <= 1e-12 * abs(centre):
        return float(centre), float(centre)
    if x_N.size >= FEW:
        return _bootstrap(x_N, y_N, level)
    half = _student((1 + level) / 2, x_N.size - 1) * spread / math.sqrt(x_N.size)
    # Not of a mean whose values happen to be positive: such an interval could never hold 0.
    if baseline is not None and (x_N > 0).all() and (y_N > 0).all():
        factor = math.exp(min(half / centre, 700.0))  # two seeds that differ widely say nothing
        return float(centre / factor), float(centre * factor)
    return float(centre - half), float(centre + half)


@functools.cache
def _student(quantile: float, freedom: int) -> float:
    from scipy import stats  # on use: a third of a second at start-up

    return float(stats.t.ppf(quantile, freedom))


def _bootstrap(x_N: np.ndarray, y_N: np.ndarray, level: float) -> tuple[float, float]:
    from scipy import stats

    def ratio(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return x.mean(axis) / y.mean(axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a degenerate distribution: asked for below
        found = stats.bootstrap(
            (x_N, y_N),
            ratio,
            paired=True,
            confidence_level=level,
            n_resamples=10_000,
            random_state=np.random.default_rng(0),
        ).confidence_interval
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        raise ValueError(f"the bootstrap of {x_N.tolist()} over {y_N.tolist()} has no interval")
    return float(found.low), float(found.high)
