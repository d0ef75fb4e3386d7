"""Search algorithms: what counts as an evaluation, the metrics, each algorithm, and the real
playbook landscapes.
"""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from fdp.topics.parallelism_search import search
from fdp.topics.parallelism_search.search import Landscape, Prior, evaluations_to, regret_curve, run

pytestmark = pytest.mark.fast

PLAYBOOK = (
    Path(__file__).parents[3].parent
    / "shared"
    / "data"
    / "planning"
    / "ultrascale_playbook_runs.csv"
)
NAMES = ["random", "expert", "tpe", "cma_es", "evolution", "bayes", "bayes_flat"]
STOCHASTIC = ["random", "tpe", "cma_es", "evolution", "bayes_flat"]


def algorithm(name):
    return getattr(search, name)


def synthetic(seed=0, gpus=16):
    """36 plans of 16 devices, holes in the grid: smooth log time plus noise, plans that hold too
    much fail.
    """
    rng = np.random.default_rng(seed)
    plans, times = [], []
    for tp, pp, mbs, zero in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4), (0, 1)):
        if tp * pp == 4 and zero == 1:
            continue
        log_time = 0.3 * np.log2(tp) + 0.2 * np.log2(pp) - 0.1 * np.log2(mbs) + 0.1 * zero
        memory = 8 * mbs / (tp * pp) ** 0.5 / (1 + zero)
        plans.append({"tp": tp, "pp": pp, "dp": gpus // (tp * pp), "mbs": mbs, "zero": zero})
        times.append(np.exp(log_time + 0.05 * rng.standard_normal()) if memory < 9 else np.inf)
    return Landscape("synthetic", tuple(plans), np.array(times))


def prior_of(landscape, sign=1.0, std=0.1):
    """Knows every time (sign 1) or its opposite (-1), and which plans fail; a failed plan looks
    fast.
    """
    ok_N = np.isfinite(landscape.time_N)
    log_N = np.log(np.where(ok_N, landscape.time_N, 0.1 * landscape.best))
    return Prior(sign * log_N, np.full(len(log_N), std), np.where(ok_N, 0.95, 0.05))


def playbook(model, nodes):
    if not PLAYBOOK.exists():
        pytest.skip(
            f"the Ultra-Scale Playbook measurements are not here: {PLAYBOOK.name} in the shared "
            "data folder"
        )
    plans, times = [], []
    for row in csv.DictReader(PLAYBOOK.open()):
        if (row["model"], row["nodes"]) == (model, str(nodes)) and row["batch_consistent"] == "1":
            plan = {"tp": row["tp"], "pp": row["pp"], "dp": row["dp"], "mbs": row["micro_batch"]}
            plans.append({k: int(v) for k, v in plan.items()} | {"zero": int(row["zero_stage"])})
            ok = row["status"] == "ok"
            times.append(
                int(row["global_batch_seqs"]) * 4096 / float(row["tok_s"]) if ok else np.inf
            )
    return Landscape(f"{model} on {nodes} nodes", tuple(plans), np.array(times))


def random_evaluations(landscape, within):
    """Expected evaluations of random search without repetition: G good plans of N cut a random
    order into G + 1 gaps of equal expected length (N - G) / (G + 1); add the hit itself."""
    good = int((landscape.time_N <= (1 + within) * landscape.best).sum())
    return (len(landscape.plans) + 1) / (good + 1)


SMALL = Landscape(
    "small", tuple({"tp": 2**i} for i in range(5)), np.array([np.inf, 4.0, 2.0, 3.0, 2.05])
)


# Driver and metrics
# -------------------------------------------------------------------------------------------------


def scripted(*indices):
    """An algorithm that proposes the given indices and keeps what it is told."""
    told = []

    def algorithm(plans, rng, prior):
        for index in indices:
            told.append((yield index))

    return algorithm, told


def test_the_referee_ends_a_search_that_is_close_enough():
    first = next(
        s
        for s in range(20)
        if run(SMALL, search.random, s).order[0] != int(np.argmin(SMALL.time_N))
    )
    whole, short = run(SMALL, search.random, first), run(SMALL, search.random, first, within=0.0)
    best = int(np.argmin(SMALL.time_N))
    assert short.order == whole.order[: whole.order.index(best) + 1]


def test_repeated_proposals_are_answered_from_memory_and_not_counted():
    algorithm, told = scripted(1, 1, 0, 1, 2)
    trace = run(SMALL, algorithm, seed=0)
    assert trace.order == (1, 0, 2)
    assert told == [4.0, 4.0, np.inf, 4.0, 2.0]
    np.testing.assert_allclose(trace.regret_E, [1.0, 1.0, 0.0])


def test_failed_runs_are_evaluations_and_have_infinite_regret():
    algorithm, _ = scripted(0, 1, 3, 4, 2)
    trace = run(SMALL, algorithm, seed=0)
    np.testing.assert_allclose(trace.regret_E, [np.inf, 1.0, 0.5, 0.025, 0.0])
    assert evaluations_to(trace.order, SMALL, 0.05) == 4
    assert evaluations_to(trace.order, SMALL, 0.025) == 4  # at most, not less than
    assert evaluations_to(trace.order, SMALL, 0.01) == 5
    assert evaluations_to(trace.order[:3], SMALL, 0.05) == np.inf
    assert evaluations_to((), SMALL, 0.05) == np.inf
    assert regret_curve((), SMALL).shape == (0,)


def test_an_algorithm_that_repeats_itself_for_ever_is_stopped():
    def stubborn(plans, rng, prior):
        yield 2
        while True:
            yield 3

    assert run(SMALL, stubborn, seed=0).order == (2, 3)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_proposal_outside_the_landscape_is_an_error(index):
    with pytest.raises(ValueError, match=rf"proposed plan {index} of 0\.\.4"):
        run(SMALL, scripted(index)[0], seed=0)


def test_expected_evaluations_of_random_search():
    """(N + 1) / (G + 1): 5 plans, 2 within 5 % -> 2; all orders of five agree."""
    assert random_evaluations(SMALL, 0.05) == 2
    assert random_evaluations(SMALL, 0.0) == 3
    orders = itertools.permutations(range(5))
    assert np.mean([evaluations_to(order, SMALL, 0.05) for order in orders]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("plans", "times", "message"),
    [
        ((), [], "landscape 'x' is empty"),
        (({"tp": 1}, {"tp": 2}), [np.inf, np.inf], "no feasible plan, all 2 runs failed"),
        (({"tp": 1}, {"tp": 2}), [1.0, np.nan], r"time_N\[1\] = nan s"),
        (({"tp": 1}, {"tp": 2}), [0.0, 1.0], r"time_N\[0\] = 0.0 s: give seconds > 0"),
        (({"tp": 1}, {"tp": 2}), [1.0], r"time_N has shape \(1,\), plans are 2"),
        (({"tp": 1}, {"tp": 1}), [1.0, 2.0], "plans 0 and 1 are both {'tp': 1}"),
        (({"tp": 1}, {"pp": 1}), [1.0, 2.0], r"plan 1 has keys \['pp'\], plan 0 \['tp'\]"),
        (({"tp": 1}, {"tp": 0}), [1.0, 2.0], "plan 1 has {'tp': 0}: degrees are integers >= 1"),
    ],
)
def test_bad_landscapes(plans, times, message):
    with pytest.raises(ValueError, match=message):
        Landscape("x", plans, np.array(times))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (([np.nan, 1], [1, 1], [1, 1]), r"log_time_N, finite: log_time_N\[0\] = nan"),
        (([1, 1], [1, 0], [1, 1]), r"std_N, finite and > 0: std_N\[1\] = 0"),
        (([1, 1], [1, 1], [1, 1.5]), r"feasible_N, in \[0, 1\]: feasible_N\[1\] = 1.5"),
        (([1, 1], [1], [1, 1]), "vectors of one length"),
    ],
)
def test_bad_priors(fields, message):
    with pytest.raises(ValueError, match=message):
        Prior(*map(np.array, fields))


def test_a_prior_must_have_the_plans_of_the_landscape():
    with pytest.raises(ValueError, match="the prior has 2 plans, landscape 'small' has 5"):
        run(SMALL, search.random, seed=0, prior=Prior(np.zeros(2), np.ones(2), np.ones(2)))
    with pytest.raises(ValueError, match="bayes needs a prior"):
        run(SMALL, search.bayes, seed=0)


# Every algorithm
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_plan_is_measured_exactly_once(name):
    landscape = synthetic()
    trace = run(landscape, algorithm(name), seed=3, prior=prior_of(landscape))
    assert sorted(trace.order) == list(range(len(landscape.plans)))
    assert (
        trace.regret_E[-1] == 0
        and (np.diff(trace.regret_E[np.isfinite(trace.regret_E)]) <= 0).all()
    )


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_reproducible(name):
    landscape = synthetic()
    first, again, other = (
        run(landscape, algorithm(name), seed, prior_of(landscape)).order for seed in (1, 1, 2)
    )
    assert first == again
    if name != "bayes":  # only its ties are random
        assert (first != other) == (name in STOCHASTIC)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_landscapes_with_a_single_key_or_plan(name, count):
    plans = tuple({"tp": 2**i, "pp": 1} for i in range(count))
    landscape = Landscape("line", plans, np.arange(count, 0, -1.0))
    assert sorted(run(landscape, algorithm(name), 0, prior_of(landscape)).order) == list(
        range(count)
    )


@pytest.mark.parametrize("name", ["tpe", "cma_es", "evolution", "bayes", "bayes_flat"])
def test_only_measured_times_are_known(name):
    """Times of plans not measured yet change nothing: the same order up to the first plan that
    differs.
    """
    landscape = synthetic()
    prior = prior_of(synthetic(seed=5))
    order = run(landscape, algorithm(name), 4, prior).order[:15]
    changed_N = np.full(len(landscape.plans), 7.0)
    changed_N[list(order[:14])] = landscape.time_N[list(order[:14])]
    changed = Landscape("changed", landscape.plans, changed_N)
    assert run(changed, algorithm(name), 4, prior).order[:15] == order


@pytest.mark.parametrize("name", ["tpe", "evolution", "bayes_flat"])
def test_learning_beats_chance_on_a_smooth_landscape(name):
    """Where log time is nearly linear on the grid, fewer evaluations than random's exact
    expectation.
    """
    counts = []
    for seed in range(6):
        landscape = synthetic(seed)
        order = run(landscape, algorithm(name), seed, within=0.0).order
        assert np.isfinite(evaluations_to(order, landscape, 0.0))
        counts.append(evaluations_to(order, landscape, 0.0) / random_evaluations(landscape, 0.0))
    assert np.mean(counts) < 0.8


def bowl(seed, size=15):
    """log time is a quadratic bowl on a size x size grid, its best plan at a random place."""
    best = np.random.default_rng(seed).integers(0, size, 2)
    plans = tuple({"tp": 2**i, "pp": 2**j} for i in range(size) for j in range(size))
    levels = np.array([(i, j) for i in range(size) for j in range(size)])
    return Landscape("bowl", plans, np.exp(0.02 * ((levels - best) ** 2).sum(1)))


def test_cma_es_keeps_what_it_learned_from_one_generation_to_the_next():
    """113 evaluations by chance, about 100 with a restart after every generation, about 34
    without.
    """
    counts = [
        evaluations_to(run(bowl(s), algorithm("cma_es"), s, within=0.0).order, bowl(s), 0.0)
        for s in range(40)
    ]
    assert np.mean(counts) < 60


def test_evolution_mutates_the_best_of_the_ten_youngest(monkeypatch):
    """With samples as large as the population the parent is the best of the last ten, not the best
    of all.
    """
    landscape = bowl(0)
    grid = search.PlanGrid.of(landscape.plans)

    monkeypatch.setattr(search, "SAMPLE", search.POPULATION)
    order = run(landscape, search.evolution, seed=1).order
    forgotten = 0
    for i in range(10, 120):
        free_N = np.ones(len(landscape.plans), bool)
        free_N[list(order[:i])] = False
        parent = min(order[i - 10 : i], key=lambda j: (landscape.time_N[j], j))
        assert order[i] in grid.neighbours(parent, free_N)
        forgotten += landscape.time_N[parent] > landscape.time_N[list(order[:i])].min()
    assert forgotten


def test_a_perfect_prior_is_found_at_the_first_evaluation():
    for seed in range(5):
        landscape = synthetic(seed)
        order = run(landscape, search.bayes, seed, prior_of(landscape)).order
        assert evaluations_to(order, landscape, 0.0) == 1


def test_an_opposite_prior_costs_evaluations_but_is_overcome():
    """The prior ranks all plans backwards, yet data win before everything is measured."""
    for seed in range(3):
        landscape = synthetic(seed)
        prior = prior_of(landscape, sign=-1.0, std=0.5)
        order = run(landscape, search.bayes, seed, prior, within=0.0).order
        assert 1 < evaluations_to(order, landscape, 0.0) < len(landscape.plans)


def test_a_factor_that_all_predictions_are_off_by_does_not_mislead():
    """One measurement tells that the cost model is 3x too slow; the second is the best plan of the
    others.
    """
    landscape = synthetic()
    exact = prior_of(landscape)
    best = int(np.argmin(landscape.time_N))
    log_N = exact.log_time_N + np.log(3)
    log_N[best] += 0.05  # and ranks two plans the wrong way round
    order = run(landscape, search.bayes, 0, Prior(log_N, exact.std_N, exact.feasible_N)).order
    assert evaluations_to(order, landscape, 0.0) <= 4


# The parts
# -------------------------------------------------------------------------------------------------


def test_grid_leaves_out_what_follows_and_what_is_constant():
    plans = [
        {"tp": t, "dp": 8 // t, "mbs": m, "cp": 1, "zero": z}
        for t in (1, 2, 8)
        for m in (1, 3)
        for z in (0, 3)
    ]
    grid = search.PlanGrid.of(plans)
    assert grid.keys == ("tp", "mbs", "zero")
    np.testing.assert_allclose(grid.log2_NxK[-1], [3, np.log2(3), 3])
    assert grid.level_NxK[-1].tolist() == [2, 1, 1]
    assert search.PlanGrid.of([{"tp": 1, "dp": 1}, {"tp": 1, "dp": 2}]).keys == (
        "dp",
    )  # a cluster that grows
    free_N = np.ones(12, bool)
    free_N[0] = False
    assert [plans[i] for i in grid.neighbours(0, free_N)] == [plans[1], plans[2], plans[4]]
    free_N[[1, 2, 4]] = False
    assert all(np.abs(grid.level_NxK[i]).sum() == 2 for i in grid.neighbours(0, free_N))


def test_expert_follows_its_rules():
    """Smallest tp·pp, tensor before pipeline, largest microbatch, low ZeRO; then neighbours of the
    best.
    """
    plans = tuple(
        {"tp": t, "pp": p, "mbs": m, "zero": z}
        for t, p, m, z in itertools.product((1, 2, 16), (1, 2), (1, 2), (0, 1))
    )
    index = {tuple(plan.values()): i for i, plan in enumerate(plans)}
    times = np.full(len(plans), 5.0)
    for plan, i in index.items():
        if plan[0] * plan[1] == 1:
            times[i] = np.inf  # tp·pp = 1 does not fit
    times[index[2, 1, 1, 0]] = 3.0
    order = [
        tuple(plans[i].values()) for i in run(Landscape("x", plans, times), search.expert, 0).order
    ]
    assert order[:4] == [
        (1, 1, 2, 0),
        (1, 1, 2, 1),
        (1, 1, 1, 0),
        (1, 1, 1, 1),
    ]  # down in memory until
    assert order[4] == (2, 1, 2, 0)  # tp before pp, and it fits
    assert set(order[5:7]) == {
        (2, 1, 1, 0),
        (2, 1, 2, 1),
    }  # neighbours that do not leave the node come first
    assert order.index((2, 1, 1, 1)) < order.index((16, 2, 1, 1))


def test_expert_stays_in_the_node_before_anything_else():
    plans = tuple({"tp": t, "pp": p} for t, p in [(16, 1), (8, 4), (8, 2), (2, 4), (4, 2)])
    order = run(
        Landscape("x", plans, np.array([1.0, np.inf, np.inf, np.inf, np.inf])), search.expert, 0
    ).order
    assert order == (4, 3, 2, 1, 0)


def test_expert_skips_what_needs_more_memory_than_a_failure_and_what_is_predicted_to_fail():
    plans = tuple({"tp": t, "mbs": m} for t in (1, 2, 4) for m in (1, 2))
    landscape = Landscape("x", plans, np.array([np.inf, np.inf, np.inf, np.inf, 1.0, np.inf]))
    prior = Prior(np.zeros(6), np.ones(6), np.array([0, 0, 1, 0, 1, 0.0]))
    order = run(landscape, search.expert, 0, prior).order
    assert order[:2] == (2, 4)  # the smallest predicted to fit fails: the next one that is
    assert order[2] == 5 and set(order[3:]) == {
        0,
        1,
        3,
    }  # known from the failure of (2, 1) not to fit: last


def test_posterior_without_data_is_the_prior_and_at_the_data_the_data():
    grid = search.PlanGrid.of([{"tp": 2**i} for i in range(6)])
    mean_N, std_N = np.arange(6.0), np.full(6, 0.3)
    none = np.array([], int)
    np.testing.assert_array_equal(
        search.posterior(grid.log2_NxK, mean_N, std_N, none, np.array([])), [mean_N, std_N]
    )
    index_M = np.array([1, 4])
    after_N, after_std_N = search.posterior(
        grid.log2_NxK, mean_N, std_N, index_M, mean_N[index_M] + [0.2, -0.2]
    )
    np.testing.assert_allclose(after_N[index_M], [1.2, 3.8], atol=0.01)
    assert (after_std_N[index_M] < 0.02).all() and (after_std_N[[0, 2, 3, 5]] > 0.02).all()
    assert after_N[0] > 0 and after_N[5] < 5  # neighbours move along
    exact_N, _ = search.posterior(grid.log2_NxK, mean_N, std_N, index_M, mean_N[index_M])
    np.testing.assert_allclose(exact_N, mean_N, atol=1e-12)  # a prior that was right is not touched


def test_all_plans_share_a_part_of_what_one_measurement_says():
    """A plan 40 doublings away moves by the share that all have in common, here 0.3 of an error of
    0.2.
    """
    far = np.array([[0.0], [40.0]])
    mean_N, std_N = search.posterior(
        far, np.zeros(2), np.full(2, 0.3), np.array([0]), np.array([0.2])
    )
    np.testing.assert_allclose(mean_N, [0.2, 0.3 * 0.2], rtol=0.02)
    assert std_N[1] > 5 * std_N[0]


def test_what_was_expected_changes_feasibility_nowhere_else():
    relief_NxK = search.relief([{"tp": 1}, {"tp": 2}, {"tp": 4}])
    prior_N = np.array([0.0, 1.0, 1.0])
    for index, ok in ((0, False), (2, True)):
        after_N = search.feasibility(relief_NxK, prior_N, np.array([index]), np.array([ok]))
        np.testing.assert_array_equal(after_N, prior_N)


def test_feasibility_is_one_sided():
    """A failure speaks fully for plans that hold more; a success for plans that hold less; both
    fade elsewhere.
    """
    relief_NxK = search.relief([{"tp": 2**i, "mbs": 1} for i in range(5)])
    prior_N = np.full(5, 0.5)

    def after(ok):
        return search.feasibility(relief_NxK, prior_N, np.array([2]), np.array([ok]))

    np.testing.assert_allclose(after(False)[:3], 0.25)  # (1·0.5 + 0) / (1 + 1)
    np.testing.assert_allclose(after(True)[2:], 0.75)
    fade = np.exp(-0.5)
    assert after(False)[3] == pytest.approx(0.5 / (1 + fade))
    assert after(True)[1] == pytest.approx((0.5 + fade) / (1 + fade))
    assert (np.diff(after(False)) >= 0).all() and (np.diff(after(True)) >= 0).all()
    assert search.relief([{"mbs": 1, "tp": 1}, {"mbs": 4, "tp": 1}])[:, 0].tolist() == [0, -2]
    none = np.array([], int)
    np.testing.assert_array_equal(
        search.feasibility(relief_NxK, prior_N, none, none.astype(bool)), prior_N
    )


def test_log_expected_improvement_matches_its_integral_and_does_not_underflow():
    z = np.array([-4.0, -1.0, 0.0, 2.0])
    expected = np.log(2.0 * (z * norm.cdf(z) + norm.pdf(z)))
    np.testing.assert_allclose(
        search._log_expected_improvement(-2 * z, np.full(4, 2.0), 0.0), expected, rtol=1e-9
    )
    far = search._log_expected_improvement(np.array([4.9, 5.0, 5.1, 50.0, 500.0]), np.ones(5), 0.0)
    assert np.isfinite(far).all() and (np.diff(far) < 0).all()
    assert np.abs(np.diff(far[:3], n=2)) < 0.05  # no step where the asymptote takes over


# Real landscapes
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "plans", "feasible", "good", "expected"),
    [(8, 144, 72, 4, 29.0), (16, 176, 116, 1, 88.5)],
)
def test_random_search_on_the_playbook(nodes, plans, feasible, good, expected):
    """8B on 64 and 128 H100: (N + 1) / (G + 1) by formula and, within 3 standard errors, by
    simulation.
    """
    landscape = playbook("8B", nodes)
    assert len(landscape.plans) == plans and np.isfinite(landscape.time_N).sum() == feasible
    assert (landscape.time_N <= 1.05 * landscape.best).sum() == good
    assert random_evaluations(landscape, 0.05) == expected
    counts = [
        evaluations_to(run(landscape, search.random, s, within=0.05).order, landscape, 0.05)
        for s in range(1000)
    ]
    assert abs(np.mean(counts) - expected) < 3 * np.std(counts) / np.sqrt(len(counts))


@pytest.mark.parametrize(("nodes", "evaluations"), [(8, 7), (16, 30)])
def test_expert_on_the_playbook(nodes, evaluations):
    landscape = playbook("8B", nodes)
    assert evaluations_to(run(landscape, search.expert, 0).order, landscape, 0.05) == evaluations


@pytest.mark.parametrize("nodes", [8, 16])
def test_a_good_prior_beats_the_expert_and_a_perfect_one_needs_one_evaluation_on_the_playbook(
    nodes,
):
    landscape = playbook("8B", nodes)
    expert = evaluations_to(run(landscape, search.expert, 0).order, landscape, 0.05)
    assert (
        evaluations_to(run(landscape, search.bayes, 0, prior_of(landscape)).order, landscape, 0.0)
        == 1
    )
    counts = []
    for seed in range(6):
        exact, rng = prior_of(landscape, std=0.1), np.random.default_rng(seed)
        log_N = exact.log_time_N + 0.1 * rng.standard_normal(len(exact.log_time_N))
        trace = run(
            landscape, search.bayes, seed, Prior(log_N, exact.std_N, exact.feasible_N), 0.05
        )
        counts.append(min(31, evaluations_to(trace.order, landscape, 0.05)))
    assert np.mean(counts) < expert
