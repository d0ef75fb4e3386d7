"""What a trained model attends to: mass of key blocks, density and block masks of every layer.

Legend: B sequences, S positions, W blocks of a sequence, H query heads, N layers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.models import module
from fdp.models.transformer import Transformer
from fdp.objectives.base import Objective
from fdp.parallel.context import density
from fdp.parallel.masks import Mask

Array = jax.Array
CAUSAL = Mask("causal")
TAU = 0.95  # of the mass


@dataclass(frozen=True)
class Profile:
    """mass_NxWxW: attention mass of key blocks, mean over the rows of a query block, sequences and
    heads; density_N: share of the causal blocks needed for `tau` of each row's mass, mean over
    heads."""

    mass_NxWxW: np.ndarray
    density_N: np.ndarray
    tau: float


def profile(
    model: Transformer,
    objective: Objective,
    variables: module.Variables,
    tokens_BxS: np.ndarray,
    block: int,
    tau: float,
) -> Profile:
    """Exact masses over all rows of `tokens_BxS`, one sequence at a time. Variables on one device
    or the host.

    Raises ValueError where `block` does not divide the sequence.
    """
    one = _probe(model, objective, block, tau)
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
