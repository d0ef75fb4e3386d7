"""Samplers of masked diffusion, by name: chains (`fdp.sampling.chain`) that are followed step by
step.

All take a denoiser and a `Draw` and return (ids int32 [B, L], info), as `chain.follow`.

Which samplers are exact, given exact conditionals? Those that reveal one token a step at
temperature 1, at a position chosen from z alone: `first_hitting`, and `reveal` by random,
left_to_right, top_prob, entropy or margin. Ancestral steps have an error of O(1/steps). The law
also changes when positions are chosen by the probability of the drawn token (sampled_prob, as LLaDA
and Dream do), with thresholds, with several tokens a step, and at temperature 0.

Shapes: B samples, L positions."""

import jax

from fdp.objectives.noise_schedules import NoiseSchedule
from fdp.sampling.chain import Ancestral, Chain, Denoise, Info, follow
from fdp.sampling.noise import Draw


def ancestral(
    denoise: Denoise, draw: Draw, *, steps: int, schedule: NoiseSchedule, lazy: bool = True
) -> tuple[jax.Array, Info]:
    """Ancestral sampling in `steps` factorised steps (`chain.Ancestral`).

    `denoise` is called only in steps that reveal something on some device. This is mdlm's cached
    sampler without its cache, and it also suits time-conditioned models: E[nfe] = N(1 -
    (1-1/N)^(B·L)) for N steps on α = 1 - t. `lazy=False` calls it in every step and gives the same
    ids. Raises ValueError for steps below 1."""
    return follow(Ancestral(draw, grid=steps, schedule=schedule), denoise, lazy)


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
    is left (`chain.Chain`). Raises ValueError for an unknown order or a count below 1."""
    return follow(Chain(draw, order, per_step, threshold, block), denoise)


def first_hitting(
    denoise: Denoise, draw: Draw, *, block: int | None = None
) -> tuple[jax.Array, Info]:
    """Reveal one uniformly random masked position a step (Zheng et al. 2024): the exact law of
    continuous time, without factorisation error, in `length` calls. `block` as in `reveal`."""
    return reveal(denoise, draw, order="random", block=block)
