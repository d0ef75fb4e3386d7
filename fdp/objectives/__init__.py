"""Losses and noise as pure functions of tokens and logits."""

import ml_collections

from fdp.objectives.autoregressive import Autoregressive
from fdp.objectives.base import Objective
from fdp.objectives.block_diffusion import BlockDiffusion
from fdp.objectives.mdlm import MDLM
from fdp.objectives.schedules import schedule
from fdp.objectives.sedd import SEDDAbsorbing, SEDDUniform


def from_config(c: ml_collections.ConfigDict, n_ids: int, bos: int) -> Objective:
    """The objective that config `c` names, for data ids 0..n_ids-1 (id n_ids is the mask) with
    `bos` as start token.
    """
    o = c.objective
    match o.name:
        case "autoregressive":
            return Autoregressive(n_ids, bos)
        case "mdlm":
            return MDLM(n_ids, o.form, schedule(o.schedule), o.antithetic)
        case "sedd_absorbing":
            return SEDDAbsorbing(n_ids, o.form, schedule(o.schedule), o.antithetic)
        case "sedd_uniform":
            return SEDDUniform(n_ids, schedule(o.schedule), o.antithetic)
        case "block_diffusion":
            return BlockDiffusion(n_ids, o.block, o.form, schedule(o.schedule), o.antithetic)
    raise ValueError(f"unknown objective {o.name!r}")


__all__ = [
    "MDLM",
    "Autoregressive",
    "BlockDiffusion",
    "Objective",
    "SEDDAbsorbing",
    "SEDDUniform",
    "from_config",
]
