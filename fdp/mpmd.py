"""A pipeline schedule as many programs: one for every stage and operation, on the stage's own mesh.

The host dispatches operations without waiting for them and sends messages between the stages'
groups of devices. There are no ticks: a stage goes on as soon as its input is there. Gradients are
reduced over the data axes once, after the last operation of a stage. The counterpart in one program
is `fdp.parallel.pipeline.executor`; whole training steps are `fdp.mpmd_steps`.

Legend: p stages, v chunks of a stage, V = p·v virtual stages, u one of them, m microbatches, k one
of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fdp import sharding
from fdp.collectives import psum, shard_map, vary
from fdp.experiment import Experiment
from fdp.grads import LOSS_AXES, Aux, plain
from fdp.mesh import DATA_AXES, abstract_mesh
from fdp.parallel.groups import DeviceGroups, divided
from fdp.parallel.pipeline.executor import Operations, blank
from fdp.parallel.pipeline.orders import Order
from fdp.parallel.pipeline.split import Halves
from fdp.parallel.pipeline.table import has_head, ticks
from fdp.step import TrainStep, chunked, stages

Array = jax.Array
P = PartitionSpec
TOTALS = ("loss", "aux", "layers", "grads")  # what a virtual stage adds up over its operations


class StagedPrograms:
    """An experiment in the virtual stages of an order.

    groups: stage0 … stage{p−1}, of the experiment's degrees without pp; by default consecutive
    devices of this process. Their `events` say what ran when.

    Raises ValueError for degrees that the order does not fit, and for operations S."""

    def __init__(self, experiment: Experiment, order: Order, groups: DeviceGroups | None = None):
        if has_head(order):
            raise ValueError(
                "the order has operations S, which all stages run in one program, and here each "
                "stage has its own: give the order without `with_head`, or use `scheduled(order)`"
            )
        self.order, self.count = order, len(order.placement.devices)
        p, pp = order.placement.p, experiment.degrees["pp"]
        if pp != p or p < 2:
            raise ValueError(
                f"an order of p={p} stages on mesh.pp={pp}: both must be equal, 2 at least"
            )
        self.step = one_stage(experiment, order)
        self.names = [f"stage{i}" for i in range(p)]
        self.groups = groups or divided(dict.fromkeys(self.names, self.step.experiment.degrees))

    def placed(self, variables: Any) -> list[Any]:
        """[V]: the variables of every virtual stage on the mesh of its stage: its layers, and all
        that is not stacked."""
        specs, found = self.step.specs.variable_specs(), []
        for u, i in enumerate(self.order.placement.devices):
            found.append(self.groups.place(part(self.step, variables, u), self.names[i], specs))
        return found


class StagedStep(StagedPrograms):
    """Loss and gradients of an experiment by an order of F, B, W and BW, equal to those of
    `TrainStep.grads` of the same experiment with `plain(m)` and pp = 1.

    Raises ValueError as `StagedPrograms`, and for an order that does not run."""

    def __init__(self, experiment: Experiment, order: Order, groups: DeviceGroups | None = None):
        self.tasks = ticks(order)
        super().__init__(experiment, order, groups)
        self._programs: Programs | None = None

    def whole(self, parts: Sequence[Any]) -> Any:
        """The gradients of all virtual stages as those of the whole model, on the host."""

        def one(meta: Any, *x: np.ndarray) -> np.ndarray:
            return np.concatenate(x) if meta.stacked else sum(x[1:], x[0])

        return jax.tree.map(one, self.step.specs.metas, *jax.device_get(list(parts)))

    def grads(self, variables: Any, noised: Any) -> tuple[Any, Any, Aux]:
        """As `TrainStep.grads`, of a whole corrupted batch; all results lie on the host."""
        loss, parts, aux = self.run(self.placed(variables), noised)
        return loss, self.whole(parts), aux

    def run(self, placed: Sequence[Any], noised: Any) -> tuple[Any, list[Any], Aux]:
        """(mean loss, gradients of every virtual stage on its stage, aux) of `placed` variables.
        Waits for loss and aux."""
        count = jnp.asarray(self.step.objective.count(noised))
        if self._programs is None:
            self._programs = Programs(self.step, placed[0], noised, count)
        run = StagedRun(self, self._programs, noised, count)
        for u, mine in enumerate(placed):
            run.begin(u, mine)
        for kind, u, k in self.tasks:  # inputs first
            run.operation(kind, u, k)
        loss, grads, aux, layers = zip(*map(run.reduced, range(self.count)), strict=True)
        loss, aux, layers = jax.device_get((loss, aux, layers))
        added = jax.tree.map(lambda *x: sum(x[1:], x[0]), *aux)
        return sum(loss), list(grads), added | jax.tree.map(lambda *x: np.concatenate(x), *layers)


def one_stage(experiment: Experiment, order: Order) -> TrainStep:
    """The step of one virtual stage, without pp. Its mesh has no devices: one trace serves all
    stages, and the arguments say where a program runs.

    Raises ValueError for a model whose virtual stages run unlike layers."""
    if hasattr(experiment.model, "stacks"):
        raise ValueError(
            f"virtual stages run unlike layers, {' and '.join(experiment.model.stacks)} of "
            f"{type(experiment.model).__name__}, but here the programs of one serve all: use a "
            "TrainStep with Experiment.grads=folded(order)"
        )
    one = replace(
        experiment,
        degrees={**experiment.degrees, "pp": 1},
        grads=plain(order.microbatches // order.steps),
        model=chunked(experiment.model, len(order.placement.devices)),
    )
    return TrainStep(one, abstract_mesh(one.degrees))


def part(step: TrainStep, variables: Any, u: int) -> Any:
    """The variables of virtual stage u of whole ones: its layers, and all that is not stacked.
    step: of one stage."""
    return sliced(variables, {"params": step.specs.shapes, "state": step.specs.model_shapes}, u)


def sliced(tree: Any, shapes: Any, u: int) -> Any:
    """The part of virtual stage u of a whole tree whose parts have these shapes."""

    def one(x: Any, like: Any) -> Any:
        n = like.shape[0] if like.shape else 0
        return x if x.shape == like.shape else x[u * n : (u + 1) * n]

    return jax.tree.map(one, tree, shapes)


class StagedRun:
    """One step: what is held of it, by virtual stage and microbatch. `begin` a virtual stage before
    its first operation. first: what events add to the number of a microbatch."""

    def __init__(
        self, staged: StagedPrograms, programs: "Programs", noised: Any, count: Any, first: int = 0
    ):
        self.groups, self.names, self.first = staged.groups, staged.names, first
        self.devices, self.last = staged.order.placement.devices, staged.count - 1
        self.programs = programs
        specs = sharding.batch_specs(noised, staged.step.objective.dims), P()
        given = [self.groups.place((noised, count), name, specs) for name in self.names]
        self.given = [given[i] for i in self.devices]
        self.placed: dict[int, Any] = {}
        self.params: dict[int, Any] = {}
        self.totals: dict[int, Any] = {}
        self.messages: dict[tuple[str, int, int], Any] = {}
        self.kept: dict[tuple[int, int], Any] = {}

    def begin(self, u: int, variables: Any) -> None:
        """The placed variables of virtual stage u in this step."""
        self.placed[u] = variables
        self.params[u], self.totals[u] = self.programs.start(variables["params"])

    def operation(self, kind: str, u: int, k: int) -> None:
        """Dispatch one operation, and send what it gives."""
        i = self.devices[u]
        program = self.programs.operation(kind, u == 0, u == self.last)
        message = self.messages.pop((kind, u, k), None)
        held = self.kept.pop((u, k), None)
        state, (noised, count) = self.placed[u]["state"], self.given[u]
        self.totals[u], out, kept = program(
            self.totals[u], self.params[u], state, noised, count, k, message, held
        )
        name = f"{kind}{self.first + k} of virtual stage {u}"
        self.groups.record(self.names[i], name, message, out)
        if kind != "W":
            self.kept[u, k] = kept
        to = u + 1 if kind == "F" else u - 1
        if kind == "F" and u == self.last:
            self.messages["B", u, k] = out
        elif kind != "W" and to >= 0:
            j = self.devices[to]
            far = i != j
            sent = self.groups.send(out, self.names[i], self.names[j]) if far else out
            self.messages[kind, to, k] = sent

    def reduced(self, u: int) -> tuple[Any, Any, Any, Any]:
        """(loss, gradients, aux, aux of the layers) of virtual stage u over its mesh."""
        return self.programs.reduce(self.placed[u]["params"], self.totals[u])


class Programs:
    """The programs of a stage, jitted. What they hand each other are values of single devices:
    arrays with a leading dim over the axes along which they vary."""

    def __init__(self, step: TrainStep, variables: Any, noised: Any, count: Any):
        self.step = step
        self.batch = sharding.batch_specs(noised, step.objective.dims)
        self._halves: Halves | None = None
        self._zeros: Any = None
        self.message: Any = None  # its type on one device
        self.types = self._types(variables, noised, count)
        totals = {name: self.types[name] for name in TOTALS}
        s, out = step.specs, step.specs.aux_specs
        self.start = self._jit(self._start, (s.stored,), (self.types["grads"], totals))
        aux = {name: {k: out[k] for k in self.types[name]} for name in ("aux", "layers")}
        self.reduce = self._jit(
            self._reduce, (s.stored, totals), (P(), s.stored, aux["aux"], aux["layers"])
        )
        self._made: dict[tuple[str, bool, bool], Any] = {}

    def _jit(self, body: Callable[..., Any], ins: Any, outs: Any, **how: Any) -> Any:
        return jax.jit(shard_map(body, self.step.mesh, ins, outs), **how)

    def operation(self, kind: str, first: bool, last: bool) -> Any:
        """(totals, parameters, state, batch, count, microbatch, message, what was kept) → (totals,
        message, what is kept). The totals are donated."""
        first, last = first and kind != "W", last and kind == "B"
        if (kind, first, last) not in self._made:
            t = self.types
            totals = {name: t[name] for name in TOTALS}
            message = None if kind == "W" or (kind == "F" and first) else t["message"]
            held = {"F": None, "B": t["residuals"], "W": t["stash"]}[kind]
            kept = {"F": t["residuals"], "B": t["stash"], "W": None}[kind]
            ins = (totals, t["grads"], self.step.specs.model_specs, self.batch, P(), P())

            def body(totals: Any, params: Any, *rest: Any) -> Any:
                return self._operation(kind, first, last, totals, params, *rest)

            out = t["loss"] if kind == "W" else t["message"]
            self._made[kind, first, last] = self._jit(
                body, (*ins, message, held), (totals, out, kept), donate_argnums=0
            )
        return self._made[kind, first, last]

    # Bodies, on one device
    # ---------------------------------------------------------------------------------------------

    def _types(self, variables: Any, noised: Any, count: Any) -> Any:
        """Specs of all that programs hand each other."""
        found: dict[str, Any] = {}

        def probe(variables: Any, noised: Any, count: Any, _: None) -> tuple[()]:
            params = self._gathered(variables["params"])
            do = self._operations(params, variables["state"], noised, count)
            self._halves, self.message = do.halves, jax.typeof(do.none["message"])
            self._zeros = {name: jax.tree.map(jax.typeof, do.none[name]) for name in TOTALS}
            found.update(jax.tree.map(lambda x: P(varying(x)), do.none))
            return ()

        jax.eval_shape(self.step.mapped(probe, noised, ()), variables, noised, count, None)
        return found

    def _gathered(self, stored: Any) -> Any:
        return vary(self.step.gather(stored), LOSS_AXES)

    def _operations(self, params: Any, state: Any, noised: Any, count: Any) -> Operations:
        step = self.step
        m = step.experiment.grads.microbatches
        parts = stages(
            step.model, step.objective, state, count, step.capacity, None, 1 / m, staged=True
        )
        split = jax.tree.map(lambda x: x.reshape(m, x.shape[0] // m, *x.shape[1:]), noised)
        return Operations(1, parts, params, None, vary(split, LOSS_AXES), self._halves)

    def _start(self, stored: Any) -> Any:
        """(parameters as the model takes them, zero totals)."""
        return _packed((self._gathered(stored), blank(self._zeros)))

    def _operation(
        self,
        kind: str,
        first: bool,
        last: bool,
        totals: Any,
        params: Any,
        state: Any,
        noised: Any,
        count: Any,
        k: Any,
        message: Any,
        held: Any,
    ) -> Any:
        totals, params, message, held = _unpacked((totals, params, message, held))
        do = self._operations(params, state, noised, count)
        if kind == "F":
            found = do.forward(k, 0, message, first)
            kept = found["residuals"]
        elif kind == "B":
            found = do.backward(k, 0, message, held, first, last)
            kept = found["stash"]
        else:
            found, kept = do.weights(0, held), None
        out = found.get("message", totals["loss"])
        return _packed((totals | _sums(totals, found), out, kept))

    def _reduce(self, stored: Any, totals: Any) -> Any:
        totals = _unpacked(totals)
        grads = jax.vjp(self._gathered, stored)[1](totals["grads"])[0]
        aux, layers = psum((totals["aux"], totals["layers"]), DATA_AXES)
        return psum(totals["loss"], LOSS_AXES), grads, aux, layers


def varying(x: Array) -> tuple[str, ...]:
    """Axes along which a value varies, in the order of the mesh."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(n for n in names if n in jax.typeof(x).mat.varying)


def _sums(totals: Any, found: Any) -> Any:
    """The totals that an operation adds to. It need not have all aux."""
    some = {name: found[name] for name in TOTALS if name in found}
    if "aux" in some:
        before = {name: totals["aux"][name] for name in some["aux"]}
        some["aux"] = totals["aux"] | jax.tree.map(jnp.add, before, some["aux"])
    rest = {name: x for name, x in some.items() if name != "aux"}
    return some | jax.tree.map(jnp.add, {name: totals[name] for name in rest}, rest)


def _packed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _unpacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)
