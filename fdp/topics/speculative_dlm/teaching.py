"""What drafts learn from: the states that the trained verifier's chain visits, and what it says of
each.

A drafted state is judged only where all before it were accepted, so it is a state of the verifier's
own chain: the states that a draft must know are these and no others.

Shapes: N chains, S steps, L positions, V vocabulary, B examples."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.data.batches import Batch, Data, Dims
from fdp.experiment import Experiment
from fdp.parallel.tensor import suppress
from fdp.sampling.chain import ChainState
from fdp.sampling.draw import chain_of, denoiser_of
from fdp.sampling.noise import Draw

TAUGHT = 13  # key of the chains' noise, none of those that are counted
TOGETHER = 64  # chains that are drawn at once
KEPT = 8  # one chain of so many is for validation
LEAST = np.float32(1e-9)  # probability of a hint, which has a logarithm

ROW: Dims = ("batch", "sequence")
DIMS: dict[str, Dims] = {"tokens": ROW, "state": ROW, "law": (*ROW, None)}


class Visits(NamedTuple):
    """Chains: int32 tokens_NxL that they end with, int32 states_NxSxL before every step, and the
    verifier's laws there, f32 [N, S, L, V]; 0 for ids that are never drawn."""

    tokens_NxL: np.ndarray
    states_NxSxL: np.ndarray
    law_NxSxLxV: np.ndarray


class Lessons:
    """Every state of `visits` as an example of `Distillation`. `reach` > 0: with the verifier's log
    probabilities at a state of the same chain that lies 1 to `reach` steps before, as a hint; zeros
    where that is before the chain begins."""

    def __init__(self, visits: Visits, what: str, reach: int = 0):
        self.visits, self.what, self.reach = visits, what, reach
        self.fix = "raise speculation.taught"

    def __len__(self) -> int:
        return int(np.prod(self.visits.states_NxSxL.shape[:2]))

    def take(self, indices_B: Sequence[int]) -> Batch:
        """The states at these indices, chain after chain."""
        v = self.visits
        n_B, s_B = np.divmod(np.asarray(indices_B, np.int64), v.states_NxSxL.shape[1])
        found = {
            "tokens": v.tokens_NxL[n_B],
            "state": v.states_NxSxL[n_B, s_B],
            "law": v.law_NxSxLxV[n_B, s_B],
        }
        if self.reach:
            steps_B = [self._steps(int(i)) for i in indices_B]
            then_B = s_B - np.asarray(steps_B)
            law = v.law_NxSxLxV[n_B, np.maximum(then_B, 0)]
            known = (then_B >= 0)[:, None, None]
            found["hint"] = np.where(known, np.log(np.maximum(law, LEAST)), np.float32(0))
        return found

    def _steps(self, index: int) -> int:
        """Between the state of a hint and that of the example."""
        return int(np.random.default_rng([TAUGHT, index]).integers(1, self.reach + 1))


def awaited(verifier: Experiment, chains: int, reach: int = 0) -> Data:
    """Data of the shapes of `lessons`, for the program of a draft that is built before the verifier
    is trained. All is masked, and every id as likely as the others. `reach`: of `Lessons`."""
    length, n_ids = verifier.data.seq_len, verifier.objective.n_ids  # type: ignore[attr-defined]
    vocab = verifier.model.shape.vocab
    law_V = (np.arange(vocab) < n_ids) / np.float32(n_ids)
    sizes = chains, length, length
    blank = Visits(
        np.zeros(sizes[:2], np.int32),
        np.broadcast_to(np.int32(n_ids), sizes),
        np.broadcast_to(law_V.astype(np.float32), (*sizes, vocab)),
    )
    return _data(verifier.data, blank, reach)


def examples(arm: Arm, teachers: Mapping[str, Arm]) -> Data:
    """What the draft `arm` learns from, once the verifier is trained."""
    (verifier,) = teachers.values()
    train, val = arm.data.train, arm.data.val
    assert isinstance(train, Lessons) and isinstance(val, Lessons)
    chains = len(train.visits.tokens_NxL) + len(val.visits.tokens_NxL)
    return _data(verifier.data, visits(verifier, chains), train.reach)


def _data(corpus: Data, found: Visits, reach: int) -> Data:
    held = max(1, len(found.tokens_NxL) // KEPT)
    parts = (Visits(*(x[held:] for x in found)), Visits(*(x[:held] for x in found)))
    train, val = (
        Lessons(part, f"{what} states of the verifier's chains", reach)
        for part, what in zip(parts, ("training", "validation"), strict=True)
    )
    return Data(
        f"states that the verifier visits, after {corpus.name}",
        corpus.sha256,  # with the config it decides the verifier, which decides the rest
        corpus.licence,
        corpus.tokenizer,
        train,
        val,
        DIMS | ({"hint": DIMS["law"]} if reach else {}),
    )


@lru_cache(maxsize=4)  # all drafts of a verifier learn from the same chains, seed after seed
def visits(verifier: Arm, chains: int) -> Visits:
    """So many chains of the trained verifier by the sampler of its objective, in float32 on one
    device, with noise of its seed."""
    e, n_ids = verifier.experiment, verifier.objective.n_ids
    variables = jax.device_put(verifier.trained_on_host.variables, jax.local_devices()[0])
    key = jax.random.fold_in(jax.random.key(TAUGHT), verifier.seed)

    @jax.jit
    def drawn(ids_B: jax.Array, variables: dict) -> tuple[jax.Array, ...]:
        chain = chain_of(e, Draw(key, ids_B, e.data.seq_len, n_ids))
        denoise = denoiser_of(e, variables)

        def step(state: ChainState, _: None) -> tuple[ChainState, tuple]:
            logits = denoise(state.z_BxL, chain.level(state))
            law = jax.nn.softmax(suppress(logits, n_ids))
            return chain.step(logits, state), (state.z_BxL, law)

        last, (states, laws) = jax.lax.scan(step, chain.begin(), None, length=chain.steps)
        return last.z_BxL, states.swapaxes(0, 1), laws.swapaxes(0, 1)

    many = min(TOGETHER, chains)
    parts = [
        jax.device_get(drawn(first + jnp.arange(many), variables))
        for first in range(0, chains, many)
    ]
    return Visits(*(np.concatenate(x)[:chains] for x in zip(*parts, strict=True)))
