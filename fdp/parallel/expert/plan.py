"""The dispatch plan of a mixture of experts, as a value: what runs, and what it sends.

Legend: T tokens of a device, K pairs of a token, E experts, D width, S = ep devices."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from fdp.collectives import pmax, psum, size, split
from fdp.count.counts import EXCHANGE, GATHER, RAGGED, REDUCE, SCATTER, Degrees, Ledger, Sent
from fdp.kernels_pallas.grouped import buffer_rows, choose_block
from fdp.parallel.expert import exchange
from fdp.parallel.expert.arrange import ranks
from fdp.parallel.expert.exchange import Bounds, Ffn, Load, Moved, visits
from fdp.parallel.wire import Cast, Wire, ragged

Array = jax.Array
Beside = Callable[[Array], Array]  # [T, D] → [T, D]
PLAIN = Cast()
PLANS = ("flat", "two_level", "gather")
OFFSETS = 4  # two moves, whose gradients exchange the offsets of both ends


@dataclass(frozen=True)
class Dispatch:
    """How rows reach the experts of other devices of ep.

    plan: one of PLANS (see `exchange`). inner: devices of a node, for two_level. capacity: 0 is
    dropless; otherwise an expert takes at most capacity·pairs/experts pairs of each device (flat),
    and `buffer` is not read. buffer: rows of the static buffers as a multiple of those of level
    loads; a step that needs more takes its tokens in rounds, so few at a time that any load fits,
    and is counted. 0: buffers for the worst case. wire: format of rows."""

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
        if self.plan == "gather" and self.wire != PLAIN:
            raise ValueError(
                f"plan gather sends rows in the type of compute, not by {self.wire}: set "
                "model.moe.wire='same'"
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
                    f"ep = {ep}: set model.moe.node={min(1 << self.inner.bit_length(), ep)}"
                )

    def __call__(
        self, x_TxD: Array, load: Load, ffn: Ffn, beside: Beside | None = None
    ) -> tuple[Array, Moved, Array]:
        """(Σ_k gates · expert(x) [T, D], what moved, 1 / devices if the buffers were too small).

        beside: what else is added to the result, of every token alone. It is computed where the
        rows are exchanged, so that a compiler may do both at once."""

        def all_of(run: Callable, b: Bounds, x_TxD: Array, load: Load) -> tuple[Array, Moved]:
            y_TxD, moved = run(b, ffn, x_TxD, load)
            return (y_TxD if beside is None else y_TxD + beside(x_TxD)), moved

        tight, worst = self.bounds(len(x_TxD), load, size("ep"))
        if tight == worst:
            return *all_of(self._run, worst, x_TxD, load), jnp.zeros(())
        fits = _needed(self, load, len(x_TxD)) <= jnp.array(tight)
        fits = pmax((~fits).any().astype(jnp.int32), "ep") == 0
        with jax.named_scope("fits"):  # `fdp.count` is told by this name which branch runs
            y_TxD, moved = jax.lax.cond(
                fits,
                partial(all_of, self._run, tight),
                partial(all_of, self._rounds, tight),
                x_TxD,
                load,
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

    def sent(
        self, tokens: int, load: Load, row: tuple[int, int], degrees: Degrees, level: bool = False
    ) -> list[Sent]:
        """Wire bytes of a device, [forward, backward], of buffers that suffice. `row`: width and
        bytes of an element in compute. `level`: of a ragged all-to-all only the rows of uniform
        routing. Only arrays of the loads' shapes are read."""
        there, back = Ledger(degrees), Ledger(degrees)
        S, K, T, ep = degrees["ep"], load.ids.shape[-1], tokens, ("ep",)
        if S == 1:
            return [{}, {}]
        (b, worst), row_bytes = self.bounds(T, load, S), self.wire.row_bytes(*row)
        if self.plan == "gather":
            x, gates = T * row[0] * row[1], 4 * T * K
            there.add(GATHER, ep, x + 2 * gates).add(SCATTER, ep, x)
            back.add(SCATTER, ep, x + gates).add(GATHER, ep, x)
        else:
            moved = self._level(T, load, S) if level and ragged() else self._full(b, load, S)
            op = RAGGED if ragged() else EXCHANGE
            there.put(op, ep, moved * row_bytes)
            back.put(op, ep, moved * row_bytes)
        if self.plan == "flat" and not ragged():
            there.add(EXCHANGE, ep, 4 * load.experts // S)
        elif self.plan == "flat":
            there.add(GATHER, ep, 4 * load.experts)
            back.add(EXCHANGE, ep, OFFSETS * 4 * load.experts // S)
        if b != worst:
            there.add(REDUCE, ep, 4 + 4 * S)
        if self.plan == "two_level":
            M, G = S // self.node(S), self.node(S)
            copies = (M - 1) * b.first + (G - 1) * b.second
            sizes = 4 * (M - 1 + G - 1) if ragged() else 0
            there.put(EXCHANGE, ep, copies * 8 * K + sizes)
            back.put(EXCHANGE, ep, copies * 4 * K + OFFSETS * sizes)
            if b != worst:  # rows that reach each device of the node
                there.put(REDUCE, ep, 2 * (M - 1) / M * 4 * S)
        return [there.sent, back.sent]

    def _full(self, b: Bounds, load: Load, S: int) -> float:
        """Rows that a device sends to others, there and back, with full buffers."""
        if self.plan == "two_level":
            G = self.node(S)
            return 2 * ((S // G - 1) * b.first + (G - 1) * b.second)
        if ragged():  # out of the sorted pairs, and out of the groups of the experts
            e = load.experts // S
            held = buffer_rows(b.pairs, e, choose_block(b.pairs, e))
            return (load.pairs + held) * (S - 1) / S
        return 2 * (S - 1) * b.first

    def _level(self, tokens: int, load: Load, S: int) -> float:
        """As `_full`, with the mean number of rows of uniform routing."""
        if self.plan == "flat":
            return 2 * load.pairs * (S - 1) / S
        G, each = self.node(S), round(load.pairs / tokens)

        def reached(parts: int) -> float:
            """Chance that a token needs one of `parts` equal parts of the experts."""
            others = load.experts - load.experts // parts
            return 1 - math.comb(others, each) / math.comb(load.experts, each)

        M = S // G
        return 2 * tokens * ((M - 1) * reached(M) + M * (G - 1) * reached(S))


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
