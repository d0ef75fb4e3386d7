"""The fixed schedules by name, as configs and commands call them."""

from collections.abc import Callable

from fdp.parallel.pipeline import controllable, fixed
from fdp.parallel.pipeline.orders import Order

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


def named(name: str, p: int, m: int, v: int = 1) -> Order:
    """The schedule `name` of p devices, m microbatches and v chunks; a V has two in any case.
    Raises ValueError for numbers that it does not take, and KeyError for a name that is unknown."""
    return WAVES[name](p, m) if name in WAVES else LOOPED[name](p, m, v)
