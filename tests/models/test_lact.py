"""LaCT beyond its chunks: what the backward pass keeps, updates on all tokens, refusals.

Legend: B sequences, L positions, H heads, K head dim, F fast width.
"""

import functools

import jax
import numpy as np
import pytest

from fdp.count import hlo
from fdp.kernels_pallas import walks
from fdp.kernels_pallas.newton_schulz import orthogonal
from fdp.mesh import AXES
from fdp.models import fast_weights as fast
from fdp.models.fast_weights import FastWeights, Read
from fdp.models.lact import LaCT
from fdp.models.shape import ModelShape
from fdp.models.two_memories import TwoMemories

B, L, H, K, F = 2, 24, 2, 4, 8
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


WEIGHTS = FastWeights(0.5 * normal(H, F, K), 0.5 * normal(H, F, K), 0.4 * normal(H, K, F))
READ = Read(
    unit(normal(B, L, H, K)),
    unit(normal(B, L, H, K)),
    normal(B, L, H, K),
    np.abs(normal(B, L, H, 3)) * 0.1,
    1 / (1 + np.exp(-normal(B, L, H))),
)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("polish", "momentum", "platform"),
    [(None, True, "cpu"), (orthogonal, False, "cpu"), (orthogonal, True, "tpu")],
    ids=["plain", "muon", "muon-tpu"],
)
def test_the_backward_pass_keeps_what_the_formula_says(polish, momentum, platform, monkeypatch):
    monkeypatch.setattr(walks, "platform", lambda: platform)
    read = READ if momentum else READ._replace(momentum=None)
    first = 4 * H * (3 * F * K + 2 * (2 * F + K))  # the first weights and the lengths of their rows
    rows = 4 * H * (2 * F + K)  # lengths that all sequences share, once more where rows are normed
    for length, chunk, group, prenorm in (
        (24, 4, 0, 0),
        (22, 4, 3, 0),
        (24, 4, 0, 2),
        (22, 4, 3, 1),
    ):
        part = jax.tree.map(lambda x: x[:, :length], read)  # noqa: B023

        def kept(read: Read, weights: FastWeights) -> object:
            run = functools.partial(fast.swiglu_scan, group=group, prenorm=prenorm > 0)  # noqa: B023
            return jax.vjp(lambda *a: run(*a, chunk, polish)[0], read, weights)[1]  # noqa: B023

        found = jax.tree.leaves(jax.eval_shape(kept, part, WEIGHTS))
        flags = {"momentum": momentum, "orthogonalise": polish is not None, "prenorm": prenorm > 0}
        saved, live = fast.scan_memory(length, chunk, K, F, group=group, **flags)
        assert sum(x.size * 4 for x in found) == 4 * B * H * saved + first + prenorm * rows
        every, _ = fast.scan_memory(length, chunk, K, F, **flags)
        assert not group or max(saved, live) < every


@pytest.mark.fast
def test_in_both_directions_all_tokens_are_learnt_from_before_any_is_read():
    run = jax.jit(fast.swiglu_whole, compiler_options=hlo.QUICK)
    out = run(READ, WEIGHTS)
    order = np.random.default_rng(1).permutation(L)
    moved = run(jax.tree.map(lambda x: x[:, order], READ), WEIGHTS)
    np.testing.assert_allclose(moved, out[:, order], atol=1e-5)
    twice = jax.tree.map(lambda x: np.concatenate([x, x], 1), READ)
    read_later, _ = fast.swiglu_scan(twice, WEIGHTS, L)
    np.testing.assert_allclose(out, read_later[:, L:], atol=1e-5)
    plain = READ._replace(momentum=None)

    def kept(read: Read, weights: FastWeights) -> object:
        return jax.vjp(fast.swiglu_whole, read, weights)[1]

    found = jax.tree.leaves(jax.eval_shape(kept, plain, WEIGHTS))
    saved, _ = fast.whole_memory(L, K, F, orthogonalise=False)
    first = 4 * H * (3 * F * K + 2 * (2 * F + K))
    assert sum(x.size * 4 for x in found) == 4 * B * H * saved + first


@pytest.mark.fast
def test_windows_and_directions_that_cannot_run_are_refused():
    one, shape = dict.fromkeys(AXES, 1), ModelShape(1, 8, 2, 2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"window = 25 > sequence length 24: set window=0 for no"):
        LaCT(shape, window=25, parent=None).check(1, 24, one)
    with pytest.raises(ValueError, match=r"window = -1 must be 0 \(no limit\) or positive"):
        LaCT(shape, window=-1, parent=None).check(1, 24, one | {"cp": 2})
    with pytest.raises(ValueError, match=r"near memory reads the past alone; set causal=True"):
        TwoMemories(shape, causal=False, parent=None).check(1, 24, one)
