"""Speculative decoding of any chain (`fdp.sampling.chain`): steps are drafted, and the verifier
judges a whole window of states in one batch.

A window holds W states z_0 … z_{W-1}: where a sample is, and what W - 1 drafted steps would make of
it. The verifier takes the step after each. A round takes all steps up to the first that was
drafted otherwise, then the verifier's own: at least one, at most W. How a drafted step is judged:

- `shared`: by the verifier's step with the same noise. The ids are those of `chain.follow`,
  whatever drafts; nothing about the law has to be trusted.
- `coupling`: accepted with min(1, p_v/p_d), else drawn from norm(max(p_v - p_d, 0)) (Leviathan et
  al. 2023, per position). The law is the verifier's, the ids are others. Only for chains in which
  the noise alone decides which positions a step reveals, and for drafters that state p_d.

`jump` is the lossy third way: several steps at once, judged by edit distance.

The same code runs unsharded and inside shard_map, as chains do.

Shapes: W states of a window, B samples, L positions, R those that a step reveals at most, V
vocabulary (tp: V/tp columns)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fdp.collectives import psum, vary_like
from fdp.mesh import BATCH_AXES
from fdp.parallel.tensor import NEVER, suppress, vocab_gather, vocab_logsumexp
from fdp.sampling.chain import Ancestral, Chain, ChainState, Denoise, Info, anywhere, picked
from fdp.sampling.noise import categorical, uniform

Array = jax.Array
RULES = ("shared", "coupling")
DRAFT, ACCEPT, RESIDUAL = 1, 2, 3  # streams of noise that is not the chain's own


class Verdict(NamedTuple):
    """What the verifier said of a window. states: [W, B, …]; score_WxBxL and logits [W, B, L,
    V/tp]: the verifier's at each. taken_B: index of the last accepted state."""

    states: ChainState
    score_WxBxL: Array
    logits: Array
    taken_B: Array

    @property
    def logits_BxLxV(self) -> Array:
        """The verifier's at the last accepted state."""
        found: Array = at(self.logits, self.taken_B)
        return found


class Draft(NamedTuple):
    """The states after the first of a window, [W - 1, B, …]; logits [W - 1, B, L, V/tp] that their
    tokens were drawn from, or None; passes of the draft model, int32. bad: bool [W - 1, B], where
    it gave no numbers: such a step counts as rejected."""

    states: ChainState
    logits: Array | None = None
    passes: Array | int = 0
    bad: Array | None = None


class Drafter(Protocol):
    """Continues from a state; `verdict` None before the first round."""

    def draft(self, chain: Chain, state: ChainState, verdict: Verdict | None, many: int) -> Draft:
        """`many` = W - 1 steps from `state`."""
        ...


def at(tree: Any, index_B: Array) -> Any:
    """Entry index_B[b] of every sample b: [W, B, …] → [B, …]."""

    def one(x: Array) -> Array:
        shaped = index_B.reshape(1, -1, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, shaped, axis=0)[0]

    return jax.tree.map(one, tree)


def walk(
    chain: Chain, state: ChainState, many: int, after: Callable[[ChainState], ChainState]
) -> ChainState:
    """`many` steps of `after`, which takes a state to the next: [many, B, …]."""

    def step(state: ChainState, _: None) -> tuple[ChainState, ChainState]:
        state = chain.settle(after(state))
        return state, state

    return jax.lax.scan(step, state, None, length=many)[1]


@dataclass(frozen=True)
class StaleDrafter:
    """The verifier's marginals at the last accepted state, drawn from with the noise of each later
    step: no pass of any model. Before the first round nothing is known, and all states are
    alike."""

    def draft(self, chain: Chain, state: ChainState, verdict: Verdict | None, many: int) -> Draft:
        """As of `Drafter`."""
        if verdict is None:
            return Draft(_repeated(state, many))
        logits = verdict.logits_BxLxV
        return Draft(walk(chain, state, many, lambda s: chain.step(logits, s)))


@dataclass(frozen=True, eq=False)
class JacobiDrafter:
    """What the verifier itself proposed for the same step, at a state that was not quite right
    (Jacobi iteration along the chain). Steps that it has not judged yet are drafted by `model`:
    one pass of it for each step that any sample lacks. Without one, by the verifier's marginals at
    the last accepted state, as `StaleDrafter`, and no pass of any model."""

    model: "ModelDrafter | None" = None

    def draft(self, chain: Chain, state: ChainState, verdict: Verdict | None, many: int) -> Draft:
        """As of `Drafter`."""
        if verdict is None:
            return self._first(chain, state, many)
        stale, steps_WxB = verdict.logits_BxLxV, verdict.states.step_B

        def step(now: ChainState, _: None) -> tuple[ChainState, tuple]:
            # The state of the old window whose step this is, if it got that far.
            same_WxB = steps_WxB == now.step_B
            # Nothing is missing beyond the end of a chain, either.
            found_B, old_B = same_WxB.any(0) | ~chain.masked(now).any(1), same_WxB.argmax(0)
            fresh, bad_B, passes = self._fresh(chain, now, stale, anywhere(~found_B))
            old_BxL, new_BxL = at(verdict.score_WxBxL, old_B), chain.score(fresh, now)

            def rows(places_BxR: Array) -> Array:
                old = at(jax.vmap(picked, (0, None))(verdict.logits, places_BxR), old_B)
                return jnp.where(found_B[:, None, None], old, picked(fresh, places_BxR))

            score_BxL = jnp.where(found_B[:, None], old_BxL, new_BxL)
            after = chain.settle(chain.apply(score_BxL, rows, now))
            return after, (after, bad_B & ~found_B, passes)

        _, (states, bad, passes) = jax.lax.scan(step, state, None, length=many)
        return Draft(states, None, passes.sum(), bad)

    def _first(self, chain: Chain, state: ChainState, many: int) -> Draft:
        """Before the verifier has said anything."""
        if self.model is None:
            right = jnp.zeros((many, *state.step_B.shape), bool)
            return Draft(_repeated(state, many), None, jnp.int32(0), vary_like(right, state.z_BxL))
        found = self.model.draft(chain, state, None, many)
        return found._replace(logits=None, passes=jnp.int32(many))

    def _fresh(
        self, chain: Chain, now: ChainState, stale: Array, wanted: Array
    ) -> tuple[Array, Array, Array]:
        """(logits [B, L, V/tp], where they are no numbers, passes) for a step that is new."""
        model = self.model
        if model is None:
            return stale, jnp.zeros_like(now.step_B, bool), jnp.int32(0)
        given = (stale,) if model.hint else ()
        fresh = jax.lax.cond(
            wanted, lambda: model.denoise(now.z_BxL, chain.level(now), *given), lambda: stale
        )
        return fresh, numberless(fresh), wanted.astype(jnp.int32)


@dataclass(frozen=True, eq=False)
class RefreshedDrafter:
    """The verifier's marginals at the new state: one more pass of it a round."""

    denoise: Denoise

    def draft(self, chain: Chain, state: ChainState, verdict: Verdict | None, many: int) -> Draft:
        """As of `Drafter`."""
        logits = self.denoise(state.z_BxL, chain.level(state))
        states = walk(chain, state, many, lambda s: chain.step(logits, s))
        return Draft(states, jnp.broadcast_to(logits, (many, *logits.shape)), passes=1)


@dataclass(frozen=True, eq=False)
class ModelDrafter:
    """Another denoiser (a small model, counts of n-grams, an oracle) that follows the chain by
    itself. `hint`: it is also given the verifier's logits at the last accepted state (zeros before
    the first round), as a third argument."""

    denoise: Callable[..., Array]
    hint: bool = False
    columns: int = 0  # V/tp, of the zeros

    def draft(self, chain: Chain, state: ChainState, verdict: Verdict | None, many: int) -> Draft:
        """As of `Drafter`. Tokens are drawn by the chain's own noise."""
        given: tuple[Array, ...] = ()
        if self.hint:
            shape = *state.z_BxL.shape, self.columns
            given = (jnp.zeros(shape) if verdict is None else verdict.logits_BxLxV,)

        def step(state: ChainState, _: None) -> tuple[ChainState, tuple]:
            logits = self.denoise(state.z_BxL, chain.level(state), *given)
            after = chain.settle(chain.step(logits, state))
            return after, (after, logits, numberless(logits))

        _, (states, logits, bad) = jax.lax.scan(step, state, None, length=many)
        return Draft(states, logits, many, bad)


def numberless(logits_BxLxV: Array) -> Array:
    """Whether a sample has a logit that is not a number: bool [B]."""
    return psum(jnp.isnan(logits_BxLxV).sum((1, 2)), "tp") > 0


def _repeated(state: ChainState, many: int) -> ChainState:
    """The same tokens at each of the next `many` steps."""
    every = jax.tree.map(lambda x: jnp.broadcast_to(x, (many, *x.shape)), state)
    later_W = 1 + jnp.arange(many, dtype=jnp.int32)
    return every._replace(step_B=every.step_B + later_W[:, None])


class _Carry(NamedTuple):
    """Of the rounds: where the samples are, what is drafted, and what was counted."""

    state: ChainState
    draft: Draft
    counts: dict[str, Array]
    more: Array


def speculate(
    chain: Chain, denoise: Denoise, drafter: Drafter, *, window: int, rule: str = "shared"
) -> tuple[Array, Info]:
    """(ids int32 [B, L], info). `window`: W, the states that the verifier `denoise` judges at once;
    `rule`: one of RULES.

    info, int32: "nfe" calls of the verifier; "rounds" [B], those of each sample; "steps" [B], those
    that it took of the chain; "states", those
    judged for samples that were not finished; "passes" of the draft model; "judged" and "accepted"
    [steps], drafted steps of the samples by their number; "bad" [steps], drafts without numbers.
    With `draw.trace`, "trace" [steps, W, B, L] and "taken" [steps, B] hold every round. Raises
    ValueError for a window below 1, an unknown rule, and a rule that the chain has not."""
    _check(chain, window, rule)
    B, S = len(chain.draw.sample_ids_B), chain.steps
    drafting = replace(chain, stream=DRAFT) if rule == "coupling" else chain
    # The first state is constant, and XLA would run the first draft's model while it compiles.
    state = jax.lax.optimization_barrier(chain.settle(chain.begin()))
    draft = drafter.draft(drafting, state, None, window - 1)
    counts = {name: jnp.zeros(S, jnp.int32) for name in ("judged", "accepted", "bad")}
    counts |= {name: jnp.int32(0) for name in ("states", "nfe", "passes")}
    none_B = vary_like(jnp.zeros(B, jnp.int32), state.z_BxL)
    counts |= {"rounds": none_B, "steps": none_B}
    if chain.draw.trace:
        counts["trace"] = jnp.zeros((S, window, *state.z_BxL.shape), jnp.int32)
        counts["taken"] = jnp.zeros((S, B), jnp.int32)

    def body(carry: _Carry) -> _Carry:
        states = jax.tree.map(
            lambda a, b: jnp.concatenate([a[None], b]), carry.state, carry.draft[0]
        )
        score, logits = verified(chain, denoise, states)
        if rule == "coupling":
            after = _coupled(chain, states, score, logits, carry.draft)
        else:
            after = _every(_shared(chain), score, logits, states)
        same = (after.z_BxL[:-1] == states.z_BxL[1:]).all(-1)
        if carry.draft.bad is not None:
            same &= ~carry.draft.bad
        taken_B = jnp.cumprod(same, axis=0, dtype=jnp.int32).sum(0)
        counts = _counted(chain, carry, states, taken_B)
        state = chain.settle(at(after, taken_B))
        verdict = Verdict(states, score, logits, taken_B)
        draft = drafter.draft(drafting, state, verdict, window - 1)
        return _Carry(state, draft, counts, anywhere(chain.masked(state)))

    carry = _Carry(state, draft, counts, anywhere(chain.masked(state)))
    carry = jax.lax.while_loop(lambda c: c.more, body, carry)
    return carry.state.z_BxL, carry.counts


def _check(chain: Chain, window: int, rule: str) -> None:
    if window < 1:
        raise ValueError(f"a window of {window} states: it holds the current one, so set 1 or more")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    if rule == "coupling" and not chain.by_noise:
        raise ValueError(
            f"rule coupling compares tokens at the same positions, and order {chain.order!r}"
            f"{' with a threshold' if chain.threshold is not None else ''} chooses them by what "
            "the model says: use rule shared, or order random"
        )


def _every(f: Callable[..., Any], *trees: Any) -> Any:
    """`f` on all states of a window as one batch: [W, B, …] → [W, B, …]."""
    W, B = jax.tree.leaves(trees[0])[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(W * B, *x.shape[2:]), trees)
    return jax.tree.map(lambda x: x.reshape(W, B, *x.shape[1:]), f(*flat))


def verified(chain: Chain, denoise: Denoise, states: ChainState) -> tuple[Array, Array]:
    """(how the verifier scores positions [W, B, L], its logits [W, B, L, V/tp]): one call for
    W · B states."""

    def judge(states: ChainState) -> tuple[Array, Array]:
        logits = denoise(states.z_BxL, chain.level(states))
        return chain.score(logits, states), logits

    found: tuple[Array, Array] = _every(judge, states)
    return found


def _shared(chain: Chain) -> Callable[[Array, Array, ChainState], ChainState]:
    """(scores, logits, states) → the verifier's states after the chain's own step."""
    return lambda score, logits, states: chain.apply(score, partial(picked, logits), states)


def _coupled(
    chain: Chain, states: ChainState, score: Array, logits: Array, draft: Draft
) -> ChainState:
    """The states after steps with the draft's tokens where they are accepted, those of the residual
    where not, and the verifier's own at the last state."""
    if draft.logits is None:
        raise ValueError(
            "rule coupling needs the law that drafts are drawn from, which stale and Jacobi drafts "
            "do not state: draft by a model, or by refreshed marginals"
        )
    n_ids, temperature = chain.draw.n_ids, chain.draw.temperature

    def judge(
        states: ChainState, score: Array, drafted_BxL: Array, p_logits: Array, q_logits: Array
    ) -> ChainState:
        chosen_BxL = chain.chosen(score, states)
        places_BxR = chain.places(chosen_BxL)
        p, q, drafted, accept_keys, rest_keys = (
            picked(x, places_BxR)
            for x in (
                p_logits,
                q_logits,
                drafted_BxL,
                chain.keys(states, ACCEPT),
                chain.keys(states, RESIDUAL),
            )
        )
        if temperature == 0:
            token = categorical(rest_keys, p, 0.0)
            return chain.reveal(chosen_BxL, places_BxR, token, states)
        p, q = (_log_probs(suppress(x, n_ids), temperature) for x in (p, q))
        ratio = vocab_gather(p, drafted) - vocab_gather(q, drafted)
        accept = jnp.log(uniform(accept_keys)) < ratio
        rest = jnp.exp(p) - jnp.exp(q)
        # Equal laws never reject, but for rounding: then any draw of the verifier will do.
        none = psum(jnp.maximum(rest, 0).sum(-1), "tp")[..., None] <= 0
        rest = jnp.where(none, p, jnp.where(rest > 0, jnp.log(jnp.maximum(rest, 1e-38)), NEVER))
        token = jnp.where(accept, drafted, categorical(rest_keys, rest))
        return chain.reveal(chosen_BxL, places_BxR, token, states)

    first, last = (
        jax.tree.map(lambda x, i=i: x[i], (states, score, logits)) for i in (slice(-1), -1)
    )
    coupled = _every(judge, *first[:2], draft.states.z_BxL, first[2], draft.logits)
    own = _shared(chain)(last[1], last[2], last[0])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), coupled, own)


def _log_probs(logits_V: Array, temperature: float) -> Array:
    scaled = logits_V / temperature
    return scaled - vocab_logsumexp(scaled)[..., None]


def _counted(chain: Chain, carry: _Carry, states: ChainState, taken_B: Array) -> dict[str, Array]:
    c, W = carry.counts, states.z_BxL.shape[0]
    live_B = chain.masked(carry.state).any(1)
    step_WxB = jnp.minimum(states.step_B - chain.first, chain.steps - 1)[:-1]
    i_W = jnp.arange(W)[:, None]
    every_WxB = jax.vmap(lambda s: chain.masked(s).any(1))(states) & live_B
    open_WxB = every_WxB[:-1]

    def by_step(flag_WxB: Array) -> Array:
        found = jnp.zeros(chain.steps, jnp.int32).at[step_WxB].add((flag_WxB & open_WxB) * 1)
        return psum(found, BATCH_AXES)

    bad = carry.draft.bad
    new = {
        "judged": c["judged"] + by_step(i_W[:-1] <= taken_B),
        "accepted": c["accepted"] + by_step(i_W[:-1] < taken_B),
        "bad": c["bad"] + (0 if bad is None else by_step(bad)),
        "states": c["states"] + psum(W * live_B.sum(), BATCH_AXES),
        "nfe": c["nfe"] + 1,
        "passes": c["passes"] + carry.draft.passes,
        "rounds": c["rounds"] + live_B,
        "steps": c["steps"] + (every_WxB & (i_W <= taken_B)).sum(0),
    }
    if "trace" in c:
        new["trace"] = c["trace"].at[c["nfe"]].set(states.z_BxL)
        new["taken"] = c["taken"].at[c["nfe"]].set(taken_B)
    return new


def edit_distance(a_BxL: Array, b_BxL: Array) -> Array:
    """Insertions, deletions and replacements that turn one row into the other (Levenshtein 1966):
    int32 [B]."""
    L = a_BxL.shape[1]

    def row(before_BxL: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        i, token_B = given
        replaced = before_BxL[:, :-1] + (b_BxL != token_B[:, None])
        best = jnp.minimum(replaced, before_BxL[:, 1:] + 1)
        best = jnp.concatenate([jnp.broadcast_to(i + 1, (len(best), 1)), best], axis=1)
        # An insertion costs one: the least of all to the left, and the way there.
        off = jnp.arange(L + 1)
        return jax.lax.cummin(best - off, axis=1) + off, None

    first = jnp.broadcast_to(jnp.arange(L + 1, dtype=jnp.int32), (len(a_BxL), L + 1))
    last, _ = jax.lax.scan(row, first, (jnp.arange(L, dtype=jnp.int32), a_BxL.T))
    return last[:, -1]


def jump(
    chain: Chain,
    denoise: Denoise,
    drafter: Drafter,
    *,
    steps: int,
    tolerance: int,
    lossy: bool = False,
) -> tuple[Array, Info]:
    """(ids, {"nfe", "kept"}) of rounds of `steps` steps at once: the draft's state stands where it
    lies within `tolerance` edits of the verifier's own leap, else the leap does. Lossless for no
    tolerance: 0 is the verifier's chain of `steps` tokens a step, a large one the draft's law.
    "kept": drafted states that stood. Raises ValueError unless `lossy` is set."""
    if not lossy:
        raise ValueError(
            "edit distance changes the law of the samples at any tolerance: set lossy=True, or use "
            f"one of {', '.join(RULES)}"
        )
    if isinstance(chain, Ancestral) or chain.threshold is not None or chain.per_step != 1:
        raise ValueError("a leap of many steps is of a chain that reveals one token a step")
    leap = replace(chain, per_step=steps)

    def body(carry: tuple) -> tuple:
        state, nfe, kept, _ = carry
        logits = denoise(state.z_BxL, chain.level(state))
        own = leap.step(logits, state)
        drafted = drafter.draft(chain, state, None, steps).states
        theirs = jax.tree.map(lambda x: x[-1], drafted)
        near_B = edit_distance(own.z_BxL, theirs.z_BxL) <= tolerance
        z_BxL = jnp.where(near_B[:, None], theirs.z_BxL, own.z_BxL)
        live_B = chain.masked(state).any(1)
        state = state._replace(z_BxL=z_BxL, step_B=state.step_B + steps)
        kept += psum((near_B & live_B).sum(), BATCH_AXES)
        return state, nfe + 1, kept, anywhere(chain.masked(state))

    state = chain.begin()
    carry = state, jnp.int32(0), jnp.int32(0), anywhere(chain.masked(state))
    state, nfe, kept, _ = jax.lax.while_loop(lambda c: c[3], body, carry)
    return state.z_BxL, {"nfe": nfe, "kept": kept}
