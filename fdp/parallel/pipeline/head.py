"""Operation S: the share that a device of pp has in the output head of a microbatch (Yeung et al.
2024, "Balancing Pipeline Parallelism with Vocabulary Parallelism").

Legend: p devices of pp, m microbatches, k one of them, y output of the last virtual stage, V
vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdp.collectives import broadcast, index, vary
from fdp.grads import LOSS_AXES, Stages
from fdp.mesh import DATA_AXES

Array = jax.Array
Sums = tuple[Array, Any, Any]  # loss, aux, gradients: what ticks add up


class SharedHead(NamedTuple):
    """S on this device. `params`, and `batches` with a leading dim of microbatches, are typed equal
    over pp where they are: then the transpose of each sum over pp is the one that the gradients of
    y and of all other weights need, and the gradient of the head's own shard stays local.

    holder: the device of pp that has y."""

    stages: Stages
    params: Any
    batches: Any
    holder: int

    def run(self, k: Array, y: Array, message: Array, sums: Sums) -> tuple[Array, Sums]:
        """S of microbatch k, or nothing where k < 0: (dy in place of the message, sums).

        Its collectives over pp stand in a conditional. That is safe because k is a number of the
        tick, not of the device: all devices of pp take the same branch in the same tick."""
        loss, aux, grads = sums
        leaves, tree = jax.tree.flatten(grads)
        read = self._read(y)
        mine = [x for x, r in zip(leaves, read, strict=True) if r]

        def shared(message: Array, sums: Any) -> tuple[Array, Any]:
            dy, loss, aux, mine = self._gradients(k, y, read)
            aux = {name: jax.tree.map(jnp.add, sums[1][name], x) for name, x in aux.items()}
            total = jax.tree.map(jnp.add, (sums[0], sums[2]), (loss, mine))
            return dy, (total[0], sums[1] | aux, total[1])

        def nothing(message: Array, sums: Any) -> tuple[Array, Any]:
            return message, sums

        message, (loss, aux, mine) = jax.lax.cond(
            k >= 0, shared, nothing, message, (loss, aux, mine)
        )
        return message, (loss, aux, jax.tree.unflatten(tree, _merged(leaves, mine, read)))

    def _gradients(self, k: Array, y: Array, read: Sequence[bool]) -> tuple[Array, Array, Any, Any]:
        """(dy, loss, aux, gradients of the parameters that are read) as this device adds them up:
        what all devices of pp compute alike counts on the holder alone."""
        leaves, tree = jax.tree.flatten(self.params)

        def score(mine: list[Array], y: Array) -> tuple[Array, Any]:
            return self._score(jax.tree.unflatten(tree, _merged(leaves, mine, read)), y, k)

        mine = [x for x, r in zip(leaves, read, strict=True) if r]
        find = jax.value_and_grad(score, (0, 1), has_aux=True)
        (loss, aux), (grads, dy) = find(mine, broadcast(y, "pp", self.holder))

        def once(x: Array) -> Array:
            return vary(jnp.where(index("pp") == self.holder, x, 0), LOSS_AXES)

        grads = [g if "pp" in jax.typeof(g).mat.varying else once(g) for g in grads]
        return vary(dy, LOSS_AXES), once(loss), jax.tree.map(once, aux), grads

    def _score(self, params: Any, y: Array, k: Any) -> tuple[Array, Any]:
        noised = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, k, 0, False), self.batches)
        loss, aux, penalty = self.stages.score(params, y, noised)
        return vary(loss if penalty is None else loss + penalty, DATA_AXES), aux

    def _read(self, y: Array) -> list[bool]:
        """Of each parameter, whether `score` reads it: the others stay out of the conditional."""
        return reads(lambda params: self._score(params, y, 0), self.params)


def reads(f: Callable[[Any], Any], params: Any) -> list[bool]:
    """Whether a function reads each leaf of its argument."""
    jaxpr = jax.make_jaxpr(f)(params).jaxpr
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    used |= {id(v) for v in jaxpr.outvars}
    return [id(v) in used for v in jaxpr.invars]


def _merged(whole: Sequence[Array], some: Sequence[Array], mask: Sequence[bool]) -> list[Array]:
    """`whole` with `some` where the mask is true."""
    given = iter(some)
    return [next(given) if m else x for x, m in zip(whole, mask, strict=True)]
