"""Training steps of a pipeline without a barrier between them, one program for every stage and
operation.

After the last W of a step a virtual stage reduces its gradients, updates its parameters (U) and
goes on with the microbatches of the next step, while others still work on this one. The global norm
that clips gradients is known only when all stages are there, and so is whether all gradients are
finite. Three ways to clip, the last of them by post-validation with rollback (Qi et al. 2023, arXiv
2401.10241, section 4):

barrier: each U waits for the squared norms of all stages. Exact.
delayed: each U clips by the norm of the step before, the first by none, and skips the update where
its own gradients are not finite. Not the same training.
validated: each U clips by nothing. The host dispatches the next step, reads the norm when it is
there, and waits for it before the next U. Where the norm clips or is not finite, all stages go back
to the parameters and moments before the step, update once more as behind a barrier, and run again
what of the next step was dispatched. Exact. Memory: parameters, moments and gradients of one step
more.

A step back is enough: a W of step k + 1 has the updates of step k of all stages before it, so no
stage updates twice before all have updated once.

A parameter that several virtual stages read has a part of its gradient on each. Then each U waits
for the last W of all stages, whatever clips, and adds the parts up: the next step could not start
without them. A DiT with adaLN reads time and label in every block and has such parameters; a
Transformer and a DiT in-context have none.

Legend: V virtual stages, u one of them, i a stage, K steps, k one of them, m microbatches of a
step."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from fdp.collectives import psum
from fdp.experiment import Experiment
from fdp.mpmd import Programs, StagedPrograms, StagedRun, sliced, varying
from fdp.parallel.groups import DeviceGroups
from fdp.parallel.pipeline.executor import blank
from fdp.parallel.pipeline.head import reads
from fdp.parallel.pipeline.orders import Order
from fdp.parallel.pipeline.table import STEPPED, Task, has_head, ticks
from fdp.state import TrainState
from fdp.step import TrainStep

Array = jax.Array
P = PartitionSpec
CLIPPINGS = ("barrier", "delayed", "validated")
STACKED = -1  # in place of the virtual stage that has a parameter: each has its layers


class Trained(NamedTuple):
    """What K steps gave. losses, norms f32 [K]: mean loss and global gradient norm. skipped bool
    [K]: not finite. rolled: the steps whose update was taken back. again: operations of steps after
    them that ran twice."""

    losses: np.ndarray
    norms: np.ndarray
    skipped: np.ndarray
    rolled: tuple[int, ...]
    again: int


class Held(NamedTuple):
    """Parameters and optimizer state of a virtual stage, on its mesh."""

    params: Any
    opt: Any


class StagedSteps(StagedPrograms):
    """K training steps of an experiment by an order of F, B, W, BW and U, such as
    `fdp.parallel.pipeline.orders.repeat` makes. With clipping by "barrier" or "validated" they
    equal `TrainStep.train_step` of the same experiment with `plain(m)` and pp = 1.

    shared: names of the parameters that several virtual stages read. clip: largest global norm; no
    program depends on it, so it may change between calls.

    Raises ValueError as `StagedPrograms`, for an order that does not run, for an optimizer whose
    rule is not elementwise, and for an experiment with rules, which read the whole model."""

    def __init__(self, experiment: Experiment, order: Order, groups: DeviceGroups | None = None):
        if not has_head(order):  # else `StagedPrograms` says what to do
            ticks(order, STEPPED)  # an order that does not run is refused before any trace
        if not experiment.optimizer.elementwise:
            raise ValueError(
                "the rule of Experiment.optimizer is not stated to be elementwise, and every stage "
                "runs it on its own parameters: use fdp.optimizer.adamw, or set "
                "Optimizer.elementwise=True if it treats every element by itself"
            )
        if experiment.rules:
            raise ValueError(
                f"{len(experiment.rules)} rules change the model state after a step of the whole "
                "model, and stages here go on by themselves; leave Experiment.rules empty"
            )
        super().__init__(experiment, order, groups)
        self.clip = experiment.optimizer.clip
        self.micro = order.microbatches // order.steps
        self.programs = StepPrograms(self.step, self.count)
        self.shared = self._shared_names()

    def waits(self, clipping: str) -> bool:
        """Whether an update waits for all stages. Raises ValueError for what is none of
        CLIPPINGS."""
        if clipping not in CLIPPINGS:
            raise ValueError(f"clipping={clipping!r}: choose one of {', '.join(CLIPPINGS)}")
        return clipping == "barrier" or bool(self.shared)

    def tasks(self, clipping: str) -> tuple[Task, ...]:
        """The operations in the order in which the host dispatches them."""
        return tuple(ticks(self.order, STEPPED, self.waits(clipping)))

    def _shared_names(self) -> tuple[str, ...]:
        leaves = jax.tree_util.tree_leaves_with_path(self.step.specs.shapes)
        paths = [path for path, _ in leaves]
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
        return tuple(names[n] for n in self.programs.shared)

    def held(self, state: TrainState) -> list[Held]:
        """[V]: the state's parameters and moments by virtual stage."""
        specs, found = self.step.specs, []
        shapes = Held(specs.shapes, jax.eval_shape(specs.tx.init, specs.shapes))
        stored = Held(specs.stored, specs.state_specs().opt_state)
        whole = Held(state.params, state.opt_state)
        for u, i in enumerate(self.order.placement.devices):
            found.append(self.groups.place(sliced(whole, shapes, u), self.names[i], stored))
        return found

    def whole(self, held: Sequence[Held]) -> Held:
        """Parameters and moments of all virtual stages as those of the whole model, on the host. Of
        one that is not stacked, that of a virtual stage which reads it."""
        specs = self.step.specs
        places = optax.tree_map_params(
            specs.tx,
            lambda _, owner: owner,
            jax.eval_shape(specs.tx.init, specs.shapes),
            self.programs.owners,
            transform_non_params=lambda _: 0,
        )

        def one(owner: int, *x: np.ndarray) -> np.ndarray:
            return np.concatenate(x) if owner == STACKED else x[owner]

        return jax.tree.map(one, Held(self.programs.owners, places), *jax.device_get(list(held)))

    def train(
        self, state: TrainState, noised: Sequence[Any], clipping: str = "barrier"
    ) -> tuple[TrainState, Trained]:
        """The state after a step with each of K corrupted batches, all arrays on the host.
        clipping: one of CLIPPINGS.

        Raises ValueError for another clipping, and for another number of batches than the order
        has steps."""
        tasks = self.tasks(clipping)
        if len(noised) != self.order.steps:
            raise ValueError(f"{len(noised)} batches for an order of {self.order.steps} steps")
        run = _StepsRun(self, clipping, self.held(state), state.model, noised)
        for task in tasks:
            run.dispatch(task)
        trained = run.trained()
        params, opt = self.whole(run.held)
        new = replace(
            state,
            step=state.step + self.order.steps,
            params=params,
            opt_state=opt,
            skipped=state.skipped + trained.skipped.sum(dtype=np.int32),
        )
        return new, trained


class _StepsRun:
    """K steps: the newest parameters of every virtual stage, and those before the last update."""

    def __init__(
        self,
        staged: StagedSteps,
        clipping: str,
        held: Sequence[Held],
        model: Any,
        noised: Sequence[Any],
    ):
        self.clipping, self.waits = clipping, staged.waits(clipping)
        self.staged, self.programs, self.noised = staged, staged.programs, noised
        self.groups, self.names = staged.groups, staged.names
        self.devices, self.count = staged.order.placement.devices, staged.count
        specs, place = staged.step.specs.model_specs, staged.groups.place
        models = [sliced(model, staged.step.specs.model_shapes, u) for u in range(self.count)]
        self.models = [
            place(x, self.names[i], specs) for x, i in zip(models, self.devices, strict=True)
        ]
        none = [np.float32(0)] * self.count
        self.none = [place(none, name, P()) for name in self.names]
        self.held, self.before = list(held), list(held)
        self.steps: dict[int, StagedRun] = {}
        self.losses: dict[int, dict[int, Any]] = defaultdict(dict)  # by step, virtual stage
        self.grads: dict[int, dict[int, Any]] = defaultdict(dict)
        self.squares: dict[int, dict[int, Any]] = defaultdict(dict)
        self.updated: dict[int, int] = defaultdict(int)
        self.settled = 0  # steps whose update stands
        self.early: list[Task] = []  # dispatched of the step after them
        self.rolled: list[int] = []
        self.again = 0
        for u in range(self.count):
            self._begin(0, u)

    def dispatch(self, task: Task) -> None:
        """An operation or an update, behind what the norm of the step before tells by now."""
        kind, u, n = task
        k = n if kind == "U" else n // self.staged.micro
        if self.updated[self.settled] == self.count and (kind == "U" or self._ready()):
            self._settle()
        if kind != "U":
            self._operation(task)
            if k > self.settled:
                self.early.append(task)
            return
        self._close(k, u)
        self._update(k, u)
        self.updated[k] += 1
        if self.updated[k] == self.count and self.clipping != "validated":
            self._settle()

    def trained(self) -> Trained:
        """What the steps gave, on the host. Waits for them."""
        if self.settled < len(self.noised):
            self._settle()
        found = [self._told(k) for k in range(len(self.noised))]
        losses = np.array([losses for losses, _ in found], np.float32).sum(1)
        norms = np.array([_norm(squares) for _, squares in found], np.float32)
        skipped = ~(np.isfinite(losses) & np.isfinite(norms))
        return Trained(losses, norms, skipped, tuple(self.rolled), self.again)

    def _begin(self, k: int, u: int) -> None:
        """Virtual stage u goes on with step k."""
        if k == len(self.noised):
            return
        if k not in self.steps:
            count = jnp.asarray(self.staged.step.objective.count(self.noised[k]))
            first = k * self.staged.micro
            self.steps[k] = StagedRun(self.staged, self.programs, self.noised[k], count, first)
        self.steps[k].begin(u, {"params": self.held[u].params, "state": self.models[u]})

    def _operation(self, task: Task) -> None:
        kind, u, n = task
        k, microbatch = divmod(n, self.staged.micro)
        self.steps[k].operation(kind, u, microbatch)

    # Updates
    # ---------------------------------------------------------------------------------------------

    def _close(self, k: int, u: int) -> None:
        """Reduce the gradients of virtual stage u over its mesh; where updates wait, of all."""
        if u in self.grads[k]:
            return
        of = range(self.count) if self.waits else (u,)
        for w in of:
            self.losses[k][w], self.grads[k][w], *_ = self.steps[k].reduced(w)
        if self.staged.shared:
            self._add_shared(self.grads[k])
        for w in of:
            self.squares[k][w] = self.programs.square(self.grads[k][w], w == 0)

    def _add_shared(self, grads: dict[int, Any]) -> None:
        """Add up the gradients that several virtual stages have parts of, on the first stage."""
        names = self.names
        parts = [self.programs.shared_of(grads[u]) for u in range(self.count)]
        sent = [
            self.groups.send(x, names[i], names[0]) if i else x
            for x, i in zip(parts, self.devices, strict=True)
        ]
        total = self.programs.add(sent)
        there = [total, *(self.groups.send(total, names[0], name) for name in names[1:])]
        for u, i in enumerate(self.devices):
            grads[u] = self.programs.with_shared(grads[u], there[i])

    def _update(self, k: int, u: int, again: bool = False) -> None:
        """U. again: by what all stages have told."""
        i, clipping = self.devices[u], self.clipping
        squares, finite = self.none[i], self.none[i] * 2
        if clipping == "barrier" or again:
            squares = self._at(self.squares[k], i)
            finite = squares + self._at(self.losses[k], i)
        elif clipping == "delayed":
            squares = self._at(self.squares[k - 1], i) if k else squares
            finite = [self.squares[k][u], self.losses[k][u]] * self.count  # one program for all
        if not again:
            self.before[u] = self.held[u]
        before, grads = self.before[u], self.grads[k][u]
        self.held[u] = Held(
            *self.programs.update(*before, grads, squares, finite, self.staged.clip)
        )
        self.groups.record(self.names[i], f"U{k} of virtual stage {u}", squares, self.held[u])
        self._begin(k + 1, u)

    def _at(self, values: dict[int, Array], i: int) -> list[Array]:
        """[V]: scalars of all virtual stages, on stage i."""
        to = self.names[i]
        return [
            values[u] if j == i else self.groups.send(values[u], self.names[j], to)
            for u, j in enumerate(self.devices)
        ]

    def _told(self, k: int) -> tuple[list[Any], list[Any]]:
        """(losses, squared norms) of step k by virtual stage, on the host. Waits for them."""
        found = jax.device_get((self.losses[k], self.squares[k]))
        return [found[0][u] for u in range(self.count)], [found[1][u] for u in range(self.count)]

    def _ready(self) -> bool:
        told = *self.losses[self.settled].values(), *self.squares[self.settled].values()
        return all(x.is_ready() for x in told)

    def _settle(self) -> None:
        """All stages have updated: take it back where the norm clips."""
        k, early = self.settled, self.early
        self.settled, self.early = k + 1, []
        if self.clipping == "validated":
            losses, squares = self._told(k)
            if not (_norm(squares) < self.staged.clip and np.isfinite(losses).all()):
                self._roll_back(k, early)
        self.steps.pop(k)
        self.grads.pop(k)
        self.before = list(self.held)

    def _roll_back(self, k: int, early: Sequence[Task]) -> None:
        """Update once more, and run again what was dispatched of the next step."""
        self.rolled.append(k)
        self.again += len(early)
        self.steps.pop(k + 1, None)
        for u in range(self.count):
            self._update(k, u, again=True)
        for task in early:
            self._operation(task)


def _norm(squares: Sequence[Any]) -> float:
    """Root of a sum of f32, in f32 as on devices; not finite without a warning."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.array(squares, np.float32).sum()))


class StepPrograms(Programs):
    """The programs of a stage with its update.

    owners: of each parameter a virtual stage that reads it, or STACKED. shared: numbers, among the
    leaves, of those that several of V read."""

    def __init__(self, step: TrainStep, stages: int):
        e, s = step.experiment, step.specs
        variables = {"params": s.shapes, "state": s.model_shapes}
        noised = e.noised_example(e.fit.batch)
        count = jax.eval_shape(lambda x: jnp.asarray(step.objective.count(x)), noised)
        super().__init__(step, variables, noised, count)
        self.owners, self.shared = self._readers(stages, variables, noised, count)
        stored, opt = jax.tree.leaves(s.stored), s.state_specs().opt_state
        shared = [stored[n] for n in self.shared]
        self.add = self._jit(_added, ([shared] * stages,), shared)
        whole, rest = (functools.partial(self._square, own) for own in (True, False))
        self._squares = {
            True: self._jit(whole, (s.stored,), P()),
            False: self._jit(rest if self.shared else whole, (s.stored,), P()),
        }
        update = (s.stored, opt, s.stored, P(), P(), P())
        self.update = self._jit(self._update, update, (s.stored, opt))

    def square(self, grads: Any, own: bool) -> Array:
        """Squared norm of a virtual stage's gradients, shared ones only where they are its own."""
        return self._squares[own](grads)

    def shared_of(self, grads: Any) -> list[Array]:
        """The gradients that several virtual stages have parts of."""
        leaves = jax.tree.leaves(grads)
        return [leaves[n] for n in self.shared]

    def with_shared(self, grads: Any, found: Sequence[Array]) -> Any:
        """Gradients with these in their place."""
        leaves, tree = jax.tree.flatten(grads)
        for n, x in zip(self.shared, found, strict=True):
            leaves[n] = x
        return jax.tree.unflatten(tree, leaves)

    def _readers(self, stages: int, *given: Any) -> tuple[Any, tuple[int, ...]]:
        """`owners` and `shared`, from what the first, every and the last virtual stage read."""
        found: list[list[bool]] = []

        def probe(variables: Any, noised: Any, count: Any, _: None) -> tuple[()]:
            params = self._gathered(variables["params"])
            do = self._operations(params, variables["state"], noised, count)
            one, x = jax.tree.map(lambda a: a[0], do.batches), blank(do.x)
            found.extend(
                (
                    reads(lambda p: do.stages.embed(p, one), params),
                    reads(lambda p: do.stages.stack(p, x, one), params),
                    reads(lambda p: do.stages.score(p, x, one), params),
                )
            )
            return ()

        jax.eval_shape(self.step.mapped(probe, given[1], ()), *given, None)
        metas, tree = jax.tree.flatten(self.step.specs.metas)
        owners, shared = [], []
        for n, (meta, first, every, last) in enumerate(zip(metas, *found, strict=True)):
            owners.append(STACKED if meta.stacked else stages - 1 if last and not first else 0)
            if not meta.stacked and (every or (first and last)):
                shared.append(n)
        return jax.tree.unflatten(tree, owners), tuple(shared)

    # Bodies, on one device
    # ---------------------------------------------------------------------------------------------

    def _square(self, own: bool, grads: Any) -> Array:
        """A parameter that no stage but others read has no gradient, so all are counted."""
        sums: dict[tuple[str, ...], Array] = {}  # by the axes over which a sum varies
        for n, x in enumerate(jax.tree.leaves(grads)):
            if own or n not in self.shared:
                axes, square = varying(x), jnp.square(x.astype(jnp.float32)).sum()
                sums[axes] = sums.get(axes, jnp.zeros(())) + square
        return sum((psum(x, axes) for axes, x in sums.items()), jnp.zeros(()))

    def _update(
        self,
        stored: Any,
        opt: Any,
        grads: Any,
        squares: Sequence[Array],
        finite: Sequence[Array],
        clip: Array,
    ) -> tuple[Any, Any]:
        """(parameters, optimizer state) after the update, or as they were unless the sum of
        `finite` is. squares: whose sum is that of the norm that clips; none where it is not
        finite. A stage updates parameters that it does not read too, and nobody reads them."""
        norm, ok = jnp.sqrt(sum(squares)), jnp.isfinite(sum(finite))
        norm = jnp.where(jnp.isfinite(norm), norm, 0.0)
        rule = self.step.experiment.optimizer
        updates, new = rule.apart(self.step.specs.metas, grads, opt, stored, norm, clip)
        params = optax.apply_updates(stored, updates)

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(ok, new, old)

        return jax.tree.map(keep, (params, new), (stored, opt))


def _added(parts: Sequence[Sequence[Array]]) -> list[Array]:
    return [sum(x[1:], x[0]) for x in zip(*parts, strict=True)]
