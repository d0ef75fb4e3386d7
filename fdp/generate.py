"""The command: images from a trained run, as one PNG.

    python -m fdp.generate runs/topic8-cpu --label=7 --n=64 --guidance=3

Legend: B images, H rows, W columns, C channels."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from absl import flags

os.environ.setdefault("NPROC", "64")  # before jax, as in `fdp.train`

import numpy as np

from fdp import command, train
from fdp.keys import INT32, UserError, closest
from fdp.objectives import ImageObjective
from fdp.run import use_compilation_cache
from fdp.sampling.draw import draw_images
from fdp.sampling.image import SAMPLERS
from fdp.trained import config_of, restored

MOST = 4096  # images of one call
MOST_STEPS = 10_000
MOST_GUIDANCE = 1000.0  # far beyond any use; float32 ends in numbers that are not finite


def declare(values: flags.FlagValues) -> None:
    """The flags of the command; not at import, or they would be flags of every other command."""
    word, number, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    word("label", "all", "a class, or several: 7 or 0,7; all; none", flag_values=values)
    number("n", 16, "images; labels take turns", flag_values=values)
    real("guidance", 1.0, "how far a label pulls: 1 is the trained model", flag_values=values)
    number("steps", 50, "of the sampler", flag_values=values)
    word("method", "heun", f"one of {', '.join(SAMPLERS)}", flag_values=values)
    number("seed", 0, "of the noise", flag_values=values)
    word("arm", None, "arm and seed, such as uniform-s0; default the first", flag_values=values)
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


def generate(workdir: Path, f: flags.FlagValues) -> Path:
    """Draw and write; the path of the picture. Raises UserError for what the user can fix."""
    from PIL import Image

    _check(f)
    c = config_of(workdir)
    use_compilation_cache()
    arm, variables, _ = restored(c, workdir, f.arm)
    if not isinstance(arm.objective, ImageObjective):
        raise UserError(
            f"{workdir} holds a model of tokens (objective.name={c.objective.name!r}): this "
            "command draws images"
        )
    labels = labels_of(f.label, arm.objective.classes, f.n)
    e = replace(arm.experiment, fit=replace(arm.experiment.fit, seed=f.seed))
    specs = arm.program.specs.variable_specs()
    options = {"steps": f.steps, "guidance": f.guidance, "method": f.method}
    images = draw_images(e, variables, specs, labels, arm.mesh, **options)
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


def _check(f: flags.FlagValues) -> None:
    """Flags whose allowed values no run decides. Raises UserError with the fix."""
    if f.method not in SAMPLERS:
        raise UserError(f"--method={f.method} is unknown: {closest(f.method, SAMPLERS)}")
    if not abs(f.guidance) <= MOST_GUIDANCE:
        raise UserError(
            f"--guidance={f.guidance} must be within ±{MOST_GUIDANCE:g}: 1 is the trained model"
        )
    if not 1 <= f.steps <= MOST_STEPS:
        raise UserError(f"--steps={f.steps} must be within 1..{MOST_STEPS}")
    if not 0 <= f.seed <= INT32:
        raise UserError(f"--seed={f.seed} must be within 0..{INT32}")
    if f.out and (Path(f.out).suffix != ".png" or Path(f.out).is_dir()):
        raise UserError(f"--out={f.out} is no PNG file: name one such as samples.png")


def main(argv: Sequence[str]) -> None:
    """One line on success. Raises UserError for what the user can fix."""
    train.quiet()
    if len(argv) != 2:
        raise UserError(f"{len(argv) - 1} arguments: give one workdir, such as runs/topic8-cpu")
    print(f"wrote     {generate(command.folder(argv[1], 'workdir'), flags.FLAGS)}")


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main, None, ValueError)
