"""What need not be computed or sent: the head on rows without loss, and logits where ids do.

Legend: B batch, L positions.
"""

import copy
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from fdp import process
from fdp.arm import Arm
from fdp.collectives import all_gather, shard_map
from fdp.count import hlo, jaxpr
from fdp.count.compare import sent
from fdp.data.batches import batch
from fdp.mesh import AXES, make_mesh
from fdp.sampling.noise import categorical_confidence, gumbel
from fdp.step import TrainStep
from fdp.study.samples import draw

V_WIDE, ROWS = 32_768, 64  # a vocabulary of today, rows a device samples at once


@dataclass(frozen=True)
class HeadSaving:
    """Loss and gradients of one batch with the head on (the masked rows, every row): the loss,
    matmul FLOPs, wire bytes and temporary bytes of a device; `every_row`: FLOPs of the head alone.
    """

    losses: list[float]
    flops: list[int]
    sent: list[float]
    temporary: list[int]
    every_row: int

    @property
    def masked_rows(self) -> int:
        """FLOPs of the head on the masked rows."""
        return self.every_row - (self.flops[1] - self.flops[0])

    @property
    def loss_error(self) -> float:
        """Relative change of the loss."""
        return abs(self.losses[0] - self.losses[1]) / abs(self.losses[1])


def first_batch(arm: Arm) -> dict[str, np.ndarray]:
    """Of training."""
    return batch(arm.data.train, 0, arm.experiment.fit.batch, 0)


def head_saving(program: TrainStep, batch: dict[str, np.ndarray]) -> HeadSaving:
    """Compile, count and run the two programs at initialisation."""
    variables = program.init(0).variables
    placed = process.place(batch, program.batch_shardings())
    noised = jax.jit(program.corrupt)(placed, jax.random.key(0))
    every = copy.copy(program)
    every.capacity = None
    found = []
    for p in (program, every):
        traced = jax.jit(p.grads).trace(variables, noised)
        compiled: Any = traced.lower().compile(hlo.QUICK)
        wire = sum(sent(compiled, p.mesh).values())
        memory = int(compiled.memory_analysis().temp_size_in_bytes)
        loss = float(compiled(variables, noised)[0])
        found.append((loss, jaxpr.dot_flops(traced.jaxpr), wire, memory))
    e, d = program.experiment, program.experiment.degrees
    rows = e.fit.batch * (e.data.seq_len or 1) // (d["dp"] * d["ep"] * d["cp"])
    head = 3 * 2 * rows * e.model.shape.width * e.model.shape.vocab // d["tp"]
    losses, flops, wires, temporary = (list(pair) for pair in zip(*found, strict=True))
    return HeadSaving(losses, flops, wires, temporary, head)


def masked_rows_head(arm: Arm) -> HeadSaving:
    """Of the arm's program, on its first batch."""
    return head_saving(arm.program, first_batch(arm))


@dataclass(frozen=True)
class SamplingBytes:
    """Bytes over tp a device sends to draw a token and its confidence for each of ROWS rows, and to
    gather logits.
    """

    tp: int
    scalars: float
    gather: float


def sampling_bytes(tp: int) -> SamplingBytes:
    """Both counted in the compiled program for `tp` devices and V_WIDE ids."""
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp})
    keys = jnp.zeros((1, ROWS, 2), jnp.uint32)
    logits = jnp.zeros((1, ROWS, V_WIDE))

    def gathered(keys: jax.Array, logits: jax.Array) -> Any:
        whole = all_gather(logits, "tp", dim=2)
        scores = whole + gumbel(keys, whole.shape[-1])
        return scores.argmax(-1), jax.nn.softmax(whole).max(-1)

    wire = []
    for method, out in ((categorical_confidence, P()), (gathered, P("tp"))):
        program = shard_map(method, mesh, (P(), P(None, None, "tp")), (out, out))
        compiled = jax.jit(program).lower(keys, logits).compile()
        wire.append(sum(sent(compiled, mesh).values()))
    return SamplingBytes(tp, *wire)


def ids_by_degree(arm: Arm, count: int, degrees: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Samples int32 [count, L] of the same parameters and seed, drawn with each tp degree that the
    model allows.
    """
    m = arm.model.shape
    fits = [t for t in degrees if not any(n % t for n in (m.heads, m.kv_heads, m.ffn, m.vocab))]
    return {t: draw(arm, count, make_mesh(dict.fromkeys(AXES, 1) | {"tp": t})) for t in fits}
