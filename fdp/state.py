"""The training state: what a train step updates and a checkpoint stores."""

from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from fdp import sharding
from fdp.mesh import AnyMesh
from fdp.models import module

if TYPE_CHECKING:
    from fdp.experiment import Experiment


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

        return jax.jit(build, out_shardings=self.state_shardings())(jax.random.key(seed))
