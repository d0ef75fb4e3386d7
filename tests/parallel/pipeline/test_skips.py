"""A U-ViT in a pipeline on a V, whose skips stay on their devices.

Legend: p devices, V = 2p virtual stages, u one of them, k microbatches."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp import config, sharding
from fdp.collectives import psum, shard_map, vary
from fdp.count import bytes as closed
from fdp.count import flops, pipeline
from fdp.count.compare import mismatches, relative_error, sent_by
from fdp.experiment import standard
from fdp.mesh import AXES, abstract_mesh, make_mesh
from fdp.models.uvit import Smoothing
from fdp.mpmd import StagedStep
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.fixed import gpipe, zbv
from fdp.parallel.pipeline.folded import folded
from fdp.parallel.pipeline.library import WAVES, named
from fdp.parallel.pipeline.placement import wave
from fdp.parallel.pipeline.table import (
    FALL_B,
    FALL_F,
    FALL_W,
    FIRST_B,
    FIRST_F,
    IDLE,
    LAST_B,
    TURN_B,
    TURN_F,
    TURN_W,
    B,
    F,
    W,
    table,
)
from fdp.step import TrainStep
from tests.parallel.pipeline.test_executor import sends

UVIT = {"layers": 5, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32}
BATCH, MICRO = 8, 4
KINDS = {
    **{FIRST_F: "F", F: "F", TURN_F: "F", FALL_F: "F"},
    **{FIRST_B: "B", B: "B", TURN_B: "B", FALL_B: "B", LAST_B: "B"},
    **{W: "W", TURN_W: "W", FALL_W: "W"},
}


def configured(degrees: dict[str, int], schedule: str = "zbv", **model: Any):
    c = config.base()
    c.model.update(UVIT | {"kind": "uvit"} | model)
    c.model.image.update(size=8, patch=2, conditioning="tokens")
    c.objective.name, c.data.source = "flow", "blank"
    c.train.update(batch=BATCH, microbatches=MICRO, zero=1)
    c.mesh.update(dict.fromkeys(AXES, 1) | degrees)
    c.pipeline.schedule = schedule
    return c


def program(degrees: dict[str, int]) -> TrainStep:
    e = standard(configured(degrees))
    return TrainStep(e, make_mesh(e.degrees, jax.devices()[: math.prod(e.degrees.values())]))


def test_a_u_vit_on_a_v_equals_one_device_and_sends_no_skip():
    one, p = program({}), program({"pp": 2, "dp": 2, "tp": 2})
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (BATCH, 8, 8, 3)).astype(np.float32)
    batch = {"images": images, "labels": np.arange(BATCH, dtype=np.int32) % 10}
    noised = jax.device_get(jax.jit(one.corrupt)(batch, jax.random.key(0)))
    variables = jax.tree.map(  # equal weights of the output would leave the blocks no gradient
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype),
        jax.device_get(one.init(0).variables),
    )
    specs = p.specs.variable_specs(), sharding.batch_specs(noised, p.objective.dims)
    given = jax.device_put((variables, noised), sharding.shardings(p.mesh, specs))
    traced = jax.jit(p.grads).trace(*given)
    compiled = traced.lower().compile()
    got, want = jax.device_get((compiled(*given), jax.jit(one.grads)(variables, noised)))
    assert relative_error(got[0], want[0]) < 1e-6
    off = jax.tree.map(relative_error, got[1], want[1])
    assert max(jax.tree.leaves(off)) < 1e-5, off
    held_out, whole = (x.jit_eval_step()(variables, batch, 0)[0] for x in (p, one))
    assert relative_error(held_out, whole) < 1e-6
    for device in range(2):
        formula = closed.traffic(p, device=device)
        assert formula and not mismatches(formula, sent_by(p, compiled, device))
    assert flops.executed(p) == pipeline.dot_flops(p, traced.jaxpr)
    assert sends(compiled.as_text(), dict(p.mesh.shape)) == (2, {"tp"})  # one each way, as of a DiT


@pytest.mark.fast
@pytest.mark.parametrize("name", WAVES)
@pytest.mark.parametrize("p", [2, 3, 4])
def test_a_skip_and_its_gradient_wait_in_slots_of_their_own(name: str, p: int):
    order = named(name, p, 2 * p)
    found, place = table(order, halves=True), order.placement
    assert place.transfers([(u, 2 * p - 1 - u) for u in range(p)]) == 2 * (2 * p - 2)
    skips, held = ([{} for _ in range(p)] for _ in range(2))
    for row in found.rows:
        for i, mine in enumerate(row.tolist()):
            at = dict(zip(found.fields, mine, strict=True))
            if at["kind"] == IDLE:
                continue
            kind, u, k = KINDS[at["kind"]], place.stages[i][at["chunk"]], at["microbatch"]
            assert (at["kind"] >= TURN_F or at["kind"] == LAST_B) == (u >= p)
            assert (at["kind"] in (TURN_F, TURN_B, TURN_W)) == (u == p)
            if (kind, at["chunk"]) in (("F", 0), ("B", 1)):
                skips[i][at["skip"]] = (kind, u, k)
            elif kind != "W":
                assert skips[i].pop(at["skip"]) == (kind, 2 * p - 1 - u, k)
            half = found.halves[at["chunk"]]
            assert at["residual"] < half.residuals or kind == "W"
            assert at["stash"] < half.stashes or kind == "F"
            if kind != "F":
                name = "residual" if kind == "B" else "stash"
                assert held[i].pop((name, at["chunk"], at[name])) == (u, k)
            if kind != "W":
                name = "residual" if kind == "F" else "stash"
                held[i][name, at["chunk"], at[name]] = (u, k)
    assert not any(skips) and not any(held)


@pytest.mark.fast
def test_a_u_vit_is_searched_on_a_v():
    e = standard(configured({"pp": 2}, "searched"))
    assert isinstance(e.grads, folded) and e.grads.order.placement == wave(2)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("schedule", "layers", "said"),
    [
        ("1f1b", 5, r"'1f1b' puts virtual stages .* set pipeline\.schedule to one of zbv, v_half"),
        ("zbv", 7, r"\(7 - 1\) / 2 % 2 = 1; set model\.layers=9"),
        ("v_min", 6, r"6 % 2 = 0; set model\.layers=7"),
    ],
)
def test_a_config_whose_skips_would_travel_is_refused(schedule: str, layers: int, said: str):
    with pytest.raises(config.UserError, match=said):
        config.validate(configured({"pp": 2}, schedule, layers=layers))


@pytest.mark.fast
def test_what_keeps_no_skip_at_home_is_refused():
    with pytest.raises(ValueError, match=r"devices = \[0, 1, 1, 0\], not \[0, 1\] of p=2"):
        folded(gpipe(2, MICRO))
    e = standard(configured({"pp": 2}))
    with pytest.raises(ValueError, match="unlike layers, rise and fall of UViT"):
        StagedStep(e, zbv(2, MICRO))
    mesh = make_mesh(e.degrees, jax.devices()[:2])
    with pytest.raises(config.UserError, match=r"grads=folded\(order\) only, not scheduled"):
        TrainStep(replace(e, grads=scheduled(zbv(2, MICRO))), mesh)
    uneven = e.model.clone(shape=replace(e.model.shape, layers=7))
    with pytest.raises(config.UserError, match=r"\(7 - 1\) / 2 % 2 = 1; set model\.layers=9"):
        TrainStep(replace(e, model=uneven), mesh)
    plain = standard(configured({"pp": 2}, kind="dit", layers=4))
    with pytest.raises(config.UserError, match="DiT has no two stacks joined by skips"):
        TrainStep(replace(plain, grads=e.grads), mesh)


@pytest.mark.fast
def test_the_smoothing_sends_to_its_group_alone():
    """A permute, which waits for devices of all stages, would hang in an operation of one."""
    mesh = abstract_mesh(dict.fromkeys(AXES, 1) | {"cp": 2})

    def loss(x: jax.Array) -> jax.Array:
        params = {"w": vary(jnp.ones((3, 3, 3, 3)), "cp"), "b": vary(jnp.ones(3), "cp")}
        return psum(Smoothing(3).apply({"params": params}, x).sum(), "cp")

    mapped = shard_map(jax.grad(loss), mesh, (P(None, "cp"),), P(None, "cp"))
    traced = str(jax.make_jaxpr(mapped)(jnp.zeros((1, 4, 4, 3))))
    assert "all_gather" in traced and "ppermute" not in traced
