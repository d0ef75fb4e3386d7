"""A sampler of masked diffusion as a deterministic map from a state and its noise to the next
state, z' = F(z, u).

The noise of a step depends on (key, sample, step, position) alone (`fdp.sampling.noise`), so two
programs that reach the same state with the same step go on alike, however they got there. That is
what `fdp.sampling.speculative` builds on. F, `Chain.step`, scores all positions, chooses some, and
draws tokens for these alone: noise of the whole vocabulary at every position costs more than a
small model. `follow` is the plain sampler: one step after the other.

`denoise(z_BxL, noise_B) -> logits [B, L, V/tp]` in f32, where the mask id n_ids is a possible input
and noise is the mask ratio. The same code runs unsharded and inside shard_map: samples lie over dp
(and ep), the vocabulary over tp.

Shapes: B samples, L positions, R those that a step reveals at most, V vocabulary (tp: V/tp
columns)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdp.collectives import pmax, psum, vary_like
from fdp.objectives.noise_schedules import NoiseSchedule
from fdp.parallel.tensor import (
    NEVER,
    suppress,
    vocab_argmax,
    vocab_gather,
    vocab_logsumexp,
    vocab_offset,
)
from fdp.sampling.noise import Draw, categorical, position_keys, uniform

Array = jax.Array
Denoise = Callable[[Array, Array], Array]
# places [B, R] → the denoiser's logits there, [B, R, V/tp].
Rows = Callable[[Array], Array]
Info = dict[str, Array]
# (step, z) → (z, calls of denoise, whether to go on).
Update = Callable[[Array, Array], tuple[Array, Array | int, Array | bool]]


class ChainState(NamedTuple):
    """Where samples are. ids_B: global sample ids. step_B: of the noise that comes next. z_BxL:
    tokens, n_ids where masked. given_B: length of the prompt. due_BxL: the step that reveals a
    position, for chains in which the noise alone decides it, else None. All int32."""

    ids_B: Array
    step_B: Array
    z_BxL: Array
    given_B: Array
    due_BxL: Array | None = None


def entropy(logits_V: Array) -> Array:
    """Entropy of softmax(logits) in nats, vocabulary-parallel: [..., V/tp] → f32 [...]."""
    logp_V = logits_V - vocab_logsumexp(logits_V)[..., None]
    return -psum((jnp.exp(logp_V) * logp_V).sum(-1), "tp")


def top_prob(logits_V: Array) -> Array:
    """The largest probability of softmax(logits), vocabulary-parallel: [..., V/tp] → f32 [...]."""
    top = pmax(logits_V.max(-1), "tp")
    return 1 / psum(jnp.exp(logits_V - top[..., None]).sum(-1), "tp")


def margin(logits_V: Array) -> Array:
    """Probability of the most likely id minus that of the second, vocabulary-parallel: [..., V/tp]
    → f32 [...]."""
    top, winner = vocab_argmax(logits_V)
    ids = vocab_offset(logits_V.shape[-1]) + jnp.arange(logits_V.shape[-1])
    second, _ = vocab_argmax(jnp.where(ids == winner[..., None], NEVER, logits_V))
    lse = vocab_logsumexp(logits_V)
    return jnp.exp(top - lse) - jnp.exp(second - lse)


# Higher is revealed earlier; (logits, token, keys) → f32 [B, L].
ORDERS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "random": lambda logits, token, keys: uniform(keys),
    "left_to_right": lambda logits, token, keys: (
        -jnp.broadcast_to(jnp.arange(token.shape[-1], dtype=jnp.float32), token.shape)
    ),
    "top_prob": lambda logits, token, keys: top_prob(logits),
    "entropy": lambda logits, token, keys: -entropy(logits),
    "margin": lambda logits, token, keys: margin(logits),
    "sampled_prob": lambda logits, token, keys: jnp.exp(
        vocab_gather(logits, token) - vocab_logsumexp(logits)
    ),
}
BY_NOISE = ("random", "left_to_right")  # orders that no logits can change
BY_TOKEN = ("sampled_prob",)  # orders that look at the drawn token


def choose(
    scores_BxL: Array, candidates_BxL: Array, per_step: int = 1, threshold: float | None = None
) -> Array:
    """The `per_step` best candidates of each row, or all with score ≥ threshold but at least one:
    bool [B, L].

    Ties go to the earlier position."""
    scores_BxL = jnp.where(candidates_BxL, scores_BxL, -jnp.inf)
    if per_step == 1 and threshold is None:  # sorting takes longer
        best_Bx1 = scores_BxL.argmax(1)[:, None]
        return candidates_BxL & (jnp.arange(scores_BxL.shape[1]) == best_Bx1)
    rank_BxL = jnp.argsort(jnp.argsort(-scores_BxL, axis=1), axis=1)
    wanted = (
        rank_BxL < per_step if threshold is None else (scores_BxL >= threshold) | (rank_BxL == 0)
    )
    return candidates_BxL & wanted


def picked(x_BxL: Array, places_BxR: Array) -> Array:
    """The entries of every row at `places_BxR`: [B, L, …] → [B, R, …]. As many places as positions
    are all of them, in order."""
    if places_BxR.shape[1] == x_BxL.shape[1]:
        return x_BxL
    return jnp.take_along_axis(
        x_BxL, places_BxR.reshape(*places_BxR.shape, *[1] * (x_BxL.ndim - 2)), 1
    )


def initial_state(sample_ids_B: Array, length: int, mask_id: int, start_BxL: Array | None) -> Array:
    """Fully masked states, or `start_BxL` (a prompt with mask_id where tokens are wanted): int32
    [B, L].
    """
    if start_BxL is None:
        return vary_like(
            jnp.full((sample_ids_B.shape[0], length), mask_id, jnp.int32), sample_ids_B
        )
    if start_BxL.shape != (sample_ids_B.shape[0], length):
        raise ValueError(
            f"start must have shape {(sample_ids_B.shape[0], length)}, not {start_BxL.shape}"
        )
    return vary_like(start_BxL.astype(jnp.int32), sample_ids_B)


@dataclass(frozen=True, eq=False)
class Chain:
    """Reveals the masked positions with the best scores under `order`, one of ORDERS, taken at
    temperature 1.

    Each step reveals `per_step` positions, or every one with score ≥ `threshold` (Fast-dLLM; at
    least one). `block` finishes blocks of that length from left to right (semi-autoregressive; Nie
    et al. 2025, Arriola et al. 2025). `eos`: once it stands behind the prompt with nothing masked
    before it, all that follows is `eos`. `start`: the first position of the rows, which the noise
    depends on. `first`: the number of the first step, one for all or int32 [B]. `stream`: of the
    noise of tokens, where it must not be the chain's own; 0 is the latter. Raises ValueError for an
    unknown order or a count below 1."""

    draw: Draw
    order: str = "top_prob"
    per_step: int = 1
    threshold: float | None = None
    block: int | None = None
    eos: int | None = None
    start: Array | int = 0
    first: Array | int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; known: {', '.join(ORDERS)}")
        if self.per_step < 1 or (self.block is not None and self.block < 1):
            raise ValueError(
                f"per_step and block must be at least 1, not {self.per_step} and {self.block}"
            )

    @property
    def steps(self) -> int:
        """The most that it takes."""
        return self.draw.length

    @property
    def skips(self) -> bool:
        """Whether there may be steps that reveal nothing."""
        return False

    @property
    def by_noise(self) -> bool:
        """Whether the noise alone decides which positions a step reveals."""
        return self.order in BY_NOISE and self.threshold is None

    def begin(self) -> ChainState:
        """Before the first step."""
        d = self.draw
        z_BxL = initial_state(d.sample_ids_B, d.length, d.n_ids, d.start_BxL)
        given_B = jnp.cumprod(z_BxL != d.n_ids, axis=1, dtype=jnp.int32).sum(1)
        first_B = jnp.broadcast_to(jnp.int32(self.first), d.sample_ids_B.shape)
        first_B = vary_like(first_B, d.sample_ids_B)
        return ChainState(d.sample_ids_B, first_B, z_BxL, given_B)

    def masked(self, state: ChainState) -> Array:
        """bool [B, L]."""
        return state.z_BxL == self.draw.n_ids

    def level(self, state: ChainState) -> Array:
        """The noise that the denoiser is told: f32 [B]."""
        return self.masked(state).mean(1)

    def moves(self, state: ChainState) -> Array:
        """Whether the step reveals anything, by its noise: bool [B]."""
        return self.masked(state).any(1)

    def settle(self, state: ChainState) -> ChainState:
        """The state at its next step that reveals anything."""
        return state

    def keys(self, state: ChainState, stream: int = 0) -> Array:
        """The noise of the step: uint32 [B, L, 2]. `stream`: another one for every number."""
        key = jax.random.fold_in(self.draw.key, stream) if stream else self.draw.key
        positions_L = self.start + jnp.arange(state.z_BxL.shape[1])
        return position_keys(key, state.ids_B, state.step_B, positions_L)

    def score(self, logits_BxLxV: Array, state: ChainState) -> Array:
        """What the step chooses positions by, given the denoiser's logits: f32 [B, L]; higher ones
        are revealed earlier."""
        token_BxL, n_ids = state.z_BxL, self.draw.n_ids  # most orders look at no token
        if self.order in BY_TOKEN:
            places_BxL = jnp.broadcast_to(jnp.arange(token_BxL.shape[1]), token_BxL.shape)
            token_BxL = self.tokens(lambda _: logits_BxLxV, places_BxL, state)
        logits = suppress(logits_BxLxV.astype(jnp.float32), n_ids)
        return ORDERS[self.order](logits, token_BxL, self.keys(state))

    def chosen(self, score_BxL: Array, state: ChainState) -> Array:
        """The positions that the step reveals: bool [B, L]."""
        masked_BxL = self.masked(state)
        candidates_BxL = masked_BxL
        if self.block is not None:
            at_L = jnp.arange(masked_BxL.shape[1]) // self.block
            candidates_BxL &= at_L == masked_BxL.argmax(1)[:, None] // self.block
        return choose(score_BxL, candidates_BxL, self.per_step, self.threshold)

    @property
    def most(self) -> int:
        """R, the most positions that a step reveals."""
        L = self.draw.length
        return min(self.per_step, L) if self.threshold is None else L

    def places(self, chosen_BxL: Array) -> Array:
        """Of the chosen positions, and of others where a step reveals fewer than R: int32 [B, R],
        without repeats."""
        L = chosen_BxL.shape[1]
        if self.most == L:
            return jnp.broadcast_to(jnp.arange(L), chosen_BxL.shape)
        if self.most == 1:
            return chosen_BxL.argmax(1)[:, None]
        return jnp.argsort(~chosen_BxL, axis=1, stable=True)[:, : self.most]

    def tokens(self, rows: Rows, places_BxR: Array, state: ChainState) -> Array:
        """A token for each place, int32 [B, R]. Ids ≥ n_ids are never drawn."""
        keys = picked(self.keys(state, self.stream), places_BxR)
        logits = suppress(rows(places_BxR), self.draw.n_ids)
        return categorical(keys, logits, self.draw.temperature)

    def reveal(
        self, chosen_BxL: Array, places_BxR: Array, token_BxR: Array, state: ChainState
    ) -> ChainState:
        """The state after a step that reveals these tokens at the chosen ones of the places."""
        token_BxL = token_BxR
        if self.most < self.draw.length:
            rows_B = jnp.arange(len(places_BxR))[:, None]
            token_BxL = state.z_BxL.at[rows_B, places_BxR].set(token_BxR)
        z_BxL = jnp.where(chosen_BxL, token_BxL, state.z_BxL)
        state = state._replace(z_BxL=z_BxL, step_B=state.step_B + 1)
        return state if self.eos is None else self._ended(state, self.eos)

    def apply(self, score_BxL: Array, rows: Rows, state: ChainState) -> ChainState:
        """The state after the step, by what positions are scored and what the denoiser says of
        them."""
        chosen_BxL = self.chosen(score_BxL, state)
        places_BxR = self.places(chosen_BxL)
        return self.reveal(chosen_BxL, places_BxR, self.tokens(rows, places_BxR, state), state)

    def step(self, logits_BxLxV: Array, state: ChainState) -> ChainState:
        """F: the state after the step, given the denoiser's logits."""
        score_BxL = self.score(logits_BxLxV, state)
        return self.apply(score_BxL, partial(picked, logits_BxLxV), state)

    def _ended(self, state: ChainState, eos: int) -> ChainState:
        known_BxL = jnp.cumprod(~self.masked(state), axis=1, dtype=jnp.int32) > 0
        new_BxL = jnp.arange(known_BxL.shape[1]) >= state.given_B[:, None]
        end_BxL = known_BxL & new_BxL & (state.z_BxL == eos)
        after_BxL = jnp.cumsum(end_BxL, axis=1) > 0
        return state._replace(z_BxL=jnp.where(after_BxL, eos, state.z_BxL))


def unmask_prob(schedule: NoiseSchedule, step: Array | int, steps: int) -> Array:
    """Probability that a masked token is revealed in `step` of a uniform grid from t = 1 to 0: f32,
    as `step`.

    It is (α_s - α_t)/(1 - α_t), and 1 in the last step, which reveals the masks that a schedule
    with α_0 < 1 leaves."""
    t, s = 1 - step / steps, 1 - (step + 1) / steps
    prob = 1 - schedule.mask_prob(jnp.asarray(s, jnp.float32)) / schedule.mask_prob(
        jnp.asarray(t, jnp.float32)
    )
    return jnp.where(jnp.asarray(step) == steps - 1, 1.0, prob)


@dataclass(frozen=True, eq=False)
class Ancestral(Chain):
    """Ancestral sampling in `grid` factorised steps of `schedule` (Sahoo et al. 2024): an error of
    O(1/grid) in its law.

    A Bernoulli variable decides whether to reveal, then the token is drawn; one categorical over
    both would need Gumbel tails `grid` times finer. So it is known before the first step when each
    position is revealed, and a step that reveals nothing needs no denoiser."""

    order: str = "random"
    grid: int = 1
    schedule: NoiseSchedule | None = None

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"steps must be at least 1, not {self.grid}")
        super().__post_init__()

    @property
    def steps(self) -> int:
        """Of the grid."""
        return self.grid

    @property
    def skips(self) -> bool:
        """Those between two reveals."""
        return True

    def begin(self) -> ChainState:
        """Before the first step."""
        state = super().begin()

        def due(step: Array, due_BxL: Array) -> Array:
            prob = unmask_prob(self._schedule, step, self.grid)
            now_BxL = uniform(self.keys(state._replace(step_B=step))) < prob
            return jnp.where(now_BxL, jnp.minimum(due_BxL, step), due_BxL)

        last_BxL = vary_like(jnp.full_like(state.z_BxL, self.grid - 1), state.z_BxL)
        return state._replace(due_BxL=jax.lax.fori_loop(0, self.grid, due, last_BxL))

    @property
    def _schedule(self) -> NoiseSchedule:
        assert self.schedule is not None
        return self.schedule

    def level(self, state: ChainState) -> Array:
        """The mask ratio that the schedule has at the step."""
        return self._schedule.mask_prob(1 - state.step_B.astype(jnp.float32) / self.grid)

    def moves(self, state: ChainState) -> Array:
        """Whether a position is due."""
        return self._due(state).any(1)

    def settle(self, state: ChainState) -> ChainState:
        """At the first step at which one is due."""
        assert state.due_BxL is not None
        open_BxL = jnp.where(self.masked(state), state.due_BxL, self.grid)
        return state._replace(step_B=open_BxL.min(1))

    @property
    def most(self) -> int:
        """All of them may be due at once."""
        return self.draw.length

    def chosen(self, score_BxL: Array, state: ChainState) -> Array:
        """The masked positions that are due."""
        return self._due(state)

    def _due(self, state: ChainState) -> Array:
        return self.masked(state) & (state.due_BxL == state.step_B[:, None])


def anywhere(flag: Array) -> Array:
    """Whether any element of `flag` is true on any device: bool [], equal everywhere."""
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return pmax(flag.any().astype(jnp.int32), axes) > 0


def iterate(update: Update, z: Array, max_steps: int, trace: bool) -> tuple[Array, Info]:
    """Apply `update` until it asks to stop or max_steps is reached. Counts calls, and keeps every
    state if asked to."""
    states = jnp.broadcast_to(z, (max_steps + 1, *z.shape)) if trace else None

    def body(carry: tuple) -> tuple:
        step, _, z, nfe, states = carry
        z, calls, more = update(step, z)
        if trace:
            # Every later row too, so that after an early stop the rest shows the final state.
            later = (jnp.arange(max_steps + 1) > step)[:, None, None]
            states = jnp.where(later, z, states)
        return step + 1, jnp.asarray(more), z, nfe + calls, states

    carry = (jnp.int32(0), jnp.asarray(True), z, jnp.int32(0), states)
    _, _, z, nfe, states = jax.lax.while_loop(lambda c: (c[0] < max_steps) & c[1], body, carry)
    return z, {"nfe": nfe, "trace": states} if trace else {"nfe": nfe}


def follow(chain: Chain, denoise: Denoise, lazy: bool = True) -> tuple[Array, Info]:
    """(ids int32 [B, L], info) after one step of all samples after the other.

    info["nfe"] is the number of calls of `denoise`: where the noise leaves out steps, one that
    reveals nothing on any device goes without, unless `lazy` is false. info["trace"] (if
    `draw.trace`) holds the state before the first step and after each, int32 [steps + 1, B, L].
    Every device stays in the loop until all are done, because `denoise` holds collectives."""
    begin = chain.begin()

    def update(step: Array, z_BxL: Array) -> tuple:
        state = begin._replace(z_BxL=z_BxL, step_B=begin.step_B + step)

        def revealed() -> Array:
            return chain.step(denoise(z_BxL, chain.level(state)), state).z_BxL

        if not chain.skips:
            z_BxL = revealed()
            return z_BxL, 1, anywhere(z_BxL == chain.draw.n_ids)
        if not lazy:
            return revealed(), 1, True
        needed = anywhere(chain.moves(state))
        return jax.lax.cond(needed, revealed, lambda: z_BxL), needed.astype(jnp.int32), True

    return iterate(update, begin.z_BxL, chain.steps, chain.draw.trace)
