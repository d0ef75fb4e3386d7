"""Stacks of patterns refuse, by name and before a program is compiled, what they cannot run."""

import build as builders
import jax
import jax.numpy as jnp
import pytest

from fdp.mesh import AXES
from fdp.models import module
from fdp.models.attention import Attention, Softmax
from fdp.models.layers import SwiGLU
from fdp.models.module import Module, compact
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, Layer, Stack, layer
from fdp.models.transformer import Transformer
from fdp.parallel.masks import Mask

pytestmark = pytest.mark.fast
ONE = dict.fromkeys(AXES, 1)
SOFTMAX = layer(Block, mixing=layer(Attention, core=Softmax(Mask())), ffn=layer(SwiGLU))


class Mean(Module):
    """A mixing layer that knows nothing of other devices: the mean over its own positions, scaled
    by its layer input."""

    shape: object

    @compact
    def __call__(self, x_BxLxD, where, given=None):
        return jnp.broadcast_to(x_BxLxD.mean(1, keepdims=True), x_BxLxD.shape) * (
            1 if given is None else given
        )


MEAN = layer(Block, mixing=layer(Mean), ffn=layer(SwiGLU))


def shape(**changes) -> ModelShape:
    return ModelShape(**(builders.SMALL | {"layers": 4} | changes))


def model(*pattern: Layer, **changes) -> Transformer:
    return Transformer(shape(**changes), pattern)


def test_a_pattern_that_does_not_divide_the_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers % blocks of the pattern = 4 % 3; set layers=6"):
        Stack(shape(), (MEAN, SOFTMAX, MEAN))
    with pytest.raises(ValueError, match="= 4 % 0; set layers=4"):
        Stack(shape(), ())


def test_layer_inputs_reach_their_blocks_and_other_lengths_are_refused() -> None:
    made = model(MEAN, SOFTMAX)
    ids_BxL = jnp.zeros((1, 4), jnp.int32)
    variables = {"params": builders.parameters(made, 4)}

    @jax.jit
    def hidden(inputs_N):
        args = made, variables, ids_BxL, jnp.zeros(1), None, inputs_N
        return module.run(*args, method="hidden")[0]

    plain, ones = hidden(None), hidden((jnp.ones(2), jnp.ones(2)))
    assert jnp.array_equal(plain, ones)
    assert not jnp.array_equal(plain, hidden((jnp.array([1.0, 2.0]), jnp.ones(2))))
    message = r"layer input \[0\] of shape \(4,\) must lead with .* = 4 / 2 / 1 = 2"
    with pytest.raises(ValueError, match=message):
        hidden((jnp.ones(4), jnp.ones(2)))


@pytest.mark.parametrize(
    ("degrees", "changes", "cut"),
    [
        ({"cp": 2}, {}, r"S/\(cp·tp\) = 8/\(2·1\)"),
        ({"tp": 2}, {"sequence_parallel": True}, r"S/\(cp·tp\) = 8/\(1·2\)"),
    ],
)
def test_a_mixing_layer_that_says_nothing_of_other_devices_runs_on_its_own_only(
    degrees: dict, changes: dict, cut: str
) -> None:
    noised = {"inputs": jnp.zeros((1, 8), jnp.int32)}
    made = model(SOFTMAX, MEAN, **changes)
    made.check(1, noised, ONE)
    with pytest.raises(ValueError, match=rf"^Mean states no check\(.*{cut}.*set mesh.cp=1"):
        made.check(1, noised, ONE | degrees)


def test_a_mixing_layer_without_a_decoding_state_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Mean has no cached decoding"):
        model(SOFTMAX, MEAN).decode_state(1, 8)
