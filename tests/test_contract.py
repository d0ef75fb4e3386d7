"""Topic 16 needs no core edit: a folder that invents a layer with weights and model state, an image
batch with labels, a loss with its own count, an array metric, a hook, a config section and an
update rule is trained, resumed, dry-run and equal on every mesh.
"""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import fdp.topics
from fdp import config, loop
from fdp.dry_run import dry_run
from fdp.mesh import AXES, make_mesh
from fdp.metrics import read_metrics
from fdp.run import run
from fdp.step import TrainStep

STEPS = 6


@pytest.fixture
def topic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a topic in a temporary folder."""
    folder = tmp_path / "topics"
    shutil.copytree(Path(__file__).parent / "topic16", folder / "herding")
    monkeypatch.setattr(fdp.topics, "__path__", [*fdp.topics.__path__, str(folder)])
    importlib.invalidate_caches()
    return "herding"


def settings(topic: str, **overrides: object):
    c = config.base(**config.topic_sections(topic))
    c.topic = topic
    c.train.update(batch=16, steps=STEPS, lr=1e-2, warmup=0)
    c.eval.update(every=3, batches=2)
    c.checkpoint.every, c.log.every = 2, 1
    c.update_from_flattened_dict(overrides)
    return c


def outcome(topic: str, zero: int = 0, micro: int = 1, **degrees: int):
    """(loss, gradients, aux, model state after a step) on a mesh."""
    c = settings(topic, **{"train.zero": zero, "train.microbatches": micro})
    arms = importlib.import_module(f"fdp.topics.{topic}.study").arms(c)
    degrees = dict.fromkeys(AXES, 1) | degrees
    p = TrainStep(replace(arms["herd"], degrees=degrees), make_mesh(degrees))
    batch = jax.device_put(arms["herd"].data.train.take(range(16)), p.batch_shardings())
    state = p.init(0)
    noised = p.corrupt(batch, jax.random.key(7))
    loss, grads, aux = jax.device_get(jax.jit(p.grads)(state.variables, noised))
    after, metrics = p.jit_train_step()(state, batch)
    return loss, grads, aux, jax.device_get(after.model), jax.device_get(metrics)


def test_it_is_equal_on_every_mesh(topic: str) -> None:
    loss, grads, aux, model, metrics = outcome(topic)
    assert metrics["herd/load"].shape == (4,) and aux["herd"]["load"].sum() == 16
    assert np.abs(model["herd"]["bias"]).max() > 0
    for degrees in (
        {"dp": 2, "tp": 2, "cp": 2},
        {"ep": 2, "dp": 2, "zero": 1},
        {"dp": 2, "micro": 2},
    ):
        other = outcome(topic, **degrees)
        assert other[0] == pytest.approx(loss, rel=1e-5), degrees
        for got, want in zip(jax.tree.leaves(other[1]), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(
                got, want, atol=1e-5 * np.abs(want).max(), err_msg=str(degrees)
            )
        np.testing.assert_array_equal(other[2]["herd"]["load"], aux["herd"]["load"])
        np.testing.assert_array_equal(other[3]["herd"]["bias"], model["herd"]["bias"])


def test_it_trains_resumes_and_reports(topic: str, tmp_path: Path, monkeypatch, capsys) -> None:
    c, workdir = settings(topic, **{"mesh.dp": 2, "mesh.tp": 2}), tmp_path / "run"
    done = []
    steps = loop._Run._between_steps

    def stopping(self, step, state, log):
        steps(self, step, state, log)
        if step == 3 and not done:
            done.append(step)
            raise loop.Stopped(step)

    monkeypatch.setattr(loop._Run, "_between_steps", stopping)
    run(c, workdir, "")
    assert "state saved. Call again to resume." in capsys.readouterr().out
    run(c, workdir, "")
    rows = read_metrics(workdir)
    assert [r["step"] for r in rows if "hook/weights" in r] == [2, 4, 6]
    assert all(len(r["column norms"]) == 4 for r in rows if "hook/weights" in r)
    assert [r["step"] for r in rows if "herd/load" in r] == list(range(1, STEPS + 1))
    assert sum(rows[-3]["herd/load"]) == 16 or any("herd/load" in r for r in rows)
    assert (workdir / "report.json").is_file()


def test_it_dry_runs(topic: str, capsys) -> None:
    dry_run(settings(topic, **{"mesh.dp": 2, "mesh.tp": 2}))
    out = capsys.readouterr().out
    assert "arm herd" in out and "all-gather over tp" in out and "not stated" in out


def test_its_keys_are_checked(topic: str) -> None:
    with pytest.raises(config.UserError, match=r"herding\.groups = 4 is not divisible"):
        config.validate(settings(topic, **{"mesh.tp": 8, "model.heads": 8, "model.kv_heads": 8}))
    with pytest.raises(config.UserError, match=r"herding\.rate"):
        config.validate(settings(topic, **{"herding.rate": -1.0}))
    with pytest.raises(config.UserError, match=r"unknown config key 'herdin.rate'.*herding"):
        config.check_override("herdin.rate", "1", topic)
