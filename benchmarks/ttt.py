"""Layers with a state: LaCT's chunk scan against a plain one, Gated DeltaNet's chunks against its
recurrence, and how time and memory grow with the length and with cp.

    python -m benchmarks.ttt                 # minutes on 2 idle cores
    python -m benchmarks.ttt --repeats=41    # narrower intervals

Every contender gets the same arrays. Times as `timing` takes them, forward and backward; memory is
the compiler's plan of temporaries, which holds what is kept for the backward pass. Exit status 1: a
threshold is missed.

Legend: B sequences, S positions, H heads, K head dim, F hidden width, C positions of a chunk."""

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from tabulate import tabulate

from benchmarks import plain_lact
from benchmarks.step import benchmark_config
from benchmarks.timing import MODES, banner, compile_modes, median_interval, time_interleaved
from fdp.collectives import shard_map
from fdp.count import aot
from fdp.data.batches import blank
from fdp.experiment import standard
from fdp.kernels_pallas.newton_schulz import orthogonal
from fdp.mesh import AXES, make_mesh, use_virtual_devices
from fdp.models import delta, module
from fdp.models.attention import Where
from fdp.models.fast_weights import FastWeights, Read, swiglu_scan
from fdp.models.lact import LaCT
from fdp.models.layers import SwiGLU
from fdp.models.recurrent import GatedDeltaNet, StateLayer
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, layer
from fdp.models.transformer import Transformer
from fdp.models.ttt import TTTLinear
from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout
from fdp.parallel.context.state import StatePlan
from fdp.sampling import autoregressive
from fdp.sampling.noise import Draw
from fdp.step import TrainStep

Array = jax.Array
BOTH = MODES[1]
CP = 8


class Judged(NamedTuple):
    """A row: ratios of all rounds, and the threshold of their median. `least`: it is a lower
    one."""

    what: str
    detail: str
    ratios: np.ndarray
    limit: float
    least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the median meets the threshold."""
        median = float(np.median(self.ratios))
        return median >= self.limit if self.least else median <= self.limit

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        value, low, high = median_interval(self.ratios)
        said = f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if len(self.ratios) > 1 else "")
        sign = "≥" if self.least else "≤"
        verdict = "holds" if self.holds else "fails"
        return self.what, self.detail, said, f"{sign} {self.limit:.3g}", verdict


def timed(programs: dict[str, tuple[Callable, tuple[Any, ...]]], repeats: int) -> dict[str, Any]:
    """Seconds [repeats] of each function with its arrays and cotangent, forward and backward."""
    compiled = {name: (compile_modes(f, a)[BOTH], a) for name, (f, a) in programs.items()}
    return time_interleaved(compiled, repeats)


def lact_arrays(S: int, H: int, K: int, F: int) -> tuple[Read, FastWeights]:
    """What a scan reads, and its first weights."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def draw(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape)

    q, k, v = (draw(1, S, H, K) / K**0.5 for _ in range(3))
    rates, momentum = 0.01 * jnp.abs(draw(1, S, H, 3)), jax.nn.sigmoid(draw(1, S, H))
    gate, up, down = draw(H, F, K) / K**0.5, draw(H, F, K) / K**0.5, draw(H, K, F) / F**0.5
    return Read(q, k, v, rates, momentum), FastWeights(gate, up, down)


def ours(chunk: int, muon: bool, *arrays: Array) -> Array:
    """fdp's scan of q, k, v, rates, momentum and three weights."""
    polish = orthogonal if muon else None
    return swiglu_scan(Read(*arrays[:5]), FastWeights(*arrays[5:]), chunk, polish)[0]


def plain(chunk: int, muon: bool, *arrays: Array) -> Array:
    """The yardstick's."""
    q, k, v, rates, momentum, *weights = arrays
    return plain_lact.lact(q, k, v, rates, momentum, tuple(weights), chunk, muon)


def scans(repeats: int, S: int = 2048, H: int = 2) -> list[Judged]:
    """fdp's chunk scan over the plain one."""
    rows = []
    cases = [(K, C, False) for K in (64, 128) for C in (64, 128, 256, 512)]
    cases += [(64, 256, True), (128, 512, True)]
    for K, C, muon in cases:
        read, weights = lact_arrays(S, H, K, 2 * K)
        arrays = (*read, *weights, jnp.ones((1, S, H, K)))
        f = {"fdp": functools.partial(ours, C, muon), "plain": functools.partial(plain, C, muon)}
        seconds = timed({name: (call, arrays) for name, call in f.items()}, repeats)
        detail = f"d {K}, c {C}{', Muon' if muon else ''}: {1e3 * np.median(seconds['fdp']):.1f} ms"
        rows.append(Judged("LaCT scan / plain", detail, seconds["fdp"] / seconds["plain"], 1.05))
    return rows


def delta_chunks(repeats: int, S: int = 1024, H: int = 4, K: int = 64) -> Judged:
    """Gated DeltaNet token by token over its chunks."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (1, S, H, K)) / K**0.5 for key in keys[:3])
    decay = -jax.nn.softplus(jax.random.normal(keys[3], (1, S, H)))
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (1, S, H)))
    arrays, empty = (q, k, v, decay, beta, jnp.ones((1, S, H, K))), jnp.zeros((1, H, K, K))

    def chunked(*tokens: Array) -> Array:
        return delta.scan(delta.prepare(delta.Tokens(*tokens), 64), empty)[0]

    def by_token(*tokens: Array) -> Array:
        return delta.recur(delta.Tokens(*tokens), empty)[0]

    seconds = timed({"chunked": (chunked, arrays), "by token": (by_token, arrays)}, repeats)
    detail = f"{S} tokens, {H} heads of {K}: {1e3 * np.median(seconds['chunked']):.1f} ms"
    ratio = seconds["by token"] / seconds["chunked"]
    return Judged("GDN by token / in chunks", detail, ratio, 5, least=True)


# Layers
# -------------------------------------------------------------------------------------------------

SHAPE = {"layers": 2, "width": 128, "heads": 2, "kv_heads": 2, "ffn": 256, "vocab": 256}
LAYERS = {"LaCT": (LaCT, 64), "GDN": (GatedDeltaNet, 64), "TTT-Linear": (TTTLinear, 16)}


def step_of(name: str, S: int) -> tuple[Any, tuple[Any, ...]]:
    """A compiled train step of two such layers, and its arguments."""
    c = benchmark_config({**SHAPE, "seq_len": S, "batch": 1})
    c.model.conv = 4
    e = standard(c, blank(S, SHAPE["vocab"]))
    cls, chunk = LAYERS[name]
    block = layer(Block, mixing=layer(cls, chunk=chunk), ffn=layer(SwiGLU))
    p = TrainStep(replace(e, model=e.model.clone(pattern=(block,))), make_mesh(c.mesh))
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab"], (1, S), np.int32)
    arguments = p.init(0), jax.device_put({"tokens": tokens}, p.batch_shardings())
    return jax.jit(p.train_step).lower(*arguments).compile(), arguments


def growth(repeats: int, S: int = 1024) -> list[Judged]:
    """Step time at 4 S over that at S."""
    rows = []
    for name in LAYERS:
        seconds = time_interleaved({str(n): step_of(name, n) for n in (S, 4 * S)}, repeats)
        short, long = (seconds[str(n)] for n in (S, 4 * S))
        detail = f"{name}, S {S}: {1e3 * np.median(short):.0f} ms"
        rows.append(Judged("step at 4 S / at S", detail, long / short, 4.4))
    return rows


def decoding(repeats: int, many: int = 16) -> list[Judged]:
    """Time of tokens at 64K of a text over that at 1K."""
    rows = []
    for name, (cls, chunk) in LAYERS.items():
        shape = ModelShape(**SHAPE, head_dim=64, conv=4)
        block = layer(Block, mixing=layer(cls, chunk=chunk), ffn=layer(SwiGLU))
        model = Transformer(shape, (block,))
        example = {"inputs": jnp.zeros((1, 1), jnp.int32), "noise": jnp.zeros(1)}
        variables = module.init(model, jax.random.key(0), example)
        cache, _ = model.decode_state(1, 1)
        draw = Draw(jax.random.key(1), jnp.zeros(1, jnp.int32), many, SHAPE["vocab"])

        def run(variables: Any, cache: Any, start: Array, model=model, draw=draw) -> Array:
            last = jnp.zeros(1, jnp.int32)
            return autoregressive.write(model, variables, cache, last, start, draw)[0]

        starts = {str(n): jnp.asarray(n) for n in (2**10, 2**16)}
        program = jax.jit(run).lower(variables, cache, starts["1024"]).compile()
        calls = {n: (program, (variables, cache, start)) for n, start in starts.items()}
        seconds = time_interleaved(calls, repeats)
        each = 1e3 * np.median(seconds["1024"]) / many
        detail = f"{name}, {many} tokens of {each:.2f} ms"
        rows.append(
            Judged("token after 64K / after 1K", detail, seconds["65536"] / seconds["1024"], 1.1)
        )
    return rows


def temporaries(mixing: StateLayer, S: int, cp: int) -> int:
    """Bytes that a device plans for forward and backward pass of a layer, beside arguments and
    results."""
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"cp": cp})
    x = jax.ShapeDtypeStruct((1, S, mixing.shape.width), jnp.float32)

    def where(length: int) -> Where:
        at = layouts.positions(mixing.plan.layout, length)
        return Where(at, at)

    shapes, specs = module.abstract(mixing, x, where(S))[:2]
    of_x = PartitionSpec(None, "cp")

    def both(params: Any, x: Array, back: Array) -> Any:
        def call(params: Any, x: Array) -> Array:
            return module.run(mixing, {"params": params}, x, where(x.shape[1]))[0]

        y, vjp = jax.vjp(call, params, x)
        return y, *vjp(back)

    inside, out = (specs["params"], of_x, of_x), (of_x, specs["params"], of_x)
    program = jax.jit(shard_map(both, mesh, inside, out)).lower(shapes["params"], x, x).compile()
    return aot.memory(program).temp


def memory(S: int = 4096, C: int = 512) -> list[Judged]:
    """Planned temporaries of a device at cp = 8 over those at cp = 1."""
    shape = ModelShape(1, 128, 8, 8, 64, 8, 8, conv=4)
    shared = SequenceLayout("striped", C // CP)
    layers: dict[str, StateLayer] = {
        "LaCT, tokens": LaCT(shape, StatePlan("tokens", shared), C),
        "LaCT, tokens+ns, Muon": LaCT(shape, StatePlan("tokens+ns", shared), C, muon=True),
        "LaCT, heads": LaCT(shape, StatePlan("heads", CONTIGUOUS), C),
        "GDN, affine": GatedDeltaNet(shape, StatePlan("affine", CONTIGUOUS), 64),
    }
    rows = []
    for name, mixing in layers.items():
        alone = temporaries(mixing.clone(plan=StatePlan()), S, 1)
        ratio = np.array([temporaries(mixing, S, CP) / alone])
        detail = f"{name}, S {S}, c {mixing.chunk}: {alone / 2**20:.0f} MiB"
        rows.append(Judged(f"temporaries at cp {CP} / cp 1", detail, ratio, 1 / 6))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ttt", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=9, help="rounds (default 9)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats} rounds: at least 1")
    use_virtual_devices(CP)
    print(f"{banner()}\nproblem   float32, {BOTH}, {args.repeats} rounds\n")
    headers = "ratio", "size", "", "threshold", ""
    rows: list[Judged] = []
    parts: tuple[Callable[[], list[Judged]], ...] = (
        memory,
        lambda: [delta_chunks(args.repeats)],
        lambda: growth(args.repeats),
        lambda: decoding(args.repeats),
        lambda: scans(args.repeats),
    )
    for part in parts:
        found = part()
        cells = [row.cells() for row in found]
        print(tabulate(cells, headers=headers, disable_numparse=True) + "\n", flush=True)
        rows += found
    return int(not all(row.holds for row in rows))


if __name__ == "__main__":
    sys.exit(main())
