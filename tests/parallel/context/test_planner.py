"""Adaptive context plans: prices against brute force and fdp.count.context, optimality.

Legend: L layers, J lists, W blocks, D devices, N draws.
"""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from fdp.count import context as cost
from fdp.count.blocks import BlockCounts
from fdp.count.context import AttentionShape
from fdp.count.counts import EXCHANGE, PERMUTE
from fdp.count.gather import BlockGather
from fdp.parallel.context import (
    planner,
    planner_machine,
    planner_masks,
    planner_methods,
    planner_uniform,
)
from fdp.parallel.context import planner_time as timing
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout, owners
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner import ModelPlan
from fdp.parallel.context.planner_price import BLOCKS, Price, dense_traffic, price, work
from fdp.parallel.context.planner_problem import Masks, Problem, candidates
from fdp.parallel.context.planner_time import Machine
from fdp.parallel.masks import Mask
from tests.parallel.context.planner_problems import (
    BLOCK,
    FAST,
    OWN,
    SHAPE,
    SLOW,
    STRIPED,
    Link,
    W,
    mixed,
    random_masks,
)

pytestmark = pytest.mark.fast

# BlockCounts, bytes, work
# -------------------------------------------------------------------------------------------------


def test_groups_by_brute_force() -> None:
    mask_JxWxW = random_masks(1, 0.15, seed=3, J=2)[0]
    owner = owners(STRIPED, W, BLOCK, 4)
    pairs, needed = BlockCounts.of(mask_JxWxW, owner, 4).grouped(2)
    for j, g, o in itertools.product(range(2), range(2), range(2)):
        rows, columns = owner // 2 == g, owner // 2 == (g - o) % 2
        part = mask_JxWxW[j][rows][:, columns]
        assert pairs[j, g, o] == part.sum() and needed[j, g, o] == part.any(0).sum()


def test_owners_refuse_divided_blocks() -> None:
    with pytest.raises(ValueError, match="divides blocks of 8"):
        owners(SequenceLayout("striped", 4), W, BLOCK, 4)
    with pytest.raises(ValueError, match="12 blocks of 8 are not divisible by 2·cp = 8"):
        owners(ZIGZAG, 12, BLOCK, 4)
    assert owners(SequenceLayout("striped", 16), 8, 8, 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("plan", cost.plans(4), ids=lambda p: f"{p.kind}{p.head_split}")
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_bytes_and_steps_of_dense_plans_are_those_of_cost_context(
    plan: CommPlan, kv_heads: int
) -> None:
    shape = replace(SHAPE, kv_heads=kv_heads)
    counts = BlockCounts.of(random_masks(1, 0.3)[0], owners(CONTIGUOUS, W, BLOCK, 4), 4)
    found = price(counts, plan, shape, BLOCK, SLOW)
    causal = Mask("causal")
    want = [sum(f(plan, shape, causal).values()) for f in (cost.forward_bytes, cost.backward_bytes)]
    assert found.bytes == tuple(want) and found.steps == cost.steps(plan, 4)


@pytest.mark.parametrize(("kind", "u"), [("ring", 1), ("usp", 2)])
def test_bytes_of_hops_are_those_of_cost_context(kind: str, u: int) -> None:
    plan = CommPlan(kind, u, hops=(1,))
    shape = replace(SHAPE, cp=8 if u == 2 else 4)
    window = Mask("causal", window=SHAPE.seq_len // 4 + 1)  # all keys of the hop
    want = cost.forward_bytes(plan, shape, window), cost.backward_bytes(plan, shape, window)
    assert dense_traffic(plan, shape) == want
    none = dense_traffic(replace(plan, hops=()), shape)
    assert none[0].get(PERMUTE, 0) == none[1].get(PERMUTE, 0) == 0


def test_bytes_of_a_gather_by_hand() -> None:
    # 3 peers, 2 blocks of 8 positions; 4 key heads of 16, k and v, bf16, 4 sequences; 4 lists of
    # ids; the count of blocks that did not fit, all-reduced over 4 devices.
    kv = 3 * 2 * 8 * (2 * 4 * 16 * 2 * 4)
    counts = BlockCounts.of(random_masks(1, 0.02, J=4)[0], owners(CONTIGUOUS, W, BLOCK, 4), 4)
    assert counts.capacity <= 2
    found = price(counts, CommPlan(BLOCKS, capacity=2), SHAPE, BLOCK, SLOW)
    assert found.bytes == (3 * 2 * 4 * 4 + 2 * 3 / 4 * 4 + kv, kv) and found.steps == (3, 1)
    assert found.memory == 2 * kv


@pytest.mark.parametrize("J", [1, 4])
def test_work_by_brute_force(J: int) -> None:
    mask_JxWxW, owner = random_masks(1, 0.3, 1, J)[0], owners(ZIGZAG, W, BLOCK, 4)
    counts = BlockCounts.of(mask_JxWxW, owner, 4)
    pair = 2 * 2 * BLOCK**2 * SHAPE.head_dim  # one head of one sequence
    for plan in (
        CommPlan("ring"),
        CommPlan("usp", 2),
        CommPlan("ulysses", 4),
        CommPlan("batch", 2),
    ):
        u, got = plan.head_split, work(counts, replace(plan, layout=ZIGZAG), SHAPE, BLOCK)
        want = np.zeros_like(got)
        for b, h, q, k in itertools.product(range(4), range(8), range(W), range(W)):
            if mask_JxWxW[h // (8 // J), q, k]:
                group = owner[q] // u
                member = b // (4 // u) if plan.kind == "batch" else h // (8 // u)
                want[group * u + member, (group - owner[k] // u) % (4 // u)] += pair
        np.testing.assert_allclose(got, want)


def test_every_plan_of_a_layer_computes_the_same() -> None:
    problem = mixed()
    for layer, layout in itertools.product(range(problem.layers), problem.places):
        counts = problem.counts(layer, layout)
        sums = {
            round(work(counts, p, SHAPE, BLOCK).sum()) for p in candidates(problem, layer, layout)
        }
        assert len(sums) == 1


# Time
# -------------------------------------------------------------------------------------------------


def test_times_by_hand() -> None:
    forward = np.array([[4.0, 1.0, 2.0], [1.0, 3.0, 1.0]])[..., None]  # two devices, three offsets
    back, kv, gradient = 2 * forward, np.array([2.5]), np.array([5.0])
    f, b = timing.lock_step(forward, back, kv, gradient)
    assert (f[0], b[0]) == (4 + 3 + 2, 8 + 6 + max(4, 5) + 5)
    f, b = timing.lock_step(forward[:, :1], back[:, :1], kv, gradient)
    assert (f[0], b[0]) == (4, 8)
    f, b = timing.gathered(forward, back, np.array([2.0]), np.array([7.0]))
    assert (f[0], b[0]) == (max(4 + 3, 2 + 4), max(6 + 8, 8 + 7))
    f, b = timing.fetched((2,), forward, back, kv, gradient)
    assert (f[0], b[0]) == (max(4 + 2, 2.5 + 1), max(8 + 4 + 5, 2.5 + 2 + 5))
    f, b = timing.fetched((1, 2), forward, back, kv, gradient)
    # Device 0: blocks at 0, 4, 5; device 1: own 1, then 2.5 … 5.5, then 5.5 (arrived 5) … 6.5.
    # Backward the link carries keys until 5, then gradients as blocks are done: 10 and 14, 15 and
    # 20 for device 0.
    assert (f[0], b[0]) == (7, max(15 + 5, max(8 + 5, 10) + 5))
    f, b = timing.fetched((), forward, back, kv, gradient)
    assert (f[0], b[0]) == (4, 8)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(
    ("plan", "latencies"),
    [
        (CommPlan("ring"), 3 + 6),
        (CommPlan("ring", hops=(1, 3)), 2 + 4),
        (CommPlan("ring", hops=(1, 2, 3)), 9),
        (CommPlan("usp", 2), 4 + 1 + 2),
        (CommPlan("ulysses", 4), 4),
        (CommPlan("batch", 2, hops=()), 4),
        (CommPlan("all_gather"), 2),
        (CommPlan(BLOCKS, capacity=4), 4),
    ],
    ids=lambda x: getattr(x, "kind", None),
)
def test_without_compute_time_is_bytes_and_latencies(
    plan: CommPlan, latencies: int, kv_heads: int
) -> None:
    seen = np.eye(W, dtype=bool) if plan.hops is not None else np.tri(W, dtype=bool)
    counts = BlockCounts.of(seen[None], owners(CONTIGUOUS, W, BLOCK, 4), 4)
    found = price(
        counts, plan, replace(SHAPE, kv_heads=kv_heads), BLOCK, Machine(1e30, Link(1e9, 1e-6))
    )
    assert found.seconds == pytest.approx(latencies * 1e-6 + found.wire / 1e9)


def test_a_full_set_of_hops_is_a_ring() -> None:
    counts = BlockCounts.of(random_masks(1, 0.3)[0], owners(CONTIGUOUS, W, BLOCK, 4), 4)
    hops, ring = (
        price(counts, CommPlan("ring", hops=h), SHAPE, BLOCK, FAST).seconds
        for h in ((1, 2, 3), None)
    )
    assert hops == ring


def test_exchanges_of_a_split_are_exposed() -> None:
    counts = BlockCounts.of(random_masks(1, 1.0)[0], owners(CONTIGUOUS, W, BLOCK, 4), 4)
    found = price(counts, CommPlan("ulysses", 4), SHAPE, BLOCK, SLOW)
    assert found.exposed == pytest.approx(4e-6 + found.wire / 1e9)  # two exchanges each way
    assert (
        found.seconds == pytest.approx(found.exposed + found.compute_N[0]) and found.imbalance == 1
    )
    assert SLOW.send(EXCHANGE, 0.0, 4).tolist() == SLOW.send(EXCHANGE, 1.0, 1).tolist() == [0.0]


def test_a_hidden_ring_costs_its_compute() -> None:
    counts = BlockCounts.of(np.ones((1, W, W), bool), owners(CONTIGUOUS, W, BLOCK, 4), 4)
    found = price(counts, CommPlan("ring"), SHAPE, BLOCK, FAST)
    last = FAST.send(PERMUTE, 2 * SHAPE.unit, 4)[
        0
    ]  # the last hop of gradients has nothing left to hide behind
    assert found.exposed == pytest.approx(last, rel=1e-4)


# Plans
# -------------------------------------------------------------------------------------------------


def brute(problem: Problem, layouts: tuple[SequenceLayout, ...]) -> float:
    """Least total of the objective over layouts and every combination of kinds."""
    totals = []
    for layout in layouts:
        values = []
        for layer in range(problem.layers):
            found = [problem.price(layer, p) for p in candidates(problem, layer, layout)]
            values.append([problem.value(f)[0] for f in found if isinstance(f, Price)])
        totals += [sum(c) for c in itertools.product(*values)]
    return min(totals)


@pytest.mark.parametrize("objective", ["seconds", "bytes"])
@pytest.mark.parametrize("machine", [SLOW, FAST], ids=["slow", "fast"])
def test_plan_equals_brute_force(objective: str, machine: Machine) -> None:
    problem = mixed(machine, objective=objective)
    problem = replace(problem, masks=Masks(problem.masks.masks_LxJxWxW[1:]))
    found = planner.plan(problem)
    value = found.seconds if objective == "seconds" else found.bytes
    assert value == pytest.approx(brute(problem, tuple(problem.places)), rel=1e-12)
    assert len({p.layout for p in found.plans}) == 1
    for layer, choice in enumerate(found.layers):
        tried = set(candidates(problem, layer, choice.plan.layout))
        assert (
            {choice.plan, *choice.lost} == tried
            and choice.plan not in choice.lost
            and all(choice.lost.values())
        )


@pytest.mark.parametrize("objective", ["seconds", "bytes"])
def test_moving_plan_equals_brute_force(objective: str) -> None:
    problem = mixed(objective=objective, layouts=(CONTIGUOUS, STRIPED))
    index = 0 if objective == "seconds" else 1
    best = {}
    for layer, layout in itertools.product(range(4), problem.places):
        runs = [problem.price(layer, p) for p in candidates(problem, layer, layout)]
        best[layer, layout] = min(problem.value(f)[0] for f in runs if isinstance(f, Price))
    totals = []
    for path in itertools.product(problem.places, repeat=4):
        moves = [planner.move(problem, a, b) for a, b in itertools.pairwise(path)]
        moved = sum((float(m[1][0]), m[0])[index] for m in moves)
        totals.append(moved + sum(best[at] for at in enumerate(path)))
    found, still = planner.plan_moving(problem), planner.plan(problem)
    value = lambda f: (f.seconds, f.bytes)[index]
    assert value(found) == pytest.approx(min(totals), rel=1e-12) and value(found) <= value(still)


def test_tokens_move_when_it_pays() -> None:
    # One head: nothing to split. The first layer needs no hop contiguously, and balance keeps the
    # second striped.
    here = np.arange(W) // 4 == np.arange(W)[:, None] // 4
    masks, shape = (
        Masks(np.stack([here, np.tri(W, dtype=bool)])),
        AttentionShape(1, W * BLOCK, 1, 1, 16, cp=4),
    )
    problem = Problem(
        masks, shape, SLOW, balance=1.3, objective="bytes", layouts=(CONTIGUOUS, STRIPED)
    )
    found, still = planner.plan_moving(problem), planner.plan(problem)
    assert [p.layout for p in found.plans] == [CONTIGUOUS, STRIPED] and {
        p.layout for p in still.plans
    } == {STRIPED}
    wire, seconds_N = planner.move(problem, CONTIGUOUS, STRIPED)
    assert wire == 2 * 3 * 1 * BLOCK * 16 * 2 and seconds_N[0] == pytest.approx(2e-6 + wire / 1e9)
    assert planner.move(problem, STRIPED, STRIPED)[0] == 0
    assert (
        found.moved == wire
        and found.bytes == wire + sum(c.price.wire for c in found.layers) < still.bytes
    )
    assert found.seconds == pytest.approx(seconds_N[0] + sum(c.price.seconds for c in found.layers))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", ["seconds", "bytes"])
def test_adaptive_is_never_worse_than_uniform(seed: int, objective: str) -> None:
    densities = np.random.default_rng(seed).random(5) ** 3
    masks = np.concatenate([random_masks(1, d, seed + i, J=4) for i, d in enumerate(densities)])
    problem = Problem(Masks(masks), SHAPE, SLOW, grid=2, objective=objective)
    found = planner.plan(problem)
    for other in planner_uniform.uniform_plans(problem):
        assert planner.model_value(problem, found)[0] <= planner.model_value(problem, other)[0]
    best = planner_uniform.uniform_any(problem)
    dense, sparse = planner_uniform.uniform_dense(problem), planner_uniform.uniform_sparse(problem)
    values = [planner.model_value(problem, f) for f in (dense, sparse) if isinstance(f, ModelPlan)]
    assert planner.model_value(problem, best) == min(values)


@pytest.mark.parametrize("objective", ["seconds", "bytes"])
@pytest.mark.parametrize("machine", [SLOW, FAST], ids=["slow", "fast"])
def test_best_uniform_is_the_least_of_all_plans_that_run(objective: str, machine: Machine) -> None:
    """Of every kind, layout, set of hops and capacity, priced layer by layer."""
    problem = mixed(machine, objective=objective)
    problem = replace(problem, masks=Masks(problem.masks.masks_LxJxWxW[:3]))
    hops = [h for n in range(4) for h in itertools.combinations((1, 2, 3), n)]
    tried = [replace(p, hops=h) for p in cost.plans(4) for h in (None, *hops)]
    tried += [CommPlan(BLOCKS, capacity=c) for c in range(1, W // 4 + 1)]
    totals = []
    for plan, layout in itertools.product(tried, problem.places):
        ring = plan.ring_degree(4) if plan.kind != BLOCKS else 1
        if plan.hops is not None and (ring == 1 or max(plan.hops, default=0) >= ring):
            continue
        prices = [problem.price(layer, replace(plan, layout=layout)) for layer in range(3)]
        if all(isinstance(found, Price) for found in prices):
            totals.append(sum(f.seconds if objective == "seconds" else f.wire for f in prices))
    assert len(set(totals)) > 3
    best = planner_uniform.uniform_any(problem)
    got = best.seconds if objective == "seconds" else best.bytes
    assert got == pytest.approx(min(totals), rel=1e-12)
    assert len(set(best.plans)) == 1


def test_capacity_is_on_the_grid_and_exact() -> None:
    problem = mixed(grid=3)
    need = problem.counts(2, CONTIGUOUS).capacity
    got = [p.capacity for p in candidates(problem, 2, CONTIGUOUS) if p.kind == BLOCKS]
    assert (
        min(got) == min(-(-need // 3) * 3, W // 4) and got[-1] == W // 4
    )  # as the dense layer needs
    assert CommPlan(BLOCKS, capacity=W // 4) in candidates(problem, 0, CONTIGUOUS)
    short = CommPlan(BLOCKS, capacity=need - 1)
    assert "more than capacity" in str(problem.price(2, short))
    assert isinstance(problem.price(2, CommPlan(BLOCKS, capacity=need)), Price)


def test_hops_are_those_needed() -> None:
    problem = mixed()
    plans = candidates(problem, 1, CONTIGUOUS)  # window of three blocks, four a device
    assert CommPlan("ring", hops=(1,)) in plans and CommPlan(
        "ring", hops=(), layout=ZIGZAG
    ) in candidates(problem, 0, ZIGZAG)
    assert "miss needed offsets [1]" in str(problem.price(1, CommPlan("ring", hops=(2,))))
    assert not any(p.kind == "ring" and p.hops for p in candidates(problem, 3, CONTIGUOUS))
    apart = np.arange(W)[:, None] - np.arange(W)
    wide = replace(
        problem, masks=Masks(((apart >= 0) & (apart < 6))[None])
    )  # reaches two devices back, not three
    assert CommPlan("ring", hops=(1, 2)) in candidates(wide, 0, CONTIGUOUS)


@pytest.mark.parametrize("objective", ["seconds", "bytes"])
@pytest.mark.parametrize("balance", [1.05, 1.1, 1.3])
def test_balance_limits_the_model_by_brute_force(balance: float, objective: str) -> None:
    # One head, two sequences: a batch split halves what is uneven and costs bytes.
    shape = replace(SHAPE, heads=1, kv_heads=1, batch=2)
    masks = Masks(mixed().masks.masks_LxJxWxW[1:])
    problem = Problem(
        masks, shape, SLOW, balance=balance, objective=objective, layouts=(CONTIGUOUS, ZIGZAG)
    )
    least = np.inf
    for layout in problem.places:
        options = [problem.priced(i, candidates(problem, i, layout)) for i in range(3)]
        for combination in itertools.product(
            *([f for f in o.values() if isinstance(f, Price)] for o in options)
        ):
            busy = np.array([f.compute_N[0] for f in combination])
            mean = busy / [f.imbalance for f in combination]
            if busy.sum() <= balance * mean.sum() * (1 + 1e-9):
                least = min(least, sum(problem.value(f)[0] for f in combination))
    found = planner.plan(problem)
    assert planner.model_value(problem, found)[0] == pytest.approx(least, rel=1e-12)
    assert found.imbalance <= balance * (1 + 1e-8)
    for other in planner_uniform.uniform_plans(problem):
        assert other.imbalance <= balance * (1 + 1e-8) and least <= planner.model_value(
            problem, other
        )[0] * (1 + 1e-12)


def test_a_limit_is_one_of_the_sum_of_layers() -> None:
    # Layers 0 and 1: only the last device has more than its diagonal, 4, 4, 4, 10 blocks. Layer 2:
    # all 136.
    uneven = np.eye(W, dtype=bool)
    uneven[12:, 12:] = np.tri(4, dtype=bool)
    masks = Masks(np.stack([uneven, uneven, np.tri(W, dtype=bool)]))
    problem = Problem(masks, SHAPE, SLOW, objective="bytes", layouts=(CONTIGUOUS,))
    free, even = planner.plan(problem), planner.plan(replace(problem, balance=1.15))
    assert (
        free.imbalance == pytest.approx((10 + 10 + 34) / 45)
        and free.bytes == free.layers[2].price.wire
    )
    # A pair of devices that exchanges heads or sequences, but no keys, computes 8, 8, 14, 14
    # halves.
    assert (
        even.imbalance == pytest.approx((10 + 7 + 34) / 45) and even.bytes == (3 + 4.5) * SHAPE.unit
    )
    pair = next(choice for choice in even.layers[:2] if choice.plan.head_split == 2)
    assert pair.plan.hops == () and pair.price.imbalance == pytest.approx(14 / 11)
    assert (
        pair.lost[CommPlan("ring", hops=())] == f"{-3 * SHAPE.unit:+.3g} bytes, max/mean FLOPs 1.82"
    )


def test_limits() -> None:
    contiguous = mixed(FAST, balance=1.05, layouts=(CONTIGUOUS,))
    reason = planner_uniform.uniform(
        replace(contiguous, masks=Masks(np.tri(W, dtype=bool)[None])), CommPlan("ring")
    )
    assert reason == "max/mean FLOPs 1.71 exceeds 1.05"  # 13+14+15+16 blocks over 34
    lone = replace(contiguous, shape=replace(SHAPE, heads=1, kv_heads=1, batch=1))
    with pytest.raises(
        ValueError, match=r"contiguous: max/mean FLOPs are at least 1\.\d\d, more than 1.05"
    ):
        planner.plan(lone)
    small = mixed(FAST, memory=8 * SHAPE.unit)
    assert all(choice.price.memory <= 8 * SHAPE.unit for choice in planner.plan(small).layers)
    assert "holds" in str(replace(small, memory=SHAPE.unit).price(3, CommPlan("all_gather")))
    for call in (planner.plan, planner.plan_moving):
        with pytest.raises(ValueError, match=r"layer 1 can run nothing: .*holds"):
            call(replace(small, memory=1.0))
    with pytest.raises(ValueError, match="no uniform plan can run"):
        planner_uniform.uniform_any(replace(small, memory=1.0))


def test_imbalance_of_a_model_weighs_layers_by_work() -> None:
    found = planner_uniform.uniform(mixed(), CommPlan("ring"))
    assert isinstance(found, ModelPlan)
    works = [
        work(mixed().counts(i, CONTIGUOUS), CommPlan("ring"), SHAPE, BLOCK).sum(1) for i in range(4)
    ]
    assert found.imbalance == pytest.approx(
        sum(w.max() for w in works) / sum(w.mean() for w in works)
    )
    assert found.steps == 4 * (3 + 4) and found.bytes == sum(c.price.wire for c in found.layers)


# Baselines
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [CONTIGUOUS, ZIGZAG, STRIPED], ids=lambda at: at.kind)
def test_need_only_padded_gather_all_gather_in_order(layout: SequenceLayout) -> None:
    problem = replace(mixed(), masks=Masks(random_masks(2, 0.1, J=4)))
    need, padded = (planner_uniform.need_only_bytes(problem, layout, p) for p in (False, True))
    gathers = [
        CommPlan(BLOCKS, capacity=problem.counts(i, layout).capacity, layout=layout)
        for i in range(2)
    ]
    kv = sum(2 * BlockGather(SHAPE, BLOCK, g.capacity).fetched for g in gathers)
    assert 0 < need < padded < kv <= 2 * (4 - 1) * SHAPE.unit * 2
    whole = replace(problem, masks=Masks(np.ones((2, W, W), bool)))
    everything = 2 * 3 * SHAPE.unit * 2
    assert (
        planner_uniform.need_only_bytes(whole, layout)
        == planner_uniform.need_only_bytes(whole, layout, True)
        == everything
    )


def test_need_only_by_hand() -> None:
    mask = np.eye(W, dtype=bool)
    mask[[4, 5, 8], 0] = True  # devices 1 and 2 need block 0 of device 0
    problem = Problem(Masks(mask[None]), SHAPE, SLOW)
    block = SHAPE.unit / 4 * 2  # and its gradient
    assert planner_uniform.need_only_bytes(problem, CONTIGUOUS) == block * 2 / 4
    assert (
        planner_uniform.need_only_bytes(problem, CONTIGUOUS, padded=True) == block * 2
    )  # offsets 1 and 2


def test_baseline_rows() -> None:
    problem = mixed()
    rows = {row.name: row for row in planner_methods.methods(problem)}
    assert (
        rows["ring, dense attention"].bytes
        == rows["ring"].bytes
        == rows["striped ring (as MTraining)"].bytes
    )
    assert rows["ring, dense attention"].bytes == 4 * 3 * SHAPE.unit * (1 + 1 + 2)
    assert rows["ring, dense attention"].seconds > rows["ring"].seconds
    assert rows["ring, dense attention"].imbalance == pytest.approx(1.0, abs=0.1)
    bars = [rows[f"best uniform {kind}"].seconds for kind in ("dense", "sparse")]
    assert rows["adaptive"].seconds <= min(bars)
    assert rows["adaptive, moving tokens"].seconds <= rows["adaptive"].seconds
    assert rows["need only (as MagiAttention), bound"].seconds is None
    narrow = replace(problem, layouts=(CONTIGUOUS,))
    row = next(
        r for r in planner_methods.methods(narrow) if r.name == "striped ring (as MTraining)"
    )
    assert np.isnan(row.bytes) and "layout" in row.what


def test_dense_attention_is_causal_only_where_all_masks_are() -> None:
    ahead = OWN.copy()
    ahead[0, 1] = True
    causal, full = (
        planner_methods.methods(Problem(Masks(m[None]), SHAPE, FAST))[0] for m in (OWN, ahead)
    )
    assert full.seconds / causal.seconds == pytest.approx(W * W / (W * (W + 1) / 2), rel=0.01)


def test_names() -> None:
    assert (
        planner.describe(CommPlan("usp", 2, hops=(1, 3), layout=ZIGZAG))
        == "usp u=2 hops 1,3 zigzag"
    )
    assert planner.describe(CommPlan(BLOCKS, capacity=3)) == "gather c=3 contiguous"
    found = planner_uniform.uniform(mixed(), CommPlan("ring"))
    assert isinstance(found, ModelPlan) and planner.summary(found) == "4× ring contiguous"


# Bad input
# -------------------------------------------------------------------------------------------------


def test_bad_masks_and_problems() -> None:
    for bad in (
        np.ones((2, W, W)),
        np.ones((W, W), bool),
        np.ones((1, W, W + 1), bool),
        np.ones((0, W, W), bool),
    ):
        with pytest.raises(ValueError, match="must be bool"):
            Masks(bad)
    hole = np.stack([OWN, OWN])
    hole[1, 3, 3] = False
    with pytest.raises(ValueError, match="layer 1, list 0: query block 3"):
        Masks(hole)
    masks = Masks(OWN[None])
    for fields, message in [
        ({"shape": replace(SHAPE, seq_len=100)}, "sequence 100, 16 blocks"),
        ({"shape": replace(SHAPE, cp=1)}, "cp ≥ 2"),
        ({"shape": replace(SHAPE, cp=3)}, "cp = 3"),
        ({"masks": Masks(np.stack([OWN] * 3)[None])}, "3 lists a layer"),
        ({"objective": "joules"}, "objective 'joules'"),
        ({"grid": 0}, "grid 0"),
        ({"balance": 0.5}, "balance 0.5"),
        ({"memory": 0}, "memory 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Problem(**{"masks": masks, "shape": SHAPE, "machine": SLOW, **fields})
    with pytest.raises(ValueError, match="divides blocks"):
        planner.plan(Problem(masks, SHAPE, SLOW, layouts=(SequenceLayout("striped", 4),)))
    with pytest.raises(ValueError, match="flops"):
        Machine(0.0, Link(1, 0))


def test_refused_plans_say_why() -> None:
    problem = mixed()
    for plan, message in [
        (CommPlan("ring", 2), "splits no heads"),
        (CommPlan("usp", 3), "not divisible by head_split = 3"),
        (CommPlan(BLOCKS, 2, capacity=4), "gather of blocks splits no heads"),
        (CommPlan("ring", capacity=1), "capacity = 1"),
    ]:
        assert message in str(problem.price(0, plan))
    assert "layer 1: hops () miss" in str(
        planner_uniform.uniform(problem, CommPlan("ring", hops=()))
    )


def test_a_notebook_plans_a_named_model_in_three_lines() -> None:
    masks_LxWxW = planner_masks.layers(2, 32, density=0.1)
    problem = planner_machine.problem("llama3-8b", masks_LxWxW, seq_len=131_072, cp=8)
    assert re.fullmatch(r"\d× .* MB sent per device, .* ms", str(planner.plan(problem)))
    assert problem.block == 4096 and problem.shape.kv_heads == 8
    with pytest.raises(ValueError, match=r"unknown model 'llama3-8': did you mean 'llama3-8b'"):
        planner_machine.problem("llama3-8", masks_LxWxW, 131_072, 8)
    with pytest.raises(ValueError, match="h101"):
        planner_machine.machine(planner_machine.NVLINK, "h101")
