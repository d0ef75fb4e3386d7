"""The yardstick of images: fdp's DiT with adaLN-zero written by hand for one device. No flax, no
shard_map, no import from fdp.

It computes what fdp computes with `model.kind=dit`, on the same parameter tree, in float32.

Legend: B images, L patches, D width, H heads, C head_dim, P pixels and channels of a patch."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
EPSILON = 1e-6
FEATURES = 256


def norm(x: Array) -> Array:
    """Layer norm without scale and bias."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)


def waves(position: Array, features: int) -> Array:
    """Angles at features/2 wavelengths: [N, features/2]."""
    return position[:, None] * 10_000.0 ** (-jnp.arange(features // 2) / (features / 2))


def positions(columns: int, D: int) -> Array:
    """Sines and cosines of column and row, [L, D]."""
    row, column = jnp.divmod(jnp.arange(columns**2), columns)
    angles = [waves(x.astype(jnp.float32), D // 2) for x in (column, row)]
    return jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], -1)


def modulations(w: Any, c_BxD: Array, parts: int) -> list[Array]:
    """Shift, scale and gate, [B, 1, D] each."""
    return jnp.split((c_BxD @ w["w"] + w["b"])[:, None], parts, -1)


def attention(w: Any, x_BxLxD: Array) -> Array:
    """Every patch sees every patch."""
    q = jnp.einsum("bld,dhc->blhc", x_BxLxD, w["w_q"]) + w["b_q"]
    k = jnp.einsum("bld,dhc->blhc", x_BxLxD, w["w_kv"][0]) + w["b_kv"][0]
    v = jnp.einsum("bld,dhc->blhc", x_BxLxD, w["w_kv"][1]) + w["b_kv"][1]
    out = jax.nn.dot_product_attention(q, k, v)
    return jnp.einsum("blhc,hcd->bld", out, w["w_o"]) + w["b_o"]


def mlp(w: Any, x_BxLxD: Array) -> Array:
    """Two products with gelu between."""
    return jax.nn.gelu(x_BxLxD @ w["w_in"] + w["b_in"]) @ w["w_out"] + w["b_out"]


def block(x_BxLxD: Array, w: Any, c_BxD: Array) -> Array:
    """Attention and MLP, modulated, behind residuals."""
    for name, part in (("attention", attention), ("mlp", mlp)):
        shift, scale, gate = modulations(w[f"{name}_modulation"], c_BxD, 3)
        x_BxLxD = x_BxLxD + gate * part(w[name], norm(x_BxLxD) * (1 + scale) + shift)
    return x_BxLxD


def loss(params: Any, noised: Any, patch: int) -> Array:
    """Mean squared error of a batch: inputs and rows f32 [B, rows, columns, channels], noise f32
    [B], labels int32 [B]."""
    images, targets = noised["inputs"], noised["rows"]
    B, size, _, channels = images.shape
    n, D = size // patch, params["label"]["table"].shape[1]
    x = images.reshape(B, n, patch, n, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    w = params[f"patch_{patch}"]
    x_BxLxD = x.reshape(B, n * n, -1) @ w["w"] + w["b"] + positions(n, D)
    angles, w = waves(noised["noise"], FEATURES), params["time"]
    time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    time_BxD = jax.nn.silu(time @ w["w_in"] + w["b_in"]) @ w["w_out"] + w["b_out"]
    c_BxD = jax.nn.silu(time_BxD + params["label"]["table"][noised["labels"]])
    x_BxLxD, _ = jax.lax.scan(lambda x, w: (block(x, w, c_BxD), None), x_BxLxD, params["layers"])
    shift, scale = modulations(params["norm"]["modulation"], c_BxD, 2)
    w = params[f"output_{patch}"]
    out = (norm(x_BxLxD) * (1 + scale) + shift) @ w["w"] + w["b"]
    out = out.reshape(B, n, n, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return jnp.square(out.reshape(images.shape) - targets).mean()
