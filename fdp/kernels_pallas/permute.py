"""Rows into the order of their experts and back. Both directions, and both gradients, read rows by
index and write them in order: no scatter of rows.

`source` says which token a row holds, `slots` which row holds choice k of a token; each is the
inverse of the other.

Legend: T tokens, K choices of a token, R rows of the buffer, D width."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fdp.kernels_pallas.walks import alike, choose_backend

Array = jax.Array
PART = 4096  # tokens whose choices a TPU gathers at once


def permute(x_TxD: Array, source_R: Array, slots_TxK: Array) -> Array:
    """Row r is x[source[r]], zeros where source is -1: [R, D]. Differentiable in x.

    source int32 [R], slots int32 [T, K] with source[slots[t, k]] = t; -1: no token, no row. Raises
    ValueError for shapes that do not fit."""
    _check(x_TxD.shape[0], source_R, slots_TxK)
    return _permute(*alike((x_TxD, source_R, slots_TxK)))


def unpermute(y_RxD: Array, gates_TxK: Array, slots_TxK: Array, source_R: Array) -> Array:
    """Σ_k gates[t, k] · y[slots[t, k]], summed in f32: [T, D] like y. A slot of -1 adds nothing.
    Differentiable in y and gates (f32). Arguments and errors as in `permute`."""
    _check(gates_TxK.shape[0], source_R, slots_TxK)
    if y_RxD.shape[0] != source_R.shape[0] or gates_TxK.shape != slots_TxK.shape:
        raise ValueError(
            f"y {y_RxD.shape}, gates {gates_TxK.shape}, slots {slots_TxK.shape} and source "
            f"{source_R.shape} must be [R, D], [T, K], [T, K] and [R]"
        )
    return _unpermute(*alike((y_RxD, gates_TxK, slots_TxK, source_R)))


def combine(y_RxD: Array, slots_TxK: Array, source_R: Array) -> Array:
    """`unpermute` with gates of 1, the transpose of `permute`: Σ_k y[slots[t, k]], [T, D] like
    y."""
    _check(slots_TxK.shape[0], source_R, slots_TxK)
    return _combine(*alike((y_RxD, slots_TxK, source_R)))


def _check(tokens: int, source_R: Array, slots_TxK: Array) -> None:
    if source_R.ndim != 1 or slots_TxK.ndim != 2 or slots_TxK.shape[0] != tokens:
        raise ValueError(
            f"source {source_R.shape} and slots {slots_TxK.shape} of {tokens} tokens must be [R] "
            f"and [{tokens}, K]"
        )


def _pick(x_NxD: Array, index: Array) -> Array:
    """x[index], zeros where index is -1."""
    return jnp.where(index[:, None] < 0, 0, x_NxD[jnp.maximum(index, 0)])


def _in_parts(f: Callable, slots_TxK: Array, like_TxX: Array | None) -> Array:
    """f(slots, like) → [T, ·], on a TPU PART tokens at a time: it gathers the rows of all choices
    before it adds them up, where elsewhere one fused loop reads them."""
    T = len(slots_TxK)
    if choose_backend(None) != "tpu" or T <= PART:
        return f(slots_TxK, like_TxX)
    n = -(-T // PART)

    def cut(x: Array, fill: int) -> Array:
        x = jnp.pad(x, ((0, n * PART - T), (0, 0)), constant_values=fill)
        return x.reshape(n, PART, -1)

    parts = cut(slots_TxK, -1), None if like_TxX is None else cut(like_TxX, 0)
    y = lax.map(lambda part: f(*part), parts)
    return y.reshape(n * PART, -1)[:T]


def _sum_choices(y_RxD: Array, gates_TxK: Array | None, slots_TxK: Array) -> Array:
    """One choice after the other, so that no [T, K, D] array is made."""

    def sums(slots_TxK: Array, gates_TxK: Array | None) -> Array:
        total = jnp.zeros((), jnp.float32)
        for k in range(slots_TxK.shape[1]):
            row = _pick(y_RxD, slots_TxK[:, k]).astype(jnp.float32)
            total = total + (row if gates_TxK is None else row * gates_TxK[:, k, None])
        return total.astype(y_RxD.dtype)

    return _in_parts(sums, slots_TxK, gates_TxK)


@jax.custom_vjp
def _permute(x, source, slots):
    return _pick(x, source)


def _permute_forward(x, source, slots):
    return _pick(x, source), slots


def _permute_backward(slots, dy):
    return _sum_choices(dy, None, slots), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def _unpermute(y, gates, slots, source):
    return _sum_choices(y, gates, slots)


def _unpermute_forward(y, gates, slots, source):
    return _unpermute(y, gates, slots, source), (y, gates, slots, source)


def _unpermute_backward(saved, dout):
    y, gates, slots, source = saved
    token_R = jnp.maximum(source, 0)
    mine_RxK = slots[token_R] == jnp.arange(len(source), dtype=slots.dtype)[:, None]
    gate_R = jnp.where(mine_RxK, gates[token_R], 0).sum(1)
    dy = _pick(dout, source).astype(jnp.float32) * gate_R[:, None]

    def gate_gradients(slots_TxK: Array, dout_TxD: Array) -> Array:
        wide_TxD = dout_TxD.astype(jnp.float32)
        columns = range(slots_TxK.shape[1])
        rows = (_pick(y, slots_TxK[:, k]).astype(jnp.float32) for k in columns)
        return jnp.stack([(row * wide_TxD).sum(1) for row in rows], 1)

    dgates = _in_parts(gate_gradients, slots, dout)
    return dy.astype(y.dtype), dgates.astype(gates.dtype), None, None


_unpermute.defvjp(_unpermute_forward, _unpermute_backward)


@jax.custom_vjp
def _combine(y, slots, source):
    return _sum_choices(y, None, slots)


def _combine_forward(y, slots, source):
    return _sum_choices(y, None, slots), source


def _combine_backward(source, dout):
    return _pick(dout, source), None, None


_combine.defvjp(_combine_forward, _combine_backward)
