"""Losses and rules that keep the experts of a mixture evenly loaded, and the statistics that they
read.

Legend: B sequences, L positions, E experts, K choices of a token, J noise bins, R ranks of ep."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class Balance:
    """Coefficients of the losses; 0 leaves one out.

    switch: E/(K T²) Σ_e count_e Σ_t p_te over the global batch (Fedus et al. 2022): 1 where level.
    z: mean of logsumexp² of the logits (Zoph et al. 2022). sequence: as switch, within each
    sequence (DeepSeek-AI 2024). rank: level load of the `ranks` parts of the experts within each of
    `bins` noise bins. bias: step of the selection bias, without a loss (Wang et al. 2024). decay:
    of the running load that `rank` reads."""

    switch: float = 0.0
    z: float = 0.0
    sequence: float = 0.0
    rank: float = 0.0
    ranks: int = 1
    bins: int = 1
    bias: float = 0.0
    decay: float = 0.9


def counts(ids_BxLxK: Array, experts: int) -> Array:
    """Choices of each expert in each sequence: f32 [B, E]."""
    chosen = ids_BxLxK.reshape(len(ids_BxLxK), -1, 1) == jnp.arange(experts)
    return chosen.sum(1, dtype=jnp.float32)


def shares(scores_E: Array) -> Array:
    """Scores as probabilities, for sigmoid scores too."""
    return scores_E / scores_E.sum(-1, keepdims=True)


def switch(count_E: Array, sum_E: Array, tokens: float) -> Array:
    """E Σ_e f_e P_e with f_e = count_e / Σ count and P_e = sum_e / tokens: 1 where either is
    level."""
    return len(count_E) * (count_E / count_E.sum() * sum_E / tokens).sum()


def noise_bin(noise_B: Array, bins: int) -> Array:
    """One-hot bin of each sequence, of equal bins of [0, 1]: f32 [B, J]."""
    bin_B = jnp.clip((noise_B * bins).astype(jnp.int32), 0, bins - 1)
    return jax.nn.one_hot(bin_B, bins)


def rank_loss(load_JxE: Array, sum_JxE: Array, tokens: int, ranks: int) -> Array:
    """Σ_j T_j/T · R Σ_ρ f_jρ P_jρ over the R equal parts ρ of the experts: 1 where all ranks are
    level in every bin. load: of any scale. sum: of the probabilities of the T_j tokens of a bin.
    tokens: T, of the global batch."""
    f_JxR, p_JxR = (x.reshape(len(x), ranks, -1).sum(-1) for x in (load_JxE, sum_JxE))
    f_JxR = f_JxR / jnp.maximum(f_JxR.sum(-1, keepdims=True), 1e-20)
    return ranks * (f_JxR * p_JxR).sum() / tokens


@dataclass(frozen=True)
class LoadRule:
    """The state rule of all mixtures of a model: selection biases move by `bias` towards the level
    load, b ← b + bias·sign(mean load - load), and the running loads by noise bin decay."""

    balance: Balance

    def __call__(self, state: Any, aux: Any, step: jax.Array) -> Any:
        """Walks both trees; a router's bias lies one level below its mixture's metrics."""
        if not isinstance(state, dict):
            return state
        new = {k: self(x, aux.get(k, {}), step) for k, x in state.items()}
        b = self.balance
        if "router" in state and "load" in aux and b.bias:
            load, old = aux["load"], state["router"]["bias"]
            mean = load.mean(-1, keepdims=True)
            new["router"] = {"bias": old + b.bias * jnp.sign(mean - load)}
        if "load_bins" in state:
            new["load_bins"] = b.decay * state["load_bins"] + (1 - b.decay) * aux["load_bins"]
        return new
