"""The convolution before attention: against a loop, over cp in every layout against one device, and
its bytes by formula.

Legend: B sequences, L positions, W taps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import experiment, program, tiny
from jax.sharding import PartitionSpec as P

from fdp.collectives import psum, shard_map
from fdp.config import UserError
from fdp.count import bytes as closed
from fdp.count import hlo
from fdp.count.compare import sent
from fdp.count.step import microbatch
from fdp.mesh import AXES, make_mesh
from fdp.models import conv, module
from fdp.models.conv import ShortConvolution
from fdp.parallel.context.layouts import CONTIGUOUS, ZIGZAG, SequenceLayout, permutation, positions
from fdp.step import TrainStep

pytestmark = pytest.mark.fast
B, L, D, W = 2, 32, 3, 4
LAYOUTS = (CONTIGUOUS, ZIGZAG, *(SequenceLayout("striped", block) for block in (1, 2, 4)))
rng = np.random.default_rng(0)
X = rng.normal(size=(B, L, D)).astype(np.float32)
TARGET = rng.normal(size=(B, L, D)).astype(np.float32)
FILTER = rng.normal(size=(W, D)).astype(np.float32)
SEGMENT = np.array([[0] * 9 + [1] * 2 + [2] * 21, [0] * 17 + [1] * 15], np.int32)


def by_hand(x: np.ndarray, segment: np.ndarray) -> np.ndarray:
    out = np.zeros(x.shape)
    for b, p, d in np.ndindex(B, L, W):
        if p >= d and segment[b, p] == segment[b, p - d]:
            out[b, p] += FILTER[d] * x[b, p - d].astype(float)
    return out


def outcome(layout: SequenceLayout, w, x, index, segment, target):
    """((loss, y), gradients) of this device's share."""
    layer = ShortConvolution(W, layout)

    def loss(w, x):
        y, _, _ = module.run(layer, {"params": {"w": w}}, x, index, segment)
        return psum(((y - target) ** 2).sum(), "cp"), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(w, x)


@functools.cache
def one_device(packed: bool):
    segment = SEGMENT if packed else np.zeros_like(SEGMENT)
    return jax.jit(functools.partial(outcome, CONTIGUOUS))(
        FILTER, X, jnp.arange(L), segment, TARGET
    )


def test_it_is_the_sum_over_the_nearest_past_positions_of_the_document() -> None:
    for packed in (False, True):
        (_, y), _ = one_device(packed)
        expected = by_hand(X, SEGMENT if packed else np.zeros_like(SEGMENT))
        np.testing.assert_allclose(y, expected, atol=1e-5)
    plain, _, _ = module.run(
        ShortConvolution(W, CONTIGUOUS), {"params": {"w": FILTER}}, X, jnp.arange(L)
    )
    np.testing.assert_allclose(plain, one_device(False)[0][1], atol=1e-6)
    moved = X.copy()
    moved[:, 10] += 1  # nothing before it changes, nor four places after it
    change = np.abs(by_hand(moved, SEGMENT * 0) - by_hand(X, SEGMENT * 0)).max((0, 2))
    assert set(np.flatnonzero(change)) == {10, 11, 12, 13}


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda at: f"{at.kind}{at.block}")
def test_every_layout_equals_one_device_and_sends_what_the_formula_says(
    layout: SequenceLayout, cp: int
) -> None:
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": cp})
    order = permutation(layout, L, cp)

    def local(w, x, segment, target):
        return outcome(layout, w, x, positions(layout, L // cp), segment, target)

    spec = P(None, "cp")
    mapped = shard_map(local, mesh, (P(), spec, spec, spec), ((P(), spec), (P(), spec)))
    compiled = None
    for packed in (False, True):  # one program: without documents all ids are equal
        segment = SEGMENT if packed else np.zeros_like(SEGMENT)
        given = (FILTER, *(x[:, order] for x in (X, segment, TARGET)))
        compiled = compiled or jax.jit(mapped).lower(*given).compile(hlo.QUICK)
        (loss, y), (of_w, of_x) = compiled(*given)
        (want_loss, want_y), (want_w, want_x) = one_device(packed)
        np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
        np.testing.assert_allclose(y, np.asarray(want_y)[:, order], atol=1e-5)
        np.testing.assert_allclose(of_w, want_w, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(of_x, np.asarray(want_x)[:, order], atol=1e-5)
    length, reach = L // cp, W - 1
    runs = {"contiguous": 1, "zigzag": 2}.get(layout.kind, length // layout.block)
    # Of a run, its last positions; what needs no other device, or came with a nearer one, is free.
    far = {(1, 2): 1, (2, 2): 2}.get((layout.block, cp), reach)
    far = far if layout.kind == "striped" else reach
    wire = {"activations": 2 * runs * far * B * D * 4, "documents": runs * far * B * 4}
    found = sent(compiled, mesh)
    assert found["collective-permute", ("cp",)] == sum(wire.values())
    assert conv.halo_bytes(layout, length, cp, reach, B * D * 4) == wire["activations"] / 2


CASES = {
    "cp4·tp2·zigzag·documents": {"mesh.cp": 4, "mesh.tp": 2, "context.layout": "zigzag"},
    "dp2·cp2·tp2·SP·remat·striped": {
        "mesh.dp": 2,
        "mesh.cp": 2,
        "mesh.tp": 2,
        "model.sequence_parallel": True,
        "model.remat": "full",
        "context.layout": "striped",
        "context.stripe": 2,
    },
}


@functools.cache
def trained(case: str):
    """(loss, gradients, bytes, formula) of one program; "" is one device."""
    c = tiny(**{"objective.name": "autoregressive", "model.conv": W}, **CASES.get(case, {}))
    documents = np.cumsum(np.arange(32) % 11 == 10).astype(np.int32)
    e = experiment(c, segments=np.tile(documents, (8, 1)))
    p = TrainStep(e, make_mesh(c.mesh))
    parameters = sum(x.size for x in jax.tree.leaves(p.specs.shapes))
    assert microbatch(e, 0).parameters == parameters
    variables, batch = p.init(0).variables, e.data.train.take(range(8))
    noised = jax.jit(p.corrupt)(jax.device_put(batch, p.batch_shardings()), jax.random.key(0))
    compiled = jax.jit(p.grads).lower(variables, noised).compile(hlo.QUICK)
    loss, grads, _ = compiled(variables, noised)
    return float(loss), jax.device_get(grads), sent(compiled, p.mesh), closed.traffic(p)


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_it_trains_as_one_device_and_sends_what_the_formula_says(case: str) -> None:
    (loss, grads, counted, formula), (want_loss, want, _, _) = trained(case), trained("")
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert np.abs(want["layers"]["attention"]["conv"]["w"]).max() > 1e-4
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)
    assert counted == pytest.approx(dict(formula))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"model.conv": 4, "mesh.cp": 8, "context.layout": "zigzag"},
            r"4 taps reads 3 positions .* L = 2 on cp = 8 .*conv=3",
        ),
        ({"model.conv": 1}, r"model.conv = 1 taps mix no positions: set 0, or 2"),
        (
            {"model.conv": 4, "objective.name": "block_diffusion", "objective.block": 8},
            r"conv = 4 mixes neighbours of one sequence",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        program(tiny(**wrong))


def test_cached_decoding_is_refused() -> None:
    model = experiment(tiny(**{"model.conv": 4})).model
    with pytest.raises(
        ValueError, match=r"model.conv = 4 has no cached decoding under a mask .*set model.con"
    ):
        model.decode_state(1, 32)
