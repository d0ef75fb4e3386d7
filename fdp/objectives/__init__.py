"""Losses and noise as pure functions of tokens and logits."""

from typing import Any

from fdp.objectives.autoregressive import Autoregressive
from fdp.objectives.base import Objective, TokenObjective
from fdp.objectives.block_diffusion import BlockDiffusion
from fdp.objectives.mdlm import MDLM
from fdp.objectives.noise_schedules import schedule
from fdp.objectives.sedd import SEDDAbsorbing, SEDDUniform


def from_section(o: Any, n_ids: int, bos: int) -> TokenObjective:
    """The objective of a config's `objective` section, for data ids 0..n_ids-1 (id n_ids is the
    mask) with `bos` as start token. Raises ValueError for an unknown name."""
    masked = (o.form, schedule(o.schedule), o.antithetic, o.masked_head)
    match o.name:
        case "autoregressive":
            return Autoregressive(n_ids, bos)
        case "mdlm":
            return MDLM(n_ids, *masked)
        case "sedd_absorbing":
            return SEDDAbsorbing(n_ids, *masked)
        case "sedd_uniform":
            return SEDDUniform(n_ids, schedule(o.schedule), o.antithetic)
        case "block_diffusion":
            return BlockDiffusion(n_ids, o.block, *masked)
    raise ValueError(f"unknown objective {o.name!r}")


__all__ = [
    "MDLM",
    "Autoregressive",
    "BlockDiffusion",
    "Objective",
    "SEDDAbsorbing",
    "SEDDUniform",
    "TokenObjective",
    "from_section",
]
