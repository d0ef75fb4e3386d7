"""Topic 1, first cut: an equal-size masked diffusion LM and autoregressive LM over dp × tp, and what sharding costs.

Legend: B sequences, L positions, V vocabulary.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import PartitionSpec

from fdp import sharding
from fdp.arm import Arm
from fdp.data.batches import batch
from fdp.loop import evaluate
from fdp.metrics import read_metrics
from fdp.report import Report, Row, bootstrap_ci, judge, plot_bars, plot_curves
from fdp.run import Run
from fdp.sampling import autoregressive
from fdp.sampling.masked import first_hitting
from fdp.topics.parallel_dlm import checks

P = PartitionSpec


def arms(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The masked diffusion LM and the autoregressive LM: same architecture, parameters, tokens and optimizer."""
    ar = config.copy_and_resolve_references()
    ar.objective.name = "autoregressive"
    return {"mdlm": config.copy_and_resolve_references(), "ar": ar}


def study(run: Run) -> Report:
    """Judge the four claims, print samples, draw the plots."""
    mdlm, ar = run.arms["mdlm"], run.arms["ar"]
    rows, raw = [], {}
    comparisons = checks.compare_meshes(mdlm[0].c, mdlm[0].objective)
    rows += _equality_rows(comparisons)
    rows += _head_rows(mdlm[0])
    likelihood, raw["val_loss"] = _likelihood_row(mdlm, ar)
    rows.append(likelihood)
    samples = {name: sample_text(arms[0]) for name, arms in run.arms.items()}
    rows += [_entropy_row(name, run.arms[name][0], ids) for name, (ids, _) in samples.items()]
    _write_samples(run, {name: texts for name, (_, texts) in samples.items()})
    plots = [_curves(run), _bytes_plot(run, comparisons)]
    return Report(run.config.topic, run.config.variant, run.config, rows, plots, raw)


def _equality_rows(comparisons: list[checks.Comparison]) -> list[Row]:
    loss = max(c.loss_error for c in comparisons)
    gradient = max(c.gradient_error for c in comparisons)
    wrong = sum(c.mismatches() for c in comparisons)
    kinds = sum(len(c.formula) for c in comparisons)
    meshes = "; ".join(c.mesh for c in comparisons)
    return [
        Row(
            claim="sharded loss equals unsharded", metric="largest relative error of the loss", value=loss, unit="",
            baseline="one device", baseline_value=0.0, ratio=None, ci=None, threshold="<= 1e-5",
            verdict=judge(loss, "<= 1e-5"), evidence="measured", note=f"float32; {meshes}",
        ),
        Row(
            claim="sharded gradients equal unsharded", metric="largest |Δg|/|g| over the whole tree", value=gradient,
            unit="", baseline="one device", baseline_value=0.0, ratio=None, ci=None, threshold="<= 1e-5",
            verdict=judge(gradient, "<= 1e-5"), evidence="measured", note=f"float32; {meshes}",
        ),
        Row(
            claim="bytes per axis equal the closed formula", metric="(op, axes) entries that differ", value=wrong,
            unit="entries", baseline=f"formula, {kinds} entries", baseline_value=0.0, ratio=None, ci=None,
            threshold="== 0", verdict=judge(wrong, "== 0"), evidence="counted",
            note="compiled HLO of loss and gradients against fdp.cost.bytes, equal to the byte",
        ),
    ]  # fmt: skip


def _head_rows(arm: Arm) -> list[Row]:
    saving = checks.head_saving(arm.program, batch(arm.data.train, 0, arm.c.train.batch, 0))
    ratio = saving.flops / saving.full_flops
    return [
        Row(
            claim="the masked-rows head halves the head's FLOPs", metric="head FLOPs per device and step",
            value=saving.flops, unit="FLOP", baseline="head on every row", baseline_value=saving.full_flops,
            ratio=ratio, ci=None, threshold="<= 0.55", verdict=judge(ratio, "<= 0.55"), evidence="counted",
            note="matmuls in the jaxpr of loss and gradients; exact-k masks, static capacity, no row dropped",
        ),
        Row(
            claim="… at equal loss", metric="relative change of the loss", value=saving.loss_error, unit="",
            baseline="head on every row", baseline_value=0.0, ratio=None, ci=None, threshold="<= 1e-5",
            verdict=judge(saving.loss_error, "<= 1e-5"), evidence="measured", note="same parameters, tokens and masks",
        ),
    ]  # fmt: skip


def _likelihood_row(mdlm: list[Arm], ar: list[Arm]) -> tuple[Row, dict[str, list[float]]]:
    losses = {name: [evaluate(a, a.state) for a in arms] for name, arms in (("mdlm", mdlm), ("ar", ar))}
    ratios = [m / a for m, a in zip(losses["mdlm"], losses["ar"], strict=True)]
    ratio = float(np.mean(ratios))
    row = Row(
        claim="MDLM reaches the likelihood of AR at equal budget", metric="validation NELBO (AR: NLL)",
        value=float(np.mean(losses["mdlm"])), unit="nats/token", baseline="AR, same size, tokens and optimizer",
        baseline_value=float(np.mean(losses["ar"])), ratio=ratio,
        ci=bootstrap_ci(ratios) if len(ratios) > 1 else None, threshold="<= 1.05", verdict=judge(ratio, "<= 1.05"),
        evidence="measured",
        note=f"{len(ratios)} seed(s); the NELBO is an upper bound on the NLL; a small MDLM is known to be far behind",
    )  # fmt: skip
    return row, losses


def sample_text(arm: Arm) -> tuple[np.ndarray, list[str]]:
    """Draw eval.samples sequences from a trained arm: (ids_BxL, texts). First-hitting for MDLM, left to right for AR."""
    c, objective, data = arm.c, arm.objective, arm.data
    count = -(-c.eval.samples // (c.mesh.dp * c.mesh.ep)) * c.mesh.dp * c.mesh.ep
    layout, length = arm.program.layout, c.data.seq_len

    def local(stored: Any, sample_ids_B: jax.Array) -> jax.Array:
        params = {"params": sharding.materialise(stored, layout.stored, c.train.zero)}
        key = jax.random.key(c.seeds[0])
        if objective.attention == "causal":

            def logits_at(ids_BxL: jax.Array, i: jax.Array) -> jax.Array:
                hidden = arm.program.model.apply(params, ids_BxL, jnp.zeros(ids_BxL.shape[0]), method="hidden")
                return arm.program.model.apply(params, hidden[:, i], method="logits")

            ids, _ = autoregressive.sample(
                logits_at, key, sample_ids_B, length, objective.bos, n_ids=objective.n_ids
            )
            return ids
        denoise = lambda z, noise: arm.program.model.apply(params, z, noise)  # noqa: E731
        return first_hitting(denoise, key, sample_ids_B, length, n_ids=objective.n_ids)[0]

    specs = (layout.stored, P(("dp", "ep")))
    sampler = jax.jit(jax.shard_map(local, mesh=arm.mesh, in_specs=specs, out_specs=P(("dp", "ep"))))
    ids_BxL = np.asarray(sampler(arm.state.params, jnp.arange(count)))[: c.eval.samples]
    return ids_BxL, [data.tokenizer.decode(row) for row in ids_BxL]


def unigram_entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the token frequencies in `ids`: a collapsed sampler shows here, not in its likelihood."""
    counts = np.unique(ids, return_counts=True)[1] / ids.size
    return float(-(counts * np.log(counts)).sum())


def _entropy_row(name: str, arm: Arm, ids_BxL: np.ndarray) -> Row:
    data = np.concatenate([arm.data.val[i] for i in range(min(len(ids_BxL), len(arm.data.val)))])
    value, reference = unigram_entropy(ids_BxL), unigram_entropy(data)
    ratio = value / reference
    return Row(
        claim=f"{name} samples are as diverse as text", metric="unigram entropy of the samples", value=value,
        unit="nats", baseline="validation text, as many tokens", baseline_value=reference, ratio=ratio, ci=None,
        threshold=">= 0.9", verdict=judge(ratio, ">= 0.9"), evidence="measured",
        note=f"{ids_BxL.size} tokens, temperature 1",
    )  # fmt: skip


def _write_samples(run: Run, texts: dict[str, list[str]]) -> None:
    lines = []
    for name, samples in texts.items():
        for text in samples:
            lines.append(f"[{name}] {' '.join(text.split())}")
    (run.workdir / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf8")
    print("\nsamples\n" + "\n".join(lines) + "\n")


def _curves(run: Run) -> str:
    series = {}
    for row in read_metrics(run.workdir):
        if "loss" in row and math.isfinite(float(row["loss"])):
            x, y = series.setdefault(f"{row['arm']} train, seed {row['seed']}", ([], []))
            x.append(row["step"])
            y.append(float(row["loss"]))
    for row in read_metrics(run.workdir):
        if "val_loss" in row:
            x, y = series.setdefault(f"{row['arm']} validation, seed {row['seed']}", ([], []))
            x.append(row["step"])
            y.append(float(row["val_loss"]))
    path = run.workdir / "plots" / "loss.png"
    plot_curves(path, series, "step", "nats/token", "NELBO (MDLM) and NLL (AR)")
    return str(path.relative_to(run.workdir))


def _bytes_plot(run: Run, comparisons: list[checks.Comparison]) -> str:
    bars: dict[str, dict[str, float]] = {}
    for comparison in comparisons:
        for (op, axes), wire in comparison.counted.items():
            label = f"{op} over {'·'.join(axes)}"
            bars.setdefault(label, {})[comparison.mesh] = wire / 1024
    path = run.workdir / "plots" / "bytes.png"
    plot_bars(path, bars, "KiB sent per device and step", "Wire bytes of loss and gradients, small model")
    return str(path.relative_to(run.workdir))
