"""Memory per device of a train step, from its parts. `--dry_run` prints it beside the compiler's
plan.

Legend: T tokens a device and microbatch holds, D width, F FFN hidden, H and K heads, C head_dim, S
all positions."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import ml_collections
from jax.sharding import PartitionSpec

from fdp.kernels_pallas.attend import LONG


@dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    parameters: int  # float32 masters, as stored
    optimizer: int  # two float32 moments
    gathered: int  # what ZeRO gathers for use, and the gradients before they are scattered
    activations: int  # saved for the backward pass, one live layer, the head

    def total(self) -> int:
        """Everything at once, an upper bound on the peak up to what the compiler adds or fuses
        away.
        """
        return self.parameters + self.optimizer + self.gathered + self.activations


def _local(shapes: Any, specs: Any, degrees: Any) -> int:
    leaves = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return sum(
        4 * prod(x.shape) // prod(degrees[a] for a in spec if a)
        for x, spec in zip(jax.tree.leaves(shapes), leaves, strict=True)
    )


def estimate(
    c: ml_collections.ConfigDict, shapes: Any, specs: Any, stored: Any, head_rows: int
) -> Memory:
    """Memory of one train step; `specs` are the model's, `stored` those at rest, `head_rows` rows
    the head sees.
    """
    held, used = _local(shapes, stored, c.mesh), _local(shapes, specs, c.mesh)
    layers = _local(shapes["layers"], specs["layers"], c.mesh)
    if c.train.zero == 0:
        gathered = held  # the gradients
    elif c.train.zero == 1:
        gathered = 2 * used
    else:  # one layer and its gradient, everything outside the layers, and the scattered gradients
        gathered = held + 2 * layers // c.model.layers + 2 * (used - layers)
    return Memory(held, 2 * held, gathered, activations(c, head_rows))


def activations(c: ml_collections.ConfigDict, head_rows: int) -> int:
    """Bytes of activations at the start of the backward pass, which is their peak (Korthikanti et
    al. 2022, §4).

    Attention probabilities are counted where attention keeps them: in short sequences on cp = 1;
    others go tile by tile."""
    m, mesh = c.model, c.mesh
    item = 2 if m.dtype == "bfloat16" else 4
    doubled = 2 if c.objective.name == "block_diffusion" else 1
    length = doubled * c.data.seq_len
    tokens = c.train.batch // (mesh.dp * mesh.ep * c.train.microbatches) * (length // mesh.cp)
    hidden = tokens * m.width * item
    between = hidden // mesh.tp if m.sequence_parallel else hidden
    heads, kv = m.heads // mesh.tp, m.kv_heads // mesh.tp
    projections = (
        tokens * m.head_dim * (2 * heads + kv) * item
        + 2 * tokens * mesh.cp * kv * m.head_dim * item
    )
    blockwise = mesh.cp > 1 or length >= LONG
    scores = (
        0 if blockwise else heads * tokens * length * (4 + item)
    )  # float32 logits and the probabilities
    ffn = 4 * tokens * (m.ffn // mesh.tp) * item  # gate, up, silu(gate), product
    layer = 2 * between + 2 * hidden + projections + scores + ffn
    products = 2 * between + projections + ffn // 2
    saved = {"none": layer, "dots": between + products, "full": between}[m.remat]
    live = 0 if m.remat == "none" else layer
    head = head_rows * (
        m.width * item + 2 * 4 * m.vocab // mesh.tp
    )  # rows, logits and their gradient
    return m.layers // mesh.pp * saved + live + hidden + head
