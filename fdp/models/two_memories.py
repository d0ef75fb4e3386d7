"""Two memories in one layer (after TNT, arXiv 2511.07343): one that learns from large chunks, and a
near one that learns from small mini-batches and begins anew every few tokens.

The first cannot see what stands in its own chunk; the near one can, and no segment of it waits for
another: they run side by side, and over cp a device reads its own. Both read the same queries, keys
and values, and what they read is added.

Legend: B sequences, L positions (local over cp), R positions of a segment of the near memory, H
heads (local over tp), K head dim."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from fdp.collectives import size, vary
from fdp.count.counts import Counts, Degrees, Rows
from fdp.mesh import BATCH_AXES
from fdp.models import fast_linear, fast_rows
from fdp.models.attention import Where
from fdp.models.conv import runs
from fdp.models.lact import LaCT
from fdp.models.recurrent import bytes_of
from fdp.models.ttt import linear_memory, linear_weights, linear_work, no_linear_memory

Array = jax.Array
NEAR = "near_memory"  # of the cache


class TwoMemories(LaCT):
    """LaCT, and beside it TTT-Linear in mini-batches of `near`, with its first weights again at
    every `reset`-th position. Raises ValueError for segments that lie on several devices."""

    near: int = 4
    reset: int = 16

    @property
    def _near_widths(self) -> tuple[int, int]:
        return self.shape.head_dim, self.shape.head_dim

    def mix(self, q: Array, k: Array, v: Array, x_BxLxD: Array, where: Where) -> Array:
        far = super().mix(q, k, v, x_BxLxD, where)
        first, norm = linear_weights(self, "near", self._near_widths)
        rates = jax.nn.sigmoid(self.head_scalars("w_near", x_BxLxD, 1)[..., 0])
        before = linear_memory(first, q)
        recalled = self.recalled(lambda: before, where, NEAR)
        if recalled is not None:
            self._check_batches()
            tokens, again = (q, k, v, rates), (self.reset, before)
            read, memory = fast_rows.linear_rows(tokens, *recalled, self.near, norm, again)
            self.cache(NEAR, memory)
            return far + read.astype(far.dtype)
        B, L = rates.shape[:2]
        self._check_reset(L * size("cp"), size("cp"))

        def cut(x_BxL: Array) -> Array:  # every segment is a sequence
            return x_BxL.reshape(B * L // self.reset, self.reset, *x_BxL.shape[2:])

        segment = None if where.segment is None else cut(where.segment)
        q, k, v, rates = map(cut, (q, k, v, rates))
        read, _ = fast_linear.linear_scan(q, k, v, rates, first, norm, self.near, segment)
        return far + read.reshape(far.shape).astype(far.dtype)

    def state_bytes(self) -> int:
        """As of LaCT, and of the near memory's map and bias."""
        near = bytes_of(lambda: no_linear_memory(self.shape, self._near_widths, 1)[0].start)
        return super().state_bytes() + near

    def decode_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """As of LaCT, and the map and bias of the near memory, twice."""
        state, shards = super().decode_state(batch, length)
        near, specs = no_linear_memory(self.shape, self._near_widths, batch)
        axes = (*BATCH_AXES, "tp")
        return state | {NEAR: vary(near, axes)}, shards | {NEAR: specs}

    def work(self, rows: Rows, degrees: Degrees) -> Counts:
        """Those of LaCT; of the near memory, those of TTT-Linear, which sends nothing."""
        cut = replace(rows, batch=rows.batch * rows.length // self.reset, length=self.reset)
        near = linear_work(self.shape, self._near_widths, self.near, cut, degrees)
        return super().work(rows, degrees) + near + self.scalars(1, rows)

    def check(self, batch: int, length: int, degrees: Mapping[str, int]) -> None:
        """As of LaCT. Raises ValueError for segments that lie on several devices, and for a LaCT
        that is not causal, too."""
        if not self.causal:
            raise ValueError(
                "TwoMemories with causal=False: its near memory reads the past alone; set "
                "causal=True, or train LaCT"
            )
        super().check(batch, length, degrees)
        self._check_reset(length, degrees["cp"])

    def _check_batches(self) -> None:
        if self.reset % self.near:
            raise ValueError(
                f"a segment of {self.reset} tokens is not divisible by mini-batches of "
                f"{self.near}: set reset={-(-self.reset // self.near) * self.near}"
            )

    def _check_reset(self, length: int, cp: int) -> None:
        self._check_batches()
        _, held = runs(self.plan.layout, length // cp, cp)
        if held % self.reset:
            fits = [r for r in range(self.near, held + 1, self.near) if held % r == 0]
            fix = f"set reset={fits[-1]}" if fits else "lower mesh.cp"
            raise ValueError(
                f"the near memory begins anew every {self.reset} tokens, and a device holds "
                f"{held} neighbours of {length} tokens on cp = {cp} ({self.plan.layout.kind}): "
                f"{fix}, or use the contiguous layout"
            )
