"""The dispatch plan of a mixture of experts, as a value: what runs, and what it sends.

Legend: T tokens of a device, K pairs of a token, E experts, D width, S = ep devices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from fdp.collectives import pmax, psum, size, split
from fdp.count.counts import EXCHANGE, GATHER, REDUCE, SCATTER, Degrees, Ledger, Sent
from fdp.parallel.expert import exchange
from fdp.parallel.expert.arrange import ranks
from fdp.parallel.expert.exchange import Bounds, Ffn, Load, Moved, visits
from fdp.parallel.wire import Cast, Wire

Array = jax.Array
PLAIN = Cast()
PLANS = ("flat", "two_level", "gather")


@dataclass(frozen=True)
class Dispatch:
    """How rows reach the experts of other devices of ep.

    plan: one of PLANS (see `exchange`). inner: devices of a node, for two_level. capacity: 0 is
    dropless; otherwise an expert takes at most capacity·pairs/experts pairs of each device (flat).
    buffer: rows of the static buffers as a multiple of those of level loads; a step that needs more
    takes its tokens in rounds, so few at a time that any load fits, and is counted. 0: buffers for
    the worst case. wire: format of rows."""

    plan: str = "flat"
    inner: int = 1
    capacity: float = 0.0
    buffer: float = 0.0
    wire: Wire = PLAIN

    def check(self, experts: int, degrees: Mapping[str, int]) -> None:
        """Raises ValueError, with equation, values and fix, for degrees on which it cannot run."""
        ep = degrees["ep"]
        if self.plan not in PLANS:
            raise ValueError(f"dispatch plan {self.plan!r} is unknown: one of {', '.join(PLANS)}")
        if experts % ep:
            more = -(-experts // ep) * ep
            raise ValueError(
                f"{experts} experts are not divisible by ep = {ep}: set model.moe.experts={more} "
                "or another mesh.ep"
            )
        if self.capacity < 0 or (self.capacity and self.plan != "flat"):
            raise ValueError(
                f"capacity {self.capacity} with plan {self.plan}: only flat drops pairs, at a "
                "capacity above 0; 0 is dropless"
            )
        if self.plan == "two_level":
            if ep & (ep - 1):
                raise ValueError(
                    f"two_level needs ep to be a power of two, for its binary sub-axes: mesh.ep = "
                    f"{ep}; set model.moe.dispatch='flat' or mesh.ep={1 << ep.bit_length()}"
                )
            if self.inner < 1 or self.inner & (self.inner - 1):
                raise ValueError(
                    f"nodes of {self.inner} devices are no power of two, so they do not divide "
                    f"ep = {ep}: set model.moe.node={1 << self.inner.bit_length()}"
                )

    def __call__(self, x_TxD: Array, load: Load, ffn: Ffn) -> tuple[Array, Moved, Array]:
        """(Σ_k gates · expert(x) [T, D], what moved, 1 / devices if the buffers were too small)."""
        tight, worst = self.bounds(len(x_TxD), load, size("ep"))
        if tight == worst:
            return *self._run(worst, ffn, x_TxD, load), jnp.zeros(())
        fits = _needed(self, load, len(x_TxD)) <= jnp.array(tight)
        fits = pmax((~fits).any().astype(jnp.int32), "ep") == 0
        with jax.named_scope("fits"):  # `fdp.count` is told by this name which branch runs
            y_TxD, moved = jax.lax.cond(
                fits, partial(self._run, tight, ffn), partial(self._rounds, tight, ffn), x_TxD, load
            )
        return y_TxD, moved, (~fits).astype(jnp.float32) / size(("dp", "ep", "cp"))

    def bounds(self, tokens: int, load: Load, devices: int) -> tuple[Bounds, Bounds]:
        """(rows of the buffers, rows that always suffice) for T tokens of each of S devices."""
        T, S, K, e = tokens, devices, load.ids.shape[-1], load.experts // devices
        if S == 1:
            return (Bounds(0, 0, load.pairs),) * 2
        M, several = S // self.node(S), min(K, e)

        def level(rows: float) -> int:
            return math.ceil(self.buffer * rows) if self.buffer else T * S * K

        if self.capacity:
            return (Bounds(e * self.cut(load), 0, S * e * self.cut(load)),) * 2
        if self.plan == "flat":
            first = min(T * several, load.pairs, e * load.each)
            worst = Bounds(first, 0, S * first)
            first = min(first, level(load.pairs / S))
            return Bounds(first, 0, min(S * first, level(load.pairs))), worst
        pairs = S * min(T * several, load.pairs, e * load.each)
        if self.plan == "gather":
            return Bounds(0, 0, min(pairs, level(load.pairs))), Bounds(0, 0, pairs)
        worst = Bounds(T, M * T, pairs)
        first = min(T, level(load.pairs / M))
        second = min(M * first, level(load.pairs * M / S))
        return Bounds(first, second, min(pairs, level(load.pairs))), worst

    def node(self, devices: int) -> int:
        """G: devices of ep that form a node."""
        return min(self.inner, devices)

    def cut(self, load: Load) -> int:
        """Most pairs of a device that an expert takes; 0: all."""
        return math.ceil(self.capacity * load.pairs / load.experts)

    def _run(self, b: Bounds, ffn: Ffn, x_TxD: Array, load: Load) -> tuple[Array, Moved]:
        plan = self.plan if size("ep") > 1 else "flat"
        if plan == "two_level":
            return exchange.two_level(x_TxD, load, ffn, self.wire, b, self.node(size("ep")))
        if plan == "gather":
            return exchange.gather(x_TxD, load, ffn, b)
        return exchange.flat(x_TxD, load, ffn, self.wire, b, self.cut(load))

    def _rounds(self, tight: Bounds, ffn: Ffn, x_TxD: Array, load: Load) -> tuple[Array, Moved]:
        """As `_run`, for any load: equal parts of the tokens, one after the other, in buffers that
        suffice for the worst case of each. Nothing of a round is kept for the backward pass."""
        S, T = size("ep"), len(x_TxD)
        for n in (n for n in range(1, T + 1) if T % n == 0):
            part = load.part(T, n)
            need = self.bounds(T // n, part, S)[1]
            if n == T or all(rows <= most for rows, most in zip(need, tight, strict=True)):
                break

        def one(given: tuple[Array, Array, Array]) -> tuple[Array, Moved]:
            x, ids, gates = given
            return self._run(need, ffn, x, replace(part, ids=ids, gates=gates))

        cut = [a.reshape(n, T // n, -1) for a in (x_TxD, load.ids, load.gates)]
        y, moved = jax.lax.map(jax.checkpoint(one, prevent_cse=False), cut)
        return y.reshape(x_TxD.shape), jax.tree.map(lambda m: m.sum(0), moved)

    def sent(self, tokens: int, load: Load, row: tuple[int, int], degrees: Degrees) -> list[Sent]:
        """Wire bytes of a device, [forward, backward], of buffers that suffice. `row`: width and
        bytes of an element in compute. Only arrays of the loads' shapes are read."""
        there, back = Ledger(degrees), Ledger(degrees)
        S, K, T, ep = degrees["ep"], load.ids.shape[-1], tokens, ("ep",)
        if S == 1:
            return [{}, {}]
        (b, worst), row_bytes = self.bounds(T, load, S), self.wire.row_bytes(*row)
        if self.plan == "gather":
            x, gates = T * row[0] * row[1], 4 * T * K
            there.add(GATHER, ep, x + 2 * gates).add(SCATTER, ep, x)
            back.add(SCATTER, ep, x + gates).add(GATHER, ep, x)
        elif self.plan == "flat":
            there.add(EXCHANGE, ep, 2 * b.first * row_bytes + 4 * load.experts // S)
            back.add(EXCHANGE, ep, 2 * b.first * row_bytes)
        else:
            G = self.node(S)
            copies = (S // G - 1) * b.first + (G - 1) * b.second
            there.put(EXCHANGE, ep, copies * (2 * row_bytes + 8 * K))
            back.put(EXCHANGE, ep, copies * (2 * row_bytes + 4 * K))
        if b != worst:
            there.add(REDUCE, ep, 4 + 4 * (S if self.plan != "two_level" else 2 * S))
        return [there.sent, back.sent]


def _needed(plan: Dispatch, load: Load, tokens: int) -> Array:
    """Rows of the buffers that this step needs on the fullest device: int32 [3]."""
    S = size("ep")
    e = load.experts // S
    pairs_S = ranks(load.ids.reshape(-1) // e, S)[1]
    total = psum(pairs_S, "ep").max()
    none = jnp.zeros((), jnp.int32)
    if plan.plan == "gather":
        return jnp.stack([none, none, total])
    if plan.plan == "flat":
        return jnp.stack([pairs_S.max(), none, total])
    G = plan.node(S)
    outer, _ = split("ep", G)
    near_S = visits(load.ids, e, S).sum(0, dtype=jnp.int32)
    first = visits(load.ids, e * G, S // G).sum(0, dtype=jnp.int32).max()
    return jnp.stack([first, psum(near_S, outer).max(), total])
