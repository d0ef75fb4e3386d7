"""Hooks of the loop: their rows are written once, a failing one costs nothing, and a finished arm
leaves nothing on the devices.
"""

import gc
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from build import Toy, toy, toy_program

from fdp.arm import Arm
from fdp.checkpoint import CheckpointError
from fdp.hooks import Hook, HookError
from fdp.loop import Stopped, fit
from fdp.mesh import make_mesh
from fdp.metrics import read_metrics
from fdp.state import TrainState

STEPS = 12


def arm_with(*hooks: Hook) -> Arm:
    return Arm("toy", replace(toy_program().experiment, hooks=hooks), toy_program())


class Looks:
    """Where a hook ran; it returns a number and an array of the state that it saw."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, arm: Arm, step: int, state: TrainState) -> Mapping[str, Any]:
        assert int(state.step) == step
        self.steps.append(step)
        ticks = np.asarray(state.model["blocks"]["ticks"])
        return {"looks/ticks": ticks.mean(), "looks/layers": ticks.mean(-1)}


def looked(workdir: Path) -> dict[int, Any]:
    """Rows of the hook by step; every step once."""
    found = [(r["step"], r) for r in read_metrics(workdir) if "hook/looks" in r]
    assert len(dict(found)) == len(found)
    return {step: (r["looks/ticks"], r["looks/layers"]) for step, r in found}


WANTED = {step: (step, [step, step]) for step in (5, 10, STEPS)}


def test_a_hook_runs_when_due_and_after_the_last_step_once(tmp_path: Path) -> None:
    looks = Looks()
    fit(arm_with(Hook("looks", 5, looks)), tmp_path)
    assert looks.steps == [5, 10, STEPS]
    assert looked(tmp_path) == WANTED
    fit(arm_with(Hook("looks", 5, looks)), tmp_path)
    assert looks.steps == [5, 10, STEPS]


@pytest.mark.parametrize("stop", [5, 7])  # before the hook of that step has run; after
def test_a_resumed_run_has_the_rows_of_its_hooks_once(stop: int, tmp_path: Path) -> None:
    looks = Looks()
    arm = arm_with(Hook("looks", 5, looks))
    run, calls = arm.train_function(), iter(range(1, 100))

    def step(state: Any, examples: Any) -> Any:
        if next(calls) == stop:
            signal.raise_signal(signal.SIGTERM)
        return run(state, examples)

    arm.train_function = lambda: step  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        fit(arm, tmp_path)
    fit(arm_with(Hook("looks", 5, looks)), tmp_path)
    assert looks.steps == [5, 10, STEPS]
    assert looked(tmp_path) == WANTED


@pytest.mark.parametrize("at", [5, STEPS])
def test_a_hook_that_raises_is_named_and_the_run_resumes_from_its_step(
    at: int, tmp_path: Path
) -> None:
    looks, broken = Looks(), True

    def sometimes(arm: Arm, step: int, state: TrainState) -> Mapping[str, Any]:
        if broken and step == at:
            raise KeyError("no such layer")
        return looks(arm, step, state)

    message = rf"hook 'looks' at step {at}: KeyError: 'no such layer'; the state of step {at} is"
    for _ in range(2):  # the second start finds the saved state and fails in the same way
        with pytest.raises(HookError, match=message):
            fit(arm_with(Hook("looks", 5, sometimes)), tmp_path)
    broken = False
    arm = arm_with(Hook("looks", 5, sometimes))
    fit(arm, tmp_path)
    assert looked(tmp_path) == WANTED
    losses = [r["step"] for r in read_metrics(tmp_path) if "loss" in r]
    assert losses == list(range(1, STEPS + 1))
    assert int(arm.trained_on_host.step) == STEPS


def test_an_array_of_changing_shape_is_refused_also_after_a_resume(tmp_path: Path) -> None:
    until = 10

    def growing(arm: Arm, step: int, state: TrainState) -> Mapping[str, Any]:
        return {"looks/list": np.zeros(2 if step < until else 3)}

    message = r"hook 'looks' at step {}: ValueError: metric 'looks/list' has shape \(3,\) and had"
    for step in (10, STEPS):
        until = step
        with pytest.raises(HookError, match=message.format(step)):
            fit(arm_with(Hook("looks", 5, growing)), tmp_path)


def test_a_hook_that_never_runs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hook 'looks': every = 0 steps must be at least 1"):
        Hook("looks", 0, Looks())


def test_model_state_of_another_shape_is_a_clear_error(tmp_path: Path) -> None:
    fit(arm_with(), tmp_path)
    e = toy(model=Toy(hidden=32), dp=2)
    message = (
        r"none of the 3 checkpoints .*: ValueError: model/blocks/.* has shape \(2, 16\) there, "
    )
    message += r"not \(2, 32\)"
    with pytest.raises(CheckpointError, match=message):
        fit(Arm.of("toy", e, make_mesh(e.degrees)), tmp_path)


def device_bytes() -> int:
    """Of everything that lies on the devices, replicas counted."""
    live = jax.live_arrays()
    shards = [np.prod(x.sharding.shard_shape(x.shape)) * len(x.sharding.device_set) for x in live]
    return sum(int(n) * x.dtype.itemsize for n, x in zip(shards, live, strict=True))


def test_two_arms_of_one_run_hold_one_state_at_a_time(tmp_path: Path) -> None:
    """Whoever trains finds on the devices its own state, a few batches, and nothing of the arm
    before it."""
    e = toy(model=Toy(width=64, hidden=256), dp=2)
    first = Arm.of("first", e, make_mesh(e.degrees))
    second = Arm("second", e, first.program)
    state = sum(2 * x.size * x.dtype.itemsize for x in jax.tree.leaves(first.program.specs.shapes))
    one = 3 * state  # parameters and two moments, on two devices
    batches = 4 * 8 * (8 * 3 * 4 + 2) * 4
    gc.collect()  # what earlier tests left would else be freed, and subtracted, at any time
    start = device_bytes()
    seen: list[int] = []  # before every step

    def watched(arm: Arm) -> None:
        run = arm.train_function()

        def step(state: Any, examples: Any) -> Any:
            seen.append(device_bytes() - start)
            return run(state, examples)

        arm.train_function = lambda: step  # type: ignore[method-assign]

    for arm in (first, second):
        watched(arm)
        seen.clear()
        fit(arm, tmp_path)
        assert one <= seen[0] <= one + batches + 8192, arm.name
        assert device_bytes() - start <= 8192, arm.name
