"""Collective times: closed forms, the NIC-sharing rule, derivatives, and the shipped fit against
its data.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.price import hardware, network
from tools import fit_network

pytestmark = pytest.mark.fast
DATA = Path(__file__).parents[2].parent / "shared" / "data"
N, A, B = 1e9, 2e-6, 50e9  # bytes, α, β
GPUS = [name for name, c in hardware.CHIPS.items() if c.scale_out_bandwidth]


@pytest.fixture
def data():
    if not (DATA / "planning/comm/collectives.csv.gz").exists():
        pytest.skip("the measured collectives are not beside the project")
    return DATA


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (network.all_reduce(N, 8, A, B), 14 * A + 2 * 7 / 8 * N / B),
        (network.all_gather(N, 8, A, B), 7 * A + 7 / 8 * N / B),
        (network.reduce_scatter(N, 8, A, B), 7 * A + 7 / 8 * N / B),
        (network.all_to_all(N, 8, A, B), 7 * A + 7 / 8 * N / B),
        (network.point_to_point(N, A, B), A + N / B),
        (network.all_gather_torus(N, 8, A, B), 4 * A + 7 / 8 * N / (2 * B)),
        (network.all_to_all_torus(N, 8, A, B), 4 * A + N / B),
        (network.all_to_all_nodes(N, 16, 8, A, (9 * B, B)), 15 * A + 8 / 16 * N / B),
        (network.all_to_all_nodes(N, 8, 8, A, (9 * B, B)), 7 * A + 7 / 8 * N / (9 * B)),
    ],
)
def test_closed_forms(seconds, expected):
    assert seconds == pytest.approx(expected, rel=1e-14)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    both = network.reduce_scatter(N, 16, A, B) + network.all_gather(N, 16, A, B)
    assert network.all_reduce(N, 16, A, B) == pytest.approx(both)


@pytest.mark.parametrize("n", [2, 4, 6, 16])
def test_a_torus_all_to_all_counts_every_link_crossed(n):
    hops = sum(min(d, n - d) for d in range(n))  # from one rank to all others, the short way round
    per_link = n * hops * (N / n) / (2 * n)
    assert network.all_to_all_torus(N, n, 0.0, B) == pytest.approx(per_link / B)


def test_one_rank_costs_nothing():
    rings = (network.all_reduce, network.all_gather, network.all_to_all)
    for f in (*rings, network.all_gather_torus, network.all_to_all_torus):
        assert f(N, 1, A, B) == 0
    for op in network.OPS:
        assert network.collective_time(op, N, 1, 1, "h100") == 0
        assert network.collective_time(op, N, 1, 1, "v5p") == 0
        free = dataclasses.replace(network.coefficients("h100"), ramp=0.0, launch=0.0)
        assert network.collective_time(op, N, 1, 1, "h100", free) == 0


@pytest.mark.parametrize(
    ("n", "local", "expected"),
    [
        (8, 8, 450),
        (2, 2, 450),
        (16, 1, 50),
        (16, 2, 100),
        (16, 4, 200),
        (16, 8, 400),
        (64, 16, 450),
    ],
)
def test_nodes_share_their_nics(n, local, expected):
    assert network.group_bandwidth(n, local, 450e9, 50e9) == expected * 1e9


def test_the_rule_explains_a_measured_profile_that_one_bandwidth_does_not():
    measured_L = np.array(
        [8.1, 16.2, 20.8, 44.7]
    )  # GB/s on 16 GPUs for 1, 2, 4, 8 ranks a node, as Galvatron states
    rule_L = network.group_bandwidth(16, np.array([1, 2, 4, 8]), 300.0, 25.0)
    spread = [np.std(np.log(measured_L / law_L)) for law_L in (rule_L, np.full(4, 25.0))]
    assert spread[0] < 0.25 < 0.55 < spread[1]


@pytest.mark.parametrize(
    ("degree", "inner", "expected"),
    [(16, 1, 8), (16, 4, 2), (16, 8, 1), (16, 32, 1), (2, 1, 2), (4, 2, 4)],
)
def test_local_ranks(degree, inner, expected):
    assert network.local_ranks(degree, inner, 8) == expected


@pytest.mark.parametrize("op", network.OPS)
@pytest.mark.parametrize("name", ["a100", "h100", "b200", "v5p"])
def test_arrays_tracers_and_numbers_agree(op, name):
    n_K, local_K, nbytes_K = (
        np.array([2, 8, 16, 64]),
        np.array([2, 8, 4, 8]),
        np.array([1e3, 1e6, 1e8, 1e9]),
    )
    points = zip(nbytes_K.tolist(), n_K.tolist(), local_K.tolist(), strict=True)
    each = [network.collective_time(op, *point, name) for point in points]
    np.testing.assert_allclose(
        network.collective_time(op, nbytes_K, n_K, local_K, name), each, rtol=1e-12
    )
    traced = jax.jit(lambda *x: network.collective_time(op, *x, name))(
        *map(jnp.asarray, (nbytes_K, n_K, local_K))
    )
    np.testing.assert_allclose(traced, each, rtol=1e-5)


@pytest.mark.parametrize("op", network.OPS)
@pytest.mark.parametrize(("n", "local"), [(8.0, 8.0), (32.0, 4.0), (24.5, 3.5)])
def test_derivatives_match_differences(op, n, local):
    with jax.enable_x64(True):

        def f(log_bytes, log_n):
            sizes = jnp.exp(log_bytes), jnp.exp(log_n)
            return jnp.log(network.collective_time(op, *sizes, local, "h100"))

        for log_bytes in (8.0, 14.0, 20.0):
            at = (jnp.float64(log_bytes), jnp.log(jnp.float64(n * 1.01)))
            for i, slope in enumerate(jax.grad(f, (0, 1))(*at)):
                up, down = ([v + (j == i) * s * 1e-5 for j, v in enumerate(at)] for s in (1, -1))
                assert float(slope) == pytest.approx(
                    float(f(*up) - f(*down)) / 2e-5, rel=1e-5, abs=1e-8
                )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(network.OPS),
    st.sampled_from(GPUS),
    st.floats(0, 35),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_more_bytes_and_less_bandwidth_take_longer(op, name, log2_bytes, log2_n, log2_local):
    nbytes, n, local = 2**log2_bytes, 2**log2_n, min(2**log2_local, 2**log2_n)
    fit = network.coefficients(name)
    slow = dataclasses.replace(
        fit, **{f: getattr(fit, f) / 2 for f in ("all_reduce", "all_gather", "all_to_all")}
    )
    slow = dataclasses.replace(slow, point_to_point=fit.point_to_point / 2)
    seconds = network.collective_time(op, nbytes, n, local, name)
    assert 0 < seconds < network.collective_time(op, 1.5 * nbytes, n, local, name) < math.inf
    assert seconds < network.collective_time(op, nbytes, n, local, name, slow) < 2.0001 * seconds


def test_the_faster_protocol_counts_and_bandwidth_rises_with_size():
    fit = dataclasses.replace(network.coefficients("h100"), launch=0.0, hop=0.0)
    rate = 450e9 * fit.all_gather
    small, large = (
        network.collective_time("all_gather", b, 8, 8, "h100", fit) for b in (1e3, 1e12)
    )
    assert small == pytest.approx(7 / 8 * 1e3 / (fit.short * rate), rel=1e-3)
    assert large == pytest.approx(fit.ramp + 7 / 8 * 1e12 / rate, rel=0.01)
    nbytes_K = np.logspace(3, 11, 60)
    assert np.all(
        np.diff(nbytes_K / network.collective_time("all_gather", nbytes_K, 8, 8, "h100")) > 0
    )


def test_congestion_slows_only_groups_over_more_than_two_nodes():
    fit = dataclasses.replace(network.coefficients("h100"), hop_out=0.0, congestion=0.0)
    congested = dataclasses.replace(fit, congestion=0.5)
    for n, factor in ((8, 1), (16, 1), (64, 2)):
        slow, fast = (
            network.collective_time("all_to_all", 1e13, n, 8, "h100", c) for c in (congested, fit)
        )
        assert slow / fast == pytest.approx(factor, rel=1e-3)


def test_a_send_has_its_own_nic_however_many_ranks_share_the_node():
    fit = dataclasses.replace(network.coefficients("h100"), congestion=0.0)
    one, eight = (network.collective_time("point_to_point", N, 16, k, "h100", fit) for k in (1, 8))
    assert one == pytest.approx(eight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("allreduce", N, 8, 8, "h100"),
            "unknown collective 'allreduce': did you mean 'all_reduce'",
        ),
        (("all_reduce", N, 0, 1, "h100"), "n = 0; .* needs a finite n ≥ 1"),
        (("all_reduce", -1.0, 8, 8, "h100"), "nbytes = -1.0"),
        (("all_reduce", float("nan"), 8, 8, "h100"), "nbytes = nan"),
        (("all_reduce", np.array([1.0, -1.0]), 8, 8, "h100"), "nbytes ="),
        (("all_reduce", N, 8, 0, "h100"), "local = 0"),
        (("all_reduce", N, 8, 8, "h1000"), "did you mean 'h100'"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        network.collective_time(*arguments)


def test_shipped_coefficients_are_physical_and_say_where_they_come_from():
    shipped = network.document()
    for fit in shipped["coefficients"].values():
        for name in ("launch", "launch_out", "hop", "hop_out", "ramp", "congestion"):
            assert 0 <= fit[name] <= 1
        for name in (
            "short",
            "all_reduce",
            "all_gather",
            "all_to_all",
            "point_to_point",
            "scale_out",
        ):
            assert 0 < fit[name] <= 1
    assert shipped["date"] and sum(s["points"] for s in shipped["sources"].values()) > 10_000
    rule = shipped["errors"]["nic_rule_a100_held_out_class"]
    assert rule["with"]["mean_over_classes_pct"] < 0.8 * rule["without"]["mean_over_classes_pct"]
    assert (
        network.coefficients("b200")
        == network.coefficients("gb300")
        != network.coefficients("h100")
    )
    assert network.coefficients("v5p") == network.LinkCoefficients(
        **shipped["coefficients"]["torus"]
    )


def test_a_measured_figure():
    """128 MiB over the 8 H100 of a node: NCCL's own benchmark says 579 µs all-reduce, 393 µs
    all-gather.
    """
    assert network.collective_time("all_reduce", 2**27, 8, 8, "h100") == pytest.approx(
        579e-6, rel=0.15
    )
    assert network.collective_time("all_gather", 2**27, 8, 8, "h100") == pytest.approx(
        393e-6, rel=0.3
    )


def test_the_fit_finds_coefficients_it_was_not_started_at():
    truth = network.LinkCoefficients(
        9e-6, 8e-6, 2e-6, 4e-6, 2e-5, 0.4, 0.9, 0.6, 0.5, 0.8, 0.3, 0.6
    )
    nbytes_P, found = 2.0 ** np.arange(10, 31, 2), []
    for op in network.OPS:
        for n, local in ((2, 2), (8, 8), (2, 1), (8, 2), (16, 8), (128, 8)):
            seconds_P = network.collective_time(op, nbytes_P, n, local, "h100", truth)
            found.append(fit_network.Class("made up", "h100", op, n, local, nbytes_P, seconds_P))
    made = fit_network.fit(found)
    for name in fit_network.FIELDS:
        assert getattr(made.coefficients, name) == pytest.approx(getattr(truth, name), rel=0.05), (
            name
        )
    assert (
        fit_network.score((made, one) for one in found)["across nodes, from 1 MiB"]["p90_pct"] < 1
    )


def test_the_command_reproduces_the_shipped_fit(data):
    shipped = network.document()
    found = fit_network.measured(data)
    for name, made in fit_network.fits(found).items():
        fit = pytest.approx(shipped["coefficients"][name], rel=0.02, abs=1e-7)
        assert dataclasses.asdict(made.coefficients) == fit
        errors = fit_network.score((made, one) for one in found if one.chip == name)
        for group, error in errors.items():
            assert error == pytest.approx(
                shipped["errors"]["in_sample"][name][group], rel=0.05, abs=0.2
            )


def test_held_out_errors_are_those_of_the_shipped_fit():
    with pytest.raises(ValueError, match=r"no held-out error of collectives on b200"):
        network.held_out_error("b200", small=True)
    assert network.held_out_error("h100", small=False) == pytest.approx((0.099, 0.323))
    across = network.document()["errors"]["held_out_class"]["h100"]["across nodes, below 1 MiB"]
    found = network.held_out_error("h100", small=True, crosses=True)
    assert found == (across["median_pct"] / 100, across["p90_pct"] / 100)
