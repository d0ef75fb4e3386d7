"""Memory per device of a train step, from its parts. `--dry_run` prints it beside the compiler's
plan.

Legend: T tokens a device and microbatch holds, D width, F FFN hidden, H and K heads, C head_dim, S
all positions."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from fdp.kernels_pallas.attend import LONG
from fdp.models.module import spec_leaf
from fdp.models.transformer import Transformer
from fdp.sharding import axes_of
from fdp.step import TrainStep


@dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    parameters: int  # float32 masters, as stored
    optimizer: int  # two float32 moments
    gathered: int  # what ZeRO gathers for use, and the gradients before they are scattered
    activations: int | None  # saved for the backward pass, one live layer, the head; None: unstated

    def total(self) -> int:
        """Everything at once, an upper bound on the peak up to what the compiler adds or fuses
        away; without activations where the model does not state them.
        """
        return self.parameters + self.optimizer + self.gathered + (self.activations or 0)


def _local(p: TrainStep, specs: Any, stacked: bool | None = None) -> int:
    """Bytes of a device's parameters under `specs`; of those that are stacked, or are not."""
    leaves = jax.tree.leaves(specs, is_leaf=spec_leaf)
    parts = zip(
        jax.tree.leaves(p.specs.shapes), leaves, jax.tree.leaves(p.specs.metas), strict=True
    )
    degrees = p.experiment.degrees
    return sum(
        4 * prod(x.shape) // prod(degrees[a] for a in axes_of(spec))
        for x, spec, meta in parts
        if stacked is None or meta.stacked == stacked
    )


def estimate(p: TrainStep) -> Memory:
    """Memory of one train step; activations of a Transformer."""
    zero, model = p.experiment.zero, p.experiment.model
    held, used = _local(p, p.specs.stored), _local(p, p.specs.specs)
    if zero == 0:
        gathered = held  # the gradients
    elif zero == 1:
        gathered = 2 * used
    else:  # one layer and its gradient, all outside the layers, and the scattered gradients
        layers = _local(p, p.specs.specs, True)
        gathered = held + 2 * layers // model.shape.layers + 2 * (used - layers)
    stated = activations(p) if isinstance(model, Transformer) else None
    return Memory(held, 2 * held, gathered, stated)


def activations(p: TrainStep) -> int:
    """Bytes of activations at the start of the backward pass, which is their peak (Korthikanti et
    al. 2022, §4).

    Attention probabilities are counted where attention keeps them: in short sequences on cp = 1;
    others go tile by tile."""
    e = p.experiment
    m, d, item, length = e.model.shape, e.degrees, e.model.shape.itemsize, e.input_length
    tokens = e.fit.batch // (d["dp"] * d["ep"] * e.grads.microbatches) * (length // d["cp"])
    hidden = tokens * m.width * item
    between = hidden // d["tp"] if m.sequence_parallel else hidden
    heads, kv = m.heads // d["tp"], m.kv_heads // d["tp"]
    projections = tokens * m.head_dim * (2 * heads + kv) * item
    projections += 2 * tokens * d["cp"] * kv * m.head_dim * item
    blockwise = d["cp"] > 1 or length >= LONG
    scores = 0 if blockwise else heads * tokens * length * (4 + item)  # f32 logits, probabilities
    ffn = 4 * tokens * (m.ffn // d["tp"]) * item  # gate, up, silu(gate), product
    mixed = hidden if m.conv else 0  # the input of the projections, beside that of the filter
    layer = 2 * between + 2 * hidden + mixed + projections + scores + ffn
    products = 2 * between + projections + ffn // 2
    saved = {"none": layer, "dots": between + products, "full": between}[m.remat]
    live = 0 if m.remat == "none" else layer
    rows = p.head_rows()
    head = rows * (m.width * item + 2 * 4 * m.vocab // d["tp"])  # rows, logits and their gradient
    return m.layers // d["pp"] * saved + live + hidden + head
