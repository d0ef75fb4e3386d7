"""Block masks that no model produced, to plan for.

Legend: L layers, W blocks of the sequence.
"""

import numpy as np

PATTERNS = ("window", "vertical-slash", "clustered", "scattered")


def pattern(kind: str, W: int, density: float, seed: int = 0, cluster: int = 32) -> np.ndarray:
    """A causal mask bool [W, W] that keeps a share `density` of the causal blocks, at least the
    diagonal.

    window: the nearest blocks; vertical-slash: random columns and diagonals; scattered: random
    blocks; clustered: random, but alike in `cluster` neighbouring query blocks. Raises ValueError
    for another kind, and for a density outside (0, 1]."""
    if kind not in PATTERNS:
        raise ValueError(f"pattern {kind!r} is unknown: {' or '.join(PATTERNS)}")
    if not 0 < density <= 1:
        raise ValueError(f"density = {density} must be in (0, 1]")
    rng = np.random.default_rng([seed, PATTERNS.index(kind)])
    apart = np.arange(W)[:, None] - np.arange(W)
    if kind == "window":
        score = -apart.astype(float)
    elif kind == "vertical-slash":
        score = np.maximum(rng.random(W)[None, :], rng.random(W)[np.maximum(apart, 0)])
    elif kind == "clustered":
        score = np.repeat(rng.random((-(-W // cluster), W)), cluster, axis=0)[:W]
    else:
        score = rng.random((W, W))
    score = np.where(apart == 0, np.inf, np.where(apart < 0, -np.inf, score))
    kept = max(W, round(density * W * (W + 1) / 2))
    return score >= np.partition(score, -kept, axis=None)[-kept]


def layers(L: int, W: int, density: float, spread: float = 16.0, seed: int = 0) -> np.ndarray:
    """L masks bool [L, W, W] of mean density `density`: patterns in turn, densities geometric with
    max/min = `spread`.

    Densities above 1 are cut, and the rest raised so that the mean stays. Raises ValueError as
    `pattern`, and for a spread below 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density = {density} must be in (0, 1]")
    if spread < 1:
        raise ValueError(f"spread = {spread} is max/min density, at least 1")
    weight_L = np.random.default_rng(seed).permutation(spread ** (np.arange(L) / max(L - 1, 1)))
    density_L = weight_L * density / weight_L.mean()
    while (density_L > 1 + 1e-9).any():  # what is above 1 goes to those below, in proportion
        free = density_L < 1
        density_L = np.minimum(density_L, 1.0)
        density_L[free] *= (density * L - (~free).sum()) / density_L[free].sum()
    kinds = [PATTERNS[i % len(PATTERNS)] for i in range(L)]
    each = enumerate(zip(kinds, density_L, strict=True))
    return np.stack([pattern(kind, W, min(d, 1.0), seed + i) for i, (kind, d) in each])
