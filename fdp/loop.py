"""The training loop of one arm. Fixed order: evaluate → save → next batch → step → log (metrics one
step late).
"""

import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from fdp.arm import Arm
from fdp.checkpoint import Checkpoints
from fdp.config import flatten
from fdp.cost.hardware import detect
from fdp.data.batches import Prefetcher, batch, eval_batches
from fdp.metrics import MetricsWriter, Progress, read_metrics, throughput
from fdp.state import TrainState


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived; the state of step `step` has been saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads between steps; a second one
    interrupts.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for n, handler in self._previous.items():
            signal.signal(n, handler)

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Log:
    """Fetches the metrics of a step after the next one has been dispatched, so the device never
    waits for the host.
    """

    def __init__(self, arm: Arm, writer: MetricsWriter, progress: Progress, skipped: int):
        self.arm, self.writer, self.progress = arm, writer, progress
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.window = (time.perf_counter(), -1)
        c = arm.c
        self.tokens, self.flops = c.train.batch * c.data.seq_len, arm.step_flops()
        chip = detect(jax.devices()[0])
        self.peak = chip.peak_bf16_flops * arm.mesh.size if chip else None
        self.skipped = skipped

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self.pending = (step, metrics)

    def flush(self) -> None:
        """Read the pending metrics; raises FloatingPointError on a non-finite loss under
        train.nan=stop.
        """
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if values["skipped"] > self.skipped:
            self._non_finite(step, values)
        self.progress.update(step + 1, loss=values["loss"])
        every = self.arm.c.log.every
        if (step + 1) % every == 0 or step + 1 == self.arm.c.train.steps:
            now, (then, last) = time.perf_counter(), self.window
            speed = throughput(
                self.tokens, (now - then) / max(step - last, 1), self.flops, self.peak
            )
            self.writer.write(step + 1, values | speed)
            self.window = (now, step)

    def _non_finite(self, step: int, values: dict[str, float]) -> None:
        self.skipped = int(values["skipped"])
        row = {
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "skipped": values["skipped"],
        }
        self.writer.write(step + 1, row)
        if self.arm.c.train.nan == "stop":
            raise FloatingPointError(
                f"step {step + 1}: loss = {values['loss']}, gradient norm = {values['grad_norm']}; "
                "the parameters were "
                f"left as they were. Lower train.lr ({self.arm.c.train.lr}), raise train.warmup, "
                "or set "
                "train.nan=skip to drop such steps"
            )


def evaluate(arm: Arm, state: TrainState) -> float:
    """Mean validation loss in nats per token over the first eval.batches batches, under fixed
    noise.
    """
    step = arm.eval_function()
    losses = []
    for i, tokens_BxL in enumerate(
        eval_batches(arm.data.val, arm.c.train.batch, arm.c.eval.batches)
    ):
        losses.append(step(state.params, arm.place(tokens_BxL), np.int32(i)))
        jax.block_until_ready(
            losses[-1]
        )  # bounds the queue of multi-device programs on virtual devices
    return float(np.mean([float(x) for x in losses]))


def restore_or_init(arm: Arm, checkpoints: Checkpoints) -> tuple[int, TrainState]:
    """The newest readable checkpoint on this mesh, whatever mesh wrote it, or a fresh state."""
    found = checkpoints.restore(arm.program.layout.abstract_state())
    if found is None:
        return 0, arm.init()
    step, state, _ = found
    return step, state


def _meta(arm: Arm) -> dict[str, Any]:
    return {
        "config": flatten(arm.c),
        "mesh": dict(arm.mesh.shape),
        "devices": str(arm.mesh.devices.flat[0].device_kind),
    }


def fit(arm: Arm, workdir: Path) -> TrainState:
    """Train `arm` to train.steps, resuming from the workdir; returns the final state (also stored
    as arm.state).

    Raises Stopped after a signal, FloatingPointError on a non-finite loss, CheckpointError when
    saving fails."""
    c = arm.c
    started = time.perf_counter()
    checkpoints = Checkpoints(workdir / "checkpoints" / arm.label, keep=c.checkpoint.keep)
    writer = MetricsWriter(workdir, arm.name, c.seeds[0])
    with (
        StopSignal() as stop
    ):  # from here on: compiling can take minutes, and a signal then must not kill
        try:
            start, state = restore_or_init(arm, checkpoints)
            writer.resume(start)
            if start:
                print(f"{arm.label}: resumed at step {start} of {c.train.steps}")
            if start < c.train.steps:
                _catch_up(arm, state, start, writer)
                state = _run(arm, state, start, checkpoints, writer, started, stop)
            arm.state = state
        finally:
            writer.close()
            checkpoints.close()
        if stop.requested:
            raise Stopped(c.train.steps)
    return state


def _catch_up(arm: Arm, state: TrainState, start: int, writer: MetricsWriter) -> None:
    """Evaluate at `start` where that was due: a signal saves the state of any step, before its
    evaluation.
    """
    every, me = arm.c.eval.every, (arm.name, arm.c.seeds[0], start)
    if start and every and start % every == 0:
        rows = read_metrics(writer.workdir)
        if not any((r["arm"], r["seed"], r["step"]) == me and "val_loss" in r for r in rows):
            writer.write(start, {"val_loss": evaluate(arm, state)})


def _run(
    arm: Arm,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    started: float,
    stop: StopSignal,
) -> TrainState:
    c, total = arm.c, arm.c.train.steps
    train_step = arm.train_function()
    draw = lambda step: batch(arm.data.train, step, c.train.batch, c.seeds[0])
    progress = Progress(total, start, arm.label)
    log = _Log(arm, writer, progress, int(state.skipped))
    due = lambda step, every: every > 0 and step % every == 0 and step > start
    with Prefetcher(draw, arm.place, start) as batches, progress:
        for step in range(start, total):
            if due(step, c.eval.every) or due(step, c.checkpoint.every):
                # a checkpoint of step t promises the rows up to t; both wait for the device anyway
                log.flush()
            if due(step, c.eval.every):
                writer.write(step, {"val_loss": evaluate(arm, state)})
            if due(step, c.checkpoint.every):
                checkpoints.save(step, state, _meta(arm))
            state, metrics = train_step(state, next(batches))
            if step == start:
                jax.block_until_ready(metrics)
                progress.note(f"first step after {time.perf_counter() - started:.1f} s")
                log.window = (time.perf_counter(), step)
            log.push(step, metrics)
            if stop.requested and step + 1 < total:
                log.flush()
                checkpoints.save(step + 1, state, _meta(arm))
                checkpoints.wait()
                raise Stopped(step + 1)
        log.flush()
        val_loss = evaluate(arm, state)
        writer.write(total, {"val_loss": val_loss})
        checkpoints.save(total, state, _meta(arm))  # last: a run found complete has all its rows
        progress.note(
            f"validation loss {val_loss:.4f} nats/token ({val_loss / math.log(2):.3f} bits)"
        )
    return state
