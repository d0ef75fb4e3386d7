"""The front of attention: what it chooses, parts of the keys on every platform, few queries,
refusals.

Legend: B batch, N queries, M keys, H query heads, K key heads, C head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.kernels_pallas import attend as front
from fdp.kernels_pallas import blockwise, flash, walks
from fdp.kernels_pallas.attend import attend, attend_backward
from fdp.kernels_pallas.flash import reference, seen_by
from fdp.objectives.block_diffusion import BlockDiffusionRule
from fdp.parallel.masks import Mask
from tests.kernels_pallas.compiled import PLATFORMS, compiled_text, kernels
from tests.kernels_pallas.oracle import assert_close, inputs, with_gradients

fast = pytest.mark.fast
BACKENDS = ("xla", "tpu", "gpu")
CAUSAL = Mask("causal")


def oracle(arrays, mask, q_tags, k_tags):
    seen = seen_by(mask, q_tags, k_tags)
    return jax.jit(partial(with_gradients, lambda q, k, v: reference(q, k, v, seen)))(*arrays)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_keys_add_up(backend, monkeypatch):
    """What a ring does: (out, lse) of two sets of keys merged, and the gradients that each set
    contributes given the global out and lse, are those of all keys."""
    monkeypatch.setattr(flash, "tile_sizes", lambda *_: (32, 16))
    mask = Mask("causal", window=30, packed=True)
    q, k, v, do, _ = arrays = inputs(N=32, M=64, H=4, K=2, C=12)
    places, segment = (jnp.arange(32) + 9, jnp.arange(64)[::-1]), jnp.arange(96) // 20
    segments = jnp.tile(segment[places[0]], (2, 1)), jnp.tile(segment[places[1]], (2, 1))
    how = {"backend": backend, "interpret": True}

    @jax.jit
    def run(q, k, v, do):
        out = lse = None
        dq, grads = 0, []
        parts = [slice(0, 32), slice(32, 64)]
        tags = [(places[0], places[1][p], segments[0], segments[1][:, p]) for p in parts]
        for part, at in zip(parts, tags, strict=True):
            new = attend(q, k[:, part], v[:, part], mask, *at, out_type=jnp.float32, **how)
            out, lse = new if out is None else blockwise.merge_lse(out, lse, *new)
        for part, at in zip(parts, tags, strict=True):
            d = attend_backward(q, k[:, part], v[:, part], out, lse, do, mask, *at, **how)
            dq, grads = dq + d[0], [*grads, d[1:]]
        return out, lse, dq, *(jnp.concatenate(x, 1) for x in zip(*grads, strict=True))

    want = oracle(
        (*arrays[:4], jnp.zeros_like(arrays[4])), mask, *zip(places, segments, strict=True)
    )
    assert_close(run(q, k, v, do), want)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_few_queries_split_the_keys(backend, monkeypatch):
    """Parts of 64 keys; empty, short, odd and full caches; empty slots hold large values."""
    monkeypatch.setattr(front, "PART", 64)
    B, N, M = 4, 5, 320
    arrays = inputs(B, N, M, H=6, K=2, C=24)
    length = jnp.array([0, 3, 211, M])
    q_position, k_position = length[:, None] + jnp.arange(-N, 0), jnp.arange(M)
    beyond = (k_position >= length[:, None])[:, :, None, None]
    q, k, v, do, dlse = arrays
    arrays = q, jnp.where(beyond, 1e4, k), jnp.where(beyond, 1e4, v), do, dlse
    parts = []
    inner = flash.flash_attention
    monkeypatch.setattr(
        flash, "flash_attention", lambda q, *a, **b: parts.append(len(q)) or inner(q, *a, **b)
    )
    f = lambda q, k, v: attend(
        q, k, v, CAUSAL, q_position, k_position, backend=backend, interpret=True
    )
    got = jax.jit(partial(with_gradients, f))(*arrays)
    assert parts == [B * 5]
    spread = (jnp.broadcast_to(k_position, (B, M)),)
    assert_close(got, oracle(arrays, CAUSAL, (q_position,), spread))
    assert not got[0][0].any() and (got[1][0] == -np.inf).all()


WHOLE = [Mask(), CAUSAL, Mask("causal", 9), Mask("causal", packed=True)]
WHOLE.append(Mask(rule=BlockDiffusionRule(24, 4)))


@fast
@pytest.mark.parametrize("mask", WHOLE)
def test_short_sequences_in_order_equal_tiles(mask):
    """Whole scores, and the lse that costs nothing where it is not used."""
    arrays = inputs(N=48, M=48)
    segment = jnp.tile(jnp.arange(48) // 20, (2, 1)) if mask.packed else None
    place = jnp.arange(48)
    whole, tiled = (
        jax.jit(
            partial(
                with_gradients,
                lambda q, k, v, at=at: attend(q, k, v, mask, at, at, segment, segment),
            )
        )(*arrays)
        for at in (None, place)
    )
    assert_close(whole, tiled)
    both = lambda q, k, v: attend(q, k, v, mask, None, None, segment, segment)
    one = lambda q, k, v: both(q, k, v)[0]
    logs = [" log(" in jax.jit(f).lower(*arrays[:3]).compile().as_text() for f in (both, one)]
    assert logs == [True, False]


@fast
def test_defaults_take_the_xla_path_on_cpu():
    assert walks.choose_backend(None) == "xla"


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
            {"q_position": jnp.arange(36)},
            r"q_position has shape \(36,\) but q has B = 2, length = 37: pass \[37\]",
        ),
        (
            {"k_position": jnp.arange(43.0)},
            "k_position has dtype float32: token indices are integers, cast to int32",
        ),
        (
            {"mask": Mask(packed=True)},
            "mask.packed = True but q_segment is NoneType: pass the segment ids",
        ),
        (
            {"q_segment": jnp.arange(37)},
            r"mask.packed = False but q_segment is .*: use Mask\(packed=True\)",
        ),
        ({"backend": "cuda"}, "backend = 'cuda' is unknown: xla, tpu, gpu or None"),
    ],
)
def test_bad_input_says_what_to_change(change, message):
    shape, dtype = change.pop("k", (2, 43, 2, 16)), change.pop("dtype", jnp.float32)
    with pytest.raises(ValueError, match=message):
        attend(jnp.zeros((2, 37, 4, 16), dtype), jnp.zeros(shape), jnp.zeros(shape), **change)


@fast
def test_gradients_take_the_results_of_the_same_queries():
    q, k, lse = jnp.zeros((2, 37, 4, 16)), jnp.zeros((2, 43, 2, 16)), jnp.zeros((2, 4, 36))
    message = r"take out and dout of that shape and lse \(2, 4, 37\), not .*, lse \(2, 4, 36\)"
    with pytest.raises(ValueError, match=message):
        attend_backward(q, k, k, q, lse, q, Mask())


@fast
def test_a_mask_refuses_what_is_no_rule():
    with pytest.raises(ValueError, match="needs the methods __call__ and meets"):
        Mask(rule=lambda q, k: q == k)
    with pytest.raises(ValueError, match="mask kind 'full' is unknown"):
        Mask("full")
    with pytest.raises(ValueError, match="window = -1"):
        Mask(window=-1)


@fast
def test_cudnn_is_taken_only_where_it_covers_the_case(monkeypatch):
    q, k = jnp.zeros((1, 8, 4, 64), jnp.bfloat16), jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    covers = front.cudnn_covers
    # This process has no GPU: it compiles for an absent one.
    assert not covers(q, k, CAUSAL, "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert covers(q, k, CAUSAL, "gpu") and covers(q, k[:, :4], Mask(), "gpu")
    assert not covers(q, k[:, :4], CAUSAL, "gpu")
    assert not covers(q, k, Mask("causal", window=4), "gpu")
    assert not covers(q, k, Mask(rule=BlockDiffusionRule(4, 2)), "gpu")
    assert not covers(q.astype(jnp.float32), k, CAUSAL, "gpu")
    asked = []

    def cudnn(q, k, v, **how):
        asked.append(how)
        return 2 * q, q[..., 0]

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    _, lse = attend(q, k, k, CAUSAL)
    assert asked == [{"is_causal": True, "implementation": "cudnn", "return_residual": True}]
    assert lse.shape == (1, 4, 8) and lse.dtype == jnp.float32
    total = lambda which: lambda q: attend(q, k, k, CAUSAL)[which].sum().astype(jnp.float32)
    assert (jax.grad(total(0))(q) == 2).all()
    with pytest.raises(ValueError, match="cuDNN's lse has no gradient"):
        jax.grad(total(1))(q)
    # Parts of a sum are not rounded: not cuDNN.
    jax.eval_shape(lambda q: attend(q, k, k, CAUSAL, out_type=jnp.float32), q)
    assert len(asked) == 3


# With the compilers
# -------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("C", [64, 128])
def test_decoding_compiles(platform, C):
    """A cache of 128K keys, five queries, eight heads over two."""

    def local(q, k, v, q_position):
        return attend(q, k, v, CAUSAL, q_position, jnp.arange(2**17))

    avals = [((2, n, h, C), jnp.bfloat16, P("dp")) for n, h in ((5, 8), (2**17, 2), (2**17, 2))]
    avals.append(((2, 5), jnp.int32, P("dp")))
    assert kernels(compiled_text(platform, local, *avals, gradient=False)) == 1
