"""The training state: what a train step updates and a checkpoint stores."""

import functools
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fdp import sharding
from fdp.mesh import AnyMesh
from fdp.models import module

if TYPE_CHECKING:
    from fdp.experiment import Experiment

# Compiler options of the program that draws the initial values: on a CPU the same bits for a third
# of the compile time (2 instead of 6 seconds for two layers over eight devices).
ONCE: dict[str, Any] = {"xla_backend_optimization_level": 1}


@flax.struct.dataclass
class TrainState:
    """step: int32 number of calls. key: source of all noise. params: float32 master weights.
    opt_state: of optax. skipped: int32 number of skipped steps. model: state without gradient,
    changed by the rules of the experiment.

    The key is data, not a constant of the program, so all seeds run the same compiled step."""

    step: Any
    key: Any
    params: Any
    opt_state: Any
    skipped: Any
    model: Any

    @property
    def variables(self) -> module.Variables:
        """The variables that the model is applied with."""
        return {"params": self.params, "state": self.model}


class StateSpecs:
    """Specs and abstract values of the state of an experiment on one mesh.

    `shapes`, `specs` and `metas` of the parameters; `stored`: their specs between steps (ZeRO)."""

    def __init__(self, experiment: "Experiment", mesh: AnyMesh):
        self.mesh, self.zero = mesh, experiment.zero
        self.example = experiment.noised_example()
        shapes, specs, metas = module.abstract(experiment.model, self.example)
        self.shapes, self.specs, self.metas = shapes["params"], specs["params"], metas["params"]
        self.model_shapes, self.model_specs = shapes["state"], specs["state"]
        self.aux_shapes, self.aux_specs = shapes["aux"], specs["aux"]
        dp = mesh.shape["dp"]
        self.stored = sharding.stored_specs(self.shapes, self.specs, self.zero, dp)
        self.tx = experiment.optimizer.build(self.metas)

    def state_specs(self) -> TrainState:
        """PartitionSpecs of a TrainState: optimizer moments are sharded like their parameters."""
        opt_shapes = jax.eval_shape(self.tx.init, self.shapes)
        opt = optax.tree_map_params(
            self.tx,
            lambda _, spec: spec,
            opt_shapes,
            self.stored,
            transform_non_params=lambda _: PartitionSpec(),
        )
        none = PartitionSpec()
        return TrainState(none, none, self.stored, opt, none, self.model_specs)

    def variable_specs(self) -> module.Variables:
        """PartitionSpecs of `TrainState.variables`."""
        return {"params": self.stored, "state": self.model_specs}

    def state_shardings(self) -> TrainState:
        """NamedShardings of a TrainState."""
        return sharding.shardings(self.mesh, self.state_specs())

    def abstract_state(self) -> TrainState:
        """ShapeDtypeStructs with shardings: the target of a restore, and the argument of
        ahead-of-time compilation."""

        def build(v: Any) -> Any:
            return self._build(v, jax.random.key(0))

        state = jax.eval_shape(build, {"params": self.shapes, "state": self.model_shapes})
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            self.state_shardings(),
        )

    def _build(self, variables: module.Variables, key: jax.Array) -> TrainState:
        params, zero = variables["params"], jnp.zeros((), jnp.int32)
        return TrainState(zero, key, params, self.tx.init(params), zero, variables["state"])

    def init(self, model: module.Module, seed: int) -> TrainState:
        """A fresh state, created in place on the mesh: the same values on every mesh and for every
        ZeRO stage."""

        def build(key: jax.Array) -> TrainState:
            init_key, noise_key = jax.random.split(key)
            example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.example)
            return self._build(module.init(model, init_key, example), noise_key)

        once = jax.jit(build, out_shardings=self.state_shardings(), compiler_options=ONCE)
        return once(jax.random.key(seed))


def all_finite(state: TrainState) -> bool:
    """Whether parameters, moments and model state are free of NaN and infinity: one pass over them
    by a program of its own, because in the train step it would be one more all-reduce."""
    return bool(_finite((state.params, state.opt_state, state.model)))


@functools.partial(jax.jit, compiler_options=ONCE)
def _finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all() if floats else jnp.bool_(True)


def remesh(state: TrainState, specs: StateSpecs) -> TrainState:
    """`state` as it lies on the mesh of `specs`, whatever mesh it lies on now, without a copy on
    the host. Raises ValueError where neither number of devices is a multiple of the other.

    One program reshards it among the devices of the larger mesh, on which the smaller one's blocks
    are replicated; then whole blocks move (`jax.device_put` alone goes through the host wherever
    blocks differ).
    """
    wanted = specs.state_shardings()
    now = jax.tree.map(lambda x: x.sharding, state)
    if jax.tree.all(jax.tree.map(lambda a, b: a == b, now, wanted)):
        return state
    before, after = state.step.sharding.mesh.devices, specs.mesh.devices
    if max(before.size, after.size) % min(before.size, after.size):
        raise ValueError(
            f"a state on {before.size} devices is not moved to {after.size}: one number must be a "
            "multiple of the other; restore a checkpoint instead, which any mesh reads"
        )
    if before.size < after.size:
        state = jax.device_put(state, _replicated(now, after))
        return _resharded(state, wanted)
    return jax.device_put(_resharded(state, _replicated(wanted, before)), wanted)


def _replicated(shardings: TrainState, devices: np.ndarray) -> TrainState:
    """The same blocks on `devices`, each on several where they are more than the mesh has."""

    def one(s: NamedSharding) -> NamedSharding:
        shape = (devices.size // s.mesh.size, *s.mesh.devices.shape)
        auto = (AxisType.Auto,) * len(shape)
        mesh = Mesh(devices.reshape(shape), ("copy", *s.mesh.axis_names), axis_types=auto)
        return NamedSharding(mesh, s.spec)

    return jax.tree.map(one, shardings)


def _resharded(state: TrainState, shardings: TrainState) -> TrainState:
    return jax.jit(lambda tree: tree, out_shardings=shardings)(state)


def moved_bytes(state: TrainState, specs: StateSpecs) -> int:
    """Bytes that devices must receive in `remesh`: of every shard what its device does not hold."""
    total = 0
    pairs = (jax.tree.leaves(s) for s in (state, specs.abstract_state()))
    for old, new in zip(*pairs, strict=True):
        held = old.sharding.devices_indices_map(old.shape)
        for device, wanted in new.sharding.devices_indices_map(new.shape).items():
            common = _cells(wanted, new.shape, held.get(device))
            total += (_cells(wanted, new.shape, wanted) - common) * new.dtype.itemsize
    return total


def _cells(index: Any, shape: tuple[int, ...], other: Any) -> int:
    """Elements in both blocks of an array of `shape`; none of a block that is None."""
    if other is None:
        return 0
    cells = 1
    for one, two, n in zip(index, other, shape, strict=True):
        (a, b, _), (c, d, _) = one.indices(n), two.indices(n)
        cells *= max(0, min(b, d) - max(a, c))
    return cells
