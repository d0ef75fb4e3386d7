"""Energy of a step: identities, the cap, refusals, and the shipped fit against its data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.price import energy, hardware
from fdp.price.energy import Activity, step_energy
from tools import fit_energy

pytestmark = pytest.mark.fast
DATA = Path(__file__).parents[2].parent / "shared" / "data"
LIGHT = Activity("h100", 16, 2, 1.0, 0.2, {"bf16": 5e12}, 1e11, 2e11, 1e10)  # below the cap
POWERED = [name for name, chip in hardware.CHIPS.items() if chip.peak_power]


@pytest.fixture
def data():
    if not (DATA / "moe/gpu_moe_power.csv.gz").exists():
        pytest.skip("the measured power is not beside the project")
    return DATA


def test_no_activity_is_idle_energy():
    e = step_energy(Activity("h100", 16, 2, 10.0, 0.0), 1600.0)
    assert (e.static_joules, e.idle_joules, e.dynamic_joules) == (2 * 1600 * 10, 16 * 70 * 10, 0)
    assert e.joules == 2 * 10 * e.mean_power_per_node and e.chip_power == 70
    assert e.kwh == pytest.approx(e.joules / 3.6e6) and e.tokens_per_joule(1e6) == 1e6 / e.joules


def test_closed_form_below_the_cap():
    c, e = energy.coefficients("h100"), step_energy(LIGHT, 1700.0)
    busy, flops, hbm = (
        c.busy * 700 * 0.2,
        c.flops_16 * 700 * 5e12 / 989e12,
        c.hbm * 700 * 1e11 / 3.35e12,
    )
    links = c.scale_up_joules * 2e11 + c.scale_out_joules * 1e10
    assert busy + flops + hbm < 630 * 0.2
    assert e.dynamic_joules == pytest.approx(16 * (busy + flops + hbm + links), rel=1e-12)
    assert e.joules == pytest.approx(e.dynamic_joules + 2 * 1700 + 16 * 70, rel=1e-12)


def test_twice_the_time_of_equal_work_adds_the_static_and_the_idle_part():
    once, twice = step_energy(LIGHT), step_energy(dataclasses.replace(LIGHT, time=2.0))
    assert twice.joules - once.joules == pytest.approx(
        once.static_joules + once.idle_joules, rel=1e-12
    )
    assert twice.dynamic_joules == once.dynamic_joules


def test_a_busy_chip_at_the_cap_does_not_lend_its_excess_to_the_time_it_waits():
    heavy = Activity("h100", 8, 1, 2.0, 1.0, {"bf16": 600e12}, 2e12)
    e = step_energy(heavy, 0.0)
    assert e.chip_power == pytest.approx((700 + 70) / 2)
    more = step_energy(dataclasses.replace(heavy, flops={"bf16": 900e12}), 0.0)
    assert more.joules == e.joules


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(POWERED),
    st.floats(1e-3, 1e3),
    st.floats(0.01, 1),
    st.floats(0, 1e18),
    st.floats(0, 1e16),
    st.floats(0, 1e16),
    st.sampled_from([(8, 1), (64, 8), (4, 4)]),
)
def test_power_stays_between_idle_and_the_cap(name, time, busy, flops, hbm, link, shape):
    e = step_energy(
        Activity(name, *shape, time, time * busy, {"bf16": flops}, hbm, link, link), 300.0
    )
    idle, peak = energy.idle_and_peak(name)
    chips = shape[0] / shape[1]
    assert idle * (1 - 1e-9) <= e.chip_power <= peak * (1 + 1e-9)
    assert (
        300 + chips * idle * (1 - 1e-9) <= e.mean_power_per_node <= 300 + chips * peak * (1 + 1e-9)
    )


@pytest.mark.parametrize(
    "term", ["flops", "hbm_bytes", "scale_up_bytes", "scale_out_bytes", "busy"]
)
def test_every_term_costs_energy(term):
    more = {"flops": {"bf16": 6e12}, "busy": 0.22}.get(
        term, 1.05 * getattr(LIGHT, term) if term != "flops" else None
    )
    assert (
        step_energy(dataclasses.replace(LIGHT, **{term: more})).joules > step_energy(LIGHT).joules
    )


def test_each_precision_has_its_own_price():
    c = energy.coefficients("b200")
    for precision, share, rate in (
        ("bf16", c.flops_16, 2250e12),
        ("fp8", c.flops_8, 4500e12),
        ("fp4", c.flops_8, 9e15),
    ):
        e = step_energy(Activity("b200", 1, 1, 1.0, 0.5, {precision: 1e13}), 0.0)
        assert e.dynamic_joules == pytest.approx(1000 * (0.5 * c.busy + share * 1e13 / rate))


def test_arrays_are_elementwise():
    time_T = np.array([1.0, 2.0, 4.0])
    e_T = step_energy(dataclasses.replace(LIGHT, time=time_T))
    assert e_T.joules.tolist() == [
        step_energy(dataclasses.replace(LIGHT, time=t)).joules for t in time_T
    ]


def test_chip_power_from_shares():
    c = energy.coefficients("h100")
    watts = energy.chip_power("h100", 0.5, {"bf16": 0.05}, 0.1)
    assert watts == pytest.approx(70 + 700 * (0.5 * c.busy + 0.05 * c.flops_16 + 0.1 * c.hbm))
    assert (
        energy.chip_power("h100", 0.0) == 70
        and energy.chip_power("h100", 1.0, {"bf16": 0.6}, 0.5) == 700
    )
    assert energy.chip_power("h100", 1.0) == energy.kernel_power("h100", {}, 0.0)


def test_chips_without_a_fit_scale_with_their_own_cap_and_peaks():
    b200, b300 = (energy.chip_power(n, 0.5, {"fp8": 0.02}, 0.1) - 70 for n in ("b200", "b300"))
    assert b300 / b200 == pytest.approx(1100 / 1000)
    assert energy.coefficients("a100") == energy.coefficients("l40s") != energy.coefficients("h100")
    assert energy.idle_and_peak("v4") == (pytest.approx(19.2), 192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": float("nan")}, "time = nan"),
        ({"hbm_bytes": -1.0}, "hbm_bytes = -1.0: E = Σ"),
        ({"flops": {"bf16": float("inf")}}, r"flops\[bf16\] = inf"),
        ({"scale_out_bytes": np.array([0.0, -1.0])}, "scale_out_bytes"),
        ({"time": 0.0, "busy": 0.0}, "time > 0"),
        ({"busy": 1.5}, "busy = 1.5 s: a step needs 0 ≤ busy ≤ time"),
        ({"busy": 0.0}, "give the seconds in which kernels run"),
        ({"nodes": 0}, "16 chips on 0 nodes"),
        ({"nodes": 32}, "16 chips on 32 nodes"),
        ({"flops": {"bfloat16": 1.0}}, "unknown precision 'bfloat16': did you mean 'bf16'"),
        ({"chip": "a100", "flops": {"fp8": 1.0}}, "a100 has no fp8 rate"),
        ({"chip": "v5e"}, "v5e has no published peak_power.*h100"),
        ({"chip": "h10"}, "did you mean 'h100'"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        step_energy(dataclasses.replace(LIGHT, **change))


def test_bad_shares_and_host_power_are_refused():
    with pytest.raises(ValueError, match=r"bf16 = 1\.2 is not a share"):
        energy.chip_power("h100", 1.0, {"bf16": 1.2})
    with pytest.raises(ValueError, match="busy = nan is not a share"):
        energy.chip_power("h100", float("nan"))
    with pytest.raises(ValueError, match="host power = -5"):
        step_energy(LIGHT, -5.0)


def test_shipped_coefficients_are_physical():
    shipped = energy.document()
    for fit in shipped["coefficients"].values():
        for name, (low, high) in shipped["bounds"].items():
            assert low < fit[name] < high  # inside: a coefficient at its bound is not measured
    # 0.1-2 pJ per FLOP, 20-150 pJ per byte of HBM: what a chip of its kind can have
    for name, chip in (("h200", hardware.chip("h200")), ("b200", hardware.chip("b200"))):
        fit = energy.coefficients(name)
        assert 1e-13 < fit.flops_16 * chip.peak_power / chip.peak_bf16_flops < 2e-12
        assert 2e-11 < fit.hbm * chip.peak_power / chip.hbm_bandwidth < 1.5e-10
    assert 1500 < energy.host_power(8) < 2000


def test_the_fit_finds_coefficients_it_was_not_started_at():
    truth = energy.EnergyCoefficients(0.3, 1.2, 1.7, 0.6, **fit_energy.LINKS)
    draw, made = np.random.default_rng(0), []
    for _ in range(200):
        precision, flop, hbm = (
            str(draw.choice(["bf16", "fp8"])),
            draw.uniform(0, 0.5),
            draw.uniform(0, 0.7),
        )
        made.append(fit_energy.Kernel("h200", (), 1024, precision, flop, hbm, 1.0, 0.0, 700.0))
    watts = fit_energy.predict(truth, made)
    assert (watts == 700).any()  # some at the cap
    made = [dataclasses.replace(k, watts=float(w)) for k, w in zip(made, watts, strict=True)]
    assert dataclasses.asdict(fit_energy.fit(made)) == pytest.approx(
        dataclasses.asdict(truth), rel=1e-3
    )


def test_the_command_reproduces_the_shipped_file(data):
    made, shipped = json.loads(json.dumps(fit_energy.document(data))), energy.document()
    for name in made["coefficients"]:
        assert made["coefficients"][name] == pytest.approx(shipped["coefficients"][name], rel=0.01)
    for name in ("sources", "host_watts_per_chip", "bounds", "same_generation"):
        assert made[name] == shipped[name]
    lora = made["errors"]["node_power"]["lora_left_out"]
    assert abs(lora["1 nodes"]["error_pct"]) < 3 and abs(lora["8 nodes"]["error_pct"]) < 8
    for chip, error in made["errors"]["kernel_power"]["held_out_shape"].items():
        assert error["all"]["median_pct"] < 4, chip
