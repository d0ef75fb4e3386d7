"""Costs of a context-parallel plan in closed form: bytes, dependent steps and balance.

    python -m fdp.count.context --seq 131072 --heads 32 --kv_heads 8 --head_dim 128 --cp 8 \\
        --mask causal [--window 4096]

All figures are per device, attention layer and microbatch; heads are those of one tp shard. Wire
bytes follow fdp.count.hlo, and tests hold them equal to the compiled program. A unit is the keys
and values of one device, 2·B·N·K·C·bytes. A plan has head_split u and rings of r = cp/u devices.

Legend: B sequences on a device, S positions, N = S/cp, H query heads, K key/value heads, C
head_dim."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tabulate import tabulate

from fdp.count.counts import EXCHANGE, GATHER, PERMUTE, REDUCE, SCATTER
from fdp.models.shape import ModelShape
from fdp.parallel.context import cache, layouts
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import CommPlan, check, needed_hops
from fdp.parallel.masks import Mask

Traffic = dict[str, float]  # HLO op → wire bytes sent per device

# bytes: gradients of keys travel round the ring, and partial results to their merge, in float32
ACCUMULATOR = 4
LABEL = 4  # bytes: positions and segment ids are int32


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer on one device: `batch` local sequences, `seq_len` global positions, heads
    of one tp shard, `itemsize` bytes of an activation."""

    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    cp: int
    itemsize: int = 2

    @classmethod
    def of(cls, m: ModelShape, batch: int, seq_len: int, cp: int, tp: int = 1) -> "AttentionShape":
        """The attention of one layer of the model, on one device of tp and cp."""
        heads = m.heads // tp, m.kv_heads // tp
        return cls(batch, seq_len, *heads, m.head_dim, cp, m.itemsize)

    @property
    def unit(self) -> float:
        """Bytes of one device's keys and values."""
        return (
            2 * self.batch * self.seq_len // self.cp * self.kv_heads * self.head_dim * self.itemsize
        )

    def check(self, plan: CommPlan, mask: Mask) -> None:
        """Raises ValueError for a plan that this layer cannot run."""
        sizes = {
            "seq_len": self.seq_len,
            "cp": self.cp,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
        }
        check(plan, mask, **sizes, batch=self.batch)


def hop_count(plan: CommPlan, cp: int) -> int:
    """Ring hops of keys that the plan makes in one forward pass."""
    return plan.ring_degree(cp) - 1 if plan.hops is None else len(plan.hops)


def repetition(plan: CommPlan, kv_heads: int) -> int:
    """rho: how often each key head is repeated so that every device of a head split holds one."""
    return max(1, plan.head_split // kv_heads) if plan.kind in ("ulysses", "usp") else 1


def forward_bytes(plan: CommPlan, shape: AttentionShape, mask: Mask) -> Traffic:
    """Wire bytes of `fdp.parallel.context.attend`, forward, by collective, without `label_bytes`.

    Ring (r-1)·rho units, a hop of a causal window less (`CommPlan.tails`); all-gather cp-1; head
    split (u-1)/u·(G+rho), batch split (u-1)/u·(G+1), with G = H/K. Raises ValueError for a refused
    plan."""
    shape.check(plan, mask)
    rho = repetition(plan, shape.kv_heads)
    out = {GATHER: (shape.cp - 1) * shape.unit if plan.kind == "all_gather" else 0.0}
    out[EXCHANGE] = _exchanged(plan, shape)
    out[PERMUTE] = _fetched(plan, shape, mask) * rho * shape.unit
    return live(out)


def label_bytes(shape: AttentionShape, mask: Mask) -> Traffic:
    """Wire bytes of the gather of positions and segment ids, int32, which every plan makes if the
    mask reads them.

    Labels are the same in all layers: a differentiated scan over layers gathers them once, any
    other loop in every iteration."""
    n = shape.seq_len // shape.cp
    return live(
        {
            GATHER: (shape.cp - 1)
            * LABEL
            * n
            * (int(mask.orders) + (shape.batch if mask.packed else 0))
        }
    )


def backward_bytes(plan: CommPlan, shape: AttentionShape, mask: Mask) -> Traffic:
    """Wire bytes that the gradient adds to `forward_bytes` (without rematerialisation), by
    collective.

    A ring sends keys again, and their gradients in float32; gathers and exchanges are transposed.
    """
    shape.check(plan, mask)
    rho = repetition(plan, shape.kv_heads)
    unit_and_gradient = shape.unit * (1 + ACCUMULATOR / shape.itemsize)
    out = {SCATTER: (shape.cp - 1) * shape.unit if plan.kind == "all_gather" else 0.0}
    out[EXCHANGE] = _exchanged(plan, shape)
    out[PERMUTE] = _fetched(plan, shape, mask) * rho * unit_and_gradient
    return live(out)


def _fetched(plan: CommPlan, shape: AttentionShape, mask: Mask) -> float:
    """Keys that a ring fetches, in those of a member: its hops, or the parts of them that a window
    reaches."""
    hops, r = hop_count(plan, shape.cp), plan.ring_degree(shape.cp)
    if plan.hops is None or hops == r - 1:
        return hops
    length = shape.seq_len // r
    return sum(plan.tails(mask, length)) / length


def _exchanged(plan: CommPlan, shape: AttentionShape) -> float:
    """Queries, keys, values and outputs in the all-to-alls of a head or batch split, for one
    direction of the pass."""
    u, group = plan.head_split, shape.heads // shape.kv_heads
    return (u - 1) / u * (group + repetition(plan, shape.kv_heads)) * shape.unit


def decode_bytes(kind: str, batch: int, tokens: int, heads: int, head_dim: int, cp: int) -> Traffic:
    """Wire bytes of one `fdp.parallel.context.attend.decode` merge of float32 partial results, by
    collective.
    """
    rows = ACCUMULATOR * batch * tokens * heads
    if kind == "helix":
        return live({EXCHANGE: (cp - 1) / cp * rows * (head_dim + 1)})
    return live({REDUCE: 2 * (cp - 1) / cp * rows * (1 + head_dim + 1)})


def deal_bytes(layout: SequenceLayout, shape: AttentionShape) -> Traffic:
    """Wire bytes of dealing the keys and values of a pass in `layout` to a cache over cp, by
    collective: (cp - 1)·P·2·B·K·C·bytes, where at most P positions go from one device to another.

    Where cp divides a run of neighbours (contiguous: N, zig-zag: N/2, striped: its block), P = N/cp
    and these are (cp - 1)/cp units. Nothing moves from the layout of the cache."""
    N, cp = shape.seq_len // shape.cp, shape.cp
    if cp == 1 or layout == cache.ROUND_ROBIN:
        return {}
    most = cache.routes(layout, N, cp).leave.shape[2]
    return live({EXCHANGE: (cp - 1) * most * shape.unit / N})


def live(traffic: Traffic) -> Traffic:
    """Without the collectives that send nothing."""
    return {op: float(wire) for op, wire in traffic.items() if wire}


def steps(plan: CommPlan, cp: int) -> tuple[int, int]:
    """Collectives that wait for one another, (forward, backward). The gather of positions is not
    counted: it can overlap with any of them."""
    if plan.kind == "all_gather":
        return 1, 1
    exchanges = 2 if plan.head_split > 1 else 0
    if plan.hops is not None:  # fetched independently of one another, gradients sent straight home
        return exchanges + min(1, len(plan.hops)), exchanges + 2 * min(1, len(plan.hops))
    hops = plan.ring_degree(cp) - 1
    return exchanges + hops, exchanges + (hops + 1 if hops else 0)


def balance(
    mask: Mask, layout: SequenceLayout, seq_len: int, cp: int, head_split: int = 1
) -> float:
    """Work of the busiest device over the mean, counting the query-key pairs that the mask allows;
    1 is perfect.

    The head_split devices (neighbours) share the heads or sequences of all their positions, so they
    have equal work. Raises ValueError for a packed mask: its pairs depend on the documents, see
    `fdp.count.blocks`."""
    if mask.packed or mask.rule is not None:
        raise ValueError(
            "the balance of a packed mask depends on its documents, and that of a rule on the "
            "rule: use fdp.count.blocks.BlockCounts of its block mask"
        )
    position = layouts.permutation(layout, seq_len, cp).astype(np.int64)
    reach = mask.window - 1 if mask.window else seq_len
    before = np.minimum(position, reach)
    after = np.minimum(seq_len - 1 - position, reach) if mask.kind == "bidirectional" else 0
    work = (1 + before + after).reshape(cp // head_split, -1).sum(1)
    return float(work.max() / work.mean())


# The command
# -------------------------------------------------------------------------------------------------


def plans(cp: int) -> list[CommPlan]:
    """Every kind of plan with every split of cp (powers of two), contiguous."""
    splits = [2**i for i in range(1, cp.bit_length()) if cp % 2**i == 0]
    rows = [CommPlan("ring"), CommPlan("all_gather"), CommPlan("ulysses", cp)]
    rows += [CommPlan("usp", u) for u in splits if u < cp]
    return rows + [CommPlan("batch", u) for u in splits]


def table(shape: AttentionShape, mask: Mask, stripe: int) -> str:
    """Bytes, steps and balance of every plan and layout, for the terminal; refused ones with the
    reason."""
    rows: list[tuple[str, ...]] = []
    refused: dict[str, list[str]] = {}
    for layout in (
        SequenceLayout("contiguous"),
        SequenceLayout("zigzag"),
        SequenceLayout("striped", stripe),
    ):
        for plan in (replace(p, layout=layout) for p in plans(shape.cp)):
            try:
                shape.check(plan, mask)
            except ValueError as error:
                refused.setdefault(str(error), []).append(
                    f"{plan.kind} u={plan.head_split} {layout.kind}"
                )
                continue
            rows.append(_row(_with_hops(plan, mask, shape), mask, shape))
    if not rows:
        raise ValueError("; ".join(refused))
    headers = (
        "plan",
        "layout",
        "hops",
        "fwd units",
        "fwd MB",
        "bwd MB",
        "steps fwd+bwd",
        "max/mean FLOPs",
    )
    text = tabulate(
        rows, headers, colalign=("left", "left", "left", *("right",) * 5), disable_numparse=True
    )
    return text + "".join(
        f"\nrefused ({', '.join(names)}): {error}" for error, names in refused.items()
    )


def _with_hops(plan: CommPlan, mask: Mask, shape: AttentionShape) -> CommPlan:
    r = plan.ring_degree(shape.cp)
    if r == 1:
        return plan
    hops = needed_hops(mask, plan.layout, shape.seq_len, shape.cp, plan.head_split)
    return replace(plan, hops=hops) if len(hops) < r - 1 else plan


def _row(plan: CommPlan, mask: Mask, shape: AttentionShape) -> tuple[str, ...]:
    forward, backward = (
        sum(f(plan, shape, mask).values()) for f in (forward_bytes, backward_bytes)
    )
    name = f"{plan.kind} u={plan.head_split}" if plan.head_split > 1 else plan.kind
    hops = "all" if plan.hops is None else ",".join(map(str, plan.hops)) or "none"
    even = balance(mask, plan.layout, shape.seq_len, shape.cp, plan.head_split)
    before, after = steps(plan, shape.cp)

    def mega(wire: float) -> str:
        return f"{wire / 1e6:,.1f}"

    units = f"{forward / shape.unit:.3f}"
    return (
        name,
        plan.layout.kind,
        hops,
        units,
        mega(forward),
        mega(backward),
        f"{before}+{after}",
        f"{even:.2f}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of one attention layer; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fdp.count.context", description=__doc__.splitlines()[0])
    for name in ("seq", "heads", "kv_heads", "head_dim", "cp"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--mask", choices=("causal", "bidirectional"), default="causal")
    parser.add_argument("--window", type=int, default=0, help="positions; 0 = no limit")
    parser.add_argument("--batch", type=int, default=1, help="sequences on a device")
    parser.add_argument(
        "--itemsize", type=int, default=2, help="bytes of an activation: 2 bfloat16, 4 float32"
    )
    parser.add_argument("--stripe", type=int, default=64, help="block of the striped layout")
    a = parser.parse_args(argv)
    try:
        shape = AttentionShape(a.batch, a.seq, a.heads, a.kv_heads, a.head_dim, a.cp, a.itemsize)
        mask = Mask(a.mask, a.window)
        unit = f"unit = {shape.unit / 1e6:,.1f} MB, the keys and values of one device"
        labels = sum(label_bytes(shape, mask).values()) / 1e6
        more = f"positions: {labels:,.1f} MB more, once a model or once a layer"
        print(f"one layer on one device, {a.mask} mask, window {a.window or 'none'}; {unit}")
        print(table(shape, mask, a.stripe), more, sep="\n")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
