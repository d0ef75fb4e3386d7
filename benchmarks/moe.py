"""fdp's experts against JAX's own grouped product, tokamax's, and one dense product of equal FLOPs,
on the device that is there; and the memory of an expert layer, compiled for an H100 that need not
be there.

    python -m benchmarks.moe            # a CPU: < 3 min on 2 cores; a GPU: < 4 min
    python -m benchmarks.moe --rows=32768 --width=4096 --hidden=14336 --experts=8 --dtype=bfloat16

All contenders multiply the same rows, which fall on the experts at random, with the same weights;
fdp's lie in its blocks, padding included. The dense product multiplies as many rows with one
weight. tokamax takes part on a GPU where it is installed. Times as `timing` takes them. On a GPU
also: what the dispatch adds to the experts of a layer. On a CPU also: the step of topic 2's `cpu`
model against that of its dense twin, on one device. Compiled figures need the aot extra.

Legend: R rows, D width, F hidden width, E experts, K choices of a token."""

import argparse
import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from tabulate import tabulate

from benchmarks.step import Side, paired_ratio
from benchmarks.timing import MODES, Program, banner, compile_modes, interval_text, time_interleaved
from benchmarks.timing import table as time_table
from configs import topic2
from fdp.collectives import shard_map
from fdp.count import aot
from fdp.count.experts import LAYERS, PLATFORM, Temporaries, expert_memory
from fdp.kernels_pallas.grouped import (
    Groups,
    choose_block,
    grouped_ffn,
    grouped_matmul,
    make_groups,
)
from fdp.mesh import AXES, make_mesh
from fdp.parallel.expert.exchange import Load
from fdp.parallel.expert.plan import Dispatch
from fdp.step import TrainStep
from fdp.topics.moe_dlm.study import arm

Array = jax.Array
OURS, RAGGED, DENSE, TOKAMAX = "fdp", "lax.ragged_dot", "dense, equal FLOPs", "tokamax"
BOTH = MODES[1]
ROOM = 0.9  # of a device's memory: what plans to use more takes no part


class Case(NamedTuple):
    """A grouped product: R rows of width D, random over E experts of width F, and how many times as
    fast as each other contender it shall be, forward and backward."""

    R: int
    D: int
    F: int
    E: int
    least: dict[str, float]


def cases() -> list[Case]:
    """Of the platform: 2 CPU threads; a GPU, at 1 to 16 thousand rows an expert."""
    if jax.default_backend() != "gpu":
        by_experts: dict[int, dict[str, float]] = {
            8: {RAGGED: 4, DENSE: 1 / 3},
            32: {},
            64: {RAGGED: 20, DENSE: 1 / 5},
        }
        return [Case(4096, 128, 256, E, least) for E, least in by_experts.items()]
    least = {RAGGED: 1.9, TOKAMAX: 0.9, DENSE: 0.7}
    return [
        Case(each * layer.E, layer.D, layer.F, layer.E, least)
        for layer in LAYERS.values()
        for each in (1024, 4096, 16384)
        if each * layer.E <= 2**17
    ]


def lay_out(x_NxD: Array, ids_N: Array, groups: Groups) -> Array:
    """Rows in any order, of experts `ids` → the blocks of `groups`."""
    order_N = jnp.argsort(ids_N, stable=True)
    ids_N = ids_N[order_N]
    first_E = jnp.cumsum(groups.sizes_E) - groups.sizes_E
    rank_N = jnp.arange(len(ids_N)) - first_E[ids_N]
    blank = jnp.zeros((groups.rows, x_NxD.shape[1]), x_NxD.dtype)
    return blank.at[groups.starts_E[ids_N] + rank_N].set(x_NxD[order_N])


def contenders(case: Case, dtype: str) -> dict[str, dict[str, Program]]:
    """Name → mode → program of the products of R rows with E weights [D, F]. What needs more memory
    than the device has is left out."""
    R, D, F, E, _ = case
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (R, D), (E, D, F), (R, F)
    x, w, dy = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False))
    ids_N = jax.random.randint(keys[3], (R,), 0, E)
    sizes_E = jnp.bincount(ids_N, length=E).astype(jnp.int32)
    groups = make_groups(sizes_E, R, choose_block(R, E))
    order_N = jnp.argsort(ids_N, stable=True)
    sorted_rows = x[order_N], w, dy[order_N]
    found: dict[str, tuple[Callable, tuple[Array, ...]]] = {
        OURS: (
            lambda x, w: grouped_matmul(x, w, groups),
            (lay_out(x, ids_N, groups), w, lay_out(dy, ids_N, groups)),
        ),
        RAGGED: (lambda x, w: lax.ragged_dot(x, w, sizes_E), sorted_rows),
        DENSE: (lambda x, w: x @ w, (x, w[0], dy)),
    }
    if jax.default_backend() == "gpu" and importlib.util.find_spec("tokamax"):
        import tokamax

        found[TOKAMAX] = (lambda x, w: tokamax.ragged_dot(x, w, sizes_E), sorted_rows)
    programs = {}
    for name, (f, arrays) in found.items():
        with contextlib.suppress(MemoryError):
            programs[name] = {mode: (p, arrays) for mode, p in compile_to_fit(f, arrays).items()}
    return programs


def compile_to_fit(call: Callable, arrays: tuple[Array, ...]) -> dict[str, Any]:
    """`compile_modes`. Raises MemoryError for a plan of more than ROOM of the device's memory."""
    try:
        modes = compile_modes(call, arrays)
    except jax.errors.JaxRuntimeError as error:  # a compiler that tries the program out
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError from error
        raise
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
    if aot.memory(modes[BOTH]).peak > ROOM * limit:
        raise MemoryError
    return modes


def verdicts(case: Case, seconds: dict[str, np.ndarray]) -> str:
    """The ratios that the case judges, by their medians."""
    lines = []
    for name, least in case.least.items():
        if name not in seconds:
            lines.append((f"times as fast as {name}", "not measured", f"≥ {least:.2g}", ""))
            continue
        ratio = seconds[name] / seconds[OURS]
        said = "holds" if np.median(ratio) >= least else "fails"
        lines.append((f"times as fast as {name}", interval_text(ratio), f"≥ {least:.2g}", said))
    return tabulate(lines, headers=(f"fdp, {BOTH}", "", "threshold", ""), disable_numparse=True)


def compare(case: Case, dtype: str, repeats: int) -> str:
    """Tables of both modes, and the verdicts."""
    compiled = contenders(case, dtype)
    title = f"{case.R} x {case.D} x {case.F}, {case.E} experts"
    parts = []
    for mode in MODES:
        programs = {name: modes[mode] for name, modes in compiled.items()}
        seconds = time_interleaved(programs, repeats)
        parts.append(time_table(f"{title}, {mode}", programs, seconds, DENSE))
    if case.least:
        parts.append(verdicts(case, seconds))
    return "\n\n".join(parts)


# A layer, a step
# -------------------------------------------------------------------------------------------------


def dispatch_share(R: int, D: int, F: int, E: int, K: int, repeats: int) -> str:
    """What routed rows add to the time of the experts: a whole dispatch on one device against the
    experts alone, on rows that already lie in groups, forward and backward in bfloat16."""
    key = jax.random.split(jax.random.key(0), 5)
    T, bf16 = R // K, jnp.bfloat16
    x_TxD, dy_TxD = (jax.random.normal(k, (T, D), bf16) for k in key[:2])
    w_in = jax.random.normal(key[2], (E, 2, D, F), bf16)
    w_out = jax.random.normal(key[3], (E, F, D), bf16)
    gates_TxK, ids_TxK = lax.top_k(jax.nn.softmax(jax.random.normal(key[4], (T, E))), K)

    def layer(x: Array, gates: Array, w_in: Array, w_out: Array) -> Array:
        def ffn(rows: Array, groups: Groups) -> Array:
            return grouped_ffn(rows, w_in, w_out, groups)

        return Dispatch()(x, Load(ids_TxK, gates, R, T, E), ffn)[0]

    mesh, whole = make_mesh(dict.fromkeys(AXES, 1)), PartitionSpec()
    sizes_E = jnp.bincount(ids_TxK.reshape(-1), length=E).astype(jnp.int32)
    groups = make_groups(sizes_E, R, choose_block(R, E))
    rows_RxD = jax.random.normal(key[0], (groups.rows, D), bf16)
    calls: dict[str, tuple[Callable, tuple[Array, ...]]] = {
        "whole": (
            shard_map(layer, mesh, (whole,) * 4, whole),
            (x_TxD, gates_TxK, w_in, w_out, dy_TxD),
        ),
        "experts": (
            lambda x, w_in, w_out: grouped_ffn(x, w_in, w_out, groups),
            (rows_RxD, w_in, w_out, rows_RxD),
        ),
    }
    programs = {n: (compile_modes(f, given)[BOTH], given) for n, (f, given) in calls.items()}
    seconds = time_interleaved(programs, repeats)
    share = interval_text(1 - seconds["experts"] / seconds["whole"])
    return f"{R // E} rows an expert, {D} x {F}, {E} experts: dispatch is {share} of the layer"


def step_ratio(pairs: int = 30) -> str:
    """Steps of topic 2's `cpu` model and of its dense twin of equal active FLOPs, in pairs."""
    c = topic2.get_config()
    with c.unlocked():
        c.mesh.update(dict.fromkeys(AXES, 1))
    sides = {}
    for name in ("aux", "dense"):
        program = TrainStep(arm(c, "two_regimes", name), make_mesh(c.mesh))
        tokens = program.experiment.data.train.take(range(c.train.batch))
        batch = jax.device_put(tokens, program.batch_shardings())
        side = Side(program.jit_train_step, program.init(0), batch, lambda m: float(m["loss"]))
        side.compile()
        sides[name] = side
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(3 + pairs):
        for name in rng.permutation(list(sides)):
            elapsed = sides[name].step()[0]
            seconds[name] += [elapsed] if i >= 3 else []
    ratio, (low, high) = paired_ratio(np.array(seconds["aux"]), np.array(seconds["dense"]))
    verdict = "holds" if ratio <= 2 else "fails"
    times = " and ".join(f"{1e3 * np.median(s):.1f}" for s in seconds.values())
    return (
        f"step of topic 2's cpu model, experts and dense, one device: {times} ms, "
        f"{ratio:.2f} [{low:.2f}, {high:.2f}] times (≤ 2: {verdict})"
    )


# Memory, compiled
# -------------------------------------------------------------------------------------------------


def memory_table(measured: dict[str, Temporaries]) -> str:
    """Temporaries of both implementations, and their ratios to each other and to what must be
    kept."""
    rows = []
    for name, found in measured.items():
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
    """Command line: one size in place of those that are judged."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe", description=(__doc__ or "").splitlines()[0]
    )
    for key in ("rows", "width", "hidden"):
        parser.add_argument(f"--{key}", type=int, help="with the other sizes: measure this one")
    parser.add_argument("--experts", type=int, nargs="+", default=[], help="numbers of experts")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default 15)")
    gpu = jax.default_backend() == "gpu"
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats} rounds: at least 1")
    sizes = args.rows, args.width, args.hidden, args.experts
    if any(sizes) and not all(sizes):
        parser.error("give all of --rows, --width, --hidden, --experts, or none of them")
    return args


def main(argv: list[str] | None = None) -> None:
    """Compile, time and print."""
    args = parse(argv)
    print(f"{banner()}\nproblem   {args.dtype}, {args.repeats} rounds")
    asked = [Case(args.rows, args.width, args.hidden, E, {}) for E in args.experts]
    for case in asked or cases():
        print("\n" + compare(case, args.dtype, args.repeats), flush=True)
    if asked:
        return
    if jax.default_backend() == "gpu":
        for layer, topk in zip(LAYERS.values(), (2, 8), strict=True):
            print("\n" + dispatch_share(*layer, topk, args.repeats), flush=True)
    else:
        print("\n" + step_ratio(), flush=True)
    measured = expert_memory()  # in a process of its own: this one has started its devices
    needs = "memory on an H100: not compiled, pip install 'fdp[aot]'"
    print("\n" + (memory_table(measured) if measured else needs))


if __name__ == "__main__":
    main()
