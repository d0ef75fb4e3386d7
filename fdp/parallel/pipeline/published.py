"""What others published of pipeline schedules, and the same numbers from this code.

Legend: p devices, m microbatches of a step."""

from collections.abc import Iterator
from typing import NamedTuple

from fdp.parallel.pipeline import controllable, fixed
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import Evaluation, evaluate
from fdp.parallel.pipeline.heuristics import Times, zb_heuristic, zbv_heuristic
from fdp.parallel.pipeline.orders import Order

SCHEDULES = ("1F1B", "ZB-H1", "ZB-H2", "ZB-1p", "ZB-2p", "ZBV")


class Profiled(NamedTuple):
    """A model of Qi et al. 2023 (arXiv 2401.10241): milliseconds as profiled there, and bubble
    rates by `SCHEDULES`.

    Spans are the paper's table. Makespans, which count in a step with a barrier, were taken from
    its authors' schedules with an evaluator written apart from this one."""

    model: str
    p: int
    m: int
    times: Times
    makespans: tuple[float, ...]
    spans: tuple[float, ...]


_MODELS = (
    ("1.5B", 8, 24, Times(18.522, 18.086, 9.337, 0.601)),
    ("1.5B", 8, 64, Times(18.546, 18.097, 9.321, 0.762)),
    ("6.2B", 8, 24, Times(29.718, 29.444, 19.927, 0.527)),
    ("6.2B", 8, 32, Times(29.802, 29.428, 19.530, 0.577)),
    ("14.6B", 16, 48, Times(11.347, 11.248, 8.132, 0.377)),
    ("28.3B", 32, 96, Times(10.419, 10.207, 7.715, 0.408)),
)
_MAKESPANS = (
    (0.2431, 0.1585, 0.1083, 0.1585, 0.1083, 0.0722),
    (0.1240, 0.0674, 0.0444, 0.0674, 0.0439, 0.0302),
    (0.2347, 0.1323, 0.1003, 0.1323, 0.1003, 0.0606),
    (0.1898, 0.1045, 0.0778, 0.1045, 0.0778, 0.0471),
    (0.2552, 0.1397, 0.1065, 0.1478, 0.1065, 0.0714),
    (0.2646, 0.1421, 0.1098, 0.1501, 0.1098, 0.0763),
)
_SPANS = (
    (0.2431, 0.1585, 0.1083, 0.1585, 0.0433, 0.0703),
    (0.1240, 0.0674, 0.0444, 0.0674, 0.0026, 0.0298),
    (0.2347, 0.1323, 0.0698, 0.1323, 0.0029, 0.0403),
    (0.1898, 0.1045, 0.0559, 0.1045, 0.0022, 0.0326),
    (0.2552, 0.1397, 0.0672, 0.1397, 0.0066, 0.0498),
    (0.2646, 0.1421, 0.0641, 0.1421, 0.0038, 0.0531),
)
ZERO_BUBBLE = tuple(
    Profiled(*model, makespans, spans)
    for model, makespans, spans in zip(_MODELS, _MAKESPANS, _SPANS, strict=True)
)

# The orders of `torch.distributed.pipelining` at p = 8, m = 16: makespan bubbles where F = B = W
# and where W is half of them, and microbatches held.
TORCH = {
    "Interleaved1F1B": (0.1795, 0.1795, 11.5),
    "InterleavedZeroBubble": (0.0680, 0.1160, 8.0),
    "ZBVZeroBubble": (0.0680, 0.0805, 8.0),
    "DualPipeV": (0.0680, 0.1160, 8.5),
}


class Entry(NamedTuple):
    """A published number with as many decimals as it was published with, and ours."""

    table: str
    row: str
    column: str
    published: float
    found: float
    decimals: int = 4

    @property
    def agrees(self) -> bool:
        return round(self.found, self.decimals) == self.published


def zero_bubble_orders(model: Profiled) -> list[Order]:
    """The schedules of a model, as `SCHEDULES` names them."""
    p, m, times = model.p, model.m, model.times
    return [
        fixed.one_f_one_b(p, m),
        fixed.zb_h1(p, m),
        fixed.zb_h2(p, m),
        zb_heuristic(p, m, times, p),
        zb_heuristic(p, m, times, 2 * p),
        zbv_heuristic(p, m, times),
    ]


def zero_bubble_results(model: Profiled) -> list[Evaluation]:
    """The schedules of a model played at its times; bytes are microbatches, of which B leaves half
    to W."""
    t = model.times
    costs = Costs(t.F, t.B, t.W, send=t.send, activation=1.0, stash=0.5)
    return [evaluate(order, costs) for order in zero_bubble_orders(model)]


def torch_orders() -> dict[str, Order]:
    """By the names of `TORCH`."""
    orders = (
        fixed.interleaved(8, 16, 2),
        fixed.interleaved_zero_bubble(8, 16, 2),
        fixed.zbv(8, 16),
        fixed.dualpipe_v(8, 16),
    )
    return dict(zip(TORCH, orders, strict=True))


# Makespan bubbles by shape at p = 8, m = 24, by tokens over width; taken from the published orders
# with the other evaluator.
SHAPE_SCHEDULES = (
    "ZB-H1",
    "ZB-H2",
    "ZB-2p",
    "ZBV",
    "V-Half",
    "DualPipeV",
    "interleaved zero bubble v=2",
    "interleaved zero bubble v=3",
)
SHAPES = {
    "DiT-XL/2 256 px": (256 / 1152, (0.096, 0.088, 0.088, 0.049, 0.114, 0.051, 0.051, 0.034)),
    "DiT-XL/2 512 px": (1024 / 1152, (0.114, 0.085, 0.085, 0.055, 0.136)),
    "MMDiT 1024 px": (4096 / 2432, (0.131, 0.083, 0.083, 0.061, 0.162, 0.081, 0.070, 0.048)),
    "video 32k": (32768 / 3072, (0.190, 0.170, 0.144, 0.132, 0.340, 0.140, 0.105, 0.072)),
    "video 115k": (115200 / 5120, (0.206, 0.196, 0.182, 0.153, 0.380, 0.156, 0.115, 0.080)),
}


def shape_times(ratio: float) -> Times:
    """F, B, W of a block whose tokens are `ratio` times its width: matmul FLOPs over tokens·width²,
    where the backward forms the scores of attention again."""
    return Times(24 + 4 * ratio, 24 + 12 * ratio, 24.0)


def shape_results(ratio: float) -> list[Evaluation]:
    """`SHAPE_SCHEDULES` at p = 8, m = 24."""
    p, m, times = 8, 24, shape_times(ratio)
    orders = (
        fixed.zb_h1(p, m),
        fixed.zb_h2(p, m),
        zb_heuristic(p, m, times, 2 * p),
        zbv_heuristic(p, m, times),
        controllable.v_half(p, m),
        fixed.dualpipe_v(p, m),
        fixed.interleaved_zero_bubble(p, m, 2),
        fixed.interleaved_zero_bubble(p, m, 3),
    )
    return [evaluate(order, Costs(times.F, times.B, times.W)) for order in orders]


def entries() -> Iterator[Entry]:
    """Every number of the tables, computed again."""
    for model in ZERO_BUBBLE:
        row = f"{model.model} p={model.p} m={model.m}"
        found = zip(
            SCHEDULES, model.makespans, model.spans, zero_bubble_results(model), strict=True
        )
        for name, makespan, span, r in found:
            yield Entry("zero bubble, makespan", row, name, makespan, r.bubble)
            yield Entry("zero bubble, span", row, name, span, r.span_bubble)
    for name, order in torch_orders().items():
        equal, half, held = TORCH[name]
        r = evaluate(order, Costs(activation=1.0, stash=0.5))
        yield Entry("torch", name, "F = B = W", equal, r.bubble)
        yield Entry("torch", name, "F = B = 2 W", half, evaluate(order, Costs(W=0.5)).bubble)
        yield Entry("torch", name, "microbatches held", held, max(r.peak_bytes))
    for shape, (ratio, bubbles) in SHAPES.items():
        for name, bubble, r in zip(SHAPE_SCHEDULES, bubbles, shape_results(ratio), strict=False):
            yield Entry("shapes", shape, name, bubble, r.bubble, 3)
