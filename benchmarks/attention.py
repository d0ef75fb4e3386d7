"""fdp's attention against JAX's own, on the device that is there: forward, forward and backward,
and block-sparse.

    python -m benchmarks.attention                                   # sizes for 2 CPU cores, < 2 min
    python -m benchmarks.attention --seq=32768 --heads=32 --kv_heads=8 --head_dim=128 --dtype=bfloat16  # a GPU

All contenders compute the same function of the same arrays, except block-sparse, which keeps
`--density` of the blocks. Rounds call every contender once, in random order, so that a neighbour's
load hits all; figures are medians with a bootstrap interval (95 %). Peak memory is the compiler's
plan: arguments, results and temporaries.

Legend: B batch, S tokens, H query heads, K key/value heads, C head_dim; I blocks a side, T capacity
of a list."""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

from fdp.cost import aot
from fdp.kernels_pallas.block_sparse import BlockLists, block_lists, block_sparse_attention
from fdp.kernels_pallas.flash import attention, flash_attention
from fdp.kernels_pallas.masks import Mask
from fdp.report import versions

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
SIZE = {
    "batch": 1,
    "seq": 2048,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "block": 64,
    "repeats": 15,
}
YARDSTICK = "jax.nn"


def random_lists(n_blocks: int, share: float, causal: bool) -> BlockLists:
    """The diagonal and random others, `share` of all visible pairs if that is more than the
    diagonal: [1, 1, I, T].
    """
    rng = np.random.default_rng(0)
    others = [
        rng.permutation(i if causal else np.delete(np.arange(n_blocks), i)) for i in range(n_blocks)
    ]
    room_I = np.cumsum([len(o) for o in others])
    extra = max(0, share * (room_I[-1] + n_blocks) - n_blocks)
    count_I = np.diff(np.floor(room_I / max(1, room_I[-1]) * extra).astype(int), prepend=0)
    chosen = [
        np.append(i, o[:count]) for i, (o, count) in enumerate(zip(others, count_I, strict=True))
    ]
    ids_IxT = np.stack([np.pad(c, (0, count_I.max() + 1 - len(c))) for c in chosen])
    return jax.jit(block_lists, static_argnums=2)(
        ids_IxT[None, None], count_I[None, None] + 1, n_blocks
    )


def contenders(args: argparse.Namespace) -> dict[str, Attend]:
    """Name → attention [B, S, H, C]; "fdp" gives (out, lse), as a ring or a merge needs it, and
    drops the lse.
    """
    mask = Mask("causal" if args.causal else "bidirectional")
    n_blocks = -(-args.seq // args.block)
    lists = random_lists(n_blocks, args.density, args.causal)
    pairs = n_blocks * (n_blocks + 1) // 2 if args.causal else n_blocks**2
    density = int(lists.k_counts.sum()) / pairs
    sparse = lambda q, k, v: block_sparse_attention(q, k, v, lists, args.block, args.block, mask)[0]
    found: dict[str, Attend] = {
        YARDSTICK: lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=args.causal, implementation="xla"
        ),
        "fdp": lambda q, k, v: flash_attention(q, k, v, mask)[0],
    }
    if jax.default_backend() == "gpu":
        found["fdp without lse"] = lambda q, k, v: attention(q, k, v, mask)  # cuDNN, in bfloat16
    return found | {f"fdp, {density:.0%} of blocks": sparse}


def compile_modes(attend: Attend, arrays: tuple[Array, ...]) -> dict[str, Any]:
    """Both modes, "forward" and "forward + backward", as compiled programs of q, k, v and the
    cotangent of out.
    """

    def both(q: Array, k: Array, v: Array, do: Array) -> Any:
        out, back = jax.vjp(attend, q, k, v)
        return out, back(do)

    forward = jax.jit(lambda q, k, v, do: attend(q, k, v))
    return {
        "forward": forward.lower(*arrays).compile(),
        "forward + backward": jax.jit(both).lower(*arrays).compile(),
    }


def time_interleaved(
    programs: dict[str, Any], arrays: tuple[Array, ...], repeats: int
) -> dict[str, np.ndarray]:
    """Seconds [repeats] of each program, all called once a round in random order, after one round
    unmeasured.
    """
    rng = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(repeats + 1):
        for name in rng.permutation(list(programs)):
            start = time.perf_counter()
            jax.block_until_ready(programs[name](*arrays))
            seconds[name] += [time.perf_counter() - start] if i else []
    return {name: np.array(s) for name, s in seconds.items()}


def median_interval(values_N: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(median, low, high): the bootstrap interval of the median from 2000 resamples."""
    draws_RxN = np.random.default_rng(0).choice(values_N, (2000, values_N.size))
    low, high = np.quantile(np.median(draws_RxN, axis=1), ((1 - level) / 2, (1 + level) / 2))
    return float(np.median(values_N)), float(low), float(high)


def table(mode: str, programs: dict[str, Any], seconds: dict[str, np.ndarray]) -> str:
    """Median, interval, speed relative to the yardstick (per round) and planned memory of every
    contender.
    """
    rows = []
    for name, s in seconds.items():
        median, low, high = (1e3 * x for x in median_interval(s))
        ratio = median_interval(seconds[YARDSTICK] / s)
        memory = f"{aot.memory(programs[name]).peak / 2**20:.1f}"
        rows.append(
            (
                name,
                f"{median:.2f} [{low:.2f}, {high:.2f}]",
                "{:.2f} [{:.2f}, {:.2f}]".format(*ratio),
                memory,
            )
        )
    headers = (mode, "ms", f"times as fast as {YARDSTICK}", "peak MiB")
    return tabulate(
        rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "right")
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line: sizes, dtype, mask and density."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=(__doc__ or "").splitlines()[0]
    )
    for key, value in SIZE.items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--density", type=float, default=0.1, help="share of the visible blocks (default 0.1)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compile, time and print."""
    args = parse(argv)
    device = jax.devices()[0]
    print(f"device    {device.device_kind} ({device.platform}), {os.cpu_count()} host cores")
    print(f"versions  {', '.join(f'{k} {v}' for k, v in versions().items())}")
    print(
        f"problem   batch {args.batch}, {args.seq} tokens, {args.heads} heads over "
        f"{args.kv_heads}, "
        f"head_dim {args.head_dim}, {args.dtype}, {'causal' if args.causal else 'bidirectional'}, "
        f"{args.repeats} rounds"
    )
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    shapes = [(args.batch, args.seq, n, args.head_dim) for n in heads]
    arrays = tuple(
        jax.random.normal(key, s, args.dtype) for key, s in zip(keys, shapes, strict=True)
    )
    compiled = {name: compile_modes(attend, arrays) for name, attend in contenders(args).items()}
    for mode in ("forward", "forward + backward"):
        programs = {name: modes[mode] for name, modes in compiled.items()}
        print("\n" + table(mode, programs, time_interleaved(programs, arrays, args.repeats)))


if __name__ == "__main__":
    main()
