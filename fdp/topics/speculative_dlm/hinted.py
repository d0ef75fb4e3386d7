"""A draft model that is also shown what the verifier said of an earlier state of the same chain.

Legend: B sequences, L positions, D width, V vocabulary (local over tp)."""

from typing import Any

import jax
import jax.numpy as jnp

from fdp.collectives import size, vary, vary_like
from fdp.count.counts import Degrees, Rows, Staged, Unstated
from fdp.experiment import Experiment
from fdp.models import module
from fdp.models.layers import leave_tp
from fdp.models.module import Module, compact, initializers
from fdp.models.shape import ModelShape
from fdp.models.transformer import Transformer
from fdp.parallel.tensor import suppress, vocab_logsumexp, vocab_offset
from fdp.sampling.draw import denoiser_of
from fdp.sampling.speculative import ModelDrafter

Array = jax.Array
FLOOR = -20.0  # of a hint's log probabilities


class HintEmbedding(Module):
    """The mean embedding of the ids that a hint holds likely, of a table of its own: log
    probabilities [B, L, V/tp] → [B, L, D]."""

    shape: ModelShape

    @compact
    def __call__(self, logp_BxLxV: Array) -> Array:
        s, draw = self.shape, initializers.normal(1.0)
        table = self.weight("table", draw, (s.vocab, s.width), ("tp", None), decay=False)
        mean_BxLxD = jnp.exp(logp_BxLxV).astype(s.dtype) @ table.astype(s.dtype)
        return leave_tp(mean_BxLxD, s.sequence_parallel)


class HintedTransformer(Transformer):
    """The Transformer with noised["hint"], f32 [B, L, V]: the verifier's logits at an earlier
    state, of all ids or of this device's; equal ones, as zeros, where it has said nothing.

    A hint comes in twice. Its mean embedding is added to that of the tokens, so that other
    positions can attend to it; and it is added to the logits, times a learned factor that begins at
    1, so that what the layers have to learn is how the law has changed since. `n_ids`: ids that may
    be drawn."""

    n_ids: int = 0

    def setup(self) -> None:
        super().setup()
        self.hint_embedding = HintEmbedding(self.shape)
        self.trust = self.weight("trust", initializers.ones, (1,), (None,), decay=False)

    def _hint(self, noised: dict[str, Any]) -> Array:
        """Log probabilities of this device's ids, at least FLOOR."""
        columns = self.shape.vocab // size("tp")
        hint = noised.get("hint")
        if hint is None:
            hint = jnp.zeros((*noised["inputs"].shape, columns))
        if hint.shape[-1] != columns:
            hint = jax.lax.dynamic_slice_in_dim(hint, vocab_offset(columns), columns, axis=-1)
        logits = suppress(hint.astype(jnp.float32), self.n_ids)
        return jnp.maximum(logits - vocab_logsumexp(logits)[..., None], FLOOR)

    def embed(self, noised: dict[str, Any], given: Any = None) -> Array:
        """Embeddings of tokens and hint: [B, L, D]."""
        return super().embed(noised, given) + self.hint_embedding(self._hint(noised))

    def finish(self, x_BxLxD: Array, noised: dict[str, Any]) -> Array:
        """What `outputs` reads: the normed rows, and the hint behind them, [B, L, D + V/tp]."""
        x_BxLxD = vary(super().finish(x_BxLxD, noised), "tp")
        hint_BxLxV = vary_like(self._hint(noised).astype(x_BxLxD.dtype), x_BxLxD)
        return jnp.concatenate([x_BxLxD, hint_BxLxV], axis=-1)

    def outputs(self, x_D: Array) -> Array:
        """Logits of any selection of those rows: float32 [..., V/tp]."""
        D = self.shape.width
        return super().outputs(x_D[..., :D]) + self.trust * x_D[..., D:].astype(jnp.float32)

    def hinted(self, ids_BxL: Array, noise_B: Array, hint_BxLxV: Array) -> Array:
        """Logits of plain ids and a hint, for samplers: float32 [B, L, V/tp]."""
        return self({"inputs": ids_BxL, "noise": noise_B, "hint": hint_BxLxV})

    def staged(self, rows: Rows, degrees: Degrees) -> Staged:
        """Raises Unstated."""
        raise Unstated("the hint of a draft has no counts")

    @property
    def stock(self) -> bool:
        """Never."""
        return False


def drafter_from(e: Experiment, variables: Any) -> ModelDrafter:
    """A trained draft model as a drafter, with the verifier's stale marginals where it reads
    them."""
    if not isinstance(e.model, HintedTransformer):
        return ModelDrafter(denoiser_of(e, variables))

    def denoise(z_BxL: Array, noise_B: Array, hint_BxLxV: Array) -> Array:
        return module.run(e.model, variables, z_BxL, noise_B, hint_BxLxV, method="hinted")[0]

    return ModelDrafter(denoise, hint=True, columns=e.model.shape.vocab // size("tp"))


def hinted(model: Any, n_ids: int) -> HintedTransformer:
    """The stock Transformer `model` with a hint."""
    fields = "shape", "pattern", "layout", "position", "reduction", "lead"
    return HintedTransformer(**{name: getattr(model, name) for name in fields}, n_ids=n_ids)
