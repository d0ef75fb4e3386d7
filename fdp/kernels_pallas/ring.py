"""Ring attention for TPUs with its own communication: while a hop's keys are used, a remote DMA
passes them on.

Every device holds a shard of the sequence and keeps its queries; keys and values go once around. A
hop is one kernel: its first step starts the DMA of the keys that it is reading into the neighbour's
second buffer, its last step waits for both directions; buffers change roles from hop to hop. The
softmax goes on from the (out, lse) of the hops before.

Legend as in tiles.py; q_BxNxHxC, k_BxMxKxC, v_BxMxKxC are one device's shard. D devices in the
ring."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fdp.kernels_pallas import core, flash, tiles, tpu
from fdp.kernels_pallas.masks import Mask
from fdp.kernels_pallas.tiles import Spec, Walk, result, walk_length, walk_tile

Array = jax.Array
# names the barrier semaphore that all devices of a ring share; any number no other kernel uses
COLLECTIVE = 11


def ring_attention(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    mask: Mask,
    q_position_N: Array,
    k_position_M: Array,
    q_segment_N: Array | None = None,
    k_segment_M: Array | None = None,
    *,
    axis: str,
    interpret: object = False,
) -> tuple[Array, Array]:
    """Attention of this device's queries to the keys of all devices along mesh axis `axis`, inside
    shard_map, on TPUs.

    → (out [B, N, H, C], lse f32 [B, H, N]), differentiable by both in q, k and v. Shards in any
    layout: global positions say who sees whom, and tiles that the mask excludes cost nothing.
    Forward D - 1 passes of keys and values by remote DMA; backward D - 1 of keys and values and D
    of their f32 gradients by ppermute, left to the compiler. interpret: `pltpu.InterpretParams` on
    the CPU, in an unchecked shard_map. Raises ValueError as `flash_attention` does, and if `axis`
    is not bound. Source: Liu et al. 2023 (Ring Attention); Brandon et al. 2023 (Striped Attention)
    for masks by position."""
    core.check_arrays(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC)
    bound = jax.sharding.get_abstract_mesh().manual_axes
    if axis not in bound:
        raise ValueError(
            f"axis {axis!r} is not among the bound mesh axes {tuple(bound)}: call inside shard_map "
            "over it"
        )
    (B, N, H, C), (M, K) = q_BxNxHxC.shape, k_BxMxKxC.shape[1:3]
    q_tags = core.gather_tags(mask, "q", (B, N), q_position_N, q_segment_N)
    k_tags = core.gather_tags(mask, "k", (B, M), k_position_M, k_segment_M)
    width = tiles.power_of_two(C, 16)
    q, k, v = (tiles.pad_dim(x, 3, width) for x in (q_BxNxHxC, k_BxMxKxC, v_BxMxKxC))
    X, Y = flash.tile_sizes("tpu", N * (H // K), M, width, q.dtype)
    spec = Spec(mask, C**-0.5, M, "tpu", interpret, partial=True)
    folded = tiles.fold_queries(q, K, X), tiles.tile_keys(k, Y, "tpu"), tiles.tile_keys(v, Y, "tpu")
    # A few integers a key: all of them at once.
    k_tags_D = lax.all_gather(tiles.tile_tags(k_tags, 1, Y, B), axis)
    o, lse = _ring(
        spec, axis, *core.alike((*folded, tiles.tile_tags(q_tags, H // K, X, B), k_tags_D))
    )
    out = tiles.unfold_queries(o, B, N, H)[..., :C].astype(q.dtype)
    return out, tiles.unfold_queries(lse.swapaxes(2, 3), B, N, H)[..., 0].swapaxes(1, 2)


# Around the ring
# -------------------------------------------------------------------------------------------------


def _at(tags_D: Array, axis: str, hop: Array | int) -> Array:
    """Tags of the keys that are here after `hop` passes to the next device."""
    n = lax.axis_size(axis)
    return lax.dynamic_index_in_dim(tags_D, (lax.axis_index(axis) - hop + n) % n, keepdims=False)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(spec, axis, q, k, v, q_tags, k_tags_D):
    """(out f32 [Z, I, X, C], lse f32 [Z, I, 1, X])."""

    def hop(carry, s):
        o, lse, k, v = carry
        k_tags = _at(k_tags_D, axis, s)
        return forward_hop(spec, axis, q, k, v, q_tags, k_tags, o, lse, send=True), None

    Z, I, X, C = q.shape
    start = jnp.zeros((Z, I, X, C), jnp.float32), jnp.full((Z, I, 1, X), -jnp.inf)
    last = lax.axis_size(axis) - 1
    (o, lse, k, v), _ = lax.scan(hop, core.alike((*start, k, v)), jnp.arange(last))
    return forward_hop(spec, axis, q, k, v, q_tags, _at(k_tags_D, axis, last), o, lse, send=False)


def _ring_forward(spec, axis, q, k, v, q_tags, k_tags_D):
    o, lse = _ring(spec, axis, q, k, v, q_tags, k_tags_D)
    return (o, lse), (
        q,
        k,
        v,
        q_tags,
        k_tags_D,
        o,
        lse,
    )  # the shard's own keys, not those that came by


def _ring_backward(spec, axis, saved, cotangents):
    q, k, v, q_tags, k_tags_D, o, lse = saved
    do, dlse = cotangents
    delta, lse = core.row_terms(o, lse, do, dlse)
    rows = do.astype(q.dtype), lse, delta
    n = lax.axis_size(axis)
    add = lambda a, b: jax.tree.map(jnp.add, a, b)

    def shift(tree):
        return jax.tree.map(
            lambda x: lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]), tree
        )

    def gradients(keys, s):
        (k, v), k_tags = keys, _at(k_tags_D, axis, s)
        row_walk, key_walk = _walks(spec, q_tags, k_tags)
        dq = tpu.query_gradient(spec, q, k, v, q_tags, k_tags, row_walk, *rows)
        return dq, tpu.key_gradients(spec, q, k, v, q_tags, k_tags, key_walk, *rows)

    # Nothing sent depends on a kernel of its own hop, and no key is sent that nobody needs: first
    # and last hop differ.
    def hop(carry, s):
        dq, dkeys, keys = carry
        here = gradients(keys, s)
        return (dq + here[0], add(shift(dkeys), here[1]), shift(keys)), None

    keys = (k, v)
    dq, dkeys = gradients(keys, 0)
    if n > 2:
        (dq, dkeys, keys), _ = lax.scan(hop, (dq, dkeys, shift(keys)), jnp.arange(1, n - 1))
    elif n == 2:
        keys = shift(keys)
    if n > 1:
        here = gradients(keys, n - 1)
        dq, dkeys = dq + here[0], shift(add(shift(dkeys), here[1]))
    return *(g.astype(x.dtype) for g, x in zip((dq, *dkeys), (q, k, v), strict=True)), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _walks(spec: Spec, q_tags: Array, k_tags: Array) -> tuple[Walk, Walk]:
    return tiles.range_walk(spec.mask, q_tags, k_tags, True), tiles.range_walk(
        spec.mask, k_tags, q_tags, False
    )


# One hop
# -------------------------------------------------------------------------------------------------


def remote_copies(sources, targets, send, receive, axis: str) -> list:
    """DMAs of each source to the next device's target, with one pair of semaphores each; not
    started.
    """
    n = lax.axis_size(axis)
    right = lax.rem(lax.axis_index(axis) + 1, n)
    return [
        pltpu.make_async_remote_copy(
            src_ref=a,
            dst_ref=b,
            send_sem=send.at[i],
            recv_sem=receive.at[i],
            device_id={axis: right},
        )
        for i, (a, b) in enumerate(zip(sources, targets, strict=True))
    ]


def neighbour_is_ready(axis: str) -> None:
    """Wait until the next device runs this kernel: only then may its second buffer be written."""
    n = lax.axis_size(axis)
    barrier = pltpu.get_barrier_semaphore()
    left = lax.rem(lax.axis_index(axis) + n - 1, n)
    pl.semaphore_signal(barrier, inc=1, device_id={axis: left})
    pl.semaphore_wait(barrier, 1)


def forward_hop(spec: Spec, axis: str, q, k, v, q_tags, k_tags, o, lse, send: bool):
    """(out, lse) f32 of the keys before and of these; if `send`, also the next hop's (k, v), as
    they arrive here.
    """
    Z, I, X, C = q.shape
    walk = _walks(spec, q_tags, k_tags)[0]
    stride = tiles.row_stride(spec, walk, k.shape[1])
    maps = tpu.Maps(stride, walk, Z)
    passed = (k, v) if send else ()
    whole = [pl.BlockSpec(memory_space=pl.ANY)] * len(passed)
    return pl.pallas_call(
        partial(_hop_kernel, spec, stride, maps, axis, send),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(Z, I, stride.most),
            in_specs=[
                *(maps.own(q), maps.met(k, C), maps.met(v, C), maps.own(q_tags), maps.met(k_tags)),
                *(maps.own(o), maps.own(lse), *whole),
            ],
            out_specs=[maps.own(o), maps.own(lse), *whole],
            scratch_shapes=[
                *(pltpu.VMEM(s, jnp.float32) for s in ((X, 1), (X, 1), (X, C))),
                *(pltpu.SemaphoreType.DMA((2,)) for _ in passed),
            ],
        ),
        out_shape=[result(x.shape, x.dtype, q) for x in (o, lse, *passed)],
        # Steps run in order: the first one starts the DMA and the last one waits for it.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3,
            collective_id=COLLECTIVE if send else None,
            has_side_effects=True,
        ),
        interpret=spec.interpret,
    )(walk.table, walk.counts, q, k, v, q_tags, k_tags, o, lse, *passed)


def _hop_kernel(
    spec,
    stride,
    maps,
    axis,
    send,
    table,
    counts,
    q,
    k,
    v,
    q_tag,
    k_tag,
    o_before,
    lse_before,
    *refs,
):
    """refs: the keys to pass on, as a whole [k, v]; out, lse; where the next keys land; softmax
    state; semaphores.
    """
    n = 2 * send
    keys, (o_ref, lse_ref), landing, refs = (
        refs[:n],
        refs[n : n + 2],
        refs[n + 2 : 2 * n + 2],
        refs[2 * n + 2 :],
    )
    state_refs, semaphores = refs[:3], refs[3:]
    z, i, t = (pl.program_id(a) for a in range(3))
    Z, I, last = pl.num_programs(0), pl.num_programs(1), stride.most - 1
    copies = remote_copies(keys, landing, semaphores[0], semaphores[1], axis) if send else []

    def save(*state):
        for ref, x in zip(state_refs, state, strict=True):
            ref[...] = x

    @pl.when((z == 0) & (i == 0) & (t == 0))
    def _():
        if copies:
            neighbour_is_ready(axis)
        for copy in copies:
            copy.start()

    @pl.when(t == 0)
    def _():
        before = lse_before[0, 0].T
        save(before, jnp.where(before == -jnp.inf, 0.0, 1.0), o_before[0, 0])

    @pl.when(t < walk_length(counts, stride, maps.row(z), i))
    def _():
        j = walk_tile(table, stride, maps.row(z), i, t)
        seen = tiles.visible(spec, tpu.tags_of(spec, q_tag), tpu.tags_of(spec, k_tag), j)
        s = tiles.scores(q[0, 0], k[0, 0], spec.scale, seen)
        save(*tiles.absorb(tuple(ref[...] for ref in state_refs), s, v[0, 0]))

    @pl.when(t == last)
    def _():
        o_ref[0, 0], after = tiles.finish(tuple(ref[...] for ref in state_refs))
        lse_ref[0, 0] = after.T

    @pl.when((z == Z - 1) & (i == I - 1) & (t == last))
    def _():
        for copy in copies:
            copy.wait()
