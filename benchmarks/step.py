"""What fdp costs on one device: its train step against `plain_transformer`, in one process, step by
step in turn.

    python -m benchmarks.step                          # ~5 M parameters, < 90 s on 2 idle cores
    python -m benchmarks.step --layers=2 --width=64    # small: the fixed cost of a call shows
    python -m benchmarks.step --startup     # also: process start to first step, cold and warm cache

Both sides hold their own copy of the same parameters and see the same tokens. A pair is one step of
each, in random order, so that a neighbour's load hits both; the ratio is the median over pairs, its
interval a bootstrap of pairs. Exit status 1: the whole interval lies above LIMIT. 0: it does not,
which with few steps may mean undecided."""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from tabulate import tabulate

from benchmarks import plain_transformer
from fdp import config as fdp_config
from fdp.data.batches import blank
from fdp.experiment import Experiment, standard
from fdp.mesh import make_mesh
from fdp.objectives.autoregressive import Autoregressive
from fdp.step import TrainStep
from fdp.study.report import versions

LIMIT = 1.05  # fdp may cost at most 5 % more step time
BOS = 0
SIZE = {
    "layers": 6,
    "width": 256,
    "heads": 8,
    "kv_heads": 4,
    "ffn": 688,
    "vocab": 1024,
    "seq_len": 128,
    "batch": 8,
}
STARTUP_SIZE = SIZE | {
    "layers": 2,
    "width": 64,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 128,
    "vocab": 512,
    "seq_len": 32,
}
STAGES = ("imports", "init", "compile", "first step")


@dataclasses.dataclass
class Side:
    """One contender: `jitted` makes a fresh jitted step (state, tokens) → (state, anything with a
    loss).
    """

    jitted: Callable[[], Any]
    state: Any
    batch: Any
    loss: Callable[[Any], float]
    compiled: Any = None
    compile_s: float = float("inf")

    def compile(self) -> None:
        """Trace, lower and compile once more from nothing; keeps the fastest time."""
        start = time.perf_counter()
        self.compiled = self.jitted().lower(self.state, self.batch).compile()
        self.compile_s = min(self.compile_s, time.perf_counter() - start)

    def step(self) -> tuple[float, float]:
        """One step: (seconds until every output is there, loss)."""
        start = time.perf_counter()
        self.state, out = jax.block_until_ready(self.compiled(self.state, self.batch))
        return time.perf_counter() - start, self.loss(out)


@dataclasses.dataclass(frozen=True)
class Result:
    """Sizes, compile seconds per side, step seconds [pairs] per side, the ratio fdp/plain and its
    95 % interval.
    """

    parameters: int
    compile_s: dict[str, float]
    step_s: dict[str, np.ndarray]
    ratio: float
    ci: tuple[float, float]

    @property
    def verdict(self) -> str:
        """holds | fails | undecided, by where the interval lies against LIMIT."""
        if self.ci[0] > LIMIT:
            return "fails"
        return "holds" if self.ci[1] <= LIMIT else "undecided: take more --steps"

    def table(self) -> str:
        """The figures as printed."""
        ratio = {"step": f"{self.ratio:.3f} [{self.ci[0]:.3f}, {self.ci[1]:.3f}]"}
        ratio["compile"] = f"{self.compile_s['fdp'] / self.compile_s['plain']:.2f}"
        sides = ("fdp", "plain")
        median = [f"{1e3 * np.median(self.step_s[s]):.2f}" for s in sides]
        fastest = [f"{1e3 * np.min(self.step_s[s]):.2f}" for s in sides]
        compiles = [f"{self.compile_s[s]:.2f}" for s in sides]
        rows = [
            ("step, median of pairs (ms)", *median, ratio["step"]),
            ("step, fastest (ms)", *fastest, ""),
            ("trace + compile (s)", *compiles, ratio["compile"]),
        ]
        return tabulate(
            rows, headers=("", *sides, "fdp / plain"), disable_numparse=True, stralign="right"
        )


def benchmark_config(size: dict[str, int]) -> ml_collections.ConfigDict:
    """The config of one device and `size` (keys of SIZE); next-token prediction, because it draws
    no noise.
    """
    c = fdp_config.base()
    c.objective.name = "autoregressive"
    c.model.update(
        {k: v for k, v in size.items() if k in c.model}, head_dim=size["width"] // size["heads"]
    )
    c.data.seq_len, c.train.batch = size["seq_len"], size["batch"]
    fdp_config.validate(c)
    return c


def experiment(c: ml_collections.ConfigDict) -> Experiment:
    """The stock experiment. Every embedding row is a token: the plain side masks no logits."""
    made = standard(c, blank(c.data.seq_len, c.model.vocab))
    return dataclasses.replace(made, objective=Autoregressive(c.model.vocab, BOS))


def fdp_side(c: ml_collections.ConfigDict, tokens_BxL: np.ndarray) -> Side:
    """fdp's train step on a mesh of one device."""
    made, mesh = experiment(c), make_mesh(c.mesh)
    program = TrainStep(made, mesh)
    return Side(
        jitted=lambda: TrainStep(made, mesh).jit_train_step(),
        state=program.init(0),
        batch=jax.device_put({"tokens": tokens_BxL}, program.batch_shardings()),
        loss=lambda metrics: float(metrics["loss"]),
    )


def plain_side(c: ml_collections.ConfigDict, tokens_BxL: np.ndarray, state: Any) -> Side:
    """The hand-written step on copies of the parameters, on the default device, without any
    sharding, with the same optimizer."""
    metas = TrainStep(experiment(c), make_mesh(c.mesh)).specs.metas
    tx = experiment(c).optimizer.build(metas)
    params = jax.tree.map(jnp.array, jax.device_get(state.params))
    return Side(
        jitted=lambda: plain_transformer.jit_train_step(tx, BOS, c.model.rope_base),
        state=(params, tx.init(params)),
        batch=jnp.array(tokens_BxL),
        loss=float,
    )


def build(c: ml_collections.ConfigDict) -> dict[str, Side]:
    """Both sides with equal parameters and tokens."""
    shape = (c.train.batch, c.data.seq_len)
    tokens_BxL = np.random.default_rng(0).integers(0, c.model.vocab, shape, np.int32)
    fdp = fdp_side(c, tokens_BxL)
    return {"fdp": fdp, "plain": plain_side(c, tokens_BxL, fdp.state)}


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Compile for real: JAX decides once per process whether the cache is used, hence the
    resets.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def paired_ratio(
    fdp_N: np.ndarray, plain_N: np.ndarray, level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Median of fdp/plain over pairs and its bootstrap interval (10 000 resamples of pairs): robust
    to load spikes.
    """
    ratio_N = np.asarray(fdp_N) / np.asarray(plain_N)
    draws_RxN = np.random.default_rng(0).integers(0, ratio_N.size, (10_000, ratio_N.size))
    lo, hi = np.quantile(np.median(ratio_N[draws_RxN], axis=1), ((1 - level) / 2, (1 + level) / 2))
    return float(np.median(ratio_N)), (float(lo), float(hi))


def measure(c: ml_collections.ConfigDict, pairs: int, warmup: int = 3, compiles: int = 2) -> Result:
    """Compile both sides `compiles` times, then time `pairs` pairs after `warmup`.

    Raises RuntimeError when the losses part: the two would then not be the same computation.
    """
    sides = build(c)
    parameters = sum(x.size for x in jax.tree.leaves(sides["plain"].state[0]))
    rng = np.random.default_rng(1)
    with no_compilation_cache():
        for _ in range(compiles):
            for name in rng.permutation(list(sides)):
                sides[name].compile()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warmup + pairs):
        losses = {}
        for name in rng.permutation(list(sides)):
            elapsed, losses[name] = sides[name].step()
            seconds[name] += [elapsed] if i >= warmup else []
        if i == 0 and not np.isclose(losses["fdp"], losses["plain"], rtol=1e-5):
            raise RuntimeError(f"not the same computation: first losses {losses}")
    step_s = {name: np.array(s) for name, s in seconds.items()}
    ratio, ci = paired_ratio(step_s["fdp"], step_s["plain"])
    return Result(
        parameters, {name: side.compile_s for name, side in sides.items()}, step_s, ratio, ci
    )


def first_step() -> dict[str, float]:
    """Be a fresh training process up to its first step: the clock (s since the epoch) at the end of
    each stage.
    """
    import fdp.run  # noqa: F401  # what `fdp.train` imports: loop, checkpoints, reports

    ends = [time.time()]
    c = benchmark_config(STARTUP_SIZE)
    side = fdp_side(c, np.zeros((c.train.batch, c.data.seq_len), np.int32))
    jax.block_until_ready(side.state)
    ends.append(time.time())
    side.compile()
    ends.append(time.time())
    side.step()
    return dict(zip(STAGES, [*ends, time.time()], strict=True))


def startup_once(cache: Path) -> dict[str, float]:
    """Seconds per stage of a new process that keeps compiled programs in `cache`, as `fdp.train`
    does.
    """
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }
    code = "import json; from benchmarks.step import first_step; print(json.dumps(first_step()))"
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=Path(__file__).parent.parent,
        check=True,
        stdout=subprocess.PIPE,
    )
    ends = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(STAGES, np.diff([start, *(ends[s] for s in STAGES)]).tolist(), strict=True))


def startup(repeats: int) -> dict[str, dict[str, float]]:
    """Cold (empty cache) and warm (the same cache again): seconds per stage of the fastest of
    `repeats` processes.
    """
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for kind in runs:
                runs[kind].append(startup_once(Path(cache)))
    return {kind: min(many, key=lambda run: sum(run.values())) for kind, many in runs.items()}


def startup_table(runs: dict[str, dict[str, float]]) -> str:
    """Seconds per stage and in total, one row per state of the cache."""
    rows = [(f"{kind} cache", *run.values(), sum(run.values())) for kind, run in runs.items()]
    return tabulate(rows, headers=("start-up (s)", *STAGES, "total"), floatfmt=".2f")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line: sizes and repeats."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps (default 60)")
    parser.add_argument(
        "--startup", action="store_true", help="also time process start to first step"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="processes per state of the cache, with --startup"
    )
    for key, value in SIZE.items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"default {value}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    args = parse(argv)
    c = benchmark_config({key: getattr(args, key) for key in SIZE})
    device = jax.devices()[0]
    print(
        f"device    1 of {jax.device_count()} × {device.device_kind} ({device.platform}), "
        f"{os.cpu_count()} host cores"
    )
    print(f"versions  {', '.join(f'{k} {v}' for k, v in versions().items())}")
    result = measure(c, args.steps)
    print(
        f"model     {result.parameters:,} parameters, batch {args.batch} × {args.seq_len} tokens, "
        f"{args.steps} pairs\n"
    )
    print(result.table())
    print(f"\nat most {LIMIT} times the plain step: {result.verdict}")
    if args.startup:
        print("\n" + startup_table(startup(args.repeats)))
    return int(result.verdict == "fails")


if __name__ == "__main__":
    sys.exit(main())
