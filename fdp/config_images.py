"""Configuration keys of models and objectives of images, and the conditions between them.

Imports neither jax nor flax, as `fdp.config`, which lists these sections."""

from fractions import Fraction
from math import lcm
from typing import Any

from fdp.keys import UserError, at_least, choice, count, flag, positive, section, within
from fdp.parallel.pipeline import library

IMAGE_MODELS = ("dit", "uvit")
IMAGE_OBJECTIVES = ("ddpm", "edm", "flow")
IMAGE_SOURCES = ("openmoji", "mnist", "gaussians", "blank")
MOST_PIXELS = 256  # rows of an image of a source that is held in memory as a whole
PARTS = 64  # shares of the noise levels are multiples of 1/PARTS

# What dit and uvit read. Coarse patches, dropped tokens and self-conditioning give samples of
# unlike cost: a batch repeats a pattern of classes, and its noise levels are stratified.
MODEL = section(
    size=count(32, "rows and columns of an image, divisible by the patch", "pixels", high=4096),
    channels=count(3, "colours of a pixel"),
    classes=count(10, "labels are 0..classes-1"),
    patch=count(4, "edge of the finest patch", "pixels"),
    conditioning=choice(
        "adaln", ("adaln", "tokens"), "dit: time and label modulate every block, or are tokens"
    ),
    registers=at_least(0, 0, "learned tokens beside those of time and label", "tokens"),
    coarse=within("[0, 1]", 0.0, "dit: share of the noise levels, the highest, in patches of 2x"),
    dropped=within("[0, 1]", 0.0, "dit: share of the noise levels, the highest, that drop tokens"),
    group=count(2, "of so many neighbouring tokens one is kept there", "tokens"),
    self_conditioning=flag(False, "half of the samples also read a first estimate"),
)

OBJECTIVE = section(  # ddpm, edm and flow
    label_dropout=within("[0, 1]", 0.1, "share of the labels that are dropped, for guidance"),
    predict=choice("epsilon", ("epsilon", "v"), "ddpm: what the network predicts"),
    beta=choice("linear", ("linear", "cosine"), "ddpm: the schedule of noise"),
    steps=count(1000, "ddpm: of the diffusion", "steps"),
    mean=within("(-inf, inf)", 0.0, "edm, flow: mean of log σ; -1.2 is usual for edm"),
    std=positive(1.0, "edm, flow: standard deviation of log σ; 1.2 is usual for edm"),
    data_std=positive(0.5, "edm: standard deviation of the images"),
)


def share(name: str, value: float) -> Fraction:
    """A share of the noise levels as an exact fraction. Raises UserError unless it is one."""
    found = Fraction(value).limit_denominator(PARTS)
    if abs(float(found) - value) > 1e-6:
        raise UserError(
            f"model.image.{name}={value} is no fraction with a denominator of at most {PARTS}, so "
            f"no batch holds whole shares: set it to {float(found)}"
        )
    return found


def pattern_rows(m: Any) -> int:
    """Rows of the pattern of cost classes that a batch repeats; 1 where all samples cost alike."""
    x = m.image
    shares = (share(name, x[name]).denominator for name in ("coarse", "dropped"))
    return lcm(*shares) * (2 if x.self_conditioning else 1)


def check(c: Any) -> None:
    """Conditions on a model of images. Raises UserError with equation, values and a fix."""
    m, x = c.model, c.model.image
    if c.objective.name not in IMAGE_OBJECTIVES or c.data.source not in IMAGE_SOURCES:
        raise UserError(
            f"model.kind={m.kind!r} reads images: objective.name={c.objective.name!r} must be one "
            f"of {', '.join(IMAGE_OBJECTIVES)}, and data.source={c.data.source!r} one of "
            f"{', '.join(IMAGE_SOURCES)}"
        )
    _check_batch(c)
    edge = x.patch * (2 if x.coarse else 1)
    if x.size % edge:
        raise UserError(
            f"image size is not whole patches: size % patch = {x.size} % {edge} = "
            f"{x.size % edge}; set model.image.size={-(-x.size // edge) * edge} or another "
            "model.image.patch"
        )
    rows = x.size // x.patch
    if rows % c.mesh.cp:
        raise UserError(
            f"rows of patches are not shared out over cp: size / patch % cp = {x.size} / {x.patch} "
            f"% {c.mesh.cp}; set mesh.cp to a divisor of {rows}"
        )
    if x.size > MOST_PIXELS and c.data.source != "blank":
        raise UserError(
            f"model.image.size={x.size} > {MOST_PIXELS}: data.source={c.data.source!r} is drawn "
            f"and held in memory as a whole; set model.image.size={MOST_PIXELS // edge * edge}, or "
            "data.source='blank' to compile only"
        )
    if m.width % 4:
        raise UserError(
            f"model width is not sines and cosines of rows and columns: width % 4 = {m.width} % 4 "
            f"= {m.width % 4}; set model.width={-(-m.width // 4) * 4}"
        )
    if c.context.layout != "contiguous":
        raise UserError(
            f"context.layout={c.context.layout!r} would cut patches apart, whose rows lie over cp: "
            "set context.layout='contiguous'"
        )
    if m.moe.first_dense or (m.moe.experts and m.kind == "uvit"):
        raise UserError(
            "images: experts lie in every model.moe.every-th block of a dit: set "
            "model.moe.first_dense=0, and model.moe.experts=0 for a uvit"
        )
    if m.kind == "uvit":
        _check_skips(m)
        _check_halves(c)
    if c.mesh.pp > 1 and x.self_conditioning:
        raise UserError(
            f"mesh.pp={c.mesh.pp}: a pipeline runs no sample twice; set mesh.pp=1, or "
            "model.image.self_conditioning=False"
        )


def _check_batch(c: Any) -> None:
    """Every microbatch of a device holds whole patterns of cost classes."""
    unit, mesh, t = pattern_rows(c.model), c.mesh, c.train
    if mesh.pp > 1 and t.microbatches % unit:
        raise UserError(
            "microbatches of a pipeline have one cost class each: microbatches % rows of the "
            f"pattern = {t.microbatches} % {unit} = {t.microbatches % unit}; set "
            f"train.microbatches={-(-t.microbatches // unit) * unit}"
        )
    ways = mesh.dp * mesh.ep * (t.microbatches if mesh.pp > 1 else t.microbatches * unit)
    if unit > 1 and t.batch % ways:
        raise UserError(
            "global batch is not whole patterns of cost classes on every device: batch % "
            f"(dp·ep·microbatches·rows of the pattern) = {t.batch} % ({mesh.dp}·{mesh.ep}·"
            f"{t.microbatches}·{unit}); set train.batch={-(-t.batch // ways) * ways}"
        )
    if unit > 1 and not c.objective.antithetic:
        raise UserError(
            f"a pattern of {unit} cost classes needs a fixed number of samples of each: set "
            "objective.antithetic=True"
        )


def _check_halves(c: Any) -> None:
    """Both halves are shared out over pp, on a V, where every skip stays on its device."""
    pp, name = c.mesh.pp, c.pipeline.schedule
    half = c.model.layers // 2
    if half % pp:
        raise UserError(
            f"the halves of a uvit are not shared out over pp: (layers - 1) / 2 % mesh.pp = "
            f"({c.model.layers} - 1) / 2 % {pp} = {half % pp}; set "
            f"model.layers={-(-half // pp) * pp * 2 + 1}"
        )
    if pp > 1 and name in library.LOOPED:
        raise UserError(
            f"pipeline.schedule={name!r} puts virtual stages u and V - 1 - u on two devices, "
            "between which a uvit's skips would travel: set pipeline.schedule to one of "
            f"{', '.join(library.WAVES)}, searched"
        )


def _check_skips(m: Any) -> None:
    x = m.image
    if m.layers % 2 == 0:
        raise UserError(
            f"a uvit has two halves and a middle block: layers % 2 = {m.layers} % 2 = 0; set "
            f"model.layers={m.layers + 1}"
        )
    if x.coarse or x.dropped or x.conditioning != "tokens":
        raise UserError(
            "a uvit reads time and label as tokens and has one grid of learned positions: set "
            "model.image.conditioning='tokens', model.image.coarse=0 and model.image.dropped=0"
        )
