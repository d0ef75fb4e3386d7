"""Samples from a trained arm.

Legend: B sequences, L positions.
"""

import numpy as np
from jax.sharding import Mesh

from fdp.arm import Arm
from fdp.sampling import draw as drawing


def draw(arm: Arm, count: int, mesh: Mesh | None = None) -> np.ndarray:
    """`count` sequences int32 [B, L], see `fdp.sampling.draw`. `mesh`: whose devices draw, by
    default the arm's."""
    specs = {"params": arm.program.specs.specs, "state": arm.program.specs.model_specs}
    variables = arm.trained_on_host.variables
    return drawing.draw(arm.experiment, variables, specs, count, mesh or arm.mesh)
