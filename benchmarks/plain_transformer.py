"""The yardstick: fdp's causal Transformer written by hand for one device. No flax, no shard_map, no
import from fdp.

It computes what fdp computes with `objective.name=autoregressive` and default model switches, on
the same parameter tree, in float32. Whatever fdp does beyond this (five axes, objectives, the
non-finite guard) has to fit into the 5 % that `benchmarks.step` allows.

Legend: B sequences, L positions, D width, F FFN hidden, H query heads, K key/value heads, C
head_dim, V vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
State = tuple[Any, optax.OptState]


def rms_norm(x_BxLxD: Array, scale_D: Array) -> Array:
    """Root-mean-square norm over D with a learned scale."""
    return (
        x_BxLxD
        * jax.lax.rsqrt(jnp.mean(x_BxLxD * x_BxLxD, axis=-1, keepdims=True) + 1e-6)
        * scale_D
    )


def rotary_table(length: int, head_dim: int, base: float) -> tuple[Array, Array]:
    """cos and sin of the rotary angles, each [L, 1, C/2]: computed once, not in every layer."""
    angles_LxC2 = jnp.arange(length)[:, None] * base ** (
        -jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    )
    return jnp.cos(angles_LxC2)[:, None], jnp.sin(angles_LxC2)[:, None]


def rotary(x_BxLxHxC: Array, table: tuple[Array, Array]) -> Array:
    """Rotate the two halves of every head."""
    cos, sin = table
    a, b = jnp.split(x_BxLxHxC, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(x_BxLxD: Array, layer: Any, table: tuple[Array, Array]) -> Array:
    """Pre-norm attention and SwiGLU, each behind a residual."""
    w = layer["attention"]
    h_BxLxD = rms_norm(x_BxLxD, layer["attention_norm"]["scale"])
    q_BxLxHxC = rotary(jnp.einsum("bld,dhc->blhc", h_BxLxD, w["w_q"]), table)
    k_BxLxKxC = rotary(jnp.einsum("bld,dkc->blkc", h_BxLxD, w["w_kv"][0]), table)
    v_BxLxKxC = jnp.einsum("bld,dkc->blkc", h_BxLxD, w["w_kv"][1])
    out_BxLxHxC = jax.nn.dot_product_attention(q_BxLxHxC, k_BxLxKxC, v_BxLxKxC, is_causal=True)
    x_BxLxD = x_BxLxD + jnp.einsum("blhc,hcd->bld", out_BxLxHxC, w["w_o"])

    w = layer["mlp"]
    h_BxLxD = rms_norm(x_BxLxD, layer["mlp_norm"]["scale"])
    return x_BxLxD + (jax.nn.silu(h_BxLxD @ w["w_in"][0]) * (h_BxLxD @ w["w_in"][1])) @ w["w_out"]


def loss(params: Any, tokens_BxL: Array, bos: int, rope_base: float) -> Array:
    """Mean cross entropy in nats of every token given those before it, behind the start token
    `bos`.
    """
    batch, length = tokens_BxL.shape
    inputs_BxL = jnp.concatenate(
        [jnp.full((batch, 1), bos, tokens_BxL.dtype), tokens_BxL[:, :-1]], axis=1
    )
    table = rotary_table(length, params["layers"]["attention"]["w_q"].shape[-1], rope_base)
    x_BxLxD = params["embed"]["table"][inputs_BxL]
    x_BxLxD, _ = jax.lax.scan(
        lambda x, layer: (block(x, layer, table), None), x_BxLxD, params["layers"]
    )
    logits_BxLxV = rms_norm(x_BxLxD, params["norm"]["scale"]) @ params["head"]["w"]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, tokens_BxL).mean()


def jit_train_step(
    tx: optax.GradientTransformation, bos: int, rope_base: float
) -> Callable[[State, Array], tuple[State, Array]]:
    """Jitted ((params, opt_state), tokens_BxL) → (new state, loss before the step); the state is
    donated.
    """

    def train_step(state: State, tokens_BxL: Array) -> tuple[State, Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, tokens_BxL, bos, rope_base)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return jax.jit(train_step, donate_argnums=0)
