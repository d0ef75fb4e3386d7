"""Reads a text once, into a state of fixed size, and saves it for `ask`.

python -m fdp.topics.ttt_cp.read runs/topic12-cpu book.txt --save=book.npz"""

import os
import time
from pathlib import Path

from absl import flags

os.environ.setdefault("NPROC", "64")  # before jax, as in `fdp.train`

from fdp import command, train
from fdp.keys import UserError
from fdp.run import use_compilation_cache
from fdp.topics.ttt_cp.reading import Reader, grows, save, state_bytes

MOST_ROOM = 1 << 24


def declare(values: flags.FlagValues) -> None:
    """The flags of the command; not at import, or they would be flags of every other command."""
    word, number = flags.DEFINE_string, flags.DEFINE_integer
    word(
        "save",
        None,
        "file for the state; default the text's with the ending .npz",
        flag_values=values,
    )
    word("arm", None, "arm and seed, such as gdn-s0; default the first of text", flag_values=values)
    note = "tokens that may follow, for the keys and values of attention"
    number("room", 1024, note, flag_values=values)


def checked(text: Path, f: flags.FlagValues) -> Path:
    """The file for the state. Raises UserError for flags that name none."""
    if not 1 <= f.room <= MOST_ROOM:
        raise UserError(f"--room={f.room} must be within 1..{MOST_ROOM}")
    path = Path(f.save) if f.save else text.with_suffix(".npz")
    if path.suffix != ".npz" or path.is_dir():
        raise UserError(f"--save={f.save} is no .npz file: name one such as book.npz")
    return path


def main(argv: list[str]) -> None:
    """Read and save. Raises UserError for what the user can fix."""
    train.quiet()
    if len(argv) != 3:
        raise UserError(
            f"{len(argv) - 1} arguments: give a workdir and a file, such as runs/topic12-cpu "
            "book.txt"
        )
    f, text = flags.FLAGS, command.folder(argv[2], "file")
    path = checked(text, f)
    use_compilation_cache()
    reader = Reader(command.folder(argv[1], "workdir"), f.arm)
    start = time.monotonic()
    cache, about = reader.read_text(text, f.room)
    save(path, cache, about)
    n, seconds = about.inputs - 1, time.monotonic() - start
    size = f"room for {f.room:,} tokens more" if grows(reader) else "the same after every text"
    print(f"read      {n:,} tokens of {text} with {about.arm}, step {about.step}: {seconds:.1f} s")
    print(f"state     {state_bytes(cache):,} bytes, {size}")
    print(f"wrote     {path}")


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main, None, ValueError)
