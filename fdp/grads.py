"""How loss and gradients of one step are computed, as a value. `plain` accumulates microbatches.

A gradient function works on the stages of a model on one device, so that a pipeline schedule can be
such a value too."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fdp.collectives import broadcast, index, shift, size, vary, vary_like

LOSS_AXES = ("pp", "dp", "ep", "cp")
Aux = dict[str, Any]
Penalty = jax.Array | None


def _whole(noised: Any) -> tuple[Any, ...]:
    return (noised,)


def _as_it_is(params: Any, noised: Any) -> Any:
    return noised


class Skips(NamedTuple):
    """The layers of a model whose second half reads what the first has kept, as in a U-ViT.

    rise: (params, x, noised) → ((x, skips), aux, penalty); middle: (params, x, noised) → (x, aux,
    penalty); fall: (params, (x, skips), noised) → (x, aux, penalty). rise and fall are those of
    this pp shard."""

    rise: Callable[[Any, Any, Any], tuple[Any, Aux, Penalty]]
    middle: Callable[[Any, Any, Any], tuple[Any, Aux, Penalty]]
    fall: Callable[[Any, Any, Any], tuple[Any, Aux, Penalty]]


class Stages(NamedTuple):
    """The stages of a model on this device's share of a microbatch, pure in the parameters.

    embed: (params, noised) → (x, aux, penalty); stack: (params, x, noised) → (x, aux, penalty),
    this pp shard's layers; score: (params, x, noised) → (this device's part of the mean loss, aux,
    penalty). A penalty is a scalar that a stage adds to the loss, or None. parts: from a noised
    batch to those that one program each can run, where rows differ in what they cost. refine:
    (params, such a part) → the part with what a first pass, without gradient, adds to it.
    vocabulary: the first names of parameters whose vocabulary is sharded over pp; all devices of pp
    then run `score` at once, on the same x. skips: in place of `stack`, for a pipeline of a model
    that has some.
    """

    embed: Callable[[Any, Any], tuple[Any, Aux, Penalty]]
    stack: Callable[[Any, Any, Any], tuple[Any, Aux, Penalty]]
    score: Callable[[Any, Any, Any], tuple[jax.Array, Aux, Penalty]]
    parts: Callable[[Any], tuple[Any, ...]] = _whole
    refine: Callable[[Any, Any], Any] = _as_it_is
    vocabulary: tuple[str, ...] = ()
    skips: Skips | None = None

    def loss(self, params: Any, noised: Any) -> tuple[jax.Array, Aux]:
        """The sum of the losses and of the aux of all parts."""
        parts = self.parts(noised)
        shares = [_rows(part) / _rows(noised) for part in parts]
        found = [self.part_loss(params, *both) for both in zip(parts, shares, strict=True)]
        return jax.tree.map(lambda *x: sum(x[1:], x[0]), *found)

    def part_loss(self, params: Any, noised: Any, share: float = 1.0) -> tuple[jax.Array, Aux]:
        """All stages of one part, one after the other, with their penalties. `share`: of the rows
        over which a penalty is a mean."""
        noised = self.refine(params, noised)
        x, aux, first = self.embed(params, noised)
        x, of_layers, second = self.stack(params, x, noised)
        loss, of_outputs, third = self.score(params, x, noised)
        for penalty in (first, second, third):
            loss = loss if penalty is None else loss + share * penalty
        return loss, aux | of_layers | of_outputs


def relay(stages: Stages, params: Any, noised: Any) -> jax.Array:
    """This device's part of the mean loss, through all stages of pp one after the other.

    For evaluations: every device computes in every one of p rounds, and what it has in round i is
    true on device i. With skips there are p rounds back, for which the layers of the second half
    lie on devices in reverse."""
    way = _relayed if stages.skips is None else _there_and_back
    losses = [way(stages, params, part) for part in stages.parts(noised)]
    return sum(losses[1:], losses[0])


def _relayed(stages: Stages, params: Any, noised: Any) -> jax.Array:
    x, _, _ = stages.embed(params, noised)

    def one(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y = vary(stages.stack(params, x, noised)[0], LOSS_AXES)
        return shift(y, "pp"), y

    _, y = jax.lax.scan(one, vary(x, LOSS_AXES), None, length=size("pp"))
    last = broadcast(y[-1], "pp", size("pp") - 1) if stages.vocabulary else y[-1]
    loss, _, _ = stages.score(params, last, noised)
    return jnp.where(index("pp") == size("pp") - 1, loss, 0.0)


def _there_and_back(stages: Stages, params: Any, noised: Any) -> jax.Array:
    """Skips stay where they are, so what a device has kept in its round up is read in its round
    down."""
    assert stages.skips is not None
    rise, middle, fall = stages.skips

    def up(x: jax.Array, _: None) -> tuple[jax.Array, Any]:
        y, skips = vary(rise(params, x, noised)[0], LOSS_AXES)
        return shift(y, "pp"), (y, skips)

    def down(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y = vary(fall(params, (x, mine), noised)[0], LOSS_AXES)
        return shift(y, "pp", -1), y

    x = vary(stages.embed(params, noised)[0], LOSS_AXES)
    _, (y, skips) = jax.lax.scan(up, x, None, length=size("pp"))
    mine = jax.lax.dynamic_index_in_dim(skips, index("pp"), 0, False)
    x = vary(middle(params, y[-1], noised)[0], LOSS_AXES)
    _, y = jax.lax.scan(down, x, None, length=size("pp"))
    loss, _, _ = stages.score(params, y[-1], noised)
    return jnp.where(index("pp") == 0, loss, 0.0)


def _rows(noised: Any) -> int:
    return jax.tree.leaves(noised)[0].shape[0]


class Grads(Protocol):
    """(stages, parameters, noised batch of this device) → (part of the mean loss, gradients, aux).

    `microbatches`: into how many a device's examples are cut.
    """

    @property
    def microbatches(self) -> int: ...

    def __call__(self, stages: Stages, params: Any, noised: Any) -> tuple[jax.Array, Any, Aux]: ...


@dataclass(frozen=True)
class plain:
    """Forward and backward of one microbatch after the other, gradients and aux added up. For
    models that are not in stages: raises ValueError for pp > 1."""

    microbatches: int = 1

    def __call__(self, stages: Stages, params: Any, noised: Any) -> tuple[jax.Array, Any, Aux]:
        """As `Grads`."""
        if size("pp") > 1:
            raise ValueError(
                f"plain gradients run all layers on every device, but mesh.pp = {size('pp')} "
                "devices have a stage each: give Experiment.grads=scheduled(order), or mesh.pp=1"
            )
        find = jax.value_and_grad(stages.loss, has_aux=True)
        m = self.microbatches
        if m == 1:
            (loss, aux), grads = find(params, noised)
            return loss, grads, aux
        split = jax.tree.map(lambda x: x.reshape(m, x.shape[0] // m, *x.shape[1:]), noised)
        zeros = jax.tree.map(lambda p: vary_like(jnp.zeros_like(p), p), params)
        start = (vary(jnp.zeros(()), LOSS_AXES), zeros)

        def body(carry: Any, microbatch: Any) -> tuple[Any, Aux]:
            (loss, aux), grads = find(params, microbatch)
            return jax.tree.map(jnp.add, carry, (loss, grads)), aux

        (loss, grads), aux = jax.lax.scan(body, start, split)
        return loss, grads, jax.tree.map(lambda x: x.sum(0), aux)
