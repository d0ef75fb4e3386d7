"""Which of two objectives has the lower loss?"""

import jax

from fdp.config import digest
from fdp.experiment import standard
from fdp.loop import evaluate
from fdp.sampling.draw import draw
from fdp.study.report import Report, Row, figure, save_plot


def arms(config):
    """A masked and an autoregressive model on the same data."""
    ar = config.copy_and_resolve_references()
    ar.objective.name = "autoregressive"
    mdlm = standard(config)
    return {"mdlm": mdlm, "ar": standard(ar, mdlm.data)}


def study(run):
    """One row and one picture."""
    mdlm, ar = (evaluate(a, a.trained) for a in (run.arms["mdlm"][0], run.arms["ar"][0]))
    row = Row.judged(
        "MDLM is near AR", "validation loss", mdlm, "nats", "ratio <= 2", "measured", "AR", ar
    )
    fig, axes = figure()
    axes.bar(["mdlm", "ar"], [mdlm, ar])
    plot = save_plot(fig, run.workdir / "plots" / "losses.png").relative_to(run.workdir)
    size = sum(x.size for x in jax.tree.leaves(run.arms["mdlm"][0].program.specs.shapes))
    count = Row.judged("the model has parameters", "parameters", size, "", "value >= 1", "counted")
    lines = [
        f"[{name}] {' '.join(map(str, ids))}"
        for name, arms in run.arms.items()
        for ids in draw(arms[0], run.config.eval.samples)
    ]
    (run.workdir / "samples.txt").write_text("\n".join(lines) + "\n")
    return Report(
        run.config.topic, run.config.variant, digest(run.config), [row, count], [plot], {}
    )
