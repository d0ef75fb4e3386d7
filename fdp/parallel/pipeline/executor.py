"""A pipeline schedule as one SPMD program: a scan over the ticks of a static table.

Every device of pp looks up its operation of the tick and runs one branch of a conditional. Both
permutes over pp stand outside it, and so do the updates of slots and gradients; inside are only
collectives over axes whose devices run the same branch. Gradients are reduced over the data axes
once, after the last tick. S, which all devices of pp run at once, stands in a conditional of its
own (`fdp.parallel.pipeline.head`).

Legend: p devices of pp, m microbatches, x hidden states of a microbatch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fdp.collectives import index, shift, size, vary
from fdp.grads import LOSS_AXES, Aux, Stages
from fdp.parallel.pipeline.chunks import place, unplace
from fdp.parallel.pipeline.head import SharedHead
from fdp.parallel.pipeline.orders import Order
from fdp.parallel.pipeline.placement import Placement
from fdp.parallel.pipeline.split import Halves, halves
from fdp.parallel.pipeline.table import (
    FALL_B,
    FALL_F,
    FALL_W,
    FIRST_B,
    FIRST_F,
    IDLE,
    LAST_B,
    NEXT,
    PREVIOUS,
    TURN_B,
    TURN_F,
    TURN_W,
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

    def stack(self, path: Sequence[Any]) -> Placement:
        """Where the virtual stages lie that share a stacked parameter of this path."""
        return self.order.placement

    def operations(
        self, stages: Stages, params: Any, stacked: Any, batches: Any
    ) -> "tuple[Operations, ...]":
        """Of the microbatches of one class, in each part of the model whose layers are unlike."""
        return (Operations(self.chunks, stages, params, stacked, batches),)

    def __call__(self, stages: Stages, params: Any, noised: Any) -> tuple[Array, Any, Aux]:
        """As `fdp.grads.Grads`."""
        placement, m = self.order.placement, self.microbatches
        if size("pp") != placement.p:
            raise ValueError(
                f"an order of {placement.p} stages on mesh.pp={size('pp')}: both must be equal; "
                f"set mesh.pp={placement.p}"
            )
        stacked = _but(jax.tree.map(over_pp, params), stages.vocabulary)
        head = self._head(stages, params, noised)

        def mine(params: Any) -> Any:
            # Typed varying, parameters need no reduction inside a branch; its transpose is the one
            # reduction over pp and the data axes.
            def one(path: Any, x: Array, s: bool) -> Array:
                return vary(place(x, self.stack(path)) if s else x, LOSS_AXES)

            return jax.tree_util.tree_map_with_path(one, params, stacked)

        here, reduce = jax.vjp(mine, params)
        rows = jax.tree.leaves(noised)[0].shape[0] // m
        classes = [
            self.operations(stages, here, stacked, vary(_cut(part, rows), LOSS_AXES))
            for part in stages.parts(noised)
        ]
        loss, grads, aux, of_layers = _Program(self.table, classes, head)()

        def stored(path: Any, x: Array) -> Array:
            return unplace(x, self.stack(path))

        of_layers = jax.tree_util.tree_map_with_path(stored, of_layers)
        return loss, reduce(grads)[0], aux | of_layers

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


def over_pp(x: Array) -> bool:
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
    the layers of all chunks. known: the layers in halves, where another trace has cut them. reads:
    the kind of operation that reads skips beside its message, if there is one."""

    reads = ""

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
        self.permuted = set[str]()  # axes, as far as `none` has found some
        self.halves = known or self._halves()

    @cached_property
    def x(self) -> Any:
        """Type of a message."""
        first, some = self._batch(0), self._chunk(0)
        return types(lambda: self._start(some, first)[0])

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

    def forward(self, k: Any, c: Any, message: Any, first: bool = False) -> dict[str, Any]:
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
        self, k: Any, c: Any, message: Any, residuals: Any, first: bool = False, last: bool = False
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

    def weights(self, c: Any, stash: Any, first: bool = False) -> dict[str, Any]:
        """W. That of the embedding is in B of the first stage."""
        return {"grads": self.halves.weight_gradients(self._chunk(c), stash)}

    @cached_property
    def none(self) -> dict[str, Any]:
        """The zeros of every result."""
        x = blank(self.x)
        found = types(lambda: self.forward(0, 0, x, first=True), self.permuted)
        residuals = blank(found["residuals"])
        last = types(lambda: self.backward(0, 0, x, residuals, last=True), self.permuted)
        return blank(found | last | {"aux": found["aux"] | last["aux"]})


class _Program:
    """One step on this device. What an operation does not compute is zero in the results of its
    tick.

    classes: the operations of the microbatches of each cost class, which are numbered class after
    class, in each part of the model. Messages of all classes lie in one buffer, as long as the
    longest; residuals and stashes in one for each class and part, with slots for all
    microbatches."""

    def __init__(
        self,
        table: TickTable,
        classes: Sequence[Sequence[Operations]],
        head: SharedHead | None = None,
    ):
        self.table, self.classes, self.head, first = table, classes, head, classes[0][0]
        self.every = [ops for parts in classes for ops in parts]
        self.params, self.stacked, self.chunks = first.params, first.stacked, first.chunks
        counts = [jax.tree.leaves(parts[0].batches)[0].shape[0] for parts in classes]
        self.class_of = np.repeat(np.arange(len(classes)), counts)
        self.place = np.concatenate([np.arange(n) for n in counts])
        longest = max((parts[0] for parts in classes), key=lambda ops: ops.x.size)
        self.message = longest.none["message"]
        self.none = {"skips": ()} | first.none | {"message": self.message}
        for name in ("aux", "layers"):
            self.none[name] = {k: x for ops in classes[0] for k, x in ops.none[name].items()}
        for name in ("residuals", "stash"):
            self.none[name] = [ops.none[name] for ops in self.every]
        self._check_permutes()

    def _check_permutes(self) -> None:
        """Raises ValueError for operations that permute. XLA's permute waits for all devices, also
        those that run another branch; on CPUs it then takes what is theirs."""
        if axes := sorted(set[str]().union(*(ops.permuted for ops in self.every))):
            raise ValueError(
                f"a stage permutes over {', '.join(axes)}, and the devices of pp run different "
                "operations in a tick: set context.plan to all_gather or ulysses (ring and usp "
                "permute), or mesh.pp=1"
            )

    def __call__(self) -> tuple[Array, Any, Aux, Aux]:
        """(loss, gradients, aux, aux of the layers) of this device."""
        none, parts, v = self.none, self.table.parts, self.chunks
        slots = [parts[n % len(parts)] for n in range(len(self.every))]

        def slotted(zeros: Any, n: int) -> Any:
            return jax.tree.map(lambda x: jnp.stack([x] * (n + 1)), zeros)

        start = (
            slotted(none["message"], self.table.slots.messages),
            [slotted(x, s.residuals) for x, s in zip(none["residuals"], slots, strict=True)],
            [slotted(x, s.stashes) for x, s in zip(none["stash"], slots, strict=True)],
            slotted(none["skips"], self.table.skips),
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
        self, parts: Sequence[Operations], at: dict[str, Array], box: Any, *held: Any
    ) -> list[Callable[[], Any]]:
        """The operations of a class, padded with zeros, in the order of the table's kinds. held:
        slots of residuals, stashes and skips."""
        none, k, c = self.none, at["place"], at["chunk"]
        kept, stashed, skips = held

        def padded(ops: Operations, found: dict[str, Any]) -> dict[str, Any]:
            n = self.every.index(ops)
            found = found | {name: none[name] | found.get(name, {}) for name in ("aux", "layers")}
            if "message" in found:
                found["message"] = _padded(found["message"], self.message)
            for name in ("residuals", "stash"):
                if name in found:
                    found[name] = [*none[name][:n], found[name], *none[name][n + 1 :]]
            return none | found

        def given(reads: bool) -> Any:
            message = _unpadded(_take(box, at["input"]), parts[0].x)
            return (message, _take(skips, at["skip"])) if reads else message

        def forward(ops: Operations, first: bool = False) -> Callable[[], Any]:
            return lambda: padded(ops, ops.forward(k, c, given(ops.reads == "F"), first))

        def backward(ops: Operations, first: bool = False, last: bool = False) -> Callable[[], Any]:
            def run() -> dict[str, Any]:
                n = self.every.index(ops)
                residuals = _take(kept[n], at["residual"])
                x = given(ops.reads == "B")
                return padded(ops, ops.backward(k, c, x, residuals, first, last))

            return run

        def weights(ops: Operations, first: bool = False) -> Callable[[], Any]:
            mine = stashed[self.every.index(ops)]
            return lambda: padded(ops, ops.weights(c, _take(mine, at["stash"]), first))

        rise, fall = parts[0], parts[-1]  # the same where the model is one part
        found = {
            IDLE: lambda: none,
            FIRST_F: forward(rise, True),
            F: forward(rise),
            B: backward(rise),
            FIRST_B: backward(rise, True),
            LAST_B: backward(fall, last=self.head is None),
            W: weights(rise),
            TURN_F: forward(fall, True),
            FALL_F: forward(fall),
            FALL_B: backward(fall),
            TURN_B: backward(fall, True),
            FALL_W: weights(fall),
            TURN_W: weights(fall, True),
        }
        return [found[i] for i in range(self.table.branches)]

    def _tick(self, carry: Any, of_tick: Any) -> tuple[Any, None]:
        box, *held, loss, aux, grads, layers = carry
        row, head = of_tick
        kept, stashed, skips = held
        at, parts = dict(zip(self.table.fields, row, strict=True)), self.table.parts
        mine = jnp.asarray(self.class_of)[at["microbatch"]]
        at["place"] = jnp.asarray(self.place)[at["microbatch"]]
        every = [b for ops in self.classes for b in self._branches(ops, at, box, *held)]
        out = jax.lax.switch(at["kind"] + self.table.branches * mine, every)
        own = len(parts) * mine + at["chunk"] if len(parts) > 1 else mine
        message, zero = out["message"], self.message
        plus = shift(jnp.where(at["send"] == NEXT, message, zero), "pp", 1)
        minus = shift(jnp.where(at["send"] == PREVIOUS, message, zero), "pp", -1)
        if self.head is not None:
            y = _take(box, at["input"])
            message, (loss, aux, grads) = self.head.run(head, y, message, (loss, aux, grads))
        for name, x in (("plus", plus), ("minus", minus), ("own", message)):
            box = _put(box, at[name], x)

        def put(buffers: list[Any], name: str, slot: Array, of: str) -> list[Any]:
            unused = [getattr(parts[n % len(parts)], of) for n in range(len(buffers))]
            at_n = [jnp.where(own == n, slot, last) for n, last in enumerate(unused)]
            return [_put(b, i, x) for b, i, x in zip(buffers, at_n, out[name], strict=True)]

        add = partial(_add, at["chunk"])
        whole = jax.tree.map(lambda _: True, layers)
        return (
            box,
            put(kept, "residuals", at["residual"], "residuals"),
            put(stashed, "stash", at["stash"], "stashes"),
            _put(skips, at["skip"], out["skips"]) if self.table.halves else skips,
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


def types(f: Callable[[], Any], permuted: set[str] | None = None) -> Any:
    """Abstract values of the results of `f`, with the axes over which they vary. The axes over
    which it permutes are added to `permuted`."""
    closed, shapes = jax.make_jaxpr(f, return_shape=True)()
    if permuted is not None:
        permuted.update(_permuted(closed.jaxpr))
    return jax.tree.unflatten(jax.tree.structure(shapes), closed.out_avals)


def _permuted(jaxpr: Any) -> Iterator[str]:
    """Axes of the permutes in a jaxpr, also inside its equations."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            axes = eqn.params["axis_name"]
            yield from (axes,) if isinstance(axes, str) else axes
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _permuted(inner)


def blank(types: Any) -> Any:
    """Zeros of these types."""
    return jax.tree.map(lambda t: vary(jnp.zeros(t.shape, t.dtype), tuple(t.mat.varying)), types)


def _take(slots: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), slots)


def _put(slots: Any, i: Array, value: Any) -> Any:
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, i, 0), slots, value)
