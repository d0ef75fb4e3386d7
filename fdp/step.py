"""The train step and the evaluation step: one shard_map over all five axes, then the optimizer on
global arrays.

Legend: B global batch, L positions, R rows that carry loss, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fdp import sharding
from fdp.collectives import psum, shard_map, vary, vary_like
from fdp.config import UserError
from fdp.kernels_pallas.masks import Mask
from fdp.mesh import BATCH_AXES, AnyMesh, expand, factor
from fdp.models.transformer import Transformer
from fdp.objectives.base import Objective
from fdp.parallel import context, layouts
from fdp.parallel.context import CommPlan
from fdp.state import Layout, TrainState, learning_rate

P = PartitionSpec
LOSS_AXES = ("pp", "dp", "ep", "cp")


def batch_specs(batch: Any) -> Any:
    """Specs of a corrupted batch: sequences over (dp, ep), positions (dim 1) over cp."""
    return jax.tree.map(lambda x: P(BATCH_AXES, "cp") if x.ndim > 1 else P(BATCH_AXES), batch)


def tokens_sharding(mesh: AnyMesh) -> NamedSharding:
    """How the loop places a batch of tokens [B, L]."""
    return NamedSharding(mesh, expand(mesh, P(BATCH_AXES, "cp")))


def select_rows(
    hidden_BxLxD: jax.Array, rows: dict[str, jax.Array], capacity: int
) -> tuple[jax.Array, Any]:
    """Gather the ≤ capacity positions whose weight is not 0: [B, L, D] → [capacity, D], rows alike.

    Unused places carry weight 0. The capacity is an exact bound (objective.capacity), so nothing is
    dropped."""
    flat = jax.tree.map(lambda x: x.reshape(-1), rows)
    (places,) = jnp.nonzero(flat["weights"] > 0, size=capacity, fill_value=flat["weights"].size)
    take = lambda x: jnp.take(x, places, axis=0, mode="fill", fill_value=0)
    return take(hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[-1])), jax.tree.map(take, flat)


def loss_sum(
    model: Transformer,
    objective: Objective,
    capacity: int | None,
    params: Any,
    batch: Any,
    choice_N: Any = None,
) -> jax.Array:
    """Σ of the weighted loss in nats over this device's tokens (inside shard_map or outside).

    `choice_N`: what the model's mixer is given, see `Transformer.hidden`.
    """
    variables = {"params": params}
    hidden_BxLxD: Any = model.apply(
        variables, batch["inputs"], batch["noise"], choice_N=choice_N, method="hidden"
    )
    rows = batch["rows"]
    hidden_BxLxD = hidden_BxLxD[:, : rows["weights"].shape[1]]  # block diffusion: the noisy half
    if capacity is not None and capacity < rows["weights"].size:
        hidden_BxLxD, rows = select_rows(hidden_BxLxD, rows, capacity)
    logits: Any = model.apply(variables, hidden_BxLxD, method="logits")
    return objective.loss(logits, rows).sum()


def head_capacity(
    c: ml_collections.ConfigDict, objective: Objective, batch: int, microbatches: int
) -> int | None:
    """Rows per device and microbatch that can carry loss, or None when the head must see every
    row.
    """
    if not (c.objective.masked_head and objective.sparse_rows):
        return None
    shards = c.mesh.dp * c.mesh.ep * microbatches
    return objective.capacity(batch, c.data.seq_len, shards, c.mesh.cp)


def check_context(c: ml_collections.ConfigDict, model: Transformer) -> None:
    """Raises UserError, with equation, values and fix, for a context plan that this model and batch
    cannot run.
    """
    m, mesh = c.model, c.mesh
    if model.attention == "block_diffusion" or (mesh.cp == 1 and not m.window):
        return
    sizes = {
        "seq_len": c.data.seq_len,
        "cp": mesh.cp,
        "heads": m.heads // mesh.tp,
        "kv_heads": m.kv_heads // mesh.tp,
    }
    batch = c.train.batch // (mesh.dp * mesh.ep * c.train.microbatches)
    plan = model.plan if mesh.cp > 1 else CommPlan("all_gather")
    try:
        context.check(plan, Mask(model.attention, m.window), **sizes, batch=batch)
    except ValueError as error:
        raise UserError(str(error)) from error


class Program:
    """The pure functions of one arm on one mesh: `train_step`, `eval_step`, `grads`.

    `choice`: PartitionSpecs of the data that the model's mixer is given besides its tensors, a
    pytree that leads with the layers, such as plans of a layer and lists of key blocks; the
    functions then take that data as last argument."""

    def __init__(
        self,
        c: ml_collections.ConfigDict,
        model: Transformer,
        objective: Objective,
        mesh: AnyMesh,
        choice: Any = None,
    ):
        check_context(c, model)
        if 1 < model.plan.head_split < c.mesh.cp:
            mesh = factor(
                mesh, "cp"
            )  # some sub-axes split heads or sequences, the others make a ring
        self.c, self.objective, self.mesh, self.choice = c, objective, mesh, choice
        self.layout = Layout(c, model, mesh)
        gather = sharding.layer_gather(self.layout.stored, c.train.zero)
        self.plain = model  # parameters are initialised whole, under jit with out_shardings
        self.model = model if gather is None else model.clone(gather=gather)
        self.tokens = c.train.batch * c.data.seq_len
        self.capacity = head_capacity(c, objective, c.train.batch, c.train.microbatches)
        self.lr = learning_rate(c)

    def init(self, seed: int) -> TrainState:
        """A fresh state, created in place on the mesh: the same values on every mesh and for every
        ZeRO stage.
        """
        return self.layout.init(self.plain, seed, self.c.data.seq_len)

    def _shard_map(self, f: Callable[..., Any], batch: Any, out_specs: Any) -> Callable[..., Any]:
        in_specs = (self.layout.stored, batch_specs(batch), self.choice)
        return shard_map(f, self.mesh, in_specs, out_specs)

    def corrupt(self, tokens_BxL: jax.Array, key: jax.Array) -> Any:
        """The objective's batch, drawn on global arrays: equal on every mesh for equal keys.

        In the order of the plan's sequence layout; targets were shifted before, so a neighbour
        there need not be the next token."""
        batch = self.objective.corrupt(key, tokens_BxL)
        order = lambda x: (
            layouts.permute(x, self.model.plan.layout, self.c.mesh.cp) if x.ndim > 1 else x
        )
        batch = jax.tree.map(order, batch)
        return jax.lax.with_sharding_constraint(
            batch, sharding.shardings(self.mesh, batch_specs(batch))
        )

    def grads(self, params: Any, batch: Any, choice_N: Any = None) -> tuple[jax.Array, Any]:
        """(mean loss in nats per token, gradients in the stored layout) of one global batch."""
        return self._shard_map(self._local_grads, batch, (P(), self.layout.stored))(
            params, batch, choice_N
        )

    def _local_grads(self, stored: Any, batch: Any, choice_N: Any) -> tuple[jax.Array, Any]:
        params, pull = jax.vjp(
            lambda p: sharding.materialise(p, self.layout.stored, self.c.train.zero), stored
        )

        def one(p: Any, microbatch: Any) -> tuple[jax.Array, Any]:
            f = lambda q: (
                loss_sum(self.model, self.objective, self.capacity, q, microbatch, choice_N)
                / self.tokens
            )
            return jax.value_and_grad(f)(p)

        m = self.c.train.microbatches
        if m == 1:
            loss, grads = one(params, batch)
        else:
            split = jax.tree.map(lambda x: x.reshape(m, x.shape[0] // m, *x.shape[1:]), batch)
            zeros = jax.tree.map(lambda p: vary_like(jnp.zeros_like(p), p), params)
            start = (vary(jnp.zeros(()), LOSS_AXES), zeros)

            def body(carry: Any, microbatch: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, one(params, microbatch)), None

            (loss, grads), _ = jax.lax.scan(body, start, split)
        return psum(loss, LOSS_AXES), pull(grads)[0]

    def head_rows(self) -> int:
        """Rows per device and microbatch on which the head runs."""
        c = self.c
        local = (
            c.train.batch
            * c.data.seq_len
            // (c.mesh.dp * c.mesh.ep * c.mesh.cp * c.train.microbatches)
        )
        return local if self.capacity is None else min(self.capacity, local)

    def train_step(
        self, state: TrainState, tokens_BxL: jax.Array, choice_N: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step. A non-finite loss or gradient leaves parameters and moments as they
        were.
        """
        batch = self.corrupt(tokens_BxL, jax.random.fold_in(state.key, state.step))
        loss, grads = self.grads(state.params, batch, choice_N)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = self.layout.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)
        state = TrainState(
            step=state.step + 1,
            key=state.key,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "lr": self.lr(state.step - 1),
            "skipped": state.skipped,
        }
        return state, metrics

    def eval_step(
        self, params: Any, tokens_BxL: jax.Array, index: jax.Array, choice_N: Any = None
    ) -> jax.Array:
        """Mean loss in nats per token of validation batch `index`, under noise that never
        changes.
        """
        key = jax.random.fold_in(jax.random.key(1_000_003), index)
        batch = self.corrupt(tokens_BxL, key)

        def local(stored: Any, b: Any, choice_N: Any) -> jax.Array:
            p = sharding.materialise(stored, self.layout.stored, self.c.train.zero)
            return (
                psum(loss_sum(self.model, self.objective, None, p, b, choice_N), LOSS_AXES)
                / tokens_BxL.size
            )

        return self._shard_map(local, batch, P())(params, batch, choice_N)

    def jit_train_step(self) -> Any:
        """The compiled train step; the state is donated."""
        s = self.layout.state_shardings()
        choice = () if self.choice is None else (sharding.shardings(self.mesh, self.choice),)
        given = (s, tokens_sharding(self.mesh), *choice)
        return jax.jit(
            self.train_step, donate_argnums=0, in_shardings=given, out_shardings=(s, None)
        )
