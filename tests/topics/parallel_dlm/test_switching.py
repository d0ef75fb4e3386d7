"""Switching {tp, dp} between phases: the chosen plan, its costs and refusals, and the real run with
equal ids.
"""

import dataclasses
import functools

import build as builders
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fdp.count import hlo
from fdp.price import inference
from fdp.price.inference import GQA_70B, LLADA_8B, Degrees
from fdp.sampling import cached
from fdp.study.figures import smallest_text
from fdp.topics.parallel_dlm import figures, rows, switching, switching_run
from fdp.topics.parallel_dlm.switching import SamplingJob

pytestmark = pytest.mark.fast
JOB = SamplingJob(LLADA_8B, requests=8, length=1024, reuse_steps=7)
KEY, B, L, N_IDS = jax.random.key(3), 8, 12, 13


@functools.cache
def made():
    model = builders.model()
    params = jax.tree.map(lambda x: 2 * x, builders.parameters(model, L))
    return cached.BlockDecoder(model, N_IDS, 4), params


def execute(refresh, reuse, **options):
    return switching_run.execute(*made(), KEY, B, L, refresh, reuse, **options)


@functools.cache
def reference(refresh_every=None):
    how, params = made()

    def run(p, ids):
        return cached.sample(how, p, KEY, ids, L, refresh_every=refresh_every)[0]

    return np.asarray(jax.jit(run)(params, np.arange(B)))


# The real run.


@pytest.mark.parametrize(
    ("refresh", "reuse"),
    [
        (Degrees(1, 8), Degrees(1, 8)),
        (Degrees(2, 4), Degrees(2, 4)),
        (Degrees(8, 1), Degrees(8, 1)),
        (Degrees(1, 8), Degrees(8, 1)),
        (Degrees(2, 4), Degrees(4, 2)),
        (Degrees(2, 4), Degrees(8, 1)),
        (Degrees(8, 1), Degrees(2, 4)),
    ],
)
def test_switched_fixed_and_unsharded_runs_give_the_same_ids(refresh, reuse):
    done = execute(refresh, reuse)
    np.testing.assert_array_equal(done.ids, reference())
    switched = refresh != reuse
    assert done.moves == (3 if switched else 0)
    assert done.compilations == {"refresh": 1, "reuse": 1, "exchange": int(switched)}
    assert done.counted_bytes == done.formula_bytes
    k, cache = switching.exchange_ranks(refresh, reuse), 2 * 2 * B * L * 8 * 4 * 4 / 8
    assert done.formula_bytes == (k - 1) / k * cache
    other = dataclasses.replace(done, ids=done.ids + 1)
    verdicts = [rows.switched((done, one)).verdict for one in (done, other)]
    assert verdicts == ["holds", "fails"]


def test_more_refreshes_move_more_and_change_what_they_should():
    done = execute(Degrees(2, 4), Degrees(4, 2), refresh_every=2)
    np.testing.assert_array_equal(done.ids, reference(2))
    assert done.moves == 6
    assert (reference(2) != reference()).any()
    assert (
        execute(Degrees(2, 4), Degrees(4, 2), refresh_every=1).moves == 0
    )  # nothing is reused, so nothing is moved


def test_a_cache_that_is_lost_or_mislaid_is_noticed(monkeypatch):
    right = switching_run._Programs.move
    for spoil in (
        lambda x: 0 * x,
        lambda x: jax.device_put(np.roll(np.asarray(x), 1, 1), x.sharding),
    ):
        monkeypatch.setattr(
            switching_run._Programs,
            "move",
            lambda self, cache, s=spoil: jax.tree.map(s, right(self, cache)),
        )
        assert (execute(Degrees(2, 4), Degrees(4, 2)).ids != reference()).any()
    monkeypatch.setattr(switching_run, "exchange", lambda meshes: lambda cache: cache)
    monkeypatch.setattr(switching_run._Programs, "move", right)
    with pytest.raises(ValueError, match="move the array instead"):
        execute(Degrees(2, 4), Degrees(4, 2))


@pytest.mark.parametrize(
    ("refresh", "reuse"),
    [((1, 8), (8, 1)), ((1, 8), (2, 4)), ((2, 4), (4, 2)), ((8, 1), (2, 4)), ((4, 2), (1, 8))],
)
def test_no_exchange_could_send_less(refresh, reuse):
    """What a device lacks of its new shard is exactly the formula, and the compiled program sends
    no more.
    """
    refresh, reuse = Degrees(*refresh), Degrees(*reuse)
    meshes = switching_run.PhaseMeshes.of(refresh, reuse)
    shape = (2, B, L, 8, 4)
    spec = P(None, "dp", None, "tp", None)
    maps = [
        NamedSharding(m, spec).devices_indices_map(shape) for m in (meshes.refresh, meshes.reuse)
    ]
    cells = np.arange(np.prod(shape)).reshape(shape)
    lacking = {len(np.setdiff1d(cells[maps[1][d]], cells[maps[0][d]])) for d in jax.devices()}
    k = switching.exchange_ranks(refresh, reuse)
    assert lacking == {int((k - 1) / k * np.prod(shape) / 8)}
    finer = reuse.tp > refresh.tp
    layout = NamedSharding(meshes.exchange, switching_run.LAYOUTS[0 if finer else 1])
    program = switching_run.exchange(meshes).lower(
        jax.ShapeDtypeStruct(shape, np.float32, sharding=layout)
    )
    found = hlo.collectives(program.compile().as_text(), meshes.exchange.shape)
    assert {one.op for one in found} == {"all-to-all"}
    assert sum(one.wire_bytes * one.count for one in found) == 4 * lacking.pop()


@pytest.mark.parametrize(
    ("refresh", "reuse", "requests", "message"),
    [
        (
            Degrees(1, 8),
            Degrees(8, 1),
            12,
            r"refresh: requests % dp = 12 % 8 = 4: sample 16 requests",
        ),
        (Degrees(1, 8), Degrees(8, 1), 4, r"dp = 8 replicas and 4 requests"),
        (Degrees(3, 2), Degrees(6, 1), 8, r"heads = 8 is not divisible by tp = 3"),
        (
            Degrees(1, 8),
            Degrees(4, 1),
            8,
            r"refresh tp·dp = 1·8 and reuse tp·dp = 4·1 must be equal",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused(refresh, reuse, requests, message):
    with pytest.raises(ValueError, match=message):
        switching_run.execute(*made(), KEY, requests, L, refresh, reuse)
    with pytest.raises(ValueError, match=r"10 and prompt 0 must be whole blocks of 4"):
        switching_run.execute(*made(), KEY, 8, 10, Degrees(1, 8), Degrees(8, 1))


# The plan.


def test_every_kind_of_step_is_priced_at_every_degree():
    table = JOB.steps()
    assert [(kind, d.tp) for kind, d in table] == [
        (k, t) for k in switching.KINDS for t in (1, 2, 4, 8)
    ]
    for (kind, d), step in table.items():
        assert step == inference.fastest(LLADA_8B, JOB.work(kind), d, "h100")
    # The work of a device is the same on every mesh.
    flops = {inference.flops(LLADA_8B, JOB.work("refresh"), d) for _, d in table}
    assert len(flops) == 1
    two = dataclasses.replace(JOB, requests=2).steps()
    assert [d.dp for _, d in two] == [2, 1, 2, 1]


def test_refreshes_want_dp_and_reuses_want_tp():
    choice = switching.plan(JOB)
    assert choice.best.refresh.tp < choice.best.reuse.tp
    assert choice.speedup > 1.1
    assert not choice.fixed.switches
    assert choice.best.seconds > choice.best.switch_seconds > 0


def brute(job):
    """Least seconds of one period over all pairs, with and without a switch, from the formulas
    alone.
    """

    def step(kind, d):
        return inference.fastest(job.shape, job.work(kind), d, job.chip).seconds

    pairs = {}
    for a in job.degrees():
        for b in job.degrees():
            switch = sum(switching.switch_terms(job, a, b).values())
            pairs[a, b] = step("refresh", a) + job.reuse_steps * step("reuse", b) + switch
    return min(pairs.values()), min(s for (a, b), s in pairs.items() if a == b)


@pytest.mark.parametrize("requests", [1, 2, 8, 64])
def test_the_plan_is_the_least_over_all_pairs(requests):
    job = dataclasses.replace(JOB, requests=requests)
    choice = switching.plan(job)
    assert (choice.best.seconds, choice.fixed.seconds) == pytest.approx(brute(job))
    assert choice.speedup >= 1


def test_one_request_leaves_nothing_to_switch():
    choice = switching.plan(dataclasses.replace(JOB, requests=1))
    assert choice.best == choice.fixed
    assert choice.best.refresh == Degrees(8, 1)


def test_the_switch_is_paid_for():
    a, b = Degrees(1, 8), Degrees(8, 1)
    assert all(seconds > 0 for seconds in switching.switch_terms(JOB, a, b).values())
    assert switching.moved_cache_bytes(JOB, a, b) == 7 / 8 * 2 * 32 * 1024 * 4096 * 2
    assert sum(switching.switch_terms(JOB, a, a).values()) == 0


def test_memory_is_an_equation_and_bounds_the_plans():
    a, b, gib = Degrees(2, 4), Degrees(8, 1), 2**30
    both, one = switching.needed_memory(JOB, a, b), switching.needed_memory(JOB, a, a)
    assert both - one == inference.weight_bytes(LLADA_8B, 8) + inference.cache_bytes(
        LLADA_8B, 8, 1024, a
    )
    large = SamplingJob(GQA_70B, 1024, 8, 7)
    cache = inference.cache_bytes(GQA_70B, 8, 1024, a) / gib
    with pytest.raises(
        ValueError, match=rf"weights 65.7 \+ 16.4 \+ cache 2·{cache:.1f} \+ .* > 0.9·80 GiB of h100"
    ):
        switching.needed_memory(large, a, b)
    plans = switching.candidates(large)
    assert all(switching.needed_memory(large, p.refresh, p.reuse) <= 72 * gib for p in plans)
    assert not any(Degrees(1, 8) in (p.refresh, p.reuse) for p in plans)


def test_jobs_without_a_plan_are_refused():
    with pytest.raises(ValueError, match=r"no plan fits 8 × h100; .* GiB > 0.9·80 GiB"):
        switching.plan(SamplingJob(GQA_70B, 8192, 512, 7))
    with pytest.raises(ValueError, match=r"no \{tp, dp\} with tp·dp = 7"):
        switching.plan(dataclasses.replace(JOB, devices=7, requests=3))
    with pytest.raises(ValueError, match="head_rows ≤ rows ≤ keys must hold: 32, 16, 16"):
        switching.plan(dataclasses.replace(JOB, length=16))


# Region and uncertainty.


def test_the_interval_holds_the_plan_against_the_best_of_every_draw():
    choice = switching.plan(JOB)
    low, high = switching.interval(JOB, choice)
    assert low < choice.speedup < high
    assert (low, high) == switching.interval(JOB, choice)  # seeded
    assert (low, high) != switching.interval(JOB, choice, seed=1)
    wide = switching.interval(JOB, choice, level=0.99)
    assert wide[0] < low and wide[1] > high


def test_a_fixed_plan_may_lose_to_another_fixed_one():
    job = dataclasses.replace(JOB, requests=64, reuse_steps=1)
    choice = switching.plan(job)
    assert choice.best == choice.fixed
    low, high = switching.interval(job, choice)
    assert low < 0.95 and high == 1


def test_without_errors_the_interval_is_the_estimate(monkeypatch):
    monkeypatch.setattr(switching, "spread", lambda chip: dict.fromkeys(inference.BOUND, 0.0))
    choice = switching.plan(JOB)
    assert switching.interval(JOB, choice, draws=4) == pytest.approx((choice.speedup,) * 2)


def test_errors_are_shared_where_they_have_one_cause():
    sigma = switching.spread("h100")
    assert sigma["network below 1 MiB"] > 3 * sigma[switching.LARGE]
    step = inference.price(LLADA_8B, JOB.work("reuse"), Degrees(2, 4), "h100")

    def seconds(kind, tp, term):
        alone = dataclasses.replace(step, terms={term: 1.0})
        return switching.possible_seconds(kind, tp, alone, sigma, 50, 0)

    for term, by_tp, by_kind in (
        (switching.LARGE, True, False),
        ("matmul compute", True, True),
        ("attention compute", False, False),
        ("launch", False, False),
    ):
        one = seconds("reuse", 2, term)
        assert (seconds("reuse", 4, term) != one).all() == by_tp
        assert (seconds("refresh", 2, term) != one).all() == by_kind
    many = switching.possible_seconds("reuse", 2, step, sigma, 4000, 0)
    assert np.median(many) == pytest.approx(step.seconds, rel=0.1)
    with pytest.raises(ValueError, match="no measured matmuls of b200"):
        switching.spread("b200")


def test_the_region_is_the_plans_of_its_cells():
    found = switching.region(LLADA_8B, (1024, 2048), (1, 8, 64), (1, 7), draws=50)
    speedup = found.fields["value"]
    assert speedup.shape == (2, 3, 2)
    assert speedup[0, 1, 1] == switching.plan(JOB).speedup
    assert (speedup[:, 0] == 1).all()
    assert found.share("value >= 1.1") == pytest.approx((speedup >= 1.1).mean())
    assert found.share("value >= 1.1", sure=True) <= found.share("value >= 1.1")
    full = switching.region(GQA_70B, (8192,), (8, 512), (7,), draws=10)
    assert np.isnan(full.fields["value"][0, 1, 0]) and full.share("value >= 1") == 1


def test_pictures_of_the_plans_can_be_read():
    found = switching.region(LLADA_8B, (1024, 2048), (1, 8), (1, 7), draws=10)
    for drawn in (figures.speedups(found), figures.step_times(found)):
        assert smallest_text(drawn) >= 8.999
