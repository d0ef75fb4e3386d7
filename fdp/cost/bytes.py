"""Closed formulas for the bytes that the loss and its gradients move, per device and train step, by
(op, mesh axes).

Wire bytes sent by ring algorithms, as in fdp.cost.hlo: all-reduce 2(n-1)/n of its payload,
all-gather and reduce-scatter (n-1) shards. The optimizer (a few scalars of the global norm) and the
drawing of noise are not included. Tests hold these formulas equal to the compiled program."""

from collections.abc import Iterable, Mapping
from math import prod

import jax

from fdp.cost import context
from fdp.experiment import Experiment
from fdp.mesh import AXES, DATA_AXES
from fdp.models.conv import halo_bytes
from fdp.models.module import spec_leaf
from fdp.sharding import axes_of
from fdp.step import TrainStep

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


def traffic(p: TrainStep) -> Traffic:
    """Wire bytes per device of one loss-and-gradient evaluation of a Transformer.

    Sources: Shoeybi et al. 2019, Korthikanti et al. 2022, Rajbhandari et al. 2020.
    """
    e = p.experiment
    ledger = _Ledger(e.degrees)
    _activations(ledger, e, p.head_rows())
    _parameters(ledger, p)
    ledger.add(REDUCE, ("pp", *DATA_AXES), 4)  # the loss
    if "weights" in e.data.dims:
        ledger.add(REDUCE, DATA_AXES, 4)  # what it is divided by
    return ledger.total


def _activations(ledger: _Ledger, e: Experiment, head_rows: int) -> None:
    m, d, micro = e.model.shape, e.degrees, e.grads.microbatches
    item = m.itemsize
    tokens = e.fit.batch // (d["dp"] * d["ep"] * micro) * (e.input_length // d["cp"])
    hidden = tokens * m.width * item
    # Rematerialised blocks run their forward collectives again, except the last one, whose result
    # nobody reads unless a gate multiplies it.
    again = m.layers * micro if m.remat != "none" else 0
    outputs_again = again * (2 if m.time_conditioning else 1)
    sublayers = 2 * m.layers * micro
    if m.sequence_parallel:
        shard = hidden / d["tp"]
        # embedding, sublayer outputs
        ledger.add(SCATTER, ("tp",), shard, micro + sublayers + outputs_again)
        # sublayer inputs, head input
        ledger.add(GATHER, ("tp",), shard, micro + sublayers + 2 * again)
        ledger.add(GATHER, ("tp",), shard, micro + sublayers)  # transposes of the scatters
        ledger.add(SCATTER, ("tp",), shard, micro + sublayers)  # transposes of the gathers
    else:
        # embedding, sublayer outputs
        ledger.add(REDUCE, ("tp",), hidden, micro + sublayers + outputs_again)
        ledger.add(REDUCE, ("tp",), hidden, sublayers)  # gradients of sublayer inputs
        ledger.add(REDUCE, ("tp",), head_rows * m.width * item, micro)  # of the head input
    _norm_scales(ledger, e)
    ledger.add(REDUCE, ("tp",), 4 * head_rows, micro)  # maximum of the logits
    ledger.add(REDUCE, ("tp",), 8 * head_rows, micro)  # sum of exponentials and target logit
    _context(ledger, e, m.layers * micro, again)
    _convolution(ledger, e, m.layers * micro, again)


def _context(ledger: _Ledger, e: Experiment, times: int, again: int) -> None:
    """Attention over cp: `times` layers and microbatches, of which `again` run their forward pass
    twice.
    """
    m, d, core, micro = e.model.shape, e.degrees, e.model.core, e.grads.microbatches
    if d["cp"] == 1:
        return
    batch = e.fit.batch // (d["dp"] * d["ep"] * micro)
    heads, kv_heads = m.heads // d["tp"], m.kv_heads // d["tp"]
    shape = context.AttentionShape(
        batch, e.input_length, heads, kv_heads, m.head_dim, d["cp"], m.itemsize
    )
    plan, mask = core.plan, core.mask
    # The one hop of a ring of two is the first of the backward pass, too: XLA makes it once.
    merged = plan.ring_degree(d["cp"]) == 2
    for op, wire in context.forward_bytes(plan, shape, mask).items():
        once = merged and op == context.PERMUTE
        ledger.put(op, ("cp",), wire * (times + (0 if once else again)))
    for op, wire in context.backward_bytes(plan, shape, mask).items():
        ledger.put(op, ("cp",), wire * times)
    if mask.packed:  # positions are known from the layout, document ids are not
        wire = (d["cp"] - 1) * 4 * batch * shape.seq_len / d["cp"]
        ledger.put(GATHER, ("cp",), wire * micro)


def _convolution(ledger: _Ledger, e: Experiment, times: int, again: int) -> None:
    """Halos over cp of the convolution before attention, `again` as in `_context`; its weights meet
    activations that vary over tp."""
    m, d = e.model.shape, e.degrees
    if not m.conv:
        return
    ledger.add(REDUCE, ("tp",), 4 * m.conv * m.width, times)
    sequences = e.fit.batch // (d["dp"] * d["ep"] * e.grads.microbatches)
    at = e.model.layout, e.input_length // d["cp"], d["cp"], m.conv - 1
    wire = halo_bytes(*at, sequences * m.width * m.itemsize)
    if "segments" in e.data.dims:  # once: the scan hoists what all layers share
        wire_of_ids = halo_bytes(*at, sequences * context.LABEL)
        ledger.put(context.PERMUTE, ("cp",), wire_of_ids * e.grads.microbatches)
    ledger.put(context.PERMUTE, ("cp",), wire * (2 * times + again))


def _norm_scales(ledger: _Ledger, e: Experiment) -> None:
    """Gradients of replicated scales that meet activations which vary over tp."""
    m, micro = e.model.shape, e.grads.microbatches
    if m.qk_norm:
        ledger.add(REDUCE, ("tp",), 4 * m.head_dim, 2 * m.layers * micro)
    if m.sequence_parallel:
        ledger.add(REDUCE, ("tp",), 4 * m.width, (2 * m.layers + 1) * micro)
        if m.time_conditioning:  # shift, scale and gate of each sublayer, one row a sequence
            sequences = e.fit.batch // (e.degrees["dp"] * e.degrees["ep"] * micro)
            ledger.add(REDUCE, ("tp",), 4 * sequences * m.width, 3 * 2 * m.layers * micro)


def _parameters(ledger: _Ledger, p: TrainStep) -> None:
    """Gradient reductions and ZeRO gathers; parameters and their gradients travel in float32."""
    e = p.experiment
    specs = jax.tree.leaves(p.specs.stored, is_leaf=spec_leaf)
    metas = jax.tree.leaves(p.specs.metas)
    for leaf, spec, meta in zip(jax.tree.leaves(p.specs.shapes), specs, metas, strict=True):
        used = axes_of(spec)
        shard = 4 * prod(leaf.shape) / prod(e.degrees[a] for a in used)
        ledger.add(REDUCE, [a for a in DATA_AXES if a not in used], shard)
        if "dp" not in used:
            continue
        per_layer = e.zero == 3 and meta.stacked
        backward = e.grads.microbatches if per_layer else 1
        forward = backward * (2 if per_layer and e.model.shape.remat != "none" else 1)
        ledger.add(GATHER, ("dp",), shard, forward)
        ledger.add(SCATTER, ("dp",), shard, backward)
