"""Claims about sharding: equal to one device, bytes equal the closed formula, the head's FLOPs, ids
on the wire.

Legend: B batch, L positions.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import PartitionSpec as P

from fdp import sharding
from fdp.arm import Arm
from fdp.collectives import all_gather, shard_map
from fdp.cost import bytes as closed
from fdp.cost import hlo, jaxpr
from fdp.mesh import AXES, AnyMesh, make_mesh
from fdp.models import transformer
from fdp.objectives.base import Objective
from fdp.sample import draw
from fdp.sampling.noise import categorical_confidence, gumbel
from fdp.step import Program, batch_specs, tokens_sharding

# Every axis alone (pp needs a schedule), then all of them mixed with sequence parallelism and
# ZeRO-3.
MESHES: dict[str, dict[str, int]] = {
    "dp8": {"dp": 8},
    "ep4": {"ep": 4},
    "cp4": {"cp": 4},
    "tp4": {"tp": 4},
    "dp2·cp2·tp2, SP, ZeRO-3": {"dp": 2, "cp": 2, "tp": 2},
}
DEVICES = 8


@dataclass(frozen=True)
class Comparison:
    """One mesh against one device: relative errors, and wire bytes per (op, axes) counted and by
    formula.
    """

    mesh: str
    loss_error: float
    gradient_error: float
    counted: dict[tuple[str, tuple[str, ...]], float]
    formula: dict[tuple[str, tuple[str, ...]], float]

    def mismatches(self) -> int:
        """Number of (op, axes) whose counted bytes differ from the formula."""
        keys = self.counted.keys() | self.formula.keys()
        return sum(
            not math.isclose(self.counted.get(k, 0), self.formula.get(k, 0), rel_tol=1e-12)
            for k in keys
        )


def small(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The arm's config shrunk until every mesh compiles in seconds; float32, so that errors
    show.
    """
    c = c.copy_and_resolve_references()
    c.model.update(
        layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ffn=64, vocab=256, dtype="float32"
    )
    c.data.seq_len, c.train.batch, c.train.zero, c.model.remat = 32, 8, 0, "none"
    c.mesh.update(dict.fromkeys(AXES, 1))
    return c


def _program(c: ml_collections.ConfigDict, objective: Objective, mesh: AnyMesh) -> Program:
    return Program(
        c, transformer.from_config(c, objective.attention, objective.block), objective, mesh
    )


def _loss_and_grads(program: Program, params: Any, batch: Any) -> tuple[float, Any, Any]:
    """(loss, gradients, compiled loss-and-gradient program) of host arrays on the program's
    mesh.
    """
    params = jax.device_put(params, sharding.shardings(program.mesh, program.layout.stored))
    batch = jax.device_put(batch, sharding.shardings(program.mesh, batch_specs(batch)))
    compiled = jax.jit(program.grads, compiler_options=hlo.QUICK).lower(params, batch).compile()
    loss, grads = compiled(params, batch)
    return float(loss), jax.device_get(grads), compiled


def compare_meshes(c: ml_collections.ConfigDict, objective: Objective) -> list[Comparison]:
    """Loss, gradients and bytes of the small model on every mesh of MESHES against one device.

    The same parameters and noise everywhere; that every mesh would also draw them equal is for the
    tests to show."""
    c = small(c)
    tokens_BxL = np.random.default_rng(0).integers(
        0, objective.n_ids, (c.train.batch, c.data.seq_len), np.int32
    )
    alone = _program(c, objective, make_mesh(c.mesh, jax.devices()[:1]))
    params = jax.device_get(alone.init(0).params)
    batch = jax.device_get(jax.jit(objective.corrupt)(jax.random.key(0), tokens_BxL))
    loss, grads, _ = _loss_and_grads(alone, params, batch)
    norm = _norm(grads)
    out = []
    for name, degrees in MESHES.items():
        d = c.copy_and_resolve_references()
        d.mesh.update(degrees)
        if "ZeRO-3" in name:
            d.train.zero, d.model.sequence_parallel, d.model.remat = 3, True, "full"
        program = _program(d, objective, make_mesh(d.mesh))
        other, other_grads, compiled = _loss_and_grads(program, params, batch)
        difference = _norm(jax.tree.map(np.subtract, other_grads, grads))
        out.append(
            Comparison(
                name,
                abs(other - loss) / abs(loss),
                difference / norm,
                counted_bytes(compiled, program.mesh),
                dict(
                    closed.traffic(
                        d, program.layout.shapes, program.layout.stored, program.head_rows()
                    )
                ),
            )
        )
    return out


def _norm(tree: Any) -> float:
    return math.sqrt(
        sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree))
    )


def counted_bytes(compiled: Any, mesh: AnyMesh) -> dict[tuple[str, tuple[str, ...]], float]:
    """Wire bytes per device by (op, axes) in a compiled program."""
    summary = hlo.summary(hlo.collectives(compiled.as_text(), dict(mesh.shape)))
    return {key: wire for key, (_, _, wire) in summary.items()}


@dataclass(frozen=True)
class StepCost:
    """Loss and gradients of one batch: the loss, matmul FLOPs (jaxpr), wire bytes a device,
    temporary bytes.
    """

    loss: float
    flops: int
    sent: float
    temporary: int


@dataclass(frozen=True)
class HeadSaving:
    """The step with the head on the masked rows and on every row, and the head's FLOPs in each."""

    masked: StepCost
    whole: StepCost
    flops: int
    full_flops: int

    @property
    def loss_error(self) -> float:
        """Relative change of the loss."""
        return abs(self.masked.loss - self.whole.loss) / abs(self.whole.loss)


def head_saving(program: Program, tokens_BxL: np.ndarray) -> HeadSaving:
    """Compile, count and run loss and gradients at initialisation with rows selected and with all
    rows.
    """
    params = program.init(0).params
    tokens = jax.device_put(tokens_BxL, tokens_sharding(program.mesh))
    batch = jax.jit(program.corrupt)(tokens, jax.random.key(0))
    capacity, steps = program.capacity, []
    try:
        for rows in (capacity, None):
            program.capacity = rows
            traced = jax.jit(lambda p, b: program.grads(p, b)).trace(params, batch)
            compiled: Any = traced.lower().compile(hlo.QUICK)
            sent = sum(counted_bytes(compiled, program.mesh).values())
            temporary = int(compiled.memory_analysis().temp_size_in_bytes)
            loss = float(compiled(params, batch)[0])
            steps.append(StepCost(loss, jaxpr.dot_flops(traced.jaxpr), sent, temporary))
    finally:
        program.capacity = capacity
    masked, whole = steps
    c = program.c
    full_rows = c.train.batch * c.data.seq_len // (c.mesh.dp * c.mesh.ep * c.mesh.cp)
    local_full = 3 * 2 * full_rows * c.model.width * c.model.vocab // c.mesh.tp
    return HeadSaving(masked, whole, masked.flops - (whole.flops - local_full), local_full)


def likelihood(arm: Arm, ids_BxL: np.ndarray) -> float:
    """Mean NLL of `ids_BxL` in nats per token under the arm's model and objective;
    as many whole rows as the mesh divides."""
    ways = arm.mesh.shape["dp"] * arm.mesh.shape["ep"]
    whole = ids_BxL[: len(ids_BxL) // ways * ways]
    return float(arm.eval_function()(arm.trained.params, arm.place(whole), np.int32(0)))


V_WIDE, ROWS = 32_768, 64  # a vocabulary of today, rows a device samples at once


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

    sent = []
    for method, out in ((categorical_confidence, P()), (gathered, P("tp"))):
        program = shard_map(method, mesh, (P(), P(None, None, "tp")), (out, out))
        compiled = jax.jit(program).lower(keys, logits).compile()
        sent.append(sum(counted_bytes(compiled, mesh).values()))
    return SamplingBytes(tp, *sent)


def ids_by_degree(arm: Arm, count: int, degrees: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Samples int32 [count, L] of the same parameters and seed, drawn with each tp degree that the
    model allows.
    """
    c = arm.c
    fits = [
        t
        for t in degrees
        if not any(n % t for n in (c.model.heads, c.model.kv_heads, c.model.ffn, c.model.vocab))
    ]
    return {t: draw(arm, count, make_mesh(dict.fromkeys(AXES, 1) | {"tp": t})) for t in fits}
