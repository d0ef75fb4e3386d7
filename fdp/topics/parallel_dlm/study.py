"""Topic 1: what a bidirectional, iteratively denoised LM allows tensor and data parallelism to
leave out.

Legend: B sequences, L positions, N denoising steps.
"""

from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from fdp.arm import Arm
from fdp.config import digest
from fdp.experiment import Experiment, standard
from fdp.loop import evaluate
from fdp.price.inference import LLADA_8B, Degrees
from fdp.run import Run
from fdp.sampling.cached import BlockDecoder
from fdp.sampling.draw import draw
from fdp.study.report import Report, Row
from fdp.topics.parallel_dlm import (
    checks,
    estimators,
    figures,
    pareto,
    rows,
    switching_region,
    switching_run,
)
from fdp.topics.parallel_dlm.settings import PER_STEP
from fdp.topics.parallel_dlm.switching import Job

ORACLE_VARIANTS = ("cpu", "full")  # the tiny one has no time for a third model


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The masked diffusion LM and the autoregressive LM: same architecture, parameters, tokens and
    optimizer.

    Where everything runs on virtual devices, also a masked diffusion LM of a Markov chain, whose
    likelihood is known."""
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
    markov.model.update(
        layers=2,
        width=64,
        heads=8,
        kv_heads=8,
        head_dim=8,
        ffn=176,
        vocab=32,
        qk_norm=False,
        dtype="float32",
    )
    markov.train.batch = 64
    return standard(markov)


def study(run: Run) -> Report:
    """Judge the claims, print samples, draw the plots."""
    mdlm, ar = run.arms["mdlm"], run.arms["ar"]
    found: list[Row] = []
    raw: dict[str, Any] = {}
    plots: list[str | Path] = [figures.curves(run.workdir)]
    if jax.device_count() >= checks.DEVICES:
        comparisons = checks.compare_meshes(run.config)
        found += rows.equality(comparisons)
        plots.append(figures.traffic(run.workdir, comparisons))
    else:
        found.append(rows.too_few_devices())
    found += rows.head(mdlm[0])
    tasks: dict[str, list[Arm]] = {
        name: run.arms[name] for name in ("mdlm", "markov") if name in run.arms
    }
    for name, arms_ in tasks.items():
        scatters = [estimators.scatter(arm, run.config.sampling.draws) for arm in arms_]
        raw[f"variance {name}"] = [
            {n: s.variance(n) for n in estimators.ESTIMATORS} for s in scatters
        ]
        found += rows.variance(name, scatters)
    if jax.device_count() >= checks.DEVICES:
        degrees = (1, 8) if run.config.variant == "tiny" else (1, 2, 4, 8)
        found += rows.ids_on_the_wire(mdlm[0], run.config.eval.samples, degrees)
        found += _selective(run, tasks, raw, plots)
        if all(
            n % checks.DEVICES == 0 for n in (run.config.model.heads, run.config.model.kv_heads)
        ):
            found += _switching(run, raw, plots)
        else:
            found.append(rows.indivisible_heads(run.config.model.heads, run.config.model.kv_heads))
    likelihood, raw["val_loss"] = _likelihood_row(mdlm, ar)
    found.append(likelihood)
    samples = {name: draw(run.arms[name][0], run.config.eval.samples) for name in ("mdlm", "ar")}
    found += [_entropy_row(name, run.arms[name][0], ids) for name, ids in samples.items()]
    _write_samples(run, samples)
    plots.append(figures.film_strip(run.workdir, mdlm[0]))
    return Report(run.config.topic, run.config.variant, digest(run.config), found, plots, raw)


def _selective(
    run: Run, tasks: dict[str, list[Arm]], raw: dict[str, Any], plots: list[str | Path]
) -> list[Row]:
    """Every policy on both tasks at N = L and N = L/4 steps."""
    outcomes: dict[rows.Task, list[pareto.Outcome]] = {}
    nll: dict[Any, list[float]] = {}
    for name, arms_ in tasks.items():
        # The oracle's model is small, and its exact likelihood deserves little noise.
        sequences = run.config.sampling.sequences * (8 if name == "markov" else 1)
        for per_step in (PER_STEP,) if run.config.variant == "tiny" else (1, PER_STEP):
            task = (name, arms_[0].data.seq_len // per_step)
            outcomes[task] = []
            for policy in pareto.chosen(tuple(run.config.sampling.policies)):
                outcome = pareto.measure(arms_, policy, per_step, sequences)
                print(
                    f"{name}, N={outcome.steps}, {policy.name}: {outcome.share:.3f} of the bytes, "
                    f"KL {np.mean(outcome.kl_read):.2e} nats on rows read",
                    flush=True,
                )
                outcomes[task].append(outcome)
                nll[task, policy.name] = rows.sample_nll(name, outcome, run.arms["ar"])
    raw["selective"] = [
        {
            "task": name,
            "steps": steps,
            "policy": o.policy,
            "share": o.share,
            "kl_read": o.kl_read,
            "kl_masked": o.kl_masked,
            "agree_read": o.agree_read,
            "agree_masked": o.agree_masked,
            "sample_nll": nll[(name, steps), o.policy],
            "entropy": [rows.unigram_entropy(ids) for ids in o.ids],
        }
        for (name, steps), many in outcomes.items()
        for o in many
    ]
    plots.append(figures.pareto(run.workdir, outcomes))
    return rows.selective(outcomes, nll, pareto.sequence_parallel_share(run.arms["mdlm"][0]))


def _switching(run: Run, raw: dict[str, Any], plots: list[str | Path]) -> list[Row]:
    """The simulated gain of a degree for each phase on an H100 node, and the switch for real on
    this machine.
    """
    found = switching_region.region(LLADA_8B)
    best = np.unravel_index(np.nanargmax(found.speedup), found.speedup.shape)
    length, requests, reuse = (
        found.lengths[best[0]],
        found.requests[best[1]],
        found.reuse_steps[best[2]],
    )
    folder = run.workdir / "plots"
    job = Job(LLADA_8B, requests, length, reuse)
    drawn = (
        switching_region.heat_map(
            folder / "switching.png", found, "8B on 8 × H100: gain of switching tp"
        ),
        switching_region.step_times(
            folder / "switching_steps.png", job, f"{requests} requests of {length}"
        ),
    )
    plots += [path.relative_to(run.workdir) for path in drawn]
    raw["switching"] = {
        "speedup": found.speedup,
        "low": found.low,
        "high": found.high,
        "lengths": found.lengths,
        "requests": found.requests,
        "reuse_steps": found.reuse_steps,
    }
    return rows.switching(found, best, switched_samples(run.arms["mdlm"][0]))


def switched_samples(arm: Arm) -> tuple[switching_run.Execution, switching_run.Execution]:
    """Eight sequences with fixed degrees dp1·tp8, and with dp4·tp2 in refresh steps and dp1·tp8 in
    reuse steps.
    """
    length = arm.data.seq_len
    decoder = BlockDecoder(arm.model, arm.objective.n_ids, block=length // 4)
    run = lambda refresh: switching_run.execute(
        decoder,
        arm.trained_on_host.params,
        jax.random.key(arm.seed),
        checks.DEVICES,
        length,
        refresh,
        Degrees(tp=8, dp=1),
    )
    return run(Degrees(tp=8, dp=1)), run(Degrees(tp=2, dp=4))


def _likelihood_row(mdlm: list[Arm], ar: list[Arm]) -> tuple[Row, dict[str, list[float]]]:
    losses = {
        name: [evaluate(a, a.trained) for a in arms] for name, arms in (("mdlm", mdlm), ("ar", ar))
    }
    row = Row.judged(
        "MDLM reaches the likelihood of AR at equal budget",
        "validation NELBO (AR: NLL)",
        losses["mdlm"],
        "nats/token",
        "ratio <= 1.05",
        "measured",
        "AR: same size, tokens, optimizer",
        losses["ar"],
        note=f"{len(mdlm)} seed(s); the NELBO bounds the NLL from above; a small MDLM is known to "
        "be far behind",
    )
    return row, losses


def _entropy_row(name: str, arm: Arm, ids: np.ndarray) -> Row:
    text = arm.data.val.take(range(min(len(ids), len(arm.data.val))))["tokens"]
    return Row.judged(
        f"{name} samples are as diverse as text",
        "unigram entropy of the samples",
        rows.unigram_entropy(ids),
        "nats",
        "ratio >= 0.9",
        "measured",
        "validation text, as many tokens",
        rows.unigram_entropy(text),
        note=f"{ids.size} tokens, temperature 1",
    )


def _write_samples(run: Run, samples: dict[str, np.ndarray]) -> None:
    lines = []
    for name, ids_BxL in samples.items():
        tokenizer = run.arms[name][0].data.tokenizer
        assert tokenizer is not None
        decode = tokenizer.decode
        lines += [f"[{name}] {' '.join(decode(row).split())}" for row in ids_BxL]
    (run.workdir / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf8")
    print("\nsamples\n" + "\n".join(lines) + "\n")
