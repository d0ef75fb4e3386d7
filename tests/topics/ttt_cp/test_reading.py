"""The commands that read a text once and ask after it many times, on arms before their training."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from absl import flags

from configs.topic12 import get_config
from fdp import config
from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.keys import UserError
from fdp.mesh import make_mesh
from fdp.topics.ttt_cp import ask, read, reading, study
from fdp.topics.ttt_cp.reading import Reader
from fdp.workdir import Record, bind

PAIRS = "21 37 29 56 1 42 5 50 10 62 8 61 2 47 17 38 3 40 7"


def values(command, *given: str) -> flags.FlagValues:
    found = flags.FlagValues()
    command.declare(found)
    found(["command", *given])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with LaCT and attention as they start, and texts in it."""
    folder = tmp_path_factory.mktemp("run")
    c = get_config("tiny")
    c.memory.update(arms=("lact", "attention"), chunk=8)
    c.train.steps = 1
    bind(folder, Record(config.flatten(c), config.digest(c)))
    for name, e in study.arms(c).items():
        arm = Arm.of(name, e, make_mesh(e.degrees, jax.devices()[:1]))
        checkpoints = Checkpoints(folder / "checkpoints" / arm.label)
        checkpoints.save(1, arm.init(), {"mesh": dict(arm.mesh.shape), "fit": {}})
        checkpoints.close()
    (folder / "pairs.txt").write_text(PAIRS)
    (folder / "words.txt").write_text("In the beginning")
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def reader(run):
    return Reader(run, None)


def saved(run, reader, name, room=8):
    path = run / name
    reading.save(path, *reader.read_text(run / "pairs.txt", room))
    return path


def test_a_state_is_asked_what_the_text_is_asked(run, reader):
    """The same ids from the file of the state and from reading again, and for attention."""
    state = saved(run, reader, "lact.npz")
    answers = [
        ask.answer(run, "29 5", values(ask, "--tokens=4", *source))
        for source in ([f"--state={state}"], [f"--text={run / 'pairs.txt'}"])
    ]
    assert answers[0] == answers[1] and answers[0][1] == 4
    # The chunk ends inside the question, and the state of 20 inputs is not that of 12.
    cache, about = reading.load(state, reader)
    again, _ = reader.read_text(run / "pairs.txt", 8)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert about.inputs == 1 + len(PAIRS.split()) and not reading.grows(reader)


def test_attention_has_room_for_so_many_tokens(run):
    reader = Reader(run, "attention-s0")
    state = saved(run, reader, "attention.npz")
    assert reading.grows(reader)
    assert ask.answer(run, "29", values(ask, "--tokens=2", f"--state={state}"))[1] <= 2
    with pytest.raises(UserError, match=r"room for 8 tokens more, .* 1 \+ 9: .* --room=10"):
        ask.answer(run, "29", values(ask, "--tokens=9", f"--state={state}"))


def test_blocks_of_every_size_read_the_same(reader, monkeypatch):
    inputs = reader.tokens(PAIRS, "the text")
    cache, logits = reader.read(reader.empty(32), inputs, 0)
    monkeypatch.setattr(reading, "BLOCKS", (8, 1))
    other, others_logits = reader.read(reader.empty(32), inputs, 0)
    np.testing.assert_allclose(logits, others_logits, atol=1e-4)
    for one, two in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("arm", "gdn-s0", "was read by arm gdn-s0, and .* has lact-s0"),
        ("dtype", "bfloat16", "model.dtype = bfloat16, and .* has float32"),
        ("chunk", 16, "memory.chunk = 16, and .* has 8"),
        ("step", 2, "training step 2, and"),
        ("weights", "0", "weights of checksum 0, and"),
    ],
)
def test_a_state_of_another_model_is_refused(run, reader, name, value, said):
    cache, about = reader.read(reader.empty(4), np.arange(1), 0)[0], reader.about("x", 1, 4)
    path = run / "other.npz"
    reading.save(path, cache, replace(about, **{name: value}))
    with pytest.raises(UserError, match=said + r".*: read the text again with python -m"):
        reading.load(path, reader)


def test_files_that_are_no_state_are_refused(run, reader):
    with pytest.raises(UserError, match=r"missing.npz is not there: read the text"):
        reading.load(run / "missing.npz", reader)
    whole = saved(run, reader, "whole.npz").read_bytes()
    (run / "cut.npz").write_bytes(whole[:-200])
    np.savez(run / "foreign.npz", x=np.zeros(3))
    (run / "text.npz").write_text("no state")
    for name in ("cut.npz", "foreign.npz", "text.npz"):
        with pytest.raises(UserError, match=f"{name} holds no state of this version"):
            reading.load(run / name, reader)


@pytest.mark.parametrize(
    ("given", "question", "said"),
    [
        ([], "29", "give one of --state=book.npz and --text"),
        (["--text={run}/pairs.txt"], "", "the question is empty"),
        (["--text={run}/pairs.txt"], "light", "the question is not what arm lact-s0 reads"),
        (["--text={run}/pairs.txt"], "99", "the question has the id 99, and .* ids of 0 to 63"),
        (["--text={run}/words.txt"], "29", "words.txt is not what arm lact-s0 reads"),
        (["--text={run}/empty.txt"], "29", "empty.txt holds no text"),
        (["--text={run}/pairs.txt", "--arm=gdm-s0"], "29", "--arm=gdm-s0 is unknown"),
        (["--tokens=0"], "29", "--tokens=0 must be within 1"),
        (["--temperature=-1"], "29", "--temperature=-1.0 must be within 0"),
        (["--seed=-1"], "29", "--seed=-1 must be within 0"),
        (["--state=x.npz", "--arm=lact-s0"], "29", "is asked by the arm that read it"),
    ],
)
def test_questions_that_are_refused(run, given, question, said):
    with pytest.raises(UserError, match=said):
        ask.answer(run, question, values(ask, *(g.format(run=run) for g in given)))


def test_arguments_that_are_refused(tmp_path):
    for command, words in ((read, ["read", "runs/x"]), (ask, ["ask", "runs/x", "a", "b"])):
        with pytest.raises(UserError, match="arguments: give a workdir and a"):
            command.main(words)
    with pytest.raises(UserError, match="--room=0 must be within"):
        read.checked(tmp_path / "a.txt", values(read, "--room=0"))
    with pytest.raises(UserError, match=r"--save=b.txt is no .npz file"):
        read.checked(tmp_path / "a.txt", values(read, "--save=b.txt"))
    assert read.checked(tmp_path / "a.txt", values(read)) == tmp_path / "a.npz"
    (tmp_path / "config.json").write_text(json.dumps({"config": {}}))
    with pytest.raises(UserError, match="no config of this version"):
        Reader(tmp_path, None)
