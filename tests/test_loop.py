"""The loop resumes bit by bit, on any mesh; keeps the device busy; and leaves usable state behind
NaN and signals.
"""

import json
import math
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import numpy as np
import pytest
from build import image_data, images, toy, toy_program

from fdp import loop
from fdp.arm import Arm
from fdp.checkpoint import CheckpointError, Checkpoints
from fdp.data.batches import Data, batch
from fdp.loop import Segment, Stopped, fit
from fdp.mesh import make_mesh
from fdp.metrics import read_metrics
from fdp.state import all_finite
from fdp.workdir import Record, SegmentLog

STEPS = 12


def arm_of(data: Data | None = None, **changes: Any) -> Arm:
    """The toy, with other numbers of the loop; every step is logged, every third evaluated, every
    fourth saved.
    """
    p = toy_program()
    e = replace(p.experiment, fit=replace(p.experiment.fit, **changes))
    return Arm("toy", e if data is None else replace(e, data=data), p)


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Metric rows in the order of writing, without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")}
        for row in read_metrics(workdir)
    ]


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in rows(workdir) if "loss" in row]


def before_step(arm: Arm, action: Callable[[int], None]) -> None:
    """Call action(i) before the i-th call of the compiled step in this process, i = 1, 2, …"""
    run = arm.train_function()
    calls = iter(range(1, 10_000))

    def step(state: Any, examples: Any) -> Any:
        action(next(calls))
        return run(state, examples)

    arm.train_function = lambda: step  # type: ignore[method-assign]


def interrupt(arm: Arm, at: int, number: int = signal.SIGTERM) -> None:
    """Raise a signal inside the `at`-th step."""
    before_step(arm, lambda i: signal.raise_signal(number) if i == at else None)


def assert_bitwise_equal(a: Any, b: Any) -> None:
    chex.assert_trees_all_equal(jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Any]:
    """(rows, variables) of a run from start to end."""
    workdir, arm = tmp_path_factory.mktemp("uninterrupted"), arm_of()
    fit(arm, workdir)
    return rows(workdir), arm.trained_on_host.variables


def test_a_run_logs_every_step_once_and_evaluates_when_due(
    uninterrupted: tuple[list[dict], Any],
) -> None:
    found, _ = uninterrupted
    assert [r["step"] for r in found if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in found if "val_loss" in r] == [3, 6, 9, 12]
    assert found[-1]["val_loss"] < found[0]["loss"]
    assert np.shape(found[0]["blocks/sum"]) == (2, 8)  # an array of every layer


# After 5 nothing was due, after 6 an evaluation, after 8 a save; 4 then 9 stops twice.
@pytest.mark.parametrize("stops", [(5,), (6,), (8,), (4, 9)])
def test_a_resumed_run_writes_the_rows_of_the_uninterrupted_one(
    stops: tuple[int, ...], tmp_path: Path, uninterrupted: tuple[list[dict], Any]
) -> None:
    done = 0
    for step in stops:
        arm = arm_of()
        interrupt(arm, step - done)
        with pytest.raises(Stopped) as stopped:
            fit(arm, tmp_path)
        assert stopped.value.step == step
        done = step
    arm = arm_of()
    fit(arm, tmp_path)
    want, variables = uninterrupted
    assert rows(tmp_path) == want
    assert_bitwise_equal(arm.trained_on_host.variables, variables)
    assert_bitwise_equal(arm.trained.variables, variables)


def stored_bytes(arm: Arm) -> tuple[int, int]:
    """Of the whole state, and of what one device holds of it."""
    state = jax.tree.leaves(arm.program.specs.abstract_state())
    whole = sum(x.size * x.dtype.itemsize for x in state)
    return whole, sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state)


def test_a_run_changes_its_mesh_and_resumes_in_between_on_another(
    tmp_path: Path, uninterrupted: tuple[list[dict], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [({"dp": 8}, 4), ({"dp": 2, "tp": 2, "cp": 2, "zero": 3}, 8), ({}, STEPS)]
    made = [(toy(**options), until) for options, until in stages]
    parts = [Segment(until, Arm.of("toy", e, make_mesh(e.degrees))) for e, until in made]

    def segments(step: int, state: Any) -> Segment:
        assert int(state.step) == step
        return next(part for part in parts if step < part.until)

    arm = parts[1].arm
    interrupt(arm, 2)  # after step 6; the checkpoint is then read onto the mesh of the third
    with pytest.raises(Stopped):
        fit(parts[0].arm, tmp_path, segments)
    assert Checkpoints(tmp_path / "checkpoints" / arm.label).latest_step() == 6
    arm = parts[2].arm
    capsys.readouterr()
    fit(arm, tmp_path, segments)
    # One device holds all that the other seven need, and later lacks what they held for it.
    whole, shard = stored_bytes(parts[1].arm)
    moves = re.findall(r"step (\d+): ([\d,]+) bytes of state go to (\d)", capsys.readouterr().err)
    found = [tuple(int(n.replace(",", "")) for n in move) for move in moves]
    assert 0 < shard < whole and found == [(6, 7 * shard, 8), (8, whole - shard, 1)]
    want, variables = uninterrupted
    for name in ("loss", "val_loss", "blocks/sum"):
        pairs = [(r[name], w[name]) for r, w in zip(rows(tmp_path), want, strict=True) if name in w]
        assert len(pairs) in (STEPS, STEPS // 3)
        for got, wanted in pairs:
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        arm.trained_on_host.variables,
        variables,
    )
    assert {d.id for x in jax.tree.leaves(arm.trained.params) for d in x.devices()} == {0}


def test_a_segment_that_ends_outside_the_run_is_refused(tmp_path: Path) -> None:
    arm = arm_of()
    message = rf"the segment at step 0 ends at 13: step < until ≤ train.steps = {STEPS}"
    with pytest.raises(ValueError, match=message):
        fit(arm, tmp_path, lambda step, state: Segment(STEPS + 1, arm))


def test_a_finished_run_computes_nothing_again(tmp_path: Path) -> None:
    first, again = arm_of(), arm_of()
    fit(first, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    # type: ignore[method-assign]
    again.train_function = lambda: pytest.fail("compiled a finished run")
    fit(again, tmp_path)
    assert_bitwise_equal(again.trained_on_host.params, first.trained_on_host.params)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_nothing_is_traced_or_compiled_between_steps(tmp_path: Path) -> None:
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name) if name.startswith("/jax/core/compile") else None
    )
    arm = Arm.of(
        "toy",
        toy(dp=2, fit=replace(toy_program().experiment.fit, eval_every=0)),
        toy_program().mesh,
    )
    seen: list[int] = []
    before_step(arm, lambda i: seen.append(len(events)))
    assert events, "the listener hears no compilation"
    fit(arm, tmp_path)
    assert len(seen) == STEPS
    assert seen[-1] == seen[0], events[seen[0] :]


def test_evaluate_save_step_log_and_metrics_are_fetched_one_step_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fetch, wait, save, evaluate = (
        jax.device_get,
        jax.block_until_ready,
        Checkpoints.save,
        loop.evaluate,
    )

    def recorded_save(self: Checkpoints, step: int, *rest: Any) -> None:
        assert losses(tmp_path) and rows(tmp_path)[-1]["step"] == step, (
            "a checkpoint without the rows up to it"
        )
        events.append(f"save {step}")
        save(self, step, *rest)

    def recorded_evaluate(arm: Arm, state: Any) -> float:
        events.append("evaluate")
        with monkeypatch.context() as inside:
            inside.setattr(jax, "block_until_ready", wait)
            return evaluate(arm, state)

    def recorded_fetch(x: Any) -> Any:
        if isinstance(x, dict) and "grad_norm" in x:
            events.append("fetch")
        return fetch(x)

    arm = arm_of(steps=6)
    before_step(arm, lambda i: events.append(f"step {i}"))
    monkeypatch.setattr(Checkpoints, "save", recorded_save)
    monkeypatch.setattr(loop, "evaluate", recorded_evaluate)
    monkeypatch.setattr(jax, "device_get", recorded_fetch)
    monkeypatch.setattr(jax, "block_until_ready", lambda x: (events.append("wait"), wait(x))[1])
    fit(arm, tmp_path)
    # Step t is fetched after step t+1 was dispatched, except before an evaluation or a save, which
    # wait anyway.
    assert events == [
        "step 1",
        "wait",
        "step 2",
        "fetch",
        "step 3",
        "fetch",
        "fetch",
        "evaluate",
        "step 4",
        "fetch",
        "save 4",
        "step 5",
        "step 6",
        "fetch",
        "fetch",
        "evaluate",
        "save 6",
    ]


def test_the_steps_of_the_profile_are_traced_and_no_others(tmp_path: Path) -> None:
    fit(arm_of(profile=(3, 4), eval_every=0), tmp_path)
    (file,) = (tmp_path / "profile" / "toy-s0").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [3, 4]


def test_a_step_sends_nothing_to_the_devices(tmp_path: Path) -> None:
    arm = arm_of()
    arm.place = lambda host: host  # type: ignore[method-assign]
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        fit(arm, tmp_path)


def spoilt(step: int, field: str, value: float) -> Data:
    """The toy's data with `value` in one field of all examples of one step, and of no other."""
    data, fit = toy_program().experiment.data, toy_program().experiment.fit
    whole = data.train.take(range(len(data.train)))
    wanted = batch(data.train, step, fit.batch, fit.seed)["image"]
    at = [i for i, x in enumerate(whole["image"]) if any((x == y).all() for y in wanted)]
    assert len(at) == fit.batch
    whole[field][at] = value
    return image_data(images(len(data.train), 0, **whole))


def test_a_nan_loss_stops_with_step_loss_and_fix_and_the_checkpoint_survives(
    tmp_path: Path, uninterrupted: tuple[list[dict], Any]
) -> None:
    with pytest.raises(FloatingPointError) as error:
        fit(arm_of(spoilt(6, "image", math.nan)), tmp_path)
    text = str(error.value)
    assert text.startswith(
        "step 7: loss = nan, gradient norm = nan; the parameters were left as they were."
    )
    assert "Lower train.lr" in text
    assert "train.nan=skip" in text
    assert rows(tmp_path)[-1]["step"] == 7
    assert math.isnan(rows(tmp_path)[-1]["loss"])
    # What was saved is good: a run without the NaN goes on from it as if nothing had happened.
    with pytest.MonkeyPatch.context() as patch:
        resumed: list[int] = []
        restore = loop.restore_or_init
        patch.setattr(
            loop,
            "restore_or_init",
            lambda *a: (lambda r: (resumed.append(r[0]), r)[1])(restore(*a)),
        )
        arm = arm_of()
        fit(arm, tmp_path)
    assert resumed == [4]
    assert_bitwise_equal(arm.trained_on_host.variables, uninterrupted[1])
    assert rows(tmp_path) == uninterrupted[0]


def test_a_trace_that_cannot_be_written_leaves_no_checkpoint_unfinished() -> None:
    closed: list[str] = []

    def full() -> None:
        raise OSError("no space left")

    run: Any = SimpleNamespace(
        trace=SimpleNamespace(close=full),
        writer=SimpleNamespace(close=lambda: closed.append("rows")),
        checkpoints=SimpleNamespace(close=lambda: closed.append("checkpoints")),
    )
    with pytest.raises(OSError, match="no space left"):
        loop._Run.close(run)
    assert closed == ["rows", "checkpoints"]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """Loss and gradients are finite in every step; the parameters after step 8 are not."""
    arm = arm_of(nan="skip", eval_every=0)
    run, calls = arm.train_function(), iter(range(1, 100))

    def step(state: Any, examples: Any) -> Any:
        state, metrics = run(state, examples)
        if next(calls) == 8:
            with jax.transfer_guard("allow"):
                state = state.replace(params=jax.tree.map(lambda x: x / 0, state.params))
        return state, metrics

    arm.train_function = lambda: step  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"^step 8: loss and"):
        fit(arm, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "toy-s0")
    step_, state, _ = checkpoints.restore(arm.program.specs.abstract_state())
    checkpoints.close()
    assert step_ == 4 and all_finite(state)


def test_a_checkpoint_knows_its_run_and_a_start_that_trains_nothing_is_no_segment(
    tmp_path: Path,
) -> None:
    ledger = SegmentLog(tmp_path, Record({"train.lr": 3e-2}, "aaa"))
    fit(arm_of(), tmp_path, ledger=ledger)
    meta = tmp_path / "checkpoints" / "toy-s0" / str(STEPS) / "meta" / "metadata"
    assert json.loads(meta.read_text())["run"] == ledger.record
    assert [(s["arm"], s["first"], s["mesh"]["dp"]) for s in ledger.segments] == [("toy-s0", 0, 2)]
    before = (tmp_path / "config.json").read_bytes()
    later = SegmentLog(tmp_path, Record({"train.lr": 1e-2}, "bbb"))
    fit(arm_of(), tmp_path, ledger=later)
    assert (tmp_path / "config.json").read_bytes() == before
    found = rows(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds step 12, and train.steps=8 asks for fewer"):
        fit(arm_of(steps=8), tmp_path, ledger=later)
    assert rows(tmp_path) == found


def test_weights_that_are_all_zero_stop_the_run_and_say_so(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"^step 3: .*whose weights are all 0 has no loss"):
        fit(arm_of(spoilt(2, "weight", 0.0)), tmp_path / "train")
    nothing = image_data(val=images(16, 1, "validation images", weight=np.zeros(16, np.float32)))
    with pytest.raises(FloatingPointError, match=r"validation images: the counts of 2 batches are"):
        fit(arm_of(nothing), tmp_path / "val")


def test_a_nan_loss_is_skipped_counted_and_not_counted_again_after_a_resume(tmp_path: Path) -> None:
    data = spoilt(6, "image", math.nan)
    arm = arm_of(data, nan="skip")
    fit(arm, tmp_path / "whole")
    state = arm.trained_on_host
    assert int(state.skipped) == 1
    assert int(state.step) == STEPS
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.variables))
    found = rows(tmp_path / "whole")
    assert {r["step"] for r in found if not math.isfinite(r.get("loss", 0))} == {7}
    assert [r["skipped"] for r in found if r["step"] == STEPS and "skipped" in r] == [1]
    for stop in (9, None):
        arm = arm_of(data, nan="skip")
        if stop is None:
            fit(arm, tmp_path / "parts")
        else:
            interrupt(arm, stop)
            with pytest.raises(Stopped):
                fit(arm, tmp_path / "parts")
    assert str(rows(tmp_path / "parts")) == str(found)  # as text, because NaN differs from itself


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_a_step_saves_that_step_and_restores_the_handlers(
    number: int, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    arm = arm_of()
    interrupt(arm, 5, number)
    with pytest.raises(Stopped, match="stopped after step 5") as stopped:
        fit(arm, tmp_path)
    assert stopped.value.step == 5
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "toy-s0")
    step, state, meta = checkpoints.restore(arm.program.specs.abstract_state())
    checkpoints.close()
    assert step == int(state.step) == 5
    assert meta["fit"]["steps"] == STEPS
    assert [r["step"] for r in rows(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5]


def test_a_signal_while_compiling_stops_after_one_step(tmp_path: Path) -> None:
    arm = arm_of()
    run = arm.train_function()
    # type: ignore[method-assign]
    arm.train_function = lambda: (signal.raise_signal(signal.SIGTERM), run)[1]
    with pytest.raises(Stopped) as stopped:
        fit(arm, tmp_path)
    assert stopped.value.step == 1


def test_a_signal_in_the_last_step_finishes_the_arm_but_not_the_run(
    tmp_path: Path, uninterrupted: tuple[list[dict], Any]
) -> None:
    arm = arm_of()
    interrupt(arm, STEPS)
    with pytest.raises(Stopped) as stopped:
        fit(arm, tmp_path)
    assert stopped.value.step == STEPS
    assert rows(tmp_path) == uninterrupted[0]
    again = arm_of()
    fit(again, tmp_path)
    assert_bitwise_equal(again.trained_on_host.variables, uninterrupted[1])


def test_the_state_of_another_step_is_refused_where_the_checkpoint_does_not_say_so(
    tmp_path: Path,
) -> None:
    arm = arm_of()
    store = Checkpoints(tmp_path / "checkpoints" / arm.label)
    store.save(3, arm.init(), {"step": 3})
    store.close()
    with pytest.raises(CheckpointError, match=r"toy-s0/3 holds the state of step 0: rename the"):
        fit(arm, tmp_path)
