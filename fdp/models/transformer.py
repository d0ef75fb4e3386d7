"""One Transformer for every mesh: outside shard_map the single-device reference, inside it the
sharded program.

Legend: B sequences, L positions (local over cp), R rows of a pass over a few positions, S cached
positions, D width, V vocabulary and K key/value heads (local over tp), C head_dim."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import PartitionSpec

from fdp.collectives import all_gather, size, vary
from fdp.mesh import BATCH_AXES
from fdp.models.attention import CACHE, GATHER, PROBE, Attention, Mixer
from fdp.models.layers import (
    Embedding,
    Head,
    Modulation,
    NoiseEmbedding,
    Reduction,
    RMSNorm,
    SwiGLU,
)
from fdp.parallel.context import CommPlan
from fdp.parallel.layouts import SequenceLayout

Array = jax.Array

# What the backward pass keeps: everything; only the products with weights; only the block inputs.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """Pre-norm residual block; with time conditioning each sublayer is modulated by the noise
    level.

    `reduction`, where given, replaces the sums over tp of both sublayers and may keep state in a
    collection of its own."""

    m: ml_collections.FrozenConfigDict
    attention: str
    block: int
    reduction: Reduction | None = None
    plan: CommPlan = GATHER
    mixer: Mixer | None = None

    @nn.compact
    def __call__(
        self,
        x_BxLxD: Array,
        noise_BxE: Array | None,
        positions_BxL: Array | None = None,
        choice: Any = None,
    ) -> tuple[Array, None]:
        m, dtype = self.m, jnp.dtype(self.m.dtype)
        attention = Attention(
            m.width,
            m.heads,
            m.kv_heads,
            m.head_dim,
            self.attention,
            self.block,
            m.rope_base,
            m.qk_norm,
            dtype,
            m.sequence_parallel,
            m.window,
            self.reduction,
            self.plan,
            self.mixer,
            name="attention",
        )
        mlp = SwiGLU(m.width, m.ffn, dtype, m.sequence_parallel, self.reduction, name="mlp")
        sublayers: Any = {"attention": lambda h: attention(h, positions_BxL, choice), "mlp": mlp}
        for name, layer in sublayers.items():
            h_BxLxD = RMSNorm(name=f"{name}_norm")(x_BxLxD)
            if noise_BxE is None:
                x_BxLxD = x_BxLxD + layer(h_BxLxD)
            else:
                shift, scale, gate = Modulation(m.width, name=f"{name}_modulation")(noise_BxE)
                h_BxLxD = (h_BxLxD * (1 + scale) + shift).astype(dtype)
                x_BxLxD = (x_BxLxD + (1 + gate) * layer(h_BxLxD)).astype(dtype)
        return x_BxLxD, None


class Transformer(nn.Module):
    """Token ids to vocabulary-parallel logits.

    Attributes: `m`, the frozen `model` section of the config; `attention`, which keys a query sees
    (causal, bidirectional, block_diffusion); `block`, tokens per block of block diffusion;
    `gather`, for ZeRO-3, maps the stored parameters of one layer to the whole ones inside the
    rematerialised scan; `plan`, how attention communicates over cp; `mixer` replaces attention's
    inner product (`attention.Mixer`)."""

    m: ml_collections.FrozenConfigDict
    attention: str = "bidirectional"
    block: int = 0
    gather: Callable[[Any], Any] | None = None
    plan: CommPlan = GATHER
    mixer: Mixer | None = None

    def setup(self) -> None:
        m = self.m
        dtype = jnp.dtype(m.dtype)
        self.embed = Embedding(m.vocab, m.width, dtype, m.sequence_parallel)
        self.norm = RMSNorm()
        self.head = Head(m.vocab, dtype)
        if m.time_conditioning:
            self.noise_embedding = NoiseEmbedding()
        block: Any = Block
        if self.gather is not None:
            block = nn.map_variables(block, "params", trans_in_fn=self.gather)
        if m.remat != "none":
            block = nn.remat(block, policy=REMAT[m.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, CACHE: 0, PROBE: 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=m.layers // size("pp"),
            metadata_params={nn.PARTITION_NAME: "pp"},
        )(m, self.attention, self.block, None, self.plan, self.mixer)

    def hidden(
        self,
        ids_BxL: Array,
        noise_B: Array,
        positions_BxL: Array | None = None,
        choice_N: Any = None,
    ) -> Array:
        """Final normed activations [B, L, D]; noise_B (any scale) is read only with time
        conditioning.

        With the collection "kv" mutable, a whole pass fills the key/value cache. `positions_BxL`
        (int32, global) makes this a pass over a few rows: they update the cache at their positions
        and attend to all of it, causally where the model is causal. `choice_N`, a pytree that leads
        with the layers, goes to the mixer. Raises ValueError without a cache, for cp > 1, and for
        block diffusion."""
        noise_BxE = self.noise_embedding(noise_B) if self.m.time_conditioning else None
        x_BxLxD = vary(self.embed(ids_BxL), "pp")  # the stacked layers are typed varying over pp
        x_BxLxD, _ = self.layers(x_BxLxD, noise_BxE, positions_BxL, choice_N)
        x_BxLxD = self.norm(x_BxLxD)
        # Not `enter_tp`: without SP the rows are marked varying in the head, after the caller has
        # selected some.
        return all_gather(x_BxLxD, "tp", dim=1) if self.m.sequence_parallel else x_BxLxD

    def logits(self, x_D: Array) -> Array:
        """Head on any selection of rows: [..., D] → float32 [..., V/tp]."""
        return self.head(x_D)

    def __call__(self, ids_BxL: Array, noise_B: Array) -> Array:
        """Logits [B, L, V/tp], float32."""
        return self.logits(self.hidden(ids_BxL, noise_B))


def empty_cache(m: ml_collections.FrozenConfigDict, batch: int, length: int) -> Any:
    """The key/value cache of `batch` sequences before any pass: zeros [layers, B, S, K/tp, C] in
    the compute dtype.

    A causal model may fill it row by row; a bidirectional one reads all of it, so there a whole
    pass comes first."""
    shape = (m.layers // size("pp"), batch, length, m.kv_heads // size("tp"), m.head_dim)
    zeros = vary(jnp.zeros(shape, jnp.dtype(m.dtype)), ("pp", *BATCH_AXES, "tp"))
    return {"layers": {"attention": {"k": zeros, "v": zeros}}}


def cache_specs() -> Any:
    """PartitionSpecs of the cache: layers over pp, sequences over (dp, ep), heads over tp."""
    spec = PartitionSpec("pp", BATCH_AXES, None, "tp", None)
    return {"layers": {"attention": {"k": spec, "v": spec}}}


def from_config(c: ml_collections.ConfigDict, attention: str, block: int = 0) -> Transformer:
    """The model that config `c` describes, seeing what `attention` allows (the objective
    decides).
    """
    x = c.context
    layout = SequenceLayout(x.layout, x.stripe if x.layout == "striped" else 1)
    plan = CommPlan(x.plan, c.mesh.cp if x.plan == "ulysses" else x.head_split, layout=layout)
    return Transformer(ml_collections.FrozenConfigDict(c.model), attention, block, plan=plan)
