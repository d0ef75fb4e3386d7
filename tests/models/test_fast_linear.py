"""Fast maps of TTT-Linear and TTT-MLP: the dual form against a step on every token, and what
the backward pass keeps.

Legend: B sequences, L positions, C positions of a mini-batch, H heads, K head dim, F hidden width.
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.count import hlo
from fdp.models import fast_linear
from fdp.models.fast_linear import FastLinear, Maps

pytestmark = pytest.mark.fast
B, L, C, H, K, F = 2, 16, 8, 2, 4, 8
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def maps(*widths: int) -> Maps:
    pairs = itertools.pairwise(widths)
    return tuple(FastLinear(0.3 * normal(H, m, n), 0.3 * normal(H, n)) for m, n in pairs)


TOKENS = unit(normal(B, L, H, K)), unit(normal(B, L, H, K)), normal(B, L, H, K)
RATES = np.abs(normal(B, L, H))
NORM = 1 + 0.1 * normal(H, K), 0.1 * normal(H, K)
NETWORKS = {"linear": maps(K, K), "mlp": maps(K, F, K)}


@jax.jit
def step_by_step(first: Maps, norm: tuple, tokens: tuple) -> tuple[jax.Array, Maps]:
    """(outputs [L, K], the maps after all) of one sequence and head: autodiff of the loss of every
    token, at the weights before its mini-batch."""

    def normed_by(maps: Maps, x: jax.Array) -> jax.Array:
        for i, (weight, bias) in enumerate(maps):
            x = (jax.nn.gelu(x) if i else x) @ weight + bias
        return fast_linear.normed(x, *norm)

    def loss(maps: Maps, k: jax.Array, v: jax.Array) -> jax.Array:
        return 0.5 * ((normed_by(maps, k) - (v - k)) ** 2).sum()

    def one(at: tuple[Maps, Maps], token: tuple) -> tuple[tuple[Maps, Maps], jax.Array]:
        (start, now), (t, q, k, v, rate) = at, token
        start = jax.tree.map(lambda a, b: jnp.where(t % C == 0, a, b), now, start)
        step = jax.grad(loss)(start, k, v)
        now = jax.tree.map(lambda w, g: w - rate * g, now, step)
        return (start, now), q + normed_by(now, q)

    (_, now), out = jax.lax.scan(one, (first, first), (jnp.arange(L), *tokens))
    return out, now


@pytest.mark.parametrize("name", NETWORKS)
def test_the_dual_form_is_a_step_on_every_token(name):
    first = NETWORKS[name]
    run = jax.jit(fast_linear.linear_scan, static_argnums=6, compiler_options=hlo.QUICK)
    got, last = run(*TOKENS, RATES, first, NORM, C)
    for b, h in ((0, 0), (1, 1)):
        own = jax.tree.map(lambda w: w[h], first)  # noqa: B023
        norm = tuple(x[h] for x in NORM)
        tokens = tuple(x[b, :, h] for x in (*TOKENS, RATES))
        want, now = step_by_step(own, norm, tokens)
        one = jax.tree.map(lambda w: w[b, h], last)  # noqa: B023
        for x, y in zip(
            jax.tree.leaves((got[b, :, h], one)), jax.tree.leaves((want, now)), strict=True
        ):
            assert np.linalg.norm(x - y) <= 2e-6 * np.linalg.norm(y)
    _, still = run(*TOKENS, 0 * RATES, first, NORM, C)
    chex.assert_trees_all_equal(still, jax.tree.map(lambda w: np.stack([w] * B), first))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_backward_pass_keeps_what_the_formula_says(name):
    first = NETWORKS[name]
    widths = K, *(fast.bias.shape[-1] for fast in first)
    shared = 4 * (2 * H * K + C**2)  # the norm, and which tokens are past
    for segment, ids in ((None, 0), (np.zeros((B, L), np.int32), 4 * B * (L + 2 * L // C))):

        def kept(*tokens: jax.Array) -> object:
            def run(*tokens: jax.Array) -> jax.Array:
                return fast_linear.linear_scan(*tokens, first, NORM, C, segment)[0]  # noqa: B023

            return jax.vjp(run, *tokens)[1]

        found = jax.tree.leaves(jax.eval_shape(kept, *TOKENS, RATES))
        formula = fast_linear.scan_memory(L, C, widths, segment is not None)
        assert sum(x.size * x.dtype.itemsize for x in found) == 4 * B * H * formula + ids + shared
