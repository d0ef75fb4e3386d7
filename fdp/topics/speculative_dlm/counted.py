"""Rounds, acceptance, ids and laws of speculative runs.

Shapes: B samples, L positions, S steps, W states of a window."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.data.synthetic import MarkovChain
from fdp.objectives import BlockDiffusion
from fdp.sampling.chain import Chain, Denoise, follow
from fdp.sampling.draw import denoiser_of
from fdp.sampling.speculative import Drafter, JacobiDrafter, ModelDrafter, jump, speculate
from fdp.study.claims import unigram_entropy
from fdp.topics.speculative_dlm.arms import check_pair
from fdp.topics.speculative_dlm.drafters import (
    CountedChain,
    OneOf,
    empirical,
    exact,
    noisy,
    samples,
    self_drafters,
    sigmas_for,
    target_chain,
)
from fdp.topics.speculative_dlm.hinted import drafter_from
from fdp.topics.speculative_dlm.settings import BIGRAM, NOISY, PLAIN

Array = jax.Array
MARKOV = MarkovChain()
SMALL, SMALL_LENGTH = MarkovChain(n=3), 4  # all 81 sequences can be enumerated
LEAP = 2  # steps at once there
COUNTED = 2**20  # tokens whose pairs are counted
TOLERANCES = (0, 1, 2, 3, 4)
# Above 0.4 no two positions of this chain reach a threshold at once: it spreads from one end.
THRESHOLDS = (0.3, 0.2, 0.15)


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


class SpeculativeGroup(NamedTuple):
    """Speculative runs of one chain: one program for all drafters."""

    target: str
    length: int
    window: int


def oracle_rounds(
    group: tuple[str, int, int], drafters: tuple[str, ...], sequences: int
) -> list[RoundCounts]:
    """Of the exact verifier of the Markov chain."""
    target, length, window = group
    judge = exact(MARKOV)
    own = self_drafters(judge)
    deviations = sigmas_for(MARKOV, length, tuple(NOISY.values()))
    sigma = dict(zip(NOISY, deviations, strict=True)) | {"exact": 0.0}

    def drafted(ids_B: Array, text_BxL: Array, which: Array, sigma: Array) -> tuple:
        model = ModelDrafter(noisy(MARKOV, sigma))
        chain = target_chain(target, ids_B, length, MARKOV.n, text_BxL)
        every = [*own.values(), model, JacobiDrafter(model)]
        return speculate(chain, judge, OneOf(which, every), window=window)

    def alone(ids_B: Array, text_BxL: Array) -> Array:
        return follow(target_chain(target, ids_B, length, MARKOV.n, text_BxL), judge)[0]

    asked, run = samples(MARKOV, sequences, length), jax.jit(drafted)
    plain = np.asarray(jax.jit(alone)(*asked))
    found = []
    for name in drafters:
        which = list(own).index(name) if name in own else len(own) + (not name.startswith(PLAIN))
        drawn = run(*asked, which, sigma.get(name.removeprefix(PLAIN), 0.0))
        found.append(_counts(SpeculativeGroup(*group), name, plain, *drawn))
    return found


def _counts(
    group: SpeculativeGroup, drafter: str, alone: np.ndarray, drawn: jax.Array, info: dict
) -> RoundCounts:
    ids, found = np.asarray(drawn), jax.tree.map(np.asarray, info)
    return RoundCounts(
        group.target,
        group.length,
        drafter,
        group.window,
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
    verifier: Arm, drafts: list[Arm], target: str, window: int, drafters: list[str], sequences: int
) -> list[RoundCounts]:
    """Of a trained verifier. `drafters`: names of settings.SELF, BIGRAM and of the arms `drafts`,
    the last two also behind PLAIN."""
    for arm in drafts:
        check_pair(verifier.experiment, arm.experiment)
    length, n_ids = verifier.data.seq_len, verifier.objective.n_ids
    device = jax.local_devices()[0]
    every = [jax.device_put(a.trained_on_host.variables, device) for a in (verifier, *drafts)]
    train = verifier.data.train
    text = _tokens(train, range(min(len(train), COUNTED // length)))
    counted = CountedChain(n=n_ids, text=text)
    columns = verifier.model.shape.vocab - n_ids  # of ids that are never drawn
    objective = verifier.objective
    block = objective.block if isinstance(objective, BlockDiffusion) else None

    def pairs(z_BxL: Array, noise_B: Array) -> Array:
        return jnp.pad(counted.denoiser(z_BxL), ((0, 0), (0, 0), (0, columns)))

    def drafters_of(judge: Denoise, variables: list[dict]) -> list[Drafter]:
        trained = zip(drafts, variables, strict=True)
        models = {arm.name: drafter_from(arm.experiment, given) for arm, given in trained}
        models[BIGRAM] = ModelDrafter(pairs)
        named = self_drafters(judge) | {name: JacobiDrafter(m) for name, m in models.items()}
        named |= {PLAIN + name: model for name, model in models.items()}
        return [named[name] for name in drafters]

    def chain_for(ids_B: Array, text_BxL: Array) -> Chain:
        return replace(target_chain(target, ids_B, length, n_ids, text_BxL), block=block)

    def alone(ids_B: Array, text_BxL: Array, variables: list[dict]) -> Array:
        judge = denoiser_of(verifier.experiment, variables[0])
        return follow(chain_for(ids_B, text_BxL), judge)[0]

    def drafted(ids_B: Array, text_BxL: Array, variables: list[dict], which: Array) -> tuple:
        judge = denoiser_of(verifier.experiment, variables[0])
        drafter = OneOf(which, drafters_of(judge, variables[1:]))
        return speculate(chain_for(ids_B, text_BxL), judge, drafter, window=window)

    many = np.arange(sequences)
    asked = many, _tokens(verifier.data.val, many % len(verifier.data.val))
    run, group = jax.jit(drafted), SpeculativeGroup(target, length, window)
    plain = np.asarray(jax.jit(alone)(*asked, every))
    return [_counts(group, name, plain, *run(*asked, every, i)) for i, name in enumerate(drafters)]


def _tokens(split: Any, rows: Iterable[int]) -> np.ndarray:
    return np.asarray(split.take(rows)["tokens"])


def strip(length: int, window: int) -> np.ndarray:
    """Accepted drafted steps of every round of one self-correcting sample: int [rounds]."""

    def drafted(ids_B: Array, text_BxL: Array) -> dict:
        chain = target_chain("first-hitting", ids_B, length, MARKOV.n, text_BxL, trace=True)
        return speculate(chain, exact(MARKOV), JacobiDrafter(), window=window)[1]

    info = jax.jit(drafted)(*samples(MARKOV, 1, length))
    return np.asarray(info["taken"])[: int(info["nfe"]), 0]


def lossy(sequences: int, length: int) -> list[FrontierPoint]:
    """The exact verifier one token a step, with thresholds, with several tokens a step, and by
    edit distance."""
    judge = exact(MARKOV)
    draft = ModelDrafter(noisy(MARKOV, *sigmas_for(MARKOV, length, (NOISY["noisy 0.15"],))))

    def leaps(chain: Chain, tolerance: int) -> tuple:
        return jump(chain, judge, draft, steps=4, tolerance=tolerance, lossy=True)

    samplers: dict[str, Callable[[Chain], tuple]] = {
        "one token a step": lambda chain: follow(chain, judge)
    }
    for level in THRESHOLDS:
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
        drawn, info = _drawn(sampler, sequences, length, MARKOV)
        ids = np.asarray(drawn)
        nll, entropy = float(MARKOV.nll(ids).mean()) / length, float(unigram_entropy(ids))
        found.append(FrontierPoint(name, int(info["nfe"]), nll, entropy))
    return found


def _drawn(
    sampler: Callable[[Chain], tuple], sequences: int, length: int, markov: MarkovChain
) -> tuple:
    """What `sampler` makes of the first-hitting chain."""

    def program(ids_B: Array, text_BxL: Array) -> tuple:
        return sampler(target_chain("first-hitting", ids_B, length, markov.n, text_BxL))

    found: tuple = jax.jit(program)(*samples(markov, sequences, length))
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
    judge, blunt = exact(SMALL), noisy(SMALL, *sigmas_for(SMALL, L, (0.30,)))
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
        ids = np.asarray(_drawn(sampler, draws, L, SMALL)[0])
        found.append(LawDistance(name, _variation(empirical(ids, n), law), float(noise)))
    return found


def _variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)
