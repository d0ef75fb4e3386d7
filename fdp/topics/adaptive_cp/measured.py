"""What a trained model attends to, and the sparsest block masks that cost it little.

Legend: B sequences, S positions, W blocks of a sequence, N layers, T checkpoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.data.batches import eval_batches
from fdp.data.recall import RECALL, accuracy, task_of
from fdp.models.transformer import Transformer
from fdp.objectives.base import Objective
from fdp.parallel.context_plan import CommPlan
from fdp.step import loss_sum
from fdp.topics.adaptive_cp.mixers import indexed, sparse
from fdp.topics.adaptive_cp.profile import Profile, block_ids, block_masks, profile
from fdp.topics.adaptive_cp.settings import BLOCKS

TAU = 0.95
COVERAGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
WIDTHS = (2, 4, 8, 16, BLOCKS)
GAP = 0.005  # relative loss that sparsity may cost
CHOOSE, JUDGE, ANSWERS = (
    2,
    3,
    64,
)  # seeds of fresh recall sequences (0 and 1 are those of the data), and how many


@dataclass(frozen=True)
class Measured:
    """What one trained arm attends to: density [N, T] at `steps`, block masks, their coverage and
    loss; of a recall task the share of answers that are right, (dense, sparse)."""

    density_NxT: np.ndarray
    steps: list[int]
    masks_NxWxW: np.ndarray
    coverage: float
    dense_loss: float
    sparse_loss: float
    answers: tuple[float, float] | None
    width: int  # of lists made from each input, and the loss with them
    indexed_loss: float

    @property
    def share(self) -> np.ndarray:
        """Share of the causal blocks that each layer's mask keeps, [N]."""
        W = self.masks_NxWxW.shape[-1]
        return self.masks_NxWxW.sum((1, 2)) / (W * (W + 1) / 2)

    def plain(self) -> dict[str, Any]:
        """For a file."""
        return {
            "density": self.density_NxT,
            "steps": self.steps,
            "mask share": self.share,
            "coverage": self.coverage,
            "dense loss": self.dense_loss,
            "sparse loss": self.sparse_loss,
            "answers": self.answers,
            "width": self.width,
            "indexed loss": self.indexed_loss,
        }


def _states(arm: Arm, workdir: Path) -> Iterator[tuple[int, Any]]:
    """Parameters of every kept checkpoint, on the host."""
    checkpoints = Checkpoints(workdir / "checkpoints" / arm.label, keep=arm.c.checkpoint.keep)
    try:
        for step, state in checkpoints.history(arm.program.layout.abstract_state()):
            yield step, jax.device_get(state.params)
    finally:
        checkpoints.close()


def measure(arm: Arm, workdir: Path) -> Measured:
    """Densities over training, then the sparsest block masks whose loss stays within GAP on
    held-out sequences, and with it the share of right answers.

    A third of the sequences yields masks, another chooses the coverage; what is reported is of
    sequences that took part in neither."""
    c = arm.c
    block, n = c.data.seq_len // BLOCKS, c.profile.sequences
    (tokens,) = eval_batches(arm.data.val, 3 * n, 1)
    steps, densities, last = [], [], None
    for step, params in _states(arm, workdir):
        last = profile(arm, params, tokens[:n], block, TAU)
        steps.append(step)
        densities.append(last.density_N)
    assert isinstance(last, Profile)
    params = jax.device_get(arm.trained.params)
    choose, judge = tokens[n : 2 * n], tokens[2 * n :]
    recall = arm.c.data.source in RECALL
    dense, right = (
        loss_of(arm, params, choose, None),
        answers_of(arm, params, CHOOSE, None) if recall else 0.0,
    )
    for coverage in COVERAGES:
        masks = block_masks(last.mass_NxWxW, coverage)
        close = (
            loss_of(arm, params, choose, masks) <= (1 + GAP / 2) * dense
        )  # half, so that others meet the whole
        if close and (not recall or answers_of(arm, params, CHOOSE, masks) >= right - GAP / 2):
            break
    for width in WIDTHS:
        if indexed_loss(arm, params, choose, width) <= (1 + GAP / 2) * dense:
            break
    losses = loss_of(arm, params, judge, None), loss_of(arm, params, judge, masks)
    both = lambda: (answers_of(arm, params, JUDGE, None), answers_of(arm, params, JUDGE, masks))
    answers = both() if recall else None
    return Measured(
        np.stack(densities, 1),
        steps,
        masks,
        coverage,
        *losses,
        answers,
        width,
        indexed_loss(arm, params, judge, width),
    )


def loss_of(arm: Arm, params: Any, tokens_BxS: np.ndarray, masks_NxWxW: np.ndarray | None) -> float:
    """Mean loss in nats per token on one device, with the layers' block masks or with dense
    attention.
    """
    model, ids = _model(arm, masks_NxWxW)
    run = _loss(model, arm.objective)  # type: ignore[arg-type]
    return float(run(params, jnp.asarray(tokens_BxS), ids))


def indexed_loss(arm: Arm, params: Any, tokens_BxS: np.ndarray, width: int) -> float:
    """As `loss_of` with the `width` key blocks that each input chooses
    (`context_sparse.topk_ids`).
    """
    mixer = indexed(
        (CommPlan("all_gather"),), tokens_BxS.shape[1] // BLOCKS, BLOCKS
    )  # one program for all widths
    run = _loss(arm.model.clone(mixer=mixer), arm.objective)  # type: ignore[arg-type]
    zeros = jnp.zeros(arm.c.model.layers, jnp.int32)
    return float(run(params, jnp.asarray(tokens_BxS), (zeros, zeros + width)))


def answers_of(arm: Arm, params: Any, seed: int, masks_NxWxW: np.ndarray | None) -> float:
    """Share of the scored tokens of ANSWERS fresh sequences of the arm's recall task that are
    predicted right.
    """
    model, ids = _model(arm, masks_NxWxW)
    tokens_BxS, scored_BxS = task_of(arm.c.data.source, arm.c.data.seq_len).sample(seed, 0, ANSWERS)
    return accuracy(np.asarray(_guesses(model)(params, tokens_BxS, ids)), tokens_BxS, scored_BxS)


def _model(arm: Arm, masks_NxWxW: np.ndarray | None) -> tuple[Any, Any]:
    """(model, lists of key blocks): dense, or with block masks."""
    if masks_NxWxW is None:
        return arm.model, None
    return arm.model.clone(mixer=sparse(arm.c.data.seq_len // BLOCKS)), block_ids(
        masks_NxWxW, BLOCKS
    )


@lru_cache(maxsize=8)
def _guesses(model: Transformer) -> Any:
    """(params, tokens [B, S], lists of key blocks) → the likeliest next token at every position,
    int [B, S].
    """

    @jax.jit
    def run(params: Any, tokens: jax.Array, ids: Any) -> jax.Array:
        variables = {"params": params}
        hidden: Any = model.apply(
            variables, tokens, jnp.zeros(len(tokens)), choice_N=ids, method="hidden"
        )
        logits: Any = model.apply(variables, hidden, method="logits")
        return logits.argmax(-1)

    return run


@lru_cache(maxsize=8)  # compiled once for all masks
def _loss(model: Transformer, objective: Objective) -> Any:
    """(params, tokens [B, S], lists of key blocks) → mean loss."""

    @jax.jit
    def run(params: Any, tokens: jax.Array, ids: Any) -> jax.Array:
        batch = objective.corrupt(jax.random.key(0), tokens)
        return loss_sum(model, objective, None, params, batch, ids) / tokens.size

    return run
