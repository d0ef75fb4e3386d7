"""fdp's grouped matrix product against JAX's own and against one dense product of equal FLOPs:
forward, forward and backward, over numbers of experts; and the memory of an expert layer, compiled
for an H100 that need not be there.

    python -m benchmarks.moe            # sizes for 2 CPU cores, < 2 min
    python -m benchmarks.moe --rows=32768 --width=4096 --hidden=14336 --experts=8 \\
        --dtype=bfloat16                # a GPU

All contenders multiply the same rows, which fall on the experts at random, with the same weights;
fdp's lie in its blocks, padding included. The dense product multiplies as many rows with one
weight. tokamax takes part on a GPU where it is installed. Times as `timing` takes them. Compiled
figures need the aot extra.

Legend: R rows, D width, F hidden width, E experts."""

import argparse
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tabulate import tabulate

from benchmarks.timing import MODES, Program, banner, compile_modes, interval_text, time_interleaved
from benchmarks.timing import table as time_table
from fdp.count import aot
from fdp.count.experts import LAYERS, PLATFORM, table
from fdp.kernels_pallas.grouped import Groups, choose_block, grouped_matmul, most_blocks

Array = jax.Array
SIZE = {"rows": 4096, "width": 128, "hidden": 256, "repeats": 15}
OURS, RAGGED, DENSE = "fdp", "lax.ragged_dot", "dense, equal FLOPs"
# Forward and backward on 2 CPU threads at the sizes above: experts → how many times as fast as
# ragged_dot at least, how many times as long as the dense product at most.
LIMITS = {8: (4.0, 3.0), 64: (20.0, 5.0)}


def lay_out(x_NxD: Array, ids_N: Array, groups: Groups) -> Array:
    """Rows in any order, of experts `ids` → the blocks of `groups`."""
    order_N = jnp.argsort(ids_N, stable=True)
    ids_N = ids_N[order_N]
    first_E = jnp.cumsum(groups.sizes_E) - groups.sizes_E
    rank_N = jnp.arange(len(ids_N)) - first_E[ids_N]
    blank = jnp.zeros((groups.rows, x_NxD.shape[1]), x_NxD.dtype)
    return blank.at[groups.starts_E[ids_N] + rank_N].set(x_NxD[order_N])


def contenders(args: argparse.Namespace, E: int) -> dict[str, dict[str, Program]]:
    """Name → mode → program of the products of R rows with E weights [D, F]."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (args.rows, args.width), (E, args.width, args.hidden), (args.rows, args.hidden)
    x, w, dy = (
        jax.random.normal(key, shape, args.dtype) for key, shape in zip(keys, shapes, strict=False)
    )
    ids_N = jax.random.randint(keys[3], (args.rows,), 0, E)
    sizes_E = jnp.bincount(ids_N, length=E).astype(jnp.int32)
    block = choose_block(args.rows, E)
    groups = Groups(sizes_E, block, most_blocks(args.rows, E, block))
    order_N = jnp.argsort(ids_N, stable=True)
    cases: dict[str, tuple[Callable, tuple[Array, ...]]] = {
        OURS: (
            lambda x, w: grouped_matmul(x, w, groups),
            (lay_out(x, ids_N, groups), w, lay_out(dy, ids_N, groups)),
        ),
        RAGGED: (lambda x, w: lax.ragged_dot(x, w, sizes_E), (x[order_N], w, dy[order_N])),
        DENSE: (lambda x, w: x @ w, (x, w[0], dy)),
    }
    if jax.default_backend() == "gpu" and importlib.util.find_spec("tokamax"):
        import tokamax

        arrays = cases[RAGGED][1]
        cases["tokamax"] = (lambda x, w: tokamax.ragged_dot(x, w, sizes_E), arrays)
    return {
        name: {mode: (p, arrays) for mode, p in compile_modes(f, arrays).items()}
        for name, (f, arrays) in cases.items()
    }


def verdicts(E: int, seconds: dict[str, np.ndarray]) -> str:
    """The ratios that LIMITS judges, by their medians."""
    faster, longer = seconds[RAGGED] / seconds[OURS], seconds[OURS] / seconds[DENSE]
    least, most = LIMITS[E]
    rows = [
        (f"times as fast as {RAGGED}", faster, f"≥ {least:g}", np.median(faster) >= least),
        (f"times as long as {DENSE}", longer, f"≤ {most:g}", np.median(longer) <= most),
    ]
    lines = [
        (name, interval_text(x), limit, "holds" if ok else "fails") for name, x, limit, ok in rows
    ]
    headers = (f"{E} experts, {MODES[1]}", "", "threshold", "")
    return tabulate(lines, headers=headers, disable_numparse=True)


# Memory, compiled
# -------------------------------------------------------------------------------------------------


def memory_table() -> str:
    """Temporaries of both implementations, and their ratios to each other and to what must be
    kept."""
    rows = []
    for name, found in table().items():
        layer = LAYERS[name]
        shape = f"{layer.rows} x {layer.D} x {layer.F}, {layer.E} experts"
        ratios = found.ours / found.ragged, found.ours / found.kept
        sizes = found.ours >> 20, found.ragged >> 20
        rows.append((name, shape, *sizes, *(f"{r:.3f}" for r in ratios)))
    headers = (
        f"temporaries, {MODES[1]}, {PLATFORM}",
        "rows x D x F",
        "fdp, MiB",
        f"{RAGGED}, MiB",
        "ratio (≤ 0.25)",
        "to kept (≤ 1.5)",
    )
    return tabulate(rows, headers=headers, disable_numparse=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line: sizes, dtype and numbers of experts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe", description=(__doc__ or "").splitlines()[0]
    )
    for key, value in SIZE.items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[8, 32, 64], help="default 8 32 64"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compile, time and print."""
    args = parse(argv)
    judged = vars(args) == vars(parse([])) and jax.default_backend() == "cpu"
    print(banner())
    print(
        f"problem   {args.rows} rows, width {args.width}, hidden {args.hidden}, {args.dtype}, "
        f"{args.repeats} rounds"
    )
    for E in args.experts:
        compiled = contenders(args, E)
        for mode in MODES:
            programs = {name: modes[mode] for name, modes in compiled.items()}
            seconds = time_interleaved(programs, args.repeats)
            print("\n" + time_table(f"{E} experts, {mode}", programs, seconds, DENSE))
        if judged and E in LIMITS:
            print("\n" + verdicts(E, seconds))
    if aot.available("h100"):
        print("\n" + memory_table())


if __name__ == "__main__":
    main()
