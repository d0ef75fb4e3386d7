"""Images from a trained arm, as one PNG: a half of the command `fdp.generate`.

Legend: B images, H rows, W columns, C channels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import flags

from fdp.keys import UserError, closest
from fdp.objectives import ImageObjective
from fdp.sampling.draw import draw_images
from fdp.sampling.image import SAMPLERS
from fdp.trained import TrainedArm

FLAGS = ("label", "guidance", "steps", "method", "out")
COUNT = 16
MOST = 4096  # images of one call
MOST_STEPS = 10_000
MOST_GUIDANCE = 1000.0  # far beyond any use; float32 ends in numbers that are not finite


def declare(values: flags.FlagValues) -> None:
    """The flags of images."""
    word, number, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    word("label", "all", "a class, or several: 7 or 0,7; all; none", flag_values=values)
    real("guidance", 1.0, "how far a label pulls: 1 is the trained model", flag_values=values)
    number("steps", 50, "of the sampler", flag_values=values)
    word("method", "heun", f"one of {', '.join(SAMPLERS)}", flag_values=values)
    word("out", None, "file; default WORKDIR/samples/<label>.png", flag_values=values)


def labels_of(text: str, classes: int, n: int) -> list[int]:
    """The label of every image; `classes` stands for none. Raises UserError for a label out of
    range and for a number of images that is none."""
    if not 1 <= n <= MOST:
        raise UserError(f"--n={n} must be within 1..{MOST}")
    if text == "none":
        return [classes] * n
    try:
        asked = list(range(classes)) if text == "all" else [int(x) for x in text.split(",")]
    except ValueError:
        raise UserError(f"--label={text} is no class: give numbers, all or none") from None
    for label in asked:
        if not 0 <= label < classes:
            raise UserError(
                f"--label={label} is out of range: labels are 0..{classes - 1}; give one of them, "
                "all or none"
            )
    return [asked[i % len(asked)] for i in range(n)]


def page(images_BxHxWxC: np.ndarray) -> np.ndarray:
    """Images of -1..1 on one page, nearly square, over white: uint8 [H', W', C]."""
    B, H, W, C = images_BxHxWxC.shape
    columns = int(np.ceil(B**0.5))
    rows = -(-B // columns)
    found = np.full((rows * (H + 2), columns * (W + 2), C), 255, np.uint8)
    for i, image in enumerate(np.clip((images_BxHxWxC + 1) * 127.5, 0, 255).astype(np.uint8)):
        top, left = i // columns * (H + 2) + 1, i % columns * (W + 2) + 1
        found[top : top + H, left : left + W] = image
    return found


def write(trained: TrainedArm, workdir: Path, f: flags.FlagValues) -> Path:
    """Draw and write; the path of the picture. Raises UserError for what the user can fix."""
    from PIL import Image

    arm = trained.arm
    assert isinstance(arm.objective, ImageObjective)
    labels = labels_of(f.label, arm.objective.classes, COUNT if f.n is None else f.n)
    e = replace(arm.experiment, fit=replace(arm.experiment.fit, seed=f.seed))
    specs = arm.program.specs.variable_specs()
    options = {"steps": f.steps, "guidance": f.guidance, "method": f.method}
    images = draw_images(e, trained.variables, specs, labels, arm.mesh, **options)
    if not np.isfinite(images).all():
        raise UserError(
            f"the images hold numbers that are not finite: lower --guidance={f.guidance}, or train "
            "the run again"
        )
    path = Path(f.out) if f.out else workdir / "samples" / f"{f.label.replace(',', '-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = page(images)
    Image.fromarray(drawn[..., 0] if drawn.shape[-1] == 1 else drawn).save(path)
    return path


def check(f: flags.FlagValues) -> None:
    """Flags whose allowed values no run decides. Raises UserError with the fix."""
    if f.method not in SAMPLERS:
        raise UserError(f"--method={f.method} is unknown: {closest(f.method, SAMPLERS)}")
    if not abs(f.guidance) <= MOST_GUIDANCE:
        raise UserError(
            f"--guidance={f.guidance} must be within ±{MOST_GUIDANCE:g}: 1 is the trained model"
        )
    if not 1 <= f.steps <= MOST_STEPS:
        raise UserError(f"--steps={f.steps} must be within 1..{MOST_STEPS}")
    if f.out and (Path(f.out).suffix != ".png" or Path(f.out).is_dir()):
        raise UserError(f"--out={f.out} is no PNG file: name one such as samples.png")
