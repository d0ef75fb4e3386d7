"""What a trained model attends to: block masses, densities and block masks of every layer.

Legend: B sequences, S positions, W blocks of a sequence, H query heads, N layers, T steps of
training.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.metrics import read_metrics
from fdp.models import module
from fdp.models.transformer import Transformer
from fdp.objectives.base import Objective
from fdp.parallel.context import density
from fdp.parallel.masks import Mask
from fdp.state import TrainState
from fdp.topics.adaptive_cp.settings import BLOCKS

Array = jax.Array
CAUSAL = Mask("causal")
TAU = 0.95  # of the mass
DENSITY = "density"  # name of the metric


@dataclass(frozen=True)
class Profile:
    """mass_NxWxW: attention mass of key blocks, mean over the rows of a query block, sequences and
    heads; density_N: share of the causal blocks needed for `tau` of each row's mass, mean over
    heads."""

    mass_NxWxW: np.ndarray
    density_N: np.ndarray
    tau: float


def profile(
    arm: Arm, variables: module.Variables, tokens_BxS: np.ndarray, block: int, tau: float
) -> Profile:
    """Exact masses over all rows of `tokens_BxS`, one sequence at a time. Variables on one device
    or the host.

    Raises ValueError where `block` does not divide the sequence.
    """
    one = _probe(arm.model, arm.objective, block, tau)
    parts = [jax.device_get(one(variables, tokens_BxS[i : i + 1])) for i in range(len(tokens_BxS))]
    return Profile(np.mean([p[0] for p in parts], 0), np.mean([p[1] for p in parts], 0), tau)


@lru_cache(maxsize=8)  # compiled once for all steps and windows
def _probe(model: Transformer, objective: Objective, block: int, tau: float) -> Any:
    """(variables, tokens [1, S]) → (mass [N, W, W], density [N])."""

    @jax.jit
    def one(variables: module.Variables, tokens_1xS: Array) -> tuple[Array, Array]:
        S = tokens_1xS.shape[1]
        position = jnp.arange(S)
        noised = objective.corrupt(jax.random.key(0), {"tokens": tokens_1xS})
        _, seen = module.probed(model, variables, noised)
        found = seen["layers"]["attention"]
        visible = density.blocks_visible(position, position, CAUSAL, block)

        def layer(q: Array, k: Array) -> tuple[Array, Array]:
            mass_BxHxSxW = density.block_mass(q, position, k, position, CAUSAL, block)
            needed = density.blocks_needed(mass_BxHxSxW, tau)
            rows = mass_BxHxSxW.mean((0, 1)).reshape(S // block, block, -1).mean(1)
            return rows, density.density(needed, visible).mean()

        return jax.lax.map(lambda qk: layer(*qk), (found["q"], found["k"]))

    return one


@dataclass(frozen=True)
class Densities:
    """Run of a hook: the density of every layer, [N], on the first `sequences` of the validation
    split."""

    sequences: int

    def __call__(self, arm: Arm, step: int, state: TrainState) -> dict[str, np.ndarray]:
        """As `Hook`."""
        tokens_BxS = arm.data.val.take(range(self.sequences))["tokens"]
        variables = jax.device_get(state.variables)
        found = profile(arm, variables, tokens_BxS, tokens_BxS.shape[1] // BLOCKS, TAU)
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


def block_masks(mass_NxWxW: np.ndarray, coverage: float) -> np.ndarray:
    """Fewest key blocks of each query block that hold `coverage` of its mean mass, with its own and
    the first: bool.

    [N, W, W] → [N, W, W]; never a block in the future. Raises ValueError for a coverage outside (0,
    1]."""
    if not 0 < coverage <= 1:
        raise ValueError(
            f"coverage = {coverage} is no share of attention mass: choose it in (0, 1]"
        )
    W = mass_NxWxW.shape[-1]
    past_WxW = np.tril(np.ones((W, W), bool))
    mass = np.where(past_WxW, mass_NxWxW, 0.0)
    order = np.argsort(-mass, axis=-1, kind="stable")
    before = np.cumsum(np.take_along_axis(mass, order, -1), -1) - np.take_along_axis(
        mass, order, -1
    )
    kept = before < coverage * mass.sum(-1, keepdims=True)
    masks = np.zeros_like(past_WxW, shape=mass.shape)
    np.put_along_axis(masks, order, kept, -1)
    masks[..., 0] = True
    return (masks | np.eye(W, dtype=bool)) & past_WxW


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two orders of layers; 1 where both are constant."""
    import scipy.stats  # on use: it costs a second at start-up

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float(np.ptp(a) == np.ptp(b))
    return round(float(scipy.stats.spearmanr(a, b).statistic), 12)  # 0.8 of four layers is 0.8
