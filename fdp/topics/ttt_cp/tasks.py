"""Recall with several numbers of pairs in one run, and the answers of a trained model.

Legend: B sequences, L positions."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.data.recall import AssociativeRecall, RecallTask, WordNeedle, accuracy
from fdp.data.ruler_text import ByteNeedle
from fdp.models import module
from fdp.models.transformer import Transformer
from fdp.objectives.base import TokenObjective
from fdp.parallel.tensor import suppress

JUDGE = 3  # seed of fresh sequences; 0 and 1 are those of the data


@dataclass(frozen=True)
class MixedPairs:
    """Associative recall in which sequences have each number of `pairs` in turn."""

    length: int
    pairs: tuple[int, ...]
    vocab: int

    def with_pairs(self, pairs: int) -> AssociativeRecall:
        """The task of one number."""
        return AssociativeRecall(self.length, pairs, self.vocab)

    @property
    def chance(self) -> float:
        """Accuracy of a model that knows the format and draws a value."""
        return self.with_pairs(min(self.pairs)).chance

    def sample(self, seed: int, step: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [B, L] and answer mask f32 [B, L] of batch number `step`."""
        many = len(self.pairs)
        parts = [
            self.with_pairs(p).sample(seed, step, len(range(i, batch, many)))
            for i, p in enumerate(self.pairs)
        ]
        tokens_BxL = np.empty((batch, self.length), np.int32)
        mask_BxL = np.empty((batch, self.length), np.float32)
        for i, (tokens, mask) in enumerate(parts):
            tokens_BxL[i::many], mask_BxL[i::many] = tokens, mask
        return tokens_BxL, mask_BxL


def answered(arm: Arm, tasks: tuple[RecallTask, ...], sequences: int) -> list[float]:
    """Share of the answers of fresh sequences of each task that the trained arm gives."""
    return [_share(arm, *task.sample(JUDGE, 0, sequences)) for task in tasks]


def found_at(
    arm: Arm, tasks: tuple[WordNeedle | ByteNeedle, ...], depths: tuple[float, ...], sequences: int
) -> list[list[float]]:
    """The same for needles at `depths` (0: the start of the haystack, 1: its end): a list for each
    task."""
    return [[_share(arm, *_at(t, sequences, d)) for d in depths] for t in tasks]


def _at(task: WordNeedle | ByteNeedle, sequences: int, depth: float) -> Any:
    if isinstance(task, WordNeedle):
        return task.sample(JUDGE, 0, sequences, depth)
    return replace(task, depth=depth).sample(JUDGE, 0, sequences)


def _share(arm: Arm, tokens_BxL: np.ndarray, scored_BxL: np.ndarray) -> float:
    guess = _guesses(arm.model, arm.objective)
    guesses = guess(arm.trained_on_host.variables, tokens_BxL)
    return accuracy(np.asarray(guesses), tokens_BxL, scored_BxL)


@lru_cache(maxsize=8)
def _guesses(model: Transformer, objective: TokenObjective) -> Any:
    @jax.jit
    def run(variables: Any, tokens_BxL: jax.Array) -> jax.Array:
        noised = objective.corrupt(jax.random.key(0), {"tokens": tokens_BxL})
        logits, _, _ = module.run(model, variables, noised)
        guesses = suppress(logits, objective.n_ids).argmax(-1)
        return jnp.roll(guesses, -1, axis=1)  # a row predicts the token of its own place

    return run
