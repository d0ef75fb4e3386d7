"""A pipeline schedule as one SPMD program: a scan over the ticks of a static table.

Every device of pp looks up its operation of the tick and runs one branch of a conditional. Both
permutes over pp stand outside it, and so do the updates of slots and gradients; inside are only
collectives over axes whose devices run the same branch. Gradients are reduced over the data axes
once, after the last tick. S, which all devices of pp run at once, stands in a conditional of its
own (`fdp.parallel.pipeline.head`).

Legend: p devices of pp, m microbatches, x hidden states of a microbatch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.collectives import index, shift, size, vary
from fdp.grads import LOSS_AXES, Aux, Stages
from fdp.parallel.pipeline.chunks import place, unplace
from fdp.parallel.pipeline.head import SharedHead
from fdp.parallel.pipeline.orders import Order
from fdp.parallel.pipeline.split import Halves, halves
from fdp.parallel.pipeline.table import (
    BRANCHES,
    FIELDS,
    FIRST_B,
    FIRST_F,
    IDLE,
    LAST_B,
    NEXT,
    PREVIOUS,
    B,
    F,
    TickTable,
    W,
    table,
)

Array = jax.Array


@dataclass(frozen=True)
class scheduled:
    """Gradients by a pipeline schedule: equal to those of `fdp.grads.plain` with as many
    microbatches. order: operations F, B, W and BW of one step, and S where the model's head is
    sharded over pp. Where samples cost unlike, a microbatch has those of one class, and the
    microbatches of a class follow each other."""

    order: Order

    @property
    def microbatches(self) -> int:
        """m."""
        return self.order.microbatches

    @property
    def chunks(self) -> int:
        """v: parts of a device's layers that are stages of their own."""
        return self.order.placement.v

    @cached_property
    def table(self) -> TickTable:
        """The static table."""
        return table(self.order)

    def __call__(self, stages: Stages, params: Any, noised: Any) -> tuple[Array, Any, Aux]:
        """As `fdp.grads.Grads`."""
        placement, m = self.order.placement, self.microbatches
        if size("pp") != placement.p:
            raise ValueError(
                f"an order of {placement.p} stages on mesh.pp={size('pp')}: both must be equal; "
                f"set mesh.pp={placement.p}"
            )
        stacked = _but(jax.tree.map(_over_pp, params), stages.vocabulary)
        head = self._head(stages, params, noised)

        def mine(params: Any) -> Any:
            # Typed varying, parameters need no reduction inside a branch; its transpose is the one
            # reduction over pp and the data axes.
            def one(x: Array, s: bool) -> Array:
                return vary(place(x, placement) if s else x, LOSS_AXES)

            return jax.tree.map(one, params, stacked)

        here, reduce = jax.vjp(mine, params)
        rows = jax.tree.leaves(noised)[0].shape[0] // m
        classes = [
            Operations(self.chunks, stages, here, stacked, vary(_cut(part, rows), LOSS_AXES))
            for part in stages.parts(noised)
        ]
        loss, grads, aux, of_layers = _Program(self.table, classes, head)()
        return loss, reduce(grads)[0], aux | unplace(of_layers, placement)

    def _head(self, stages: Stages, params: Any, noised: Any) -> SharedHead | None:
        """S, where the order has it. Raises ValueError unless order and model agree."""
        shared = self.table.heads is not None
        if shared is not bool(stages.vocabulary):
            raise ValueError(
                f"the order has {'' if shared else 'no '}operations S, and the output head is "
                f"{'' if stages.vocabulary else 'not '}sharded over pp: set pipeline.vocabulary, "
                "or give both `with_head(order)` and a shape with vocab_axes=('pp', 'tp')"
            )
        if not shared:
            return None
        batches = _cut(noised, jax.tree.leaves(noised)[0].shape[0] // self.microbatches)
        return SharedHead(stages, params, batches, self.order.placement.devices[-1])


def _cut(part: Any, rows: int) -> Any:
    """Microbatches of so many rows. Raises ValueError for a cost class that is not whole ones."""
    count = jax.tree.leaves(part)[0].shape[0]
    if count % rows:
        raise ValueError(
            f"a cost class is not whole microbatches: its rows on a device % rows of a microbatch "
            f"= {count} % {rows}; set train.microbatches to a multiple of the pattern's rows"
        )
    return jax.tree.map(lambda x: x.reshape(count // rows, rows, *x.shape[1:]), part)


def _over_pp(x: Array) -> bool:
    return "pp" in jax.typeof(x).mat.varying


def _but(tree: Any, names: Sequence[str]) -> Any:
    """False for all below these keys of the tree."""
    if not names:
        return tree
    none = {key: jax.tree.map(lambda _: False, tree[key]) for key in names}
    return tree | none


class Operations:
    """What the operations of a stage compute on this device, and the types of their results.

    batches: with a leading dim of microbatches. stacked: of each parameter, whether its dim 0 is
    the layers of all chunks. known: the layers in halves, where another trace has cut them."""

    def __init__(
        self,
        chunks: int,
        stages: Stages,
        params: Any,
        stacked: Any,
        batches: Any,
        known: Halves | None = None,
    ):
        self.chunks, self.stages, self.batches = chunks, stages, batches
        self.params, self.stacked = params, stacked
        self.halves = known or self._halves()

    @cached_property
    def x(self) -> Any:
        """Type of a message."""
        first, some = self._batch(0), self._chunk(0)
        return _types(lambda: self._start(some, first)[0])

    def _halves(self) -> Halves:
        first, some = self._batch(0), self._chunk(0)
        found: list[Halves] = []
        data = "pp" if size("pp") > 1 else ""  # on a mesh of one stage nothing varies over pp

        def trace(params: Any, x: Array) -> tuple[()]:
            found.append(halves(self._blocks(first), params, x, data))
            return ()

        jax.make_jaxpr(trace)(some, blank(self.x))
        return found[0]

    def _batch(self, k: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, k, 0, False), self.batches)

    def _chunk(self, c: Any) -> Any:
        """The parameters of a chunk: its layers, and all that is not stacked."""

        def one(x: Array, stacked: bool) -> Array:
            n = x.shape[0] // self.chunks if stacked else 0
            return jax.lax.dynamic_slice_in_dim(x, c * n, n) if stacked else x

        whole = self.chunks == 1
        return self.params if whole else jax.tree.map(one, self.params, self.stacked)

    def _start(self, params: Any, noised: Any) -> tuple[Array, Array, Aux]:
        x, aux, penalty = self.stages.embed(params, noised)
        return vary(x, LOSS_AXES), _scalar(penalty), aux

    def _blocks(self, noised: Any) -> Callable[[Any, Array], Any]:
        def run(params: Any, x: Array) -> Any:
            y, aux, penalty = self.stages.stack(params, x, noised)
            return (y, _scalar(penalty)), aux

        return run

    def _score(self, params: Any, y: Array, noised: Any) -> tuple[Array, Aux]:
        loss, aux, penalty = self.stages.score(params, y, noised)
        return _scalar(loss) + _scalar(penalty), aux

    def forward(self, k: Any, c: Any, message: Array, first: bool = False) -> dict[str, Any]:
        """F. The first stage embeds its microbatch."""
        noised, params, before = self._batch(k), self._chunk(c), _scalar(None)
        aux: Aux = {}
        if first:
            message, before, aux = self._start(params, noised)
        (y, penalty), residuals, of_layers = self.halves.forward(
            self._blocks(noised), params, message
        )
        found = {"message": y, "residuals": residuals, "loss": before + penalty}
        return found | {"aux": aux, "layers": of_layers}

    def backward(
        self,
        k: Any,
        c: Any,
        message: Array,
        residuals: Any,
        first: bool = False,
        last: bool = False,
    ) -> dict[str, Any]:
        """B. The last stage computes the loss before, the first one the gradients of the embedding
        after."""
        noised, params, one = self._batch(k), self._chunk(c), vary(jnp.ones(()), LOSS_AXES)
        found: dict[str, Any] = {}
        if last:
            find = jax.value_and_grad(self._score, (0, 1), has_aux=True)
            (loss, aux), (grads, message) = find(params, message, noised)
            found = {"loss": loss, "aux": aux, "grads": grads}
        dx, stash = self.halves.input_gradients(params, residuals, (message, one))
        if first:
            _, pull = jax.vjp(lambda p: self._start(p, noised)[:2], params)
            found["grads"] = pull((dx, one))[0]
        return found | {"message": dx, "stash": stash}

    def weights(self, c: Any, stash: Any) -> dict[str, Any]:
        """W."""
        return {"grads": self.halves.weight_gradients(self._chunk(c), stash)}

    @cached_property
    def none(self) -> dict[str, Any]:
        """The zeros of every result."""
        x = blank(self.x)
        found = _types(lambda: self.forward(0, 0, x, first=True))
        residuals = blank(found["residuals"])
        last = _types(lambda: self.backward(0, 0, x, residuals, last=True))
        return blank(found | last | {"aux": found["aux"] | last["aux"]})


class _Program:
    """One step on this device. What an operation does not compute is zero in the results of its
    tick.

    classes: the operations of the microbatches of each cost class, which are numbered class after
    class. Messages of all classes lie in one buffer, as long as the longest; residuals and stashes
    in one for each class, with slots for all microbatches."""

    def __init__(
        self, table: TickTable, classes: Sequence[Operations], head: SharedHead | None = None
    ):
        self.table, self.classes, self.head, first = table, classes, head, classes[0]
        self.params, self.stacked, self.chunks = first.params, first.stacked, first.chunks
        counts = [jax.tree.leaves(ops.batches)[0].shape[0] for ops in classes]
        self.class_of = np.repeat(np.arange(len(classes)), counts)
        self.place = np.concatenate([np.arange(n) for n in counts])
        longest = max(classes, key=lambda ops: ops.x.size)
        self.message = longest.none["message"]
        self.none = first.none | {"message": self.message}
        for name in ("residuals", "stash"):
            self.none[name] = [ops.none[name] for ops in classes]

    def __call__(self) -> tuple[Array, Any, Aux, Aux]:
        """(loss, gradients, aux, aux of the layers) of this device."""
        slots, none, v = self.table.slots, self.none, self.chunks

        def slotted(name: str, n: int) -> Any:
            return jax.tree.map(lambda x: jnp.stack([x] * (n + 1)), none[name])

        start = (
            slotted("message", slots.messages),
            slotted("residuals", slots.residuals),
            slotted("stash", slots.stashes),
            none["loss"],
            none["aux"],
            jax.tree.map(jnp.zeros_like, self.params),
            jax.tree.map(lambda x: jnp.concatenate([x] * v), none["layers"]),
        )
        rows = jnp.asarray(self.table.rows, jnp.int32)[:, index("pp")]
        heads = None if self.head is None else jnp.asarray(self.table.heads, jnp.int32)
        (*_, loss, aux, grads, layers), _ = jax.lax.scan(self._tick, start, (rows, heads))
        return loss, grads, aux, layers

    def _branches(
        self, n: int, at: dict[str, Array], box: Any, kept: Any, stashed: Any
    ) -> list[Callable[[], Any]]:
        """The operations of class n, padded with zeros, in the order of the table's kinds."""
        ops, none, k, c = self.classes[n], self.none, at["place"], at["chunk"]

        def padded(found: dict[str, Any]) -> dict[str, Any]:
            found = found | {"aux": none["aux"] | found.get("aux", {})}
            if "message" in found:
                found["message"] = _padded(found["message"], self.message)
            for name in ("residuals", "stash"):
                if name in found:
                    found[name] = [*none[name][:n], found[name], *none[name][n + 1 :]]
            return none | found

        def given() -> Array:
            return _unpadded(_take(box, at["input"]), ops.x)

        def forward(first: bool) -> Callable[[], Any]:
            return lambda: padded(ops.forward(k, c, given(), first))

        def backward(first: bool, last: bool) -> Callable[[], Any]:
            def run() -> dict[str, Any]:
                residuals = _take(kept[n], at["residual"])
                return padded(ops.backward(k, c, given(), residuals, first, last))

            return run

        found = {
            IDLE: lambda: none,
            FIRST_F: forward(True),
            F: forward(False),
            B: backward(False, False),
            FIRST_B: backward(True, False),
            LAST_B: backward(False, self.head is None),
            W: lambda: padded(ops.weights(c, _take(stashed[n], at["stash"]))),
        }
        return [found[i] for i in range(BRANCHES)]

    def _tick(self, carry: Any, of_tick: Any) -> tuple[Any, None]:
        box, kept, stashed, loss, aux, grads, layers = carry
        row, head = of_tick
        at, slots = dict(zip(FIELDS, row, strict=True)), self.table.slots
        mine = jnp.asarray(self.class_of)[at["microbatch"]]
        at["place"] = jnp.asarray(self.place)[at["microbatch"]]
        several = range(len(self.classes))
        every = [b for n in several for b in self._branches(n, at, box, kept, stashed)]
        out = jax.lax.switch(at["kind"] + BRANCHES * mine, every)
        message, zero = out["message"], self.message
        plus = shift(jnp.where(at["send"] == NEXT, message, zero), "pp", 1)
        minus = shift(jnp.where(at["send"] == PREVIOUS, message, zero), "pp", -1)
        if self.head is not None:
            y = _take(box, at["input"])
            message, (loss, aux, grads) = self.head.run(head, y, message, (loss, aux, grads))
        for name, x in (("plus", plus), ("minus", minus), ("own", message)):
            box = _put(box, at[name], x)

        def put(buffers: list[Any], name: str, slot: Array, unused: int) -> list[Any]:
            at_n = [jnp.where(mine == n, slot, unused) for n in several]
            return [_put(b, i, x) for b, i, x in zip(buffers, at_n, out[name], strict=True)]

        add = partial(_add, at["chunk"])
        whole = jax.tree.map(lambda _: True, layers)
        return (
            box,
            put(kept, "residuals", at["residual"], slots.residuals),
            put(stashed, "stash", at["stash"], slots.stashes),
            loss + out["loss"],
            jax.tree.map(jnp.add, aux, out["aux"]),
            jax.tree.map(add, grads, out["grads"], self.stacked),
            jax.tree.map(add, layers, out["layers"], whole),
        ), None


def _padded(x: Array, like: Array) -> Array:
    """A message in the shape of the longest."""
    if x.shape == like.shape:
        return x
    return jnp.pad(x.reshape(-1), (0, like.size - x.size)).reshape(like.shape)


def _unpadded(message: Array, x: Any) -> Array:
    """The reverse, of this type."""
    return message if x.shape == message.shape else message.reshape(-1)[: x.size].reshape(x.shape)


def _add(chunk: Array, total: Array, x: Array, stacked: bool) -> Array:
    """Add the layers of a chunk in their place."""
    if not stacked or x.shape == total.shape:
        return total + x
    at = chunk * x.shape[0]
    mine = jax.lax.dynamic_slice_in_dim(total, at, x.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, mine + x, at, 0)


def _scalar(x: Any) -> Array:
    """A summand of the loss, typed varying; None is 0."""
    return vary(jnp.zeros(()) if x is None else x, LOSS_AXES)


def _types(f: Callable[[], Any]) -> Any:
    """Abstract values of the results of `f`, with the axes over which they vary."""
    closed, shapes = jax.make_jaxpr(f, return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shapes), closed.out_avals)


def blank(types: Any) -> Any:
    """Zeros of these types."""
    return jax.tree.map(lambda t: vary(jnp.zeros(t.shape, t.dtype), tuple(t.mat.varying)), types)


def _take(slots: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), slots)


def _put(slots: Any, i: Array, value: Any) -> Any:
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, i, 0), slots, value)
