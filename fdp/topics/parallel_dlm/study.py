"""Topic 1: what a bidirectional, iteratively denoised LM allows tensor and data parallelism to
leave out.

Legend: L positions, N denoising steps.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import ml_collections

from fdp import process
from fdp.arm import Arm
from fdp.config import UserError
from fdp.experiment import Experiment, standard
from fdp.files import write_atomic
from fdp.run import Run
from fdp.study import claims
from fdp.study.measure import Measurement, derive, each, measure
from fdp.study.report import Report, Row
from fdp.study.samples import draw
from fdp.topics.parallel_dlm import (
    estimators,
    figures,
    head,
    policies,
    rows,
    switching,
    switching_run,
)
from fdp.topics.parallel_dlm.settings import PER_STEP

QUESTION = (
    "What does a masked, iteratively denoised language model let tensor and data parallelism leave "
    "out, in training and in sampling?"
)
ORACLE_VARIANTS = ("cpu", "full")  # the tiny one has no time for a third model
# Every axis alone (pp needs a schedule), then all of them mixed.
MIXED = "dp2·cp2·tp2, SP, ZeRO-3"
MESHES: dict[str, dict[str, int]] = {
    "dp8": {"dp": 8},
    "ep4": {"ep": 4},
    "cp4": {"cp": 4},
    "tp4": {"tp": 4},
    MIXED: {"dp": 2, "cp": 2, "tp": 2},
}
DEVICES = 8


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The masked diffusion LM and the autoregressive LM: same architecture, parameters, tokens and
    optimizer.

    Where everything runs on virtual devices, also a masked diffusion LM of a Markov chain, whose
    likelihood is known. Raises UserError for a config that is autoregressive itself."""
    if config.model.moe.experts:
        raise UserError(
            f"model.moe.experts={config.model.moe.experts}: this topic's sums over tp are those of "
            "dense layers; set model.moe.experts=0, or train configs/topic2.py"
        )
    if config.objective.name == "autoregressive":
        raise UserError(
            "objective.name='autoregressive' leaves no diffusion LM to judge: this topic trains "
            "the autoregressive LM beside it; set objective.name=mdlm"
        )
    ar = config.copy_and_resolve_references()
    ar.objective.name = "autoregressive"
    mdlm = standard(config)
    found = {"mdlm": mdlm, "ar": standard(ar, mdlm.data)}
    if config.variant in ORACLE_VARIANTS:
        found["markov"] = oracle_arm(config)
    return found


def oracle_arm(config: ml_collections.ConfigDict) -> Experiment:
    """A small masked diffusion LM of the Markov chain, whose likelihood is known."""
    markov = config.copy_and_resolve_references()
    markov.data.update(source="markov", seq_len=32)
    sizes = {"layers": 2, "width": 64, "heads": 8, "kv_heads": 8, "head_dim": 8, "ffn": 176}
    markov.model.update(vocab=32, qk_norm=False, dtype="float32", **sizes)
    markov.train.batch = 64
    return standard(markov)


def small(config: ml_collections.ConfigDict, name: str, degrees: Mapping[str, int]) -> Experiment:
    """The arm's config on a mesh of MESHES, shrunk until it compiles in seconds; float32, so that
    errors show."""
    c = config.copy_and_resolve_references()
    sizes = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "head_dim": 8, "ffn": 64}
    c.model.update(vocab=256, dtype="float32", remat="none", **sizes)
    c.data.update(source="blank", tokenizer="bpe", vocab=256, seq_len=32)
    c.train.batch, c.train.zero = 8, 0
    c.mesh.update(degrees)
    if name == MIXED:
        c.train.zero, c.model.sequence_parallel, c.model.remat = 3, True, "full"
    return standard(c)


def study(run: Run) -> Report:
    """Judge the claims, draw the plots, write samples."""
    c, mdlm, ar = run.config, run.arms["mdlm"], run.arms["ar"]
    samples = [_samples(run.arms[name][0], c.eval.samples) for name in ("mdlm", "ar")]
    strip = measure("states", policies.states, mdlm[0])
    claim = "sharded equals unsharded; what all-reduces over tp may leave out"
    need = claims.needs_devices(claim, "errors, bytes over tp", "<= 1e-5", DEVICES)
    report = run.report(
        derive("loss", run.workdir, plot=figures.losses),
        _training(run),
        _sampling(run) if jax.device_count() >= DEVICES else need,
        claims.likelihood(
            "MDLM reaches the likelihood of AR at equal budget",
            mdlm,
            ar,
            "ratio <= 1.05",
            "AR: same size, tokens, optimizer",
            metric="validation NELBO (AR: NLL)",
            note="the NELBO bounds the NLL from above; a small MDLM is known to be far behind",
        ),
        samples,
        strip,
        derive("film_strip", mdlm[0], strip, plot=figures.film_strip),
        group="Likelihood and samples",
    )
    texts = "\n".join(line for m in samples for line in report.raw[m.name])
    process.decided(lambda: write_atomic(run.workdir / "samples.txt", texts + "\n"))
    return report


def _samples(arm: Arm, count: int) -> Measurement:
    tokenizer = arm.data.tokenizer
    assert tokenizer is not None

    def texts(ids_BxL: Any) -> list[str]:
        return [f"[{arm.name}] {' '.join(tokenizer.decode(row).split())}" for row in ids_BxL]

    judged = partial(claims.entropy, arm.name, arm)
    return measure(f"samples {arm.name}", draw, arm, count, rows=judged, raw=texts)


def _tasks(run: Run) -> dict[str, list[Arm]]:
    """The masked diffusion LMs: of text, and of the chain where there is one."""
    return {name: arms for name, arms in run.arms.items() if name != "ar"}


def _training(run: Run) -> Iterator[Measurement]:
    """FLOPs of the head, and how much the estimators of the loss scatter."""
    group, draws = "Training", run.config.sampling.draws
    yield measure("head", head.masked_rows_head, run.arms["mdlm"][0], rows=rows.head, group=group)
    for name, arms in _tasks(run).items():
        given = estimators.scatter, each(arms), draws
        yield measure(f"losses {name}", *given, rows=partial(rows.variance, name), group=group)


def _sampling(run: Run) -> Iterator[Any]:
    """What needs several devices: equality, ids on the wire, selective sums, switching."""
    c, arm, group = run.config, run.arms["mdlm"][0], "Sharded equals unsharded"
    tiny = c.variant == "tiny"  # one mesh, two degrees, no third program for switching
    meshes = {MIXED: MESHES[MIXED]} if tiny else MESHES
    yield claims.sharded_equals_unsharded(small, c, meshes, plot=figures.traffic, group=group)
    degrees, group = (1, 8) if tiny else (1, 2, 4, 8), "Ids on the wire"
    wire = head.sampling_bytes, each(degrees[1:])
    yield measure("bytes of ids", *wire, rows=rows.sampling_bytes, group=group)
    ids = head.ids_by_degree, arm, c.eval.samples, degrees
    yield measure("ids by tp", *ids, rows=rows.equal_ids, group=group)
    yield _selective(run)
    yield _switching(c, arm)


def _selective(run: Run) -> Iterator[Measurement]:
    """Every policy on all tasks at N = L and N = L/4 steps."""
    c, results = run.config, {}
    chosen = each(policies.chosen(tuple(c.sampling.policies)))
    for name, many in _tasks(run).items():
        # The oracle's model is small, and its exact likelihood deserves little noise.
        sequences = c.sampling.sequences * (8 if name == "markov" else 1)
        judges = None if name == "markov" else run.arms["ar"]
        for per_step in (PER_STEP,) if c.variant == "tiny" else (1, PER_STEP):
            steps = many[0].data.seq_len // per_step
            given = policies.evaluate, many, judges, per_step, sequences, chosen
            results[name, steps] = measure(f"policies {name} N={steps}", *given)
    yield from results.values()
    parallel = measure("sequence parallel", policies.sequence_parallel_share, run.arms["mdlm"][0])
    group = "Selective all-reduce"
    yield derive("selective", results, parallel, rows=rows.selective, group=group)
    yield derive("pareto", results, plot=figures.trade_off)


def _switching(c: ml_collections.ConfigDict, arm: Arm) -> Iterator[Measurement | Row]:
    """The simulated gain of a degree for each phase on an H100 node, and the switch for real on
    this machine.
    """
    heads, kv_heads = c.model.heads, c.model.kv_heads
    if heads % DEVICES or kv_heads % DEVICES:
        yield rows.indivisible_heads(heads, kv_heads, DEVICES)
        return
    group = "A degree for each phase"
    drawn = {"rows": rows.region, "plot": figures.speedups}
    found = measure("switching", switching.region, **drawn, group=group)
    yield found
    yield derive("switching_steps", found, plot=figures.step_times)
    if c.variant == "tiny":
        return
    ids = switching_run.fixed_and_switched, arm, DEVICES
    yield measure("switched ids", *ids, rows=rows.switched, group=group)
