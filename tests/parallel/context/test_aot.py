"""Compiled ahead of time for absent TPUs and GPUs: the ring's permutes overlap with attention in
the schedule, and attention to listed blocks compiles at 128K positions."""

import math
import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fdp.collectives import shard_map
from fdp.count import aot
from fdp.kernels_pallas import attend as front
from fdp.mesh import AXES, expand, factor, make_mesh
from fdp.parallel.context import layouts
from fdp.parallel.context.attend import attend
from fdp.parallel.context.lists import attend_blocks
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask
from tests.kernels_pallas.compiled import kernels

WORK = re.compile(r" (fusion|while|custom-call|dot|convolution|call|conditional)\(")


def overlapped(text: str) -> tuple[int, int]:
    """(permutes, of which with work scheduled between start and done), over all computations of a
    scheduled module.
    """
    found = total = 0
    for body in re.split(r"\n(?=\S)", text):
        lines = body.splitlines()
        for i, line in enumerate(lines):
            if not (m := re.match(r"\s+(?:ROOT )?(%\S+) = .* collective-permute-start\(", line)):
                continue
            total += 1
            done = next(
                j for j, l in enumerate(lines) if "collective-permute-done" in l and f"{m[1]})" in l
            )
            found += any(WORK.search(between) for between in lines[i + 1 : done])
    return total, found


def test_the_reader_tells_overlap_from_its_absence() -> None:
    start = "  %p = (f32[8], f32[8]) collective-permute-start(%x), channel_id=1"
    done = "  %q = f32[8] collective-permute-done(%p)"
    work = "  %f = f32[8] fusion(%y), kind=kLoop"
    body = lambda *lines: "\n".join(("%body (a: f32[8]) -> f32[8] {", *lines, "}"))
    assert overlapped(body(start, work, done)) == (1, 1)
    assert overlapped(body(work, start, done)) == (1, 0)


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5p:2x2x2", "h100:8"])
def test_ring_permutes_overlap_with_attention(topology: str) -> None:
    devices = aot.topology_devices(topology)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": len(devices)}, devices)
    length, heads, width = 1024 * len(devices), 8, 128
    plan = CommPlan("ring", layout=layouts.ZIGZAG)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        position = layouts.positions(plan.layout, length // len(devices))
        return attend(q, k, v, Mask("causal"), plan, position)

    spec = PartitionSpec(None, "cp")
    run = shard_map(loss, mesh, (spec,) * 3, spec)
    shape = jax.ShapeDtypeStruct(
        (1, length, heads, width), "bfloat16", sharding=NamedSharding(mesh, spec)
    )

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, pull = jax.vjp(run, q, k, v)
        return pull(out)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(both).lower(shape, shape, shape)
    total, found = overlapped(aot.compile(lowered).as_text())
    assert total >= 2, "the program has no asynchronous permutes"
    assert found >= total / 2, f"only {found} of {total} permutes have work between start and done"


PLANS = {
    "all_gather": (CommPlan("all_gather"), Mask("causal")),
    "ring": (CommPlan("ring", layout=layouts.ZIGZAG), Mask("causal", packed=True)),
    "usp": (CommPlan("usp", 2), Mask("causal", window=1024)),
    "one device": (None, Mask("causal", window=1024)),
}


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "h100:4"])
def test_every_plan_runs_the_kernels_of_the_platform(topology: str) -> None:
    """Four devices of cp, forward and backward, and a window without cp: our kernels are in the
    program, and no array is as large as one head's scores."""
    devices = aot.topology_devices(topology)
    assert len(devices) == 4
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"cp": 4}, devices), "cp")
    local, length = 4096, 4 * 4096

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> list[jax.Array]:
        outs = []
        for plan, mask in PLANS.values():
            segments = (segment, segment) if mask.packed else (None, None)
            if plan is None:
                outs.append(front.attend(q, k, v, mask, None, None, *segments)[0])
            else:
                outs.append(attend(q, k, v, mask, plan, None, segments[0]))
        return outs

    spec, tags = PartitionSpec(None, "cp"), PartitionSpec(None, "cp")
    run = shard_map(one, mesh, (spec, spec, spec, tags), [spec] * len(PLANS))
    array = lambda shape, dtype, s: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, expand(mesh, s))
    )
    q, k = (array((1, length, heads, 128), "bfloat16", spec) for heads in (8, 2))
    segment = array((1, length), "int32", tags)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, segment), q, k, v)
        return pull(out)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(both).lower(q, k, k, segment)
    text = aot.compile(lowered).as_text()
    # All-gather and the window alone: forward, dq, dkv. Rings: each of them in a loop and out of
    # it, so that the last hop sends nothing.
    assert kernels(text) >= 3 * len(PLANS)
    sizes = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in sizes)
    assert largest < local * length, f"an array of {largest} elements"


@pytest.mark.aot
@pytest.mark.parametrize("kind", ["gather", "ulysses", "all_gather"])
@pytest.mark.parametrize("topology", ["v5p:2x2x2", "h100:8"])
def test_attention_to_listed_blocks_compiles_at_128k(topology: str, kind: str) -> None:
    """Eight devices, 128K positions, 8192 of them on each list; grouped queries, bfloat16.

    Blocks of 512 keep the lists within a TPU's scalar memory, blocks of 128 the keys within a GPU's
    shared memory."""
    devices = aot.topology_devices(topology)
    mesh = factor(make_mesh(dict.fromkeys(AXES, 1) | {"cp": len(devices)}, devices), "cp")
    length, block = 2**17, 512 if topology.startswith("v5p") else 128
    width, capacity = 8192 // block, 4096 // block if kind == "gather" else 0
    plan = CommPlan(kind, 8 if kind == "ulysses" else 1, capacity=capacity, layout=layouts.ZIGZAG)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        position = layouts.positions(plan.layout, q.shape[1])
        return attend_blocks(q, k, v, ids, block, Mask("causal"), plan, position)[0]

    spec, lists = PartitionSpec(None, "cp"), PartitionSpec(None, None, "cp")
    run = shard_map(local, mesh, (spec, spec, spec, lists), spec)
    array = lambda shape, dtype, s: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, expand(mesh, s))
    )
    q, k = (array((1, length, heads, 128), "bfloat16", spec) for heads in (32, 8))
    ids = array((1, 1, length // block, width), "int32", lists)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, ids), q, k, v)
        return pull(out)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(both).lower(q, k, k, ids)
    compiled = aot.compile(lowered)
    assert ("all-gather" if kind == "all_gather" else "all-to-all") in compiled.as_text()
    assert aot.memory(compiled).peak < 2**33  # of 80 GiB and more: nothing is of the size of scores
