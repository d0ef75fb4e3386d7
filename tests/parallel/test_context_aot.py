"""The ring, compiled ahead of time for absent TPUs and GPUs: its permutes overlap with attention in the schedule."""

import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fdp.collectives import shard_map
from fdp.cost import aot
from fdp.kernels_pallas.masks import Mask
from fdp.mesh import AXES, make_mesh
from fdp.parallel import layouts
from fdp.parallel.context import CommPlan, attend

WORK = re.compile(r" (fusion|while|custom-call|dot|convolution|call|conditional)\(")


def overlapped(text: str) -> tuple[int, int]:
    """(permutes, of which with work scheduled between start and done), over all computations of a scheduled module."""
    found = total = 0
    for body in re.split(r"\n(?=\S)", text):
        lines = body.splitlines()
        for i, line in enumerate(lines):
            if not (m := re.match(r"\s+(?:ROOT )?(%\S+) = .* collective-permute-start\(", line)):
                continue
            total += 1
            done = next(j for j, l in enumerate(lines) if "collective-permute-done" in l and f"{m[1]})" in l)
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
    shape = jax.ShapeDtypeStruct((1, length, heads, width), "bfloat16", sharding=NamedSharding(mesh, spec))

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, pull = jax.vjp(run, q, k, v)
        return pull(out)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(both).lower(shape, shape, shape)
    total, found = overlapped(aot.compile(lowered).as_text())
    assert total >= 2, "the program has no asynchronous permutes"
    assert found >= total / 2, f"only {found} of {total} permutes have work between start and done"
