"""Which of two objectives has the lower loss?"""

import jax

from fdp.experiment import standard
from fdp.study.claims import validation_loss
from fdp.study.figures import figure
from fdp.study.measure import derive, each, measure
from fdp.study.report import Row
from fdp.study.samples import draw

QUESTION = "Is the loss of a masked diffusion LM near that of an autoregressive one?"


def arms(config):
    """A masked and an autoregressive model on the same data."""
    ar = config.copy_and_resolve_references()
    ar.objective.name = "autoregressive"
    mdlm = standard(config)
    return {"mdlm": mdlm, "ar": standard(ar, mdlm.data)}


def study(run):
    """Two rows and one picture."""
    losses = [measure(f"loss {n}", validation_loss, each(run.arms[n])) for n in ("mdlm", "ar")]
    size = sum(x.size for x in jax.tree.leaves(run.arms["mdlm"][0].program.specs.shapes))
    count = Row.judged("the model has parameters", "parameters", size, "", "value >= 1", "counted")
    lines = [
        f"[{name}] {' '.join(map(str, ids))}"
        for name, arms in run.arms.items()
        for ids in draw(arms[0], run.config.eval.samples)
    ]
    (run.workdir / "samples.txt").write_text("\n".join(lines) + "\n")
    return run.report(losses, derive("losses", *losses, rows=near, plot=bars), count)


def near(mdlm, ar):
    """The row that decides."""
    texts = "MDLM is near AR", "validation loss", mdlm, "nats", "ratio <= 2", "measured", "AR", ar
    return Row.judged(*texts, decides=True)


def bars(mdlm, ar):
    """Both losses."""
    fig, axes = figure()
    axes.bar(["mdlm", "ar"], [mdlm[0], ar[0]])
    return fig
