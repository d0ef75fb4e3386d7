"""Parameter counts of published models against the figures their makers print."""

import dataclasses

import pytest
from build import experiment, tiny

from fdp.count.step import microbatch
from fdp.models.shape import ModelShape
from fdp.models.transformer import transformer
from fdp.parallel.masks import Mask
from fdp.price import shapes

pytestmark = pytest.mark.fast

# Billions as on the model cards, to the digits given there.
PUBLISHED = {
    "llama3-8b": (8.03, None), "llama3-70b": (70.55, None), "llama3.1-405b": (405.85, None),
    "llama2-7b": (6.74, None), "llama2-70b": (68.98, None), "mixtral-8x7b": (46.70, 12.88),
    "mixtral-8x22b": (140.63, 39.2),
    "qwen3-30b-a3b": (30.53, 3.35), "qwen3-235b-a22b": (235.09, 22.2),
    "deepseek-v3": (671.03, 37.55), "gpt-oss-20b": (20.91, None), "gpt-oss-120b": (116.8, None),
    "gpt3-175b": (174.6, None),
}  # fmt: skip


def tiny_shape():
    return ModelShape.of(tiny().model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    total, active = PUBLISHED[name]
    model = shapes.named(name)
    assert model.parameters() / 1e9 == pytest.approx(total, rel=1e-3)
    if active is not None:
        assert model.active_parameters() / 1e9 == pytest.approx(active, rel=0.005)


def test_our_own_model_has_the_parameters_and_flops_of_its_program():
    e = experiment(tiny())
    model = e.model.shape
    assert model.parameters() == microbatch(e, 0).parameters
    tokens = e.fit.batch * e.data.seq_len
    per_token = model.forward_flops(e.data.seq_len, causal=False)
    assert 3 * per_token * tokens == microbatch(e, tokens).flops


def test_switches_have_the_parameters_of_their_layers():
    switches = {"model.qk_norm": True, "model.bias": True, "model.tied": True, "model.conv": 4}
    switches["model.time_conditioning"] = True
    e = experiment(tiny(**switches))
    assert e.model.shape.parameters() == microbatch(e, 0).parameters


def test_a_causal_mask_halves_the_scores_only():
    m = tiny_shape()
    scores = 4 * 64 * m.heads * m.head_dim * m.layers
    assert m.forward_flops(64, causal=False) - m.forward_flops(64, causal=True) == scores / 2


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"gated": False}, "an FFN that is not gated"),
        ({"kv_rank": 8, "value_dim": 4}, "latent attention, values of another width than keys"),
        ({"head_dim": 7}, "an odd head_dim"),
    ],
)
def test_what_the_builder_lacks_is_refused_by_name(changes, lacking):
    shape = dataclasses.replace(tiny_shape(), **changes)
    with pytest.raises(ValueError, match=f"'this model' cannot be built: .* lack {lacking}; give"):
        transformer(shape, Mask())
    assert shape.parameters() > 0 and not tiny_shape().unbuildable


def test_published_models_are_built_where_the_stock_blocks_suffice():
    names = {name for name, m in shapes.PUBLISHED.items() if not m.unbuildable}
    assert {"llama3-8b", "qwen2.5-7b", "ultrascale-1b", "mixtral-8x7b"} <= names
    assert not names & {"gpt3-175b", "deepseek-v3", "nemotron4-15b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"heads": 32, "kv_heads": 5}, "32 heads are not divisible by 5 kv_heads"),
        ({"experts": 4, "topk": 8}, "topk=8 is not within 1..experts=4"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(shapes.named("llama3-8b"), **changes)


def test_an_unknown_model_names_the_closest():
    with pytest.raises(ValueError, match="unknown model 'llama3-80b': did you mean 'llama3-"):
        shapes.named("llama3-80b")
