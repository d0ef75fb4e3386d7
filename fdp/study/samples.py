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
    params, specs = arm.trained_on_host.params, arm.program.specs.specs
    return drawing.draw(arm.experiment, params, specs, count, mesh or arm.mesh)
