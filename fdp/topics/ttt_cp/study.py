"""Topic 12: what does a nonlinear update of the state buy in recall, and what does it cost on the
wire?"""

import ml_collections

from fdp.experiment import Experiment
from fdp.run import Run
from fdp.study.report import Report
from fdp.topics.ttt_cp import arms as models
from fdp.topics.ttt_cp import counted, exact, planned, recall

QUESTION = (
    "What does a nonlinear update of the state buy in recall, and what does it cost on the wire?"
)


def arms(config: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """The same shape with the mixing layers of each arm, on each of its tasks."""
    return models.arms_of(config)


def seeds(config: ml_collections.ConfigDict) -> dict[str, tuple[int, ...]]:
    """All for pairs, and for LaCT and Gated DeltaNet at equal bytes; one for the rest."""
    few = ("needle", "kjv", "text", "chunk")

    def one(case: models.MemoryCase) -> bool:
        return case.task in few or (case.task == "capacity" and case.kind not in ("lact", "gdn"))

    own = models.cases(config)
    return {name: config.seeds[:1] for name, case in own.items() if one(case)}


def study(run: Run) -> Report:
    """Recall, exactness, cost."""
    config = run.config
    return run.report(
        *recall.parts(run), *exact.parts(config), *counted.parts(config), *planned.parts()
    )
