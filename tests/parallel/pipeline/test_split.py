"""The backward pass in halves: exact, each equation once, with the least stash."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.count.compare import relative_error
from fdp.count.jaxpr import dot_flops
from fdp.parallel.pipeline.split import halves

N, T, D, F = 3, 5, 8, 16
KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = {
    "a": jax.random.normal(KEYS[0], (N, D, D)),
    "b": jax.random.normal(KEYS[1], (N, D)),
    "w": jax.random.normal(KEYS[2], (N, D, F)),
    "o": jax.random.normal(KEYS[3], (N, F, D)),
}
X = jax.random.normal(KEYS[4], (T, D))
KINDS = {"plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint}


def block(p, x):
    h = jnp.tanh(x @ p["a"] + p["b"])
    return x + jax.nn.silu(h @ p["w"]) @ p["o"]


def model(wrap):
    def f(params, x):
        y, norms = jax.lax.scan(lambda x, p: (wrap(block)(p, x), (x**2).sum()), x, params)
        return y, norms

    return f


@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_the_backward_pass_and_compute_nothing_twice(kind):
    f = model(KINDS[kind])
    whole = halves(f, PARAMS, X)

    def run(params, x):
        y, residuals, aux = whole.forward(f, params, x)
        dx, stash = whole.input_gradients(params, residuals, y)
        return dx, whole.weight_gradients(params, stash), stash, aux

    dx, grads, stash, aux = jax.jit(run)(PARAMS, X)
    y, pull, norms = jax.vjp(f, PARAMS, X, has_aux=True)
    want, wanted = pull(y)
    np.testing.assert_allclose(dx, wanted, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(grads, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(aux, norms)
    fused = dot_flops(jax.make_jaxpr(lambda dy: pull(dy))(y))
    _, residuals, _ = whole.forward(f, PARAMS, X)
    first = jax.make_jaxpr(lambda *a: whole.input_gradients(PARAMS, *a))(residuals, y)
    second = jax.make_jaxpr(lambda s: whole.weight_gradients(PARAMS, s))(stash)
    assert dot_flops(first) + dot_flops(second) == fused
    assert dot_flops(second) == 2 * N * T * D * (D + F + F)
    # of each product its input and the gradient of its output, nothing else
    assert sum(x.size for x in jax.tree.leaves(stash)) == N * T * (2 * D + D + F + F + D)


def test_a_second_vjp_for_the_weights_would_compute_the_chain_again():
    f = model(KINDS["plain"])
    y, pull, _ = jax.vjp(f, PARAMS, X, has_aux=True)
    fused = dot_flops(jax.make_jaxpr(pull)(y))
    _, pull_x, _ = jax.vjp(lambda x: f(PARAMS, x), X, has_aux=True)
    _, pull_w, _ = jax.vjp(lambda p: f(p, X), PARAMS, has_aux=True)
    twice = dot_flops(jax.make_jaxpr(pull_x)(y)) + dot_flops(jax.make_jaxpr(pull_w)(y))
    assert twice > 1.3 * fused


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_what_follows_from_them_are_not_kept(kind):
    def block(p, x):
        gate, up = jnp.moveaxis(p["w"].reshape(D, 2, F // 2), 1, 0)  # slices
        wide = (x @ up) * jnp.tanh(x @ gate) @ p["o"][: F // 2].astype(jnp.bfloat16)
        return x + (1 + p["b"]) * wide

    def f(params, x):
        run = KINDS[kind](block)
        return jax.lax.scan(lambda x, p: (run(p, x), ()), x, params)

    whole = halves(f, PARAMS, X)
    y, residuals, _ = whole.forward(f, PARAMS, X)
    assert all(r.shape[:2] == (N, T) for r in residuals)
    dx, stash = whole.input_gradients(PARAMS, residuals, y)
    # The gradient of b is smaller than what it is a sum of.
    kept = [s.shape for s in jax.tree.leaves(stash) if s.shape != (N, D)]
    assert all(shape[:2] == (N, T) for shape in kept)
    want, wanted = jax.vjp(lambda *a: f(*a)[0], PARAMS, X)[1](y)
    assert relative_error((whole.weight_gradients(PARAMS, stash), dx), (want, wanted)) < 1e-5


def test_casts_of_parameters_are_computed_again_in_their_half():
    def gated(p, x):  # the gradient of the gate reads the product, which reads the cast
        return x + p["b"] * (jnp.tanh(x) @ p["a"].astype(jnp.bfloat16))

    def f(params, x):
        return jax.lax.scan(lambda x, p: (jax.checkpoint(gated)(p, x), ()), x, params)

    params = {name: PARAMS[name] for name in ("a", "b")}
    whole = halves(f, params, X)
    y, residuals, _ = whole.forward(f, params, X)
    dx, stash = whole.input_gradients(params, residuals, y)
    shapes = [s.shape for s in jax.tree.leaves(stash)]
    assert (N, D, D) not in shapes and (N, T, D) in shapes
    want, wanted = jax.vjp(lambda *a: f(*a)[0], params, X)[1](y)
    got = whole.weight_gradients(params, stash)
    assert relative_error((got, dx), (want, wanted)) < 1e-5
