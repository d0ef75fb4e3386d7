"""Every dispatch plan is the dense loop over experts, forward and backward, on every degree of ep,
and what it counts as sent is what a NumPy oracle counts.

Legend: T tokens of a device, K pairs of a token, E experts, D width, F hidden, S devices of ep."""

from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map
from fdp.count import hlo, jaxpr
from fdp.count.compare import mismatches
from fdp.count.counts import merged
from fdp.kernels_pallas import walks
from fdp.kernels_pallas.grouped import grouped_ffn
from fdp.mesh import AXES, factor, make_mesh
from fdp.parallel.expert.arrange import compact, grouped, places, ranks
from fdp.parallel.expert.exchange import Load
from fdp.parallel.expert.plan import Dispatch
from fdp.parallel.expert.ragged import pieces
from fdp.parallel.wire import Cast

pytestmark = pytest.mark.fast

E, K, D, F, TOKENS = 8, 2, 8, 4, 64
PLANS = {
    "flat": Dispatch(),
    "flat, tight": Dispatch(buffer=1.5),
    "two_level": Dispatch("two_level", 2),
    "two_level, tight": Dispatch("two_level", 2, buffer=1.5),
    "gather": Dispatch("gather"),
    "gather, tight": Dispatch("gather", buffer=1.5),
}
RNG = np.random.default_rng(0)
LEVEL = (np.arange(TOKENS * K, dtype=np.int32) % E).reshape(TOKENS, K)
RANDOM = np.stack([RNG.permutation(E)[:K] for _ in range(TOKENS)]).astype(np.int32)
ONE = np.stack([np.full(TOKENS, 3), np.full(TOKENS, -1)], 1).astype(np.int32)  # all to expert 3
CASES = {"level": LEVEL, "random": RANDOM, "all to one expert": ONE}


def arrays() -> tuple[np.ndarray, ...]:
    def draw(*shape: int) -> np.ndarray:
        return RNG.standard_normal(shape).astype(np.float32)

    gates = RNG.random((TOKENS, K)).astype(np.float32)
    return draw(TOKENS, D), gates, draw(E, 2, D, F) / D, draw(E, F, D), draw(TOKENS, D)


ARRAYS = arrays()


def dense_loop(ids, x, gates, w_in, w_out):
    """Every expert on every token, weighted by its gates."""
    gate_TxE = jnp.where(ids[..., None] == jnp.arange(E), gates[..., None], 0.0).sum(1)
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, w_in[:, 0]))
    h = h * jnp.einsum("td,edf->tef", x, w_in[:, 1])
    return jnp.einsum("te,tef,efd->td", gate_TxE, h, w_out)


@cache
def reference(case: str):
    *given, dy = ARRAYS
    y, pull = jax.vjp(lambda *a: dense_loop(jnp.asarray(CASES[case]), *a), *given)
    return jax.device_get((y, pull(dy)))


@cache
def program(ep: int):
    """All plans in one program: output, gradients and what moved of each."""
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"ep": ep}), "ep")

    def local(ids, x, gates, w_in, w_out, dy):
        found = {}
        for name, plan in PLANS.items():
            tokens = len(x)

            def run(x, gates, w_in, w_out, plan=plan, tokens=tokens):
                load = Load(ids, gates, tokens * K, tokens, E)
                y, moved, fallback = plan(x, load, lambda r, g: grouped_ffn(r, w_in, w_out, g))
                return y, jnp.stack([*moved, fallback])

            y, pull, moved = jax.vjp(run, x, gates, w_in, w_out, has_aux=True)
            found[name] = y, pull(dy), psum(moved, "ep")
        return found

    rows = P("ep")
    out = dict.fromkeys(PLANS, (rows, (rows,) * 4, P()))
    return jax.jit(shard_map(local, mesh, (rows,) * 6, out))


def rows_sent(ids: np.ndarray, ep: int, inner: int, experts: int = E) -> tuple[int, int, int]:
    """(rows of flat, copies between nodes, copies within them) that leave their device."""
    flat = between = within = 0
    held = len(ids) // ep
    for token, chosen in enumerate(ids):
        me, e = token // held, experts // ep
        owners = [i // e for i in chosen if i >= 0]
        flat += sum(o != me for o in owners)
        nodes = {o // inner for o in owners}
        between += len(nodes - {me // inner})
        # A copy lands on the device of its sender's place in the node.
        within += sum(o != (o // inner) * inner + me % inner for o in set(owners))
    return flat, between, within


def test_bytes_of_a_ragged_all_to_all_are_those_of_the_program(monkeypatch) -> None:
    """Of full buffers, forward and backward; traced, not run."""
    monkeypatch.setattr(walks, "platform", lambda: "tpu")
    degrees = dict.fromkeys(AXES, 1) | {"ep": 4}
    mesh = factor(make_mesh(degrees), "ep")
    load = Load(jnp.asarray(LEVEL), jnp.zeros((TOKENS, K)), TOKENS // 4 * K, TOKENS // 4, E)
    for name, plan in PLANS.items():

        def step(ids, x, gates, dy, plan=plan):
            def run(x, gates):
                return plan(x, replace(load, ids=ids, gates=gates), lambda x, groups: x)[0]

            return jax.vjp(run, x, gates)[1](dy)

        rows = P("ep")
        traced = jax.make_jaxpr(shard_map(step, mesh, (rows,) * 4, (rows,) * 2))(
            LEVEL, ARRAYS[0], ARRAYS[1], ARRAYS[4]
        )
        found = hlo.summary(jaxpr.collectives(traced, dict(mesh.shape), hlo.USUAL))
        total = Counter()
        for (op, axes), (_, _, wire) in found.items():
            total[op, tuple(dict.fromkeys(a.rstrip("0123456789") for a in axes))] += wire
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            there, back = plan.sent(TOKENS // 4, load, (D, 4), degrees)
        assert not mismatches(merged(there, back), total), name
        assert (("ragged-all-to-all", ("ep",)) in total) == (plan.plan != "gather")


def test_level_bytes_are_the_mean_of_uniform_routing(monkeypatch) -> None:
    monkeypatch.setattr(walks, "platform", lambda: "tpu")
    experts, each, tokens, ep, inner = 16, 3, 4096, 8, 2
    rng = np.random.default_rng(2)
    ids = np.stack([rng.permutation(experts)[:each] for _ in range(tokens)]).astype(np.int32)
    flat, between, within = rows_sent(ids, ep, inner, experts)
    held = tokens // ep
    load = Load(ids, np.zeros(ids.shape), held * each, held, experts)
    degrees = dict.fromkeys(AXES, 1) | {"ep": ep}
    for plan, rows in ((Dispatch(), flat), (Dispatch("two_level", inner), between + within)):
        for sent in plan.sent(held, load, (D, 4), degrees, level=True):
            wire = sent["ragged-all-to-all", ("ep",)]
            assert wire == pytest.approx(2 * rows / ep * D * 4, rel=0.01)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ep", [2, 4, 8])
def test_every_plan_is_the_dense_loop(ep: int, case: str) -> None:
    ids = CASES[case]
    want_y, want_grads = reference(case)
    flat, between, within = rows_sent(ids, ep, 2)
    for name, (y, grads, moved) in jax.device_get(program(ep)(ids, *ARRAYS)).items():
        np.testing.assert_allclose(y, want_y, atol=1e-5, err_msg=name)
        for got, want in zip(grads, want_grads, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)
        sent = {"flat": (0, flat), "gather": (0, TOKENS * (ep - 1))}
        sent["two_level"] = (between, within)
        assert tuple(moved[1:3]) == sent[name.partition(",")[0]], name
        if case != "random":  # the rows of one expert exceed 1.5 level loads of four devices
            assert moved[3] == ("tight" in name and case != "level" and ep > 2), name


def test_capacity_drops_what_comes_last_and_counts_it() -> None:
    x, gates, w_in, w_out, _ = map(jnp.asarray, ARRAYS)
    load = Load(jnp.asarray(ONE), gates, TOKENS * K, TOKENS, E)
    plan = Dispatch(capacity=1.0)
    y, moved, _ = plan(x, load, lambda r, g: grouped_ffn(r, w_in, w_out, g))
    kept = plan.cut(load)
    assert kept == TOKENS * K // E and moved.dropped == TOKENS - kept
    want, _ = reference("all to one expert")
    np.testing.assert_allclose(y[:kept], want[:kept], atol=1e-5)
    assert not y[kept:].any()


def test_gates_of_one_over_k_and_idle_experts_give_back_the_tokens() -> None:
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"ep": 4}), "ep")
    plans = Dispatch(), Dispatch("two_level", 2), Dispatch("gather")

    def local(x, ids):
        load = Load(ids, 1 / K + 0.0 * ids, TOKENS // 4 * K, TOKENS // 4, E)
        return [plan(x, load, lambda rows, groups: rows)[0] for plan in plans]

    rows, x = P("ep"), ARRAYS[0]
    program = jax.jit(
        shard_map(local, mesh, (rows, rows), [rows] * len(plans)), compiler_options=hlo.QUICK
    )
    for y in program(x, RANDOM):
        np.testing.assert_allclose(y, x, atol=1e-6)


def test_places_are_those_of_a_loop() -> None:
    rank, sizes = ranks(jnp.asarray(RANDOM.reshape(-1)), E)
    seen = np.zeros(E, int)
    for id_, place in zip(RANDOM.reshape(-1), rank, strict=True):
        assert place == seen[id_]
        seen[id_] += 1
    assert (sizes == seen).all()
    groups, at = grouped(jnp.asarray(RANDOM), E, TOKENS * K)
    for token, chosen in enumerate(RANDOM):
        for k, expert in enumerate(chosen):
            row = int(at.slots_NxK[token, k])
            assert at.source_R[row] == token
            assert groups.starts_E[expert] <= row < groups.starts_E[expert] + seen[expert]
    assert (np.asarray(at.source_R) >= 0).sum() == TOKENS * K
    assert (places(jnp.array([[5], [-1]]), 4).slots_NxK == -1).all()
    wanted = LEVEL[:, :1] == np.arange(E)
    at, copies = compact(jnp.asarray(wanted), TOKENS)
    for x in range(E):
        held = np.asarray(at.source_R[x * TOKENS : x * TOKENS + int(copies[x])])
        assert (held == np.flatnonzero(wanted[:, x])).all()


@pytest.mark.parametrize("block", [1, 4])
def test_ragged_pieces_land_in_their_groups_and_come_back(block: int) -> None:
    """Against an all-to-all written out in NumPy."""
    S, e = 4, E // 4
    sizes_SxE = np.random.default_rng(1).integers(0, 5, (S, E))
    plans = [jax.device_get(pieces(jnp.asarray(sizes_SxE), s, block)) for s in range(S)]
    rows = [[(s, i, n) for i in range(E) for n in range(sizes_SxE[s, i])] for s in range(S)]

    def move(held: list[list], way: int, length: int) -> list[list]:
        out: list[list] = [[None] * length for _ in range(S)]
        for s, pair in enumerate(plans):
            for u in range(E):
                peer, at = u // e, pair[way]
                part = held[s][at.start[u] : at.start[u] + at.send[u]]
                assert len(part) == plans[peer][way].receive[s * e + u % e]
                out[peer][at.target[u] : at.target[u] + len(part)] = part
        return out

    most = int(sizes_SxE.sum()) + E * block
    there = move(rows, 0, most)
    for s in range(S):
        at = 0
        for i in range(s * e, (s + 1) * e):
            want = [(r, i, n) for r in range(S) for n in range(sizes_SxE[r, i])]
            assert there[s][at : at + len(want)] == want
            at += -(-len(want) // block) * block
    back = move(there, 1, most)
    assert [b[: len(r)] for b, r in zip(back, rows, strict=True)] == rows


BAD = [
    (Dispatch(), 8, 3, r"8 experts are not divisible by ep = 3: set model.moe.experts=9"),
    (Dispatch("two_level"), 12, 6, r"ep to be a power of two.*mesh.ep = 6; set .*or mesh.ep=8"),
    (Dispatch("two_level", 3), 8, 4, r"nodes of 3 devices .*set model.moe.node=4"),
    (Dispatch("gather", capacity=1.0), 8, 2, "capacity 1.0 with plan gather: only flat drops"),
    (Dispatch(capacity=-1.0), 8, 2, "capacity -1.0 with plan flat"),
    (Dispatch("both"), 8, 2, "plan 'both' is unknown: one of flat, two_level, gather"),
]


@pytest.mark.parametrize(("plan", "experts", "ep", "message"), BAD)
def test_plans_that_do_not_fit_are_refused(plan, experts, ep, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan.check(experts, {"ep": ep})


def test_sixteen_bits_on_the_wire_halve_the_rows() -> None:
    load = Load(jnp.asarray(LEVEL), jnp.zeros((TOKENS, K)), TOKENS * K, TOKENS, E)
    degrees = dict.fromkeys(AXES, 1) | {"ep": 4}
    whole, half = (
        replace(Dispatch(), wire=Cast(t)).sent(TOKENS, load, (D, 4), degrees)[1]
        for t in ("", "bfloat16")
    )
    assert whole == {key: 2 * wire for key, wire in half.items()} and whole
