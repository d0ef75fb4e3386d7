"""Writes on after a text that was read before, and a question.

    python -m fdp.topics.ttt_cp.ask runs/topic12-cpu --state=book.npz "The code of abraham is "
    python -m fdp.topics.ttt_cp.ask runs/topic12-cpu --text=book.txt "The code of abraham is "

The second reads the text again: the same answer."""

import os
import time
from pathlib import Path

from absl import flags

os.environ.setdefault("NPROC", "64")  # before jax, as in `fdp.train`

from fdp import command, train
from fdp.keys import INT32, UserError
from fdp.run import use_compilation_cache
from fdp.topics.ttt_cp.reading import AGAIN, Reader, about_of, grows, load

MOST = 65_536  # tokens of an answer
HOTTEST = 100.0


def declare(values: flags.FlagValues) -> None:
    """The flags of the command; not at import, or they would be flags of every other command."""
    word, number = flags.DEFINE_string, flags.DEFINE_integer
    word("state", None, "file that the command `read` wrote", flag_values=values)
    word("text", None, "file to read now, in place of --state", flag_values=values)
    word("arm", None, "with --text: arm and seed, such as gdn-s0", flag_values=values)
    number("tokens", 64, "of the answer, unless the text ends before", flag_values=values)
    note = "0: the likeliest token each time; 1: a draw of the model's law"
    flags.DEFINE_float("temperature", 0.0, note, flag_values=values)
    number("seed", 0, "of the draws", flag_values=values)


def answer(workdir: Path, question: str, f: flags.FlagValues) -> tuple[str, int]:
    """(the text after the question, its tokens). Raises UserError for what the user can fix."""
    _check(f)
    state = None if f.state is None else Path(f.state)
    reader = Reader(workdir, about_of(state).arm if state else f.arm)
    asked = reader.tokens(question, "the question")
    if not len(asked):
        raise UserError('the question is empty: ask something, such as "In the beginning "')
    need = len(asked) + f.tokens
    if state:
        cache, about = load(state, reader)
        if grows(reader) and about.inputs + need > about.room:
            raise UserError(
                f"{state} has room for {about.room - about.inputs} tokens more, and question and "
                f"answer have {len(asked)} + {f.tokens}: {AGAIN} --room={need}"
            )
    else:
        cache, about = reader.read_text(Path(f.text), need)
    cache, _ = reader.read(cache, asked[:-1], about.inputs)
    last, start = int(asked[-1]), about.inputs + len(asked) - 1
    ids = reader.write(cache, last, start, f.tokens, f.temperature, f.seed)
    return reader.tokenizer.decode(ids), len(ids)


def _check(f: flags.FlagValues) -> None:
    if not 1 <= f.tokens <= MOST:
        raise UserError(f"--tokens={f.tokens} must be within 1..{MOST}")
    if not 0 <= f.temperature <= HOTTEST:
        raise UserError(f"--temperature={f.temperature} must be within 0..{HOTTEST:g}")
    if not 0 <= f.seed <= INT32:
        raise UserError(f"--seed={f.seed} must be within 0..{INT32}")
    if (f.state is None) == (f.text is None):
        raise UserError("give one of --state=book.npz and --text=book.txt")
    if f.state and f.arm:
        raise UserError(f"--arm={f.arm} with --state: a state is asked by the arm that read it")


def main(argv: list[str]) -> None:
    """Print the answer. Raises UserError for what the user can fix."""
    train.quiet()
    if len(argv) != 3:
        raise UserError(
            f"{len(argv) - 1} arguments: give a workdir and a question, such as runs/topic12-cpu "
            '"The code of abraham is "'
        )
    use_compilation_cache()
    start = time.monotonic()
    text, n = answer(command.folder(argv[1], "workdir"), argv[2], flags.FLAGS)
    print(f"answer    {text}")
    print(
        f"wrote     {n} tokens in {time.monotonic() - start:.1f} s, start-up and reading included"
    )


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main, None, ValueError)
