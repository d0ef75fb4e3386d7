"""Fit the shipped step-time and memory model and write its coefficients with provenance and held-out errors.

    python -m benchmarks.fit_step_time PATH/TO/planning      # folder with measured_configs.csv, ultrascale_playbook_runs.csv

The spread of the intervals comes from hold-outs of whole models (software that was seen) and whole clusters (not seen).
"""

import datetime
import sys
from pathlib import Path

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from fdp.cost import hybrid
from fdp.topics.parallelism_search import fit, measurements

TARGET = Path(hybrid.__file__).parent / "coefficients" / "step_time.json"


def held_out(fitter: fit.Fitter, labels: np.ndarray, least: int) -> np.ndarray:
    """|log error| (N,) of every row, predicted by a fit that saw no row with its label; nan where a label is rare."""
    data = fitter.data
    error = np.full(len(labels), np.nan)
    for label in sorted(set(labels)):
        out = labels == label
        if out.sum() >= least:
            model = fitter.fit(~out, steps=200)
            error[out] = np.abs(np.log(hybrid.predict(model, data.x).time) - data.log_time)[out]
    return error


def describe(error: np.ndarray) -> dict[str, float]:
    """Rows, median and 90 % quantile of |log error|."""
    kept = error[np.isfinite(error)]
    return {"rows": float(kept.size), "median": float(np.median(kept)), "p90": float(np.quantile(kept, 0.9))}


def main(folder: Path) -> None:
    """Fit on everything, hold out models and clusters for the spread, write the file."""
    jax.config.update("jax_enable_x64", True)
    threadpool_limits(1, "blas")
    data = fit.gather(measurements.published(folder))
    fitter = fit.Fitter(data)
    names = np.array([m.job.architecture.name for m in data.measurements])
    by_model = held_out(fitter, names, 40)
    by_cluster = held_out(fitter, data.groups["cluster"].astype(str), 30)
    model = fitter.fit(np.ones(len(names), bool), steps=400)
    # Stalls are a regime of their own with its own end of the interval; they must not widen everybody's.
    calm = ~np.isin(data.groups["cluster"].astype(str), hybrid.STALLING)
    seen, unseen = describe(by_model[calm]), describe(by_cluster[calm])
    spread = {"seen": seen["p90"] / 1.645, "unseen": unseen["p90"] / 1.645, "ensemble": 1.0, "quantile": 1.645}
    provenance = {
        "sources": "vTrain, BLOOM chronicles, Ultra-Scale Playbook, llm-foundry, Megatron-Bridge, Automodel, DGX Cloud "
        "benchmarking, MLPerf Training v3.1-v4.1, torchtitan, DLPerf, Korthikanti et al. 2022; see the topic's README",
        "fitted": datetime.date.today().isoformat(), "rows": len(names),
        "held-out models, |log error|": seen, "held-out clusters, |log error|": unseen,
        "held-out models, stalling clusters, |log error|": describe(by_model[~calm]),
    }  # fmt: skip
    TARGET.write_text(hybrid.to_json(fit.replace(model, spread=spread, provenance=provenance)), encoding="utf8")
    print(f"{TARGET}: {len(names)} rows; held-out models {seen}, held-out clusters {unseen}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
