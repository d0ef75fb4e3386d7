"""Selective all-reduce across denoising steps: of every all-reduce over tp, send only the rows that
this step needs.

Between two denoising steps few tokens change, and few positions are read. For every row-parallel
sum, each device keeps the other devices' share of each row as of the last time that row was sent
(`rest`). A row that is not sent adds its own fresh partial product to that stale rest. All devices
of a tp group agree on the rows to send:

- Rows whose token has just changed, and rows that this step will read. The noise is counter-based,
  so the positions about to be revealed are known before the forward pass. The last layer sends only
  rows that are read.
- Of the others, those with the largest score under a rule. "drift": how far the partial products
  have moved since the row was last sent (Σ over devices, one float a row on the wire).
  "attention": the attention mass on changed rows. "window": nearness to a changed row.

Rows are chosen among all sequences of a device, in a static number. With every row sent this is the
exact sum, bit for bit. Sampling only: gradients through stale sums would be biased.

Legend: B sequences and L positions of this device, D width, A rows sent."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import psum, vary
from fdp.models.attention import Attention
from fdp.models.layers import SwiGLU
from fdp.models.module import Module, compact, run
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, Layer, layer
from fdp.models.transformer import Transformer
from fdp.parallel.wire import int8_psum

Array = jax.Array
Cache = Any
RULES = ("drift", "attention", "window")


@dataclass(frozen=True)
class Policy:
    """How the sums over tp are made while sampling.

    kind: "exact" (everything, every step), "rows" (a share `rows` of the inner layers' rows by
    `rule`; 1.0 is exact), "stale" (nothing between refreshes) or "channels" (every `refresh`-th
    channel in turn, the rest stale). `refresh`: every how many steps everything is sent; 0 = only
    in the first. `skip`: rows not sent keep their whole old sum, which is what a feature cache that
    skips tokens computes. `lean`: the last layer sends only rows that are read. `int8`: what is
    sent, is quantised. Raises ValueError for unknown words, a share outside [0, 1] or channels
    without turns."""

    name: str
    kind: str = "rows"
    rule: str = "drift"
    rows: float = 1.0
    refresh: int = 0
    skip: bool = False
    lean: bool = True
    int8: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "rows", "stale", "channels") or self.rule not in RULES:
            raise ValueError(
                f"policy {self.name!r}: kind {self.kind!r} or rule {self.rule!r} is unknown"
            )
        if not 0 <= self.rows <= 1:
            raise ValueError(
                f"policy {self.name!r}: rows = {self.rows} is not a share of the rows, in [0, 1]"
            )
        if self.refresh < 0 or (self.kind == "channels" and self.refresh < 1):
            raise ValueError(
                f"policy {self.name!r}: refresh = {self.refresh} steps; set refresh=2 or more"
            )

    def full(self, step: Array) -> Array:
        """Whether `step` sends everything: bool []. Channels take turns instead of refreshing."""
        first = (step == 0) | (self.kind == "exact")
        return (
            first | (step % self.refresh == 0)
            if self.refresh and self.kind != "channels"
            else first
        )

    def refreshes(self, steps: int) -> int:
        """How many of `steps` send everything."""
        if self.kind == "exact":
            return steps
        return math.ceil(steps / self.refresh) if self.refresh and self.kind != "channels" else 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepRows:
    """What all devices of a tp group know of a denoising step: rows changed and rows to be read,
    bool, its number.
    """

    changed_BxL: Array
    read_BxL: Array
    number: Array

    def forced(self, which: str) -> Array:
        """Rows that must be sent: "changed", "read" or "changed or read"."""
        rows = {"changed": self.changed_BxL, "read": self.read_BxL}
        return rows[which] if which in rows else self.changed_BxL | self.read_BxL


class SelectiveSum(Module):
    """Replaces the all-reduce over tp (`fdp.models.layers.Reduction`), with its state in the cache.

    `capacity`: rows sent. Those that `StepRows.forced` names come first, at most `capacity`; where
    there are as many (`spare` False), no other row is looked at. `given` None sends all.
    """

    shape: ModelShape
    policy: Policy
    capacity: int
    forced: str
    spare: bool

    @compact
    def __call__(
        self, partial_BxLxD: Array, layer: str, attended: Any = None, given: StepRows | None = None
    ) -> Array:
        partial_BxLxD = vary(partial_BxLxD, "tp")

        def keep(rest: Array, own: Array) -> None:
            self.cache(f"{layer}_rest", rest)
            self.cache(f"{layer}_own", own)

        if given is None:
            total = self._sum(partial_BxLxD)
            keep(total - partial_BxLxD, partial_BxLxD)
            self.cache("mass", jnp.zeros_like(partial_BxLxD[..., 0], jnp.float32))
            return total
        rest, own = self.cached(f"{layer}_rest"), self.cached(f"{layer}_own")
        stale_BxLxD = (own if self.policy.skip else partial_BxLxD) + rest
        if self.policy.kind == "channels":
            return self._channels(partial_BxLxD, rest, layer, given)
        if self.capacity == 0:
            return stale_BxLxD
        score_BxL: Any = jnp.float32(0)
        if self.spare:
            score_BxL = self._score(partial_BxLxD - own, attended, given)
        score_BxL = jnp.where(given.forced(self.forced), jnp.inf, score_BxL)
        _, rows_A = jax.lax.top_k(score_BxL.reshape(-1), self.capacity)
        sent_AxD = partial_BxLxD.reshape(-1, partial_BxLxD.shape[-1])[rows_A]
        total_AxD = self._sum(sent_AxD)

        def put(x: Array, new: Array) -> Array:
            return x.reshape(-1, x.shape[-1]).at[rows_A].set(new).reshape(x.shape)

        keep(put(rest, total_AxD - sent_AxD), put(own, sent_AxD))
        return put(stale_BxLxD, total_AxD)

    def _sum(self, partial: Array) -> Array:
        return vary(int8_psum(partial, "tp") if self.policy.int8 else psum(partial, "tp"), "tp")

    def _score(self, moved_BxLxD: Array, attended: Any, step: StepRows) -> Array:
        """Who else needs sending, f32 [B, L], equal on every device of the tp group."""
        changed_BxL = step.changed_BxL.astype(jnp.float32)
        if self.policy.rule == "drift":
            return psum((moved_BxLxD.astype(jnp.float32) ** 2).sum(-1), "tp")
        if self.policy.rule == "window":
            position_L = jnp.arange(changed_BxL.shape[1])
            distance_LxL = jnp.abs(position_L[:, None] - position_L)
            far = jnp.where(step.changed_BxL[:, None, :], distance_LxL, distance_LxL.size)
            return -1.0 * far.min(-1)
        if attended is not None:  # once a layer, before its FFN: both sublayers send the same rows
            mass = psum(attended(changed_BxL).astype(jnp.float32), "tp")
            self.cache("mass", vary(mass, "tp"))
        return self.cached("mass")

    def _channels(self, partial_BxLxD: Array, rest: Array, layer: str, step: StepRows) -> Array:
        """Partial synchronisation (as in CAAT-Net, there trained): the channels whose turn it is,
        the rest stale.
        """
        ways, D = self.policy.refresh, partial_BxLxD.shape[-1]
        if D % ways:
            raise ValueError(f"width {D} is not divisible by refresh = {ways} groups of channels")
        turn = step.number % ways

        def group(x: Array) -> Array:
            return x.reshape(*x.shape[:-1], ways, D // ways)

        sent = jax.lax.dynamic_index_in_dim(group(partial_BxLxD), turn, -2, keepdims=False)
        total = self._sum(sent)

        def put(x: Array, new: Array) -> Array:
            axis = x.ndim - 1
            return jax.lax.dynamic_update_index_in_dim(group(x), new, turn, axis).reshape(x.shape)

        rest = put(rest, total - sent)
        self.cache(f"{layer}_rest", rest)
        return put(partial_BxLxD + rest, total)


def capacities(policy: Policy, layers: int, rows: int, per_step: int, length: int) -> list[int]:
    """Rows that each site sends between refreshes: the embedding, then every layer. `rows` = B·L of
    a device.

    Raises ValueError where the share cannot hold the rows that must be sent: those changed and
    those read."""
    if policy.kind == "stale":
        return [0] * (layers + 1)
    read = rows // length * per_step
    if policy.kind != "rows":
        return [rows] * (layers + 1)
    inner = round(policy.rows * rows)
    if inner < min(2 * read, rows):
        raise ValueError(
            f"policy {policy.name!r}: rows·B·L = {policy.rows}·{rows} = {inner} rows cannot hold "
            "the changed and read "
            f"rows, 2·{read}: set rows={min(2 * read / rows, 1):.3f} or more"
        )
    return [read] + [inner] * (layers - 1) + [read if policy.lean else inner]


def selective(model: Transformer, policy: Policy, sizes: tuple[int, ...]) -> Transformer:
    """`model` with selective sums: `sizes` rows of the embedding, then of every layer.

    A pattern of unlike blocks, because the last one sends other rows than the rest.
    """
    core, last = replace(model.softmax, keeps=False), len(sizes) - 1

    def sums(i: int) -> Layer:
        lean = policy.lean and i == last
        # The embedding and every layer but the last carry what later layers read of changed rows.
        forced = "changed" if i == 0 else "read" if lean else "changed or read"
        fields = {"capacity": sizes[i], "forced": forced, "spare": i > 0 and not lean}
        return layer(SelectiveSum, policy=policy, **fields)

    mixing, ffn = layer(Attention, core=core), layer(SwiGLU)
    pattern = [layer(Block, mixing=mixing, ffn=ffn, reduction=sums(i)) for i in range(1, last + 1)]
    return model.clone(pattern=tuple(pattern), reduction=sums(0))


def forward(
    model: Transformer,
    params: Any,
    z_BxL: Array,
    cache: Cache | None,
    policy: Policy,
    per_step: int,
    step: StepRows | None,
) -> tuple[Array, Cache]:
    """Final normed activations [B, L, D] and the new cache; `step` None sends everything (and fills
    a first cache).
    """
    layers, length, stacked = model.shape.layers, z_BxL.shape[1], params["layers"]
    sizes = capacities(policy, layers, z_BxL.size, per_step, length)
    every = {str(i): jax.tree.map(lambda p, i=i: p[i : i + 1], stacked) for i in range(layers)}
    args = z_BxL, jnp.zeros(len(z_BxL)), None, None, step
    sums = selective(model, policy, tuple(sizes))
    given = {"params": {**params, "layers": every}}
    out, _, cache = run(sums, given, *args, method="hidden", cache=cache, keep_cache=True)
    return out, cache
