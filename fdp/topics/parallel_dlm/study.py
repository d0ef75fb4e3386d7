"""Topic 1, first cut: an equal-size masked diffusion LM and autoregressive LM over dp × tp, and what sharding costs.

Legend: B sequences, L positions.
"""

from pathlib import Path

import jax
import ml_collections
import numpy as np

from fdp.arm import Arm
from fdp.config import digest
from fdp.data.batches import batch
from fdp.loop import evaluate
from fdp.report import Report, Row
from fdp.run import Run
from fdp.sample import draw
from fdp.topics.parallel_dlm import checks, figures


def arms(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The masked diffusion LM and the autoregressive LM: same architecture, parameters, tokens and optimizer."""
    ar = config.copy_and_resolve_references()
    ar.objective.name = "autoregressive"
    return {"mdlm": config.copy_and_resolve_references(), "ar": ar}


def study(run: Run) -> Report:
    """Judge the four claims, print samples, draw the plots."""
    mdlm, ar = run.arms["mdlm"], run.arms["ar"]
    rows, raw = [], {}
    comparisons = []
    if jax.device_count() >= checks.DEVICES:
        comparisons = checks.compare_meshes(mdlm[0].c, mdlm[0].objective)
        rows += _equality_rows(comparisons)
    else:
        rows.append(_too_few_devices())
    rows += _head_rows(mdlm[0])
    likelihood, raw["val_loss"] = _likelihood_row(mdlm, ar)
    rows.append(likelihood)
    samples = {name: draw(arms[0], run.config.eval.samples) for name, arms in run.arms.items()}
    rows += [_entropy_row(name, run.arms[name][0], ids) for name, ids in samples.items()]
    _write_samples(run, samples)
    plots: list[str | Path] = [figures.curves(run.workdir)]
    if comparisons:
        plots.append(figures.traffic(run.workdir, comparisons))
    return Report(run.config.topic, run.config.variant, digest(run.config), rows, plots, raw)


def _too_few_devices() -> Row:
    return Row.untestable(
        "sharded loss and gradients equal unsharded", "largest relative error", "", "<= 1e-5", "measured",
        f"needs {checks.DEVICES} devices and {jax.device_count()} are here: run the cpu variant with JAX_PLATFORMS=cpu",
    )  # fmt: skip


def _equality_rows(comparisons: list[checks.Comparison]) -> list[Row]:
    loss = max(c.loss_error for c in comparisons)
    gradient = max(c.gradient_error for c in comparisons)
    wrong = sum(c.mismatches() for c in comparisons)
    kinds = sum(len(c.formula) for c in comparisons)
    meshes = "float32 model of two layers against one device, on " + "; ".join(c.mesh for c in comparisons)
    return [
        Row.judged(
            "sharded loss equals unsharded", "largest relative error of the loss", loss, "", "<= 1e-5", "measured",
            note=meshes,
        ),
        Row.judged(
            "sharded gradients equal unsharded", "largest |Δg|/|g|, whole tree", gradient, "", "<= 1e-5", "measured",
            note=meshes,
        ),
        Row.judged(
            "bytes per axis equal the closed formula", "(op, axes) entries that differ", wrong, "", "== 0", "counted",
            note=f"compiled HLO of loss and gradients against fdp.cost.bytes to the byte, {kinds} entries",
        ),
    ]  # fmt: skip


def _head_rows(arm: Arm) -> list[Row]:
    saving = checks.head_saving(arm.program, batch(arm.data.train, 0, arm.c.train.batch, 0))
    return [
        Row.judged(
            "the masked-rows head halves the head's FLOPs", "head FLOPs per device and step", saving.flops, "FLOP",
            "ratio <= 0.55", "counted", "head on every row", saving.full_flops,
            note="matmuls in the jaxpr of loss and gradients; exact-k masks, static capacity, no row dropped",
        ),
        Row.judged(
            "… at equal loss", "relative change of the loss", saving.loss_error, "", "<= 1e-5", "measured",
            note="same parameters, tokens and masks; baseline: head on every row",
        ),
    ]  # fmt: skip


def _likelihood_row(mdlm: list[Arm], ar: list[Arm]) -> tuple[Row, dict[str, list[float]]]:
    losses = {name: [evaluate(a, a.trained) for a in arms] for name, arms in (("mdlm", mdlm), ("ar", ar))}
    row = Row.judged(
        "MDLM reaches the likelihood of AR at equal budget", "validation NELBO (AR: NLL)", losses["mdlm"],
        "nats/token", "ratio <= 1.05", "measured", "AR: same size, tokens, optimizer", losses["ar"],
        note=f"{len(mdlm)} seed(s); the NELBO bounds the NLL from above; a small MDLM is known to be far behind",
    )  # fmt: skip
    return row, losses


def unigram_entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the token frequencies in `ids`: a collapsed sampler shows here, not in its likelihood."""
    counts = np.unique(ids, return_counts=True)[1] / ids.size
    return float(-(counts * np.log(counts)).sum())


def _entropy_row(name: str, arm: Arm, ids_BxL: np.ndarray) -> Row:
    text = np.concatenate([arm.data.val[i] for i in range(min(len(ids_BxL), len(arm.data.val)))])
    return Row.judged(
        f"{name} samples are as diverse as text", "unigram entropy of the samples", unigram_entropy(ids_BxL), "nats",
        "ratio >= 0.9", "measured", "validation text, as many tokens", unigram_entropy(text),
        note=f"{ids_BxL.size} tokens, temperature 1",
    )  # fmt: skip


def _write_samples(run: Run, samples: dict[str, np.ndarray]) -> None:
    lines = []
    for name, ids_BxL in samples.items():
        decode = run.arms[name][0].data.tokenizer.decode
        lines += [f"[{name}] {' '.join(decode(row).split())}" for row in ids_BxL]
    (run.workdir / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf8")
    print("\nsamples\n" + "\n".join(lines) + "\n")
