"""Schedules by name, as configs and commands call them: fixed ones, a searched one, or a file."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from fdp.parallel.pipeline import controllable, fixed
from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.costs import STASH, Costs
from fdp.parallel.pipeline.csv_format import read_csv
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.orders import Order
from fdp.parallel.pipeline.placement import looped, wave
from fdp.parallel.pipeline.search import search

# (devices, microbatches, chunks) → order
LOOPED: dict[str, Callable[[int, int, int], Order]] = {
    "gpipe": lambda p, m, _: fixed.gpipe(p, m),
    "1f1b": fixed.interleaved,
    "zb_h1": fixed.interleaved_zero_bubble,
    "zb_h2": lambda p, m, _: fixed.zb_h2(p, m),
}
WAVES: dict[str, Callable[[int, int], Order]] = {
    "zbv": fixed.zbv,
    "v_half": controllable.v_half,
    "v_min": controllable.v_min,
    "dualpipe_v": fixed.dualpipe_v,
}
FIXED = (*LOOPED, *WAVES)
WHOLE = ("gpipe", "zb_h2")  # stages are not cut in chunks
MOST = 2**14  # microbatches of a step times devices: a search of more takes hours


@lru_cache(maxsize=32)
def named(
    name: str,
    p: int,
    m: int,
    v: int = 1,
    shares_m: tuple[float, ...] = (),
    blocks_u: tuple[float, ...] = (),
) -> Order:
    """The schedule `name` of p devices, m microbatches and v chunks; a V has two in any case.

    "searched" is the best found for equal costs of F, B and W, times `shares_m` where microbatches
    cost unlike, with at most p microbatches held by a device. blocks_u: of the virtual stages of a
    V, on which alone is then searched. A name that ends in .csv is a file in the format of
    torch.distributed.pipelining. Raises ValueError for numbers that a schedule does
    not take, among them p·m > MOST, and for a file that does not run; KeyError for an unknown
    name."""
    if p * m > MOST:
        raise ValueError(f"devices·microbatches = {p}·{m} = {p * m} > {MOST}: set m={MOST // p}")
    if name.endswith(".csv"):
        return _of_file(name, p, m)
    if name == "searched":
        share = np.array(shares_m or [1.0] * m)[None]
        if blocks_u:
            share = share * np.array(blocks_u)[:, None] * p / sum(blocks_u)
        costs = Costs(share, share, share, activation=1.0, stash=STASH, message=1.0)
        places = [looped(p, v), wave(p)] if v == 2 else [looped(p, v)]
        places = [wave(p)] if blocks_u else places
        best = search(p, m, costs, float(p), places, effort=0.3).best.order
        assert best is not None
        return best
    return WAVES[name](p, m) if name in WAVES else LOOPED[name](p, m, v)


def chunks(name: str, p: int, v: int) -> int:
    """Parts of a device's layers under the schedule `name`, where a config asks for v. Errors as in
    `read_csv`."""
    if name.endswith(".csv"):
        return read_csv(name, p=p).placement.v
    return 2 if name in WAVES else v


def warning(order: Order) -> str:
    """What to say where there are fewer microbatches than devices; "" where there are enough."""
    p, m = order.placement.p, order.microbatches
    if m >= p:
        return ""
    return (
        f"train.microbatches={m} < mesh.pp={p}: the pipeline never fills, "
        f"{evaluate(order, Costs()).bubble:.1%} of a step idles where F, B and W take equally "
        f"long; set train.microbatches ≥ {p}, or a lower mesh.pp"
    )


def _of_file(path: str, p: int, m: int) -> Order:
    order = read_csv(path, p=p)
    check(order)
    if order.microbatches != m:
        raise ValueError(
            f"{path} has {order.microbatches} microbatches, not train.microbatches={m}: set "
            f"train.microbatches={order.microbatches}"
        )
    return order
