"""What a pipeline costs: scheduled gradients against plain ones, ticks, compiling, pricing, search.

    python -m benchmarks.pipeline                       # < 4 min on 2 idle cores, 8 virtual devices

Devices are virtual, so that wall time measures the work of all of them together and nothing about
parallel speed: `plain` has the same four devices as dp. The programs take turns in one process, as
`timing` says. The DiT of topic 8's `cpu` variant is also measured on one device against the same
model in a single file. Exit status 1: a limit is broken by its whole interval."""

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks import plain_dit
from benchmarks.step import no_compilation_cache, paired_ratio
from benchmarks.timing import banner, interval_text, time_interleaved
from configs import topic8
from fdp.experiment import Experiment, standard
from fdp.grads import plain
from fdp.mesh import AXES, make_mesh, use_virtual_devices
from fdp.parallel.pipeline import fixed
from fdp.parallel.pipeline.costs import STASH, Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.search import search
from fdp.parallel.pipeline.table import FIELDS
from fdp.step import TrainStep

PP, M = 4, 8
LIMITS = {"1F1B / plain": 1.3, "H1 / 1F1B": 1.3, "fdp / single file": 1.05}
TICK_MS, COMPILE_S, ORDERS, SEARCH_S = 2.0, 20.0, 200.0, 15.0


def experiment(pp: int, dp: int, batch: int) -> Experiment:
    """The DiT of the `cpu` variant on so many devices, without pictures."""
    c = topic8.get_config("cpu")
    with c.unlocked():
        c.mesh.update(dict.fromkeys(AXES, 1) | {"pp": pp, "dp": dp})
        c.pipeline.schedule = "1f1b"
        c.train.update(batch=batch, microbatches=M)
        c.data.source = "blank"
    return standard(c)


def program(e: Experiment) -> tuple[Any, tuple[Any, ...], float]:
    """(compiled gradients, arguments, seconds to compile)."""
    p = TrainStep(e, make_mesh(e.degrees, jax.devices()[: int(np.prod(list(e.degrees.values())))]))
    image, n = e.model.image, e.fit.batch
    images = np.zeros((n, image.size, image.size, image.channels), np.float32)
    batch = {"images": images, "labels": np.zeros(n, np.int32)}
    noised = p.corrupt(jax.device_put(batch, p.batch_shardings()), jax.random.key(0))
    given = (p.init(0).variables, noised)
    begun = time.perf_counter()
    compiled = jax.jit(p.grads).lower(*given).compile()
    return compiled, given, time.perf_counter() - begun


def whole_steps(repeats: int, batch: int) -> tuple[list[tuple[str, ...]], bool]:
    """Rows of the table, and whether all limits hold."""
    piped = experiment(PP, 1, batch)
    orders = {"1F1B": fixed.one_f_one_b(PP, M), "H1": fixed.zb_h1(PP, M)}
    cases = {"plain": experiment(1, PP, batch)}
    cases["plain"] = replace(cases["plain"], grads=plain(M // PP))  # of as many images each
    cases |= {name: replace(piped, grads=scheduled(order)) for name, order in orders.items()}
    with no_compilation_cache():
        built = {name: program(e) for name, e in cases.items()}
    seconds = time_interleaved({k: (f, given) for k, (f, given, _) in built.items()}, repeats)
    rows, good = [], True
    for pair in (("1F1B", "plain"), ("H1", "1F1B")):
        name = " / ".join(pair)
        ratio, ci = paired_ratio(seconds[pair[0]], seconds[pair[1]])
        good &= ci[0] <= LIMITS[name]
        rows.append((name, f"{ratio:.2f} [{ci[0]:.2f}, {ci[1]:.2f}]", f"≤ {LIMITS[name]}"))
    for name, (_, _, spent) in built.items():
        ticks = len(scheduled(orders[name]).table.rows) if name in orders else 0
        what = f"compile {name}" + (f", {ticks} ticks, s" if ticks else ", s")
        good &= not ticks or spent <= COMPILE_S
        rows.append((what, f"{spent:.1f}", f"≤ {COMPILE_S:g}" if ticks else ""))
    rows += [(f"{k}, ms a step", interval_text(1e3 * s), "") for k, s in seconds.items()]
    return rows, good


def idle_tick(repeats: int) -> tuple[list[tuple[str, ...]], bool]:
    """What a tick costs in which every device idles: the difference of two tables, one with many
    such ticks at its end."""
    e, more = experiment(PP, 1, 8), 200
    order = fixed.one_f_one_b(PP, M)
    short = scheduled(order)
    built = {}
    for name, grads in (("short", short), ("long", padded(short, more))):
        built[name] = program(replace(e, grads=grads))[:2]
    seconds = time_interleaved(built, repeats)
    each = 1e3 * (np.median(seconds["long"]) - np.median(seconds["short"])) / more
    return [("idle tick, ms", f"{each:.2f}", f"≤ {TICK_MS:g}")], bool(each <= TICK_MS)


def padded(grads: scheduled, ticks: int) -> scheduled:
    """The same schedule with so many more ticks in which all devices idle."""
    found = scheduled(grads.order)
    rows, slots = grads.table.rows, grads.table.slots
    unused = {"residual": slots.residuals, "stash": slots.stashes}
    unused |= dict.fromkeys(("input", "plus", "minus", "own"), slots.messages)
    idle = np.array([unused.get(name, 0) for name in FIELDS], rows.dtype)
    more = np.broadcast_to(idle, (ticks, *rows.shape[1:]))
    vars(found)["table"] = replace(grads.table, rows=np.concatenate([rows, more]))
    return found


def pricing() -> tuple[list[tuple[str, ...]], bool]:
    """Orders a second at about 2,300 operations, and one search."""
    order, costs = fixed.interleaved_zero_bubble(8, 32, 3), Costs(activation=1.0, stash=STASH)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 2.0:
        evaluate(order, costs)
        count += 1
    rate = count / (time.perf_counter() - begun)
    shares = np.array([1.0, 0.25] * 16)[None]
    begun = time.perf_counter()
    uneven = Costs(shares, 1.26 * shares, 0.87 * shares, activation=1.0, stash=STASH, message=1.0)
    search(8, 32, uneven, 8.0)
    spent = time.perf_counter() - begun
    rows = [
        (f"orders priced a second, {len(order):,} operations", f"{rate:.0f}", f"≥ {ORDERS:g}"),
        ("search, p = 8, m = 32, s", f"{spent:.1f}", f"≤ {SEARCH_S:g}"),
    ]
    return rows, rate >= ORDERS and spent <= SEARCH_S


def single_file(repeats: int) -> tuple[list[tuple[str, ...]], bool]:
    """Forward and backward of fdp's DiT and of `plain_dit`, on one device. Raises RuntimeError
    where they are not the same computation."""
    c = topic8.get_config("cpu")
    with c.unlocked():
        c.mesh.update(dict.fromkeys(AXES, 1))
        c.train.microbatches, c.data.source = 1, "blank"
    e = standard(c)
    ours, (variables, noised), _ = program(e)
    device = jax.devices()[0]
    params = jax.tree.map(lambda x: jnp.array(np.asarray(x)), variables["params"])
    rows = jax.tree.map(lambda x: jax.device_put(np.asarray(x), device), noised)
    given = {k: rows[k] for k in ("inputs", "rows", "noise", "labels")}
    patch = e.model.image.patch
    theirs = jax.jit(jax.value_and_grad(plain_dit.loss), static_argnums=2)
    plain = theirs.lower(params, given, patch).compile()
    losses = float(ours(variables, noised)[0]), float(plain(params, given)[0])
    if not np.isclose(*losses, rtol=1e-5):
        raise RuntimeError(f"not the same computation: losses {losses}")
    name = "fdp / single file"
    contenders = {"fdp": (ours, (variables, noised)), "single file": (plain, (params, given))}
    seconds = time_interleaved(contenders, repeats)
    ratio, ci = paired_ratio(seconds["fdp"], seconds["single file"])
    text = f"{ratio:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"
    return [(f"DiT, {name}", text, f"≤ {LIMITS[name]}")], ci[0] <= LIMITS[name]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--batch", type=int, default=32, help="images (default 32)")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error(f"--repeats={args.repeats} rounds: at least 2, for an interval")
    if args.batch < M or args.batch % M:
        parser.error(f"--batch={args.batch} images are no multiple of {M} microbatches")
    use_virtual_devices(8)
    print(banner() + "\n")
    parts = (
        whole_steps(args.repeats, args.batch),
        idle_tick(max(3, args.repeats // 3)),
        single_file(2 * args.repeats),
        pricing(),
    )
    print(tabulate([row for rows, _ in parts for row in rows], ("", "measured", "limit")))
    good = all(good for _, good in parts)
    print(f"\nlimits: {'all hold' if good else 'broken'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
