"""Speculative decoding on two groups of devices: one drafts on while the other judges.

In a round the verifier judges the window of states z_0 … z_{n-1} that was drafted before, and the
draft group goes on from its own z_{n-1} to d_1 … d_W (PEARL; Liu et al. 2024). Where all of the
window is accepted and the verifier's own last step leads to d_1, the next window is d_1 … d_W.
Else it is the verifier's state alone (n = 1), from which both groups start anew. So a round lasts
as long as the slower group, and a sample that was drafted wrongly pays a round of one step.

Steps are judged by shared noise (`fdp.sampling.speculative`): ids are those of the verifier alone.
A draft without numbers (NaN) is a wrong draft.

Per round, W · B · L drafted ids cross the link, B · L ids of the verifier's states and B accepted
lengths come back (`link_bytes`). Both groups keep the same window by the same rule, so that the
host decides nothing: it dispatches round r + 1 before it looks whether round r was the last, and
one round more runs than is needed. States of a window are rows of a batch: they lie over dp with
the requests, and no collective of the verification runs between them.

Shapes: W states of a window, B requests, L positions, V vocabulary (tp: V/tp columns)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fdp import sharding
from fdp.collectives import shard_map
from fdp.mesh import BATCH_AXES
from fdp.parallel.groups import DeviceGroups, Event
from fdp.sampling.chain import Chain, ChainState
from fdp.sampling.speculative import at, walk

Array = jax.Array
P = PartitionSpec
EVERYWHERE, ROWS = P(), P(BATCH_AXES)
COUNTS = ("live_B", "hit_B")
LENGTH = np.dtype(np.uint16)  # of accepted lengths on the link


@dataclass(frozen=True, eq=False)
class GroupDenoiser:
    """A denoiser on a group of devices: `denoise(variables, z_BxL, noise_B) -> logits`, as of
    `fdp.sampling.chain`. `specs`: PartitionSpecs of the variables on the group's mesh."""

    group: str
    denoise: Callable[[Any, Array, Array], Array]
    variables: Any = ()
    specs: Any = ()


class DraftedWindow(NamedTuple):
    """z_WxBxL: ids as they cross the link; step_B: of the first state; count_B: states that hold
    (1 or W). Where it is 1, all are the first."""

    z_WxBxL: Array
    step_B: Array
    count_B: Array


class OverlappedRun(NamedTuple):
    """ids: int32 [B, L]. rounds_B: those in which a request was not finished; hits_B: of these,
    those after which the draft's next window stood. dispatched: rounds of both groups, W passes of
    the draft each. events: `DeviceGroups.events` of all."""

    ids: np.ndarray
    rounds_B: np.ndarray
    hits_B: np.ndarray
    dispatched: int
    events: list[Event]

    @property
    def sent_bytes(self) -> int:
        """What crossed the link, both ways."""
        return sum(e.nbytes for e in self.events)


def wire_dtype(n_ids: int) -> np.dtype:
    """Of ids up to the mask id `n_ids` on the link: two bytes where they fit, else four."""
    return np.dtype(np.uint16 if n_ids <= np.iinfo(np.uint16).max else np.uint32)


def link_bytes(window: int, requests: int, length: int, n_ids: int) -> int:
    """Bytes of a round on the link, both ways: (W + 1) · B · L ids and B accepted lengths."""
    ids = (window + 1) * requests * length
    return ids * wire_dtype(n_ids).itemsize + requests * LENGTH.itemsize


class OverlappedSpeculation:
    """Programs of both groups for requests of one shape. `window`: W.

    Raises ValueError for a window below 1, one group for both, and requests or states that the data
    axes of a group do not divide."""

    def __init__(
        self,
        chain: Chain,
        verifier: GroupDenoiser,
        draft: GroupDenoiser,
        groups: DeviceGroups,
        *,
        window: int,
    ):
        requests = len(chain.draw.sample_ids_B)
        if window < 1:
            raise ValueError(
                f"a window of {window} states: it holds the current one: set 1 or more"
            )
        if verifier.group == draft.group:
            raise ValueError(
                f"verifier and draft are both on group {draft.group!r}, where one waits for the "
                "other: give each a group of its own, or use `speculate`"
            )
        _check_rows(groups, draft.group, "requests", requests)
        _check_rows(groups, verifier.group, f"{window} states · requests", requests, window)
        self.chain, self.groups, self.window = chain, groups, window
        self.verifier, self.draft = verifier, draft
        self.variables = {
            side.group: groups.place(side.variables, side.group, side.specs)
            for side in (verifier, draft)
        }
        self.judge = jax.jit(self._judge)
        self.drafts = jax.jit(self._drafts, out_shardings=self._on(draft, EVERYWHERE))
        self.advance = {
            side.group: jax.jit(f, out_shardings=self._on(side, EVERYWHERE))
            for side, f in ((verifier, self._verdict), (draft, self._following))
        }

    def start(
        self, side: GroupDenoiser, begin: ChainState
    ) -> tuple[Any, ChainState, DraftedWindow]:
        """(variables, first states, their window): what the programs of a group take."""
        z_BxL = begin.z_BxL.astype(wire_dtype(self.chain.draw.n_ids))
        z_WxBxL = jnp.broadcast_to(z_BxL, (self.window, *z_BxL.shape))
        first = DraftedWindow(z_WxBxL, begin.step_B, jnp.ones_like(begin.step_B))
        return self.variables[side.group], *self.groups.place(
            (begin, first), side.group, EVERYWHERE
        )

    def run(self, begin: ChainState | None = None) -> OverlappedRun:
        """Generates from `begin` (default: the chain's own) and waits for it."""
        begin = jax.jit(self.chain.begin)() if begin is None else begin
        verifier, draft, groups = self.verifier.group, self.draft.group, self.groups
        groups.events()  # of what ran before
        *first, window = self.start(self.verifier, begin)
        *own_first, own = self.start(self.draft, begin)
        counts: list[dict[str, Array]] = []
        for r in range(self.chain.steps):
            after = groups.dispatch(verifier, f"verify {r}", self.judge, *first, window)
            drafted = groups.dispatch(draft, f"draft {r}", self.drafts, *own_first, own)
            there = groups.send(drafted, draft, verifier)
            window, reply, counted = self.advance[verifier](window, after, there)
            own = self.advance[draft](own, drafted, *groups.send(reply, verifier, draft))
            counts.append(counted)
            if r and not np.asarray(counts[r - 1]["more_B"]).any():
                break
        ids = np.asarray(window.z_WxBxL[0], np.int32)
        rounds_B, hits_B = (np.sum([np.asarray(c[k]) for c in counts], axis=0) for k in COUNTS)
        return OverlappedRun(ids, rounds_B, hits_B, len(counts), groups.events())

    def _on(self, side: GroupDenoiser, specs: Any) -> Any:
        return sharding.shardings(self.groups.mesh(side.group), specs)

    # Programs
    # ---------------------------------------------------------------------------------------------

    def _states(self, begin: ChainState, window: DraftedWindow) -> ChainState:
        """The states of a window, [W, B, …]. A step is that of the first plus the index, where the
        chain leaves out none."""

        def one(i: Array, z_BxL: Array) -> ChainState:
            z_BxL = z_BxL.astype(jnp.int32)
            return self.chain.settle(begin._replace(z_BxL=z_BxL, step_B=window.step_B + i))

        return jax.vmap(one)(jnp.arange(self.window, dtype=jnp.int32), window.z_WxBxL)

    def _judge(self, variables: Any, begin: ChainState, window: DraftedWindow) -> Array:
        """The verifier's step after every state: ids [W · B, L], over the data axes."""
        chain, denoise = self.chain, self.verifier.denoise

        def body(variables: Any, rows: ChainState) -> Array:
            logits = denoise(variables, rows.z_BxL, chain.level(rows))
            return chain.step(logits, rows).z_BxL.astype(window.z_WxBxL.dtype)

        states = self._states(begin, window)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
        mesh = self.groups.mesh(self.verifier.group)
        after: Array = shard_map(body, mesh, (self.verifier.specs, ROWS), ROWS)(variables, rows)
        return after

    def _drafts(self, variables: Any, begin: ChainState, window: DraftedWindow) -> Array:
        """d_1 … d_W from the last state that holds: ids [W, B, L]."""
        chain, denoise = self.chain, self.draft.denoise

        def body(variables: Any, tip: ChainState) -> Array:
            def after(now: ChainState) -> ChainState:
                return chain.step(denoise(variables, now.z_BxL, chain.level(now)), now)

            return walk(chain, tip, self.window, after).z_BxL.astype(window.z_WxBxL.dtype)

        tip = at(self._states(begin, window), window.count_B - 1)
        mesh = self.groups.mesh(self.draft.group)
        out = P(None, BATCH_AXES)
        drafted: Array = shard_map(body, mesh, (self.draft.specs, ROWS), out)(variables, tip)
        return drafted

    def _verdict(
        self, window: DraftedWindow, after: Array, drafted: Array
    ) -> tuple[DraftedWindow, Any, Any]:
        """(next window, (the verifier's states, accepted lengths) for the draft, what is
        counted)."""
        z_WxBxL = window.z_WxBxL
        after = after.reshape(z_WxBxL.shape)
        # A state that stands for itself again is not what its step leads to: nothing is accepted.
        same = (after[:-1] == z_WxBxL[1:]).all(-1)
        taken_B = jnp.cumprod(same, axis=0, dtype=jnp.int32).sum(0)
        reply = at(after, taken_B), (taken_B + 1).astype(LENGTH)
        following = self._following(window, drafted, *reply)
        live_B, more_B = (
            (z_BxL == self.chain.draw.n_ids).any(1) for z_BxL in (z_WxBxL[0], reply[0])
        )
        hit_B = live_B & (following.z_WxBxL == drafted).all((0, 2))
        return following, reply, {"live_B": live_B, "more_B": more_B, "hit_B": hit_B}

    def _following(
        self, window: DraftedWindow, drafted: Array, z_BxL: Array, accepted_B: Array
    ) -> DraftedWindow:
        """The next window: what was drafted where it begins as the verifier goes on, which it does
        not after an early rejection, else that state alone."""
        accepted_B = accepted_B.astype(jnp.int32)
        hit_B = (drafted[0] == z_BxL).all(-1)
        z_WxBxL = jnp.where(hit_B[:, None], drafted, z_BxL)
        count_B = jnp.where(hit_B, self.window, 1)
        return DraftedWindow(z_WxBxL, window.step_B + accepted_B, count_B.astype(jnp.int32))


def _check_rows(groups: DeviceGroups, name: str, what: str, requests: int, window: int = 1) -> None:
    degrees = groups.mesh(name).shape
    ways = math.prod(degrees[a] for a in BATCH_AXES)
    rows = window * requests
    if rows % ways:
        raise ValueError(
            f"group {name!r}: {what} = {rows} is not divisible by dp·ep = {degrees['dp']}·"
            f"{degrees['ep']} = {ways}: ask for another number of requests, or choose a dp that "
            "divides them"
        )
