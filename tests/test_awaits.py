"""An arm that learns from another one gets its examples when it is trained, and only then."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import build
import jax
import numpy as np
import pytest
from stub.config import get_config

from fdp import loop
from fdp import run as fdp_run
from fdp.arm import Arm
from fdp.data.batches import Arrays
from fdp.mesh import make_mesh

pytestmark = pytest.mark.fast
FIT = replace(build.TOY_FIT, steps=3, eval_every=0, checkpoint_every=2)
DATA = build.image_data()


def arm(name: str, awaits: tuple[str, ...] = ()) -> Arm:
    e = replace(build.toy(dp=2, fit=FIT), data=replace(DATA, awaits=awaits))
    return Arm(name, e, build.toy_program())


class Study:
    """Images of the trained teacher's favourite class; remembers for whom they were made."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def examples(self, pupil: Arm, teachers: dict[str, Arm]):
        self.made.append(pupil.label)
        params = jax.tree.leaves(teachers["teacher"].trained_on_host.params)
        seed = int(1e6 * sum(np.abs(x).sum() for x in params))
        return build.image_data(build.images(96, seed))


def train(workdir: Path, study) -> list[Arm]:
    arms = [arm("teacher"), arm("pupil", ("teacher",))]
    found = fdp_run.Run(get_config("tiny"), arms[0].mesh, workdir, {a.name: [a] for a in arms})
    fdp_run._train(found, study, None)
    return arms


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(study, arms) of a run without an interruption."""
    study = Study()
    return study, train(tmp_path_factory.mktemp("whole"), study)


def learnt(arm: Arm) -> np.ndarray:
    return np.concatenate([x.ravel() for x in jax.tree.leaves(arm.trained_on_host.params)])


def test_a_pupil_learns_from_what_its_teacher_makes(whole) -> None:
    study, (teacher, pupil) = whole
    assert study.made == ["pupil-s0"]
    assert (learnt(teacher) != learnt(pupil)).any(), "the examples it was built with were read"
    assert pupil.data.awaits == ("teacher",), "the examples are kept after training"


def test_a_resumed_pupil_gets_the_same_examples_and_a_finished_one_none(
    whole, tmp_path, monkeypatch
) -> None:
    study, between, stopped = Study(), loop._Run._between_steps, []

    def stopping(self, step, state, log):
        between(self, step, state, log)
        if self.arm.name == "pupil" and step == 2 and not stopped:
            stopped.append(step)
            raise loop.Stopped(step)

    monkeypatch.setattr(loop._Run, "_between_steps", stopping)
    with pytest.raises(loop.Stopped):
        train(tmp_path, study)
    resumed = train(tmp_path, study)
    assert study.made == ["pupil-s0"] * 2
    np.testing.assert_array_equal(learnt(resumed[1]), learnt(whole[1][1]))
    train(tmp_path, study)
    assert study.made == ["pupil-s0"] * 2


def test_the_teacher_is_the_one_of_the_same_seed(tmp_path) -> None:
    def examples(pupil, teachers):
        told.extend(teacher.label for teacher in teachers.values())
        return DATA

    told: list[str] = []
    teachers = [arm("teacher").with_seed(seed) for seed in (3, 5)]
    pupil = arm("pupil", ("teacher",)).with_seed(5)
    found = fdp_run.Run(get_config("tiny"), pupil.mesh, tmp_path, {"teacher": teachers})
    made = fdp_run._examples(pupil, found, SimpleNamespace(examples=examples))
    assert told == ["teacher-s5"] and made.awaits == ()


def test_examples_of_other_shapes_are_refused_and_both_are_named(tmp_path) -> None:
    def halved(what: str) -> Arrays:
        fields = build.images(96, 0).take(range(96))
        return Arrays(fields | {"image": fields["image"][:, :4]}, what, "")

    other = build.image_data(halved("half"), halved("images"))
    wrong = SimpleNamespace(examples=lambda pupil, teachers: other)
    said = r"for pupil-s0 .* built for: image float32\[4, 3, 4\], not float32\[8, 3, 4\]; give"
    with pytest.raises(ValueError, match=said):
        train(tmp_path, wrong)


def test_a_pupil_is_not_trained_on_what_it_was_built_with(tmp_path) -> None:
    with pytest.raises(ValueError, match="pupil-s0 learns from teacher, and its examples were not"):
        loop.fit(arm("pupil", ("teacher",)), tmp_path)


@pytest.mark.parametrize("order", [("pupil", "teacher"), ("pupil",)])
def test_a_teacher_is_trained_first_with_the_same_seeds(order) -> None:
    c = get_config("tiny")
    made = {n: arm(n, ("teacher",) if n == "pupil" else ()).experiment for n in order}
    study, mesh = SimpleNamespace(arms=lambda config: made), make_mesh({**c.mesh, "dp": 2})
    with pytest.raises(ValueError, match=r"learns from teacher, .* define examples\(arm, teachers"):
        fdp_run.build_arms(c, study, mesh)
    study.examples = None
    with pytest.raises(ValueError, match="arm pupil learns from teacher, of which seed 0 is not"):
        fdp_run.build_arms(c, study, mesh)
