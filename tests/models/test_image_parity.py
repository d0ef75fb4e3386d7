"""DiT and U-ViT give what the published code gives, with the same weights.

`fixtures/dit.npz` and `fixtures/uvit.npz` were written by running facebookresearch/DiT (commit
ed81ce2, models.py) and baofff/U-ViT (commit ce55170, libs/uvit.py) in torch on a CPU. Recipe: build
the model at the sizes below; draw every parameter as k/256 with integers |k| ≤ 63 (1 + k/256 for
the scale of a norm), because at initialisation DiT gives exactly 0; draw images as k/64, and use
times 17 and 903 and labels 1 and 5; run it in evaluation mode. Stored are the integers, under the
published names with the prefix "w:", and the output. The classes that DiT imports from timm
(PatchEmbed, Attention, Mlp) are U-ViT's copies of them.

Legend: D width, H heads, C head_dim, F hidden, P pixels and channels of a patch."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.models import module
from fdp.models.dit import DiT, dit
from fdp.models.image import ImageShape
from fdp.models.layers import exact_gelu
from fdp.models.shape import ModelShape
from fdp.models.uvit import UViT

pytestmark = pytest.mark.fast
D, HEADS, DEPTH, CLASSES = 24, 3, 2, 5
IMAGE = ImageShape(size=8, channels=3, classes=CLASSES, patch=2)
SIZES: dict[str, Any] = {"width": D, "heads": HEADS, "kv_heads": HEADS, "head_dim": D // HEADS}
SIZES |= {"ffn": 2 * D, "vocab": 12, "gated": False}


def published(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """(weights by published name, input of our model, output [B, H, W, C])."""
    with np.load(Path(__file__).parents[1] / "fixtures" / f"{name}.npz") as file:
        arrays = {n: file[n] for n in file}
    weights = {}
    for n, a in arrays.items():
        if n.startswith("w:"):
            one = "norm" in n and n.endswith("weight")
            weights[n[2:]] = a.astype(np.float32) / 256 + one
    images = jnp.asarray(arrays["x"].astype(np.float32) / 64).transpose(0, 2, 3, 1)
    noised = {"inputs": images, "noise": arrays["t"], "labels": arrays["y"]}
    return weights, noised, arrays["out"].transpose(0, 2, 3, 1)


def attention(w: dict[str, np.ndarray], biases: bool) -> dict[str, np.ndarray]:
    """Of qkv [3D, D] and proj [D, D]."""
    heads = (HEADS, D // HEADS)
    q, k, v = w["attn.qkv.weight"].reshape(3, *heads, D).transpose(0, 3, 1, 2)
    found = {"w_q": q, "w_kv": np.stack([k, v]), "b_o": w["attn.proj.bias"]}
    found["w_o"] = w["attn.proj.weight"].T.reshape(*heads, D)
    if biases:
        b = w["attn.qkv.bias"].reshape(3, *heads)
        found |= {"b_q": b[0], "b_kv": b[1:]}
    return found


def block(w: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of one block, whose names begin after "blocks.i."."""
    mlp = {"w_in": w["mlp.fc1.weight"].T, "b_in": w["mlp.fc1.bias"]}
    mlp |= {"w_out": w["mlp.fc2.weight"].T, "b_out": w["mlp.fc2.bias"]}
    if "norm1.weight" in w:
        norms = {
            f"{ours}_norm": {"scale": w[f"norm{i}.weight"], "bias": w[f"norm{i}.bias"]}
            for i, ours in ((1, "attention"), (2, "mlp"))
        }
        return {"attention": attention(w, False), "mlp": mlp} | norms
    both_w = np.split(w["adaLN_modulation.1.weight"].T, 2, axis=1)
    both_b = np.split(w["adaLN_modulation.1.bias"], 2)
    modulations = {
        f"{ours}_modulation": {"w": both_w[i], "b": both_b[i]}
        for i, ours in enumerate(("attention", "mlp"))
    }
    return {"attention": attention(w, True), "mlp": mlp} | modulations


def stacked(weights: dict[str, np.ndarray], prefix: str) -> list[dict[str, np.ndarray]]:
    """The weights of every block of a list, by their names in the block."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, a in weights.items():
        if match := re.fullmatch(rf"{prefix}\.(\d+)\.(.+)", name):
            found.setdefault(int(match[1]), {})[match[2]] = a
    return [found[i] for i in range(len(found))]


def of_all(blocks: list[dict[str, Any]]) -> Any:
    """Blocks as one tree with a leading dim."""
    return jax.tree.map(lambda *x: jnp.stack(x), *blocks)


def patch(kernel_DxCxpxp: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Of a convolution over patches."""
    return {"w": kernel_DxCxpxp.transpose(2, 3, 1, 0).reshape(-1, D), "b": bias}


def of_dit(w: dict[str, np.ndarray]) -> Any:
    """Our parameters from those of the published DiT."""
    time = {"w_in": w["t_embedder.mlp.0.weight"].T, "b_in": w["t_embedder.mlp.0.bias"]}
    time |= {"w_out": w["t_embedder.mlp.2.weight"].T, "b_out": w["t_embedder.mlp.2.bias"]}
    final = "final_layer.adaLN_modulation.1"
    return {
        "patch_2": patch(w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]),
        "time": time,
        "label": {"table": w["y_embedder.embedding_table.weight"]},
        "layers": of_all([block(one) for one in stacked(w, "blocks")]),
        "norm": {"modulation": {"w": w[f"{final}.weight"].T, "b": w[f"{final}.bias"]}},
        "output_2": {"w": w["final_layer.linear.weight"].T, "b": w["final_layer.linear.bias"]},
    }


def of_uvit(w: dict[str, np.ndarray]) -> Any:
    """Our parameters from those of the published U-ViT."""
    middle = {n.removeprefix("mid_block."): a for n, a in w.items() if n.startswith("mid_block.")}
    fall = [
        {"block": block(one), "w": one["skip_linear.weight"].T, "b": one["skip_linear.bias"]}
        for one in stacked(w, "out_blocks")
    ]
    return {
        "patch": patch(w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]),
        "positions": {"table": w["pos_embed"][0]},
        "label": {"table": w["label_emb.weight"]},
        "rise": of_all([{"block": block(one)} for one in stacked(w, "in_blocks")]),
        "middle": block(middle),
        "fall": of_all(fall),
        "norm": {"norm": {"scale": w["norm.weight"], "bias": w["norm.bias"]}},
        "output": {"w": w["decoder_pred.weight"].T, "b": w["decoder_pred.bias"]},
        "smoothing": {
            "w": w["final_layer.weight"].transpose(2, 3, 1, 0),
            "b": w["final_layer.bias"],
        },
    }


def our_dit() -> DiT:
    shape = ModelShape(layers=DEPTH, **SIZES, bias=True, time_conditioning=True)
    return dit(shape, IMAGE)


def our_uvit() -> UViT:
    return UViT(ModelShape(layers=2 * DEPTH + 1, **SIZES, epsilon=1e-5), IMAGE)


def relative(model: Any, params: Any, noised: Any, *others: Any) -> list[float]:
    """Largest error relative to the largest value, for these and other parameters."""
    module.check_leaves(params, module.abstract(model, noised)[0]["params"])
    got = jax.jit(lambda params: module.run(model, {"params": params}, noised)[0])
    want = noised["want"]
    return [float(np.abs(got(p) - want).max() / np.abs(want).max()) for p in (params, *others)]


def test_dit_is_the_published_one_and_a_gate_of_one_plus_is_not() -> None:
    weights, noised, want = published("dit")
    params = of_dit(weights)
    layers = dict(params["layers"])
    for name in ("attention_modulation", "mlp_modulation"):
        plus = np.repeat([0, 0, 1], D)  # shift, scale, gate
        layers[name] = layers[name] | {"b": layers[name]["b"] + plus}
    same, other = relative(our_dit(), params, noised | {"want": want}, params | {"layers": layers})
    assert same < 2e-6 and other > 0.1


def test_uvit_is_the_published_one_and_one_with_crossed_skips_is_not() -> None:
    weights, noised, want = published("uvit")
    params = of_uvit(weights)
    fall = params["fall"]
    crossed = params | {"fall": fall | {"w": fall["w"][:, ::-1]}}
    same, other = relative(our_uvit(), params, noised | {"want": want}, crossed)
    assert same < 2e-6 and other > 0.01


def test_the_slope_of_the_exact_gelu() -> None:
    x = np.linspace(-4, 4, 9, dtype=np.float32)
    slope = jax.vmap(jax.grad(exact_gelu))(x)
    want = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    np.testing.assert_allclose(slope, want, atol=1e-6)


def test_a_fresh_dit_predicts_nothing() -> None:
    """The output layer starts at 0, as does every gate."""
    model, (_, noised, want) = our_dit(), published("dit")
    out = jax.jit(lambda key: module.run(model, module.init(model, key, noised), noised)[0])
    found = out(jax.random.key(0))
    assert found.shape == want.shape and not found.any()
