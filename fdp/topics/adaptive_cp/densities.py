"""Densities of the layers while a model trains: the hook that writes them, and what it wrote.

Legend: B sequences, S positions, N layers, T steps of training.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fdp import process
from fdp.arm import Arm
from fdp.metrics import read_metrics
from fdp.parallel.context.profile import TAU, profile
from fdp.state import TrainState
from fdp.topics.adaptive_cp.settings import BLOCKS

DENSITY = "density"  # name of the metric


@dataclass(frozen=True)
class Densities:
    """Run of a hook: the density of every layer, [N], on the first `sequences` of the validation
    split."""

    sequences: int

    def __call__(self, arm: Arm, step: int, state: TrainState) -> dict[str, np.ndarray]:
        """As `Hook`."""
        tokens_BxS = arm.data.val.take(range(self.sequences))["tokens"]
        variables = process.fetch(state.variables)
        found = profile(
            arm.model, arm.objective, variables, tokens_BxS, tokens_BxS.shape[1] // BLOCKS, TAU
        )
        return {DENSITY: found.density_N}


@dataclass(frozen=True)
class History:
    """Density of every layer [N, T] at `steps` of the training of one arm."""

    steps: list[int]
    density_NxT: np.ndarray


def history(arm: Arm, workdir: Path) -> History:
    """What the hook of the run wrote there. Raises RuntimeError where there is nothing."""
    me = (arm.name, arm.seed)
    rows = read_metrics(workdir)
    found = {r["step"]: r[DENSITY] for r in rows if (r["arm"], r["seed"]) == me and DENSITY in r}
    if not found:
        raise RuntimeError(f"{workdir} holds no densities of arm {arm.label}: train it with a hook")
    steps = sorted(found)
    return History(steps, np.array([found[step] for step in steps], np.float32).T)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two orders of layers; 1 where both are constant."""
    import scipy.stats  # on use: it costs a second at start-up

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float(np.ptp(a) == np.ptp(b))
    return round(float(scipy.stats.spearmanr(a, b).statistic), 12)  # 0.8 of four layers is 0.8
