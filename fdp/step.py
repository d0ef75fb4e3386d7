"""The train step and the evaluation step: one shard_map over all five axes, then the optimizer on
global arrays.

Legend: B global batch, N periods of the model's stack.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from fdp import sharding
from fdp.collectives import psum, shard_map
from fdp.config import UserError
from fdp.experiment import Experiment
from fdp.grads import LOSS_AXES, Aux, Penalty, Skips, Stages, relay
from fdp.mesh import DATA_AXES, AnyMesh, factor
from fdp.models import module
from fdp.objectives.base import Objective
from fdp.parallel.context import layouts
from fdp.parallel.pipeline.folded import check_stacks, folded
from fdp.state import StateSpecs, TrainState

P = PartitionSpec


def stages(
    model: module.Module,
    objective: Objective,
    model_state: Any,
    count: Any,
    capacity: int | None = None,
    inputs_N: Any = None,
    share: float = 1.0,
    staged: bool = False,
) -> Stages:
    """The stages of a model and its objective. `score` divides the summed loss by `count`.

    `inputs_N`: layer inputs, a pytree whose leading dim is the periods of the stack. `share`: of
    the microbatch in its step, by which penalties and means are multiplied; 0 leaves penalties out,
    as an evaluation does."""

    def run(params: Any, *args: Any, method: str) -> tuple[Any, Aux, Penalty]:
        variables = {"params": params, "state": model_state}
        out, aux, penalty = module.learn(model, variables, *args, method=method, share=share)
        return out, aux, penalty if share else None

    first, middle = ("start", "blocks") if staged else ("embed", "stack")

    def stack(params: Any, x: Any, noised: Any) -> tuple[Any, Aux, Penalty]:
        more = () if inputs_N is None else (inputs_N,)
        return run(params, x, noised, *more, method=middle)

    def score(params: Any, x: Any, noised: Any) -> tuple[jax.Array, Aux, Penalty]:
        if staged:
            x = run(params, x, noised, method="finish")[0]
        x, rows = objective.rows(x, noised, capacity)
        outputs, aux, penalty = run(params, x, method="outputs")
        return objective.loss(outputs, rows).sum() / count, aux, penalty

    def embed(params: Any, noised: Any) -> tuple[Any, Aux, Penalty]:
        return run(params, noised, method=first)

    def refine(params: Any, noised: Any) -> Any:
        def predict(noised: Any) -> Any:
            x = stack(params, embed(params, noised)[0], noised)[0]
            return jax.lax.stop_gradient(run(params, x, method="outputs")[0])

        return objective.refine(predict, noised)

    shape = getattr(model, "shape", None)
    vocabulary = ("head",) if "pp" in getattr(shape, "vocab_axes", ()) else ()
    skips = _skips(run) if staged and hasattr(model, "stacks") else None
    return Stages(embed, stack, score, objective.parts, refine, vocabulary, skips)


def _skips(run: Callable[..., tuple[Any, Aux, Penalty]]) -> Skips:
    """Of a model of two stacks and a middle."""

    def rise(params: Any, x: Any, noised: Any) -> tuple[Any, Aux, Penalty]:
        return run(params, x, noised, method="first_half")

    def middle(params: Any, x: Any, noised: Any) -> tuple[Any, Aux, Penalty]:
        return run(params, x, noised, method="middle_block")

    def fall(params: Any, given: Any, noised: Any) -> tuple[Any, Aux, Penalty]:
        x, skips = given
        return run(params, x, noised, skips, method="second_half")

    return Skips(rise, middle, fall)


def chunked(model: module.Module, chunks: int) -> module.Module:
    """The model of one chunk of a device's layers."""
    shape = model.shape
    return model.clone(shape=replace(shape, layers=shape.layers // chunks))


def mean_loss(
    model: module.Module, objective: Objective, variables: Any, noised: Any, inputs_N: Any = None
) -> jax.Array:
    """Mean loss of a whole corrupted batch on one device; every row goes through the output
    head."""
    count = objective.count(noised)
    parts = stages(model, objective, variables["state"], count, None, inputs_N)
    return parts.loss(variables["params"], noised)[0]


class TrainStep:
    """The pure functions of an experiment on a mesh: `train_step`, `eval_step`, `grads`.

    `inputs`: PartitionSpecs of layer inputs, such as communication plans or lists of key blocks of
    every layer. Their leading dim is the periods of the stack, and the functions take them as the
    last argument. Raises UserError for an experiment that this mesh cannot run."""

    def __init__(self, experiment: Experiment, mesh: AnyMesh, inputs: Any = None):
        e = self.experiment = experiment
        self.mesh, self.inputs = _factored(e.model, mesh), inputs
        self.objective, self.dims = e.objective, e.data.dims
        self._check()
        self.specs = StateSpecs(e, self.mesh)
        self.plain = e.model  # parameters are initialised whole, under jit with out_shardings
        self.model = e.model
        if e.zero == 3:
            self.model = e.model.clone(gather=sharding.LayerGather(self.specs.stored))
        self.capacity = self._capacity()
        self._train: Any = None
        self._eval: Any = None

    def _check(self) -> None:
        e, degrees = self.experiment, dict(self.experiment.degrees)
        ways = {**degrees, "dp": degrees["dp"] * e.grads.microbatches}
        try:
            sharding.check_dims(e.batch_example(e.fit.batch), self.dims, ways)
            if degrees["pp"] > 1:
                self._check_stages()
            if hasattr(e.model, "check"):
                # A microbatch of a pipeline has one class of the examples that a device has.
                pieces = 1 if degrees["pp"] > 1 else e.grads.microbatches
                shards = degrees["dp"] * degrees["ep"] * pieces
                e.model.check(e.fit.batch // shards, e.noised_example(), degrees)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _check_stages(self) -> None:
        """Raises ValueError for a model without stages, and for samples that run twice."""
        e = self.experiment
        check_stacks(e.model, e.grads, e.degrees["pp"])
        if not hasattr(e.model, "finish"):
            raise ValueError(
                f"mesh.pp={e.degrees['pp']}: {type(e.model).__name__} offers no `start`, `blocks` "
                "and `finish` to cut into stages; set mesh.pp=1"
            )
        shape = getattr(e.model, "shape", None)
        axes = getattr(shape, "vocab_axes", None)
        reduced = getattr(e.objective, "axes", axes)
        if axes != reduced:
            raise ValueError(
                f"the model's shape shards the vocabulary over vocab_axes={axes}, the objective "
                f"reduces over axes={reduced}: give both the same"
            )
        if "pp" in (axes or ()):
            self._check_vocabulary(shape)
        example = e.noised_example()
        costs = example.get("cost") if isinstance(example, dict) else None
        if costs is not None and any(cost.twice for cost in costs.classes):
            raise ValueError(
                f"mesh.pp={e.degrees['pp']}: a pipeline runs no sample twice; set mesh.pp=1 or "
                "model.image.self_conditioning=False"
            )

    def _check_vocabulary(self, shape: Any) -> None:
        """Raises ValueError for an output head that the devices of pp cannot share."""
        pp, tp = (self.experiment.degrees[axis] for axis in ("pp", "tp"))
        if shape.tied:
            raise ValueError(
                f"vocab_axes={shape.vocab_axes} shards the output head over pp, and tied=True "
                "gives it the weights of the embedding, which the first stage alone reads: set "
                "tied=False"
            )
        if shape.vocab % (pp * tp):
            raise ValueError(
                "the vocabulary is not divisible by the devices that share the head: vocab % "
                f"(pp·tp) = {shape.vocab} % ({pp}·{tp}); set vocab="
                f"{-(-shape.vocab // (pp * tp)) * pp * tp}"
            )

    def _capacity(self) -> int | None:
        """Rows per device and microbatch that can carry loss; None: all rows go through the output
        head."""
        e = self.experiment
        shards = e.degrees["dp"] * e.degrees["ep"] * e.grads.microbatches
        length = e.data.seq_len
        if not length:
            return None
        return e.objective.capacity(e.fit.batch, length, shards, e.degrees["cp"])

    def init(self, seed: int) -> TrainState:
        """A fresh state, created in place on the mesh: the same values on every mesh and for every
        ZeRO stage.
        """
        return self.specs.init(self.plain, seed)

    def mapped(self, f: Callable[..., Any], noised: Any, out_specs: Any) -> Callable[..., Any]:
        """`f` of this device's (stored variables, corrupted batch, count, layer inputs), over the
        mesh."""
        batch = sharding.batch_specs(noised, self.objective.dims)
        in_specs = (self.specs.variable_specs(), batch, P(), self.inputs)  # count: everywhere
        return shard_map(f, self.mesh, in_specs, out_specs)

    def corrupt(self, batch: Any, key: jax.Array) -> Any:
        """The corrupted batch, drawn on global arrays: equal on every mesh for equal keys.

        Positions are in the order of the model's sequence layout. Targets were shifted before, so
        the neighbour of a position there need not be the next token."""
        noised = self.objective.corrupt(key, batch)
        specs = sharding.batch_specs(noised, self.objective.dims)
        layout = getattr(self.model, "layout", layouts.CONTIGUOUS)

        def order(x: jax.Array, spec: PartitionSpec) -> jax.Array:
            cp = self.experiment.degrees["cp"]
            return layouts.permute(x, layout, cp, spec.index("cp")) if "cp" in spec else x

        noised = jax.tree.map(order, noised, specs)
        return jax.lax.with_sharding_constraint(noised, sharding.shardings(self.mesh, specs))

    def grads(
        self, variables: Any, noised: Any, inputs_N: Any = None
    ) -> tuple[jax.Array, Any, Aux]:
        """(mean loss, gradients in the stored layout, aux summed over the data axes) of one global
        batch; the loss is in nats per token for tokens."""
        module.check_leaves(variables["params"], self.specs.shapes)
        module.check_leaves(variables["state"], self.specs.model_shapes, "state arrays")
        count = self.objective.count(noised)
        if isinstance(count, int) and count < 1:
            raise UserError(f"the loss of this batch has count {count}: nothing to divide it by")
        static = isinstance(count, int)  # then it is a constant of the program
        out = (P(), self.specs.stored, self.specs.aux_specs)
        local = functools.partial(self._local_grads, count if static else None)
        mapped = self.mapped(local, noised, out)
        return mapped(variables, noised, None if static else count, inputs_N)

    def gather(self, params: Any) -> Any:
        """Parameters as the model takes them, of this device's stored ones (ZeRO)."""
        s = self.specs
        return sharding.gather(params, s.stored, s.metas, s.zero)

    def _local_grads(
        self, static: int | None, variables: Any, noised: Any, count: Any, inputs_N: Any
    ) -> Any:
        count = static or count
        params, gather_vjp = jax.vjp(self.gather, variables["params"])
        pp, chunks = self.experiment.degrees["pp"], getattr(self.experiment.grads, "chunks", 1)
        parts = stages(
            self.model if chunks == 1 else chunked(self.model, chunks),
            self.objective,
            variables["state"],
            count,
            self.capacity,
            inputs_N,
            1 / self.experiment.grads.microbatches,
            pp > 1,
        )
        loss, grads, aux = self.experiment.grads(parts, params, noised)
        return psum(loss, LOSS_AXES), gather_vjp(grads)[0], psum(aux, DATA_AXES)

    def head_rows(self) -> int:
        """Rows per device and microbatch that the output head computes, for a token model."""
        e, d = self.experiment, self.experiment.degrees
        ways = d["dp"] * d["ep"] * d["cp"] * e.grads.microbatches
        local = e.fit.batch * (e.data.seq_len or 1) // ways
        return local if self.capacity is None else min(self.capacity, local)

    def train_step(
        self, state: TrainState, batch: Any, inputs_N: Any = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step. After a non-finite loss or gradient, parameters, moments and model
        state stay unchanged."""
        with jax.named_scope("corrupt"):
            noised = self.corrupt(batch, jax.random.fold_in(state.key, state.step))
        loss, grads, aux = self.grads(state.variables, noised, inputs_N)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.specs.tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        model = state.model
        for rule in self.experiment.rules:
            model = rule(model, aux, state.step)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(finite, new, old)

        new = TrainState(
            step=state.step + 1,
            key=state.key,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            skipped=state.skipped + (~finite).astype(jnp.int32),
            model=jax.tree.map(keep, model, state.model),
        )
        rate = self.experiment.optimizer.learning_rate(state.step)
        metrics = {"loss": loss, "grad_norm": norm, "lr": rate, "skipped": new.skipped}
        return new, metrics | named(aux)

    def eval_step(
        self, variables: Any, batch: Any, index: jax.Array, inputs_N: Any = None
    ) -> tuple[jax.Array, Any]:
        """(summed loss, count) of validation batch `index`. Its noise depends on `index` only."""
        key = jax.random.fold_in(jax.random.key(1_000_003), index)
        noised = self.corrupt(batch, key)

        def local(variables: Any, noised: Any, _: Any, inputs_N: Any) -> jax.Array:
            params = self.gather(variables["params"])
            given = self.model, self.objective, variables["state"], 1, None, inputs_N, 0.0
            if self.experiment.degrees["pp"] > 1:
                if isinstance(self.experiment.grads, folded):
                    params = self.experiment.grads.placed(params)
                return psum(relay(stages(*given, True), params, noised), LOSS_AXES)
            return psum(stages(*given).loss(params, noised)[0], LOSS_AXES)

        total = self.mapped(local, noised, P())(variables, noised, None, inputs_N)
        return total, self.objective.count(noised)

    def batch_shardings(self) -> Any:
        """Shardings of a batch."""
        example = self.experiment.batch_example()
        return sharding.shardings(self.mesh, sharding.batch_specs(example, self.dims))

    def abstract_arguments(self) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
        """Shapes and shardings of the train step's state and batch."""
        batch = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.experiment.batch_example(self.experiment.fit.batch),
            self.batch_shardings(),
        )
        return self.specs.abstract_state(), batch

    def jit_train_step(self) -> Any:
        """The compiled train step; the state is donated."""
        s = self.specs.state_shardings()
        inputs = () if self.inputs is None else (sharding.shardings(self.mesh, self.inputs),)
        given = (s, self.batch_shardings(), *inputs)
        return jax.jit(
            self.train_step, donate_argnums=0, in_shardings=given, out_shardings=(s, None)
        )

    def compiled_train_step(self) -> Any:
        """`jit_train_step`, compiled once for the abstract arguments of the experiment; one with
        layer inputs, whose shapes the caller knows, at its first call."""
        if self._train is None:
            step = self.jit_train_step()
            given = self.inputs is not None
            self._train = step if given else step.lower(*self.abstract_arguments()).compile()
        return self._train

    def jit_eval_step(self) -> Any:
        """The evaluation step, jitted once."""
        if self._eval is None:
            self._eval = jax.jit(self.eval_step)
        return self._eval


def named(aux: Aux) -> dict[str, jax.Array]:
    """Aux metrics by name: the path of the layer, such as "layers/mlp/load"."""
    leaves = jax.tree_util.tree_leaves_with_path(aux)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def _factored(model: module.Module, mesh: AnyMesh) -> AnyMesh:
    """`mesh` with the axes in sub-axes that the model's plans split: cp by heads, ep by nodes."""
    for axis, n in getattr(model, "parts", {}).items():
        if 1 < n < mesh.shape.get(axis, 1):
            mesh = factor(mesh, axis)
    return mesh
