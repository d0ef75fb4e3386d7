"""`--dry_run`: compile every arm's train step for hardware that need not be here, run nothing,
print what it needs.
"""

import math
from dataclasses import dataclass
from typing import Any

from fdp.config import UserError
from fdp.cost import aot

aot.prepare_environment()  # before jax is imported

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from tabulate import tabulate

from fdp import config as fdp_config
from fdp import objectives
from fdp.cost import bytes as closed
from fdp.cost import energy, flops, hlo, hybrid, jaxpr, step_time, workload
from fdp.cost import memory as analytic
from fdp.cost.hardware import Chip, chip
from fdp.cost.workload import Job
from fdp.mesh import AXES, BATCH_AXES, degrees_equation, make_mesh, use_virtual_devices
from fdp.models import transformer
from fdp.run import study_of
from fdp.step import Program

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """What a dry run compiles for: a mesh (abstract where no compiler is at hand) and its chip."""

    mesh: Mesh | AbstractMesh
    chip: Chip | None
    note: str

    @property
    def compiles(self) -> bool:
        """Whether there are devices to compile for."""
        return isinstance(self.mesh, Mesh)


def target_of(c: ml_collections.ConfigDict) -> Target:
    """The mesh of hardware.topology, of virtual CPU devices where that is empty, or an abstract
    one.
    """
    topology, needed = c.hardware.topology, math.prod(c.mesh.values())
    if not topology:
        use_virtual_devices(needed)
        return Target(
            make_mesh(c.mesh), None, "compiled for the virtual CPU devices of this machine"
        )
    name = topology.partition(":")[0]
    try:
        if aot.available(name):
            devices = aot.topology_devices(topology)
            return Target(
                make_mesh(c.mesh, devices), chip(name), f"compiled ahead of time for {topology}"
            )
    except ValueError as error:
        raise UserError(f"hardware.topology: {error}") from error
    mesh = AbstractMesh(
        tuple(c.mesh[a] for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )
    note = f"the compiler for {name} is not installed (pip install 'fdp[aot]'): lowered abstractly, nothing compiled"
    return Target(mesh, chip(name), note)


def _program(c: ml_collections.ConfigDict, mesh: Any) -> Program:
    ids = c.data.vocab if c.data.tokenizer == "bpe" else 258
    if ids > c.model.vocab:
        raise UserError(
            f"data.vocab = {ids} token ids exceed model.vocab = {c.model.vocab} rows: set "
            f"model.vocab={ids}"
        )
    objective = objectives.from_config(c, ids - 1, ids - 2)
    return Program(
        c, transformer.from_config(c, objective.attention, objective.block), objective, mesh
    )


def _arguments(p: Program) -> tuple[Any, jax.ShapeDtypeStruct]:
    sharding = NamedSharding(p.mesh, PartitionSpec(BATCH_AXES, "cp"))
    return p.layout.abstract_state(), jax.ShapeDtypeStruct(
        (p.c.train.batch, p.c.data.seq_len), np.int32, sharding=sharding
    )


def dry_run(config: ml_collections.ConfigDict) -> None:
    """Print, for every arm: memory, bytes per axis and FLOPs per device, analytic and by the
    compiler, and the fit.
    """
    target = target_of(config)
    print(f"target    {config.hardware.topology or 'this machine'}: {target.note}")
    print(f"mesh      {degrees_equation(config.mesh)}, ZeRO-{config.train.zero}")
    for name, c in study_of(config.topic).arms(config).items():
        fdp_config.validate(c)
        print(f"\narm {name}")
        own = target
        if c.mesh != config.mesh:  # a mesh of its own, such as a planner's
            own = target_of(c)
            print(f"mesh      {degrees_equation(c.mesh)}, ZeRO-{c.train.zero}")
        print(describe(_program(c, own.mesh), own))


def describe(p: Program, target: Target) -> str:
    """The tables of one arm."""
    rows = p.head_rows()
    estimate = analytic.estimate(p.c, p.layout.shapes, p.layout.specs, p.layout.stored, rows)
    state, tokens = _arguments(p)
    compiled, overflow = None, None
    if target.compiles:
        try:
            compiled = aot.compile(p.jit_train_step().lower(state, tokens))
        except Exception as error:
            overflow = aot.hbm_error(error)
            if overflow is None:
                raise
    planned = aot.memory(compiled) if compiled is not None else None
    parts = [_memory_table(estimate, planned), _fit(estimate, planned, overflow, target.chip)]
    if "DOES NOT FIT" in parts[1]:
        parts.append(_largest(p, state, overflow))
    parts += [
        _bytes_table(p, rows, compiled),
        _flops_line(p, rows, state),
        _time_line(p, rows, state, target.chip),
    ]
    return "\n".join(part for part in parts if part)


def _gib(n: float) -> str:
    return f"{n / GIB:.3f}"


def _memory_table(e: analytic.Memory, planned: aot.Memory | None) -> str:
    rows = [
        (
            "parameters",
            _gib(e.parameters),
            "" if planned is None else f"{_gib(planned.argument)} (with optimizer)",
        ),
        ("optimizer", _gib(e.optimizer), ""),
        (
            "gathered parameters, gradients",
            _gib(e.gathered),
            "" if planned is None else f"{_gib(planned.temp)} (with",
        ),
        (
            "activations",
            _gib(e.activations),
            "" if planned is None else "activations: temporaries)",
        ),
        (
            "total / peak",
            _gib(e.total()),
            "not compiled" if planned is None else _gib(planned.peak),
        ),
    ]
    return tabulate(rows, headers=("GiB per device", "analytic", "compiler"), disable_numparse=True)


def _fit(
    e: analytic.Memory, planned: aot.Memory | None, overflow: aot.HbmError | None, c: Chip | None
) -> str:
    if overflow is not None:
        used, limit = _gib(overflow.used_bytes), _gib(overflow.limit_bytes)
        return f"fit       DOES NOT FIT: {used} GiB (compiler) of {limit} GiB HBM"
    if c is None:
        return "fit       unknown: set hardware.topology to a chip"
    peak, by = (planned.peak, "compiler") if planned is not None else (e.total(), "analytic")
    verdict = "fits" if peak <= c.hbm_bytes else "DOES NOT FIT"
    return (
        f"fit       {verdict}: {_gib(peak)} GiB ({by}) of {_gib(c.hbm_bytes)} GiB HBM on {c.name}"
    )


def _largest(p: Program, state: Any, overflow: aot.HbmError | None) -> str:
    """The largest buffers, from the compiler where it lists them, else the largest arrays of the
    program.
    """
    buffers = (
        [(b.bytes, f"{b.shape} {b.op_name}") for b in overflow.buffers[:8]] if overflow else []
    )
    source = "largest buffers" if buffers else "largest arrays of the program, before fusion"
    buffers = buffers or jaxpr.largest_arrays(_jaxpr(p, state), 8)
    lines = [f"{source}, GiB per device:"] + [f"  {_gib(size)} {text}" for size, text in buffers]
    lines.append(
        "raise mesh.tp, mesh.cp or train.zero, set model.remat=full, or lower train.batch per "
        "device"
    )
    return "\n".join(lines)


def _jaxpr(p: Program, state: Any) -> Any:
    tokens = jax.ShapeDtypeStruct((p.c.train.batch, p.c.data.seq_len), jnp.int32)
    batch = jax.eval_shape(p.objective.corrupt, jax.random.key(0), tokens)
    return jax.make_jaxpr(p.grads)(state.params, batch)


def _bytes_table(p: Program, rows: int, compiled: Any) -> str:
    formula = closed.traffic(p.c, p.layout.shapes, p.layout.stored, rows)
    shape = dict(zip(AXES, (p.c.mesh[a] for a in AXES), strict=True))
    counted: dict[Any, float] = {}
    if compiled is not None:
        summary = hlo.summary(hlo.collectives(compiled.as_text(), shape))
        counted = {key: wire for key, (_, _, wire) in summary.items()}
    keys = sorted(formula.keys() | counted.keys(), key=lambda k: (k[1], k[0]))
    table = [
        (
            f"{op} over {'·'.join(axes)}",
            f"{formula.get((op, axes), 0) / 2**20:,.3f}",
            f"{counted.get((op, axes), 0) / 2**20:,.3f}" if compiled is not None else "",
        )
        for op, axes in keys
    ]
    heads = (
        "MiB sent per device and step (bytes per axis)",
        "loss and gradients, formula",
        "whole step, compiled HLO",
    )
    if not table:
        return "bytes     no axis has a degree above 1"
    text = tabulate(table, headers=heads, disable_numparse=True)
    if compiled is not None and p.c.model.dtype == "bfloat16":
        text += (
            "\n  (the formula counts float32 parameter gathers; a compiler may cast to bfloat16 "
            "first and send half, "
            "and run a reduce-scatter as an all-reduce and a slice, which sends twice)"
        )
    return text


def _flops_line(p: Program, rows: int, state: Any) -> str:
    shards = p.c.mesh.dp * p.c.mesh.ep * p.c.mesh.cp * p.c.train.microbatches
    total = flops.train_step(p.c, rows * shards)
    counted = jaxpr.dot_flops(_jaxpr(p, state))
    return (
        f"FLOPs     {total / math.prod(p.c.mesh.values()):.4g} per device and step "
        f"({flops.CONVENTION}); "
        f"{counted:.4g} in the program, recomputation included"
    )


def _time_line(p: Program, rows: int, state: Any, target: Chip | None) -> str:
    """Step time, MFU, bottleneck and energy by the shipped cost model, and what that model rests
    on.
    """
    if target is None:
        return ""
    model, job = (
        hybrid.shipped(),
        workload.of_config(p.c, target, p.objective.attention == "causal"),
    )
    x = workload.columns([job])
    found = hybrid.predict(model, x)
    time, chips = float(found.time[0]), job.plan.chips
    shards = p.c.mesh.dp * p.c.mesh.ep * p.c.mesh.cp * p.c.train.microbatches
    mfu = flops.train_step(p.c, rows * shards) / chips / target.peak_bf16_flops / time
    return (
        f"time      predicted {_ms(time)} ms a step (90 % interval "
        f"{_ms(found.low[0])}-{_ms(found.high[0])}), "
        f"MFU {100 * mfu:.2g} %; bottleneck {found.bottleneck()[0]}; "
        f"{_energy(p, rows, state, job, x, found)} "
        f"({_evidence(model, p.c, target)})"
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _energy(
    p: Program, rows: int, state: Any, job: Job, x: workload.Columns, found: hybrid.Prediction
) -> str:
    """Joules of all chips and hosts in a step, and tokens per joule."""
    c, chips = job.chip, job.plan.chips
    if c.peak_power is None:
        return f"energy: not known for {c.name}, whose power is not published"
    time, terms = (
        float(found.time[0]),
        {name: float(value[0]) for name, value in found.terms.items()},
    )
    busy = time * (terms["compute"] + terms["optimizer"]) / sum(terms.values())
    near, far = 0.0, 0.0
    for (_, axes), sent in closed.traffic(p.c, p.layout.shapes, p.layout.stored, rows).items():
        inside = math.prod(p.c.mesh[a] for a in AXES[AXES.index(axes[0]) :]) <= c.domain
        near, far = near + sent * inside, far + sent * (not inside)
    per_node = min(chips, c.domain, 4 if c.scale_out_bandwidth is None else 8)
    activity = energy.Activity(
        c.name,
        chips,
        -(-chips // per_node),
        time,
        busy,
        {"bf16": jaxpr.dot_flops(_jaxpr(p, state))},
        _hbm_bytes(job, x),
        near,
        far,
    )
    spent = energy.step_energy(activity)
    return f"energy {spent.joules:.3g} J a step, {spent.tokens_per_joule(p.tokens):.3g} tokens/J"


def _hbm_bytes(job: Job, x: workload.Columns) -> float:
    """HBM bytes of a device in a step: activations by the fitted bytes an element, weights,
    gradients, optimizer.
    """
    a, p = job.architecture, job.plan
    k = {
        name: float(v)
        for name, v in hybrid.bounded(hybrid.shipped().time, step_time.BOUNDS).items()
    }
    tokens = job.batch * job.seq / (p.dp * p.cp)
    repeated = a.width * k["bytes_width"] / (p.tp if p.sequence_parallel else 1)
    streams = (
        tokens * a.layers * (repeated + (a.heads * a.head_dim + a.ffn) / p.tp * k["bytes_hidden"])
    )
    plain, experts, embedding = step_time.local_parameters(x)
    held = float(plain[0] + experts[0] + embedding[0])
    passes = 4 if p.recompute == "full" else 3
    return passes * (streams + 2 * held * job.microbatches) + 30 * held / (
        p.shards if p.zero else 1
    )


def _evidence(model: hybrid.Model, c: ml_collections.ConfigDict, target: Chip) -> str:
    """Where the numbers come from, and what of this program no measurement covers."""
    made = model.provenance
    held = math.expm1(made["held out, |log error|"]["clusters"]["median"])
    notes = [
        f"simulated: fitted on {made['rows']:,} published runs",
        f"held-out error median {100 * held:.0f} % on unseen clusters",
    ]
    if target.name not in model.effects.get("gemm|chip", {}):
        kind = "TPU" if target.scale_out_bandwidth is None else target.name
        notes.append(f"no {kind} was in the fit")
    if c.model.dtype == "float32":
        notes.append("priced at bfloat16 rates")
    return "; ".join([*notes, "none of this software: priced without fused attention or overlap"])
