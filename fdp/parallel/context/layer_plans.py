"""How each layer of a hybrid communicates over the same devices: a plan and a layout of each.

What a layer costs under a plan is given as a value, from the layer's own counts; here it becomes
seconds, and the cheapest path through the layers is found. Hidden states may change layout between
two layers, at the price of an all-to-all each way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdp.count.counts import EXCHANGE
from fdp.parallel.context import planner_search
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.planner_time import Machine


@dataclass(frozen=True)
class Transfer:
    """`times` dependent collectives that send `wire` bytes of a device in all, while it computes
    `hidden` FLOPs that do not wait for them. Each is among `ranks` devices (0: all), with `inner`
    of others between neighbours."""

    op: str
    wire: float
    times: int = 1
    hidden: float = 0.0
    ranks: int = 0
    inner: int = 1


@dataclass(frozen=True)
class LayerOption:
    """One way to run a layer, forward and backward. `flops`: of the busiest device; `chained` of
    them are in `chain` steps that wait for each other. `memory`: bytes that a device keeps for the
    backward pass."""

    plan: str
    layout: SequenceLayout
    flops: float
    transfers: tuple[Transfer, ...] = ()
    memory: float = 0.0
    chained: float = 0.0
    chain: int = 0

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum(t.wire for t in self.transfers)

    @property
    def steps(self) -> int:
        """Dependent collectives."""
        return sum(t.times for t in self.transfers)


@dataclass(frozen=True)
class Devices:
    """`count` devices that share one sequence, and `memory` bytes that a layer may keep on each.
    `step`: seconds that a step of a chain takes at least."""

    machine: Machine
    count: int
    memory: float = float("inf")
    step: float = 0.0

    def compute(self, option: LayerOption) -> float:
        """Seconds of the busiest device without any wait for others."""
        chained = max(option.chained / self._rate, option.chain * self.step)
        return (option.flops - option.chained) / self._rate + chained

    def exposed(self, option: LayerOption) -> float:
        """Seconds of transfers that compute does not hide."""
        return sum(max(0.0, self._send(t) - t.hidden / self._rate) for t in option.transfers)

    def seconds(self, option: LayerOption) -> float:
        """Of a layer, forward and backward."""
        return self.compute(option) + self.exposed(option)

    def move(self, hidden: float) -> float:
        """Seconds in which hidden states, `hidden` bytes of a device, change layout, forward and
        backward."""
        return 2 * self._send(Transfer(EXCHANGE, self.moved(hidden) / 2))

    def moved(self, hidden: float) -> float:
        """Bytes that a device sends for such a change, forward and backward."""
        return 2 * hidden * (self.count - 1) / self.count

    @property
    def _rate(self) -> float:
        return float(np.atleast_1d(self.machine.flops)[0])

    def _send(self, t: Transfer) -> float:
        sent = self.machine.send(t.op, t.wire / t.times, t.ranks or self.count, t.inner)
        return t.times * float(sent[0])


@dataclass(frozen=True)
class HybridPlan:
    """An option of every layer, and the seconds of all layers and of the moves between them."""

    layers: tuple[LayerOption, ...]
    seconds: float

    @property
    def moves(self) -> int:
        """Changes of layout."""
        pairs = zip(self.layers, self.layers[1:], strict=False)
        return sum(a.layout != b.layout for a, b in pairs)


def price(layers: Sequence[LayerOption], on: Devices, hidden: float) -> HybridPlan:
    """The price of one option a layer."""
    found = HybridPlan(tuple(layers), sum(map(on.seconds, layers)))
    return HybridPlan(found.layers, found.seconds + found.moves * on.move(hidden))


def best(options: Sequence[Sequence[LayerOption]], on: Devices, hidden: float) -> HybridPlan:
    """The cheapest path: `options` of every layer, `hidden` bytes of hidden states of a device. The
    first and the last layout are free. Raises ValueError where nothing of a layer fits."""
    places = list(dict.fromkeys(option.layout for of in options for option in of))
    fits = [[option for option in of if option.memory <= on.memory] for of in options]
    for layer, of in enumerate(fits):
        if not of:
            least = min((o.memory for o in options[layer]), default=float("inf"))
            raise ValueError(
                f"layer {layer} keeps at least {least / 2**30:.2f} GiB of a device > "
                f"{on.memory / 2**30:.2f} GiB: take more devices, or a shorter sequence"
            )
    priced = [
        [{o: ((on.seconds(o), o.wire), 0.0) for o in of if o.layout == at} for at in places]
        for of in fits
    ]
    move = on.move(hidden), on.moved(hidden)
    between = {(a, b): move for a in range(len(places)) for b in range(len(places)) if a != b}
    found = planner_search.cheapest(priced, between)
    assert found is not None  # nothing is limited
    return price([option for _, option in found], on, hidden)
