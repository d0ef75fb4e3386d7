"""Optimizers as values: functions from the metadata of the parameters to an optax
transformation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class Optimizer:
    """`rule(metas)`: the transformation, after clipping, of parameters with these
    `fdp.models.module.Meta`. `learning_rate(step)`: for the log. `clip`: largest global gradient
    norm. `elementwise`: the rule treats every element by itself, so it can run in parts, each on
    some parameters."""

    rule: Callable[[Any], optax.GradientTransformation]
    learning_rate: optax.Schedule
    clip: float = math.inf
    elementwise: bool = False

    def build(self, metas: Any) -> optax.GradientTransformation:
        """Clipping by the global norm of the gradients given, then the rule."""
        return optax.chain(optax.clip_by_global_norm(self.clip), self.rule(metas))

    def apart(
        self, metas: Any, grads: Any, state: Any, params: Any, norm: jax.Array, clip: jax.Array
    ) -> tuple[Any, Any]:
        """(updates, new state) as of `build`, of some parameters of a model whose gradients have
        the global norm `norm`, clipped to `clip`."""
        free = norm < clip
        clipped = jax.tree.map(lambda g: jnp.where(free, g, g / norm * clip), grads)
        updates, new = self.rule(metas).update(clipped, state[1], params)
        return updates, (state[0], new)


def warmup_cosine(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine to a tenth of it at `steps`."""
    warmup = min(warmup, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), peak / 10)


def adamw(
    learning_rate: optax.Schedule, beta2: float, weight_decay: float, clip: float
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) after clipping of the global gradient norm; weight decay on
    the parameters whose metadata asks for it."""

    def rule(metas: Any) -> optax.GradientTransformation:
        decayed = jax.tree.map(lambda meta: meta.decay, metas)
        return optax.adamw(learning_rate, b2=beta2, weight_decay=weight_decay, mask=decayed)

    return Optimizer(rule, learning_rate, clip, elementwise=True)
