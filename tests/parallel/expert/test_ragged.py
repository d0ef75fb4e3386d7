"""Dispatch as accelerators do it, by a ragged all-to-all, which a CPU lacks: here it is written out
with an all-gather, as its definition says, and every plan is the dense loop over experts.

Legend: T tokens, K pairs of a token, E experts (e of a device), D width, F hidden, S devices of ep,
R rows of a result, U pieces of a device."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map
from fdp.count.hlo import QUICK
from fdp.kernels_pallas.grouped import grouped_ffn
from fdp.mesh import AXES, factor, make_mesh
from fdp.parallel import wire
from fdp.parallel.expert import exchange
from fdp.parallel.expert.exchange import Load
from fdp.parallel.expert.plan import Dispatch

S, E, K, T, D, F = 4, 8, 2, 32, 8, 4
PLANS = {
    "flat, tight": Dispatch(buffer=1.9),
    "flat, capacity": Dispatch(capacity=1.5),
    "two_level": Dispatch("two_level", 2),
}
RNG = np.random.default_rng(0)
RANDOM = np.stack([RNG.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
ONE = np.stack([np.full(T, 3), np.full(T, -1)], 1).astype(np.int32)  # all to expert 3


def ragged_all_to_all(x, whole, start, send, target, receive, *, axis_name):
    """`lax.ragged_all_to_all`: pieces u·e … u·e + e - 1 of a device go to peer u. Every device
    looks at all rows for those that are its own; rows that it was not told of are NaN."""
    gathered = (lax.all_gather(a, axis_name) for a in (x, start, send, target))
    x_SxN, start_SxU, send_SxU, target_SxU = gathered
    per = start.shape[0] // x_SxN.shape[0]
    mine = lax.axis_index(axis_name) * per + jnp.arange(per)
    row_R = jnp.arange(len(whole))
    y = whole
    for s in range(x_SxN.shape[0]):
        for u in range(per):
            first, n, at = (a[s, mine[u]] for a in (start_SxU, send_SxU, target_SxU))
            inside = (row_R >= at) & (row_R < at + n)
            rows = x_SxN[s][jnp.clip(first + row_R - at, 0, x.shape[0] - 1)]
            rows = jnp.where(n == receive[s * per + u], rows, jnp.nan)
            y = jnp.where(inside.reshape(-1, *(1,) * (y.ndim - 1)), rows, y)
    return y


def dense_loop(ids, x, gates, w_in, w_out):
    """Every expert on every token, weighted by its gates."""
    gate_TxE = jnp.where(ids[..., None] == jnp.arange(E), gates[..., None], 0.0).sum(1)
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, w_in[:, 0]))
    h = h * jnp.einsum("td,edf->tef", x, w_in[:, 1])
    return jnp.einsum("te,tef,efd->td", gate_TxE, h, w_out)


def arrays() -> list[np.ndarray]:
    shapes = (T, D), (T, K), (E, 2, D, F), (E, F, D), (T, D)
    return [RNG.standard_normal(s).astype(np.float32) for s in shapes]


ARRAYS = arrays()


@cache
def program() -> Any:
    """Output, gradients and metrics of every plan."""
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"ep": S}), "ep")
    rows = P("ep")

    def local(ids, x, gates, w_in, w_out, dy):
        found = {}
        for name, plan in PLANS.items():

            def run(x, gates, w_in, w_out, plan=plan):
                load = Load(ids, gates, T // S * K, T // S, E)
                y, moved, fallback = plan(x, load, lambda r, g: grouped_ffn(r, w_in, w_out, g))
                return y, jnp.stack([*moved, fallback])

            y, pull, moved = jax.vjp(run, x, gates, w_in, w_out, has_aux=True)
            found[name] = y, pull(dy), psum(moved, "ep")
        return found

    out = dict.fromkeys(PLANS, (rows, (rows,) * 4, P()))
    return jax.jit(shard_map(local, mesh, (rows,) * 6, out), compiler_options=QUICK)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    for place in (wire, exchange):
        monkeypatch.setattr(place, "ragged", lambda: True)


@pytest.mark.parametrize("case", ["random", "one"])
def test_every_plan_is_the_dense_loop(case: str, accelerator: None) -> None:
    ids, (*given, dy) = {"random": RANDOM, "one": ONE}[case], ARRAYS
    for name, (y, grads, moved) in jax.device_get(program()(ids, *ARRAYS)).items():
        kept = ids
        if name == "flat, capacity":  # a device sends an expert three pairs at most
            cut, kept = 3, ids.copy()
            for part in np.split(kept, S):
                for e in range(E):
                    part.reshape(-1)[np.flatnonzero(part == e)[cut:]] = -1
            assert moved[0] == (ids >= 0).sum() - (kept >= 0).sum() > 0
        want, pull = jax.vjp(lambda *a, kept=kept: dense_loop(jnp.asarray(kept), *a), *given)
        np.testing.assert_allclose(y, want, atol=1e-4, err_msg=name)
        for got, expected in zip(grads, pull(dy), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-5, err_msg=name)
        assert moved[3] == (case == "one" and "tight" in name), name
