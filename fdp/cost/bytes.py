"""Closed formulas for the bytes that the loss and its gradients move, per device and train step, by
(op, mesh axes).

Wire bytes sent by ring algorithms, as in fdp.cost.hlo: all-reduce 2(n-1)/n of its payload,
all-gather and reduce-scatter (n-1) shards. The optimizer (a few scalars of the global norm) and the
drawing of noise are not included. Tests hold these formulas equal to the compiled program."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import jax
import ml_collections
from jax.sharding import PartitionSpec

from fdp.cost import context
from fdp.kernels_pallas.masks import Mask
from fdp.mesh import AXES, DATA_AXES
from fdp.parallel.context_plan import CommPlan
from fdp.parallel.layouts import SequenceLayout

Traffic = dict[tuple[str, tuple[str, ...]], float]

REDUCE, GATHER, SCATTER = "all-reduce", "all-gather", "reduce-scatter"


class _Ledger:
    """Adds up wire bytes; axes of degree 1 move nothing and are left out of the key."""

    def __init__(self, degrees: Mapping[str, int]):
        self.degrees = degrees
        self.total: Traffic = {}

    def add(self, op: str, axes: Iterable[str], payload: float, times: int = 1) -> None:
        """payload: bytes of the whole operand for all-reduce, of one shard for all-gather and
        reduce-scatter.
        """
        live = tuple(a for a in AXES if a in axes and self.degrees[a] > 1)
        n = prod(self.degrees[a] for a in live)
        if live and times:
            wire = times * payload * (2 * (n - 1) / n if op == REDUCE else n - 1)
            self.put(op, live, wire)

    def put(self, op: str, axes: tuple[str, ...], wire: float) -> None:
        """wire: bytes that the device sends, whatever the algorithm."""
        self.total[op, axes] = self.total.get((op, axes), 0.0) + wire


def traffic(c: ml_collections.ConfigDict, shapes: Any, stored: Any, head_rows: int) -> Traffic:
    """Wire bytes per device of one loss-and-gradient evaluation.

    `shapes`, `stored`: parameter shapes and stored specs (fdp.state.Layout); `head_rows`: rows per
    device and microbatch that reach the head. Sources: Shoeybi et al. 2019, Korthikanti et al.
    2022, Rajbhandari et al. 2020."""
    ledger = _Ledger(c.mesh)
    _activations(ledger, c, head_rows)
    _parameters(ledger, c, shapes, stored)
    ledger.add(REDUCE, ("pp", *DATA_AXES), 4)  # the loss
    return ledger.total


def _activations(ledger: _Ledger, c: ml_collections.ConfigDict, head_rows: int) -> None:
    m, t, mesh = c.model, c.train, c.mesh
    item = 2 if m.dtype == "bfloat16" else 4
    micro = t.microbatches
    doubled = 2 if c.objective.name == "block_diffusion" else 1
    tokens = t.batch // (mesh.dp * mesh.ep * micro) * (doubled * c.data.seq_len // mesh.cp)
    hidden = tokens * m.width * item
    # Rematerialised blocks run their forward collectives again, except the last one, whose result
    # nobody reads unless a gate multiplies it.
    again = m.layers * micro if m.remat != "none" else 0
    outputs_again = again * (2 if m.time_conditioning else 1)
    sublayers = 2 * m.layers * micro
    if m.sequence_parallel:
        shard = hidden / mesh.tp
        ledger.add(
            SCATTER, ("tp",), shard, micro + sublayers + outputs_again
        )  # embedding, sublayer outputs
        ledger.add(
            GATHER, ("tp",), shard, micro + sublayers + 2 * again
        )  # sublayer inputs, head input
        ledger.add(GATHER, ("tp",), shard, micro + sublayers)  # transposes of the scatters
        ledger.add(SCATTER, ("tp",), shard, micro + sublayers)  # transposes of the gathers
        _norm_scales(ledger, c, sequence_parallel=True)
    else:
        ledger.add(
            REDUCE, ("tp",), hidden, micro + sublayers + outputs_again
        )  # embedding, sublayer outputs
        ledger.add(REDUCE, ("tp",), hidden, sublayers)  # gradients of sublayer inputs
        ledger.add(REDUCE, ("tp",), head_rows * m.width * item, micro)  # gradient of the head input
        _norm_scales(ledger, c, sequence_parallel=False)
    ledger.add(REDUCE, ("tp",), 4 * head_rows, micro)  # maximum of the logits
    ledger.add(REDUCE, ("tp",), 8 * head_rows, micro)  # sum of exponentials and target logit
    _context(ledger, c, item, m.layers * micro, again)


def _context(
    ledger: _Ledger, c: ml_collections.ConfigDict, item: int, times: int, again: int
) -> None:
    """Attention over cp: `times` layers and microbatches, of which `again` run their forward pass
    twice.
    """
    m, x, mesh = c.model, c.context, c.mesh
    if mesh.cp == 1:
        return
    split = mesh.cp if x.plan == "ulysses" else x.head_split
    layout = SequenceLayout(x.layout, x.stripe if x.layout == "striped" else 1)
    plan = CommPlan(x.plan, split, layout=layout)
    batch = c.train.batch // (mesh.dp * mesh.ep * c.train.microbatches)
    doubled = 2 if c.objective.name == "block_diffusion" else 1
    shape = context.AttentionShape(
        batch,
        doubled * c.data.seq_len,
        m.heads // mesh.tp,
        m.kv_heads // mesh.tp,
        m.head_dim,
        mesh.cp,
        item,
    )
    mask = Mask("causal" if c.objective.name == "autoregressive" else "bidirectional", m.window)
    for op, wire in context.forward_bytes(plan, shape, mask).items():
        ledger.put(op, ("cp",), wire * (times + again))
    for op, wire in context.backward_bytes(plan, shape, mask).items():
        ledger.put(op, ("cp",), wire * times)
    if plan != CommPlan("all_gather") or m.window:
        for op, wire in context.label_bytes(shape, mask).items():
            ledger.put(op, ("cp",), wire * c.train.microbatches)


def _norm_scales(ledger: _Ledger, c: ml_collections.ConfigDict, sequence_parallel: bool) -> None:
    """Gradients of replicated scales that meet activations which vary over tp."""
    m, micro = c.model, c.train.microbatches
    if m.qk_norm:
        ledger.add(REDUCE, ("tp",), 4 * m.head_dim, 2 * m.layers * micro)
    if sequence_parallel:
        ledger.add(REDUCE, ("tp",), 4 * m.width, (2 * m.layers + 1) * micro)
        if m.time_conditioning:  # shift, scale and gate of each sublayer, one row a sequence
            sequences = c.train.batch // (c.mesh.dp * c.mesh.ep * micro)
            ledger.add(REDUCE, ("tp",), 4 * sequences * m.width, 3 * 2 * m.layers * micro)


def _parameters(ledger: _Ledger, c: ml_collections.ConfigDict, shapes: Any, stored: Any) -> None:
    """Gradient reductions and ZeRO gathers; parameters and their gradients travel in float32."""
    t = c.train
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    specs = jax.tree.leaves(stored, is_leaf=lambda s: isinstance(s, PartitionSpec))
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        used = [e for e in spec if e]
        shard = 4 * prod(leaf.shape) / prod(c.mesh[a] for a in used)
        ledger.add(REDUCE, [a for a in DATA_AXES if a not in used], shard)
        if "dp" not in used:
            continue
        per_layer = t.zero == 3 and path[0].key == "layers"
        backward = t.microbatches if per_layer else 1
        forward = backward * (2 if per_layer and c.model.remat != "none" else 1)
        ledger.add(GATHER, ("dp",), shard, forward)
        ledger.add(SCATTER, ("dp",), shard, backward)
