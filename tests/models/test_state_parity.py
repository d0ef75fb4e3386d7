"""Layers with a state give what the published code gives, with the same weights.

`fixtures/gated_deltanet.npz` was written by running fla-org/flash-linear-attention (commit bc3b101)
in torch on a CPU: the recurrence of fla/ops/gated_delta_rule/naive.py, and the layer of
fla/layers/gated_deltanet.py (width 16, two heads of 8, expand_v 1, evaluation mode) with its
kernels in Triton's interpreter. `fixtures/lact.npz`: a1600012888/LaCT (commit 1f84d47),
block_causal_lact_swiglu of lact_llm/lact_model/ttt_operation.py, plain and prenorm, with chunks of
6, without torch.compile and with its Newton-Schulz steps in float32. `fixtures/ttt_linear.npz` and
`ttt_mlp.npz`: test-time-training/ttt-lm-jax (commit 6f529b1), get_eta and ttt of TTTLinear and
TTTMLP in ttt/models/ttt_layer.py with mini-batches of 8, a base rate of 1, and learned token
factors that make 1/i + factor = 1 for every token i of a mini-batch, as ours have no such factor.

Every input and weight is an integer of at most 63 over 64 (over 256, plus 1, for the scale of a
norm), drawn once. Stored are the integers, the output, and the gradients of Σ c · output as "d…".

Legend: B sequences, L positions, H heads, K head dim, V value dim, F fast width, D width."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.count import hlo
from fdp.kernels_pallas.newton_schulz import orthogonal
from fdp.models import delta, module
from fdp.models import fast_weights as fast
from fdp.models.attention import Where
from fdp.models.fast_weights import FastWeights, Read
from fdp.models.recurrent import GatedDeltaNet
from fdp.models.shape import ModelShape
from fdp.models.ttt import TTTMLP, TTTLinear

pytestmark = pytest.mark.fast
Arrays = dict[str, np.ndarray]
quick = functools.partial(jax.jit, compiler_options=hlo.QUICK)


def published(name: str) -> Arrays:
    """Arrays by name; integers are made the numbers they stand for."""
    with np.load(Path(__file__).parents[1] / "fixtures" / f"{name}.npz") as file:
        arrays = {n: file[n] for n in file if n != "source"}
    for n, a in arrays.items():
        if a.dtype == np.int8:
            is_scale = n.endswith(("norm/scale", "norm.weight"))
            arrays[n] = a.astype(np.float32) / (256 if is_scale else 64) + is_scale
    return arrays


def error(got: object, want: np.ndarray) -> float:
    """Largest error relative to the largest value."""
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def part(arrays: Arrays, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def outcome(run: Callable[[Arrays], jax.Array], given: Arrays, c: np.ndarray) -> tuple:
    """(output, gradients of Σ c · output)."""

    def loss(given: Arrays) -> tuple[jax.Array, jax.Array]:
        out = run(given)
        return (c * out).sum(), out

    (_, out), grads = quick(jax.value_and_grad(loss, has_aux=True))(given)
    return out, grads


# Gated DeltaNet
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 8], ids=["token by token", "chunks"])
def test_the_gated_delta_rule(chunk: int) -> None:
    at = part(published("gated_deltanet"), "rule:")
    given = {n: at[n] for n in ("q", "k", "v", "g", "beta", "state")}

    def run(x: Arrays) -> jax.Array:
        # The published rule scales queries by K^-½; ours leaves the size to the norm after it.
        tokens = delta.Tokens(x["q"] / 2, x["k"], x["v"], x["g"], x["beta"])
        if chunk:
            return delta.scan(delta.prepare(tokens, chunk), x["state"])[0]
        return delta.recur(tokens, x["state"])[0]

    out, grads = outcome(run, given, at["c"])
    assert error(out, at["out"]) < 1e-6
    assert all(error(g, at[f"d{n}"]) < 1e-6 for n, g in grads.items())


def test_the_layer_of_gated_deltanet() -> None:
    at = part(published("gated_deltanet"), "layer:")
    w, D, H, K = part(at, "w:"), 16, 2, 8

    def heads(name: str) -> np.ndarray:
        return w[f"{name}.weight"].T.reshape(D, H, -1)

    params = {
        "w_qkv": np.stack([heads(f"{n}_proj") for n in "qkv"]),
        "w_state": np.stack([w["a_proj.weight"].T, w["b_proj.weight"].T], -1),
        "pace": w["A_log"],
        "bias": w["dt_bias"],
        "scale": np.broadcast_to(w["o_norm.weight"], (H, K)),
        "w_gate": heads("g_proj"),
        "w_o": w["o_proj.weight"].T.reshape(H, K, D),
    }
    for n in "qkv":  # the last published tap is that of the token itself
        params[f"conv_{n}"] = {"w": w[f"{n}_conv1d.weight"][:, 0, ::-1].T}
    # The epsilon of the norm sees outputs that are not scaled by K^-½.
    shape = ModelShape(1, D, H, H, K, 8, 8, epsilon=1e-5 * K, conv=4)
    layer, where = GatedDeltaNet(shape, chunk=8), Where(jnp.arange(24), jnp.arange(24))
    module.check_leaves(params, module.abstract(layer, at["x"], where)[0]["params"])
    run = quick(lambda params: module.run(layer, {"params": params}, at["x"], where)[0])
    assert error(run(params), at["out"]) < 2e-6
    crossed = params | {"w_state": params["w_state"][..., ::-1]}  # decay and rate
    assert error(run(crossed), at["out"]) > 0.01


# Fast weights
# -------------------------------------------------------------------------------------------------


def test_the_chunks_of_lact() -> None:
    at = published("lact")

    def run(
        x: Arrays, orthogonalise: Callable[[jax.Array], jax.Array] | None, prenorm: bool = False
    ) -> jax.Array:
        # Published rates and matrices are those of gate, down and up.
        read = Read(x["q"], x["k"], x["v"], x["rates"][..., [0, 2, 1]], x["momentum"])
        first = FastWeights(x["w0"], x["w2"], x["w1"])
        return fast.swiglu_scan(read, first, 6, orthogonalise, prenorm=prenorm)[0]

    given = {n: at[n] for n in ("q", "k", "v", "rates", "momentum", "w0", "w1", "w2")}
    for kind, prenorm in (("muon", False), ("prenorm", True)):
        polished, grads = outcome(lambda x: run(x, orthogonal, prenorm), given, at["c"])  # noqa: B023
        # The published lengths of rows have 1e-5 added to them before they are divided by.
        assert error(polished, at[f"{kind}:out"]) < 3e-5
        assert all(error(g, at[f"{kind}:d{n}"]) < 3e-4 for n, g in grads.items())
    assert error(at["prenorm:out"], at["muon:out"]) > 0.1
    plain = quick(lambda x: run(x, None))
    assert error(plain(given), at["momentum:out"]) < 3e-5
    assert error(plain(given | {"momentum": 0 * at["momentum"]}), at["plain:out"]) < 3e-5
    assert error(at["plain:out"], at["momentum:out"]) > 0.01


class LinearBare(TTTLinear):
    """What is read, of given queries, keys and values."""

    @module.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        at = jnp.arange(x.shape[1])
        return self.mix(q, k, v, x, Where(at, at))


class MLPBare(TTTMLP):
    """The same of TTT-MLP."""

    __call__ = LinearBare.__call__


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp"])
def test_the_mini_batches_of_ttt(name: str) -> None:
    at = published(name)
    H, K = at["q"].shape[2:]
    bare = {"ttt_linear": LinearBare, "ttt_mlp": MLPBare}[name]
    layer = bare(ModelShape(1, H * K, H, H, K, 8, 8), chunk=8, rate=1 / K)
    given = {n: at[n] for n in "xqkv"} | part(at, "w:")

    def run(x: Arrays) -> jax.Array:
        params = {
            "w_state": jnp.moveaxis(x["learnable_ttt_lr/kernel"], 0, 1),
            "norm_scale": x["ttt_norm/scale"],
            "norm_shift": x["ttt_norm/bias"],
        }
        for i, own in enumerate(("fast", "fast_1")[: len(layer.widths) - 1]):
            params |= {own: x[f"ttt_dense_{i}"], f"{own}_bias": x[f"ttt_bias_{i}"][:, 0]}
        return module.run(layer, {"params": params}, x["q"], x["k"], x["v"], x["x"])[0]

    out, grads = outcome(run, given, at["c"])
    assert error(out, at["out"]) < 2e-6
    found = {n: at[f"d{n}" if n in at else f"dw:{n}"] for n in grads}
    assert all(error(g, found[n]) < 1e-5 for n, g in grads.items())
