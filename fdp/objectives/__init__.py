"""Losses and noise as pure functions of a batch and the outputs of a model."""

from typing import Any

from fdp.objectives.autoregressive import Autoregressive
from fdp.objectives.base import Objective, TokenObjective
from fdp.objectives.block_diffusion import BlockDiffusion
from fdp.objectives.cost import CostLaw
from fdp.objectives.image import DDPM, EDM, Flow, ImageObjective
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


def of_images(o: Any, classes: int, law: CostLaw) -> ImageObjective:
    """The objective of a config's `objective` section for images of so many classes. Raises
    ValueError for an unknown name."""
    x = o.image
    shared = (classes, x.label_dropout, o.antithetic, law)
    match o.name:
        case "ddpm":
            return DDPM(*shared, x.predict, x.beta, x.steps)
        case "edm":
            return EDM(*shared, x.mean, x.std, x.data_std)
        case "flow":
            return Flow(*shared, x.mean, x.std)
    raise ValueError(f"unknown objective {o.name!r}")


__all__ = [
    "DDPM",
    "EDM",
    "MDLM",
    "Autoregressive",
    "BlockDiffusion",
    "CostLaw",
    "Flow",
    "ImageObjective",
    "Objective",
    "SEDDAbsorbing",
    "SEDDUniform",
    "TokenObjective",
    "from_section",
    "of_images",
]
