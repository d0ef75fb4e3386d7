"""Where the rows of a layer of experts go, by dispatch plan: copies, bytes and buffers.

Plans. flat: one copy of a row for every choice of a token. two_level: one for every node that a
token reaches, then in that node one for every device, and sums in the node before the way back.
gather: all tokens to all devices, and a reduce-scatter of the results. Device d holds the experts
d·E/M … (d+1)·E/M − 1; tokens are spread evenly over devices.

Copies are expected values of uniform routing in closed form, or counted. Routing limited to groups
(DeepSeek-V2 and V3) keeps some of equal ranges of experts: the chance to reach a device or a node
is the mean over all choices of groups. So a token of V3 reaches at most the nodes of four groups.

Legend: T tokens of a device, K choices a token, E experts, M devices over ep, N nodes.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fdp.data import expert_loads
from fdp.keys import UserError
from fdp.models.shape import ModelShape
from fdp.price import hardware
from fdp.price.shapes import GROUPS
from fdp.price.workload import domain_of

PLANS = ("flat", "two_level", "gather")
WIRES = ("bf16", "fp8")


@dataclass(frozen=True)
class PricedLayer:
    """A layer of experts of `shape` with T = `tokens` on each of the first M = `devices` chips of a
    cluster. `wire`: format of the rows on their way out; results and gradients are bfloat16.
    `groups`, `kept`: a token chooses from `kept` of so many groups of experts; 0: as the published
    model of that name. Raises UserError, with the equation, for sizes that do not fit."""

    shape: ModelShape
    cluster: hardware.Cluster
    tokens: int
    devices: int
    wire: str = "bf16"
    groups: int = 0
    kept: int = 0

    def __post_init__(self) -> None:
        E, M = self.shape.experts, self.devices
        if not E:
            raise UserError(f"{self.shape.name} has no experts: name a mixture of experts")
        if self.tokens < 1 or not 1 <= M <= self.cluster.size:
            raise UserError(
                f"tokens={self.tokens} and ep={M} on {self.cluster.size} chips: tokens ≥ 1 and 1 ≤ "
                f"ep ≤ {self.cluster.size} must hold"
            )
        expert_loads.part_loads(np.zeros(E), M)
        if M % self.local:
            raise UserError(
                f"ep={M} is not divisible by the {self.local} chips of a node: set ep to "
                f"{M // self.local * self.local}"
            )
        groups, kept = self.limit
        if E % groups or kept * E // groups < self.shape.topk:
            raise UserError(
                f"experts {E} in {groups} groups, {kept} kept, for k={self.shape.topk}: "
                "groups must divide experts, and the kept ones hold k"
            )

    @property
    def limit(self) -> tuple[int, int]:
        """(groups of experts, groups that a token chooses from)."""
        return (self.groups, self.kept) if self.groups else GROUPS.get(self.shape.name, (1, 1))

    @property
    def local(self) -> int:
        """Devices of a node."""
        return min(domain_of(self.cluster), self.devices)

    @property
    def nodes(self) -> int:
        """Nodes over ep."""
        return self.devices // self.local

    @property
    def row_out(self) -> int:
        """Bytes of a row on its way out: fp8 has a float32 scale for every 128 elements."""
        D = self.shape.width
        return D + 4 * -(-D // 128) if self.wire == "fp8" else 2 * D

    @property
    def row_back(self) -> int:
        """Bytes of a result, or of a gradient."""
        return 2 * self.shape.width

    @property
    def chips(self) -> list[tuple[str, slice]]:
        """Chip and devices of each part of a mixed cluster."""
        ends = np.cumsum([g.count * g.chips for g in self.cluster.groups])
        parts = zip(self.cluster.groups, [0, *ends[:-1]], ends, strict=True)
        return [(g.chip.name, slice(a, b)) for g, a, b in parts if a < self.devices]


class Copies(NamedTuple):
    """Copies of a step from every device, expected or counted: rows (token, choice) to devices,
    distinct (token, device) and distinct (token, node) pairs. The last two are None where only
    loads are known."""

    rows_MxM: np.ndarray
    device_MxM: np.ndarray | None = None
    node_MxN: np.ndarray | None = None


def reach(layer: PricedLayer, parts: int) -> np.ndarray:
    """Chance that a token of uniform routing reaches each of `parts` equal ranges of experts.

    One minus the mean over choices of groups of C(kept experts outside the range, K) / C(kept
    experts, K)."""
    s, (groups, kept) = layer.shape, layer.limit
    per = s.experts // groups
    held = np.zeros((parts, groups), int)
    experts = np.arange(s.experts)
    np.add.at(held, (experts * parts // s.experts, experts // per), 1)
    every = math.comb(kept * per, s.topk)
    choices = list(itertools.combinations(range(groups), kept))
    missed = [
        sum(math.comb(kept * per - int(row[list(c)].sum()), s.topk) for c in choices)
        for row in held
    ]
    return 1 - np.array([m / every for m in missed]) / len(choices)


def uniform(layer: PricedLayer) -> Copies:
    """Expected copies of uniform routing."""
    T, M = layer.tokens, layer.devices
    rows = np.full((M, M), T * layer.shape.topk / M)
    return Copies(
        rows, np.tile(T * reach(layer, M), (M, 1)), np.tile(T * reach(layer, layer.nodes), (M, 1))
    )


def loaded(layer: PricedLayer, loads_E: np.ndarray) -> Copies:
    """Copies where only loads are known: every device sends alike."""
    part_M = expert_loads.part_loads(np.asarray(loads_E, float), layer.devices)
    rows = layer.tokens * layer.shape.topk * part_M / max(part_M.sum(), 1e-9)
    return Copies(np.tile(rows, (layer.devices, 1)))


def counted(layer: PricedLayer, ids_NxK: np.ndarray, source_N: np.ndarray) -> Copies:
    """Copies counted in the choices of tokens of M·T/N steps, scaled to one."""
    E, M = layer.shape.experts, layer.devices

    def pairs(parts: int, distinct: bool) -> np.ndarray:
        part = np.sort(np.where(ids_NxK >= 0, ids_NxK * parts // E, -1), axis=1)
        kept = np.diff(part, axis=1, prepend=-1) > 0 if distinct else part >= 0
        cell = (source_N[:, None] * parts + part)[kept]
        found = np.bincount(cell, minlength=M * parts).reshape(M, parts)
        return found * (M * layer.tokens / len(ids_NxK))

    return Copies(pairs(M, False), pairs(M, True), pairs(layer.nodes, True))


class Exchange(NamedTuple):
    """One exchange of rows. Copies a token by level; rows that the fullest device moves in its node
    and between nodes; ranks, and how many of them in a node; rows sent and received by the fullest
    device, and the most there can be; bytes beside a row on its way out."""

    own: float
    node: float
    out: float
    inside: float
    outside: float
    ranks: int
    local: int
    held: float
    most: float
    beside: int = 0


def _exchange(
    layer: PricedLayer, copies_MxM: np.ndarray, ranks: int, local: int, most: float, beside: int = 0
) -> Exchange:
    node_M = np.arange(layer.devices) // layer.local
    same = node_M[:, None] == node_M
    own = np.eye(layer.devices, dtype=bool)
    level = [np.where(where, copies_MxM, 0) for where in (own, same & ~own, ~same)]
    stay, node, out = (float(c.sum()) / (layer.devices * layer.tokens) for c in level)
    inside, outside = (float(max(c.sum(0).max(), c.sum(1).max())) for c in level[1:])
    held = float((copies_MxM.sum(0) + copies_MxM.sum(1)).max())
    return Exchange(stay, node, out, inside, outside, ranks, local, held, most, beside)


def exchanges(layer: PricedLayer, routing: Copies, plan: str) -> list[Exchange]:
    """What a plan sends on its way out, in order; the way back is the same in reverse.

    The first level of two_level sends to the device of the same place in each node; where there is
    one node, or one device in each, only the other level is left. Raises UserError where a plan
    needs what a file of counts does not say."""
    T, K, M, N, local = layer.tokens, layer.shape.topk, layer.devices, layer.nodes, layer.local
    held = min(K, layer.shape.experts // M)
    if plan == "flat":
        return [_exchange(layer, routing.rows_MxM, M, local, T * K + M * T * held)]
    ids = 8 * K  # int32 ids and float32 weights travel with a row
    if plan == "gather":
        most = T + M * T
        return [Exchange(1, M - N, N - 1, 0, 0, M, local, most, most, ids)]
    if routing.device_MxM is None or routing.node_MxN is None:
        raise UserError("two_level needs the choices of tokens, and counts alone do not say them")
    place = np.arange(M) % local
    first = np.zeros((M, M))
    for n in range(N):
        first[np.arange(M), n * local + place] = routing.node_MxN[:, n]
    landed = routing.device_MxM.reshape(N, local, N, local).sum(0)  # place, node, place in it
    second = np.zeros((N, local, N, local))
    second[np.arange(N), :, np.arange(N)] = landed.swapaxes(0, 1)
    between = _exchange(layer, first, N, 1, T * min(K, N) + N * T, ids)
    copies = second.reshape(M, M)
    inside = _exchange(layer, copies, local, local, N * T * min(K, local) + M * T, ids)
    return [x for x in (between, inside) if x.ranks > 1] or [inside]
