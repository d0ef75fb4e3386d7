"""Uneven pipelines: both solvers against brute force, against each other, and against closed
forms.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.parallel.pipeline.partition import partition_dp, partition_ilp, pipeline_time

fast = pytest.mark.fast
SOLVERS = [partition_dp, partition_ilp]
each_solver = pytest.mark.parametrize("solve", SOLVERS)
# A 78-layer model: embedding and logits are layers of other cost.
MODEL = np.array([0.1, *[1.0] * 78, 1.5])


def brute_force(time_CxL, stages, microbatches, cuts, memory_SxCxL, limit_S, sizes, devices):
    """Least pipeline time over every partition and every choice of sub-meshes, inf if none is
    allowed.
    """
    best = np.inf
    layers = time_CxL.shape[1]
    for inner in itertools.combinations(range(1, layers), stages - 1):
        bounds = [0, *inner, layers]
        for meshes in itertools.product(range(len(sizes)), repeat=stages):
            if sum(sizes[c] for c in meshes) != devices:
                continue
            spans = [slice(i, j) for i, j in itertools.pairwise(bounds)]
            placed = enumerate(zip(meshes, spans, strict=True))
            if any(sum(memory_SxCxL[s][c][span]) > limit_S[s] for s, (c, span) in placed):
                continue
            sent = [*(cuts[i - 1] for i in inner), 0]
            times = [
                sum(time_CxL[c][span]) + cut
                for c, span, cut in zip(meshes, spans, sent, strict=True)
            ]
            best = min(best, sum(times) + (microbatches - 1) * max(times))
    return best


@st.composite
def problems(draw):
    """Small integer instances, so that equal means equal: with cuts, memory by stage and sub-mesh,
    and devices.
    """
    layers, meshes = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    stages = draw(st.integers(1, min(3, layers)))

    def numbers(*shape, high=9):
        values = draw(
            st.lists(
                st.integers(0, high), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))
            )
        )
        return np.array(values, float).reshape(shape)

    return {
        "time_CxL": numbers(meshes, layers),
        "stages": stages,
        "microbatches": draw(st.integers(1, 9)),
        "cuts": numbers(layers - 1),
        "memory_SxCxL": numbers(stages, meshes, layers, high=4),
        "limit_S": numbers(stages, high=16) + 4,
        "sizes": [1, 2][:meshes],
        "devices": draw(st.integers(stages, stages * meshes)),
    }


@fast
@settings(max_examples=120, deadline=None)
@given(problems())
def test_both_solvers_equal_brute_force(problem):
    expected = brute_force(**problem)
    names = {
        "cuts": "cut_times",
        "memory_SxCxL": "layer_memory",
        "limit_S": "memory_limits",
        "sizes": "mesh_sizes",
        "devices": "devices",
    }
    options = {names[k]: v for k, v in problem.items() if k in names}
    for solve in SOLVERS:
        arguments = (problem["time_CxL"], problem["stages"], problem["microbatches"])
        if not np.isfinite(expected):
            with pytest.raises(ValueError, match=r"(memory|devices) bind"):
                solve(*arguments, **options)
            continue
        found = solve(*arguments, **options)
        assert found.time == pytest.approx(expected, rel=1e-12)
        # The partition is what its time says: price it again, on its own.
        spans = [slice(i, j) for i, j in itertools.pairwise(found.starts)]
        sent = [*(problem["cuts"][i - 1] for i in found.starts[1:-1]), 0]
        times = [
            sum(problem["time_CxL"][c][span]) + cut
            for c, span, cut in zip(found.meshes, spans, sent, strict=True)
        ]
        assert found.stage_times == pytest.approx(times)
        assert found.time == pytest.approx(sum(times) + (problem["microbatches"] - 1) * max(times))
        assert sum(problem["sizes"][c] for c in found.meshes) == problem["devices"]
        placed = enumerate(zip(found.meshes, spans, strict=True))
        held = [problem["memory_SxCxL"][s][c][span].sum() for s, (c, span) in placed]
        assert (held <= problem["limit_S"]).all()


@fast
@pytest.mark.parametrize(
    ("layers", "stages", "sizes"), [(40, 8, [1]), (24, 4, [1, 2, 4]), (32, 6, [1, 2])]
)
def test_dynamic_program_equals_ilp_on_larger_instances_in_milliseconds_and_gigabytes(
    layers, stages, sizes
):
    rng = np.random.default_rng(layers)
    time_CxL = (
        1e-3
        * rng.uniform(0.5, 2, layers)
        / np.array(sizes)[:, None] ** rng.uniform(0.5, 0.9, (len(sizes), 1))
    )
    options = {
        "cut_times": 1e-3 * rng.uniform(0, 0.5, layers - 1),
        "layer_memory": 1e9 * rng.uniform(1, 2, layers),
        "memory_limits": 1e9 * 1.5 * layers / stages * 1.2,
        "mesh_sizes": sizes,
        "devices": stages if len(sizes) == 1 else 2 * stages - 1,
    }
    dp, ilp = (solve(time_CxL, stages, 16, **options) for solve in SOLVERS)
    assert ilp.time == pytest.approx(dp.time, rel=1e-7)


@fast
def test_78_layers_on_12_stages_with_embedding_and_logits():
    """Lower bound: 78 layers on 12 stages leave a stage with 7; 7 is reached, where equal layer
    counts take 7.5.
    """
    found = partition_dp(MODEL, 12, 64)
    assert max(found.stage_times) == pytest.approx(np.ceil(78 / 12)) == 7
    assert found.time == pytest.approx(MODEL.sum() + 63 * 7)
    even = [7.1, *[7.0] * 5, *[6.0] * 5, 7.5]  # 78 = 6·7 + 6·6, embedding and logits at the ends
    assert found.time < pipeline_time(even, 64) == pytest.approx(MODEL.sum() + 63 * 7.5)
    ceiling = [7.1, *[7.0] * 10, 2.5]  # ceil(78 / 12) layers until they run out
    assert found.time < pipeline_time(ceiling, 64)


@pytest.mark.slow
def test_78_layers_on_12_stages_is_proved_optimal_by_the_ilp():
    """Slow: twelve nearly equal stages leave the solver a large tree."""
    assert partition_ilp(MODEL, 12, 64, time_limit_s=300).time == pytest.approx(
        partition_dp(MODEL, 12, 64).time
    )


@fast
@each_solver
def test_closed_forms(solve):
    """One stage: m ΣT. As many stages as layers: Σ T + (m - 1) max. Equal layers: (p + m - 1) L /
    p.
    """
    times = np.array([3.0, 1.0, 2.0])
    assert solve(times, 1, 5).time == 30
    assert solve(times, 3, 5).time == 6 + 4 * 3
    assert solve(times, 3, 5).starts == (0, 1, 2, 3)
    assert solve(np.ones(12), 4, 8).time == pytest.approx((4 + 8 - 1) * 3)
    assert solve(np.ones((1, 12)), 4, 8).stage_times == (3.0,) * 4


@fast
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 8))
def test_pipeline_time_is_the_makespan_of_microbatches_that_pass_the_stages_in_order(
    times, microbatches
):
    done = np.zeros(len(times) + 1)  # when each stage is free; done[0]: the input is always there
    for _ in range(microbatches):
        for s, time in enumerate(times):
            done[s + 1] = max(done[s + 1], done[s] if s else 0) + time
    assert pipeline_time(times, microbatches) == done[-1]


@fast
@each_solver
def test_microbatches_trade_the_sum_of_the_stages_for_the_slowest(solve):
    """A cheap cut in a bad place wins with one microbatch; the balanced split with an expensive cut
    wins with many.
    """
    times, cuts = np.ones(4), np.array([0.0, 0.5, 0.5])
    assert solve(times, 2, 1, cut_times=cuts).starts == (0, 1, 4)
    assert solve(times, 2, 1, cut_times=cuts).time == 4.0
    many = solve(times, 2, 10, cut_times=cuts)
    assert many.starts == (0, 2, 4)
    assert many.time == 4.5 + 9 * 2.5
    assert many.stage_times == (2.5, 2.0)  # the sender pays


@fast
@each_solver
def test_memory_limits_bind(solve):
    """Balanced by time is 2 + 2; stage 0, which holds more activations under 1F1B, can hold one
    layer only.
    """
    times = np.ones(4)
    assert solve(times, 2, 8).starts == (0, 2, 4)
    memory_SxCxL = np.array([2.0, 1.0])[:, None, None]  # in flight: p - s microbatches
    found = solve(times, 2, 8, layer_memory=memory_SxCxL, memory_limits=3.0)
    assert found.starts == (0, 1, 4)
    assert found.time == 4 + 7 * 3
    assert solve(times, 2, 8, layer_memory=np.ones(4), memory_limits=np.array([3, 1])).starts == (
        0,
        3,
        4,
    )
    assert solve(times, 2, 8, layer_memory=memory_SxCxL, memory_limits=4.0).starts == (
        0,
        2,
        4,
    )  # exactly full


@fast
@each_solver
def test_sub_meshes_are_chosen_and_all_devices_used(solve):
    """Sizes 1 and 2, the larger twice as fast: three devices on layers 1, 1, 1, 3 give the heavy
    tail two of them.
    """
    layer_times = np.array([[1.0, 1, 1, 3], [0.5, 0.5, 0.5, 1.5]])
    found = solve(layer_times, 2, 50, mesh_sizes=[1, 2], devices=3)
    assert (found.starts, found.meshes, found.time) == ((0, 2, 4), (0, 1), 4 + 49 * 2)
    two = solve(layer_times, 2, 50, mesh_sizes=[1, 2], devices=2)
    assert (two.starts, two.meshes, two.time) == ((0, 3, 4), (0, 0), 6 + 49 * 3)


@fast
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=3, max_size=9), st.integers(1, 3), st.integers(1, 20))
def test_metamorphic_relations(times, stages, microbatches):
    layer_times = np.array(times, float)
    time = partition_dp(layer_times, stages, microbatches).time
    assert (
        partition_dp(layer_times[::-1], stages, microbatches).time == time
    )  # without cuts, order may be reversed
    assert partition_dp(4 * layer_times, stages, microbatches).time == 4 * time
    assert partition_dp(layer_times + 1, stages, microbatches).time >= time
    assert partition_dp(layer_times, stages, microbatches + 1).time >= time
    bound = max(layer_times.max(), layer_times.sum() / stages)
    assert time >= layer_times.sum() + (microbatches - 1) * bound - 1e-9
    cut = partition_dp(layer_times, stages, microbatches, cut_times=np.ones(len(times) - 1)).time
    assert time + stages - 1 <= cut <= time + stages - 1 + microbatches - 1


@fast
@each_solver
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer_memory": [1, 5, 1, 1], "memory_limits": 4.0},
            r"stage 0 .layers 0\.\.\d. needs \d bytes > memory_lim",
        ),
        (
            {"layer_memory": np.ones(4), "memory_limits": 1.5},
            "memory binds: .* raise the limits by a factor 1.333 or",
        ),
        ({"layer_memory": np.ones(4), "memory_limits": [9, 0]}, "memory binds: a limit of 0"),
        (
            {"mesh_sizes": [2], "devices": 3},
            r"devices bind: 2 stages on sub-meshes of sizes \[2\] .* devices = 3",
        ),
        ({"mesh_sizes": [2], "devices": 1}, "devices bind"),
    ],
)
def test_no_partition_says_what_binds(solve, options, message):
    with pytest.raises(ValueError, match=message):
        solve(np.ones(4), 2, 4, **options)


@fast
@each_solver
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (np.ones(3), 4, 1),
            {},
            "stages = 4 > layers = 3: every stage needs a layer; use at most 3",
        ),
        ((np.ones(3), 0, 1), {}, "stages = 0, microbatches = 1: both must be at least 1"),
        ((np.ones(3), 2, 0), {}, "microbatches = 0"),
        ((np.ones(0), 1, 1), {}, "not empty"),
        ((np.ones((1, 1, 2)), 1, 1), {}, "give .L. or .C, L."),
        ((np.array([1, np.nan, 1]), 2, 1), {}, r"layer_times at \(0, 1\) = nan"),
        (
            (np.array([1, -1, 1]), 2, 1),
            {},
            r"layer_times at \(0, 1\) = -1.0: give finite values >= 0",
        ),
        (
            (np.ones(3), 2, 1),
            {"cut_times": np.ones(3)},
            r"cut_times has shape \(3,\): it must broadcast to \(2,\)",
        ),
        (
            (np.ones(3), 2, 1),
            {"layer_memory": np.ones(3)},
            "layer_memory and memory_limits belong together",
        ),
        ((np.ones(3), 2, 1), {"devices": 2}, "mesh_sizes and devices belong together"),
        (
            (np.ones(3), 2, 1),
            {"mesh_sizes": [1, 2], "devices": 2},
            r"mesh_sizes = \[1, 2\]: give one integer",
        ),
        (
            (np.ones(3), 2, 1),
            {"layer_memory": 1.0, "memory_limits": np.nan},
            "memory_limits = .nan, nan.: give bytes",
        ),
    ],
)
def test_bad_input_is_refused(solve, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        solve(*arguments, **options)


@fast
def test_ilp_out_of_time_is_an_error_not_a_guess():
    with pytest.raises(TimeoutError, match="no proven optimum in time_limit_s = 0"):
        partition_ilp(MODEL, 12, 64, time_limit_s=0.0)
