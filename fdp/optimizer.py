"""Optimizers as values: functions from the metadata of the parameters to an optax
transformation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax


@dataclass(frozen=True)
class Optimizer:
    """`build(metas)`: the transformation for parameters with these `fdp.models.module.Meta`.
    `learning_rate(step)`: for the log."""

    build: Callable[[Any], optax.GradientTransformation]
    learning_rate: optax.Schedule


def warmup_cosine(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine to a tenth of it at `steps`."""
    warmup = min(warmup, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), peak / 10)


def adamw(
    learning_rate: optax.Schedule, beta2: float, weight_decay: float, clip: float
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) after clipping of the global gradient norm; weight decay on
    the parameters whose metadata asks for it."""

    def build(metas: Any) -> optax.GradientTransformation:
        decayed = jax.tree.map(lambda meta: meta.decay, metas)
        return optax.chain(
            optax.clip_by_global_norm(clip),
            optax.adamw(learning_rate, b2=beta2, weight_decay=weight_decay, mask=decayed),
        )

    return Optimizer(build, learning_rate)
