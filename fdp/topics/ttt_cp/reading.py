"""Texts read into the state of a trained arm: reading, files of states, and writing after a
question. What the commands `read` and `ask` share.

The inputs of a model are its start token, then tokens; a state is that after all inputs of a text.
A state of layers without attention has the same size after every text."""

import hashlib
import json
import zipfile
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fdp import files
from fdp.data.decode import decode
from fdp.keys import UserError
from fdp.sampling import autoregressive
from fdp.sampling.noise import Draw
from fdp.trained import TrainedArm, config_of, restored

BLOCKS = (1024, 32, 1)  # inputs of a pass: a program each, so any number is soon read
BYTES = ("kjv-", "text-")  # arms that read bytes
KIND = "state of a text, version 1"
AGAIN = "read the text again with python -m fdp.topics.ttt_cp.read"


@dataclass(frozen=True)
class AboutState:
    """What a state belongs to. `weights`: a checksum. `inputs`: read so far. `room`: positions of
    the keys and values of attention."""

    arm: str
    step: int
    weights: str
    chunk: int
    dtype: str
    text: str
    inputs: int
    room: int


class Reader:
    """A trained arm of a run that reads and writes. Raises UserError for a folder without one."""

    def __init__(self, workdir: Path, label: str | None):
        self.workdir, self.config = workdir, config_of(workdir)
        if self.config.topic != "ttt_cp":
            raise UserError(
                f"{workdir} is a run of topic {self.config.topic}: this command reads with an arm "
                "of topic ttt_cp, such as runs/topic12-cpu"
            )
        self.trained: TrainedArm = restored(self.config, workdir, label, BYTES)
        self.label = f"{self.trained.arm.name}-s{self.trained.arm.experiment.fit.seed}"
        tokenizer = self.trained.arm.data.tokenizer
        assert tokenizer is not None, "data of ids have a tokenizer"
        self.tokenizer = tokenizer
        self.model = self.trained.arm.model

    def tokens(self, text: str, what: str) -> np.ndarray:
        """int32 [tokens] of a text. Raises UserError for one that is no text of the arm's data."""
        try:
            found = self.tokenizer.encode(text)
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{what} is not what arm {self.label} reads, numbers with spaces between them "
                f"({' '.join(str(error).split())[:80]}): name an arm of text by --arm="
            ) from error
        wrong = found[(found < 0) | (found >= self.tokenizer.n_data)]
        if wrong.size:
            raise UserError(
                f"{what} has the id {wrong[0]}, and arm {self.label} reads ids of 0 to "
                f"{self.tokenizer.n_data - 1}: leave it out"
            )
        return found

    def empty(self, room: int) -> Any:
        """The state before the first input."""
        return jax.jit(lambda: self.model.decode_state(1, room)[0])()

    def read(self, cache: Any, inputs: np.ndarray, start: int) -> tuple[Any, Any]:
        """(the state after `inputs`, the first `start` of which came before; logits after the
        last)."""
        logits, at = None, 0
        with tqdm(total=len(inputs), unit=" tokens", leave=False, disable=None) as bar:
            while at < len(inputs):
                size = next(b for b in BLOCKS if b <= len(inputs) - at)
                some = jnp.asarray(inputs[None, at : at + size], jnp.int32)
                args = self.model, self.trained.variables, cache, some, start + at
                logits, cache = _read(*args)
                at += size
                bar.update(size)
        return cache, logits

    def read_text(self, path: Path, room: int) -> tuple[Any, AboutState]:
        """The state after a file, with `room` for as many inputs more. Raises UserError for an
        empty file and for a state that is not a number."""
        text, _ = decode(path, path.read_bytes())
        found = self.tokens(text, str(path))
        if not len(found):
            raise UserError(f"{path} holds no text: name a file with some")
        inputs = np.concatenate([[self._start], found])
        length = len(inputs) + room
        cache, logits = self.read(self.empty(length), inputs, 0)
        if not np.isfinite(np.asarray(logits)).all():
            raise UserError(
                f"{path}: after {len(found):,} tokens the state of arm {self.label} holds numbers "
                "that are not finite: lower memory.rate and train again, or read less"
            )
        return cache, self.about(path.name, len(inputs), length)

    def write(
        self, cache: Any, last: int, start: int, length: int, temperature: float, seed: int
    ) -> list[int]:
        """At most `length` tokens after the input `last`, which follows `start` others, to the end
        of a text. temperature: 0 takes the likeliest token each time."""
        args = self.model, self.trained.variables, cache, jnp.array([last]), start
        key, n_ids = jax.random.key(seed), self.tokenizer.n_data
        ids = np.asarray(_write(*args, key, length, n_ids, temperature))[0]
        ends = np.flatnonzero(ids == self.tokenizer.eos_id)
        return ids[: ends[0] if ends.size else None].tolist()

    def about(self, text: str, inputs: int, room: int) -> AboutState:
        """Of a state of this arm."""
        dtype = self.model.shape.dtype
        step, chunk = self.trained.step, self.config.memory.chunk
        weights = _checksum(self.trained.variables)
        return AboutState(self.label, step, weights, chunk, dtype, text, inputs, room)

    @property
    def _start(self) -> int:
        objective: Any = self.trained.arm.objective
        return objective.bos


def save(path: Path, cache: Any, about: AboutState) -> None:
    """One compressed file."""
    arrays: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in _named(cache)}
    arrays["about"] = np.array(json.dumps({"kind": KIND} | asdict(about)))
    files.write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


def about_of(path: Path) -> AboutState:
    """What a file says of its state. Raises UserError for other files."""
    return _loaded(path)[0]


def load(path: Path, reader: Reader) -> tuple[Any, AboutState]:
    """A saved state. Raises UserError for a file that is none, and for a state of another model,
    chunk or dtype."""
    about, arrays = _loaded(path)
    mine = reader.about(about.text, about.inputs, about.room)
    for name, what in (
        ("arm", "by arm"),
        ("dtype", "with model.dtype ="),
        ("chunk", "with memory.chunk ="),
        ("step", "after training step"),
        ("weights", "with weights of checksum"),
    ):
        theirs, ours = getattr(about, name), getattr(mine, name)
        if theirs != ours:
            raise UserError(
                f"{path} was read {what} {theirs}, and {reader.workdir} has {ours}: {AGAIN}"
            )
    template = jax.eval_shape(lambda: reader.model.decode_state(1, about.room)[0])
    if {n: x.shape for n, x in arrays.items()} != {n: x.shape for n, x in _named(template)}:
        raise UserError(f"{path} has arrays of other names or shapes than {about.arm}: {AGAIN}")
    leaves = [jnp.asarray(arrays[name], x.dtype) for name, x in _named(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), about


def state_bytes(cache: Any) -> int:
    """Of all arrays of a state."""
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def grows(reader: Reader) -> bool:
    """Whether the state has a part for every token."""
    one, two = (jax.eval_shape(lambda n=n: reader.model.decode_state(1, n)[0]) for n in (1, 2))
    return one != two


def _loaded(path: Path) -> tuple[AboutState, dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        about = json.loads(str(arrays.pop("about")))
        if about.pop("kind") != KIND or set(about) != {f.name for f in fields(AboutState)}:
            raise ValueError("another version")
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: {AGAIN} --save={path}") from error
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no state of this version: {AGAIN}") from error
    return AboutState(**about), arrays


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _checksum(variables: Any) -> str:
    found = hashlib.sha256()
    for name, x in _named(variables):
        found.update(name.encode() + np.asarray(x).tobytes())
    return found.hexdigest()[:16]


_read = jax.jit(autoregressive.read, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 6, 7, 8))
def _write(
    model: Any,
    variables: Any,
    cache: Any,
    last_B: jax.Array,
    start: Any,
    key: jax.Array,
    length: int,
    n_ids: int,
    temperature: float,
) -> jax.Array:
    draw = Draw(key, jnp.zeros(1, jnp.int32), length, n_ids, temperature)
    return autoregressive.write(model, variables, cache, last_B, start, draw)[0]
