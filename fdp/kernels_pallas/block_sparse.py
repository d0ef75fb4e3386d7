"""Block-sparse attention, forward and backward: each block of queries sees only the key blocks on
its list.

The lists are data (top-k selection, vertical-slash patterns, …). The G = H/K query heads of a key
head share a list, which suits the hardware and NSA. Work is proportional to the capacity (XLA) or
the length (kernels) of the lists. S and T are the capacities of the lists of a query block and of a
key block; I query blocks have X queries, J key blocks have Y keys.

Legend: B batch, N queries, M keys, H query heads, K key/value heads, C head_dim, I query blocks, J
key blocks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.kernels_pallas import tiles, walks
from fdp.parallel.masks import Mask

Array = jax.Array
SHARED_BYTES = (
    190 * 2**10
)  # of key blocks in a GPU's shared memory (227 KiB on an H100, with queries and results)
SCALAR_BYTES = 2**19  # of block lists in a TPU's scalar memory (1 MiB, shared with everything else)


class BlockLists(NamedTuple):
    """Which blocks of queries and keys meet, listed from both sides.

    Leading sizes b = 1 or B and k = 1 or K: lists shared by sequences or heads. k_ids int32 [b, k,
    I, S], k_counts [b, k, I]: the key blocks of each query block. q_ids [b, k, J, T], q_counts [b,
    k, J]: the transpose, which the gradients of keys need. Ids beyond the counts are 0. overflow
    int32 []: pairs that did not fit into the transpose; unless it is 0, the kernels return NaN
    gradients of keys."""

    k_ids: Array
    k_counts: Array
    q_ids: Array
    q_counts: Array
    overflow: Array


def block_lists(
    k_ids: Array, k_counts: Array, n_key_blocks: int, capacity: int | None = None
) -> BlockLists:
    """Lists of both sides from those of the query blocks: int [b, k, I, S] distinct ids, [b, k, I]
    lengths.

    capacity T: most query blocks that share one key block; None = I, which always suffices.
    Jittable. Ids beyond the counts are ignored; ids outside 0 … J-1 are dropped and counted as
    overflow. Raises ValueError for bad shapes."""
    if k_ids.ndim != 4 or k_counts.shape != k_ids.shape[:3] or not k_ids.size:
        raise ValueError(
            f"k_ids {k_ids.shape} and k_counts {k_counts.shape} must be [b, k, I, S] and [b, k, "
            "I], S ≥ 1"
        )
    b, k, I, S = k_ids.shape
    T = I if capacity is None else capacity
    if T < 1 or n_key_blocks < 1:
        raise ValueError(f"capacity = {T} and n_key_blocks = {n_key_blocks} must be at least 1")
    counts = jnp.clip(k_counts, 0, S).astype(jnp.int32)
    used = jnp.arange(S) < counts[..., None]
    inside = used & (k_ids >= 0) & (k_ids < n_key_blocks)
    # Bring the usable ids to the front, so that a count describes them.
    order = jnp.argsort(~inside, axis=-1, stable=True)
    ids = jnp.where(
        jnp.take_along_axis(inside, order, -1), jnp.take_along_axis(k_ids, order, -1), 0
    ).astype(jnp.int32)
    counts = inside.sum(-1, dtype=jnp.int32)
    flat = ids.reshape(b * k, I, S), counts.reshape(b * k, I)
    q_ids, q_counts, dropped = jax.vmap(partial(_transposed, J=n_key_blocks, T=T))(*flat)
    overflow = dropped.sum() + (used & ~inside).sum(dtype=jnp.int32)
    lead = (b, k, n_key_blocks)
    return BlockLists(ids, counts, q_ids.reshape(*lead, T), q_counts.reshape(lead), overflow)


def _transposed(ids_IxS: Array, counts_I: Array, J: int, T: int) -> tuple[Array, Array, Array]:
    """(ids [J, T], counts [J], pairs dropped): sorts the pairs by key block, then writes each at
    its rank there."""
    I, S = ids_IxS.shape
    keys = jnp.where(jnp.arange(S) < counts_I[:, None], ids_IxS, J).reshape(-1)
    order = jnp.argsort(keys, stable=True)  # query blocks stay ascending inside a key block
    keys = keys[order]
    rank = jnp.arange(I * S) - jnp.searchsorted(keys, keys)
    full_J = jnp.zeros(J, jnp.int32).at[keys].add(1, mode="drop")
    ids_JxT = jnp.zeros((J, T), jnp.int32).at[keys, rank].set(order // S, mode="drop")
    return ids_JxT, jnp.minimum(full_J, T), jnp.maximum(full_J - T, 0).sum()


def block_sparse_attention(
    q_BxNxHxC: Array,
    k_BxMxKxC: Array,
    v_BxMxKxC: Array,
    lists: BlockLists,
    block_q: int,
    block_k: int,
    mask: Mask = walks.EVERYTHING,
    q_position_N: Array | None = None,
    k_position_M: Array | None = None,
    q_segment_N: Array | None = None,
    k_segment_M: Array | None = None,
    *,
    backend: str | None = None,
    interpret: object = False,
) -> tuple[Array, Array]:
    """`attend.attend` over the listed blocks only → (out [B, N, H, C], lse f32 [B, H, N]).

    Query block i is queries i·block_q … and sees key block j (keys j·block_k …) if j is on its
    list, restricted to the tokens that `mask` allows. Positions and segments as in `attend.attend`.
    A row whose list is empty or masked has out = 0, lse = -inf and zero gradients. On the GPU both
    block sizes are powers of two and block_k ≥ 16. Raises ValueError for shapes, sizes and lists
    that do not fit. Source: Yuan et al. 2025 (NSA), section 3.4, for lists shared by a group of
    heads."""
    walks.check_arrays(q_BxNxHxC, k_BxMxKxC, v_BxMxKxC)
    (B, N, H, C), (M, K) = q_BxNxHxC.shape, k_BxMxKxC.shape[1:3]
    _check_lists(lists, (B, K), N, M, block_q, block_k)
    q_tags = walks.gather_tags(mask, "q", (B, N), q_position_N, q_segment_N)
    k_tags = walks.gather_tags(mask, "k", (B, M), k_position_M, k_segment_M)
    backend = walks.choose_backend(backend)
    if backend == "xla":
        width, G = C, H // K
    else:
        _check_blocks(backend, lists, block_q, block_k)
        _check_shared(backend, block_k, 2 * tiles.power_of_two(C, 16) * k_BxMxKxC.dtype.itemsize)
        # Heads that do not exist fill a row tile: Triton wants powers of two, of 16 rows at least.
        width, G = (
            tiles.power_of_two(C, 16),
            tiles.power_of_two(H // K, tiles.ceil_div(16, block_q)),
        )
    q, k, v = (tiles.pad_dim(x, 3, width) for x in (q_BxNxHxC, k_BxMxKxC, v_BxMxKxC))
    q = tiles.pad_dim(q.reshape(B, N, K, H // K, width), 3, G).reshape(B, N, K * G, width)
    X, split = _row_tile(backend, block_q * G, q.dtype)
    spec = tiles.Spec(mask, C**-0.5, M, backend, interpret, split)
    # Whole blocks first, so that the last one too is `split` row tiles.
    blocks = tiles.fold_queries(q, K, block_q * G)
    q, k, v = (
        blocks.reshape(B * K, -1, X, width),
        *(tiles.tile_keys(x, block_k, backend) for x in (k, v)),
    )
    q_tiles, k_tiles = _block_tags(q_tags, G, block_q, X, B), tiles.tile_tags(k_tags, 1, block_k, B)
    rows, keys = _by_head(lists, B, K)
    if backend == "xla":
        o_ZxIxXxC, lse_ZxIx1xX = scan_blocks(spec, q, k, v, q_tiles, k_tiles, rows)
    else:
        k, v = (_poisoned(*walks.alike((x, lists.overflow))) for x in (k, v))
        o_ZxIxXxC, lse_ZxIx1xX = walks.attend(spec, q, k, v, q_tiles, k_tiles, rows, keys)

    def unfold(x_ZxIxXxC: Array) -> Array:
        x_BxNxKxGxC = tiles.unfold_queries(x_ZxIxXxC, B, N, K * G).reshape(B, N, K, G, -1)
        return x_BxNxKxGxC[:, :, :, : H // K].reshape(B, N, H, -1)

    return unfold(o_ZxIxXxC)[..., :C], unfold(lse_ZxIx1xX.swapaxes(2, 3))[..., 0].swapaxes(1, 2)


def _check_lists(
    lists: BlockLists, lead: tuple[int, int], N: int, M: int, block_q: int, block_k: int
) -> None:
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q = {block_q} and block_k = {block_k} must be at least 1")
    I, J = tiles.ceil_div(N, block_q), tiles.ceil_div(M, block_k)
    if lists.k_ids.shape[2] != I or lists.q_ids.shape[2] != J:
        raise ValueError(
            f"lists hold {lists.k_ids.shape[2]} query blocks and {lists.q_ids.shape[2]} key "
            "blocks, but "
            f"⌈N/block_q⌉ = ⌈{N}/{block_q}⌉ = {I} and ⌈M/block_k⌉ = ⌈{M}/{block_k}⌉ = {J}: build "
            "them for these sizes"
        )
    for size, whole, name in zip(lists.k_ids.shape, lead, ("B", "K"), strict=False):
        if size not in (1, whole):
            raise ValueError(
                f"lists {lists.k_ids.shape} lead with {size}, but {name} = {whole}: use 1 or "
                f"{whole}"
            )


def _check_blocks(backend: str, lists: BlockLists, block_q: int, block_k: int) -> None:
    powers = all(n == tiles.power_of_two(n) for n in (block_q, block_k))
    if backend == "gpu" and not (powers and block_k >= 16):
        raise ValueError(
            f"block_q = {block_q} and block_k = {block_k} on the GPU: choose powers of two, "
            "block_k at least 16"
        )
    if backend == "tpu" and block_k % 8:
        raise ValueError(f"block_k = {block_k} on the TPU: choose a multiple of 8")
    held = 4 * max(lists.k_ids.size, lists.q_ids.size)
    if backend == "tpu" and held > SCALAR_BYTES:
        raise ValueError(
            f"block lists of 4 · {held // 4} = {held} bytes exceed the {SCALAR_BYTES} of a TPU's "
            "scalar memory: "
            "use larger blocks, a smaller capacity, lists shared by heads, or scan over the batch"
        )


def _check_shared(backend: str, block_k: int, position: int) -> None:
    """Raises ValueError for key blocks that do not fit a GPU's shared memory. position: bytes of a
    key and a value."""
    held = tiles.GPU_STAGES * block_k * position
    if backend == "gpu" and held > SHARED_BYTES:
        fits = tiles.power_of_two(SHARED_BYTES // (tiles.GPU_STAGES * position) + 1) // 2
        raise ValueError(
            f"block_k = {block_k} on the GPU: {tiles.GPU_STAGES} stages · {block_k} keys and "
            f"values of {position} "
            f"bytes = {held} bytes exceed the {SHARED_BYTES} of shared memory: set block_k={fits}"
        )


def _row_tile(backend: str, rows: int, dtype) -> tuple[int, int]:
    """(X, split): the rows of a query block as `split` tiles of X rows, small enough for registers
    on the GPU."""
    if backend != "gpu":
        return rows, 1
    X = min(rows, 64 if dtype == jnp.float32 else 128)
    return X, rows // X


def _block_tags(tags: tuple[Array, ...], G: int, block_q: int, X: int, B: int) -> Array:
    """Tags of query blocks [S, I, A, block_q·G] cut into row tiles [S, I·split, A, X]."""
    whole = tiles.tile_tags(tags, G, block_q * G, B)
    S, I, A, rows = whole.shape
    return whole.reshape(S, I, A, rows // X, X).swapaxes(2, 3).reshape(S, I * rows // X, A, X)


def _by_head(lists: BlockLists, B: int, K: int) -> tuple[tiles.Walk, tiles.Walk]:
    """The walks of query blocks and of key blocks, with one leading size: 1, B or Z."""
    b, k = lists.k_ids.shape[:2]
    lead = (B, K) if k > 1 else (b, 1)
    flat = [jnp.broadcast_to(x, lead + x.shape[2:]).reshape(-1, *x.shape[2:]) for x in lists[:4]]
    return tiles.Walk(flat[0], flat[1]), tiles.Walk(flat[2], flat[3])


@jax.custom_vjp
def _poisoned(x: Array, overflow: Array) -> Array:
    """x, whose gradient becomes NaN where pairs are missing from the transposed lists, so that no
    gradient is silently wrong."""
    return x


def _poisoned_forward(x, overflow):
    return x, overflow


def _poisoned_backward(overflow, dx):
    return jnp.where(overflow > 0, jnp.nan, dx), None


_poisoned.defvjp(_poisoned_forward, _poisoned_backward)


# Without a kernel: one list entry of every tile at a time
# -------------------------------------------------------------


def scan_blocks(spec: tiles.Spec, q, k, v, q_tags, k_tags, walk: tiles.Walk) -> tuple[Array, Array]:
    """`walks.attend` in XLA: each step gathers one key block per row tile, O(capacity) work and
    O(R·Y) memory.

    q [Z, I, X, C], k and v [Z, J, Y, C], tags and walk [S, …] → out like q, lse f32 [Z, I, 1, X].
    """
    Z = q.shape[0]

    def spread(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, Z // x.shape[0], 0)

    return _scan_blocks(
        spec, *walks.alike((q, k, v, spread(q_tags), spread(k_tags), jax.tree.map(spread, walk)))
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_blocks(spec, q, k, v, q_tags, k_tags, walk):
    def step(state, entry):
        ids_ZxI, live_ZxI = entry

        def one(state, q_XxC, q_tag, k_YxC, v_YxC, k_tag, j, live):
            seen = _seen(spec, q_tag, k_tag, j, live)
            return tiles.absorb(state, tiles.scores(q_XxC, k_YxC, spec.scale, seen), v_YxC)

        met = (_pick(x, ids_ZxI) for x in (k, v, k_tags))
        return _each(one)(state, q, q_tags, *met, ids_ZxI, live_ZxI), None

    Z, I, X, C = q.shape
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (Z, I, *x.shape)), tiles.begin(X, C))
    state, _ = jax.lax.scan(step, walks.alike((start, q))[0], _entries(walk))
    o, lse = _each(tiles.finish)(state)
    return o.astype(q.dtype), lse.swapaxes(2, 3)


def _scan_blocks_forward(spec, *args):
    o, lse = _scan_blocks(spec, *args)
    return (o, lse), (*args, o, lse)


def _scan_blocks_backward(spec, saved, cotangents):
    q, k, v, q_tags, k_tags, walk, o, lse = saved
    do, dlse = cotangents
    delta, lse = (x.swapaxes(2, 3) for x in walks.row_terms(o, lse, do, dlse))
    heads_Zx1 = jnp.arange(q.shape[0])[:, None]

    def step(sums, entry):
        ids_ZxI, live_ZxI = entry

        def one(q_XxC, q_tag, do_XxC, lse_Xx1, delta_Xx1, k_YxC, v_YxC, k_tag, j, live):
            seen = _seen(spec, q_tag, k_tag, j, live)
            p, ds = tiles.score_gradients(
                q_XxC, k_YxC, v_YxC, do_XxC, lse_Xx1, delta_Xx1, spec.scale, seen
            )
            p, ds = p.astype(q_XxC.dtype), ds.astype(q_XxC.dtype)
            return (
                tiles.matmul(ds, k_YxC, (1, 0)),
                tiles.matmul(ds, q_XxC, (0, 0)),
                tiles.matmul(p, do_XxC, (0, 0)),
            )

        met = (_pick(x, ids_ZxI) for x in (k, v, k_tags))
        dq, dk, dv = _each(one)(q, q_tags, do, lse, delta, *met, ids_ZxI, live_ZxI)
        return (
            sums[0] + dq,
            sums[1].at[heads_Zx1, ids_ZxI].add(dk),
            sums[2].at[heads_Zx1, ids_ZxI].add(dv),
        ), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    sums, _ = jax.lax.scan(step, walks.alike((start, q))[0], _entries(walk))
    return *(s.astype(x.dtype) for s, x in zip(sums, (q, k, v), strict=True)), None, None, None


_scan_blocks.defvjp(_scan_blocks_forward, _scan_blocks_backward)


def _each(f):
    """f mapped over every row tile of every head."""
    return jax.vmap(jax.vmap(f))


def _pick(x_ZxJ: Array, ids_ZxI: Array) -> Array:
    """The entry of each row tile: [Z, J, …], [Z, I] → [Z, I, …]."""
    return jax.vmap(lambda x_J, ids_I: x_J[ids_I])(x_ZxJ, ids_ZxI)


def _entries(walk: tiles.Walk) -> tuple[Array, Array]:
    """Step t of every walk: (ids, whether the step exists), int and bool [S, Z, I]."""
    steps_S = jnp.arange(walk.table.shape[2])
    return jnp.moveaxis(walk.table, 2, 0), steps_S[:, None, None] < walk.counts


def _seen(spec: tiles.Spec, q_tag_AxX: Array, k_tag_AxY: Array, j: Array, live: Array) -> Array:
    seen_XxY = tiles.visible(spec, tuple(q_tag_AxX), tuple(k_tag_AxY), j)
    return (
        jnp.broadcast_to(live, (q_tag_AxX.shape[1], k_tag_AxY.shape[1]))
        if seen_XxY is None
        else seen_XxY & live
    )
