"""FLOPs and parameters of published diffusion transformers against their authors' table, and of a
TTT layer.
"""

import pytest

from fdp.cost import flops

pytestmark = pytest.mark.fast

# Peebles & Xie 2023, table 1 and appendix: layers, width, parameters (millions), multiply-adds
# (billions) at 256×256.
DIT = {
    "S/2": (12, 384, 33, 6.06), "B/2": (12, 768, 130, 23.01),
    "L/2": (24, 1024, 458, 80.71), "XL/2": (28, 1152, 675, 118.64),
}  # fmt: skip


@pytest.mark.parametrize("name", DIT)
def test_dit_has_the_published_size_and_cost(name):
    layers, width, millions, billions = DIT[name]
    assert flops.dit_parameters(layers, width, 2) / 1e6 == pytest.approx(millions, abs=0.6)
    assert flops.dit_forward(layers, width, 2) / 2e9 == pytest.approx(billions, rel=5e-3)


def test_larger_patches_cost_a_quarter_of_the_tokens():
    assert flops.dit_forward(28, 1152, 4) / 2e9 == pytest.approx(29.05, rel=5e-3)
    assert flops.dit_forward(28, 1152, 8) / 2e9 == pytest.approx(7.36, rel=5e-3)


def test_a_ttt_layer_is_linear_in_the_chunk_and_never_in_the_sequence():
    small, large = (flops.ttt_linear_forward(1024, 16, chunk) for chunk in (16, 32))
    assert large - small == 2 * 16 * 2 * 16 * 64
    assert small == 2 * (4 * 1024**2 + 16 * (3 * 64**2 + 2 * 16 * 64))
