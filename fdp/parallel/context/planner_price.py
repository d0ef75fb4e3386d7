"""What one attention layer costs under one communication plan, given the key blocks that its
queries really attend to.

Every plan computes exactly the blocks of the mask, whole, whatever it sends: saved compute is never
counted as saved communication. Bytes and dependent steps of the plans that send all keys are those
of fdp.count.context.

The gather of blocks (kind `gather`, capacity c): a device asks every peer for the blocks that any
of its queries needs, and each pair of devices exchanges c blocks, the most that any pair needs
(rounded up to a grid by the planner). It is fdp.parallel.context.gather: forward an all-reduce of
the overflow count, an all-to-all of int32 ids and one of keys and values; backward one of their
gradients, in the type of the keys. What was gathered is kept for the backward pass, as by an
all-gather.

Time: fdp.parallel.context.planner_time.

Legend: J lists of a layer (1, or one a key head), D devices = cp, R groups = cp/u of u neighbours,
O ring offsets 0 … R-1, N draws of an uncertain network (draw 0 is nominal)."""

from dataclasses import dataclass, replace

import numpy as np

from fdp.count import context as cost
from fdp.count.blocks import BlockCounts
from fdp.count.context import ACCUMULATOR, AttentionShape
from fdp.count.counts import EXCHANGE, GATHER, PERMUTE, REDUCE, SCATTER
from fdp.count.gather import BlockGather
from fdp.parallel.context import planner_time as timing
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner_time import Machine
from fdp.parallel.masks import Mask

BLOCKS = "gather"  # CommPlan.kind; capacity: key blocks that each pair of devices exchanges
ANY = Mask("bidirectional")  # formulas of plans that send all keys do not depend on the mask
FORWARD, BACKWARD = (
    4,
    10,
)  # FLOPs a query-key pair and element of a head: two matmuls, and five that recompute scores


class Refused(ValueError):
    """This layer cannot run the plan, or not exactly, or not within the limits."""


@dataclass(frozen=True, eq=False)
class Price:
    """Of one layer: wire bytes per device, dependent collectives and seconds [N] by (forward,
    backward); `compute_N` seconds of the busiest device without any wait; `imbalance` max/mean
    FLOPs; `memory` bytes of keys, values, their gradients and exchanged queries beside the resident
    ones."""

    bytes: tuple[float, float]
    steps: tuple[int, int]
    forward_N: np.ndarray
    backward_N: np.ndarray
    compute_N: np.ndarray
    imbalance: float
    memory: float

    @property
    def total_N(self) -> np.ndarray:
        """Seconds [N], forward and backward."""
        return self.forward_N + self.backward_N

    @property
    def seconds(self) -> float:
        """Nominal seconds, forward and backward."""
        return float(self.total_N[0])

    @property
    def exposed(self) -> float:
        """Nominal seconds that the busiest device waits."""
        return float(self.total_N[0] - self.compute_N[0])

    @property
    def wire(self) -> float:
        """Bytes, forward and backward."""
        return sum(self.bytes)


def price(
    counts: BlockCounts, plan: CommPlan, shape: AttentionShape, block: int, machine: Machine
) -> Price:
    """Price of a plan for a layer; `counts` must be of the plan's layout. Raises Refused when it is
    not exact.
    """
    check(counts, plan, shape)
    work_DxO = work(counts, plan, shape, block)
    forward_DxOxN = work_DxO[..., None] / np.atleast_1d(machine.flops)
    passes = forward_DxOxN, forward_DxOxN * BACKWARD / FORWARD
    if plan.kind == BLOCKS:
        layer = BlockGather(shape, block, plan.capacity, len(counts.seen_JxDxW))
        traffic = layer.forward_bytes(), layer.backward_bytes()
        wire, steps = (sum(traffic[0].values()), sum(traffic[1].values())), (3, 1)
        ids = traffic[0].get(EXCHANGE, 0.0) - layer.fetched
        keys = machine.send(EXCHANGE, layer.fetched, shape.cp)
        there = machine.send(REDUCE, traffic[0][REDUCE], shape.cp)  # whether some list overflows
        there = there + machine.send(EXCHANGE, ids, shape.cp) + keys
        forward, backward = timing.gathered(*passes, there, keys)
    else:
        traffic, steps = dense_traffic(plan, shape), cost.steps(plan, shape.cp)
        wire = sum(traffic[0].values()), sum(traffic[1].values())
        forward, backward = _dense_seconds(plan, *passes, traffic, shape, machine)
    total_D = work_DxO.sum(1)
    compute_N = total_D.max() * (1 + BACKWARD / FORWARD) / np.atleast_1d(machine.flops)
    held = memory(plan, shape, block)
    return Price(
        wire, steps, forward, backward, compute_N, float(total_D.max() / total_D.mean()), held
    )


def check(counts: BlockCounts, plan: CommPlan, shape: AttentionShape) -> None:
    """Raises Refused for a plan that these heads and sequences cannot run, or that leaves out
    needed keys.
    """
    if plan.kind == BLOCKS:
        if plan.head_split != 1 or plan.hops is not None:
            raise Refused(f"a gather of blocks splits no heads and has no hops: {plan}")
        if counts.capacity > plan.capacity:
            raise Refused(
                f"a pair of devices exchanges {counts.capacity} blocks, more than capacity "
                f"{plan.capacity}"
            )
        return
    try:
        shape.check(replace(plan, hops=None), ANY)
    except ValueError as error:
        raise Refused(str(error)) from error
    if plan.hops is not None and (
        missing := sorted(set(counts.hops(plan.head_split)) - set(plan.hops))
    ):
        raise Refused(f"hops {plan.hops} miss needed offsets {missing}")


def work(counts: BlockCounts, plan: CommPlan, shape: AttentionShape, block: int) -> np.ndarray:
    """Forward FLOPs of each device by ring offset, [D, O]; blocks are computed whole."""
    u, J = plan.head_split, len(counts.seen_JxDxW)
    pairs_JxRxO = counts.grouped(u)[0].astype(float)
    each = FORWARD * block**2 * shape.head_dim * shape.batch
    if plan.kind == "batch":
        heads_UxJ = np.full((u, J), shape.heads / J / u)  # all heads of 1/u of the sequences
    else:  # member m computes query heads [m·H/u, (m+1)·H/u), head h by list h // (H/J)
        heads_UxJ = np.zeros((u, J))
        head_H = np.arange(shape.heads)
        np.add.at(heads_UxJ, (head_H // (shape.heads // u), head_H // (shape.heads // J)), 1.0)
    return each * np.einsum("uj,jro->ruo", heads_UxJ, pairs_JxRxO).reshape(shape.cp, -1)


def dense_traffic(plan: CommPlan, shape: AttentionShape) -> tuple[cost.Traffic, cost.Traffic]:
    """(forward, backward) wire bytes by collective of a plan that sends all keys, or all keys of
    its hops.
    """
    whole = replace(plan, hops=None)
    forward, backward = (
        cost.forward_bytes(whole, shape, ANY),
        cost.backward_bytes(whole, shape, ANY),
    )
    if plan.hops is not None and PERMUTE in forward:
        share = len(plan.hops) / (plan.ring_degree(shape.cp) - 1)
        forward, backward = (t | {PERMUTE: share * t[PERMUTE]} for t in (forward, backward))
    return forward, backward


def block_bytes(shape: AttentionShape, block: int) -> float:
    """Bytes of the keys and values of one block of positions, all sequences and heads."""
    return shape.unit * block / (shape.seq_len // shape.cp)


def memory(plan: CommPlan, shape: AttentionShape, block: int) -> float:
    """Bytes that a plan holds at once in a layer, see `Price`; gathers hold theirs from forward to
    backward pass.
    """
    if plan.kind == BLOCKS:
        return 2 * BlockGather(shape, block, plan.capacity).fetched
    if plan.kind == "all_gather":
        return 2 * (shape.cp - 1) * shape.unit
    rho, with_gradient = cost.repetition(plan, shape.kv_heads), 1 + ACCUMULATOR / shape.itemsize
    ring = (
        2 * rho * shape.unit * with_gradient
        if plan.ring_degree(shape.cp) > 1 and plan.hops != ()
        else 0.0
    )
    # Queries, output, keys and values of the exchange, and the gradients of all.
    return ring + (
        2 * (shape.heads // shape.kv_heads + rho) * shape.unit if plan.head_split > 1 else 0.0
    )


# Time
# -------------------------------------------------------------------------------------------------


def _dense_seconds(
    plan: CommPlan,
    forward_DxOxN: np.ndarray,
    backward_DxOxN: np.ndarray,
    traffic: tuple[cost.Traffic, cost.Traffic],
    shape: AttentionShape,
    machine: Machine,
) -> tuple[np.ndarray, np.ndarray]:
    """(forward, backward) seconds [N] of the plans of fdp.parallel.context.attend."""
    if plan.kind == "all_gather":
        there, back = (
            machine.send(op, t[op], shape.cp)
            for op, t in zip((GATHER, SCATTER), traffic, strict=True)
        )
        return timing.gathered(forward_DxOxN, backward_DxOxN, there, back)
    u, r = plan.head_split, plan.ring_degree(shape.cp)
    rho, group = cost.repetition(plan, shape.kv_heads), shape.heads // shape.kv_heads
    share = (u - 1) / u * shape.unit
    # Queries, keys and values before attention, outputs after it.
    exchange = machine.send(EXCHANGE, share * (group / 2 + rho), u) + machine.send(
        EXCHANGE, share * group / 2, u
    )
    kv = machine.send(PERMUTE, rho * shape.unit, r, u)
    gradient = machine.send(PERMUTE, rho * shape.unit * ACCUMULATOR / shape.itemsize, r, u)
    if plan.hops is not None and len(plan.hops) < r - 1:  # a full set turns as the whole ring does
        forward, backward = timing.fetched(plan.hops, forward_DxOxN, backward_DxOxN, kv, gradient)
    else:
        forward, backward = timing.lock_step(forward_DxOxN, backward_DxOxN, kv, gradient)
    return forward + exchange, backward + exchange
