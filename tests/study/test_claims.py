"""Claims that topics share: the rows say what the programs did, and a wrong program is caught."""

from types import SimpleNamespace

import numpy as np
import pytest
from stub.config import get_config

from fdp.count.compare import Comparison
from fdp.experiment import standard
from fdp.study import claims
from fdp.study.cache import Cache
from fdp.study.measure import perform
from fdp.study.report import Row


def build(config, name, degrees):
    """One layer in float32."""
    c = config.copy_and_resolve_references()
    c.model.update(layers=1, width=16, heads=2, kv_heads=2, head_dim=8, ffn=16, dtype="float32")
    c.data.update(source="blank", tokenizer="bpe", seq_len=8)
    c.train.batch = 4
    c.mesh.update(degrees)
    return standard(c)


def test_sharded_equals_unsharded_is_kept_mesh_by_mesh(tmp_path, capsys) -> None:
    meshes = {"dp2": {"dp": 2}, "tp2": {"tp": 2}}

    def go(meshes, plot=None):
        parts = claims.sharded_equals_unsharded(build, get_config(), meshes, plot, group="Exact")
        found = perform(parts, Cache(tmp_path, {}), tmp_path)
        return found, capsys.readouterr().out

    found, said = go(meshes)
    assert said.count(" after ") == 3
    loss, gradients, wire = found.rows
    assert [r.claim for r in found.rows] == list(claims.EQUAL)
    assert {r.verdict for r in found.rows} == {"holds"} and {r.group for r in found.rows} == {
        "Exact"
    }
    assert 0 < gradients.value < 1e-5 and loss.note.endswith("on dp2; tp2")
    assert wire.value == 0 and int(wire.note.split()[-2]) >= 2
    assert found.raw["one device"] is None
    seen = []
    found, said = go(meshes, lambda comparisons: seen.extend(c.name for c in comparisons))
    assert " after " not in said and seen == ["dp2", "tp2"]


@pytest.mark.fast
def test_rows_of_equality_fail_where_programs_differ() -> None:
    key = ("all-reduce", ("tp",))
    good = Comparison({key: 8.0}, {key: 8.0}, "a", 1e-7, 1e-7)
    bad = Comparison({key: 8.0}, {key: 9.0}, "b", 1e-7, 1e-3)
    rows = claims.equality([good, bad], "note", tolerances=(1e-5, 1e-4))
    assert [r.verdict for r in rows] == ["holds", "fails", "fails"]
    assert [r.threshold for r in rows] == ["<= 1e-05", "<= 0.0001", "== 0"]
    assert [r.value for r in rows] == [1e-7, 1e-3, 1]


@pytest.mark.fast
def test_likelihood_is_a_ratio_over_seeds(tmp_path, monkeypatch) -> None:
    def arms(name, *losses):
        return [SimpleNamespace(name=name, loss=loss) for loss in losses]

    monkeypatch.setattr(claims, "validation_loss", loss_of)
    monkeypatch.setattr("fdp.study.cache._comparable", lambda arm: arm.loss)
    mine, theirs = arms("mdlm", 3.0, 3.1), arms("ar", 2.9, 3.0)
    parts = claims.likelihood("near AR", mine, theirs, "ratio <= 1.05", "AR", note="small")
    (row,) = perform(parts, Cache(tmp_path, {}), tmp_path).rows
    assert row.ratio == pytest.approx(6.1 / 5.9) and row.ci is not None
    assert (row.verdict, row.note.split(";")[:2]) == ("holds", ["2 seed(s)", " small"])


def loss_of(arm):
    return arm.loss


@pytest.mark.fast
def test_entropy_of_samples_against_text() -> None:
    text = np.arange(64).reshape(8, 8) % 4
    assert claims.unigram_entropy(text) == pytest.approx(np.log(4))
    val = type("Split", (), {"take": lambda self, ids: {"tokens": text[list(ids)]}})
    val.__len__ = lambda self: len(text)
    arm = SimpleNamespace(data=SimpleNamespace(val=val()))
    good, collapsed = text[:4], np.zeros((4, 8), int)
    rows = [claims.entropy("mdlm", arm, ids) for ids in (good, collapsed)]
    assert [r.verdict for r in rows] == ["holds", "fails"]
    assert rows[0].ratio == 1.0
    needs = claims.needs_devices("c", "m", "<= 1", 8)
    assert isinstance(needs, Row) and needs.note.startswith("needs 8 devices")
