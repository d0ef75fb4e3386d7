"""Block-sparse attention on lists against dense attention with the lists as a mask; the lists
themselves.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fdp.kernels_pallas import block_sparse
from fdp.kernels_pallas.block_sparse import block_lists, block_sparse_attention
from fdp.kernels_pallas.flash import reference
from fdp.parallel.masks import Mask, allowed
from tests.kernels_pallas.compiled import PLATFORMS, compiled_text, kernels
from tests.kernels_pallas.oracle import assert_close, inputs, selected, with_gradients

fast = pytest.mark.fast
P = PartitionSpec
N, M, BLOCK_Q, BLOCK_K = 61, 75, 8, 16
I, J = 8, 5
CAUSAL = Mask("causal")
build = jax.jit(block_lists, static_argnums=(2, 3))


def random_lists(b, k, capacity=3, seed=0, n_query=I, n_key=J, room=None):
    """Distinct random ids; the first query block of everybody sees nothing, nobody sees the last
    key block.
    """
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.broadcast_to(np.arange(n_key - 1), (b, k, n_query, n_key - 1)), axis=-1)[
        ..., :capacity
    ]
    counts = rng.integers(0, capacity + 1, (b, k, n_query))
    counts[:, :, 0] = 0
    return build(jnp.asarray(ids), jnp.asarray(counts), n_key, room)


@partial(jax.jit, static_argnames=("mask", "backend", "sizes"))
def sparse(arrays, lists, positions, mask, backend, sizes=(BLOCK_Q, BLOCK_K)):
    f = lambda q, k, v: block_sparse_attention(
        q, k, v, lists, *sizes, mask, *positions, backend=backend, interpret=backend != "xla"
    )
    return with_gradients(f, *arrays)


@partial(jax.jit, static_argnames=("mask", "sizes"))
def dense(arrays, lists, positions, mask, sizes=(BLOCK_Q, BLOCK_K)):
    """The oracle on the mask that the lists mean."""
    heads, n_kv = arrays[0].shape[2], arrays[1].shape[2]
    seen = selected(lists, *sizes, arrays[0].shape[1], arrays[1].shape[1])
    seen = jnp.broadcast_to(seen, (seen.shape[0], n_kv, *seen.shape[2:])).repeat(heads // n_kv, 1)
    seen &= allowed(mask, *positions)
    return with_gradients(lambda q, k, v: reference(q, k, v, seen), *arrays)


@pytest.mark.parametrize(
    ("backend", "lead", "mask"),
    [(name, (2, 2), CAUSAL) for name in ("xla", "tpu", "gpu")]
    + [("tpu", (2, 1), Mask()), ("gpu", (1, 1), Mask())],
)
def test_values_and_gradients(backend, lead, mask):
    arrays = inputs(N=N, M=M)
    lists = random_lists(*lead)
    positions = jnp.arange(N) + 9, jnp.arange(M)
    got = sparse(arrays, lists, positions, mask, backend)
    assert_close(got, dense(arrays, lists, positions, mask))
    assert (got[1][:, :, :BLOCK_Q] == -np.inf).all() and not got[0][:, :BLOCK_Q].any()


@pytest.mark.parametrize(("H", "block_q", "tile"), [(3, 1, None), (12, 8, 16)])
def test_rows_of_a_block_fill_or_exceed_a_tile(H, block_q, tile, monkeypatch):
    """On the GPU: one query a block with three heads is padded to 16 rows; 8 x 16 rows become 8
    tiles.
    """
    if tile:
        monkeypatch.setattr(
            block_sparse, "_row_tile", lambda backend, rows, dtype: (tile, rows // tile)
        )
    arrays = inputs(B=1, N=13, M=40, H=H, K=1)
    n_query = -(-13 // block_q)
    lists, positions = (
        random_lists(1, 1, 2, n_query=n_query, n_key=3),
        (jnp.arange(13), jnp.arange(40)),
    )
    sizes = (block_q, 16)
    assert_close(
        sparse(arrays, lists, positions, CAUSAL, "gpu", sizes),
        dense(arrays, lists, positions, CAUSAL, sizes),
    )


def test_bfloat16_and_packed_segments():
    arrays = inputs(N=N, M=M, dtype=jnp.bfloat16)
    lists, mask = random_lists(2, 2), Mask("causal", packed=True)
    tags = jnp.arange(N), jnp.arange(M), jnp.arange(N) // 30, jnp.arange(M) // 30
    wide = dense([x.astype(jnp.float32) for x in arrays], lists, tags, mask)
    assert_close(sparse(arrays, lists, tags, mask, "xla"), wide, forward=0.03, backward=0.03)


# Lists
# -------------------------------------------------------------------------------------------------


@fast
def test_the_transposed_lists_hold_the_same_pairs():
    lists = random_lists(2, 3)
    for b, k in np.ndindex(2, 3):
        pairs = {
            (i, j)
            for i in range(I)
            for j in np.asarray(lists.k_ids[b, k, i, : lists.k_counts[b, k, i]])
        }
        other = [
            (i, j)
            for j in range(J)
            for i in np.asarray(lists.q_ids[b, k, j, : lists.q_counts[b, k, j]])
        ]
        assert len(other) == len(pairs) and set(other) == pairs
        assert (lists.q_counts[b, k, J - 1], lists.k_counts[b, k, 0]) == (0, 0)
    assert lists.overflow == 0


@fast
def test_overflow_is_counted():
    """Eight query blocks ask for key block 2, two slots: six pairs are missing; an id out of range
    is one more.
    """
    lists = build(jnp.full((1, 1, 8, 1), 2), jnp.ones((1, 1, 8), int), 3, 2)
    assert (lists.overflow, lists.q_counts[0, 0].tolist()) == (6, [0, 0, 2])
    lists = build(jnp.array([[[[7, 1, -1, 0]]]]), jnp.full((1, 1, 1), 3), 3)
    assert (lists.overflow, lists.k_counts[0, 0, 0], lists.k_ids[0, 0, 0, 0]) == (2, 1, 1)


def test_overflow_poisons_the_gradients_of_keys_and_nothing_else():
    arrays = inputs(N=N, M=M)
    lists, positions = random_lists(1, 1, room=1), (jnp.arange(N) + 9, jnp.arange(M))
    assert lists.overflow > 0
    got, want = (
        sparse(arrays, lists, positions, Mask(), "gpu"),
        dense(arrays, lists, positions, Mask()),
    )
    assert np.isnan(got[3]).all() and np.isnan(got[4]).all()
    for a, b in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert_close(sparse(arrays, lists, positions, Mask(), "xla"), want)  # reads no transposed list


@fast
def test_work_on_xla_follows_the_capacity_not_the_keys():
    """The same lists over twice and four times the keys cost the same multiplications."""

    def flops(n_key):
        q, k = jnp.zeros((1, 64, 2, 16)), jnp.zeros((1, 16 * n_key, 1, 16))
        lists = block_lists(jnp.zeros((1, 1, 8, 1), int), jnp.ones((1, 1, 8), int), n_key)
        f = jax.jit(lambda q, k, v: block_sparse_attention(q, k, v, lists, 8, 16, backend="xla")[0])
        return f.lower(q, k, k).compile().cost_analysis()["flops"]

    few, many = flops(4), flops(32)
    assert many < 1.1 * few


@fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"block_q": 16},
            r"lists hold 8 query blocks and 5 key blocks, but ⌈N/block_q⌉ = ⌈61/16⌉ = 4",
        ),
        ({"block_k": 0}, "block_k = 0 must be at least 1"),
        ({"lists": random_lists(3, 1)}, "lead with 3, but B = 2: use 1 or 2"),
        ({"backend": "gpu", "block_k": 15}, "block_k = 15 on the GPU: choose powers of two"),
        (
            {"backend": "gpu", "shared": 2000},
            r"2 stages · 16 keys .* = 4096 bytes exceed the 2000 .* set block_k=4",
        ),
        ({"backend": "tpu", "block_k": 15}, "block_k = 15 on the TPU: choose a multiple of 8"),
        ({"backend": "tpu", "limit": 200}, r"block lists of 4 · 160 = 640 bytes exceed the 200"),
        ({"mask": Mask(packed=True)}, "pass the segment ids"),
    ],
)
def test_bad_input_says_what_to_change(change, message, monkeypatch):
    change = dict(change)
    monkeypatch.setattr(block_sparse, "SCALAR_BYTES", change.pop("limit", 2**19))
    monkeypatch.setattr(block_sparse, "SHARED_BYTES", change.pop("shared", 2**17))
    q, k, v = inputs(N=N, M=M)[:3]
    arguments = {"lists": random_lists(2, 2), "block_q": BLOCK_Q, "block_k": BLOCK_K} | change
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, **arguments)


@fast
def test_bad_lists():
    with pytest.raises(ValueError, match=r"must be \[b, k, I, S\] and \[b, k, I\]"):
        block_lists(jnp.zeros((1, 8, 1), int), jnp.zeros((1, 8), int), 3)
    with pytest.raises(ValueError, match="capacity = 0 and n_key_blocks = 3 must be at least 1"):
        block_lists(jnp.zeros((1, 1, 8, 1), int), jnp.zeros((1, 1, 8), int), 3, capacity=0)


@pytest.mark.aot
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("dtype", "C", "H"), [(jnp.bfloat16, 64, 4), (jnp.bfloat16, 128, 14), (jnp.float32, 128, 2)]
)
def test_forward_and_backward_compile(platform, dtype, C, H):
    """1000 tokens in blocks of 64, lists for every head, built inside the program."""

    def local(q, k, v, ids, counts):
        lists = block_lists(ids, counts, 16, capacity=8)
        return block_sparse_attention(q, k, v, lists, 64, 64, Mask("causal"))

    avals = [((2, 1000, h, C), dtype, P("dp")) for h in (H, 2, 2)]
    avals += [((2, 2, 16, 4), jnp.int32, P("dp")), ((2, 2, 16), jnp.int32, P("dp"))]
    assert kernels(compiled_text(platform, local, *avals)) == 3
