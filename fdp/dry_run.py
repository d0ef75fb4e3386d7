"""`--dry_run`: compile the train step of every arm for hardware that need not be present, run
nothing, and print what it needs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fdp.config import UserError
from fdp.count import aot

aot.prepare_environment()  # before jax is imported

import jax
import ml_collections
from jax.sharding import AbstractMesh, Mesh
from tabulate import tabulate

from fdp.count import bytes as closed
from fdp.count import flops, jaxpr, pipeline, step
from fdp.count import memory as analytic
from fdp.count.compare import sent_by
from fdp.count.counts import CONVENTION, PERMUTE, RAGGED
from fdp.count.overlap import overlap
from fdp.count.step import unstated
from fdp.mesh import abstract_mesh, degrees_equation, make_mesh, use_virtual_devices
from fdp.models.moe import SHARED
from fdp.models.shape import ModelShape
from fdp.parallel.pipeline import library
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.price import hybrid, traffic, workload
from fdp.price.hardware import Chip, Cluster, chip, cluster
from fdp.price.workload import Job
from fdp.run import study_of
from fdp.step import TrainStep

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """What a dry run compiles for: a mesh (abstract where no compiler is installed) and its
    chip."""

    mesh: Mesh | AbstractMesh
    chip: Chip | None
    note: str

    @property
    def compiles(self) -> bool:
        """Whether the mesh has devices to compile for."""
        return isinstance(self.mesh, Mesh)


def target_of(topology: str, degrees: Mapping[str, int]) -> Target:
    """The mesh of `topology` (see hardware.topology), of virtual CPU devices where it is empty, or
    an abstract mesh. Raises UserError for a topology that is none, or of another size."""
    needed = math.prod(degrees.values())
    if not topology:
        use_virtual_devices(needed)
        return Target(
            make_mesh(degrees), None, "compiled for the virtual CPU devices of this machine"
        )
    name = topology.partition(":")[0]
    try:
        there = aot.size_of(topology)
        if there != needed:
            raise ValueError(
                f"{degrees_equation(degrees)} devices, and {topology} has {there}: change a mesh.* "
                "degree or the topology so that both are equal"
            )
        if aot.available(name):
            devices = aot.topology_devices(topology)
            return Target(
                make_mesh(degrees, devices), chip(name), f"compiled ahead of time for {topology}"
            )
    except ValueError as error:
        raise UserError(f"hardware.topology: {error}") from error
    note = (
        f"the compiler for {name} is not installed (pip install -e '.[aot]'): lowered abstractly, "
        "nothing compiled"
    )
    return Target(abstract_mesh(degrees), chip(name), note)


def dry_run(config: ml_collections.ConfigDict) -> None:
    """Print for every arm: memory, bytes by axis and FLOPs per device, analytic and from the
    compiler, and whether it fits."""
    config = config.copy_and_resolve_references()
    config.data.source = "blank"  # a program is the same whatever it reads
    target = target_of(config.hardware.topology, config.mesh)
    print(f"target    {config.hardware.topology or 'this machine'}: {target.note}")
    stages = f", schedule {config.pipeline.schedule}" if config.mesh.pp > 1 else ""
    print(f"mesh      {degrees_equation(config.mesh)}, ZeRO-{config.train.zero}{stages}")
    for name, experiment in study_of(config.topic).arms(config).items():
        print(f"\narm {name}")
        own = target
        if dict(experiment.degrees) != dict(config.mesh):  # of its own, such as a planner's
            own = target_of(config.hardware.topology, experiment.degrees)
            print(f"mesh      {degrees_equation(experiment.degrees)}, ZeRO-{experiment.zero}")
        print(describe(TrainStep(experiment, own.mesh), own))


def describe(p: TrainStep, target: Target) -> str:
    """The tables of one arm."""
    if not isinstance(p.mesh, Mesh):
        return _tables(p, target)
    with jax.sharding.use_abstract_mesh(p.mesh.abstract_mesh):  # counts depend on the platform
        return _tables(p, target)


def _tables(p: TrainStep, target: Target) -> str:
    program = pipeline.traced(p)
    estimate = analytic.estimate(p, program)
    state, batch = p.abstract_arguments()
    compiled, overflow = None, None
    if target.compiles:
        try:
            compiled = aot.compile(p.jit_train_step().lower(state, batch))
        except Exception as error:
            overflow = aot.hbm_error(error)
            if overflow is None:
                raise
    planned = aot.memory(compiled) if compiled is not None else None
    parts = [_memory_table(estimate, planned), _fit(estimate, planned, overflow, target.chip)]
    if "DOES NOT FIT" in parts[1]:
        parts.append(_largest(program, overflow))
    missing = unstated(p.experiment)
    parts.append(_bytes_table(p, compiled, not missing))
    parts.append(_overlap_line(compiled))
    parts.append(_pipeline(p))
    if compiled is not None and target.chip is not None:  # virtual devices overlap nothing
        parts.append(_sends_line(p, compiled))
    parts.append(_flops_line(p, program, not missing))
    parts.append(f"counts    not stated: {missing}" if missing else _time_line(p, target))
    return "\n".join(part for part in parts if part)


def _gib(n: float) -> str:
    return f"{n / GIB:.3f}"


def _memory_table(e: analytic.Memory, planned: aot.CompiledMemory | None) -> str:
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
            "not stated" if e.activations is None else _gib(e.activations),
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
    e: analytic.Memory,
    planned: aot.CompiledMemory | None,
    overflow: aot.HbmError | None,
    c: Chip | None,
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


def _largest(program: Any, overflow: aot.HbmError | None) -> str:
    """The largest buffers: those that the compiler lists, or else the largest arrays of the
    program."""
    buffers = (
        [(b.bytes, f"{b.shape} {b.op_name}") for b in overflow.buffers[:8]] if overflow else []
    )
    source = "largest buffers" if buffers else "largest arrays of the program, before fusion"
    buffers = buffers or jaxpr.largest_arrays(program, 8)
    lines = [f"{source}, GiB per device:"] + [f"  {_gib(size)} {text}" for size, text in buffers]
    lines.append(
        "raise mesh.tp, mesh.cp or train.zero, set model.remat=full, or lower train.batch per "
        "device"
    )
    return "\n".join(lines)


def _bytes_table(p: TrainStep, compiled: Any, stated: bool) -> str:
    formula = closed.traffic(p) if stated else {}
    counted = sent_by(p, compiled) if compiled is not None else {}
    keys = sorted(formula.keys() | counted.keys(), key=lambda k: (k[1], k[0]))

    def mib(table: Mapping[Any, float], key: Any) -> str:
        return f"{table.get(key, 0) / 2**20:,.3f}"

    table = [
        (
            f"{key[0]} over {'·'.join(key[1])}",
            mib(formula, key) if stated else "not stated",
            mib(counted, key) if compiled is not None else "",
        )
        for key in keys
    ]
    heads = (
        "MiB sent per device and step (bytes per axis)",
        "loss and gradients, formula",
        "whole step, compiled HLO",
    )
    if not table:
        return "bytes     no axis has a degree above 1"
    text = tabulate(table, headers=heads, disable_numparse=True)
    shape = getattr(p.experiment.model, "shape", None)
    if compiled is not None and stated and getattr(shape, "dtype", "") == "bfloat16":
        text += (
            "\n  (the formula counts float32 parameter gathers; a compiler may cast to bfloat16 "
            "first and send half, and run a reduce-scatter as an all-reduce and a slice, which "
            "sends twice)"
        )
    if stated and any(op == RAGGED for op, _ in formula):
        real = closed.traffic(p, level=True)
        moved = sum(wire for (op, _), wire in real.items() if op == RAGGED) / 2**20
        text += (
            f"\n  ({RAGGED}: full buffers, which no step exceeds; only rows of tokens travel, "
            f"{moved:,.3f} MiB where routing is uniform)"
        )
    return text


def _pipeline(p: TrainStep) -> str:
    """The schedule of the stages, its bubble at equal costs, and what a device holds."""
    if (grads := step.pipeline(p.experiment)) is None:
        return ""
    place, m, slots = grads.order.placement, grads.microbatches, grads.table.slots
    bubble = 100 * evaluate(grads.order, Costs()).bubble
    chunks = f" of {place.v} chunks" if place.v > 1 else ""
    until_b, until_w = slots.residuals / place.v, slots.stashes / place.v
    text = (
        f"pipeline  {place.p} stages{chunks}, {m} microbatches in {grads.table.ticks} ticks; "
        f"bubble {bubble:.1f} % where F, B and W cost alike; a device holds at most {until_b:g} "
        f"microbatches until B and {until_w:g} until W"
    )
    thin = library.warning(grads.order)
    return f"{text}\nwarning   {thin}" if thin else text


def _sends_line(p: TrainStep, compiled: Any) -> str:
    """What can hide the messages between stages."""
    if step.pipeline(p.experiment) is None:
        return ""
    found = overlap(compiled.as_text(), PERMUTE, "cond")
    return (
        f"overlap   {PERMUTE}: {found.total} in the program, {found.apart} of them asynchronous; "
        f"work stands between start and done of {found.busy}, a product of an operation of "
        f"{found.beside}"
    )


def _overlap_line(compiled: Any) -> str:
    """Whether shared experts can hide the exchange of rows; nothing without a ragged all-to-all."""
    if compiled is None:
        return ""
    found = overlap(compiled.as_text(), RAGGED, SHARED)
    if not found.total:
        return ""
    return (
        f"overlap   {RAGGED}: {found.total} in the program, {found.apart} of them asynchronous; a "
        f"product of the shared experts stands between start and done of {found.beside}"
    )


def _flops_line(p: TrainStep, program: Any, stated: bool) -> str:
    each = pipeline.dot_flops(p, program) / p.mesh.size
    counted = f"{each:.4g} in the program, recomputation included"
    if not stated:
        return f"FLOPs     {counted}"
    share = flops.train_step(p) / math.prod(p.experiment.degrees.values())
    return f"FLOPs     {share:.4g} per device and step ({CONVENTION}); {counted}"


def _time_line(p: TrainStep, on: Target) -> str:
    """Step time, MFU, bottleneck and energy by the shipped cost model, and the measurements behind
    it. Empty for a model whose shape cannot be priced."""
    target, e = on.chip, p.experiment
    if target is None or not isinstance(getattr(e.model, "shape", None), ModelShape):
        return ""
    model, job = hybrid.shipped(), workload.of_experiment(e, target)
    x = workload.columns([job])
    found = hybrid.predict(model, x)
    tokens = e.fit.batch * (e.data.seq_len or 1)
    time = float(found.time[0])
    mfu = flops.train_step(p) / job.plan.chips / target.peak_bf16_flops / time
    return (
        f"time      predicted {_ms(time)} ms a step (90 % interval "
        f"{_ms(found.low[0])}-{_ms(found.high[0])}), "
        f"MFU {100 * mfu:.2g} %; bottleneck {found.bottleneck()[0]}; "
        f"{_energy(model, job, x, found, tokens)} "
        f"({_evidence(model, e.model, target)})"
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _energy(
    model: hybrid.Model, job: Job, x: workload.Columns, found: hybrid.PricedJobs, tokens: int
) -> str:
    """Joules of all chips and hosts in a step, and tokens per joule, as the planner prices them."""
    c = job.chip
    if c.peak_power is None:
        return f"energy: not known for {c.name}, whose power is not published"
    joules = float(traffic.joules(model, job, _nodes(c, job.plan.chips), x, found)[0])
    return f"energy {joules:.3g} J a step, {tokens / joules:.3g} tokens/J"


def _nodes(c: Chip, chips: int) -> Cluster:
    """So many chips, GPUs in nodes of eight."""
    if c.scale_out_bandwidth is None:
        return cluster(f"{c.name}:{chips}")
    groups = (f"{c.name}:{n}x{size}" for n, size in ((chips // 8, 8), (1, chips % 8)) if n and size)
    return cluster("+".join(groups))


def _evidence(model: hybrid.Model, priced: Any, target: Chip) -> str:
    """Where the numbers come from, and which parts of this program no measurement covers."""
    made = model.provenance
    held = math.expm1(made["held out, |log error|"]["clusters"]["median"])
    notes = [
        f"simulated: fitted on {made['rows']:,} published runs",
        f"held-out error median {100 * held:.0f} % on unseen clusters",
    ]
    if target.name not in model.effects.get("gemm|chip", {}):
        kind = "TPU" if target.scale_out_bandwidth is None else target.name
        notes.append(f"no {kind} was in the fit")
    if priced.shape.dtype == "float32":
        notes.append("priced at bfloat16 rates")
    if not getattr(priced, "stock", False):
        notes.append("priced as softmax attention and SwiGLU of the same shape")
    return "; ".join([*notes, "none of this software: priced without fused attention or overlap"])
