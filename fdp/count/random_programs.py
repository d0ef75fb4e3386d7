"""Random small programs of this code base: what the closed formulas of fdp.count say of each
against what its compiled form contains.

Bytes by (op, axes): fdp.count.bytes against the HLO of loss and gradients. FLOPs: fdp.count.flops
against the matmuls of the jaxpr. Memory: fdp.count.memory against the compiler's plan of the whole
train step. No program is run. Float32 only, because XLA:CPU widens bfloat16 collectives; pp = 1,
as pipelines take longer to compile."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_collections
import numpy as np

from fdp import config as fdp_config
from fdp.count import aot, flops, hlo, pipeline
from fdp.count import bytes as closed
from fdp.count import memory as analytic
from fdp.count.compare import Bytes, sent_by
from fdp.data.batches import blank
from fdp.experiment import Experiment, standard
from fdp.mesh import AXES, make_mesh
from fdp.step import TrainStep


@dataclass(frozen=True)
class ProgramCheck(Bytes):
    """One config. Bytes: sent per device, by (op, axes). FLOPs: executed by all devices. Memory:
    bytes per device at the peak of the train step, None where it was not
    compiled."""

    formula_flops: float
    counted_flops: float
    formula_memory: float | None = None
    counted_memory: float | None = None

    @property
    def flops_error(self) -> float:
        """Relative to the count."""
        return abs(self.formula_flops / self.counted_flops - 1)

    @property
    def memory_error(self) -> float | None:
        """Relative to the compiler's peak, negative where the formula is too low; None where
        nothing was compiled.
        """
        if self.formula_memory is None or self.counted_memory is None:
            return None
        return self.formula_memory / self.counted_memory - 1


@dataclass(frozen=True)
class Summary:
    """Of many comparisons; errors are relative and absolute, those of memory NaN where no train
    step was compiled.
    """

    configs: int
    entries: int
    mismatches: int  # entries whose bytes differ
    mismatching_configs: int
    flops_error: float  # largest
    memory_configs: int
    memory_error: float  # median
    memory_error_max: float


def random_configs(seed: int, count: int, devices: int = 8) -> list[ml_collections.ConfigDict]:
    """`count` valid small configs on meshes of at most `devices`, equal for equal seeds.

    Drawn uniformly choice by choice; what fdp.config.validate refuses, or XLA merges (`_merged`),
    is drawn again. Raises ValueError for a count or number of devices below 1."""
    if count < 1 or devices < 1:
        raise ValueError(f"count={count} and devices={devices} must be at least 1")
    rng = np.random.default_rng(seed)
    found: list[ml_collections.ConfigDict] = []
    while len(found) < count:
        c = _random_config(rng, devices)
        try:
            fdp_config.validate(c)
        except fdp_config.UserError:
            continue
        if not _merged(c):
            found.append(c)
    return found


def _merged(c: ml_collections.ConfigDict) -> bool:
    """Whether XLA may drop collectives that the program asks for: a scan over one layer is
    unrolled, so that what the backward pass gathers or reduces again is merged with the forward
    pass, in part and at the compiler's discretion."""
    return c.model.layers == 1 and (c.model.remat != "none" or c.train.zero == 3)


def _random_degrees(rng: np.random.Generator, devices: int) -> dict[str, int]:
    degrees, left = dict.fromkeys(AXES, 1), devices
    for axis in rng.permutation(["dp", "ep", "cp", "tp"]):
        degrees[str(axis)] = int(rng.choice([n for n in (1, 2, 3, 4, 8) if n <= left]))
        left //= degrees[str(axis)]
    return degrees


def _random_config(rng: np.random.Generator, devices: int) -> ml_collections.ConfigDict:
    """Sizes are multiples of the degrees that shard them, so that most draws are valid."""

    def pick(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    c = fdp_config.base()
    degrees = _random_degrees(rng, devices)
    c.mesh.update(degrees)
    tp, kv_heads = degrees["tp"], degrees["tp"] * pick(1, 2)
    c.model.update(
        layers=pick(1, 2),
        width=pick(16, 24, 32, 48, 64),
        heads=kv_heads * pick(1, 2),
        kv_heads=kv_heads,
        head_dim=pick(4, 8, 12),
        ffn=tp * pick(8, 12, 20),
        vocab=tp * pick(16, 20, 32),
        qk_norm=pick(False, True),
        time_conditioning=pick(False, True),
        remat=pick("none", "dots", "full"),
        sequence_parallel=pick(False, True),
    )
    c.objective.update(
        name=pick(*fdp_config.OBJECTIVES),
        form=pick("k", "t"),
        antithetic=pick(False, True),
        masked_head=pick(False, True),
        block=pick(2, 4, 8),
    )
    c.data.vocab, c.data.seq_len = c.model.vocab, degrees["cp"] * tp * pick(4, 8, 12)
    c.train.update(zero=pick(0, 1, 3), microbatches=pick(1, 2, 3))
    c.train.batch = degrees["dp"] * degrees["ep"] * c.train.microbatches * pick(1, 2, 3)
    return c


def experiment(c: ml_collections.ConfigDict) -> Experiment:
    """The experiment of the config, without data. Raises ValueError for a config that is not
    valid."""
    return standard(c, blank(c.data.seq_len, c.model.vocab))


def compare(e: Experiment, memory: bool = False) -> ProgramCheck:
    """Formulas against the program of one experiment, on the first devices of this process: loss
    and gradients, with `memory` the whole train step as well.

    Raises ValueError for a model that is not float32, or that needs more devices than are here."""
    if e.model.shape.dtype != "float32":
        raise ValueError(
            f"dtype {e.model.shape.dtype!r}: XLA:CPU widens its collectives; count float32 programs"
        )
    p = TrainStep(e, make_mesh(e.degrees))
    state, batch = p.abstract_arguments()
    noised = jax.eval_shape(p.objective.corrupt, jax.random.key(0), batch)
    traced = jax.jit(p.grads).trace(state.variables, noised)
    compiled = traced.lower().compile(hlo.QUICK)
    sizes: tuple[int, int] | tuple[None, None] = (None, None)
    if memory:
        planned = aot.memory(p.jit_train_step().lower(state, batch).compile(hlo.QUICK))
        sizes = (analytic.estimate(p).total(), planned.peak)
    return ProgramCheck(
        dict(closed.traffic(p)),
        sent_by(p, compiled),
        flops.executed(p),
        pipeline.dot_flops(p, traced.jaxpr),
        *sizes,
    )


def summarise(comparisons: Sequence[ProgramCheck]) -> Summary:
    """Counts and errors over all comparisons. Raises ValueError when there is none."""
    if not comparisons:
        raise ValueError("no comparison to summarise: give at least one config")
    wrong = [len(x.mismatches()) for x in comparisons]
    sizes = [abs(x.memory_error) for x in comparisons if x.memory_error is not None]
    return Summary(
        configs=len(comparisons),
        entries=sum(x.entries for x in comparisons),
        mismatches=sum(wrong),
        mismatching_configs=sum(n > 0 for n in wrong),
        flops_error=max(x.flops_error for x in comparisons),
        memory_configs=len(sizes),
        memory_error=statistics.median(sizes) if sizes else math.nan,
        memory_error_max=max(sizes, default=math.nan),
    )


def summary(configs: Iterable[ml_collections.ConfigDict], memory: int = 10) -> Summary:
    """Compare all configs, the first `memory` of them with their train step's memory."""
    return summarise([compare(experiment(c), memory=i < memory) for i, c in enumerate(configs)])
