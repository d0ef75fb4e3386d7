"""Chains of the exact verifier of a Markov chain, and what drafts them.

Shapes: B samples, L positions, V ids; S states of a chain."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from fdp.data.synthetic import MarkovChain
from fdp.sampling.chain import BY_NOISE, Chain, ChainState, Denoise, follow
from fdp.sampling.noise import Draw
from fdp.sampling.speculative import (
    Draft,
    Drafter,
    JacobiDrafter,
    RefreshedDrafter,
    StaleDrafter,
    Verdict,
)
from fdp.topics.speculative_dlm.settings import PROMPTED, TARGETS

SEED, ERRORS, PROMPTS = 11, 12, 13  # of the chain's noise, a noisy oracle's errors, prompts
CALIBRATED = 256  # states


def target_chain(
    target: str, ids_B: jax.Array, length: int, n_ids: int, text_BxL: jax.Array, trace: bool = False
) -> Chain:
    """The chain of one of TARGETS. `ids_B`: of samples; `text_BxL`: where scores order, its
    beginnings are prompts. Both are arguments of the program, or XLA draws noise as it compiles."""
    order, temperature, threshold = TARGETS[target]
    given = 0 if order in BY_NOISE else length // PROMPTED
    start_BxL = jnp.where(jnp.arange(length) < given, text_BxL, n_ids)
    # Without a prompt it is constant, and XLA would run the first step while it compiles.
    start_BxL = jax.lax.optimization_barrier(start_BxL)
    draw = Draw(jax.random.key(SEED), ids_B, length, n_ids, temperature, start_BxL, trace)
    return Chain(draw, order, threshold=threshold)


def samples(markov: MarkovChain, many: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of samples, and a sequence of the chain for each: int32 [B], [B, L]."""
    return np.arange(many, dtype=np.int32), markov.sample(PROMPTS, 0, many, length)


def exact(markov: MarkovChain) -> Denoise:
    """The exact conditionals of a Markov chain."""
    return lambda z_BxL, noise_B: markov.denoiser(z_BxL)


def noisy(markov: MarkovChain, sigma: jax.Array | float) -> Denoise:
    """Exact log probabilities plus Gaussian errors of deviation `sigma` that depend on the state
    alone, as those of a model do."""

    def denoise(z_BxL: jax.Array, noise_B: jax.Array) -> jax.Array:
        L = z_BxL.shape[1]
        weights_L = jax.random.randint(jax.random.key(ERRORS), (L,), 1, 2**16)
        # Sums wrap: states that share one are rare, and harmless.
        keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(ERRORS)))(z_BxL @ weights_L)
        errors = jax.vmap(lambda key: jax.random.normal(key, (L, markov.n)))(keys_B)
        return markov.denoiser(z_BxL) + sigma * errors

    return denoise


@lru_cache(maxsize=8)
def sigmas_for(
    markov: MarkovChain, length: int, variations: tuple[float, ...]
) -> tuple[float, ...]:
    """The deviation at which a noisy oracle's total variation from the exact law is each of
    `variations`, on average over masked rows of states that first-hitting visits."""

    @jax.jit
    def visited(ids_B: jax.Array, text_BxL: jax.Array) -> jax.Array:
        chain = target_chain("first-hitting", ids_B, length, markov.n, text_BxL, trace=True)
        return follow(chain, exact(markov))[1]["trace"]

    states = visited(*samples(markov, 8, length))
    z_SxL = states[:length].reshape(-1, length)
    z_SxL = z_SxL[:: max(1, len(z_SxL) // CALIBRATED)]

    @jax.jit
    def measured(z_SxL: jax.Array, sigma: jax.Array) -> jax.Array:
        noise_S = jnp.zeros(len(z_SxL))
        laws = (jax.nn.softmax(f(z_SxL, noise_S)) for f in (exact(markov), noisy(markov, sigma)))
        p, q = laws
        masked_SxL = z_SxL == markov.n
        return (jnp.abs(p - q).sum(-1) / 2 * masked_SxL).sum() / masked_SxL.sum()

    def solved(variation: float) -> float:
        low, high = 0.0, 16.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if measured(z_SxL, middle) < variation else (low, middle)
        return high

    return tuple(map(solved, variations))


@dataclass(frozen=True, eq=False)
class OneOf:
    """The drafter of number `which`, traced: one program counts all of them."""

    which: jax.Array
    drafters: Sequence[Drafter]

    def draft(self, chain: Chain, state: ChainState, verdict: Verdict | None, many: int) -> Draft:
        """As of `Drafter`; without the law that tokens are drawn from."""

        def drawn(drafter: Drafter) -> tuple[ChainState, jax.Array, jax.Array]:
            found = drafter.draft(chain, state, verdict, many)
            none_WxB = jnp.zeros((many, len(state.ids_B)), bool)
            return (
                found.states,
                jnp.int32(found.passes),
                none_WxB if found.bad is None else found.bad,
            )

        branches = [partial(drawn, drafter) for drafter in self.drafters]
        states, passes, bad = jax.lax.switch(self.which, branches)
        return Draft(states, None, passes, bad)


def self_drafters(denoise: Denoise) -> dict[str, Drafter]:
    """What the verifier `denoise` drafts for itself, by the names in settings.SELF."""
    return {
        "stale": StaleDrafter(),
        "jacobi": JacobiDrafter(),
        "refreshed": RefreshedDrafter(denoise),
    }


@dataclass(frozen=True, eq=False)
class CountedChain(MarkovChain):
    """The Markov chain of the pairs of tokens in `text`, every pair counted `prior` times more than
    seen: its denoiser drafts from the nearest revealed tokens on both sides."""

    text: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    prior: float = 0.1

    @cached_property
    def transitions(self) -> np.ndarray:
        """Shares of pairs: f64 [n, n]."""
        pairs = np.full((self.n, self.n), self.prior)
        np.add.at(pairs, (self.text[..., :-1].ravel(), self.text[..., 1:].ravel()), 1)
        found: np.ndarray = pairs / pairs.sum(1, keepdims=True)
        return found


def empirical(ids_BxL: np.ndarray, n: int) -> np.ndarray:
    """Shares of all n^L sequences: f64 [n^L]."""
    radix_L = n ** np.arange(ids_BxL.shape[1])[::-1]
    return np.bincount(ids_BxL @ radix_L, minlength=n ** ids_BxL.shape[1]) / len(ids_BxL)
