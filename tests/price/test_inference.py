"""Priced inference steps: counts equal to the jaxpr of the real phases, kernel times against
measurements, limits.
"""

import csv
import gzip
from pathlib import Path

import build as builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import sample_cached

from fdp.collectives import shard_map
from fdp.count import jaxpr
from fdp.count.counts import Rows
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models.transformer import transformer
from fdp.parallel.masks import Mask
from fdp.price import hardware, inference
from fdp.price.inference import GQA_70B, LLADA_8B, Degrees, ForwardPass
from fdp.price.shapes import named
from fdp.sampling.cached import BlockDecoder
from fdp.sampling.noise import Draw

pytestmark = pytest.mark.fast
MATMULS = Path(__file__).parents[2].parent / "shared/data/planning/comm/gemm_bf16_vidur.csv.gz"
B, L, R = 8, 12, 4


def small(**changes):
    sizes = {"layers": 3, "kv_heads": 4, "ffn": 32, "vocab": 32}
    return builders.model("bidirectional", **{**sizes, **changes}).shape


def program(c, mesh, kind):
    """Jaxpr of one refresh, reuse or autoregressive step inside shard_map."""
    model = transformer(c, Mask())
    how, key = BlockDecoder(model, 30, R), jax.random.key(0)
    shapes, specs = builders.shapes_and_specs(model, L)
    state, (_, cache) = P(BATCH_AXES), model.decode_state(B, L)
    z, ids = jax.ShapeDtypeStruct((B, L), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)
    if kind == "refresh":

        def refresh(params, ids, z):
            return how.refresh(params, key, ids, z, jnp.int32(0), jnp.int32(R))

        f = shard_map(refresh, mesh, (specs, state, state), (state, cache))
        return jax.make_jaxpr(f)(shapes, ids, z)
    whole = jax.eval_shape(lambda: model.decode_state(B, L)[0])

    def reuse(params, cache, ids, z):
        return how.reuse(params, cache, key, ids, z, jnp.int32(0), jnp.int32(R))

    return jax.make_jaxpr(shard_map(reuse, mesh, (specs, cache, state, state), (state, cache)))(
        shapes, whole, ids, z
    )


@pytest.mark.parametrize("kind", ["refresh", "reuse"])
@pytest.mark.parametrize(
    ("dp", "tp", "changes"),
    [
        (1, 1, {}),
        (8, 1, {}),
        (2, 4, {}),
        (4, 2, {"dtype": "bfloat16"}),
        (2, 4, {"sequence_parallel": True}),
        (1, 2, {"kv_heads": 8, "qk_norm": True}),
    ],
)
def test_flops_and_collectives_are_those_of_the_programs(kind, dp, tp, changes):
    c = small(**changes)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"dp": dp, "tp": tp})
    made = program(c, mesh, kind)
    shape, degrees = c, Degrees(tp, dp)
    work = ForwardPass(B, L if kind == "refresh" else R, L, R)
    assert inference.flops(shape, work, degrees) == jaxpr.dot_flops(made)
    counted: dict = {}
    for one in jaxpr.collectives(made, mesh.shape):
        assert one.axes == ("tp",)
        at = one.op.replace("-", "_"), one.payload_bytes
        counted[at] = counted.get(at, 0) + one.count
    listed = inference.collectives(shape, work, degrees, bool(changes.get("sequence_parallel")))
    assert {(op, nbytes): times for op, nbytes, times in listed} == counted
    wire = sum(one.wire_bytes * one.count for one in jaxpr.collectives(made, mesh.shape))
    assert inference.wire_bytes(listed, tp) == pytest.approx(wire, rel=1e-12)


def test_an_autoregressive_step_is_one_row():
    c = small()
    model = transformer(c, Mask("causal"))
    shapes, specs = builders.shapes_and_specs(model, L)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": 4})

    def run(p, ids):
        return sample_cached(model, p, Draw(jax.random.key(0), ids, L, 30), 31)[0]

    made = jax.make_jaxpr(shard_map(run, mesh, (specs, P()), P()))(shapes, jnp.arange(2))
    one = inference.flops(c, ForwardPass(2, 1, L, 1), Degrees(4, 1))
    assert jaxpr.dot_flops(made) == L * one


def test_a_whole_pass_is_the_models_forward():
    c = small()
    shape = c
    degrees = dict.fromkeys(AXES, 1)
    whole = transformer(c, Mask()).counts(Rows(B, L, B * L), degrees)
    assert inference.flops(shape, ForwardPass(B, L, L, L), Degrees(1, 1)) == whole.forward.flops
    norms = (2 * shape.layers + 1) * shape.width
    assert inference.weight_bytes(shape, 1) == 4 * (whole.parameters - norms)


def test_the_cache_and_parameters_have_the_bytes_of_their_arrays():
    c = small(dtype="bfloat16")
    model = transformer(c, Mask())
    arrays = jax.tree.leaves(jax.eval_shape(lambda: model.decode_state(B, L)[0]))
    total = sum(a.size * a.dtype.itemsize for a in arrays)
    shape = c
    assert inference.cache_bytes(shape, B, L, Degrees(1, 1)) == total
    assert inference.cache_bytes(shape, B, L, Degrees(4, 2)) == total // 8
    assert inference.weight_bytes(LLADA_8B, 1) == pytest.approx(2 * 8.0e9, rel=0.02)
    assert inference.weight_bytes(GQA_70B, 1) == pytest.approx(2 * 70.6e9, rel=0.01)


@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_matmuls_are_as_far_from_measured_ones_as_stated(gpu):
    if not MATMULS.exists():
        pytest.skip("the measured matmuls are not beside the project")
    with gzip.open(MATMULS, "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == gpu]
    m, n, k = (np.array([int(row[name]) for row in rows]) for name in ("M", "N", "K"))
    measured = np.array([float(row["time_us"]) for row in rows]) * 1e-6
    seconds = np.maximum(*inference.matmul_bounds(m, n, k, gpu)) + inference.KERNEL
    error = np.abs(seconds / measured - 1)
    assert len(rows) > 2000
    assert (np.median(error), np.quantile(error, 0.9)) == pytest.approx(
        inference.MATMUL_ERROR[gpu], abs=6e-4
    )
    if gpu == "h100":
        assert measured.min() == pytest.approx(inference.KERNEL)


def test_regimes():
    refresh, reuse = ForwardPass(8, 2048, 2048, 32), ForwardPass(8, 32, 2048, 32)

    def price(work, tp, dp):
        return inference.fastest(LLADA_8B, work, Degrees(tp, dp), "h100")

    assert price(refresh, 1, 8).bound == "compute"
    assert price(reuse, 1, 8).bound == "memory"
    assert price(refresh, 1, 8).seconds < price(refresh, 8, 1).seconds
    assert price(reuse, 8, 1).seconds < price(reuse, 1, 8).seconds
    assert price(refresh, 1, 8).terms["network from 1 MiB"] == 0
    # Weights are read once a step: doubling the rows of a memory-bound step costs little.
    twice = price(ForwardPass(8, 64, 2048, 64), 1, 8)
    assert price(reuse, 1, 8).seconds < twice.seconds < 1.3 * price(reuse, 1, 8).seconds


def test_terms_scale_as_their_formulas():
    work = ForwardPass(8, 512, 512, 512)
    one, two = (inference.price(LLADA_8B, work, Degrees(2, dp), "h100").terms for dp in (4, 2))
    for name in ("matmul compute", "attention compute", "elementwise"):
        assert two[name] == pytest.approx(2 * one[name])
    assert two["launch"] == one["launch"] == pytest.approx(inference.KERNEL * (9 * 32 + 4))
    # One row against a long cache waits for the cache.
    row = inference.price(LLADA_8B, ForwardPass(8, 1, 2**17, 1), Degrees(2, 4), "h100").terms[
        "attention memory"
    ]
    rate = hardware.chip("h100").hbm_bandwidth * inference.coefficient("hbm", "h100")
    assert row == pytest.approx(
        inference.cache_bytes(LLADA_8B, 8, 2**17, Degrees(2, 4)) / rate, rel=1e-4
    )
    # 3 requests on 2 replicas wait for the one with two of them.
    uneven, even = (
        inference.price(LLADA_8B, ForwardPass(b, 512, 512, 512), Degrees(4, 2), "h100")
        for b in (3, 4)
    )
    assert uneven.seconds == even.seconds


def test_a_parallel_sequence_is_chosen_where_it_is_faster():
    work = ForwardPass(8, 2048, 2048, 32)
    both = [inference.price(LLADA_8B, work, Degrees(8, 1), "h100", sp) for sp in (False, True)]
    assert both[1].terms["elementwise"] < both[0].terms["elementwise"]
    best = inference.fastest(LLADA_8B, work, Degrees(8, 1), "h100")
    assert best.seconds == min(step.seconds for step in both)
    assert not inference.fastest(
        LLADA_8B, ForwardPass(8, 33, 2048, 33), Degrees(8, 1), "h100"
    ).sequence_parallel


@pytest.mark.parametrize(
    ("work", "degrees", "message"),
    [
        (
            ForwardPass(8, 32, 64, 32),
            Degrees(3, 1),
            "heads = 32 is not divisible by tp = 3: choose tp among",
        ),
        (ForwardPass(4, 32, 64, 32), Degrees(1, 8), "dp = 8 replicas and 4 requests"),
        (
            ForwardPass(8, 128, 64, 32),
            Degrees(1, 8),
            "head_rows ≤ rows ≤ keys must hold: 32, 128, 64",
        ),
        (ForwardPass(8, 32, 64, 32), Degrees(16, 1), "tp = 16 exceeds the 8 chips"),
    ],
)
def test_bad_steps_are_refused(work, degrees, message):
    with pytest.raises(ValueError, match=message):
        inference.price(LLADA_8B, work, degrees, "h100")


def test_other_bad_input():
    with pytest.raises(ValueError, match="kv_heads = 8 is not divisible by tp = 16"):
        inference.check(GQA_70B, ForwardPass(8, 1, 1, 1), Degrees(16, 1))
    with pytest.raises(ValueError, match=r"rows % tp = 9 % 2 = 1"):
        inference.price(
            LLADA_8B, ForwardPass(8, 9, 64, 9), Degrees(2, 1), "h100", sequence_parallel=True
        )
    with pytest.raises(ValueError, match=r"model\.time_conditioning=False"):
        inference.price(
            small(time_conditioning=True), ForwardPass(8, 1, 1, 1), Degrees(1, 8), "h100"
        )
    with pytest.raises(ValueError, match="lack a mixture of 8 experts"):
        inference.check(named("mixtral-8x7b"), ForwardPass(8, 1, 1, 1), Degrees(1, 8))


def test_states_of_a_window_read_their_prefix_once():
    """Memory of attention: queries, each state's own rows, and one prefix for all of a request."""
    P, R, W = 32_768, 8, 6
    bytes_of = {}
    for name, prefix, states in (("own", 0, 1), ("shared", P, W), ("pairs", P, 2)):
        work = ForwardPass(W, R, P + R, R, prefix, states)
        terms = inference.price(LLADA_8B, work, Degrees(8, 1), "h100").terms
        bytes_of[name] = terms["attention memory"]
    one = inference.cache_bytes(LLADA_8B, 1, P, Degrees(8, 1)) / (
        hardware.chip("h100").hbm_bandwidth * inference.coefficient("hbm", "h100")
    )
    assert bytes_of["own"] - bytes_of["shared"] == pytest.approx((W - 1) * one)
    assert bytes_of["pairs"] - bytes_of["shared"] == pytest.approx((W // 2 - 1) * one)
    with pytest.raises(ValueError, match="prefix = 33000, keys = 32776, rows = 8, states = 1"):
        inference.price(LLADA_8B, ForwardPass(W, R, P + R, R, 33_000), Degrees(8, 1), "h100")
