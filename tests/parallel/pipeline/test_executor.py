"""A scheduled step equals the plain one, on every kind of mesh and model."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from fdp import config, sharding
from fdp.count import bytes as closed
from fdp.count import flops, pipeline
from fdp.count.compare import against_one_device, mismatches, sent_by
from fdp.count.hlo import varying_axes
from fdp.count.hlo_text import HloModule, Instruction, replica_groups
from fdp.data.batches import blank
from fdp.experiment import standard
from fdp.grads import plain
from fdp.mesh import make_mesh
from fdp.parallel.pipeline.chunks import rounds
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.fixed import gpipe, zb_h1
from fdp.parallel.pipeline.library import named
from fdp.parallel.pipeline.orders import Op, Order, recompute, repeat
from fdp.parallel.pipeline.placement import looped
from fdp.parallel.pipeline.table import FIELDS, LAST_B, table
from fdp.step import TrainStep

L, V, BATCH, MICRO = 8, 64, 8, 4
TOKENS = np.random.default_rng(0).integers(0, V - 2, (BATCH, L)).astype(np.int32)
EXPERTS = {"experts": 4, "topk": 2, "ffn": 16, "switch": 0.01, "z": 0.001, "shared": 1}
DENSE = {"layers": 4, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32, "vocab": V}
CASES = {  # name → (schedule, degrees, changes of the config)
    "zb_h1": ("zb_h1", {"pp": 4}, {}),
    "zbv, dp·tp, ZeRO-3, SP": (
        "zbv",
        {"pp": 2, "dp": 2, "tp": 2},
        {"train.zero": 3, "model.sequence_parallel": True},
    ),
    "interleaved, cp, remat": (
        "1f1b",
        {"pp": 2, "cp": 2},
        {"pipeline.chunks": 2, "model.remat": "full", "model.tied": True},
    ),
    "experts": ("1f1b", {"pp": 2, "ep": 2}, {f"model.moe.{k}": v for k, v in EXPERTS.items()}),
}


def program(schedule: str, degrees: dict[str, int], changes: dict) -> TrainStep:
    c = config.base()
    c.model.update(DENSE)
    c.objective.name = "mdlm"
    c.data.seq_len, c.train.batch, c.train.microbatches = L, BATCH, MICRO
    c.pipeline.schedule = schedule
    c.mesh.update(degrees)
    c.update_from_flattened_dict(changes)
    e = standard(c, blank(L, V))
    return TrainStep(e, make_mesh(e.degrees, jax.devices()[: math.prod(e.degrees.values())]))


@functools.cache
def unpiped(ep: int, *changes: tuple[str, Any]) -> tuple[Any, Any, Any]:
    """(variables, noised batch, plain loss with gradients and aux) of a model. Losses of routers
    are of a microbatch of a device, so as many devices share the batch."""
    p = program("1f1b", {"ep": ep}, dict(changes))
    variables = p.init(0).variables
    noised = jax.jit(p.corrupt)({"tokens": TOKENS}, jax.random.key(0))
    return jax.device_get((variables, noised, jax.jit(p.grads)(variables, noised)))


@pytest.mark.parametrize("case", CASES)
def test_a_scheduled_step_equals_the_plain_one(case):
    schedule, degrees, changes = CASES[case]
    p = program(schedule, degrees, changes)
    elsewhere = ("train.zero", "model.sequence_parallel", "model.remat", "pipeline.chunks")
    kept = ((k, x) for k, x in changes.items() if k not in elsewhere)
    variables, noised, want = unpiped(degrees.get("ep", 1), *kept)
    specs = p.specs.variable_specs(), sharding.batch_specs(noised, p.objective.dims)
    given = jax.device_put((variables, noised), sharding.shardings(p.mesh, specs))
    traced = jax.jit(p.grads).trace(*given)
    compiled = traced.lower().compile()
    got = jax.device_get(compiled(*given))
    loss, grads = against_one_device(got[:2], want[:2])
    assert loss < 1e-6 and grads < 1e-5
    assert jax.tree.structure(got[2]) == jax.tree.structure(want[2])
    for a, b in zip(jax.tree.leaves(got[2]), jax.tree.leaves(want[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for device in range(p.mesh.shape["pp"]):
        formula = closed.traffic(p, device=device)
        assert formula and not mismatches(formula, sent_by(p, compiled, device))
    if case != "experts":  # XLA on a CPU computes every row for every expert
        assert flops.executed(p) == pipeline.dot_flops(p, traced)
    permutes, inside = sends(compiled.as_text(), dict(p.mesh.shape))
    assert permutes == 2 and "pp" not in inside  # one each way, outside the conditional
    assert ("dp" in inside) is (p.experiment.zero == 3)  # gathers of its layers


def run_by(i: Instruction) -> list[str]:
    """Computations that an instruction runs."""
    if i.opcode == "conditional":
        return [c for c, _ in i.branches]
    return [*i.called, *re.findall(r"\b(?:body|condition)=%?([\w.\-]+)", i.attrs)]


def sends(text: str, mesh_shape: dict[str, int]) -> tuple[int, set[str]]:
    """Permutes in the loop over ticks, and axes of collectives inside a conditional."""
    total = math.prod(mesh_shape.values())
    bodies = {n: list(body.values()) for n, body in HloModule(text).computations.items()}
    found = [n for n, body in bodies.items() for i in body if i.opcode == "collective-permute"]
    inside = {
        c for body in bodies.values() for i in body if i.opcode == "conditional" for c in run_by(i)
    }
    while more := {c for n in inside for i in bodies.get(n, ()) for c in run_by(i)} - inside:
        inside |= more
    ticks = {n for n, body in bodies.items() if any(i.opcode == "conditional" for i in body)}
    groups = [
        replica_groups(i.attrs, total) for n in inside for i in bodies.get(n, ()) if i.collective
    ]
    axes = {axis for g in groups for axis in varying_axes(g, mesh_shape)}
    return sum(n in ticks - inside for n in found), axes


def test_ticks_and_slots_of_zb_h1():
    found = table(zb_h1(4, 8))
    assert found.ticks == 27 and found.slots == (2, 4, 4)  # 4 microbatches held, as of 1F1B
    assert table(gpipe(4, 8)).slots.residuals == 8
    kinds = found.rows[:, :, FIELDS.index("kind")]
    assert (kinds == LAST_B).sum(0).tolist() == [0, 0, 0, 8]  # the loss is the last stage's


def test_an_order_that_cannot_be_executed_is_named():
    swapped = ((Op("F", 0), Op("BW", 0)), (Op("BW", 0), Op("F", 0)))
    with pytest.raises(ValueError, match=r"stage 1, row 0: BW0 of chunk 0 is too early"):
        table(Order(looped(2), swapped))
    for order, named_op in ((recompute(gpipe(2, 2)), "row 2: R0"), (repeat(gpipe(2, 2), 2), "U0")):
        with pytest.raises(ValueError, match=f"{named_op} .*: this executor runs F, B, W, BW, S"):
            table(order)


@pytest.mark.parametrize(
    ("pp", "grads", "message"),
    [
        (1, scheduled(gpipe(2, MICRO)), r"an order of 2 stages on mesh\.pp=1"),
        (2, plain(MICRO), r"mesh\.pp = 2 devices have a stage each"),
    ],
)
def test_gradients_of_other_stages_than_the_mesh_are_refused(pp, grads, message):
    p = program("gpipe", {"pp": pp}, {})
    e = dataclasses.replace(p.experiment, grads=grads)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            TrainStep(e, p.mesh).grads, p.specs.abstract_state().variables, p.specs.example
        )


def test_stages_that_permute_are_refused_before_they_go_wrong():
    changes = {"pipeline.schedule": "1f1b", "mesh.pp": 2, "mesh.cp": 2, "train.microbatches": 4}
    c = config.base()
    c.update_from_flattened_dict(changes | {"context.plan": "usp"})
    with pytest.raises(config.UserError, match=r"usp permutes .* set context\.plan=all_gather"):
        config.validate(c)
    e = program("1f1b", {"cp": 2}, {"context.plan": "ring"}).experiment
    e = dataclasses.replace(e, degrees={**e.degrees, "pp": 2}, grads=scheduled(gpipe(2, MICRO)))
    p = TrainStep(e, make_mesh(e.degrees, jax.devices()[:4]))
    with pytest.raises(ValueError, match=r"a stage permutes over cp, .* set context\.plan to all_"):
        pipeline.traced(p)


@pytest.mark.parametrize("name", ["zbv", "v_half", "v_min", "dualpipe_v", "1f1b", "zb_h1"])
@pytest.mark.parametrize("p", [2, 3, 4])
def test_every_block_travels_once(name, p):
    place = named(name, p, 2 * p, 2).placement
    sent = [(i, block) for chosen in rounds(place) for i, (block, _) in enumerate(chosen)]
    assert sorted(sent) == [(i, r) for i in range(p) for r in range(place.v)]
    for chosen in rounds(place):
        assert sorted(j for _, j in chosen) == list(range(p))
        assert all(j == place.devices[i * place.v + r] for i, (r, j) in enumerate(chosen))
