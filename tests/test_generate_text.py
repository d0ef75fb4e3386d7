"""Text of a trained run, plain and drafted: the same ids, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from configs.topic1 import get_config
from fdp import config, generate, generate_text
from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.data.tokenizer import build_tokenizer
from fdp.generate_text import Asked, Speculation, TextWriter
from fdp.keys import UserError
from fdp.mesh import make_mesh
from fdp.models.transformer import transformer
from fdp.objectives import BlockDiffusion, SEDDUniform
from fdp.sampling.draw import draw
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


def test_one_program_writes_after_every_prompt_and_on_every_mesh(run, trained):
    """tp = 2 holds half of the vocabulary each. Not in an order by scores: all masks are alike to
    the model, so that rounding chooses."""
    given = values("--n=2", "--temperature=0.7", "--speculate=stale,window=4")
    asked = Asked.of(trained[MASKED], config_of(run), run, given)
    one = TextWriter(asked, asked.plan)
    mesh = make_mesh({"pp": 1, "dp": 1, "ep": 1, "cp": 1, "tp": 2}, jax.devices()[:2])
    two = TextWriter(asked, asked.plan, mesh)
    for prompt in ("", "ab", "abc"):
        start_L = np.full(8, 27, np.int32)
        start_L[: len(prompt)] = generate_text.prompt_ids(prompt, trained[MASKED].arm)
        ids = one(start_L, 5).ids_BxL
        assert (ids[:, : len(prompt)] == start_L[: len(prompt)]).all() and (ids < 27).all()
        np.testing.assert_array_equal(two(start_L, 5).ids_BxL, ids)


def test_a_draft_without_numbers_is_said_and_rejected(run):
    ask = [f"--arm={MASKED}", "--n=2", "--length=6"]
    with pytest.warns(
        UserWarning, match=rf"arm {BROKEN} gave numbers .* in step 0 and 3 others: .* rejected"
    ):
        texts, said = written(run, *ask, f"--speculate=draft={BROKEN},window=3", "--check")
    assert (
        said["drafts"] == "4 passes of a draft model"
    )  # later steps were judged, and are corrected
    assert all(len(text) == 6 for text in texts)


def test_autoregressive_text_is_that_of_the_sampler_and_of_its_drafts(run, trained):
    arm, variables, _ = trained[LEFT_TO_RIGHT]
    want = draw(arm.experiment, variables, arm.program.specs.variable_specs(), 2, arm.mesh)
    given = values(f"--arm={LEFT_TO_RIGHT}", "--n=2", "--speculate=jacobi,window=4")
    asked = Asked.of(trained[LEFT_TO_RIGHT], config_of(run), run, given)
    write = TextWriter(asked, asked.plan)
    np.testing.assert_array_equal(write(asked.start_L, 0).ids_BxL, want)
    # The noise of a token is that of its position, so a text can be taken up where it was left.
    start_L = np.where(np.arange(8) < 3, want[0], 27)
    np.testing.assert_array_equal(write(start_L, 0).ids_BxL[0], want[0])


def blocks(trained, window):
    """The masked arm as one of block diffusion, and what is asked of it after one block."""
    objective, arm = BlockDiffusion(27, 4), trained[MASKED].arm
    model = transformer(
        arm.experiment.model.shape, objective.mask(8), position=objective.position(8)
    )
    changed = replace(arm.experiment, objective=objective, model=model)
    found = trained[MASKED]._replace(arm=Arm(arm.name, changed, arm.program))
    start_L = np.where(np.arange(8) < 4, [19, 7, 4, 18] * 2, 27).astype(np.int32)
    plan = Speculation("jacobi", window) if window else None
    return Asked(found, start_L, 2, 3, 1.0, "random", plan, None, bool(plan))


def test_block_diffusion_is_written_with_the_cache_of_finished_blocks(trained):
    lines, status = generate_text.write(blocks(trained, 3))
    assert status == 0
    assert "check     0 of 8 ids differ from those of the verifier alone" in lines
    assert "cache     1 passes over finished blocks" in lines  # that of the prompt


@pytest.mark.slow
def test_a_cache_changes_no_id(trained, monkeypatch):
    asked = blocks(trained, 0)
    cached = TextWriter(asked, None)(asked.start_L, 3)
    monkeypatch.setattr(generate_text, "cacheable", lambda model: False)
    plain = TextWriter(asked, None)(asked.start_L, 3)
    assert "fills" in cached.info and "fills" not in plain.info
    np.testing.assert_array_equal(cached.ids_BxL, plain.ids_BxL)


def test_an_id_that_differs_is_shown(run, trained, monkeypatch):
    """The first of two that the verifier's chain reveals."""
    given = values("--prompt=the", "--speculate=jacobi,window=4", "--check", "--temperature=0")
    asked = Asked.of(trained[MASKED], config_of(run), run, given)
    alone = TextWriter(asked, None)(asked.start_L, asked.seed).ids_BxL
    other = alone.copy()
    other[0, [4, 6]] = (other[0, [4, 6]] + 1) % 27
    found = generate_text.differences(asked, other, alone)
    assert found[0] == "check     2 of 5 ids differ from those of the verifier alone"
    states = generate_text._states_alone(asked, 1)[:, 0]
    step, at = min((int((states[:, i] == 27).sum()) - 1, i) for i in (4, 6))
    margin = rf"id {other[0, at]}, alone {alone[0, at]}; margin of the latter (\S+)"
    said = re.match(rf"first     text 0, position {at}, step {step}: {margin}", found[1])
    assert said and float(said[1]) > 0
    before, shown = found[2].split()[1], trained[MASKED].arm.data.tokenizer.decode
    assert before.count("▁") == 5 - step and before[at] == "▁"
    assert [line.split()[1] for line in found[3:]] == [shown(other[0]), shown(alone[0])]
    monkeypatch.setattr(generate_text, "differences", lambda *_: found)
    lines, status = generate_text.write(asked)
    assert status == 1 and lines[-5:] == found


# What is refused
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--order=entropi"], "--order=entropi is unknown: did you mean 'entropy'"),
        (["--temperature=-1"], "--temperature=-1.0 must be within 0..100"),
        (["--temperature=nan"], "must be within 0"),
        (["--check"], "--check compares with the verifier alone: give --speculate"),
        (["--speculate=jacobo"], "'jacobo' is unknown: did you mean 'jacobi'"),
        (["--speculate=jacobi,window=0"], "a window of '0' states: .* set window=1 or more"),
        (["--speculate=jacobi,window=-3"], "a window of '-3' states"),
        (["--speculate=jacobi,windw=3"], "write it as jacobi,window=8"),
        (["--speculate=jacobi,window=3,window=4"], "write it as jacobi,window=8"),
        (["--speculate=none,window=3"], "write it as jacobi,window=8"),
        (["--speculate=jacobi=mdlm-s0"], "write jacobi"),
        (["--speculate=draft"], "write draft=ARM, such as draft=small-s0"),
    ],
)
def test_flags_that_are_refused_before_the_run_is_read(tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        generate.generate(tmp_path, values(*given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--n=0"], "--n=0 must be within 1..4096"),
        (["--guidance=2"], "--guidance is for images, and arm mdlm-s0 makes text: leave it out"),
        (["--length=9"], "--length=9 must be within 1..8"),
        (["--length=0"], "--length=0 must be within 1..8"),
        (["--prompt=thethethe"], "--prompt has 9 tokens of a text of 8, which leaves -1: shorten"),
        (["--prompt=the", "--length=3"], "which leaves 0: shorten it to 2"),
        (["--prompt=a|"], r"--prompt holds the mask, .* ids of 0 to 26 \(mask 27\)"),
        (["--prompt=The"], "--prompt holds id -13, and arm mdlm-s0 reads ids of 0 to 26"),
        (["--prompt=\udc80"], "--prompt is not what arm mdlm-s0 reads"),
        (["--speculate=draft=mdlm-s7"], "--arm=mdlm-s7 is unknown: did you mean"),
        (
            [f"--speculate=draft={LEFT_TO_RIGHT}"],
            "the verifier has objectives that are masked and the draft has left to right",
        ),
        (
            [f"--arm={LEFT_TO_RIGHT}", "--order=entropy"],
            "--order=entropy is for masked models, and arm ar-s0 is of objective Autoregressive",
        ),
    ],
)
def test_what_an_arm_cannot_write_is_refused(run, given, said):
    with pytest.raises(UserError, match=said):
        generate.generate(run, values(*given))


def test_a_window_of_more_states_than_steps_is_cut(run, trained):
    given = values("--prompt=thethe", "--speculate=jacobi,window=16")
    with pytest.warns(UserWarning, match=r"window=16 is cut to 2: 8 - 6 steps are left"):
        asked = Asked.of(trained[MASKED], config_of(run), run, given)
    assert asked.plan == Speculation("jacobi", 2)
    blocked = with_objective(trained, BlockDiffusion(27, 4))
    given = values("--speculate=jacobi,window=5")
    with pytest.warns(UserWarning, match="window=5 is cut to 4: a block has 4 steps"):
        assert Asked.of(blocked, config_of(run), run, given).plan == Speculation("jacobi", 4)


def with_objective(trained, objective):
    """The masked arm with another objective."""
    arm = trained[MASKED].arm
    changed = Arm(arm.name, replace(arm.experiment, objective=objective), arm.program)
    return trained[MASKED]._replace(arm=changed)


@pytest.mark.parametrize(
    ("objective", "given", "said"),
    [
        (
            SEDDUniform(27),
            ["--speculate=jacobi"],
            "is of objective SEDDUniform, which has no chain",
        ),
        (SEDDUniform(27), ["--prompt=the"], "changes every token"),
        (SEDDUniform(27), ["--order=entropy"], "--order=entropy is for masked models"),
        (BlockDiffusion(27, 4), ["--prompt=thethe"], "not whole blocks of 4: 6 mod 4 = 2; give 4$"),
        (BlockDiffusion(27, 4), ["--length=4"], "the mask of block diffusion is that of 8 tokens"),
        (
            BlockDiffusion(27, 4),
            [f"--speculate=draft={MASKED}"],
            "the verifier has block size 4 and the draft has None",
        ),
    ],
)
def test_objectives_have_limits(run, trained, objective, given, said):
    with pytest.raises(UserError, match=said):
        Asked.of(with_objective(trained, objective), config_of(run), run, values(*given))


def test_drafts_of_other_states_are_refused(trained):
    verifier = trained[MASKED].arm.experiment
    other = with_objective(trained, replace(verifier.objective, n_ids=25)).arm.experiment
    with pytest.raises(UserError, match="has mask id 27 and the draft has 25"):
        generate_text.refuse_draft(verifier, other, 8)
    words = replace(verifier.data, tokenizer=build_tokenizer("byte", 0, list, "", Path()))
    with pytest.raises(UserError, match=r"has vocabulary .* and the draft has byte"):
        generate_text.refuse_draft(verifier, replace(verifier, data=words), 8)
    with pytest.raises(UserError, match="trained on 8 tokens, and a text has 9"):
        generate_text.refuse_draft(verifier, verifier, 9)
