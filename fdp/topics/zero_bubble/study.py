"""Topic 8: what schedule does a diffusion model deserve, what is it worth at equal memory, and when
is a pipeline worth having at all?"""

import ml_collections

from fdp.experiment import Experiment, standard
from fdp.run import Run
from fdp.study.report import Report

QUESTION = (
    "What schedule does a diffusion model deserve, what is it worth at equal memory, and when is "
    "a pipeline worth having at all?"
)


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The DiT of the config."""
    return {"uniform": standard(config)}


def study(run: Run) -> Report:
    """Nothing yet."""
    return run.report()
