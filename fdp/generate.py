"""The command: text or images from a trained run.

python -m fdp.generate runs/topic4-cpu --prompt="In the beginning" --speculate=jacobi,window=16
python -m fdp.generate runs/topic8-cpu --label=7 --n=64 --guidance=3                   # a PNG
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

os.environ.setdefault("NPROC", "64")  # before jax, as in `fdp.train`

from fdp import command, generate_images, generate_text, train
from fdp.keys import INT32, UserError
from fdp.objectives import ImageObjective
from fdp.run import use_compilation_cache
from fdp.trained import config_of, restored


def declare(values: flags.FlagValues) -> None:
    """The flags of the command; not at import, or they would be flags of every other command."""
    word, number = flags.DEFINE_string, flags.DEFINE_integer
    note = f"texts ({generate_text.COUNT}) or images ({generate_images.COUNT}; labels take turns)"
    number("n", None, note, flag_values=values)
    number("seed", 0, "of the noise", flag_values=values)
    word("arm", None, "arm and seed, such as uniform-s0; default the first", flag_values=values)
    generate_text.declare(values)
    generate_images.declare(values)


def generate(workdir: Path, f: flags.FlagValues) -> tuple[list[str], int]:
    """(lines to print, exit status). Raises UserError for what the user can fix."""
    if not 0 <= f.seed <= INT32:
        raise UserError(f"--seed={f.seed} must be within 0..{INT32}")
    generate_text.check(f)
    generate_images.check(f)
    c = config_of(workdir)
    use_compilation_cache()
    trained = restored(c, workdir, f.arm)
    images = isinstance(trained.arm.objective, ImageObjective)
    _refuse_others(trained.arm.label, images, f)
    if images:
        return [f"wrote     {generate_images.write(trained, workdir, f)}"], 0
    asked = generate_text.Asked.of(trained, c, workdir, f)
    return generate_text.write(asked)


def _refuse_others(label: str, images: bool, f: flags.FlagValues) -> None:
    """Raises UserError for flags of the other kind of model."""
    kind, other = ("images", "text") if images else ("text", "images")
    flags_of = {"text": generate_text.FLAGS, "images": generate_images.FLAGS}
    mine, theirs = flags_of[kind], flags_of[other]
    given = [f"--{name}" for name in theirs if f[name].present]
    if given:
        raise UserError(
            f"{given[0]} is for {other}, and arm {label} makes {kind}: leave it out, or name an "
            f"arm of {other} by --arm; {kind}: {', '.join(f'--{name}' for name in mine)}"
        )


def main(argv: Sequence[str]) -> int:
    """The text, or one line for a picture. Raises UserError for what the user can fix."""
    train.quiet()
    if len(argv) != 2:
        raise UserError(f"{len(argv) - 1} arguments: give one workdir, such as runs/topic8-cpu")
    lines, status = generate(command.folder(argv[1], "workdir"), flags.FLAGS)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main, None, ValueError)
