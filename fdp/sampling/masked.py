"""Samplers of masked diffusion as pure functions of a denoiser; the same code runs unsharded and
inside shard_map.

`denoise(z_BxL, noise_B) -> logits [B, L, V/tp]` in f32, where the mask id n_ids is a possible input
and noise is the mask ratio. Samples are sharded over dp (and ep), the vocabulary over tp. Every
device stays in the loop until all are done, because `denoise` holds collectives. All samplers take
a `Draw` and return (ids int32 [B, L], info). info["nfe"] is the number of calls of `denoise`.
info["trace"] (if asked for) holds the state before the first step and after each, int32 [steps + 1,
B, L].

Which samplers are exact, given exact conditionals? Those that reveal one token a step at
temperature 1, at a position chosen from z alone: `first_hitting`, and `reveal` by random, top_prob,
entropy or margin. Ancestral steps have an error of O(1/steps). The law also changes when positions
are chosen by the probability of the drawn token (sampled_prob, as LLaDA and Dream do), with
thresholds, with several tokens a step, and at temperature 0.

Shapes: B samples, L positions, V vocabulary (tp: V/tp columns)."""

from collections.abc import Callable

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
from fdp.sampling.noise import Draw, categorical, categorical_confidence, uniform

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Info = dict[str, jax.Array]
# (step, z) → (z, calls of denoise, whether to go on).
Update = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | int, jax.Array | bool]]


def anywhere(flag: jax.Array) -> jax.Array:
    """Whether any element of `flag` is true on any device: bool [], equal everywhere."""
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return pmax(flag.any().astype(jnp.int32), axes) > 0


def iterate(update: Update, z: jax.Array, max_steps: int, trace: bool) -> tuple[jax.Array, Info]:
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


def initial_state(
    sample_ids_B: jax.Array, length: int, mask_id: int, start_BxL: jax.Array | None
) -> jax.Array:
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


def _start(draw: Draw) -> jax.Array:
    return initial_state(draw.sample_ids_B, draw.length, draw.n_ids, draw.start_BxL)


def unmask_prob(schedule: NoiseSchedule, step: jax.Array | int, steps: int) -> jax.Array:
    """Probability that a masked token is revealed in `step` of a uniform grid from t = 1 to 0: f32
    [].

    It is (α_s - α_t)/(1 - α_t), and 1 in the last step, which reveals the masks that a schedule
    with α_0 < 1 leaves."""
    t, s = 1 - step / steps, 1 - (step + 1) / steps
    prob = 1 - schedule.mask_prob(jnp.asarray(s, jnp.float32)) / schedule.mask_prob(
        jnp.asarray(t, jnp.float32)
    )
    return jnp.where(jnp.asarray(step) == steps - 1, 1.0, prob)


def ancestral(
    denoise: Denoise, draw: Draw, *, steps: int, schedule: NoiseSchedule, lazy: bool = True
) -> tuple[jax.Array, Info]:
    """Ancestral sampling in `steps` factorised steps (Sahoo et al. 2024), with an error of
    O(1/steps) in its law.

    A Bernoulli variable decides whether to reveal, then the token is drawn; one categorical over
    both would need Gumbel tails `steps` times finer. `denoise` is therefore called only in steps
    that reveal something on some device. This is mdlm's cached sampler without its cache, and it
    also suits time-conditioned models: E[nfe] = N(1 - (1-1/N)^(B·L)) for N steps on α = 1 - t.
    `lazy=False` calls it in every step and gives the same ids."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")

    def update(step: jax.Array, z: jax.Array) -> tuple:
        keys = draw.keys(step)
        reveal_BxL = (z == draw.n_ids) & (uniform(keys) < unmask_prob(schedule, step, steps))

        def revealed() -> jax.Array:
            noise = schedule.mask_prob(jnp.asarray(1 - step / steps, jnp.float32))
            logits = denoise(z, jnp.broadcast_to(noise, draw.sample_ids_B.shape))
            tokens = categorical(keys, suppress(logits, draw.n_ids), draw.temperature)
            return jnp.where(reveal_BxL, tokens, z)

        if not lazy:
            return revealed(), 1, True
        needed = anywhere(reveal_BxL)
        return jax.lax.cond(needed, revealed, lambda: z), needed.astype(jnp.int32), True

    return iterate(update, _start(draw), steps, draw.trace)


def entropy(logits_V: jax.Array) -> jax.Array:
    """Entropy of softmax(logits) in nats, vocabulary-parallel: [..., V/tp] → f32 [...]."""
    logp_V = logits_V - vocab_logsumexp(logits_V)[..., None]
    return -psum((jnp.exp(logp_V) * logp_V).sum(-1), "tp")


def margin(logits_V: jax.Array) -> jax.Array:
    """Probability of the most likely id minus that of the second, vocabulary-parallel: [..., V/tp]
    → f32 [...]."""
    top, winner = vocab_argmax(logits_V)
    ids = vocab_offset(logits_V.shape[-1]) + jnp.arange(logits_V.shape[-1])
    second, _ = vocab_argmax(jnp.where(ids == winner[..., None], NEVER, logits_V))
    lse = vocab_logsumexp(logits_V)
    return jnp.exp(top - lse) - jnp.exp(second - lse)


# Higher is revealed earlier; (logits, token, keys) → f32 [B, L].
ORDERS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "random": lambda logits, token, keys: uniform(keys),
    "top_prob": lambda logits, token, keys: jnp.exp(
        vocab_argmax(logits)[0] - vocab_logsumexp(logits)
    ),
    "entropy": lambda logits, token, keys: -entropy(logits),
    "margin": lambda logits, token, keys: margin(logits),
    "sampled_prob": lambda logits, token, keys: jnp.exp(
        vocab_gather(logits, token) - vocab_logsumexp(logits)
    ),
}


def choose(
    scores_BxL: jax.Array,
    candidates_BxL: jax.Array,
    per_step: int = 1,
    threshold: float | None = None,
) -> jax.Array:
    """The `per_step` best candidates of each row, or all with score ≥ threshold but at least one:
    bool [B, L].

    Ties go to the earlier position."""
    scores_BxL = jnp.where(candidates_BxL, scores_BxL, -jnp.inf)
    rank_BxL = jnp.argsort(jnp.argsort(-scores_BxL, axis=1), axis=1)
    wanted = (
        rank_BxL < per_step if threshold is None else (scores_BxL >= threshold) | (rank_BxL == 0)
    )
    return candidates_BxL & wanted


def reveal(
    denoise: Denoise,
    draw: Draw,
    *,
    order: str = "top_prob",
    per_step: int = 1,
    threshold: float | None = None,
    block: int | None = None,
) -> tuple[jax.Array, Info]:
    """Reveal the masked positions with the best scores under `order`, step after step, until none
    is left.

    Each step reveals `per_step` positions, or every one with score ≥ `threshold` (Fast-dLLM; at
    least one). `block` finishes blocks of that length from left to right (semi-autoregressive; Nie
    et al. 2025, Arriola et al. 2025). Scores are taken at temperature 1; "entropy" scores by -H.
    Raises ValueError for an unknown order or a count below 1."""
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")
    if per_step < 1 or (block is not None and block < 1):
        raise ValueError(f"per_step and block must be at least 1, not {per_step} and {block}")
    positions_L = jnp.arange(draw.length)

    def update(step: jax.Array, z: jax.Array) -> tuple:
        masked_BxL = z == draw.n_ids
        logits = suppress(denoise(z, masked_BxL.mean(1)), draw.n_ids)
        keys = draw.keys(step)
        if order == "top_prob":  # fewer reductions than token and score on their own
            token_BxL, score_BxL = categorical_confidence(keys, logits, draw.temperature)
        else:
            token_BxL = categorical(keys, logits, draw.temperature)
            score_BxL = ORDERS[order](logits, token_BxL, keys)
        candidates_BxL = masked_BxL
        if block is not None:
            candidates_BxL &= positions_L // block == masked_BxL.argmax(1)[:, None] // block
        chosen_BxL = choose(score_BxL, candidates_BxL, per_step, threshold)
        z = jnp.where(chosen_BxL, token_BxL, z)
        return z, 1, anywhere(z == draw.n_ids)

    return iterate(update, _start(draw), draw.length, draw.trace)


def first_hitting(
    denoise: Denoise, draw: Draw, *, block: int | None = None
) -> tuple[jax.Array, Info]:
    """Reveal one uniformly random masked position a step (Zheng et al. 2024): the exact law of
    continuous time, without factorisation error, in `length` calls. `block` as in `reveal`."""
    return reveal(denoise, draw, order="random", block=block)
