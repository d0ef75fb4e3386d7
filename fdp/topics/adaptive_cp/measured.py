"""What a trained model attends to, and the sparsest block masks that cost it little.

Legend: B sequences, S positions, W blocks of a sequence, N layers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.data.batches import eval_batches
from fdp.data.recall import RECALL, accuracy, task_of
from fdp.models import module
from fdp.models.transformer import Transformer, with_core
from fdp.objectives.base import TokenObjective
from fdp.parallel.context.cores import Indexed, Sparse
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.profile import TAU, block_masks, profile
from fdp.parallel.tensor import suppress
from fdp.step import mean_loss
from fdp.study.context_switching import block_ids
from fdp.topics.adaptive_cp.settings import BLOCKS

Variables = module.Variables
Batch = dict[str, Any]
COVERAGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
WIDTHS = (2, 4, 8, 16, BLOCKS)
GAP = 0.005  # relative loss that sparsity may cost
# Seeds of fresh recall sequences (0 and 1 are those of the data), and how many.
CHOOSE, JUDGE, ANSWERS = 2, 3, 64


@dataclass(frozen=True)
class Measured:
    """Block masks of one trained arm, their coverage and loss; of a recall task the share of
    answers that are right, (dense, sparse); `width` of lists made from each input, and the loss
    with them."""

    masks_NxWxW: np.ndarray
    coverage: float
    dense_loss: float
    sparse_loss: float
    answers: tuple[float, float] | None
    width: int
    indexed_loss: float


def share(masks_NxWxW: np.ndarray) -> np.ndarray:
    """Share of the causal blocks that each layer's mask keeps, [N]."""
    W = masks_NxWxW.shape[-1]
    return masks_NxWxW.sum((1, 2)) / (W * (W + 1) / 2)


def measured(arm: Arm, sequences: int) -> Measured:
    """The sparsest block masks whose loss stays within GAP on held-out sequences, and with it the
    share of right answers.

    Of three times `sequences`, a third yields masks, another chooses the coverage; what is reported
    is of sequences that took part in neither."""
    (batch,) = eval_batches(arm.data.val, 3 * sequences, 1)
    first, choose, judge = (
        {k: x[i * sequences : (i + 1) * sequences] for k, x in batch.items()} for i in range(3)
    )
    variables = arm.trained_on_host.variables
    block = first["tokens"].shape[1] // BLOCKS
    mass_NxWxW = profile(
        arm.model, arm.objective, variables, first["tokens"], block, TAU
    ).mass_NxWxW
    coverage, masks = _sparsest(arm, variables, choose, mass_NxWxW)
    width, answers = _shortest(arm, variables, choose), None
    if arm.name in RECALL:
        dense, sparse = (answers_of(arm, variables, JUDGE, m) for m in (None, masks))
        answers = (dense, sparse)
    losses = [loss_of(arm, variables, judge, m) for m in (None, masks)]
    listed = width, indexed_loss(arm, variables, judge, width)
    return Measured(masks, coverage, losses[0], losses[1], answers, *listed)


def _sparsest(
    arm: Arm, variables: Variables, batch: Batch, mass_NxWxW: np.ndarray
) -> tuple[float, np.ndarray]:
    """The least coverage, and its masks, that cost at most half of GAP, so that other sequences
    meet the whole."""
    recall, dense = arm.name in RECALL, loss_of(arm, variables, batch, None)
    right = answers_of(arm, variables, CHOOSE, None) if recall else 0.0
    for coverage in COVERAGES:
        masks = block_masks(mass_NxWxW, coverage)
        close = loss_of(arm, variables, batch, masks) <= (1 + GAP / 2) * dense
        if close and (not recall or answers_of(arm, variables, CHOOSE, masks) >= right - GAP / 2):
            break
    return coverage, masks


def _shortest(arm: Arm, variables: Variables, batch: Batch) -> int:
    """The least width of lists made from each input that costs at most half of GAP."""
    dense = loss_of(arm, variables, batch, None)
    for width in WIDTHS:
        if indexed_loss(arm, variables, batch, width) <= (1 + GAP / 2) * dense:
            break
    return width


def loss_of(arm: Arm, variables: Variables, batch: Batch, masks_NxWxW: np.ndarray | None) -> float:
    """Mean loss in nats per token on one device, with the layers' block masks or with dense
    attention.
    """
    model, ids = _model(arm, masks_NxWxW)
    return float(_loss(model, arm.objective)(variables, batch, ids))


def indexed_loss(arm: Arm, variables: Variables, batch: Batch, width: int) -> float:
    """As `loss_of` with the `width` key blocks that each input chooses
    (`lists.topk_ids`).
    """
    block = batch["tokens"].shape[1] // BLOCKS
    core = Indexed((CommPlan("all_gather"),), block, BLOCKS)  # one program for all widths
    zeros = jnp.zeros(arm.model.shape.layers, jnp.int32)
    run = _loss(with_core(arm.model, core), arm.objective)
    return float(run(variables, batch, (zeros, zeros + width)))


def answers_of(arm: Arm, variables: Variables, seed: int, masks_NxWxW: np.ndarray | None) -> float:
    """Share of the scored tokens of ANSWERS fresh sequences of the arm's recall task that are
    predicted right.
    """
    model, ids = _model(arm, masks_NxWxW)
    task = task_of(arm.name, arm.experiment.input_length)
    tokens_BxS, scored_BxS = task.sample(seed, 0, ANSWERS)
    guesses = np.asarray(_guesses(model, arm.objective)(variables, tokens_BxS, ids))
    return accuracy(guesses, tokens_BxS, scored_BxS)


def _model(arm: Arm, masks_NxWxW: np.ndarray | None) -> tuple[Transformer, Any]:
    """(model, lists of key blocks): dense, or with block masks."""
    if masks_NxWxW is None:
        return arm.model, None
    core = Sparse(arm.experiment.input_length // BLOCKS)
    return with_core(arm.model, core), block_ids(masks_NxWxW, BLOCKS)


@lru_cache(maxsize=8)
def _guesses(model: Transformer, objective: TokenObjective) -> Any:
    """(variables, tokens [B, S], lists of key blocks) → the likeliest next token at every position,
    int [B, S].
    """

    @jax.jit
    def run(variables: Variables, tokens: jax.Array, ids: Any) -> jax.Array:
        noised = objective.corrupt(jax.random.key(0), {"tokens": tokens})
        x, _, _ = module.run(model, variables, noised, method="embed")
        x, _, _ = module.run(model, variables, x, noised, ids, method="stack")
        logits, _, _ = module.run(model, variables, x, method="outputs")
        guesses = suppress(logits, objective.n_ids).argmax(-1)
        return jnp.roll(guesses, -1, axis=1)  # a row predicts the token of its own place

    return run


@lru_cache(maxsize=8)  # compiled once for all masks
def _loss(model: Transformer, objective: TokenObjective) -> Any:
    """(variables, batch, lists of key blocks) → mean loss."""

    @jax.jit
    def run(variables: Variables, batch: Batch, ids: Any) -> jax.Array:
        noised = objective.corrupt(jax.random.key(0), batch)
        return mean_loss(model, objective, variables, noised, ids)

    return run
