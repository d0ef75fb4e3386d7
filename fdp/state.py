"""Training state: what a step turns into the next one and a checkpoint keeps."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import PartitionSpec

from fdp import sharding
from fdp.mesh import AnyMesh
from fdp.models.transformer import Transformer


@flax.struct.dataclass
class TrainState:
    """step: int32 count of calls; key: of all noise; params: float32 masters; opt_state: optax;
    skipped: int32 steps.

    The key is data, not a constant of the program: every seed runs the same compiled step.
    """

    step: Any
    key: Any
    params: Any
    opt_state: Any
    skipped: Any


def learning_rate(c: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warm-up to train.lr, then cosine to a tenth of it at train.steps."""
    t = c.train
    warmup = min(t.warmup, max(t.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        0.0, t.lr, warmup, max(t.steps, warmup + 1), t.lr / 10
    )


def optimizer(c: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; weight decay on matrices only."""
    t = c.train
    return optax.chain(
        optax.clip_by_global_norm(t.clip),
        optax.adamw(
            learning_rate(c),
            b2=t.beta2,
            weight_decay=t.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 2, params),
        ),
    )


class Layout:
    """Specs and abstract values of one model, optimizer and ZeRO stage on one mesh."""

    def __init__(self, c: ml_collections.ConfigDict, model: Transformer, mesh: AnyMesh):
        self.mesh, self.zero = mesh, c.train.zero
        self.shapes, self.specs = sharding.abstract_params(model, c.data.seq_len)
        self.stored = sharding.stored_specs(self.shapes, self.specs, self.zero, mesh.shape["dp"])
        self.tx = optimizer(c)

    def state_specs(self) -> TrainState:
        """PartitionSpecs of a TrainState: optimizer moments lie where their parameters lie."""
        opt_shapes = jax.eval_shape(self.tx.init, self.shapes)
        opt = optax.tree_map_params(
            self.tx,
            lambda _, spec: spec,
            opt_shapes,
            self.stored,
            transform_non_params=lambda _: PartitionSpec(),
        )
        return TrainState(
            step=PartitionSpec(),
            key=PartitionSpec(),
            params=self.stored,
            opt_state=opt,
            skipped=PartitionSpec(),
        )

    def state_shardings(self) -> TrainState:
        """NamedShardings of a TrainState."""
        return sharding.shardings(self.mesh, self.state_specs())

    def abstract_state(self) -> TrainState:
        """ShapeDtypeStructs with shardings: the target of a restore and the argument of an
        ahead-of-time compile.
        """
        state = jax.eval_shape(lambda params: self._build(params, jax.random.key(0)), self.shapes)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            self.state_shardings(),
        )

    def _build(self, params: Any, key: jax.Array) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero, key=key, params=params, opt_state=self.tx.init(params), skipped=zero
        )

    def init(self, model: Transformer, seed: int, seq_len: int) -> TrainState:
        """A fresh state, created in place on the mesh: the same values on every mesh."""

        def build(key: jax.Array) -> TrainState:
            init_key, noise_key = jax.random.split(key)
            return self._build(sharding.init_params(model, init_key, seq_len), noise_key)

        return jax.jit(build, out_shardings=self.state_shardings())(jax.random.key(seed))
