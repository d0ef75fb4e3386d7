"""LaCT's chunk scan in plain jnp, in one file: the yardstick of `benchmarks.ttt`.

A SwiGLU network f(x) = down (silu(gate x) * up x) a head is trained on the sequence as it is read.
Every chunk is read with the weights of the chunks before it, and then adds minus the gradient of
-Σ ⟨f(k), v⟩, each token with three rates; with momentum; optionally orthogonalised (Muon); then the
rows take their first lengths again. The last chunk is only read. Source: Zhang et al. 2025
(arXiv 2505.23884), algorithm 1.

Legend: B sequences, S positions, H heads, K head dim, F hidden width, C positions of a chunk."""

import jax
import jax.numpy as jnp

Array = jax.Array
MUON = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonal(g: Array) -> Array:
    """Newton-Schulz steps on a matrix."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / jnp.sqrt(jnp.sum(x * x) + 1e-14)
    for a, b, c in MUON:
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def read(w: tuple[Array, Array, Array], q_CxK: Array) -> Array:
    """f(q): [C, K]."""
    gate, up, down = w
    return (jax.nn.silu(q_CxK @ gate.T) * (q_CxK @ up.T)) @ down.T


def gradient(
    w: tuple[Array, Array, Array], k_CxK: Array, v_CxK: Array, rates_Cx3: Array
) -> tuple[Array, Array, Array]:
    """Minus the gradient of -Σ ⟨f(k), v⟩, of each weight with its own rates."""
    gate, up, down = w
    g_CxF, u_CxF = k_CxK @ gate.T, k_CxK @ up.T
    d_CxF = v_CxK @ down
    s_CxF = jax.nn.sigmoid(g_CxF)
    d_gate = d_CxF * u_CxF * s_CxF * (1 + g_CxF * (1 - s_CxF))
    d_up, hidden = d_CxF * g_CxF * s_CxF, g_CxF * s_CxF * u_CxF
    r0, r1, r2 = (rates_Cx3[:, i, None] for i in range(3))
    return d_gate.T @ (r0 * k_CxK), d_up.T @ (r1 * k_CxK), v_CxK.T @ (r2 * hidden)


def head(
    q: Array,
    k: Array,
    v: Array,
    rates: Array,
    momentum: Array,
    w: tuple[Array, Array, Array],
    chunk: int,
    muon: bool,
) -> Array:
    """One head of one sequence: [S, K]."""
    norms = tuple(jnp.linalg.norm(x, axis=1, keepdims=True) for x in w)
    n = q.shape[0] // chunk - 1

    def step(carry: tuple, xs: tuple) -> tuple[tuple, Array]:
        w, m = carry
        q, k, v, rates, momentum = xs
        out, g = read(w, q), gradient(w, k, v, rates)
        m = tuple(a + momentum.mean() * b for a, b in zip(g, m, strict=True))
        d = tuple(map(orthogonal, m)) if muon else m
        w = tuple(a + b for a, b in zip(w, d, strict=True))
        rows = (jnp.sqrt(jnp.sum(x * x, 1, keepdims=True) + 1e-10) for x in w)
        w = tuple(x * l / r for x, l, r in zip(w, norms, rows, strict=True))
        return (w, m), out

    xs = tuple(x[: n * chunk].reshape(n, chunk, *x.shape[1:]) for x in (q, k, v, rates, momentum))
    (w, _), out = jax.lax.scan(step, (w, tuple(map(jnp.zeros_like, w))), xs)
    return jnp.concatenate([out.reshape(n * chunk, -1), read(w, q[n * chunk :])])


def lact(
    q: Array,
    k: Array,
    v: Array,
    rates: Array,
    momentum: Array,
    w: tuple[Array, Array, Array],
    chunk: int,
    muon: bool = False,
) -> Array:
    """[B, S, H, K] of q, k, v [B, S, H, K], rates [B, S, H, 3], momentum [B, S, H] and first
    weights [H, F, K] twice and [H, K, F]. S must be a multiple of `chunk`."""
    one = jax.vmap(lambda *a: head(*a, chunk, muon), (1, 1, 1, 1, 1, 0), 1)
    return jax.vmap(one, (0, 0, 0, 0, 0, None))(q, k, v, rates, momentum, w)
