"""Claims about sharding: equal to one device, bytes equal the closed formula, the head's FLOPs, ids
on the wire.

Legend: B batch, L positions.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import PartitionSpec as P

from fdp.arm import Arm
from fdp.collectives import all_gather, shard_map
from fdp.count import bytes as closed
from fdp.count import hlo, jaxpr
from fdp.count.compare import Comparison, outcome, sent
from fdp.experiment import standard
from fdp.mesh import AXES, make_mesh
from fdp.objectives import TokenObjective
from fdp.sampling.draw import draw
from fdp.sampling.noise import categorical_confidence, gumbel
from fdp.step import TrainStep

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


def small(c: ml_collections.ConfigDict, degrees: dict[str, int]) -> ml_collections.ConfigDict:
    """The arm's config shrunk until every mesh compiles in seconds; float32, so that errors
    show.
    """
    c = c.copy_and_resolve_references()
    c.model.update(
        layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ffn=64, vocab=256, dtype="float32"
    )
    c.data.update(source="blank", tokenizer="bpe", vocab=256, seq_len=32)
    c.train.batch, c.train.zero, c.model.remat = 8, 0, "none"
    c.mesh.update(dict.fromkeys(AXES, 1) | degrees)
    return c


def compare_meshes(config: ml_collections.ConfigDict) -> list[Comparison]:
    """Loss, gradients and bytes of the small model on every mesh of MESHES against one device.

    The same parameters and noise everywhere; that every mesh would also draw them equal is for the
    tests to show."""
    e = standard(small(config, {}))
    alone = TrainStep(e, make_mesh(e.degrees, jax.devices()[:1]))
    shape = (e.fit.batch, e.data.seq_len)
    rng = np.random.default_rng(0)
    assert isinstance(e.objective, TokenObjective)
    batch = {"tokens": rng.integers(0, e.objective.n_ids, shape).astype(np.int32)}
    variables = jax.device_get(alone.init(0).variables)
    want, out = outcome(alone, variables, batch), []
    for name, degrees in MESHES.items():
        c = small(config, degrees)
        if "ZeRO-3" in name:
            c.train.zero, c.model.sequence_parallel, c.model.remat = 3, True, "full"
        p = TrainStep(standard(c), make_mesh(c.mesh))
        got = outcome(p, variables, batch)
        out.append(Comparison.of(name, got, want, dict(closed.traffic(p))))
    return out


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


def head_saving(program: TrainStep, batch: dict[str, np.ndarray]) -> HeadSaving:
    """Compile, count and run loss and gradients at initialisation with rows selected and with all
    rows.
    """
    variables = program.init(0).variables
    placed = jax.device_put(batch, program.batch_shardings())
    noised = jax.jit(program.corrupt)(placed, jax.random.key(0))
    capacity, steps = program.capacity, []
    try:
        for rows in (capacity, None):
            program.capacity = rows
            traced = jax.jit(lambda v, n: program.grads(v, n)).trace(variables, noised)
            compiled: Any = traced.lower().compile(hlo.QUICK)
            wire = sum(sent(compiled, program.mesh).values())
            temporary = int(compiled.memory_analysis().temp_size_in_bytes)
            loss = float(compiled(variables, noised)[0])
            steps.append(StepCost(loss, jaxpr.dot_flops(traced.jaxpr), wire, temporary))
    finally:
        program.capacity = capacity
    masked, whole = steps
    e, d, shape = program.experiment, program.experiment.degrees, program.experiment.model.shape
    full_rows = e.fit.batch * (e.data.seq_len or 1) // (d["dp"] * d["ep"] * d["cp"])
    local_full = 3 * 2 * full_rows * shape.width * shape.vocab // d["tp"]
    return HeadSaving(masked, whole, masked.flops - (whole.flops - local_full), local_full)


def likelihood(arm: Arm, ids_BxL: np.ndarray) -> float:
    """Mean NLL of `ids_BxL` in nats per token under the arm's model and objective;
    as many whole rows as the mesh divides."""
    ways = arm.mesh.shape["dp"] * arm.mesh.shape["ep"]
    batch = {"tokens": ids_BxL[: len(ids_BxL) // ways * ways]}
    variables = arm.trained.variables
    total, count = arm.eval_function()(variables, arm.place(batch), np.int32(0))
    return float(total) / float(count)


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
    sizes = (m.heads, m.kv_heads, m.ffn, m.vocab)
    fits = [t for t in degrees if not any(n % t for n in sizes)]
    return {t: draw(arm, count, make_mesh(dict.fromkeys(AXES, 1) | {"tp": t})) for t in fits}
