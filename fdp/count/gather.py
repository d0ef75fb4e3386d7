"""Bytes of attention to lists of key blocks (fdp.parallel.context.gather, lists), in closed form.

All figures are wire bytes per device and attention layer, by collective, equal to
`fdp.count.jaxpr`. A unit is the keys and values of one device, as in fdp.count.context.

Legend: N = S/cp positions of a device, J = N/block its blocks, W = cp·J all blocks."""

from dataclasses import dataclass

from fdp.count import context
from fdp.count.context import LABEL, AttentionShape, Traffic, live
from fdp.count.counts import EXCHANGE, GATHER, REDUCE, SCATTER, merged
from fdp.parallel.context.plan import GATHER as GATHER_PLAN
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask


@dataclass(frozen=True)
class BlockGather:
    """The gather of one layer: blocks of `block` positions, `capacity` blocks between each pair of
    devices, `lists` of a query block on a device.

    lists is 1, times the sequences and times the key heads that have lists of their own. Raises
    ValueError for sizes that do not fit the shape."""

    shape: AttentionShape
    block: int
    capacity: int
    lists: int = 1

    def __post_init__(self) -> None:
        n, B, K = self.shape.seq_len // self.shape.cp, self.shape.batch, self.shape.kv_heads
        if self.shape.seq_len % self.shape.cp or self.block < 1 or n % self.block:
            raise ValueError(
                f"S/cp = {self.shape.seq_len}/{self.shape.cp} is no multiple of block = "
                f"{self.block}: use a divisor"
            )
        if not 0 <= self.capacity <= n // self.block:
            raise ValueError(
                f"capacity = {self.capacity} is not in 0 … S/cp/block = {n // self.block}"
            )
        if self.lists not in (1, B, K, B * K):
            raise ValueError(
                f"lists = {self.lists} is not 1, batch = {B}, kv_heads = {K} or their product "
                f"{B * K}"
            )

    @property
    def blocks(self) -> int:
        """J."""
        return self.shape.seq_len // self.shape.cp // self.block

    @property
    def fetched(self) -> float:
        """Bytes of keys and values that are sent: (cp-1)·capacity blocks, with padding."""
        return (self.shape.cp - 1) * self.capacity * self.shape.unit / self.blocks

    def forward_bytes(self, overflow: bool = False) -> Traffic:
        """Requests (int32) and blocks; with overflow all keys instead. Both paths add an all-reduce
        of one int32, which decides between them."""
        peers = self.shape.cp - 1
        out = {REDUCE: 2 * peers / self.shape.cp * LABEL}
        if self._overflows(overflow):
            out[GATHER] = peers * self.shape.unit
        else:
            out[EXCHANGE] = peers * self.capacity * self.lists * LABEL + self.fetched
        return live(out)

    def backward_bytes(self, overflow: bool = False) -> Traffic:
        """What the gradient adds: the gradients of the blocks, in the type of the keys. With
        overflow: the keys again, and the reduce-scatter of their gradients. Requests and decision
        are not repeated."""
        if self._overflows(overflow):
            dense = (self.shape.cp - 1) * self.shape.unit
            return live({GATHER: dense, SCATTER: dense})
        return live({EXCHANGE: self.fetched})

    def label_bytes(self, mask: Mask) -> Traffic:
        """On both paths: the gather of the block ids of each device, and of segments, int32."""
        segments = self.shape.batch * self.shape.seq_len // self.shape.cp if mask.packed else 0
        return live({GATHER: (self.shape.cp - 1) * LABEL * (self.blocks + segments)})

    def _overflows(self, overflow: bool) -> bool:
        if overflow and self.capacity == self.blocks:
            raise ValueError(
                f"capacity = {self.capacity} = S/cp/block holds all blocks of a device: nothing "
                "overflows"
            )
        return overflow


def listed_bytes(
    plan: CommPlan, gather: BlockGather, width: int, mask: Mask
) -> tuple[Traffic, Traffic]:
    """(forward, backward) of `lists.attend_blocks` by any of its plans, labels included,
    without overflow.

    `gather`: shape, block and lists; its capacity counts for a gather only. width: of a list.
    """
    if plan.kind == GATHER_PLAN:
        return merged(gather.forward_bytes(), gather.label_bytes(mask)), gather.backward_bytes()
    shape, peers = gather.shape, gather.shape.cp - 1
    lists = peers * LABEL * gather.blocks * width * gather.lists if plan.kind == "ulysses" else 0.0
    labels = {
        GATHER: lists + peers * LABEL * shape.seq_len / shape.cp,
        REDUCE: 2 * peers / shape.cp * LABEL,
    }
    forward = merged(context.forward_bytes(plan, shape, mask), gather.label_bytes(mask), labels)
    return forward, context.backward_bytes(plan, shape, mask)
