"""What a trained mixture does at every noise level, and along real sampling runs.

Legend: B sequences, L positions, N rows (noised sequences), M layers with experts, E experts, K
columns of ids, D width, J noise bins, R ranks of ep, S steps of a sampler."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.data import expert_loads
from fdp.data.traces import RoutingTrace, trace
from fdp.models import module
from fdp.models.transformer import Transformer
from fdp.objectives.mdlm import mask_exact_k
from fdp.parallel.tensor import cross_entropy, suppress
from fdp.sampling.masked import first_hitting
from fdp.sampling.noise import Draw
from fdp.topics.moe_dlm.settings import BINS

RANKS = 8  # of ep, over which overload and fan-out are stated
CHUNK = 512  # rows of a pass
RIDGE = 1e-3  # of the probe, times the variance of its features


@dataclass(frozen=True)
class Observed:
    """Of one arm, on validation data with every mask count 1…L equally often.

    nelbo_J: nats a token by bin of the mask share, a mean over the counts in it. nelbo: over all
    counts. load_JxMxE: choices. information_M: I(expert; bin | masked) in nats a choice. fan_out:
    ranks that a token visits. probe_Mx2: R² of a linear probe for the share of masked tokens in
    what the router reads, at masked and at revealed tokens. overload: max/mean - 1 of the ranks'
    load, mixed noise, worst layer."""

    nelbo: float
    nelbo_J: np.ndarray
    load_JxMxE: np.ndarray
    information_M: np.ndarray
    fan_out: float
    probe_Mx2: np.ndarray
    overload: float


@dataclass(frozen=True)
class Sampled:
    """Of one arm along a sampling run in which all sequences have the same number of masks.

    load_SxMxE: choices of every step. overload_S: max/mean - 1 of the ranks, worst layer."""

    load_SxMxE: np.ndarray
    overload_S: np.ndarray
    ids_BxL: np.ndarray

    @property
    def worst(self) -> float:
        """Of the worst step."""
        return float(self.overload_S.max())


def rank_overload(load_E: np.ndarray) -> np.ndarray:
    """max/mean - 1 of the load of RANKS equal ranges of experts: [..., E] → [...]."""
    return expert_loads.imbalance(expert_loads.part_loads(load_E, RANKS)) - 1


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(model: Transformer, n_ids: int, variables: Any, z_NxL: Any, x_NxL: Any) -> Any:
    """(cross entropy [N, L], what the routers saw [M, N, L, D], whom they chose [M, N, L, K])."""
    noise_N = (z_NxL == n_ids).mean(1)
    hidden, seen = module.probed(model, variables, z_NxL, noise_N, method="hidden")
    logits = module.run(model, variables, hidden, method="outputs")[0]
    loss_NxL = cross_entropy(suppress(logits, n_ids), x_NxL)
    mixture = seen.get("layers", {}).get("mlp")
    return loss_NxL, *((mixture["input"], mixture["ids"]) if mixture else (None, None))


def look(arm: Arm, z_NxL: np.ndarray, x_NxL: np.ndarray) -> Any:
    """`_look` at all rows, on one device; ids are -1 for no expert."""
    variables = jax.device_put(arm.trained_on_host.variables, jax.local_devices()[0])
    parts = []
    for at in range(0, len(z_NxL), CHUNK):
        rows = slice(at, at + CHUNK)
        given = arm.model, arm.objective.n_ids, variables, z_NxL[rows], x_NxL[rows]
        parts.append(jax.device_get(_look(*given)))
    loss, seen, ids = zip(*parts, strict=True)
    if seen[0] is None:
        return np.concatenate(loss), None, None
    return np.concatenate(loss), np.concatenate(seen, 1), np.concatenate(ids, 1)


def masked(arm: Arm, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """(noised, clean) validation sequences [L·sequences, L]: row i has 1 + i // sequences masks.
    The same for every arm on the same data."""
    length = arm.data.seq_len
    some = np.asarray(arm.data.val.take(range(min(sequences, len(arm.data.val))))["tokens"])
    x_NxL = np.tile(some, (length, 1)).astype(np.int32)
    count_N = jnp.repeat(jnp.arange(1, length + 1), len(some))
    hidden_NxL = np.asarray(mask_exact_k(jax.random.key(7), count_N, length))
    return np.where(hidden_NxL, arm.objective.n_ids, x_NxL), x_NxL


def observe(arm: Arm, sequences: int) -> Observed:
    """Losses, loads and what can be read at every noise level."""
    z_NxL, x_NxL = masked(arm, sequences)
    loss_NxL, seen, ids = look(arm, z_NxL, x_NxL)
    hidden_NxL = z_NxL == arm.objective.n_ids
    share_N = hidden_NxL.mean(1)
    nelbo_N = (loss_NxL * hidden_NxL).sum(1) / hidden_NxL.sum(1)
    bin_N = np.minimum((share_N * BINS).astype(int), BINS - 1)
    nelbo_J = np.array([nelbo_N[bin_N == j].mean() for j in range(BINS)])
    if ids is None:
        none = np.zeros((BINS, 0, RANKS))
        empty = np.zeros(0)
        return Observed(nelbo_N.mean(), nelbo_J, none, empty, 0.0, np.zeros((0, 2)), 0.0)
    found = traced(arm, ids, share_N, hidden_NxL)
    load_JxMxE = expert_loads.noise_loads(found, BINS)
    state_T, sequence_T = hidden_NxL.reshape(-1), found.sequence_N
    bin_T = np.repeat(bin_N, x_NxL.shape[1])
    information = [
        expert_loads.information(found.ids_NxLxK[:, m], bin_T, state_T, sequence_T)
        for m in range(len(ids))
    ]
    return Observed(
        nelbo=float(nelbo_N.mean()),
        nelbo_J=nelbo_J,
        load_JxMxE=load_JxMxE,
        information_M=np.array(information),
        fan_out=float(expert_loads.distinct(found, RANKS).mean()),
        probe_Mx2=np.array([probe(x, share_N, hidden_NxL) for x in seen]),
        overload=float(rank_overload(load_JxMxE.sum(0)).max()),
    )


def traced(
    arm: Arm, ids_MxNxLxK: np.ndarray, share_N: np.ndarray, state: np.ndarray
) -> RoutingTrace:
    """The choices of rows of sequences as a trace; `state` is its domain: masked or revealed."""
    M, N, L, K = ids_MxNxLxK.shape
    return trace(
        ids_MxNxLxK.transpose(1, 2, 0, 3).reshape(N * L, M, K),
        arm.model.shape.experts,
        np.repeat(np.arange(N), L),
        np.tile(np.arange(L), N),
        domain_N=np.where(state, "masked", "revealed").reshape(-1),
        noise_N=np.repeat(share_N, L),
    )


def probe(x_NxLxD: np.ndarray, share_N: np.ndarray, hidden_NxL: np.ndarray) -> tuple[float, float]:
    """R² of ridge regression of the share on single tokens, (masked, revealed), on held-out rows:
    every second sequence."""
    share_NxL = np.broadcast_to(share_N[:, None], hidden_NxL.shape)
    train_NxL = np.broadcast_to(np.arange(len(share_N))[:, None] % 2 == 0, hidden_NxL.shape)

    def r2(chosen: np.ndarray) -> float:
        x, y = x_NxLxD[chosen & train_NxL].astype(np.float64), share_NxL[chosen & train_NxL]
        mean, level = x.mean(0), y.mean()
        gram = (x - mean).T @ (x - mean)
        gram += np.eye(len(gram)) * RIDGE * np.trace(gram) / len(gram)
        w = np.linalg.solve(gram, (x - mean).T @ (y - level))
        x, y = x_NxLxD[chosen & ~train_NxL], share_NxL[chosen & ~train_NxL]
        return float(1 - ((y - level - (x - mean) @ w) ** 2).sum() / ((y - y.mean()) ** 2).sum())

    return r2(hidden_NxL), r2(~hidden_NxL)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _trajectory(model: Transformer, n_ids: int, length: int, variables: Any, key: Any, ids: Any):
    """(samples, every state) of first-hitting sampling: one token a step."""

    def denoise(z_BxL: jax.Array, noise_B: jax.Array) -> jax.Array:
        hidden = module.run(model, variables, z_BxL, noise_B, method="hidden")[0]
        return module.run(model, variables, hidden, method="outputs")[0]

    found, info = first_hitting(denoise, Draw(key, ids, length, n_ids, trace=True))
    return found, info["trace"]


def sample(arm: Arm, sequences: int) -> Sampled:
    """Loads of every step of a sampler in which all sequences have as many masks."""
    n_ids, length = arm.objective.n_ids, arm.data.seq_len
    variables = jax.device_put(arm.trained_on_host.variables, jax.local_devices()[0])
    given = arm.model, n_ids, length, variables, jax.random.key(arm.seed)
    ids_BxL, states_SxBxL = jax.device_get(_trajectory(*given, jnp.arange(sequences)))
    rows = states_SxBxL[:length].reshape(-1, length).astype(np.int32)
    ids = look(arm, rows, np.zeros_like(rows))[2]
    if ids is None:
        return Sampled(np.zeros((length, 0, RANKS)), np.zeros(length), ids_BxL)
    by_step = ids.reshape(len(ids), length, -1)
    experts = arm.model.shape.experts
    load = np.array(
        [[np.bincount(m[m >= 0], minlength=experts) for m in s] for s in by_step.swapaxes(0, 1)]
    )
    return Sampled(load, rank_overload(load).max(1), ids_BxL)
