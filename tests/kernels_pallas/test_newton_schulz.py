"""Newton-Schulz: the kernels against their oracle, and what they keep, compute and read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from fdp.count import hlo, jaxpr
from fdp.kernels_pallas import newton_schulz, walks
from fdp.kernels_pallas.newton_schulz import orthogonal, reference
from tests.kernels_pallas.compiled import PLATFORMS, compiled_text, kernels

P = PartitionSpec
SIZES = (2, 12, 20), (2, 1, 21, 9)
KERNEL = functools.partial(orthogonal, backend="tpu", interpret=True)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_gradient(f, x, dy):
    y, back = jax.vjp(f, x)
    return y, *back(dy)


def test_values_and_gradients():
    """Of matrices of no multiple of a tile, wide and tall, one of them zero."""
    given = [(draw(*shape), draw(*shape, seed=1)) for shape in SIZES]
    given[0][0][1] = 0

    def all_by(f, given):
        return [with_gradient(f, x, dy) for x, dy in given]

    run = jax.jit(all_by, static_argnums=0, compiler_options=hlo.QUICK)
    for got, want in zip(run(KERNEL, given), run(reference, given), strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.fast
def test_matrices_that_do_not_fit_take_the_other_path():
    assert newton_schulz.in_vmem(512, 1024, "tpu") and not newton_schulz.in_vmem(1024, 1024, "tpu")
    assert not newton_schulz.in_vmem(8, 8, "gpu") and not newton_schulz.in_vmem(8, 8)
    for x in (jnp.zeros((1, 1024, 1024)), jnp.zeros((1, 8, 8), jnp.bfloat16)):
        text = str(jax.make_jaxpr(functools.partial(orthogonal, backend="tpu"))(x))
        assert "pallas_call" not in text
    with pytest.raises(ValueError, match="backend = 'cuda' is unknown"):
        orthogonal(jnp.zeros((1, 8, 8)), backend="cuda")


@pytest.mark.fast
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6)])
def test_counted_flops(shape, platform, monkeypatch):
    monkeypatch.setattr(walks, "platform", lambda: platform)
    x = jnp.zeros(shape)
    forward, retaken = newton_schulz.flops(*shape[1:])
    assert (retaken > 0) == (platform == "tpu")
    assert products(jax.make_jaxpr(orthogonal)(x)) == 3 * forward
    made = jax.make_jaxpr(functools.partial(with_gradient, orthogonal))(x, x)
    assert products(made) == jaxpr.dot_flops(made) == 3 * (3 * forward + retaken)


def products(made):
    """FLOPs, in kernels by their own products and not by what they say of themselves."""
    inside = [e for e, _ in jaxpr.equations(made) if e.primitive.name == "pallas_call"]
    if not inside:
        return jaxpr.dot_flops(made)
    return sum(3 * jaxpr.dot_flops(eqn.params["jaxpr"]) for eqn in inside)  # a program a matrix


@pytest.mark.fast
def test_inside_a_checked_shard_map():
    """Matrices over one axis, cotangents over both: types fit, and gradients are summed."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "tp"), (AxisType.Auto,) * 2)
    specs = P("tp"), P("dp", "tp")

    def gradient(x, dy):
        return jax.grad(lambda x: (orthogonal(x, backend="tpu") * dy[0]).sum())(x)

    f = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=P("tp"))
    made = jax.make_jaxpr(f)(draw(4, 6, 8), draw(2, 4, 6, 8))
    assert made.out_avals[0].shape == (4, 6, 8) and "psum" in str(made)


# With the compilers
# -------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.parametrize("platform", PLATFORMS)
def test_forward_and_backward_compile(platform):
    """On a TPU one kernel a direction, whatever the size; on a GPU none."""

    def local(*matrices):
        return tuple(orthogonal(x) for x in matrices)

    shapes = (2, 512, 1024), (2, 300, 200), (2, 9, 5)
    avals = [(shape, jnp.float32, P("dp")) for shape in shapes]
    text = compiled_text(platform, local, *avals, out_specs=(P("dp"),) * 3)
    assert kernels(text) == (6 if platform.startswith("v5e") else 0)
