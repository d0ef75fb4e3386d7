"""Images of a trained run: which labels, which page, and what is refused."""

import numpy as np
import pytest
from absl import flags

from fdp import generate
from fdp.keys import UserError

pytestmark = pytest.mark.fast


def values(*given: str) -> flags.FlagValues:
    found = flags.FlagValues()
    generate.declare(found)
    found(["generate", *given])
    return found


def test_labels_take_turns() -> None:
    assert generate.labels_of("7", 10, 3) == [7, 7, 7]
    assert generate.labels_of("0,7", 10, 3) == [0, 7, 0]
    assert generate.labels_of("all", 3, 4) == [0, 1, 2, 0]
    assert generate.labels_of("none", 10, 2) == [10, 10]


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
        generate.labels_of(text, 10, n)


def test_a_page_holds_every_image_in_its_place() -> None:
    images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((5, 4, 4, 3))
    page = generate.page(images)
    assert page.shape == (2 * 6, 3 * 6, 3)
    assert page[1, 1, 0] == 0 and page[7, 7, 0] == 255 and page[0, 0, 0] == 255


def test_what_is_no_run_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="name the workdir of a run"):
        generate.generate(tmp_path, values())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no config of this version"):
        generate.generate(tmp_path, values())
    with pytest.raises(UserError, match="--method=hein is unknown"):
        generate.generate(tmp_path, values("--method=hein"))
    with pytest.raises(UserError, match="must be finite"):
        generate.generate(tmp_path, values("--guidance=nan"))
