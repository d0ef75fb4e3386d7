"""The loop resumes bit by bit, on any mesh; keeps the device busy; and leaves usable state behind
NaN and signals.
"""

import math
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp import config, loop
from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.data.batches import Data, load_text
from fdp.experiment import standard
from fdp.loop import Stopped, StopSignal, fit
from fdp.mesh import make_mesh
from fdp.metrics import read_metrics

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A small random text as bytes, in windows of 16."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = [
        "in",
        "the",
        "beginning",
        "was",
        "a",
        "word",
        "and",
        "it",
        "went",
        "on",
        "until",
        "stones",
        "spoke",
    ]
    text = "\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(60))
    (folder / "corpus.txt").write_text(text)
    return load_text(str(folder / "corpus.txt"), "byte", 0, 16, 0.1, 0, folder)


def arm_of(data: Data, **overrides: Any) -> Arm:
    """A one-layer arm on two devices; every step is logged, every third evaluated, every fourth
    saved.
    """
    c = config.base()
    c.model.update(layers=1, width=32, heads=4, kv_heads=4, head_dim=8, ffn=32, vocab=264)
    c.mesh.dp = 2
    c.data.seq_len = 16
    c.train.update(batch=8, steps=STEPS, warmup=2)
    c.eval.update(every=3, batches=2)
    c.checkpoint.every, c.log.every = 4, 1
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return Arm.of("mdlm", standard(c, data), make_mesh(c.mesh))


def trained(arm: Arm, workdir: Path) -> Any:
    """The final state, on the host."""
    fit(arm, workdir)
    return arm.trained_on_host


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
    compiled = arm.train_function()
    calls = iter(range(1, 10_000))

    def step(state: Any, tokens_BxL: Any) -> Any:
        action(next(calls))
        return compiled(state, tokens_BxL)

    arm.train_function = lambda: step  # type: ignore[method-assign]


def interrupt(arm: Arm, at: int, number: int = signal.SIGTERM) -> None:
    """Raise a signal inside the `at`-th step."""
    before_step(arm, lambda i: signal.raise_signal(number) if i == at else None)


def assert_bitwise_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def uninterrupted(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Any]:
    """(rows, parameters) of a run from start to end."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    params = trained(arm_of(data), workdir).params
    return rows(workdir), params


def test_a_run_logs_every_step_once_and_evaluates_when_due(
    uninterrupted: tuple[list[dict], Any],
) -> None:
    found, _ = uninterrupted
    assert [r["step"] for r in found if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in found if "val_loss" in r] == [3, 6, 9, 12]
    assert found[-1]["val_loss"] < math.log(257)


# After 5 nothing was due, after 6 an evaluation, after 8 a save; 4 then 9 stops twice.
@pytest.mark.parametrize("stops", [(5,), (6,), (8,), (4, 9)])
def test_a_resumed_run_writes_the_rows_of_the_uninterrupted_one(
    stops: tuple[int, ...], data: Data, tmp_path: Path, uninterrupted: tuple[list[dict], Any]
) -> None:
    done = 0
    for step in stops:
        arm = arm_of(data)
        interrupt(arm, step - done)
        with pytest.raises(Stopped) as stopped:
            fit(arm, tmp_path)
        assert stopped.value.step == step
        done = step
    arm = arm_of(data)
    state = trained(arm, tmp_path)
    want, params = uninterrupted
    assert rows(tmp_path) == want
    assert_bitwise_equal(state.params, params)
    assert_bitwise_equal(arm.trained.params, params)


def test_a_run_resumes_on_other_meshes_and_zero_stages(data: Data, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(arm_of(data, mesh__dp=8), whole)
    stages = [
        ({"mesh__dp": 8}, 4),
        ({"mesh__dp": 2, "mesh__tp": 4, "train__zero": 3}, 8),
        ({"mesh__dp": 1}, None),
    ]
    done = 0
    for options, until in stages:
        arm = arm_of(data, **options)
        if until is None:
            fit(arm, parts)
            continue
        interrupt(arm, until - done)
        with pytest.raises(Stopped):
            fit(arm, parts)
        done = until
    assert len(losses(parts)) == STEPS
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    assert {d.id for x in jax.tree.leaves(arm.trained.params) for d in x.devices()} == {0}


def test_a_finished_run_computes_nothing_again(data: Data, tmp_path: Path) -> None:
    state = trained(arm_of(data), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = arm_of(data)
    again.train_function = lambda: pytest.fail("compiled a finished run")  # type: ignore[method-assign]
    assert_bitwise_equal(trained(again, tmp_path).params, state.params)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_nothing_is_traced_or_compiled_between_steps(data: Data, tmp_path: Path) -> None:
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name) if name.startswith("/jax/core/compile") else None
    )
    arm = arm_of(data, eval__every=0, checkpoint__every=0)
    seen: list[int] = []
    before_step(arm, lambda i: seen.append(len(events)))
    assert events, "the listener hears no compilation"
    fit(arm, tmp_path)
    assert len(seen) == STEPS
    assert seen[-1] == seen[0], events[seen[0] :]


def test_evaluate_save_step_log_and_metrics_are_fetched_one_step_late(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    arm = arm_of(data, train__steps=6)
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


def poison(arm: Arm, step: int) -> None:
    """Make the loss of the step that starts at count `step` NaN."""
    program = arm.program
    healthy_step, healthy_corrupt = program.train_step, program.corrupt

    def train_step(state: Any, tokens_BxL: jax.Array) -> Any:
        factor = jnp.where(state.step == step, jnp.nan, 1.0)

        def corrupt(tokens_BxL: jax.Array, key: jax.Array) -> Any:
            batch = healthy_corrupt(tokens_BxL, key)
            return batch | {"rows": batch["rows"] | {"weights": batch["rows"]["weights"] * factor}}

        program.corrupt = corrupt  # type: ignore[method-assign]
        try:
            return healthy_step(state, tokens_BxL)
        finally:
            program.corrupt = healthy_corrupt  # type: ignore[method-assign]

    program.train_step = train_step  # type: ignore[method-assign]


def test_a_nan_loss_stops_with_step_loss_and_fix_and_the_checkpoint_survives(
    data: Data, tmp_path: Path
) -> None:
    every_row = {"objective__masked_head": False}  # the masked head drops rows whose weight is NaN
    arm = arm_of(data, **every_row)
    poison(arm, 6)
    with pytest.raises(FloatingPointError) as error:
        fit(arm, tmp_path / "poisoned")
    text = str(error.value)
    assert text.startswith(
        "step 7: loss = nan, gradient norm = nan; the parameters were left as they were."
    )
    assert "Lower train.lr (0.00" in text
    assert "train.nan=skip" in text
    assert rows(tmp_path / "poisoned")[-1]["step"] == 7
    assert math.isnan(rows(tmp_path / "poisoned")[-1]["loss"])
    # What was saved is good: a run without the NaN goes on from it as if nothing had happened.
    with pytest.MonkeyPatch.context() as patch:
        resumed: list[int] = []
        restore = loop.restore_or_init
        patch.setattr(
            loop,
            "restore_or_init",
            lambda *a: (lambda r: (resumed.append(r[0]), r)[1])(restore(*a)),
        )
        state = trained(arm_of(data, **every_row), tmp_path / "poisoned")
    assert resumed == [4]
    clean = trained(arm_of(data, **every_row), tmp_path / "clean")
    assert_bitwise_equal(state.params, clean.params)
    assert rows(tmp_path / "poisoned") == rows(tmp_path / "clean")


def test_a_nan_loss_is_skipped_counted_and_not_counted_again_after_a_resume(
    data: Data, tmp_path: Path
) -> None:
    options = {"objective__masked_head": False, "train__nan": "skip"}
    arm = arm_of(data, **options)
    poison(arm, 6)
    state = trained(arm, tmp_path / "whole")
    assert int(state.skipped) == 1
    assert int(state.step) == STEPS
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))
    assert {r["step"] for r in rows(tmp_path / "whole") if not math.isfinite(r.get("loss", 0))} == {
        7
    }
    assert [
        r["skipped"] for r in rows(tmp_path / "whole") if r["step"] == STEPS and "skipped" in r
    ] == [1]
    for stop in (9, None):
        arm = arm_of(data, **options)
        poison(arm, 6)
        if stop is None:
            fit(arm, tmp_path / "parts")
        else:
            interrupt(arm, stop)
            with pytest.raises(Stopped):
                fit(arm, tmp_path / "parts")
    assert str(rows(tmp_path / "parts")) == str(
        rows(tmp_path / "whole")
    )  # as text, because NaN differs from itself


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_a_step_saves_that_step_and_restores_the_handlers(
    number: int, data: Data, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    arm = arm_of(data)
    interrupt(arm, 5, number)
    with pytest.raises(Stopped, match="stopped after step 5") as stopped:
        fit(arm, tmp_path)
    assert stopped.value.step == 5
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "mdlm-s0")
    step, state, meta = checkpoints.restore(arm.program.specs.abstract_state())
    checkpoints.close()
    assert step == int(state.step) == 5
    assert meta["fit"]["steps"] == STEPS
    assert [r["step"] for r in rows(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5]


def test_a_signal_while_compiling_stops_after_one_step(data: Data, tmp_path: Path) -> None:
    arm = arm_of(data)
    compiled = arm.train_function()
    arm.train_function = lambda: (signal.raise_signal(signal.SIGTERM), compiled)[1]  # type: ignore[method-assign]
    with pytest.raises(Stopped) as stopped:
        fit(arm, tmp_path)
    assert stopped.value.step == 1


def test_a_signal_in_the_last_step_finishes_the_arm_but_not_the_run(
    data: Data, tmp_path: Path, uninterrupted: tuple[list[dict], Any]
) -> None:
    arm = arm_of(data)
    interrupt(arm, STEPS)
    with pytest.raises(Stopped) as stopped:
        fit(arm, tmp_path)
    assert stopped.value.step == STEPS
    assert rows(tmp_path) == uninterrupted[0]
    assert_bitwise_equal(trained(arm_of(data), tmp_path).params, uninterrupted[1])


def test_a_second_signal_interrupts_at_once() -> None:
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background starts without it
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
