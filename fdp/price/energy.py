"""Energy of a step: static power of the nodes, idle power of the chips, and the work, from fitted
coefficients.

E = nodes·P_host·T + chips·(P_idle·T + E_dynamic), with, per chip, E_dynamic = min(P_busy·T_busy + Σ
e_F·FLOPs + e_M·HBM bytes, (P_peak − P_idle)·T_busy) + e_N·scale-up bytes + e_I·scale-out bytes, in
all at most (P_peak − P_idle)·T: a chip at its power cap throttles, so that its time grows, not its
power. P_busy is what a running kernel draws before it has done anything: kernels at 3 % of both
peaks draw 60-70 % of the cap, which no price per FLOP and byte explains. Coefficients are shares of
the cap at the full rate, which is how they carry over to chips that were not measured. Seconds,
joules, watts, FLOPs and bytes; numbers or numpy arrays, elementwise. Fits, data and held-out
errors: `coefficients/energy.json`, rewritten by `python -m tools.fit_energy DATA`."""

import dataclasses
import difflib
import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fdp.price import hardware

JOULES_PER_KWH = 3.6e6
PEAK_RATES = {
    "bf16": "peak_bf16_flops",
    "fp8": "peak_fp8_flops",
    "fp4": "peak_fp4_flops",
    "int8": "peak_int8_ops",
}


@dataclasses.dataclass(frozen=True)
class EnergyCoefficients:
    """Shares of the chip's peak power, at the full rate of the term, and joules per byte of the
    links.
    """

    busy: float
    flops_16: float
    flops_8: float  # also of narrower formats, at their own peak rates
    hbm: float
    scale_up_joules: float
    scale_out_joules: float


@dataclasses.dataclass(frozen=True)
class Activity:
    """What a step does. Seconds, FLOPs and bytes are those of one chip, the mean over chips."""

    chip: str
    chips: int
    nodes: int
    time: Any  # of the step
    busy: Any  # of it, while a kernel computes; bubbles and exposed communication are the rest
    flops: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # by precision: bf16, fp8, fp4, int8
    hbm_bytes: Any = 0.0
    scale_up_bytes: Any = 0.0
    scale_out_bytes: Any = 0.0


@dataclasses.dataclass(frozen=True)
class Energy:
    """Joules of all nodes and chips in one step; switches outside the nodes and cooling (PUE) are
    not in it.
    """

    static_joules: Any  # hosts
    idle_joules: Any
    dynamic_joules: Any
    mean_power_per_node: Any
    chip_power: Any  # mean of one chip

    @property
    def joules(self) -> Any:
        """All of it."""
        return self.static_joules + self.idle_joules + self.dynamic_joules

    @property
    def kwh(self) -> Any:
        """Kilowatt-hours."""
        return self.joules / JOULES_PER_KWH

    def tokens_per_joule(self, tokens: Any) -> Any:
        """Tokens per joule of a step that trains on `tokens`."""
        return tokens / self.joules


@functools.cache
def document() -> dict[str, Any]:
    """The shipped fit with its sources, counts, date and held-out errors."""
    return json.loads(
        (importlib.resources.files("fdp.price") / "coefficients" / "energy.json").read_text("utf-8")
    )


def coefficients(chip_name: str) -> EnergyCoefficients:
    """Coefficients of a chip: its own fit, that of the same generation, or the pooled one.

    Raises ValueError for an unknown chip.
    """
    name, made = hardware.chip(chip_name).name, document()
    fit = made["coefficients"][made["same_generation"].get(name, "default")]
    return EnergyCoefficients(**fit, **made["links_joules_per_byte"])


def host_power(chips_per_node: Any) -> Any:
    """Watts of a node beside its chips: CPUs, NICs, power supplies, no fans; fitted on idle servers
    of 8 H100.
    """
    return document()["host_watts_per_chip"] * chips_per_node


def idle_and_peak(chip_name: str) -> tuple[float, float]:
    """(idle, cap) watts of a chip; idle is a share of the cap where it is not published.

    Raises ValueError where the cap is not published: no energy can be given then.
    """
    chip = hardware.chip(chip_name)
    if chip.peak_power is None:
        known = ", ".join(name for name, c in hardware.CHIPS.items() if c.peak_power)
        raise ValueError(
            f"{chip.name} has no published peak_power, so P ≤ peak cannot be kept; chips that do: "
            f"{known}"
        )
    return chip.idle_power or document()["idle_share"] * chip.peak_power, chip.peak_power


def peak_rate(chip_name: str, precision: str) -> float:
    """FLOP/s of a precision. Raises ValueError for an unknown one, or one that the chip lacks."""
    if precision not in PEAK_RATES:
        close = difflib.get_close_matches(precision, PEAK_RATES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown precision {precision!r}: did you mean {close!r}? Known: "
            f"{', '.join(PEAK_RATES)}"
        )
    chip = hardware.chip(chip_name)
    rate = getattr(chip, PEAK_RATES[precision])
    if rate is None:
        raise ValueError(
            f"{chip.name} has no {precision} rate, so its energy per FLOP is unknown; use bf16"
        )
    return rate


def kernel_power(
    chip_name: str, flop_use: Mapping[str, Any], hbm_use: Any, fit: EnergyCoefficients | None = None
) -> Any:
    """Watts of a chip while a kernel runs at these shares of the peak rates (by precision, and
    HBM), cap included.
    """
    c = fit or coefficients(chip_name)
    idle, peak = idle_and_peak(chip_name)
    work = c.busy + c.hbm * hbm_use
    for precision, use in flop_use.items():
        peak_rate(chip_name, precision)
        work = work + (c.flops_16 if precision == "bf16" else c.flops_8) * use
    return np.minimum(idle + peak * work, peak)


def chip_power(
    chip_name: str, busy: Any, flop_use: Mapping[str, Any] | None = None, hbm_use: Any = 0.0
) -> Any:
    """Mean watts of a chip whose kernels run for the share `busy` of the time.

    `flop_use` (by precision) and `hbm_use` are shares of the peak rates over all the time, such as
    the MFU. Raises ValueError for a share outside [0, 1], an unknown chip or precision."""
    uses = dict(flop_use or {})
    for name, share in {"busy": busy, "hbm_use": hbm_use, **uses}.items():
        if not np.all((np.asarray(share) >= 0) & (np.asarray(share) <= 1)):
            raise ValueError(
                f"{name} = {share} is not a share of the peak rate or of the time: give one in [0, "
                "1]"
            )
    rates = {name: share * peak_rate(chip_name, name) for name, share in uses.items()}
    hbm = hbm_use * hardware.chip(chip_name).hbm_bandwidth
    return step_energy(Activity(chip_name, 1, 1, 1.0, busy, rates, hbm), 0.0).chip_power


def _dynamic_joules(a: Activity, c: EnergyCoefficients) -> Any:
    """Joules of one chip above idle."""
    idle, peak = idle_and_peak(a.chip)
    span = peak - idle
    work = c.busy * peak * a.busy + c.hbm * peak / hardware.chip(a.chip).hbm_bandwidth * a.hbm_bytes
    for precision, flops in a.flops.items():
        share = c.flops_16 if precision == "bf16" else c.flops_8
        work = work + share * peak / peak_rate(a.chip, precision) * flops
    links = c.scale_up_joules * a.scale_up_bytes + c.scale_out_joules * a.scale_out_bytes
    return np.minimum(np.minimum(work, span * a.busy) + links, span * a.time)


def step_energy(
    a: Activity, node_host_power: Any = None, fit: EnergyCoefficients | None = None
) -> Energy:
    """Energy of a step on all its nodes.

    `node_host_power`: watts of a node beside its chips, such as `hardware.Nodes.host_power`; left
    out, `host_power`. `fit` replaces the shipped coefficients. Raises ValueError for a negative,
    infinite or NaN term, no time, busy > time, work without busy time, less than one chip or node,
    fewer chips than nodes, an unknown chip or precision, or a chip without published power."""
    _refuse(a, node_host_power)
    host = host_power(a.chips / a.nodes) if node_host_power is None else node_host_power
    idle, _ = idle_and_peak(a.chip)
    dynamic = _dynamic_joules(a, fit or coefficients(a.chip))
    chip = idle + dynamic / a.time
    return Energy(
        static_joules=a.nodes * host * a.time,
        idle_joules=a.chips * idle * a.time,
        dynamic_joules=a.chips * dynamic,
        mean_power_per_node=host + a.chips / a.nodes * chip,
        chip_power=chip,
    )


def _refuse(a: Activity, host: Any) -> None:
    terms = {
        f.name: getattr(a, f.name) for f in dataclasses.fields(a) if f.name not in ("chip", "flops")
    }
    terms |= {f"flops[{p}]": value for p, value in a.flops.items()} | {
        "host power": 0.0 if host is None else host
    }
    for name, value in terms.items():
        if not np.all(np.isfinite(value)) or np.any(np.asarray(value) < 0):
            raise ValueError(f"{name} = {value}: E = Σ coefficient·term needs finite terms ≥ 0")
    if np.any(np.asarray(a.time) <= 0) or np.any(np.asarray(a.busy) > a.time):
        raise ValueError(
            f"time = {a.time}, busy = {a.busy} s: a step needs 0 ≤ busy ≤ time and time > 0"
        )
    if a.nodes < 1 or a.chips < a.nodes:
        raise ValueError(
            f"{a.chips} chips on {a.nodes} nodes: every node needs ≥ 1 chip and there is ≥ 1 node"
        )
    work = sum(np.asarray(v, float) for v in (*a.flops.values(), a.hbm_bytes))
    if np.any((work > 0) & (np.asarray(a.busy) == 0)):
        raise ValueError(
            f"busy = {a.busy} s, yet there are FLOPs or HBM bytes: give the seconds in which "
            "kernels run"
        )
