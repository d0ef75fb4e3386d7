"""Flash attention kernels in interpret mode against the oracle, and compiled for hardware that is
not here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from fdp.kernels_pallas import flash, tiles
from fdp.kernels_pallas.attend import attend
from fdp.kernels_pallas.flash import reference, seen_by
from fdp.objectives.block_diffusion import BlockDiffusionRule
from fdp.parallel.masks import Mask
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
    """The kernels in interpret mode."""
    f = lambda q, k, v: attend(q, k, v, mask, **tags, backend=backend, interpret=True)
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
    "rule": (Mask(rule=BlockDiffusionRule(24, 4)), Q, K),
}


def arguments(name):
    """(mask, tags) of a case; positions for every sequence, so that cases share a program."""
    mask, *tags = CASES[name]
    names = ("q_position", "k_position", "q_segment", "k_segment")
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
    f = lambda q, k, v: attend(q, k, v, CAUSAL, backend=backend, interpret=True)
    got = jax.jit(partial(with_gradients, f))(*arrays)
    wide = [x.astype(jnp.float32) for x in arrays]
    tags = {"q_position": Q, "k_position": K}
    assert_close(got, oracle(wide, tags, CAUSAL), forward=0.03, backward=0.03)


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
        assert walked.sum() <= {"zig-zag": 1.7, "rule": 2.5}.get(name, 1.3) * live.sum()


def test_inside_shard_map():
    """Batch sharded, keys replicated: their gradient is summed over the devices.

    Unchecked, because the interpreter mixes varying and unvarying values; the compilers below
    check."""
    q, k, v, do, dlse = inputs(B=2, N=16, M=16, H=2, K=1)
    k, v = k[:1], v[:1]
    mesh = Mesh(np.array(jax.devices()[:2]), ("dp",), axis_types=(AxisType.Auto,))
    local = partial(attend, mask=CAUSAL, backend="gpu", interpret=True)
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
        mask = Mask("causal", packed=True, rule=BlockDiffusionRule(500, 4))
        places = jnp.arange(1000)
        return attend(q, k, v, mask, places, places, segment, segment)

    avals = [((2, 1000, H, C), dtype, P("dp")) for H in (8, 2, 2)] + [
        ((2, 1000), jnp.int32, P("dp"))
    ]
    assert kernels(compiled_text(platform, local, *avals)) == 3


@pytest.mark.aot
@pytest.mark.parametrize("platform", PLATFORMS)
def test_replicated_keys_compile(platform):
    """Keys that do not vary over the mesh axis over which queries vary."""
    local = lambda q, k, v: attend(q, k, v, CAUSAL, jnp.arange(64), jnp.arange(64))
    avals = [((2, 64, 4, 64), jnp.bfloat16, P("dp")), *[((1, 64, 4, 64), jnp.bfloat16, P())] * 2]
    assert kernels(compiled_text(platform, local, *avals)) == 3
