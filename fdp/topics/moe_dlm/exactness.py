"""Whether a sample's experts depend on its batch mates."""

import numpy as np

from fdp.arm import Arm
from fdp.topics.moe_dlm.observe import look, masked

ROWS = 32


def batch_mates(arm: Arm) -> tuple[int, int]:
    """(choices that differ, all choices) of sequences alone and in a batch of others."""
    z_NxL, x_NxL = masked(arm, ROWS)
    pick = np.arange(0, len(z_NxL), max(len(z_NxL) // ROWS, 1))[:ROWS]
    together = look(arm, z_NxL[pick], x_NxL[pick])[2]
    if together is None:
        return 0, 0
    alone = [look(arm, z_NxL[i : i + 1], x_NxL[i : i + 1])[2] for i in pick]
    return int((together != np.concatenate(alone, 1)).sum()), together.size
