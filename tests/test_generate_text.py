"""Text of a trained run, plain and drafted: the same ids, and what is refused."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from absl import flags

from configs.topic1 import get_config
from fdp import config, generate
from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.mesh import make_mesh
from fdp.topics.parallel_dlm import study
from fdp.trained import config_of, restored
from fdp.workdir import Record, bind

MASKED, LEFT_TO_RIGHT, BROKEN = "mdlm-s0", "ar-s0", "mdlm-s1"


def values(*given: str) -> flags.FlagValues:
    found = flags.FlagValues()
    generate.declare(found)
    found(["generate", *given])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with a masked and an autoregressive arm as they start, and a masked one that gives
    no numbers."""
    folder = tmp_path_factory.mktemp("run")
    c = get_config("tiny")
    c.data.update(source="markov", seq_len=8)
    c.model.update(layers=2, width=16, heads=2, kv_heads=2, head_dim=8, ffn=16, vocab=32)
    c.mesh.update(dp=1, tp=1)
    c.seeds = (0, 1)
    bind(folder, Record(config.flatten(c), config.digest(c)))
    for name, e in study.arms(c).items():
        arm = Arm.of(name, e, make_mesh(e.degrees, jax.devices()[:1]))
        state = arm.init()
        for one in (arm, arm.with_seed(1)):
            checkpoints = Checkpoints(folder / "checkpoints" / one.label)
            checkpoints.save(1, state, {"mesh": dict(arm.mesh.shape), "fit": {}})
            checkpoints.close()
            state = replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params))
    return folder


@pytest.fixture(scope="module")
def trained(run):
    """Its arms, by label."""
    c = config_of(run)
    return {label: restored(c, run, label) for label in (MASKED, LEFT_TO_RIGHT)}


def written(run, *given):
    """(texts, the other lines by their first word)."""
    lines, status = generate.generate(run, values(*given))
    assert status == 0, lines
    rest = dict(re.split(r"\s+", line, maxsplit=1) for line in lines if line[:4] != "text")
    return [line[10:] for line in lines if line[:4] == "text"], rest


def test_drafts_change_no_id(run):
    ask = ["--prompt=the", "--n=3"]
    texts, said = written(run, *ask, "--speculate=jacobi,window=4", "--check")
    assert all(text[:3] == "the" and len(text) == 8 for text in texts) and len(set(texts)) == 3
    assert said["check"] == "0 of 15 ids differ from those of the verifier alone"
    assert re.match(r"\d.\d\d a text \(\d to \d\), 5 steps", said["rounds"])
    assert re.match(r"\d calls, \d+ states judged", said["verifier"])
    assert said["drafts"] == "0 passes of a draft model"
    assert written(run, *ask)[0] == texts
