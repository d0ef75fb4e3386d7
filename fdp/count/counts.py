"""What a layer costs, as its class states it, and how that adds up to a model.

A layer, an attention core or an objective has a method `counts`; one without is named by the error
`Unstated`. Tests hold the sums equal to the jaxpr and to the compiled program.

Convention of FLOPs: only products of matrices count, 2·m·n·k each. Attention counts all keys, so a
causal mask gives no discount. The head counts the rows that it computes. Model FLOPs do not count
what is computed twice, by rematerialisation or by devices that hold the same data. The program may
execute fewer: for long sequences, attention skips tiles that the mask hides.

Bytes on the wire are those of ring algorithms, as in `fdp.count.hlo`: all-reduce 2(n-1)/n of its
payload, all-gather and reduce-scatter (n-1) shards, a permute its payload."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple, TypeVar

from fdp.mesh import AXES

CONVENTION = (
    "model FLOPs: matmuls only, full attention, head on the rows it runs on, backward 2x forward, "
    "no recompute"
)

Degrees = Mapping[str, int]
Key = tuple[str, tuple[str, ...]]  # (op, mesh axes)
Sent = dict[Key, float]  # bytes on the wire per device
K = TypeVar("K")

REDUCE, GATHER, SCATTER = "all-reduce", "all-gather", "reduce-scatter"
EXCHANGE, PERMUTE, RAGGED = "all-to-all", "collective-permute", "ragged-all-to-all"


class Unstated(ValueError):
    """A part of the model or objective states no counts."""


@dataclass(frozen=True)
class Rows:
    """The rows of a device in one microbatch.

    `batch`: sequences. `length`: positions of each, all of which its group of cp holds. `head`:
    rows that reach the output head. `segments`: whether the batch has document ids. `level`:
    exchanges whose sizes are data are counted at level loads, not with full buffers."""

    batch: int
    length: int
    head: int
    segments: bool = False
    level: bool = False

    @property
    def positions(self) -> int:
        """Positions of all sequences, on all devices of cp."""
        return self.batch * self.length

    def tokens(self, degrees: Degrees) -> int:
        """Positions of one device."""
        return self.positions // degrees["cp"]


class Ledger:
    """Adds up wire bytes by (op, axes). Axes of degree 1 send nothing and are left out of the
    key."""

    def __init__(self, degrees: Degrees):
        self.degrees = degrees
        self.sent: Sent = {}

    def add(self, op: str, axes: Iterable[str], payload: float, times: int = 1) -> "Ledger":
        """payload: bytes of the whole operand for all-reduce, of one shard for all-gather and
        reduce-scatter."""
        live = tuple(a for a in AXES if a in axes and self.degrees[a] > 1)
        n = prod(self.degrees[a] for a in live)
        if live:
            return self.put(
                op, live, times * payload * (2 * (n - 1) / n if op == REDUCE else n - 1)
            )
        return self

    def put(self, op: str, axes: tuple[str, ...], wire: float) -> "Ledger":
        """wire: bytes that the device sends, by any algorithm."""
        if wire:
            self.sent[op, axes] = self.sent.get((op, axes), 0.0) + wire
        return self


def merged(*parts: Mapping[K, float]) -> dict[K, float]:
    """The sum of several ledgers."""
    out: dict[K, float] = {}
    for part in parts:
        for key, wire in part.items():
            out[key] = out.get(key, 0.0) + wire
    return out


@dataclass(frozen=True)
class Work:
    """A part of a pass: FLOPs of all devices of cp and tp that share the rows, and bytes of one
    device.

    `batched`: FLOPs of products with batch dims, which remat="dots" does not keep. `replicated`:
    FLOPs that every device of cp and tp computes alike, counted once."""

    flops: int = 0
    batched: int = 0
    replicated: int = 0
    sent: Sent = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.batched + other.batched,
            self.replicated + other.replicated,
            merged(self.sent, other.sent),
        )

    def times(self, n: int, of_device: int | None = None) -> "Work":
        """`n` such parts, of which each device runs `of_device`."""
        many = n if of_device is None else of_device
        sent = {key: wire * many for key, wire in self.sent.items()}
        return Work(self.flops * n, self.batched * n, self.replicated * n, sent)

    def __sub__(self, other: "Work") -> "Work":
        return self + other.times(-1)

    def backward(self, sent: Sent) -> "Work":
        """The backward pass of this part: every product twice, and the bytes that it sends."""
        return Work(2 * self.flops, 2 * self.batched, 2 * self.replicated, sent)


@dataclass(frozen=True)
class Counts:
    """Costs of one microbatch. Bytes are those of one device; `parameters` are those of the whole
    mesh.

    `last`: the part of the forward pass that only yields the output; rematerialisation omits it
    where nothing reads the output. `again`: what else is computed and sent again. `once`: bytes
    that all layers share, sent once a pass. `saved`: bytes kept for the backward pass. `kept`:
    bytes kept under remat="dots". `live`: other bytes of a layer, or of a part of it, that is being
    recomputed."""

    parameters: int = 0
    forward: Work = Work()
    backward: Work = Work()
    last: Work = Work()
    again: Work = Work()
    once: Sent = field(default_factory=dict)
    saved: int = 0
    kept: int = 0
    live: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        once = {
            key: max(self.once.get(key, 0.0), other.once.get(key, 0.0))
            for key in self.once.keys() | other.once.keys()
        }
        return Counts(
            self.parameters + other.parameters,
            self.forward + other.forward,
            self.backward + other.backward,
            self.last + other.last,
            self.again + other.again,
            once,
            self.saved + other.saved,
            self.kept + other.kept,
            self.live + other.live,
        )

    @property
    def flops(self) -> int:
        """Model FLOPs, forward and backward."""
        return self.forward.flops + self.backward.flops

    @property
    def sent(self) -> Sent:
        """Bytes of the whole microbatch."""
        return merged(self.once, self.passes)

    @property
    def passes(self) -> Sent:
        """Bytes of the whole microbatch without those that all layers share."""
        return merged(*(part.sent for part in (self.forward, self.backward, self.again)))

    def executed(self, degrees: Degrees) -> int:
        """FLOPs of all devices of cp and tp, including all that is computed more than once."""
        passes = (self.forward, self.backward, self.again)
        others = degrees["cp"] * degrees["tp"] - 1
        return sum(part.flops + others * part.replicated for part in passes)

    def repeated(self, periods: int, remat: str, inputs: int, pp: int) -> "Counts":
        """These layers scanned over `periods` (over pp), each rematerialised on its own. `remat`:
        none | dots | full. `inputs`: bytes of a period's input."""
        local = periods // pp
        again, saved, live = Work(), self.saved, self.live
        if remat != "none":
            again = self.forward - self.last
            live, saved = self.live + self.saved, inputs
        if remat == "dots":
            again = replace(again, flops=again.batched, replicated=0)
            saved = inputs + self.kept
        return Counts(
            self.parameters * periods,
            self.forward.times(periods, local),
            self.backward.times(periods, local),
            Work(),
            (self.again + again).times(periods, local),
            self.once,
            saved * local,
            self.kept * local,
            live,
        )


class Staged(NamedTuple):
    """Costs of one microbatch of a model by what a stage of a pipeline runs.

    start, finish: beside its layers, the first and the last stage. shared: every stage, for its
    layers to read. layers: those of one shard of pp. again: what the first stage computes a second
    time in its backward pass, and the last one to finish. message: bytes that a device hands to the
    next stage. middle: beside its layers, the first stage of the second half of a model with
    skips."""

    start: Counts
    shared: Counts
    layers: Counts
    finish: Counts
    again: Counts = Counts()
    message: int = 0
    middle: Counts = Counts()

    @property
    def whole(self) -> Counts:
        """Of a model that is not in stages, where nothing is computed a second time."""
        return self.start + self.shared + self.layers + self.middle + self.finish

    def pipelined(self, stages: int) -> Counts:
        """Of all of `stages` stages."""
        return sum([self.shared] * (stages - 1), self.whole + self.again)


def staged(model: Any, rows: Rows, degrees: Degrees) -> Staged:
    """`model.staged(rows, degrees)`. Raises Unstated, naming the model, where it has none."""
    if not hasattr(model, "staged"):
        raise Unstated(f"{type(model).__name__} states no counts by stage of a pipeline")
    return model.staged(rows, degrees)


def of(part: Any, *args: Any) -> Counts:
    """`part.counts(*args)`. Raises Unstated, naming the part, where it has none."""
    if not hasattr(part, "counts"):
        raise Unstated(f"{type(part).__name__} has no counts")
    return part.counts(*args)
