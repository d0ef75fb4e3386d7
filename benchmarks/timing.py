"""What the benchmarks share: contenders called in turn, medians with intervals, and their table.

Rounds call every contender once, in random order, so that a neighbour's load hits all; figures are
medians with a bootstrap interval (95 %). Peak memory is the compiler's plan: arguments, results and
temporaries."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from fdp.count import aot
from fdp.study.report import versions

Program = tuple[Callable, tuple[Any, ...]]  # a compiled program, or a function, and its arguments
MODES = ("forward", "forward + backward")


def banner() -> str:
    """The device and the versions that the figures belong to."""
    device = jax.devices()[0]
    return (
        f"device    {device.device_kind} ({device.platform}), {os.cpu_count()} host cores\n"
        f"versions  {', '.join(f'{k} {v}' for k, v in versions().items())}"
    )


def compile_modes(call: Callable, arrays: tuple[Any, ...]) -> dict[str, Any]:
    """Both modes as compiled programs of the inputs of `call` and, last, the cotangent of its
    result."""

    def both(*arrays: Any) -> Any:
        out, back = jax.vjp(call, *arrays[:-1])
        return out, back(arrays[-1])

    functions = (lambda *arrays: call(*arrays[:-1])), both
    programs = (jax.jit(f).lower(*arrays).compile() for f in functions)
    return dict(zip(MODES, programs, strict=True))


def time_interleaved(programs: dict[str, Program], repeats: int) -> dict[str, np.ndarray]:
    """Seconds [repeats] of each program, all called once a round in random order, after one round
    unmeasured.
    """
    rng = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(repeats + 1):
        for name in rng.permutation(list(programs)):
            program, arrays = programs[name]
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds[name] += [time.perf_counter() - start] if i else []
    return {name: np.array(s) for name, s in seconds.items()}


def median_interval(values_N: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(median, low, high): the bootstrap interval of the median from 2000 resamples."""
    draws_RxN = np.random.default_rng(0).choice(values_N, (2000, values_N.size))
    low, high = np.quantile(np.median(draws_RxN, axis=1), ((1 - level) / 2, (1 + level) / 2))
    return float(np.median(values_N)), float(low), float(high)


def interval_text(values_N: np.ndarray) -> str:
    """`median_interval` for a table."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*median_interval(values_N))


def table(
    mode: str, programs: dict[str, Program], seconds: dict[str, np.ndarray], yardstick: str
) -> str:
    """Median, interval, speed relative to the yardstick (per round) and planned memory of every
    contender.
    """
    rows = []
    for name, s in seconds.items():
        program = programs[name][0]
        planned = hasattr(program, "memory_analysis")
        memory = f"{aot.memory(program).peak / 2**20:.1f}" if planned else "-"
        ratio = interval_text(seconds[yardstick] / s)
        rows.append((name, interval_text(1e3 * s), ratio, memory))
    headers = (mode, "ms", f"times as fast as {yardstick}", "peak MiB")
    return tabulate(
        rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "right")
    )
