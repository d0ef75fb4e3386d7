"""Fit the shipped step-time and memory model and write its coefficients with provenance and
held-out errors.

    python -m tools.fit_step_time PATH/TO/planning      # holds measured_configs.csv

The spread of the intervals comes from hold-outs of whole models (software that was seen) and whole
clusters (not seen)."""

import dataclasses
import datetime
import sys
from pathlib import Path

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from fdp.price import fit, hybrid, measurements

SOURCES = (
    "vTrain, BLOOM chronicles, Ultra-Scale Playbook, llm-foundry, Megatron-Bridge, Automodel, "
    "DGX Cloud benchmarking, MLPerf Training v3.1-v4.1, torchtitan, DLPerf, Korthikanti et al. 2022"
)
QUANTILE = 1.645  # of a normal distribution, two-sided 90 %
TARGET = Path(hybrid.__file__).parent / "coefficients" / "step_time.json"


def held_out(fitter: fit.Fitter, labels: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Log errors (N,) of time (absolute) and memory (measured over predicted) of every row.

    Predicted by a fit that saw no row with its label; nan where a label is rare.
    """
    data = fitter.data
    error, memory = np.full((2, len(labels)), np.nan)
    for label in sorted(set(labels)):
        out = labels == label
        if out.sum() >= least:
            model = fitter.fit(~out, steps=200)
            p = hybrid.predict(model, data.x)
            error[out] = np.abs(np.log(p.time) - data.log_time)[out]
            memory[out] = (data.log_memory - np.log(p.memory))[out]
    return error, memory


def describe(error: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """Rows, median and 90 % quantile of |log error|, rows weighing as in the fit."""
    kept = np.isfinite(error)
    middle, high = (
        fit.weighted_quantile(error[kept], weight[kept], share) for share in (0.5, fit.INTERVAL)
    )
    return {"rows": float(kept.sum()), "median": middle, "p90": high}


def _spread(
    parts: dict[str, dict[str, float]], memory: np.ndarray, weight: np.ndarray
) -> dict[str, float]:
    """Standard deviations and quantiles of the intervals, from the held-out errors."""
    sized = np.isfinite(memory)
    scale = {
        "seen": parts["models"]["p90"],
        "unseen": parts["clusters"]["p90"],
        "experts": parts["mixtures of experts"]["p90"],
    }
    return {
        "memory": fit.weighted_quantile(memory[sized], weight[sized], fit.INTERVAL),
        **{name: p90 / QUANTILE for name, p90 in scale.items()},
        "ensemble": 1.0,
        "quantile": QUANTILE,
    }


def main(folder: Path) -> None:
    """Fit on everything, hold out models and clusters for the spread, write the file."""
    jax.config.update("jax_enable_x64", True)
    threadpool_limits(1, "blas")
    found, refused = measurements.published(folder)
    print(f"{len(found)} rows priced, {len(refused)} refused")
    data = fit.gather(found)
    fitter = fit.Fitter(data)
    names = np.array([m.job.shape.name for m in data.measurements])
    by_model, memory = held_out(fitter, names, 20)
    by_cluster, memory_elsewhere = held_out(fitter, data.groups["cluster"].astype(str), 30)
    model = fitter.fit(np.ones(len(names), bool), steps=400)
    # Stalls are a regime of their own with its own end of the interval; they must not widen
    # everybody's.
    calm = ~np.isin(data.groups["cluster"].astype(str), hybrid.STALLING)
    mixed = data.x["moe_layers"] > 0
    parts = {
        "models": describe(by_model[calm & ~mixed], data.weight[calm & ~mixed]),
        "mixtures of experts": describe(by_model[mixed], data.weight[mixed]),
        "clusters": describe(by_cluster[calm], data.weight[calm]),
        "models on the cluster that stalls": describe(by_model[~calm], data.weight[~calm]),
    }
    spread = _spread(parts, np.concatenate([memory, memory_elsewhere]), np.tile(data.weight, 2))
    provenance = {
        "sources": SOURCES,
        "made_by": "python -m tools.fit_step_time FOLDER",
        "fitted": datetime.date.today().isoformat(),
        "rows": len(names),
        "held out, |log error|": parts,
    }
    TARGET.write_text(
        hybrid.to_json(dataclasses.replace(model, spread=spread, provenance=provenance)),
        encoding="utf8",
    )
    print(f"{TARGET}: {len(names)} rows; held out: {parts}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
