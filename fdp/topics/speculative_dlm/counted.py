"""Rounds, acceptance, ids and laws of speculative runs.

Shapes: B samples, L positions, S steps, W states of a window."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.data.synthetic import MarkovChain
from fdp.sampling.chain import Chain, Denoise, follow
from fdp.sampling.draw import denoiser_of
from fdp.sampling.speculative import Drafter, ModelDrafter, jump, speculate
from fdp.study.claims import unigram_entropy
from fdp.topics.speculative_dlm.arms import check_pair
from fdp.topics.speculative_dlm.drafters import (
    drafter_of,
    empirical,
    exact,
    noisy,
    self_drafter,
    sigma_for,
    target_chain,
)

MARKOV = MarkovChain()
SMALL, SMALL_LENGTH = MarkovChain(n=3), 4  # all 81 sequences can be enumerated
LEAP = 2  # steps at once there
TOLERANCES = (0, 1, 2, 3, 4)


class SpeculativeJob(NamedTuple):
    """One speculative run."""

    target: str
    length: int
    drafter: str
    window: int

    @property
    def label(self) -> str:
        """For file names."""
        return f"{self.target} L{self.length} {self.drafter} W{self.window}"


class RoundCounts(NamedTuple):
    """Of a run: rounds_B of each sample, accepted_S and judged_S drafted steps by their number,
    states judged, calls of the verifier, passes of the draft, ids that differ from those of the
    verifier alone, entropy of single tokens in nats."""

    target: str
    length: int
    drafter: str
    window: int
    rounds_B: np.ndarray
    accepted_S: np.ndarray
    judged_S: np.ndarray
    states: int
    nfe: int
    passes: int
    differ: int
    entropy: float

    @property
    def rounds(self) -> float:
        """Mean over samples."""
        return float(self.rounds_B.mean())


class FrontierPoint(NamedTuple):
    """Of a sampler: its verifier passes, the exact NLL and the entropy of single tokens, nats a
    token."""

    sampler: str
    nfe: int
    nll: float
    entropy: float


class LawDistance(NamedTuple):
    """Total variation between drawn and exact laws; `noise`: that of as many exact draws."""

    rule: str
    variation: float
    noise: float


@lru_cache(maxsize=16)
def _oracle_alone(target: str, length: int, sequences: int) -> np.ndarray:
    def alone(ids_B: jax.Array) -> jax.Array:
        return follow(target_chain(target, ids_B, length, MARKOV.n), exact(MARKOV))[0]

    return np.asarray(jax.jit(alone)(jnp.arange(sequences)))


def oracle_rounds(job: tuple[str, int, str, int], sequences: int) -> RoundCounts:
    """Of the exact verifier of the Markov chain."""
    target, length, drafter, window = job
    chosen = drafter_of(drafter, MARKOV, length)

    def drafted(ids_B: jax.Array) -> tuple:
        chain = target_chain(target, ids_B, length, MARKOV.n)
        return speculate(chain, exact(MARKOV), chosen, window=window)

    ids, info = jax.jit(drafted)(jnp.arange(sequences))
    return _counts(SpeculativeJob(*job), _oracle_alone(target, length, sequences), ids, info)


def _counts(job: SpeculativeJob, alone: np.ndarray, drawn: jax.Array, info: dict) -> RoundCounts:
    ids, found = np.asarray(drawn), jax.tree.map(np.asarray, info)
    return RoundCounts(
        *job,
        rounds_B=found["rounds"],
        accepted_S=found["accepted"],
        judged_S=found["judged"],
        states=int(found["states"]),
        nfe=int(found["nfe"]),
        passes=int(found["passes"]),
        differ=int((ids != alone).sum()),
        entropy=float(unigram_entropy(ids)),
    )


def trained_rounds(
    verifier: Arm, draft: Arm, job: tuple[str, str, int], sequences: int
) -> RoundCounts:
    """Of a trained verifier; job: (target, drafter, window), where a drafter that is none of the
    verifier's own is the trained `draft`."""
    target, name, window = job
    check_pair(verifier.experiment, draft.experiment)
    length, n_ids = verifier.data.seq_len, verifier.objective.n_ids
    device = jax.local_devices()[0]
    both = [jax.device_put(a.trained_on_host.variables, device) for a in (verifier, draft)]

    def denoisers(of_verifier: dict, of_draft: dict) -> tuple[Denoise, Drafter]:
        judge = denoiser_of(verifier.experiment, of_verifier)
        own = self_drafter(name, judge)
        return judge, own or ModelDrafter(denoiser_of(draft.experiment, of_draft))

    def alone(ids_B: jax.Array, *variables: dict) -> jax.Array:
        chain = target_chain(target, ids_B, length, n_ids)
        return follow(chain, denoisers(*variables)[0])[0]

    def drafted(ids_B: jax.Array, *variables: dict) -> tuple:
        judge, drafter = denoisers(*variables)
        chain = target_chain(target, ids_B, length, n_ids)
        return speculate(chain, judge, drafter, window=window)

    ids_B = jnp.arange(sequences)
    plain, found = jax.jit(alone)(ids_B, *both), jax.jit(drafted)(ids_B, *both)
    return _counts(SpeculativeJob(target, length, name, window), np.asarray(plain), *found)


def strip(length: int, window: int) -> np.ndarray:
    """Accepted drafted steps of every round of one self-correcting sample: int [rounds]."""
    drafter = drafter_of("jacobi", MARKOV, length)

    def drafted(ids_B: jax.Array) -> dict:
        chain = target_chain("first-hitting", ids_B, length, MARKOV.n, trace=True)
        return speculate(chain, exact(MARKOV), drafter, window=window)[1]

    info = jax.jit(drafted)(jnp.arange(1))
    return np.asarray(info["taken"])[: int(info["nfe"]), 0]


def lossy(sequences: int, length: int) -> list[FrontierPoint]:
    """The exact verifier one token a step, with thresholds, with several tokens a step, and by
    edit distance."""
    judge, draft = exact(MARKOV), drafter_of("noisy 0.15", MARKOV, length)

    def leaps(chain: Chain, tolerance: int) -> tuple:
        return jump(chain, judge, draft, steps=4, tolerance=tolerance, lossy=True)

    samplers: dict[str, Callable[[Chain], tuple]] = {
        "one token a step": lambda chain: follow(chain, judge)
    }
    for level in (0.9, 0.7, 0.5):
        samplers[f"threshold {level}"] = lambda chain, level=level: follow(  # type: ignore[misc]
            replace(chain, order="top_prob", threshold=level), judge
        )
    for many in (4, 8, 16):
        samplers[f"{many} tokens a step"] = lambda chain, many=many: follow(  # type: ignore[misc]
            replace(chain, per_step=many), judge
        )
    for tolerance in (0, 2, 4):
        samplers[f"4 steps, {tolerance} edits"] = partial(leaps, tolerance=tolerance)
    found = []
    for name, sampler in samplers.items():
        drawn, info = _drawn(sampler, sequences, length, MARKOV.n)
        ids = np.asarray(drawn)
        nll, entropy = float(MARKOV.nll(ids).mean()) / length, float(unigram_entropy(ids))
        found.append(FrontierPoint(name, int(info["nfe"]), nll, entropy))
    return found


def _drawn(sampler: Callable[[Chain], tuple], sequences: int, length: int, n: int) -> tuple:
    """What `sampler` makes of the first-hitting chain."""

    def program(ids_B: jax.Array) -> tuple:
        return sampler(target_chain("first-hitting", ids_B, length, n))

    found: tuple = jax.jit(program)(jnp.arange(sequences))
    return found


def laws(draws: int) -> list[LawDistance]:
    """Rule coupling, edit distance at every tolerance and its two end points, against the exact law
    of a small Markov chain."""
    n, L = SMALL.n, SMALL_LENGTH
    every = np.indices([n] * L).reshape(L, -1).T
    law = np.exp(-SMALL.nll(every))
    law /= law.sum()
    rng = np.random.default_rng(0)
    noise = np.mean([_variation(rng.multinomial(draws, law) / draws, law) for _ in range(16)])
    judge, blunt = exact(SMALL), noisy(SMALL, sigma_for(SMALL, L, 0.30))
    draft = ModelDrafter(blunt)

    def leaps(chain: Chain, tolerance: int) -> tuple:
        return jump(chain, judge, draft, steps=LEAP, tolerance=tolerance, lossy=True)

    samplers: dict[str, Callable[[Chain], tuple]] = {
        "coupling": lambda chain: speculate(chain, judge, draft, window=3, rule="coupling"),
        "verifier, two tokens a step": lambda chain: follow(replace(chain, per_step=LEAP), judge),
        "draft alone": lambda chain: follow(chain, blunt),
    }
    for tolerance in TOLERANCES:
        samplers[f"{tolerance} edits"] = partial(leaps, tolerance=tolerance)
    found = []
    for name, sampler in samplers.items():
        ids = np.asarray(_drawn(sampler, draws, L, n)[0])
        found.append(LawDistance(name, _variation(empirical(ids, n), law), float(noise)))
    return found


def _variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)
