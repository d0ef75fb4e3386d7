"""The simulator against a real run: two stages of a DiT, each a process of its own on one core.

Op costs are measured in the same processes, one stage at a time; with them the simulator plays the
orders that the processes then run together.

Legend: V virtual stages, u one of them, m microbatches, k one of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fdp import config, sharding
from fdp.data.images import blank_images
from fdp.experiment import Experiment, standard
from fdp.mesh import make_mesh
from fdp.mpmd import Programs, one_stage, part
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.fixed import one_f_one_b, skip_wave, zb_h1, zbv
from fdp.parallel.pipeline.orders import Order, split_backward
from fdp.parallel.pipeline.stage_process import Operation, StageProcesses, StageRun
from fdp.step import TrainStep

KINDS = ("F", "B", "W")
# 256 tokens of width 192: an operation takes tens of milliseconds, a message 0.4 MB.
SHAPE = {
    "model.kind": "dit",
    "model.layers": 8,
    "model.width": 192,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.head_dim": 48,
    "model.ffn": 768,
    "model.image.size": 32,
    "model.image.patch": 2,
}


def orders(m: int = 8) -> dict[str, Order]:
    """Of two stages and m microbatches, all with B and W as two operations."""
    return {
        "1F1B": split_backward(one_f_one_b(2, m)),
        "H1": zb_h1(2, m),
        "ZBV": zbv(2, m),
        "wave": split_backward(skip_wave(2, m)),
    }


@dataclass(frozen=True)
class DiTStage:
    """Operations of a stage in JAX (`fdp.parallel.pipeline.stage_process.Make`).

    changes: of the base config. images: of a microbatch. All processes draw the same parameters
    and images."""

    changes: Mapping[str, Any]
    images: int = 2
    made: dict[Any, "_OwnStage"] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, stage: int, order: Order) -> dict[str, Any]:
        """As `Make`; compiles, once for orders of one placement. "result": loss and squared
        gradients of the layers."""
        key = order.placement, order.microbatches
        if key not in self.made:
            self.made[key] = _OwnStage(self._experiment(order), stage, order)
        made = self.made[key]
        found = {kind: made.operation(kind) for kind in KINDS}
        for u in order.placement.stages[stage]:
            for kind in KINDS:
                found[kind](u, 0, None)
        made.result()
        return {**found, "result": made.result}

    def message(self) -> np.ndarray:
        """An array of the size of a message."""
        c = self._config()
        tokens = (c.model.image.size // c.model.image.patch) ** 2
        return np.zeros((1, self.images, tokens, c.model.width), np.float32)

    def _experiment(self, order: Order) -> Experiment:
        c = self._config()
        c.train.microbatches = order.microbatches
        c.train.batch = self.images * order.microbatches
        return standard(c, blank_images(c.model.image.size, c.model.image.channels))

    def _config(self) -> ConfigDict:
        c = config.base()
        c.objective.name, c.data.source = "flow", "blank"
        c.update_from_flattened_dict(dict(self.changes))
        return c


class _OwnStage:
    """Arrays and programs of one stage on this process's device."""

    def __init__(self, experiment: Experiment, stage: int, order: Order):
        self.step = one_stage(experiment, order)
        self.last = len(order.placement.devices) - 1
        mesh = make_mesh(self.step.experiment.degrees, jax.local_devices()[:1])
        variables, noised = _drawn(self.step, self.last + 1)
        self.count = np.asarray(experiment.objective.count(noised))
        at = sharding.shardings(mesh, self.step.specs.variable_specs())
        self.variables = {
            u: jax.device_put(part(self.step, variables, u), at)
            for u in order.placement.stages[stage]
        }
        batch = sharding.batch_specs(noised, experiment.objective.dims)
        self.noised = jax.device_put(noised, sharding.shardings(mesh, batch))
        some = next(iter(self.variables.values()))
        self.programs = Programs(self.step, some, self.noised, self.count)
        self.where = sharding.shardings(mesh, self.programs.types["message"])
        shape = (1, *self.programs.message.shape)
        self.example = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
        self.start()

    def start(self) -> None:
        """Zero totals, nothing kept."""
        self.totals: dict[int, Any] = {}
        self.params: dict[int, Any] = {}
        self.kept: dict[tuple[int, int], Any] = {}
        self.own: dict[int, Any] = {}
        for u, v in self.variables.items():
            self.params[u], self.totals[u] = self.programs.start(v["params"])

    def operation(self, kind: str) -> Operation:
        """The operation of a kind, which waits for its results."""

        def run(u: int, k: int, message: Any) -> Any:
            program = self.programs.operation(kind, u == 0, u == self.last)
            program_reads = kind == "B" or (kind == "F" and u > 0)
            if kind == "B" and u == self.last:
                given = self.own.pop(k)
            elif program_reads:
                message = self.example if message is None else message
                given = jax.device_put(message, self.where)
            else:
                given = None
            held = None if kind == "F" else self.kept.pop((u, k))
            self.totals[u], out, self.kept[u, k] = jax.block_until_ready(
                program(
                    self.totals[u],
                    self.params[u],
                    self.variables[u]["state"],
                    self.noised,
                    self.count,
                    k,
                    given,
                    held,
                )
            )
            if kind == "F" and u == self.last:
                self.own[k] = out
            return None if kind == "W" else np.asarray(out)

        return run

    def result(self) -> dict[str, float]:
        """Sums over this stage since the last call."""
        layers = [t["grads"]["layers"] for t in self.totals.values()]
        found = {
            "loss": sum(float(t["loss"].sum()) for t in self.totals.values()),
            "squares": sum(float((x**2).sum()) for x in jax.tree.leaves(layers)),
        }
        self.start()
        return found


def _drawn(step: TrainStep, virtual: int) -> tuple[Any, Any]:
    """(whole variables, corrupted batch), the same in every process. Drawn as they are: DiT's own
    initial values are zero where its gradients would be interesting, and take longer.

    step: of one of `virtual` stages."""
    draw = np.random.default_rng(0)
    specs, e = step.specs, step.experiment

    def weight(x: Any, meta: Any) -> np.ndarray:
        layers = virtual * x.shape[0] if meta.stacked else None
        shape = x.shape if layers is None else (layers, *x.shape[1:])
        return draw.normal(0, 0.05, shape).astype(x.dtype)

    def value(x: Any) -> np.ndarray:
        real = np.issubdtype(x.dtype, np.floating)
        return draw.uniform(0.1, 1, x.shape).astype(x.dtype) if real else np.zeros(x.shape, x.dtype)

    params = jax.tree.map(weight, specs.shapes, specs.metas)
    noised = jax.tree.map(value, e.noised_example(e.fit.batch))
    return {"params": params, "state": {}}, noised


# Measuring
# -------------------------------------------------------------------------------------------------


def cores() -> int:
    """Of this process."""
    mine = getattr(os, "sched_getaffinity", None)
    return len(mine(0)) if mine else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """Variables of a process that computes on one core."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": flags.strip()}


def measured(
    orders: Mapping[str, Order],
    make: DiTStage | None = None,
    repeats: int = 5,
    timeout: float = 120.0,
) -> dict[str, Any]:
    """Plays orders of two stages in processes and in the simulator. Plain data:

    cores; load: of the machine, mean of the minute before; send: seconds of a message; rows: of
    each order its name, costs (seconds by kind and virtual stage, medians over microbatches and
    repeats of what a stage takes alone), spread (of those, largest relative interquartile range),
    simulated and measured seconds, error (relative, of the measured median), and the loss and
    squared gradients of the layers, which must not depend on the order; error: the median of all.

    Repeats are interleaved, so that a load from outside meets costs and runs alike. It takes two
    idle cores to mean something. Raises StageError for a stage that dies or hangs."""
    make = make or DiTStage(SHAPE)
    load = os.getloadavg()[0]
    alone: dict[str, list[StageRun]] = {name: [] for name in orders}
    together: dict[str, list[StageRun]] = {name: [] for name in orders}
    with StageProcesses(orders, make, timeout, environment=environment(), pin=True) as stages:
        for name in orders:
            stages.prepare(name)
        send = stages.message_seconds(make.message())
        for _ in range(repeats):
            for name in orders:
                alone[name] += [stages.alone(name, i) for i in range(stages.p)]
                together[name].append(stages.run(name))
    rows = [_row(name, order, alone[name], together[name], send) for name, order in orders.items()]
    return {
        "cores": cores(),
        "load": load,
        "send": send,
        "rows": rows,
        "error": median(row["error"] for row in rows),
    }


def _row(
    name: str, order: Order, alone: list[StageRun], together: list[StageRun], send: float
) -> dict[str, Any]:
    count = len(order.placement.devices)
    taken: dict[tuple[str, int], list[float]] = {(k, u): [] for k in KINDS for u in range(count)}
    for ran in (ran for run in alone for ran in run.ran):
        taken[ran.kind, ran.virtual].append(ran.end - ran.begin)
    costs: dict[str, Any] = {k: [median(taken[k, u]) for u in range(count)] for k in KINDS}
    low_high = [np.percentile(x, (25, 75)) / median(x) for x in taken.values()]
    simulated = evaluate(order, Costs(**costs, send=send)).makespan
    seconds = [run.makespan for run in together]
    return {
        "order": name,
        "costs": costs,
        "spread": float(max(high - low for low, high in low_high)),
        "simulated": simulated,
        "measured": seconds,
        "error": abs(simulated / median(seconds) - 1),
        "loss": sum(result["loss"] for result in together[0].results),
        "squares": sum(result["squares"] for result in together[0].results),
    }
