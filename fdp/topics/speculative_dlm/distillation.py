"""The loss of a draft that learns the verifier's law at given states, in place of the data's.

Shapes: B states, L positions, V vocabulary (tp: V/tp columns), R rows (any leading shape)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from fdp.collectives import pmax, psum
from fdp.count.counts import REDUCE, Counts, Degrees, Ledger, Work
from fdp.count.counts import Rows as CountedRows
from fdp.objectives.base import Batch, Rows, TokenObjective
from fdp.parallel.tensor import suppress, vocab_offset

ROW = ("batch", "sequence")


@dataclass(frozen=True)
class Distillation(TokenObjective):
    """The mean over states of the mean over their masked rows of

        (1 - hard) · KL(p_v ‖ p_d) + hard · -log p_d(x),

    p_v: the verifier's law of the row at that state, p_d: the draft's, x: the id that the
    verifier's chain ends with there. Both terms have their least expectation at the same p_d for a
    verifier whose laws are consistent; the first has the smaller variance. In nats; 0 is a draft
    that agrees with the verifier (for hard = 0).

    A batch: "state" int32 [B, L], masked where it holds n_ids; "tokens" int32 [B, L], the x; "law"
    f32 [B, L, V], the p_v; and "hint" f32 [B, L, V], which goes to the model as it is, where there
    is one."""

    dims: ClassVar[Any] = {
        **TokenObjective.dims,
        "rows": {"targets": ROW, "weights": ROW, "law": (*ROW, None)},
        "hint": (*ROW, None),
    }
    hard: float = 0.0

    def corrupt(self, key: jax.Array, batch: Batch) -> Any:
        """The states as they are, without noise from `key`. A row counts L/k at a state with k
        masked rows, so that Σ loss / (B·L) is the mean of means."""
        del key
        state_BxL = batch["state"].astype(jnp.int32)
        masked_BxL = state_BxL == self.n_ids
        length, k_B = state_BxL.shape[1], masked_BxL.sum(1)
        weights_BxL = jnp.where(masked_BxL, length / jnp.maximum(k_B, 1)[:, None], 0.0)
        rows = {"targets": batch["tokens"], "weights": weights_BxL, "law": batch["law"]}
        noised = {"inputs": state_BxL, "noise": k_B / length, "rows": rows}
        return noised | {name: batch[name] for name in ("hint",) if name in batch}

    def loss(self, logits_RxV: jax.Array, rows: Rows) -> jax.Array:
        """[R..., V/tp] → f32 [R...]. Every reduction after the maximum shares one psum."""
        logits_RxV = suppress(logits_RxV, self.n_ids, self.axes)
        columns = logits_RxV.shape[-1]
        first = vocab_offset(columns, self.axes)
        law_RxV = jax.lax.dynamic_slice_in_dim(rows["law"], first, columns, axis=-1)
        final_RxV = rows["targets"][..., None] == first + jnp.arange(columns)
        wanted_RxV = (1 - self.hard) * law_RxV + self.hard * final_RxV
        top_R = pmax(jax.lax.stop_gradient(logits_RxV.max(-1)), self.axes)
        below_RxV = logits_RxV - top_R[..., None]
        sums = jnp.exp(below_RxV), wanted_RxV * below_RxV, xlogy(law_RxV, law_RxV)
        total_R, agreed_R, certain_R = psum(jnp.stack([x.sum(-1) for x in sums]), self.axes)
        cross_R = jnp.log(total_R) - agreed_R
        return rows["weights"] * (cross_R + (1 - self.hard) * certain_R)

    def counts(self, rows: CountedRows, degrees: Degrees) -> Counts:
        """Of the reductions in float32: the maximum of a row's logits, then three sums."""
        ledger = Ledger(degrees).add(REDUCE, self.axes, (4 + 12) * rows.head)
        return Counts(forward=Work(sent=ledger.sent))
