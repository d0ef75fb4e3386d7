"""Small planning problems that the tests of adaptive context plans share.

Legend: L layers, J lists, W blocks, D devices, N draws.
"""

from dataclasses import dataclass

import numpy as np

from fdp.count.context import AttentionShape
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.planner_problem import Masks, Problem
from fdp.parallel.context.planner_time import Machine


@dataclass(frozen=True)
class Link:
    """Equal links: `bandwidth` bytes/s a device one way, `latency` s a collective."""

    bandwidth: float
    latency: float

    def seconds(self, op: str, wire: float, ranks: int, inner: int) -> float:
        return self.latency + wire / self.bandwidth


W, BLOCK = 16, 8
STRIPED = SequenceLayout("striped", BLOCK)
SHAPE = AttentionShape(4, W * BLOCK, 8, 4, 16, cp=4)
FULL, OWN = np.tri(W, dtype=bool), np.eye(W, dtype=bool)
SLOW, FAST = Machine(1e12, Link(1e9, 1e-6)), Machine(1e10, Link(1e12, 1e-9))


def random_masks(L: int, density: float, seed: int = 0, J: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dense = rng.random((L, J, W, W)) < density
    return (dense & np.tri(W, dtype=bool)) | np.eye(W, dtype=bool)


def mixed(machine: Machine = SLOW, **fields) -> Problem:
    """Layers that want different plans: the diagonal, a window, scattered blocks, everything."""
    apart = np.arange(W)[:, None] - np.arange(W)
    window, diagonal = (apart >= 0) & (apart < 3), apart == 0
    masks = np.stack([diagonal, window, random_masks(1, 0.2, 5)[0, 0], apart >= 0])
    return Problem(Masks(masks), SHAPE, machine, **fields)
