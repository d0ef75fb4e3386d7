"""What speculative decoding costs beside the verifier: a round against the bare call, programs over
prompts, memory of a window over a cached prefix, tokens a second.

    python -m benchmarks.speculative                 # < 3 min on 2 idle cores
    python -m benchmarks.speculative --repeats=31    # narrower intervals

A generation is one program, so that a round has no host in it: its time is that of the generation
divided by its rounds, and the yardstick is one jitted call of the verifier on as many states,
called as often. Both take turns in one process, as `timing` says. Memory is the compiler's plan of
temporaries. On one CPU device a window of W states costs W times the work: tokens a second say
nothing about parallel speed. On a GPU the size is that of topic 4's `h100` variant, and the time of
a call is also printed against the number of states. Exit status 1: a limit is broken by its whole
interval.

Legend: W states of a window, B samples, L positions, P positions of a prefix."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tabulate import tabulate

from benchmarks.step import benchmark_config, paired_ratio
from benchmarks.timing import banner, interval_text, time_interleaved
from configs import topic4
from fdp.count import aot
from fdp.data.batches import blank
from fdp.experiment import Experiment, standard
from fdp.models import module
from fdp.models.transformer import transformer
from fdp.objectives import BlockDiffusion, TokenObjective
from fdp.sampling.block_cache import BlockCache
from fdp.sampling.chain import Chain, follow
from fdp.sampling.draw import denoiser_of
from fdp.sampling.noise import Draw
from fdp.sampling.speculative import Drafter, JacobiDrafter, StaleDrafter, speculate

Array = jax.Array
Rows = list[tuple[str, ...]]
LIMIT = 1.05  # a round over the bare call
W, B = 8, 1
SIZE = {
    "layers": 4,
    "width": 256,
    "heads": 4,
    "kv_heads": 4,
    "ffn": 704,
    "vocab": 1024,
    "seq_len": 64,
    "batch": B,
}
STATES = (1, 2, 4, 8, 16, 32, 64)
ORDERS = {"first-hitting": "random", "entropy order": "entropy"}
BLOCK = 32


@dataclass(frozen=True, eq=False)
class Verifier:
    """An untrained masked model: its experiment and variables."""

    e: Experiment
    variables: Any

    @classmethod
    def of(cls, c: ml_collections.ConfigDict) -> "Verifier":
        """With drawn weights."""
        c = ml_collections.ConfigDict(c.to_dict())
        c.objective.name = "mdlm"
        e = standard(c, blank(c.data.seq_len, c.model.vocab - 1))
        example = {"inputs": jnp.zeros((1, c.data.seq_len), jnp.int32), "noise": jnp.zeros(1)}
        init = jax.jit(lambda key: module.init(e.model, key, example))
        return cls(e, init(jax.random.key(0)))

    @property
    def length(self) -> int:
        """L."""
        return self.e.data.seq_len

    @property
    def mask_id(self) -> int:
        """Of its objective."""
        assert isinstance(self.e.objective, TokenObjective)
        return self.e.objective.n_ids

    def chain(self, key: Array, order: str, start_BxL: Array | None = None) -> Chain:
        """Of B samples."""
        draw = Draw(key, jnp.arange(B), self.length, self.mask_id, start_BxL=start_BxL)
        return Chain(draw, order)

    def bare(self, states: int) -> tuple[Any, tuple[Any, ...]]:
        """(one compiled call on so many states, its arguments)."""
        z = jnp.full((states, self.length), self.mask_id)
        args = self.variables, z, jnp.ones(states)
        call = jax.jit(lambda variables, z, noise: denoiser_of(self.e, variables)(z, noise))
        return call.lower(*args).compile(), args

    def generation(
        self, order: str, drafter: Drafter | None, window: int = W
    ) -> tuple[Any, tuple[Any, ...]]:
        """(compiled, arguments) → (ids, calls of the verifier); no drafter: one state a call."""

        def run(variables: Any, key: Array) -> tuple[Array, Array]:
            chain, denoise = self.chain(key, order), denoiser_of(self.e, variables)
            if drafter is None:
                ids, info = follow(chain, denoise)
            else:
                ids, info = speculate(chain, denoise, drafter, window=window)
            return ids, info["nfe"]

        args = self.variables, jax.random.key(1)
        return jax.jit(run).lower(*args).compile(), args


def repeated(program: Callable, many: int) -> Callable:
    """`program` so many times, one after the other."""

    def call(*args: Any) -> None:
        for _ in range(many):
            jax.block_until_ready(program(*args))

    return call


def overhead(verifier: Verifier, repeats: int) -> tuple[Rows, bool]:
    """A round over the bare call, for drafters that cost no pass."""
    bare, given = verifier.bare(W * B)
    rows, good = [], True
    cases = [("first-hitting", StaleDrafter()), *((o, JacobiDrafter()) for o in ORDERS)]
    for order, drafter in cases:
        program, args = verifier.generation(ORDERS[order], drafter)
        rounds = int(program(*args)[1])
        contenders = {"bare": (repeated(bare, rounds), given), "round": (program, args)}
        seconds = time_interleaved(contenders, repeats)
        ratio, ci = paired_ratio(seconds["round"], seconds["bare"])
        good &= ci[0] <= LIMIT
        each = 1e3 * np.median(seconds["bare"]) / rounds
        name = f"round / bare call, {order}, {type(drafter).__name__}: {rounds} of {each:.1f} ms"
        rows.append((name, f"{ratio:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]", f"≤ {LIMIT}"))
    return rows, good


def programs(verifier: Verifier) -> tuple[Rows, bool]:
    """Compiled programs for prompts of every length."""

    @jax.jit
    def run(variables: Any, key: Array, start_BxL: Array) -> Array:
        chain = verifier.chain(key, "random", start_BxL)
        return speculate(chain, denoiser_of(verifier.e, variables), StaleDrafter(), window=W)[0]

    lengths = (0, 1, verifier.length // 2, verifier.length - 1)
    for prompt in lengths:
        start_BxL = np.full((B, verifier.length), verifier.mask_id, np.int32)
        start_BxL[:, :prompt] = np.arange(prompt)
        run(verifier.variables, jax.random.key(prompt), start_BxL)
    count = run._cache_size()
    return [(f"programs, prompts of {lengths} tokens", str(count), "= 1")], count == 1


def memory(c: ml_collections.ConfigDict, prefixes: tuple[int, int, int]) -> tuple[Rows, bool]:
    """Planned temporaries of a verification beside a cache: against W at the first of the prefixes,
    and their growth from the second to the third, which are longer than a tile of attention."""
    objective = BlockDiffusion(c.model.vocab - 1, BLOCK)
    model = Verifier.of(c).e.model
    length = prefixes[2] + BLOCK
    how = BlockCache(
        transformer(model.shape, objective.mask(length), position=objective.position(length))
    )
    example = {"inputs": jnp.zeros((1, 2 * length), jnp.int32), "noise": jnp.zeros(1)}
    variables = jax.eval_shape(lambda: module.init(how.model, jax.random.key(0), example))

    def temporaries(states: int, prefix: int) -> int:
        cache = jax.eval_shape(lambda: how.empty(1, prefix + BLOCK))
        z = jax.ShapeDtypeStruct((states, BLOCK), jnp.int32)
        run = jax.jit(lambda v, cache, z: how.denoise(v, cache, prefix)(z, jnp.zeros(len(z))))
        return aot.memory(run.lower(variables, cache, z).compile()).temp

    def held(prefix: int) -> int:
        cache = jax.eval_shape(lambda: how.empty(1, prefix))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

    found = {(w, P): temporaries(w, P) for w in (1, W) for P in prefixes}
    ratio = found[W, prefixes[0]] / found[1, prefixes[0]]
    growth = {w: found[w, prefixes[2]] - found[w, prefixes[1]] for w in (1, W)}
    more = growth[W] - growth[1]
    prefix = held(prefixes[2]) - held(prefixes[1])
    rows = [
        (
            f"temporaries, {W} states / 1, of {found[1, prefixes[0]] / 2**20:.2f} MiB",
            f"{ratio:.2f}",
            f"≤ {W}",
        ),
        (
            f"temporaries that a prefix of {prefix / 2**20:.1f} MiB more adds for 1 state, MiB",
            f"{growth[1] / 2**20:.2f}",
            "",
        ),
        (f"… and {W - 1} more states add to that, bytes", str(more), "≤ 0"),
    ]
    return rows, ratio <= W and more <= 0


def speed(verifier: Verifier, repeats: int) -> Rows:
    """Tokens a second with and without speculation."""
    contenders = {
        "verifier alone": verifier.generation("random", None),
        f"Jacobi drafts, window {W}": verifier.generation("random", JacobiDrafter()),
    }
    seconds = time_interleaved(contenders, repeats)
    device = jax.devices()[0]
    tokens = B * verifier.length
    return [
        (f"tokens a second on one {device.platform}, {name}", interval_text(tokens / s), "")
        for name, s in seconds.items()
    ]


def knee(verifier: Verifier, repeats: int, states: tuple[int, ...] = STATES) -> Rows:
    """Milliseconds of a call against the number of states."""
    seconds = time_interleaved({str(n): verifier.bare(n) for n in states}, repeats)
    return [(f"call on {n} states, ms", interval_text(1e3 * s), "") for n, s in seconds.items()]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculative", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=11, help="rounds (default 11)")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats={args.repeats} rounds: at least 2, for an interval")
    gpu = jax.default_backend() == "gpu"
    small = benchmark_config(SIZE)
    verifier = Verifier.of(topic4.get_config("h100") if gpu else small)
    print(banner() + "\n", flush=True)
    parts = [
        programs(verifier),
        memory(small, (BLOCK, 1024, 2048)),
        overhead(verifier, args.repeats),
        (speed(verifier, max(3, args.repeats // 3)), True),
    ]
    unmeasured = [("call against the number of states", "not measured: no GPU", "")]
    parts.append((knee(verifier, args.repeats) if gpu else unmeasured, True))
    print(tabulate([row for rows, _ in parts for row in rows], ("", "measured", "limit")))
    good = all(good for _, good in parts)
    print(f"\nlimits: {'all hold' if good else 'broken'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
