"""Images of a trained run: which labels, which page, and what is refused."""

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs.topic8 import get_config
from fdp import config, generate, generate_images
from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.keys import UserError
from fdp.mesh import make_mesh
from fdp.topics.zero_bubble import study
from fdp.workdir import Record, bind


def values(*given: str) -> flags.FlagValues:
    found = flags.FlagValues()
    generate.declare(found)
    found(["generate", *given])
    return found


def test_labels_take_turns() -> None:
    assert generate_images.labels_of("7", 10, 3) == [7, 7, 7]
    assert generate_images.labels_of("0,7", 10, 3) == [0, 7, 0]
    assert generate_images.labels_of("all", 3, 4) == [0, 1, 2, 0]
    assert generate_images.labels_of("none", 10, 2) == [10, 10]


@pytest.mark.parametrize(
    ("text", "n", "said"),
    [
        ("10", 1, "labels are 0..9"),
        ("-1", 1, "labels are 0..9"),
        ("seven", 1, "is no class"),
        ("7", 0, "--n=0"),
    ],
)
def test_labels_that_are_refused(text: str, n: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate_images.labels_of(text, 10, n)


def test_a_page_holds_every_image_in_its_place() -> None:
    images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 4, 4, 3))
    page = generate_images.page(images)
    assert page.shape == (2 * 6, 3 * 6, 3)
    assert page[1, 1, 0] == 0 and page[7, 7, 0] == 255 and page[0, 0, 0] == 255


def test_what_is_no_run_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="name the workdir of a run"):
        generate.generate(tmp_path, values())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no config of this version"):
        generate.generate(tmp_path, values())


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--method=hein", "--method=hein is unknown"),
        ("--guidance=nan", "--guidance=nan must be within ±1000"),
        ("--guidance=1e300", "must be within ±1000"),
        ("--steps=0", r"--steps=0 must be within 1..10000"),
        ("--steps=1000000000", "must be within"),
        ("--seed=-1", "--seed=-1 must be within 0"),
        ("--seed=99999999999999999999", "must be within 0"),
        ("--out=x.xyz", "--out=x.xyz is no PNG file"),
        ("--out=.", "is no PNG file"),
    ],
)
def test_flags_that_are_refused_before_the_run_is_read(tmp_path, flag: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate.generate(tmp_path, values(flag))


def test_a_trained_arm_draws_what_is_asked_for(tmp_path) -> None:
    c = get_config("tiny")
    with c.unlocked():
        c.mesh.update(pp=1, dp=1)
        c.data.source = "blank"
    bind(tmp_path, Record(config.flatten(c), config.digest(c)))
    e = study.arms(c)["uniform"]
    arm = Arm.of("uniform", e, make_mesh(e.degrees, jax.devices()[:1]))
    checkpoints = Checkpoints(tmp_path / "checkpoints" / arm.label)
    checkpoints.save(3, arm.init(), {"mesh": dict(arm.mesh.shape), "fit": {}})
    checkpoints.close()
    lines, status = generate.generate(tmp_path, values("--label=1,2", "--n=3", "--steps=1"))
    path = tmp_path / "samples" / "1-2.png"
    assert (lines, status) == ([f"wrote     {path}"], 0)
    drawn = np.asarray(Image.open(path))
    assert drawn.shape == (2 * 18, 2 * 18, 3)
    # Three of the four places are taken, with noise.
    assert drawn[1:17, 1:17].std() > 1 and drawn[19:, 19:].min() == 255
    with pytest.raises(UserError, match=r"--prompt is for text, and arm uniform-s0 makes images"):
        generate.generate(tmp_path, values("--prompt=a"))
