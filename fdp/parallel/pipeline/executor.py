"""A pipeline schedule as one SPMD program: a scan over the ticks of a static table.

Every device of pp looks up its operation of the tick and runs one branch of a conditional. Both
permutes over pp stand outside it, and so do the updates of slots and gradients; inside are only
collectives over axes whose devices run the same branch. Gradients are reduced over the data axes
once, after the last tick.

Legend: p devices of pp, m microbatches, x hidden states of a microbatch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import index, shift, size, vary
from fdp.grads import LOSS_AXES, Aux, Stages
from fdp.parallel.pipeline.schedules import Op
from fdp.parallel.pipeline.split import Halves, halves
from fdp.parallel.pipeline.table import FIELDS, NEXT, PREVIOUS, Table, table

Array = jax.Array
SUMS = ("loss", "grads", "aux")


@dataclass(frozen=True)
class scheduled:
    """Gradients by a pipeline schedule. order: one tuple of operations for each device of pp.

    Equal to `fdp.grads.plain` with as many microbatches."""

    order: tuple[tuple[Op, ...], ...]

    @property
    def microbatches(self) -> int:
        """m."""
        return 1 + max(op.microbatch for op in self.order[0])

    @cached_property
    def table(self) -> Table:
        """The static table."""
        p = len(self.order)
        return table(self.order, lambda u: (u % p, u // p), p)

    def __call__(self, stages: Stages, params: Any, noised: Any) -> tuple[Array, Any, Aux]:
        """As `fdp.grads.Grads`."""
        if size("pp") != len(self.order):
            raise ValueError(f"an order of {len(self.order)} stages on mesh.pp={size('pp')}")
        # Typed varying, parameters need no reduction inside a branch; its transpose is the one
        # reduction over pp and the data axes.
        mine, reduce = jax.vjp(lambda p: vary(p, LOSS_AXES), params)
        m = self.microbatches
        split = jax.tree.map(lambda x: x.reshape(m, x.shape[0] // m, *x.shape[1:]), noised)
        run = _Program(self.table, stages, mine, vary(split, LOSS_AXES))
        loss, grads, aux = run()
        return loss, reduce(grads)[0], aux


class _Program:
    """One step on this device."""

    def __init__(self, table: Table, stages: Stages, params: Any, microbatches: Any):
        self.table, self.stages, self.params, self.batches = table, stages, params, microbatches
        first = self._batch(0)
        self.x = _types(lambda: self._start(params, first)[0])
        found: list[Halves] = []

        def trace(params: Any, x: Array) -> tuple[()]:
            found.append(halves(self._blocks(first), params, x, "pp"))
            return ()

        jax.make_jaxpr(trace)(params, _blank(self.x))
        self.halves = found[0]
        self.none = self._none()

    def _batch(self, k: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, k, 0, False), self.batches)

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

    # Branches: what an operation computes; the rest of a tick's results is zero
    # ---------------------------------------------------------------------------------------------

    def forward(self, k: Array, message: Array, first: bool = False) -> dict[str, Any]:
        """F. The first stage embeds its microbatch."""
        noised, before, aux = self._batch(k), _scalar(None), {}
        if first:
            message, before, aux = self._start(self.params, noised)
        (y, penalty), residuals, of_blocks = self.halves.forward(
            self._blocks(noised), self.params, message
        )
        found = {"message": y, "residuals": residuals, "loss": before + penalty}
        return found | {"aux": aux | of_blocks}

    def backward(
        self, k: Array, message: Array, residuals: Any, first: bool = False, last: bool = False
    ) -> dict[str, Any]:
        """B. The last stage computes the loss before, the first one the gradients of the embedding
        after."""
        noised, one = self._batch(k), vary(jnp.ones(()), LOSS_AXES)
        found: dict[str, Any] = {}
        if last:
            find = jax.value_and_grad(self._score, (0, 1), has_aux=True)
            (loss, aux), (grads, message) = find(self.params, message, noised)
            found = {"loss": loss, "aux": aux, "grads": grads}
        dx, stash = self.halves.input_gradients(self.params, residuals, (message, one))
        if first:
            _, pull = jax.vjp(lambda p: self._start(p, noised)[:2], self.params)
            found["grads"] = pull((dx, one))[0]
        return found | {"message": dx, "stash": stash}

    def weights(self, stash: Any) -> dict[str, Any]:
        """W."""
        return {"grads": self.halves.weight_gradients(self.params, stash)}

    def _none(self) -> dict[str, Any]:
        """The zeros of every result."""
        k, x = jnp.zeros((), jnp.int32), _blank(self.x)
        found = _types(lambda: self.forward(k, x, first=True))
        residuals = _blank(found["residuals"])
        last = _types(lambda: self.backward(k, x, residuals, last=True))
        return _blank(found | last | {"aux": found["aux"] | last["aux"]})

    # Ticks
    # ---------------------------------------------------------------------------------------------

    def __call__(self) -> tuple[Array, Any, Aux]:
        """(loss, gradients, aux) of this device."""
        slots, none = self.table.slots, self.none

        def slotted(name: str, n: int) -> Any:
            return jax.tree.map(lambda x: jnp.stack([x] * (n + 1)), none[name])

        start = (
            slotted("message", slots.messages),
            slotted("residuals", slots.residuals),
            slotted("stash", slots.stashes),
            {name: none[name] for name in SUMS},
        )
        rows = jnp.asarray(self.table.rows, jnp.int32)[:, index("pp")]
        (*_, sums), _ = jax.lax.scan(self._tick, start, rows)
        return sums["loss"], sums["grads"], sums["aux"]

    def _tick(self, carry: Any, row: Array) -> tuple[Any, None]:
        box, kept, stashed, sums = carry
        at = dict(zip(FIELDS, row, strict=True))
        k = at["microbatch"]

        def padded(found: dict[str, Any]) -> dict[str, Any]:
            return self.none | found | {"aux": self.none["aux"] | found.get("aux", {})}

        def forward(first: bool) -> Callable[[], Any]:
            return lambda: padded(self.forward(k, _take(box, at["input"]), first))

        def backward(first: bool, last: bool) -> Callable[[], Any]:
            return lambda: padded(
                self.backward(k, _take(box, at["input"]), _take(kept, at["residual"]), first, last)
            )

        out = jax.lax.switch(
            at["kind"],
            [
                lambda: self.none,
                forward(True),
                forward(False),
                backward(False, False),
                backward(True, False),
                backward(False, True),
                lambda: padded(self.weights(_take(stashed, at["stash"]))),
            ],
        )
        message, zero = out["message"], self.none["message"]
        plus = shift(jnp.where(at["send"] == NEXT, message, zero), "pp", 1)
        minus = shift(jnp.where(at["send"] == PREVIOUS, message, zero), "pp", -1)
        for name, x in (("plus", plus), ("minus", minus), ("own", message)):
            box = _put(box, at[name], x)
        kept = _put(kept, at["residual"], out["residuals"])
        stashed = _put(stashed, at["stash"], out["stash"])
        sums = jax.tree.map(jnp.add, sums, {name: out[name] for name in SUMS})
        return (box, kept, stashed, sums), None


def _scalar(x: Any) -> Array:
    """A summand of the loss, typed varying; None is 0."""
    return vary(jnp.zeros(()) if x is None else x, LOSS_AXES)


def _types(f: Callable[[], Any]) -> Any:
    """Abstract values of the results of `f`, with the axes over which they vary."""
    closed, shapes = jax.make_jaxpr(f, return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shapes), closed.out_avals)


def _blank(types: Any) -> Any:
    """Zeros of these types."""
    return jax.tree.map(lambda t: vary(jnp.zeros(t.shape, t.dtype), tuple(t.mat.varying)), types)


def _take(slots: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), slots)


def _put(slots: Any, i: Array, value: Any) -> Any:
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, i, 0), slots, value)
