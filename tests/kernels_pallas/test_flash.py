"""Flash attention kernels in interpret mode against the oracle, and compiled for hardware that is
not here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from fdp.kernels_pallas import core, flash, tiles
from fdp.kernels_pallas.flash import flash_attention, reference, seen_by
from fdp.kernels_pallas.masks import Mask
from tests.kernels_pallas.compiled import PLATFORMS, compiled_text, kernels
from tests.kernels_pallas.oracle import assert_close, inputs, with_gradients

fast = pytest.mark.fast
P = PartitionSpec
BACKENDS = ("tpu", "gpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a side from a few dozen tokens."""
    monkeypatch.setattr(flash, "tile_sizes", lambda *_: (32, 16))


@partial(jax.jit, static_argnames=("mask", "backend"))  # one program for all cases of a mask
def kernel(arrays, tags, mask, backend):
    """`flash_attention` in interpret mode."""
    f = lambda q, k, v: flash_attention(
        q, k, v, mask, **tags, backend=backend, interpret=backend != "xla"
    )
    return with_gradients(f, *arrays)


@partial(jax.jit, static_argnames="mask")
def oracle(arrays, tags, mask):
    """`reference` on the same arguments."""
    q_tags, k_tags = (
        tuple(x for name, x in tags.items() if name.startswith(side)) for side in "qk"
    )
    return with_gradients(
        lambda q, k, v: reference(q, k, v, seen_by(mask, q_tags, k_tags)), *arrays
    )


def zigzag(length, shard, shards):
    """Positions of one zig-zag shard: chunk i and chunk 2·shards - 1 - i."""
    half = length // 2
    late = (2 * shards - 1 - shard) * half + jnp.arange(length - half)
    return jnp.concatenate([shard * half + jnp.arange(half), late])


def documents(length, seed):
    """Segment ids of two packed sequences."""
    return jnp.sort(jax.random.randint(jax.random.key(seed), (2, length), 0, 3))


Q, K = jnp.arange(37), jnp.arange(43)
CAUSAL = Mask("causal")
CASES = {
    "bidirectional": (Mask(), Q, K),
    "causal": (CAUSAL, Q, K),
    "causal, keys 16 behind": (CAUSAL, Q, K + 16),
    "zig-zag": (CAUSAL, zigzag(37, 1, 4), zigzag(43, 2, 4)),
    "positions per sequence": (CAUSAL, jnp.stack([Q, Q[::-1]]), K),
    "blind": (CAUSAL, Q - 100, K),
    "window": (Mask(window=7), Q, K - 3),
    "causal window": (Mask("causal", window=9), Q, K),
    "packed": (Mask("causal", packed=True), Q, K, documents(37, 7), documents(43, 8)),
}


def arguments(name):
    """(mask, tags) of a case; positions for every sequence, so that cases share a program."""
    mask, *tags = CASES[name]
    names = ("q_position_N", "k_position_M", "q_segment_N", "k_segment_M")
    return mask, {
        key: jnp.broadcast_to(x, (2, x.shape[-1])) for key, x in zip(names, tags, strict=False)
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, backend):
    mask, tags = arguments(name)
    arrays = inputs()
    got = kernel(arrays, tags, mask, backend)
    assert_close(got, oracle(arrays, tags, mask))
    if name == "blind":
        assert not any(got[i].any() for i in (0, 2, 3, 4)) and (got[1] == -np.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_and_padded_heads(backend):
    """head_dim 24 is padded to 32, three heads share one key head."""
    arrays = inputs(B=1, H=3, K=1, C=24, dtype=jnp.bfloat16)
    f = lambda q, k, v: flash_attention(q, k, v, CAUSAL, backend=backend, interpret=True)
    got = jax.jit(partial(with_gradients, f))(*arrays)
    wide = [x.astype(jnp.float32) for x in arrays]
    tags = {"q_position_N": Q, "k_position_M": K}
    assert_close(got, oracle(wide, tags, CAUSAL), forward=0.03, backward=0.03)


def test_defaults_take_the_xla_path_on_cpu():
    mask, tags = arguments("zig-zag")
    arrays = inputs()
    assert core.choose_backend(None) == "xla"
    assert_close(kernel(arrays, tags, mask, "xla"), oracle(arrays, tags, mask))
    q, k, v = arrays[:3]
    out = flash.attention(q, k, v, CAUSAL)
    np.testing.assert_allclose(out, reference(q, k, v, seen_by(CAUSAL, (Q,), (K,)))[0], atol=1e-5)


@fast
@pytest.mark.parametrize("name", CASES)
def test_ranges_hold_every_tile_that_is_needed_and_skip_the_others(name):
    mask, tags = arguments(name)
    q_tags, k_tags = (tuple(x for key, x in tags.items() if key.startswith(side)) for side in "qk")
    seen = np.asarray(seen_by(mask, q_tags, k_tags))[:, 0]
    needed = np.pad(seen, ((0, 0), (0, 3), (0, 5))).reshape(2, 5, 8, 6, 8).any((2, 4))
    tiled = tiles.tile_tags(q_tags, 1, 8, 2), tiles.tile_tags(k_tags, 1, 8, 2)
    walks = tiles.range_walk(mask, *tiled, True), tiles.range_walk(mask, *tiled[::-1], False)
    for walk, live in zip(walks, (needed, needed.swapaxes(1, 2)), strict=True):
        first, count = (np.asarray(x)[..., None] for x in walk)
        tile = np.arange(live.shape[2])
        walked = (tile >= first) & (tile < first + count)
        assert (walked >= live).all()
        assert walked.sum() <= (1.7 if name == "zig-zag" else 1.3) * live.sum()


@fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": (2, 43, 3, 16)},
            r"H = 4 query heads are not a multiple of K = 3 key heads: H mod K = 1, choose K \| H",
        ),
        ({"k": (2, 43, 2, 8)}, r"q \(2, 37, 4, 16\), k \(2, 43, 2, 8\).*: make B and C agree"),
        ({"k": (2, 0, 2, 16)}, "over an empty dim"),
        ({"dtype": jnp.float16}, "must be equal, float32 or bfloat16: cast them"),
        (
            {"q_position_N": jnp.arange(36)},
            r"q_position has shape \(36,\) but q has B = 2, length = 37: pass \[37\]",
        ),
        (
            {"k_position_M": jnp.arange(43.0)},
            "k_position has dtype float32: token indices are integers, cast to int32",
        ),
        (
            {"mask": Mask(packed=True)},
            "mask.packed = True but q_segment is NoneType: pass the segment ids",
        ),
        (
            {"q_segment_N": jnp.arange(37)},
            r"mask.packed = False but q_segment is .*: use Mask\(packed=True\)",
        ),
        ({"backend": "cuda"}, "backend = 'cuda' is unknown: xla, tpu, gpu or None"),
    ],
)
def test_bad_input_says_what_to_change(change, message):
    shape, dtype = change.pop("k", (2, 43, 2, 16)), change.pop("dtype", jnp.float32)
    with pytest.raises(ValueError, match=message):
        flash_attention(
            jnp.zeros((2, 37, 4, 16), dtype), jnp.zeros(shape), jnp.zeros(shape), **change
        )


@fast
def test_cudnn_is_taken_only_where_it_covers_the_case(monkeypatch):
    q, k = jnp.zeros((1, 8, 4, 64), jnp.bfloat16), jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    assert not flash.cudnn_covers(
        q, k, CAUSAL, "gpu"
    )  # this process has no GPU: it compiles for an absent one
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert flash.cudnn_covers(q, k, CAUSAL, "gpu") and flash.cudnn_covers(
        q, k[:, :4], Mask(), "gpu"
    )
    assert not flash.cudnn_covers(q, k[:, :4], CAUSAL, "gpu")
    assert not flash.cudnn_covers(q, k, Mask("causal", window=4), "gpu")
    assert not flash.cudnn_covers(q.astype(jnp.float32), k, CAUSAL, "gpu")


def test_inside_shard_map():
    """Batch sharded, keys replicated: their gradient is summed over the devices.

    Unchecked, because the interpreter mixes varying and unvarying values; the compilers below
    check."""
    q, k, v, do, dlse = inputs(B=2, N=16, M=16, H=2, K=1)
    k, v = k[:1], v[:1]
    mesh = Mesh(np.array(jax.devices()[:2]), ("dp",), axis_types=(AxisType.Auto,))
    local = partial(flash_attention, mask=CAUSAL, backend="gpu", interpret=True)
    specs = {"in_specs": (P("dp"), P(), P()), "out_specs": P("dp")}
    sharded = jax.shard_map(local, mesh=mesh, **specs, check_vma=False)
    whole = lambda q, k, v: reference(
        q, *(jnp.repeat(x, 2, 0) for x in (k, v)), seen_by(CAUSAL, (Q[:16],), (Q[:16],))
    )
    want = jax.jit(partial(with_gradients, whole))(q, k, v, do, dlse)
    assert_close(jax.jit(partial(with_gradients, sharded))(q, k, v, do, dlse), want)


# With the compilers
# -------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("dtype", "C"), [(jnp.bfloat16, 64), (jnp.bfloat16, 256), (jnp.float32, 128)]
)
def test_forward_and_backward_compile(platform, dtype, C, monkeypatch):
    """Inside shard_map with checked types, chosen by the mesh alone, with the tiles that hardware
    gets.
    """
    monkeypatch.undo()

    def local(q, k, v, segment):
        return flash_attention(q, k, v, Mask("causal", packed=True), None, None, segment, segment)

    avals = [((2, 1000, H, C), dtype, P("dp")) for H in (8, 2, 2)] + [
        ((2, 1000), jnp.int32, P("dp"))
    ]
    assert kernels(compiled_text(platform, local, *avals)) == 3


@pytest.mark.aot
@pytest.mark.parametrize("platform", PLATFORMS)
def test_replicated_keys_compile(platform):
    """Keys that do not vary over the mesh axis over which queries vary."""
    avals = [((2, 64, 4, 64), jnp.bfloat16, P("dp")), *[((1, 64, 4, 64), jnp.bfloat16, P())] * 2]
    assert kernels(compiled_text(platform, partial(flash_attention, mask=CAUSAL), *avals)) == 3
