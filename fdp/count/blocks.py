"""Key blocks that the devices of cp need from one another, exactly, without the padding of static
shapes.

Legend: J lists of a layer (1, or one a key head), W blocks of the sequence, D devices = cp, R
groups = cp/u of u neighbours, O ring offsets 0 … R-1."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fdp.parallel.context import layouts
from fdp.parallel.context.layouts import SequenceLayout


@dataclass(frozen=True, eq=False)
class BlockCounts:
    """Of one layer in one layout: `seen_JxDxW`, block pairs of each device with each key block;
    owner of each block.
    """

    seen_JxDxW: np.ndarray
    owner_W: np.ndarray
    _grouped: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    _hops: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, mask_JxWxW: np.ndarray, owner_W: np.ndarray, cp: int) -> "BlockCounts":
        """From masks bool [J, W, W], rows query blocks, where device owner_W[w] holds block w."""
        J, W, _ = mask_JxWxW.shape
        mine_JxDxRxW = mask_JxWxW[:, np.argsort(owner_W, kind="stable")].reshape(J, cp, W // cp, W)
        return cls(mine_JxDxRxW.sum(2, dtype=np.float32), owner_W)  # exact below 2^24 pairs

    @classmethod
    def laid_out(
        cls, masks: np.ndarray, layout: SequenceLayout, cp: int, block: int
    ) -> "BlockCounts":
        """From masks bool [W, W] or [J, W, W] of blocks of `block` positions. Raises ValueError
        for a layout that divides a block."""
        W = masks.shape[-1]
        return cls.of(masks.reshape(-1, W, W), layouts.owners(layout, W, block, cp), cp)

    def grouped(self, u: int) -> tuple[np.ndarray, np.ndarray]:
        """(pairs, needed) int [J, R, O]: block pairs of a group of u devices with the keys of the
        group O places before it, and how many of that group's blocks it needs."""
        if u not in self._grouped:
            J, cp, W = self.seen_JxDxW.shape
            R = cp // u
            seen_JxRxW = self.seen_JxDxW.reshape(J, R, u, W).sum(2)
            held_WxR = (self.owner_W[:, None] // u == np.arange(R)).astype(np.float32)
            group = np.arange(R)
            at = group[:, None], (group[:, None] - group) % R
            both = [
                (x @ held_WxR)[:, at[0], at[1]]
                for x in (seen_JxRxW, (seen_JxRxW > 0).astype(np.float32))
            ]
            self._grouped[u] = (both[0].astype(np.int64), both[1].astype(np.int64))
        return self._grouped[u]

    @property
    def remote_JxDxO(self) -> np.ndarray:
        """Blocks that each device needs from each other one, by offset 1 … cp-1."""
        return self.grouped(1)[1][:, :, 1:]

    @cached_property
    def capacity(self) -> int:
        """The most blocks that any pair of devices exchanges: the exact static size of a gather."""
        return int(self.remote_JxDxO.max(initial=0))

    @property
    def units_DxD(self) -> np.ndarray:
        """Share of device s's blocks that device d needs, for any list, at [d, s]."""
        _, cp, W = self.seen_JxDxW.shape
        held_WxD = (self.owner_W[:, None] == np.arange(cp)).astype(float)
        return self.seen_JxDxW.any(0) @ held_WxD * cp / W

    @property
    def imbalance(self) -> float:
        """Block pairs of the busiest device over the mean: the loss if devices wait once, at the
        end."""
        work_D = self.seen_JxDxW.sum((0, 2), dtype=float)
        return float(work_D.max() / work_D.mean())

    def hops(self, u: int) -> tuple[int, ...]:
        """Ring offsets that any group of u devices needs."""
        if u not in self._hops:
            needed_O = self.grouped(u)[1].any((0, 1))
            self._hops[u] = tuple(int(o) for o in np.flatnonzero(needed_O) if o > 0)
        return self._hops[u]
