"""Pipeline schedules: the order of operations on every stage, and the tasks that they give to
`fdp.price.simulate`.

Operations: F forward, B gradient of the input, W gradient of the weights, BW both in one. An order
holds one list of operations per stage; chunk c of stage i is the virtual stage c·p + i. Times and
bytes of a stage are those of all its chunks together.

Legend: p stages, m microbatches, v chunks per stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fdp.price.simulate import Resource, TimedTask


class Op(NamedTuple):
    kind: str  # F, B, W or BW
    microbatch: int
    chunk: int = 0


Order = list[list[Op]]


@dataclass(frozen=True)
class PipelineSchedule:
    """Arguments of `simulate`. Tasks are called (kind, stage, microbatch, chunk), messages ("send",
    *task).
    """

    tasks: list[TimedTask]
    resources: list[Resource]
    neighbours: dict[str, list[str]]


def gpipe(p: int, m: int) -> Order:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965). Every stage holds m
    activations.
    """
    _check(p, m)
    return [[Op("F", k) for k in range(m)] + [Op("BW", k) for k in range(m)] for _ in range(p)]


def one_f_one_b(p: int, m: int) -> Order:
    """1F1B (PipeDream-flush, Narayanan et al. 2021, arXiv 2104.04473 §2.2.1). Stage i holds min(p −
    i, m).
    """
    _check(p, m)
    return [
        _alternate([Op("F", k) for k in range(m)], [Op("BW", k) for k in range(m)], p - 1 - i)
        for i in range(p)
    ]


def interleaved(p: int, m: int, v: int) -> Order:
    """Interleaved 1F1B of Megatron-LM (Narayanan et al. 2021, arXiv 2104.04473 §2.2.2); v = 1 is
    `one_f_one_b`.

    Microbatches go through the chunks in groups of p. Raises ValueError unless m is a multiple of
    p."""
    _check(p, m)
    if v < 1:
        raise ValueError(f"interleaved needs v ≥ 1 chunks per stage, got v={v}")
    if v == 1:
        return one_f_one_b(p, m)
    if m % p:
        raise ValueError(
            f"interleaved: m % p = {m} % {p} = {m % p}, must be 0: set m={-(-m // p) * p}"
        )
    place = [(k // (p * v) * p + k % p, k % (p * v) // p) for k in range(m * v)]
    forwards = [Op("F", microbatch, chunk) for microbatch, chunk in place]
    backwards = [Op("BW", microbatch, v - 1 - chunk) for microbatch, chunk in place]
    return [_alternate(forwards, backwards, 2 * (p - 1 - i) + (v - 1) * p) for i in range(p)]


def zb_h1(p: int, m: int) -> Order:
    """ZB-H1 (Qi et al. 2023, arXiv 2401.10241 §2.2): the memory of 1F1B, with W delayed into the
    bubble of the last backwards.

    The idle time is (p − 1)(T_F + T_B − T_W) for T_W ≤ min(T_F, T_B); a longer T_W hides no more
    than min(T_F, T_B)."""
    _check(p, m)
    return [_split(m, p - i, i) for i in range(p)]


def zb_h2(p: int, m: int) -> Order:
    """ZB-H2 (Qi et al. 2023, arXiv 2401.10241 §2.3): more warm-up, up to 2p − 1 activations, no
    bubble where F = B = W.

    The bubble (p − 1)(T_F + T_B − 2 T_W) is that of one stage, for m ≥ 2p − 1. Stages still start
    one F apart. The makespan, which counts in a step with a barrier, therefore has an idle time of
    at least (p − 1) T_F."""
    _check(p, m)
    return [_split(m, 2 * (p - i) - 1, 2 * i) for i in range(p)]


def tasks_of(
    order: Sequence[Sequence[Op]],
    forward: Any,
    input_grad: Any,
    weight_grad: Any,
    send: float = 0.0,
    activation: Any = 0.0,
    stash: Any = 0.0,
) -> PipelineSchedule:
    """Tasks of an order: F follows F of the virtual stage before, B follows F and B of the virtual
    stage after, W B.

    forward, input_grad, weight_grad: seconds, as a number, [p] per stage or [p, m] per stage and
    microbatch. BW takes the sum of its two. send: seconds of one message between devices, 0 for
    none; each direction of a pair is one link. activation: bytes held from F to its backward, a
    number or [p]; stash: the part that B leaves to W. A chunk has 1/v of all these except send.
    Tasks run on resources "0" … "p−1", which are also the devices of `peak_bytes`.

    Raises ValueError for other shapes, stash > activation, and a missing, repeated or unknown
    operation."""
    if send < 0:
        raise ValueError(f"send={send} s: must be ≥ 0")
    p = len(order)
    m, v = _extent(order)
    time = {
        "F": _per_op(forward, p, m),
        "B": _per_op(input_grad, p, m),
        "W": _per_op(weight_grad, p, m),
    }
    time["BW"] = time["B"] + time["W"]
    held, kept = (_per_op(x, p, 1)[:, 0] / v for x in (activation, stash))
    if (kept > held).any():
        raise ValueError(
            f"stash {stash} > activation {activation}: W can keep no more than F saved"
        )
    freed = {"F": 0 * held, "B": held - kept, "W": kept, "BW": held}
    done = {(op.kind, i, op.microbatch, op.chunk) for i, ops in enumerate(order) for op in ops}
    tasks: list[TimedTask] = []
    links: dict[tuple[int, int], str] = {}
    for i, ops in enumerate(order):
        for op in ops:
            here = (op.kind, i, op.microbatch, op.chunk)
            allocates = _on(i, held[i] if op.kind == "F" else 0.0)
            after = _inputs(here, done, p, v, send > 0)
            seconds = float(time[op.kind][i, op.microbatch]) / v
            tasks.append(
                TimedTask(here, str(i), seconds, after, allocates, _on(i, freed[op.kind][i]))
            )
            to = _receiver(here, p, v)
            if to is not None:
                links[i, to] = f"{i}>{to}"
                if send > 0:
                    tasks.append(TimedTask(("send", *here), links[i, to], 1.0, (here,)))
    resources = [Resource(str(i)) for i in range(p)]
    if send > 0:
        resources += [Resource(name, 0.0, send, link=True) for name in links.values()]
    return PipelineSchedule(tasks, resources, _neighbours(p, links, send > 0))


def _on(stage: int, amount: float) -> tuple[tuple[str, float], ...]:
    return ((str(stage), float(amount)),) if amount else ()


def _check(p: int, m: int) -> None:
    if p < 1 or m < 1:
        raise ValueError(f"a pipeline needs p ≥ 1 stages and m ≥ 1 microbatches, got p={p}, m={m}")


def _alternate(forwards: list[Op], backwards: list[Op], warm_up: int) -> list[Op]:
    """`warm_up` forwards, then one forward and one backward in turn, then the remaining
    backwards."""
    warm = min(warm_up, len(forwards))
    steady = [op for pair in zip(forwards[warm:], backwards, strict=False) for op in pair]
    return forwards[:warm] + steady + backwards[len(forwards) - warm :]


def _split(m: int, warm_up: int, delay: int) -> list[Op]:
    """Forwards of the warm-up. Then in turn B, W (once more than `delay` of them wait), and F. Then
    the remaining W."""
    f = min(warm_up, m)
    ops, w = [Op("F", k) for k in range(f)], 0
    for b in range(m):
        ops.append(Op("B", b))
        if b + 1 - w > delay:
            ops.append(Op("W", w))
            w += 1
        if f < m:
            ops.append(Op("F", f))
            f += 1
    return ops + [Op("W", k) for k in range(w, m)]


def _extent(order: Sequence[Sequence[Op]]) -> tuple[int, int]:
    """(m, v). Raises ValueError unless every stage runs F and either BW or B and W once for each
    microbatch and chunk."""
    if not order or not order[0]:
        raise ValueError("an order needs at least one stage and one operation")
    m = 1 + max(op.microbatch for op in order[0])
    v = 1 + max(op.chunk for op in order[0])
    want = sorted((k, c, part) for k in range(m) for c in range(v) for part in "BFW")
    for i, ops in enumerate(order):
        unknown = [op for op in ops if op.kind not in ("F", "B", "W", "BW")]
        if unknown:
            raise ValueError(f"stage {i}: unknown operation {unknown[0]}: kinds are F, B, W and BW")
        if sorted((op.microbatch, op.chunk, part) for op in ops for part in op.kind) != want:
            raise ValueError(
                f"stage {i} must run F, B and W once for each of m={m} microbatches and v={v} "
                "chunks"
            )
    return m, v


def _per_op(value: Any, p: int, m: int) -> np.ndarray:
    """Number, [p] or [p, m] → [p, m]."""
    x = np.asarray(value, dtype=float)
    if x.shape not in ((), (p,), (p, m)):
        raise ValueError(f"shape {x.shape}: give a number, [p] = [{p}] or [p, m] = [{p}, {m}]")
    return np.broadcast_to(x[:, None] if x.ndim == 1 else x, (p, m))


def _inputs(here: tuple, done: set, p: int, v: int, messages: bool) -> tuple:
    """What an operation waits for: the neighbour's operation or its message, and its own F or B."""
    kind, i, k, c = here

    def backward(stage: int, chunk: int) -> tuple:
        return ("BW" if ("BW", stage, k, chunk) in done else "B", stage, k, chunk)

    if kind == "W":
        return (("B", i, k, c),)
    own = () if kind == "F" else (("F", i, k, c),)
    virtual = c * p + i + (-1 if kind == "F" else 1)
    if not 0 <= virtual < p * v:
        return own
    stage, chunk = virtual % p, virtual // p
    source = ("F", stage, k, chunk) if kind == "F" else backward(stage, chunk)
    return (*own, ("send", *source) if messages and stage != i else source)


def _receiver(here: tuple, p: int, v: int) -> int | None:
    """The stage that needs the output of an operation; None where no other stage does."""
    kind, i, _, c = here
    virtual = c * p + i + (1 if kind == "F" else -1)
    if kind == "W" or not 0 <= virtual < p * v or virtual % p == i:
        return None
    return virtual % p


def _neighbours(p: int, links: dict[tuple[int, int], str], messages: bool) -> dict[str, list[str]]:
    """Stages that exchange messages, with the links between them: what a stage waits for in mode
    "neighbour"."""
    near: dict[str, list[str]] = {str(i): [] for i in range(p)}
    for (a, b), link in links.items():
        for one, other in ((a, b), (b, a)):
            near[str(one)] += [
                x for x in (str(other), *([link] if messages else [])) if x not in near[str(one)]
            ]
    return near
