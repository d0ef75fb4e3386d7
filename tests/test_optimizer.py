"""AdamW with clipping, schedule and decay as their papers state them, in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from build import program, tiny, toy_program

from fdp.models.module import Meta
from fdp.optimizer import adamw, warmup_cosine

pytestmark = pytest.mark.fast

PEAK, WARMUP, STEPS = 3e-2, 4, 20


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth_along_a_cosine() -> None:
    rate = warmup_cosine(PEAK, WARMUP, STEPS)
    got = [float(rate(i)) for i in range(STEPS + 1)]
    up = [PEAK * i / WARMUP for i in range(WARMUP)]
    along = np.linspace(0, np.pi, STEPS - WARMUP + 1)
    down = PEAK * (0.1 + 0.9 * (1 + np.cos(along)) / 2)
    np.testing.assert_allclose(got, [*up, *down], rtol=1e-5)


def test_three_steps_equal_adamw_in_numpy() -> None:
    """Gradient norms above and below the clip; decay on the matrix alone (Loshchilov & Hutter
    2019)."""
    beta1, beta2, epsilon, decay, clip = 0.9, 0.95, 1e-8, 0.1, 1.0
    rate = warmup_cosine(PEAK, 0, STEPS)
    draw = np.random.default_rng(0)
    params = {"w": draw.normal(size=(4, 3)), "b": draw.normal(size=4)}
    metas = {"w": Meta(decay=True, stacked=False), "b": Meta(decay=False, stacked=True)}
    tx = adamw(rate, beta2, decay, clip).build(metas)
    got = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state, update = tx.init(got), jax.jit(tx.update)
    first, second = ({k: np.zeros_like(x) for k, x in params.items()} for _ in range(2))
    for t, size in enumerate((10.0, 0.1, 1.0)):
        grads = {k: size * draw.normal(size=x.shape) for k, x in params.items()}
        updates, state = update(jax.tree.map(jnp.float32, grads), state, got)
        got = optax.apply_updates(got, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, clip / norm)
            first[k] = beta1 * first[k] + (1 - beta1) * g
            second[k] = beta2 * second[k] + (1 - beta2) * g**2
            root = np.sqrt(second[k] / (1 - beta2 ** (t + 1))) + epsilon
            step = first[k] / (1 - beta1 ** (t + 1)) / root + decay * params[k] * (k == "w")
            params[k] = params[k] - float(rate(t)) * step
        chex.assert_trees_all_close(got, params, rtol=2e-5)


@pytest.mark.parametrize(
    ("made", "stack", "decayed"),
    [
        (toy_program, "blocks", {"blocks/w_in", "blocks/w_out", "w_embed", "w_head"}),
        # Of the stock model: the matrices of layers, and neither embeddings nor stacked vectors.
        (lambda: program(tiny(**{"model.qk_norm": True})), "layers", None),
    ],
    ids=["toy", "transformer"],
)
def test_matrices_decay_and_stacked_vectors_do_not(made, stack, decayed) -> None:
    specs = made().specs
    leaves = jax.tree_util.tree_leaves_with_path(specs.shapes)
    metas = jax.tree.leaves(specs.metas, is_leaf=lambda m: isinstance(m, Meta))
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (x, meta)
        for (path, x), meta in zip(leaves, metas, strict=True)
    }
    assert {n for n, (_, meta) in named.items() if meta.stacked} == {
        n for n in named if n.startswith(f"{stack}/")
    }
    if decayed is None:
        decayed = {n for n, (x, meta) in named.items() if meta.stacked and len(x.shape) > 2}
        assert len(decayed) >= 4
    assert {n for n, (_, meta) in named.items() if meta.decay} == decayed
