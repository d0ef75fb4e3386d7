"""Routers of a mixture of experts: which experts a token visits, and with what weight.

All arithmetic is in float32, also in products on accelerators, and equal on all devices of tp. Ties
go to the expert with the lower id. A router may read the noise level r of a sequence of a diffusion
model, the share of its tokens that are masked: features of r shift the logits ("additive"),
modulate the input ("film"), mix several matrices ("low_rank") or gate groups of experts ("group").
What reads r starts at zero, so that every router starts as the plain one; "group" starts with its
first `kept` groups open.

Legend: B sequences, L positions (local over cp), D width, E experts, K choices of a token, N noise
features, G groups."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdp.collectives import all_gather, index, size
from fdp.count.counts import GATHER, REDUCE, SCATTER, Counts, Degrees, Ledger, Rows, Work
from fdp.models.layers import normal, zeros
from fdp.models.module import Module, compact
from fdp.models.shape import ModelShape

Array = jax.Array
FEATURES = 8  # of the noise level: cos(πjr), j < 8
RANK = 4  # matrices that "low_rank" mixes, with the first of these features
NOISE = ("none", "additive", "film", "low_rank", "group")


class Routed(NamedTuple):
    """What a router says of [B, L] tokens.

    ids: int32 [B, L, K], -1 for no expert. gates: f32 [B, L, K]. logits, scores: f32 [B, L, E], of
    this device's share of the sequence over tp under sequence parallelism. pairs: most (token,
    expert) pairs that a device can have, static. each: most of them for one expert."""

    ids: Array
    gates: Array
    logits: Array
    scores: Array
    pairs: int
    each: int


@dataclass(frozen=True)
class Routing:
    """How tokens and experts are matched.

    choice: "token" (a token takes its `topk` best experts) or "expert" (an expert takes its best
    tokens of a sequence; Zhou et al. 2022). score: softmax | sigmoid over experts. normalise: the
    gates of a token sum to `scale`; otherwise they are scores times `scale`. groups: the best
    `kept` groups take part, by the `best` highest scores of each (DeepSeek-V2: 1, V3: 2). bias: a
    state that is added for the selection only. low, high: expert choice at mask share r takes
    low + (high - low)(1 - r) experts a token on average; 0: topk. noise: one of NOISE; "group"
    keeps `kept` of `groups` by the noise level alone, and deals experts to groups like cards, so
    that a rank of ep has some of each. blind: the router reads r = 0 in place of r, a control."""

    experts: int
    topk: int
    choice: str = "token"
    score: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    kept: int = 1
    best: int = 1
    bias: bool = False
    low: float = 0.0
    high: float = 0.0
    noise: str = "none"
    blind: bool = False

    def __post_init__(self) -> None:
        E, K, G, kept = self.experts, self.topk, self.groups, self.kept
        if not 1 <= K <= E:
            raise ValueError(f"topk={K} is not within 1..experts={E}: set topk={min(max(K, 1), E)}")
        if E % G or not 1 <= kept <= G:
            raise ValueError(
                f"{E} experts in {G} groups of which {kept} are kept: groups must divide experts "
                "and kept lie within 1..groups; set groups=1 and kept=1"
            )
        if kept * (E // G) < K:
            raise ValueError(
                f"topk={K} > kept·experts/groups = {kept}·{E}/{G} = {kept * E // G}: the kept "
                f"groups hold too few experts; set kept={-(-K * G // E)}"
            )
        if not 1 <= self.best <= E // G:
            raise ValueError(
                f"best={self.best} scores of a group of experts/groups = {E}/{G} = {E // G}: set "
                "best=1"
            )
        if not 0 <= self.range[0] <= self.range[1] <= E:
            raise ValueError(
                f"low={self.low} and high={self.high}: 0 ≤ low ≤ high ≤ experts = {E} must hold"
            )

    @property
    def range(self) -> tuple[float, float]:
        """Experts per token at r = 1 and at r = 0 under expert choice."""
        return self.low or float(self.topk), self.high or float(self.topk)

    def most(self, length: int) -> int:
        """Most tokens that an expert takes of a sequence of `length`."""
        return min(length, -(-int(length * self.range[1]) // self.experts))

    def columns(self) -> int:
        """K of `Routed.ids`: every expert may choose a token."""
        return self.experts if self.choice == "expert" else self.topk


def features(noise_B: Array, n: int) -> Array:
    """Cosines of the noise level in [0, 1]: f32 [B, n]; the first is constant."""
    return jnp.cos(jnp.pi * noise_B[:, None] * jnp.arange(n))


def by_token(routing: Routing, score_E: Array, select_E: Array, ids: Array | None) -> Any:
    """(ids, gates) [..., K] of the tokens' best experts by `select_E`; `ids` replays a choice."""
    if ids is None:
        _, ids = jax.lax.top_k(select_E, routing.topk)
    gates = jnp.take_along_axis(score_E, ids, -1)
    if routing.normalise:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return ids.astype(jnp.int32), gates * routing.scale


def by_expert(routing: Routing, score_BxLxE: Array, index_L: Array, noise_B: Array | None) -> Any:
    """(ids, gates) [B, L, E] of the experts' best tokens of every sequence. The scores of all of
    cp's positions are gathered; equal ones are ordered by `index_L`."""
    whole = all_gather(score_BxLxE, "cp", dim=1)
    index_S = all_gather(index_L, "cp", dim=0)
    B, S, E = whole.shape
    row, place = (
        jnp.broadcast_to(x[:, None], whole.shape) for x in (jnp.arange(S, dtype=jnp.int32), index_S)
    )
    worst_first = -jax.lax.stop_gradient(whole)
    order = jax.lax.sort((worst_first, place, row), dimension=1, num_keys=2)[2]
    low, high = routing.range
    r_B = jnp.zeros(B) if noise_B is None else noise_B
    share_B = jnp.round((low + (high - low) * (1 - r_B)) * S / E)
    take_B = jnp.minimum(share_B, routing.most(S)).astype(jnp.int32)
    chosen = jnp.argsort(order, axis=1) < take_B[:, None, None]
    L = len(index_L)
    chosen = jax.lax.dynamic_slice_in_dim(chosen, index("cp") * L, L, 1)
    ids = jnp.where(chosen, jnp.arange(E, dtype=jnp.int32), -1)
    return ids, jnp.where(chosen, score_BxLxE, 0.0) * routing.scale


def best_groups(routing: Routing, select_E: Array) -> Array:
    """`select_E` with -inf for the experts of groups that are not kept (DeepSeek-AI 2024)."""
    r = routing
    if r.groups == 1:
        return select_E
    by_group = select_E.reshape(*select_E.shape[:-1], r.groups, -1)
    value_G = jax.lax.top_k(by_group, r.best)[0].sum(-1)
    keep_G = _kept(value_G, r.kept)
    return jnp.where(keep_G[..., None], by_group, -jnp.inf).reshape(select_E.shape)


def _kept(value_G: Array, kept: int) -> Array:
    """Whether a value is among the `kept` largest: bool [..., G]."""
    _, ids = jax.lax.top_k(value_G, kept)
    return jax.nn.one_hot(ids, value_G.shape[-1], dtype=bool).any(-2)


class Router(Module):
    """Scores of experts and what follows from them: `(x, where, replay) → Routed`.

    `replay`: int [B, L, K], ids to use in place of the router's own; the gates are still its own.
    Raises ValueError for a replay where experts choose: their columns are not choices of a token.
    State "bias" f32 [E], with `routing.bias`: changed by a rule, never by a gradient."""

    shape: ModelShape
    routing: Routing

    @compact
    def __call__(self, x_BxLxD: Array, where: Any, replay: Array | None = None) -> Routed:
        r, E = self.routing, self.routing.experts
        if replay is not None and r.choice == "expert":
            raise ValueError(
                "replayed ids are choices of tokens, but with choice='expert' experts choose: set "
                "choice='token', or replay none"
            )
        own, open_G = self._logits(x_BxLxD.astype(jnp.float32), where)
        split = self.shape.sequence_parallel
        logits = all_gather(own, "tp", dim=1) if split else own
        scores = _scores(r, logits)
        select = scores
        if r.bias:
            select = select + self.model_state("bias", jnp.zeros, (E,), (None,))
        if open_G is not None:
            keep_E = jnp.tile(_kept(open_G, r.kept), E // r.groups)
            select = jnp.where(keep_E, select, -jnp.inf)
        elif r.choice == "token":
            select = best_groups(r, select)
        B, L = logits.shape[:2]
        if r.choice == "expert":
            length = L * size("cp")
            each = B * min(r.most(length), L)
            ids, gates = by_expert(r, scores, where.index, where.noise)
            return Routed(ids, gates, own, _scores(r, own), E * each, each)
        ids, gates = by_token(r, scores, select, replay)
        tokens = B * L
        return Routed(ids, gates, own, _scores(r, own), tokens * r.topk, tokens)

    def _logits(self, x_BxLxD: Array, where: Any) -> tuple[Array, Array | None]:
        """(logits [B, L, E], openness of groups [B, 1, G] or None) of this device's positions."""
        r, (D, E) = self.routing, (x_BxLxD.shape[-1], self.routing.experts)
        w = self.weight("w", normal(D**-0.5), (D, E), (None, None), decay=False)
        if r.noise == "none":
            return _dot(x_BxLxD, w), None
        noise_B = jnp.zeros_like(where.noise) if r.blind else where.noise
        phi_BxN = features(noise_B, FEATURES)

        def extra(name: str, *dims: int) -> Array:
            return self.weight(name, zeros, dims, (None,) * len(dims), decay=False)

        if r.noise == "film":
            scale, shift = jnp.split(_dot(phi_BxN, extra("film", FEATURES, 2 * D)), 2, -1)
            return _dot(x_BxLxD * (1 + scale[:, None]) + shift[:, None], w), None
        logits = _dot(x_BxLxD, w)
        if r.noise == "additive":
            return logits + _dot(phi_BxN, extra("shift", FEATURES, E))[:, None], None
        if r.noise == "low_rank":
            more, exact = extra("more", RANK - 1, D, E), jax.lax.Precision.HIGHEST
            each = jnp.einsum("bld,nde->blne", x_BxLxD, more, precision=exact)
            mixed = jnp.einsum("blne,bn->ble", each, phi_BxN[:, 1:RANK], precision=exact)
            return logits + mixed, None
        open_G = jax.nn.log_softmax(_dot(phi_BxN, extra("open", FEATURES, r.groups)), -1)[:, None]
        return logits + jnp.tile(open_G, E // r.groups), open_G

    def weights(self, width: int) -> int:
        """Number of parameters."""
        r, E = self.routing, self.routing.experts
        more = {
            "none": 0,
            "additive": FEATURES * E,
            "film": FEATURES * 2 * width,
            "low_rank": (RANK - 1) * width * E,
            "group": FEATURES * r.groups,
        }
        return width * E + more[r.noise]

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """Every device of tp routes all tokens of its rows, or its share of them under sequence
        parallelism, where the weights' gradients are reduced over tp and the logits gathered."""
        s, r, E = self.shape, self.routing, self.routing.experts
        tokens, D = rows.positions, s.width
        matrices = 1 + (RANK - 1 if r.noise == "low_rank" else 0)
        once = {"additive": E, "film": 2 * D, "group": r.groups}.get(r.noise, 0) * FEATURES
        flops = 2 * tokens * D * E * matrices + 2 * rows.batch * once
        if r.noise == "low_rank":
            flops += 2 * tokens * E * (RANK - 1)
        there, back = Ledger(degrees), Ledger(degrees)
        mine = rows.tokens(degrees)
        if s.sequence_parallel:
            there.add(GATHER, ("tp",), 4 * mine * E / degrees["tp"])
            back.add(SCATTER, ("tp",), 4 * mine * E / degrees["tp"])
            back.add(REDUCE, ("tp",), 4 * self.weights(D))
        shared = Ledger(degrees)
        if r.choice == "expert":
            there.add(GATHER, ("cp",), 4 * mine * E)
            shared.add(GATHER, ("cp",), 4 * rows.length / degrees["cp"])  # positions
        forward = Work(flops, replicated=0 if s.sequence_parallel else flops, sent=there.sent)
        saved = mine * (4 * D + 3 * 4 * E)
        backward = forward.backward(back.sent)
        return Counts(self.weights(D), forward, backward, once=shared.sent, saved=saved)


def _dot(x: Array, w: Array) -> Array:
    """x w. By default a TPU rounds both to bfloat16 and a GPU to TF32, which changes choices."""
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)


def _scores(r: Routing, logits_E: Array) -> Array:
    return jax.nn.sigmoid(logits_E) if r.score == "sigmoid" else jax.nn.softmax(logits_E, -1)
