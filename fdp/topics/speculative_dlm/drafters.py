"""Chains of the exact verifier of a Markov chain, and what drafts them.

Shapes: B samples, L positions, V ids; S states of a chain."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from fdp.data.synthetic import MarkovChain
from fdp.sampling.chain import Chain, Denoise, follow
from fdp.sampling.noise import Draw
from fdp.sampling.speculative import (
    Drafter,
    JacobiDrafter,
    ModelDrafter,
    RefreshedDrafter,
    StaleDrafter,
)
from fdp.topics.speculative_dlm.settings import NOISY, TARGETS

SEED, ERRORS = 11, 12  # keys of the chain's noise and of a noisy oracle's errors
CALIBRATED = 256  # states


def target_chain(
    target: str, ids_B: jax.Array, length: int, n_ids: int, trace: bool = False
) -> Chain:
    """The chain of one of TARGETS. `ids_B`: of samples; an argument of the program, or XLA computes
    their noise while it compiles."""
    order, temperature = TARGETS[target]
    draw = Draw(jax.random.key(SEED), ids_B, length, n_ids, temperature, trace=trace)
    return Chain(draw, order)


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


@lru_cache(maxsize=16)
def sigma_for(markov: MarkovChain, length: int, variation: float) -> float:
    """The deviation at which a noisy oracle's total variation from the exact law is `variation`, on
    average over masked rows of states that first-hitting visits."""

    @jax.jit
    def visited(ids_B: jax.Array) -> jax.Array:
        chain = target_chain("first-hitting", ids_B, length, markov.n, trace=True)
        return follow(chain, exact(markov))[1]["trace"]

    states = visited(jnp.arange(8))
    z_SxL = states[:length].reshape(-1, length)
    z_SxL = z_SxL[:: max(1, len(z_SxL) // CALIBRATED)]

    @jax.jit
    def measured(z_SxL: jax.Array, sigma: jax.Array) -> jax.Array:
        noise_S = jnp.zeros(len(z_SxL))
        laws = (jax.nn.softmax(f(z_SxL, noise_S)) for f in (exact(markov), noisy(markov, sigma)))
        p, q = laws
        masked_SxL = z_SxL == markov.n
        return (jnp.abs(p - q).sum(-1) / 2 * masked_SxL).sum() / masked_SxL.sum()

    low, high = 0.0, 16.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if measured(z_SxL, middle) < variation else (low, middle)
    return float(high)


def drafter_of(name: str, markov: MarkovChain, length: int) -> Drafter:
    """One of DRAFTERS for the exact verifier."""
    if name in NOISY:
        return ModelDrafter(noisy(markov, sigma_for(markov, length, NOISY[name])))
    return self_drafter(name, exact(markov)) or ModelDrafter(exact(markov))


def self_drafter(name: str, denoise: Denoise) -> Drafter | None:
    """What the verifier `denoise` drafts for itself, or None for the name of a draft model."""
    found: dict[str, Drafter] = {
        "stale": StaleDrafter(),
        "jacobi": JacobiDrafter(),
        "refreshed": RefreshedDrafter(denoise),
    }
    return found.get(name)


def empirical(ids_BxL: np.ndarray, n: int) -> np.ndarray:
    """Shares of all n^L sequences: f64 [n^L]."""
    radix_L = n ** np.arange(ids_BxL.shape[1])[::-1]
    return np.bincount(ids_BxL @ radix_L, minlength=n ** ids_BxL.shape[1]) / len(ids_BxL)
