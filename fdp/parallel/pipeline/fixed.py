"""Schedules with a fixed order: it depends on the numbers of devices, chunks and microbatches, not
on times.

Legend: p devices, m microbatches, v chunks of a device, i a device."""

from operator import itemgetter

from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.greedy import Knobs, Line
from fdp.parallel.pipeline.orders import Op, Order, build
from fdp.parallel.pipeline.placement import looped, wave


def gpipe(p: int, m: int) -> Order:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965). Every device holds m
    activations.
    """
    _check(p, m)
    ops = [Op("F", k) for k in range(m)] + [Op("BW", k) for k in range(m)]
    return build(looped(p), lambda i: ops)


def one_f_one_b(p: int, m: int) -> Order:
    """1F1B (PipeDream-flush, Narayanan et al. 2021, arXiv 2104.04473 §2.2.1). Device i holds
    min(p − i, m)."""
    return interleaved(p, m, 1)


def interleaved(p: int, m: int, v: int) -> Order:
    """Interleaved 1F1B of Megatron-LM (Narayanan et al. 2021, arXiv 2104.04473 §2.2.2).

    Microbatches go through the chunks in groups of p. Raises ValueError unless m is a multiple of
    p or v = 1."""
    forwards, backwards = _rounds("interleaved", p, m, v, "BW")
    far = 1 if v == 1 else 2
    return build(
        looped(p, v), lambda i: _alternate(forwards, backwards, far * (p - 1 - i) + (v - 1) * p)
    )


def zb_h1(p: int, m: int) -> Order:
    """ZB-H1 (Qi et al. 2023, arXiv 2401.10241 §2.2): the memory of 1F1B, with W delayed into the
    bubble of the last backwards.

    The idle time is (p − 1)(T_F + T_B − T_W) for T_W ≤ min(T_F, T_B); a longer T_W hides no more
    than min(T_F, T_B)."""
    return interleaved_zero_bubble(p, m, 1)


def zb_h2(p: int, m: int) -> Order:
    """ZB-H2 (Qi et al. 2023, arXiv 2401.10241 §2.3): more warm-up, up to 2p − 1 activations, no
    bubble where F = B = W.

    The bubble (p − 1)(T_F + T_B − 2 T_W) is that of one device, for m ≥ 2p − 1. Devices still start
    one F apart. The makespan, which counts in a step with a barrier, therefore has an idle time of
    at least (p − 1) T_F."""
    forwards, backwards = _rounds("zb_h2", p, m, 1, "B")
    return build(looped(p), lambda i: _delayed(forwards, backwards, 2 * (p - 1 - i), 2 * i))


def interleaved_zero_bubble(p: int, m: int, v: int) -> Order:
    """ZB-H1 over v chunks: W waits behind i others on device i (as `torch.distributed.pipelining`
    has it). The idle time is (p − 1)(T_F + T_B − T_W) / v, the activations are those of p
    microbatches. Raises ValueError unless m is a multiple of p or v = 1."""
    forwards, backwards = _rounds("interleaved_zero_bubble", p, m, v, "B")
    return build(looped(p, v), lambda i: _delayed(forwards, backwards, (v - 1) * p + p - 1 - i, i))


def zbv(p: int, m: int) -> Order:
    """ZB-V (Qi et al. 2023, arXiv 2401.10241 §6): two chunks in a V, the memory of 1F1B, no bubble
    of the span where F = B = W. The order is that of m ≥ 2p − 1, of which fewer microbatches keep
    their part."""
    _check(p, m)
    many = max(m, 2 * p - 1)

    def ops(i: int) -> list[Op]:
        take = _Counter()
        for _ in range(2 * (p - i) - 1):
            take("F", 0)
        for _ in range(i):
            take("F", 1)
            take("F", 0)
        for _ in range(p - i):
            take("F", 1)
            take("B", 1)
            take("W", 1)
        while take.count["F", 1] < many:
            if take.count["F", 0] < many:
                take("F", 0)
            take("B", 0)
            take("W", 0)
            take("F", 1)
            take("B", 1)
            take("W", 1)
        for _ in range(i):
            take("B", 0)
            take("B", 1)
        for _ in range(p - i):
            take("B", 0)
            take("W", 0)
        for c in (1, 0):
            while take.count["W", c] < many:
                take("W", c)
        return [op for op in take.ops if op.microbatch < m]

    return build(wave(p), ops)


def dualpipe_v(p: int, m: int) -> Order:
    """DualPipeV (DeepSeek-AI 2024, arXiv 2412.19437, cut in half to a V): a forward beside a
    backward of the other chunk, W on its own only in the ramps. Holds p + ½ microbatches. What
    DualPipe overlaps inside a pair stands here one after the other. Raises ValueError for m <
    2p."""
    _check(p, m)
    if m < 2 * p:
        raise ValueError(f"dualpipe_v needs m ≥ 2p = {2 * p} microbatches, got m={m}")

    def ops(i: int) -> list[Op]:
        take = _Counter()
        for _ in range(2 * (p - 1 - i)):
            take("F", 0)
        for _ in range(i + 1):
            take("F", 0)
            take("F", 1)
        for _ in range(p - 1 - i):
            take("B", 1)
            take.oldest_w()
            take("F", 1)
        for _ in range(m - 2 * p + i + 1):
            take("F", 0)
            take("BW", 1)
            take("F", 1)
            take("BW", 0)
        for _ in range(p - 1 - i):
            take("BW", 1)
            take("F", 1)
            take("BW", 0)
        for n in range(2 * (i + 1)):  # the second half leaves its W to the end
            take("BW" if n <= i else "B", 1 - n % 2)
        for _ in range(p - 1 - i):
            take.oldest_w()
            take("B", 0)
        for _ in range(i + 1):
            take.oldest_w()
        return take.ops

    return build(wave(p), ops)


def skip_wave(p: int, m: int, memory: float | None = None) -> Order:
    """A V that puts both ends of a U-ViT's skips on one device, with whole backwards: list
    scheduling at F = B = W, as the wave of PULSE (arXiv 2606.19163) is synthesised for its
    placement. The shortest of eight, which differ in the microbatches in flight and in what goes
    back first.

    memory: microbatches that a device may hold, p by default."""
    _check(p, m)
    limit = p if memory is None else memory
    placement = wave(p)
    table = Costs(activation=1.0).on(placement, m)
    line = Line(placement, table, [limit] * p, range(m))
    none = (0.0,) * p
    tries = [
        line.run(Knobs(ahead, none, none, returns=returns, fused=True))
        for ahead in (2.0, 1.0, 1.5, 3.0)
        for returns in (1, p)
    ]
    return line.order(min(tries, key=itemgetter(0))[1])


def _check(p: int, m: int) -> None:
    if p < 1 or m < 1:
        raise ValueError(f"a pipeline needs p ≥ 1 stages and m ≥ 1 microbatches, got p={p}, m={m}")


def _rounds(name: str, p: int, m: int, v: int, backward: str) -> tuple[list[Op], list[Op]]:
    """Forwards and backwards of any device: groups of p microbatches go through chunk after chunk,
    backwards from the last one."""
    _check(p, m)
    if v < 1:
        raise ValueError(f"{name} needs v ≥ 1 chunks per device, got v={v}")
    if v > 1 and m % p:
        raise ValueError(f"{name}: m % p = {m} % {p} = {m % p}, must be 0: set m={-(-m // p) * p}")
    places = [
        (k, c)
        for first in range(0, m, p)
        for c in range(v)
        for k in range(first, min(first + p, m))
    ]
    return ([Op("F", k, c) for k, c in places], [Op(backward, k, v - 1 - c) for k, c in places])


def _alternate(forwards: list[Op], backwards: list[Op], warm_up: int) -> list[Op]:
    """`warm_up` forwards, then one forward and one backward in turn, then the remaining
    backwards."""
    warm = min(warm_up, len(forwards))
    steady = [op for pair in zip(forwards[warm:], backwards, strict=False) for op in pair]
    return forwards[:warm] + steady + backwards[len(forwards) - warm :]


def _delayed(forwards: list[Op], backwards: list[Op], warm_up: int, delay: int) -> list[Op]:
    """As `_alternate`, and after each B the oldest W, once more than `delay` of them wait."""
    weights = iter([op._replace(kind="W") for op in backwards])
    out: list[Op] = []
    waiting = 0
    for op in _alternate(forwards, backwards, warm_up):
        out.append(op)
        waiting += op.kind == "B"
        if op.kind == "B" and waiting > delay:
            out.append(next(weights))
            waiting -= 1
    return [*out, *weights]


class _Counter:
    """Collects operations; each takes the next microbatch of its kind and chunk."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.count: dict[tuple[str, int], int] = {
            (kind, c): 0 for kind in ("F", "B", "W") for c in (0, 1)
        }
        self._waiting: list[Op] = []

    def __call__(self, kind: str, chunk: int) -> None:
        """The next of a kind and chunk. BW counts as B; a B queues its W for `oldest_w`."""
        key = ("B" if kind == "BW" else kind, chunk)
        op = Op(kind, self.count[key], chunk)
        self.count[key] += 1
        self.ops.append(op)
        if kind == "B":
            self._waiting.append(op)

    def oldest_w(self) -> None:
        """W of the B that has waited longest, if one waits."""
        if self._waiting:
            self.ops.append(self._waiting.pop(0)._replace(kind="W"))
