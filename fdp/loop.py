"""The training loop of one arm. Fixed order: evaluate → hooks → save → next batch → step → log
(metrics one step late).

A run is a sequence of segments: a program until a step number. One segment is a plain run; several
are a run that changes its mesh or its communication on the way.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fdp import process
from fdp.arm import Arm
from fdp.checkpoint import CheckpointError, Checkpoints
from fdp.data.batches import Prefetcher, batch, eval_batches
from fdp.hooks import Hook, HookError
from fdp.metrics import MetricsWriter, Progress, read_metrics, throughput
from fdp.price.hardware import detect
from fdp.profile import StepTrace
from fdp.signals import StopSignal
from fdp.state import TrainState, all_finite, moved_bytes, remesh
from fdp.workdir import SegmentLog


class Stopped(Exception):
    """Signal `number`, SIGTERM or that of Ctrl-C, arrived; the state of step `step` is saved. 0:
    another process was told."""

    def __init__(self, step: int, number: int = 0):
        super().__init__(f"stopped after step {step}")
        self.step, self.number = step, number or signal.SIGTERM


@dataclass(frozen=True)
class Segment:
    """Steps up to number `until`, excluded, by the program of `arm`. All segments of a run hold the
    same parameters; meshes, ZeRO stages and communication may differ. `inputs`: what the step and
    the evaluation take besides state and batch (layer inputs)."""

    until: int
    arm: Arm
    inputs: tuple[Any, ...] = ()


# The segment that begins at a step, given the state there. After a restart it is asked at the step
# of the checkpoint, so what it answers may depend on nothing but its arguments.
Segments = Callable[[int, TrainState], Segment]


class _Log:
    """Reads the metrics of a step after the next step has been dispatched, so that the device never
    waits for the host."""

    def __init__(self, arm: Arm, writer: MetricsWriter, progress: Progress, skipped: int):
        self.arm, self.writer, self.progress = arm, writer, progress
        self.fit = arm.experiment.fit
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.window = (time.perf_counter(), -1)
        self.tokens, self.flops = self.fit.batch * (arm.data.seq_len or 1), arm.step_flops()
        chip = detect(jax.devices()[0])
        self.peak = chip.peak_bf16_flops * arm.mesh.size if chip else None
        self.skipped = skipped
        self.speed: dict[str, float] = {}

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
        values = {k: v if v.ndim else float(v) for k, v in process.fetch(metrics).items()}
        if values["skipped"] > self.skipped:
            self._non_finite(step, values)
        every = self.fit.log_every
        if (step + 1) % every == 0 or step + 1 == self.fit.steps:
            now, (then, last) = time.perf_counter(), self.window
            seconds = (now - then) / max(step - last, 1)
            self.speed = throughput(self.tokens, seconds, self.flops, self.peak)
            self.writer.write(step + 1, values | self.speed)
            self.window = (now, step)
        self.progress.update(step + 1, self._told(values))

    def _told(self, values: dict[str, Any]) -> str:
        """The progress line: loss, learning rate, and the speed of the last window."""
        told = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.3g}"]
        if self.speed:
            unit = "tokens" if self.arm.data.seq_len else "examples"
            told.append(f"{tqdm.format_sizeof(self.speed['tokens_per_s'])} {unit}/s")
        if "mfu" in self.speed:
            told.append(f"MFU {100 * self.speed['mfu']:.0f} %")
        return ", ".join(told)

    def _non_finite(self, step: int, values: dict[str, Any]) -> None:
        self.skipped = int(values["skipped"])
        row = {name: values[name] for name in ("loss", "grad_norm", "skipped")}
        self.writer.write(step + 1, row)
        if self.fit.nan == "stop":
            raise FloatingPointError(
                f"step {step + 1}: loss = {values['loss']}, gradient norm = {values['grad_norm']}; "
                f"{_culprit(values)}the parameters were left as they were. "
                f"Lower train.lr ({values['lr']:.3g} here), raise train.warmup, or set "
                "train.nan=skip to drop such steps; a batch whose weights are all 0 has no loss"
            )


def _culprit(values: dict[str, Any]) -> str:
    """The first layer that counted values which are not finite, in words."""
    counted = {n: np.atleast_1d(v) for n, v in values.items() if n.endswith("/nonfinite")}
    first = {n: int(np.flatnonzero(v)[0]) for n, v in counted.items() if v.any()}
    if not first:
        return ""
    name = min(first, key=lambda n: first[n])
    router = f"{name.removesuffix('/nonfinite')} of period {first[name]}"
    return f"the first router logits that are not finite are those of {router}; "


def evaluate(arm: Arm, state: TrainState, *inputs_N: Any) -> float:
    """Mean validation loss over the first eval.batches batches under fixed noise: Σ loss / Σ count,
    in nats per token for tokens.

    `inputs_N`: layer inputs, for a program that takes some. Raises FloatingPointError where Σ count
    is 0."""
    step, fit, variables = arm.eval_function(), arm.experiment.fit, state.variables
    sums = []
    for i, host in enumerate(eval_batches(arm.data.val, fit.batch, fit.eval_batches)):
        # Waiting for each bounds the queue of multi-device programs on virtual devices.
        sums.append(process.fetch(step(variables, arm.place(host), np.int32(i), *inputs_N)))
    total, count = (sum(float(x[i]) for x in sums) for i in range(2))
    if not count > 0:
        raise FloatingPointError(
            f"{arm.data.val.what}: the counts of {len(sums)} batches are {count:g} in sum: Σ loss "
            "/ Σ count has no value. Give examples whose weights are not all 0, or raise "
            "eval.batches"
        )
    return total / count


def steps(
    segment: Segment, start: int, state: TrainState, trace: StepTrace | None = None
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """(step, state after it, metrics) of the steps from `start` on. `state` must lie on the
    segment's mesh (`fdp.state.remesh`) and is donated.

    A step that would send something to the devices is refused (TypeError, JaxRuntimeError):
    everything that it takes lies there before."""
    arm, fit = segment.arm, segment.arm.experiment.fit
    train_step = arm.train_function()

    def draw(step: int) -> Any:
        return batch(arm.data.train, step, fit.batch, fit.seed)

    with Prefetcher(draw, arm.place, start) as batches:
        for step in range(start, segment.until):
            ready = next(batches)
            traced = trace.step(step + 1, state) if trace else contextlib.nullcontext()
            with traced, jax.transfer_guard("disallow"):
                state, metrics = train_step(state, ready, *segment.inputs)
            yield step, state, metrics


def restore_or_init(arm: Arm, checkpoints: Checkpoints) -> tuple[int, TrainState]:
    """The state of the newest readable checkpoint, whatever mesh wrote it, or else a fresh state.
    Raises CheckpointError for the state of another step."""
    found = checkpoints.restore(arm.program.specs.abstract_state(), arm.init)
    if found is None:
        return 0, arm.init()
    step, state, _ = found
    if int(state.step) != step:  # of a version whose checkpoints did not know their step
        raise CheckpointError(
            f"{checkpoints.directory / str(step)} holds the state of step {int(state.step)}: "
            "rename the folder back"
        )
    return step, state


def fit(
    arm: Arm, workdir: Path, segments: Segments | None = None, ledger: SegmentLog | None = None
) -> None:
    """Train `arm` to its last step, resuming from the workdir; the final state is kept on the host.
    `segments`: by default one, of the arm's own program. `ledger`: is told what trains from which
    step on, and every checkpoint holds its record.

    Raises Stopped after a signal, FloatingPointError on a non-finite loss or state, HookError for a
    hook that fails, CheckpointError when saving fails or the arm was trained further than asked.
    """
    run = _Run(arm, workdir, segments or _whole(arm), ledger)
    with StopSignal() as stop:  # from here on: compiling can take minutes, and a signal then must
        # not kill
        try:
            state = run.train(stop)
            arm.keep(state)
        finally:
            run.close()
        if process.agree(stop.requested):
            raise Stopped(arm.experiment.fit.steps, stop.number)


def _whole(arm: Arm) -> Segments:
    def one(step: int, state: TrainState) -> Segment:
        return Segment(arm.experiment.fit.steps, arm)

    return one


class _Run:
    """Training of one arm, from the state in the workdir to the last step. `now` is the running
    segment."""

    def __init__(self, arm: Arm, workdir: Path, segments: Segments, ledger: SegmentLog | None):
        self.segments, self.now, self.ledger = segments, Segment(0, arm), ledger
        self.arm, self.fit, self.started = arm, arm.experiment.fit, time.perf_counter()
        folder = workdir / "checkpoints" / arm.label
        self.checkpoints = Checkpoints(folder, keep=self.fit.keep)
        self.writer = MetricsWriter(workdir, arm.name, arm.seed)
        self.trace = StepTrace(self.fit.profile, workdir / "profile" / arm.label)
        self.start = 0

    def close(self) -> None:
        """Finish writing. What cannot be written costs nothing that can."""
        with contextlib.ExitStack() as closing:
            closing.callback(self.checkpoints.close)
            closing.callback(self.writer.close)
            closing.callback(self.trace.close)

    def train(self, stop: StopSignal) -> TrainState:
        """The state after the last step."""
        self.start, state = restore_or_init(self.arm, self.checkpoints)
        if self.start > self.fit.steps:
            raise CheckpointError(
                f"{self.checkpoints.directory} holds step {self.start}, and train.steps="
                f"{self.fit.steps} asks for fewer: its state would be reported as that of an "
                f"earlier step. Set train.steps={self.start} or choose another --workdir"
            )
        if self.ledger and self.start < self.fit.steps:
            self.ledger.begin(self.arm.label, self.start, self.arm.mesh.shape)
        if self.start < self.fit.steps and self.arm.data.awaits:
            raise ValueError(
                f"{self.arm.label} learns from {', '.join(self.arm.data.awaits)}, and its examples "
                "were not made: train it by fdp.run, or within `arm.reading(data)`"
            )
        self.writer.resume(self.start)
        if self.start:
            print(f"{self.arm.label}: resumed at step {self.start} of {self.fit.steps}")
        self._catch_up(state)
        if self.start < self.fit.steps:
            state = self._steps(state, stop)
        return state

    def _evaluate(self, state: TrainState) -> float:
        return evaluate(self.now.arm, state, *self.now.inputs)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0 and step > self.start

    def _catch_up(self, state: TrainState) -> None:
        """Evaluate and run hooks at the first step if they are due there. A signal or a failing
        hook saves the state before the rows of that step are written."""
        step, last = self.start, self.start == self.fit.steps

        def due(every: int, name: str) -> bool:
            then = last or (every > 0 and step % every == 0)
            if not (step > 0 and then):
                return False
            return process.decided(lambda: not self._has_row(step, name))

        # A finished arm gets no examples of another one again.
        if due(self.fit.eval_every, "val_loss") and not self.arm.data.awaits:
            self.writer.write(step, {"val_loss": self._evaluate(state)})
        for hook in self.arm.experiment.hooks:
            if due(hook.every, f"hook/{hook.name}"):
                self._run_hook(hook, step, state)

    def _has_row(self, step: int, name: str) -> bool:
        me = (self.arm.name, self.arm.seed, step)
        rows = read_metrics(self.writer.workdir)
        return any((r["arm"], r["seed"], r["step"]) == me and name in r for r in rows)

    def _run_hook(self, hook: Hook, step: int, state: TrainState) -> None:
        try:
            found = hook.run(self.now.arm, step, state)
            self.writer.write(step, {f"hook/{hook.name}": 1} | dict(found))
        except Exception as error:
            process.agree(True)  # all processes save, or none
            raise self._failed(hook, step, state, f"{type(error).__name__}: {error}") from error
        if process.agree(False):
            raise self._failed(hook, step, state, "it failed in another process")

    def _failed(self, hook: Hook, step: int, state: TrainState, why: str) -> HookError:
        """Save the state that the hook was given."""
        if step != self.checkpoints.latest_step():  # else this start resumed from it
            self._save(step, state)
            self.checkpoints.wait()
        return HookError(
            f"hook {hook.name!r} at step {step}: {why}; the state of step {step} is saved"
        )

    def _save(self, step: int, state: TrainState) -> None:
        if not all_finite(state):
            raise FloatingPointError(
                f"step {step}: loss and gradients were finite, and parameters or moments of the "
                "optimizer are not: the state was not saved. Lower train.lr, or look at the "
                "optimizer and the rules of the model state"
            )
        meta: dict[str, Any] = {"mesh": dict(self.now.arm.mesh.shape), "fit": vars(self.fit)}
        meta["devices"] = str(self.arm.mesh.devices.flat[0].device_kind)
        if self.ledger:
            meta["run"] = self.ledger.record
        self.checkpoints.save(step, state, meta)

    def _between_steps(self, step: int, state: TrainState, log: _Log) -> None:
        """Evaluation, hooks and checkpoint, where they are due before step number `step`."""
        hooks = [h for h in self.arm.experiment.hooks if self._due(step, h.every)]
        evaluates = self._due(step, self.fit.eval_every)
        saves = self._due(step, self.fit.checkpoint_every)
        if evaluates or saves or hooks:
            # A checkpoint of step t promises the rows up to t; all wait for the device anyway.
            log.flush()
        if evaluates:
            self.writer.write(step, {"val_loss": self._evaluate(state)})
        for hook in hooks:
            self._run_hook(hook, step, state)
        if saves:
            self._save(step, state)

    def _enter(self, step: int, state: TrainState, progress: Progress) -> TrainState:
        """Begin the segment at `step`; the state, on its mesh."""
        self.now = self.segments(step, state)
        if not step < self.now.until <= self.fit.steps:
            raise ValueError(
                f"the segment at step {step} ends at {self.now.until}: step < until ≤ "
                f"train.steps = {self.fit.steps}"
            )
        specs = self.now.arm.program.specs
        if moved := moved_bytes(state, specs):
            progress.note(f"step {step}: {moved:,} bytes of state go to {specs.mesh.size} devices")
        return remesh(state, specs)

    def _steps(self, state: TrainState, stop: StopSignal) -> TrainState:
        total, step = self.fit.steps, self.start
        progress = Progress(total, self.start, self.arm.label)
        log = _Log(self.arm, self.writer, progress, int(state.skipped))
        with progress:
            while step < total:
                state = self._enter(step, state, progress)
                for step, state, metrics in steps(self.now, step, state, self.trace):  # noqa: B020
                    self._after_step(step, state, metrics, log, progress, stop)
                step += 1
            log.flush()
            self._finish(state, progress)
        return state

    def _after_step(
        self, step: int, state: TrainState, metrics: Any, log: _Log, progress: Progress, stop: Any
    ) -> None:
        if step == self.start:
            jax.block_until_ready(metrics)
            progress.note(f"first step after {time.perf_counter() - self.started:.1f} s")
            log.window = (time.perf_counter(), step)
        log.push(step, metrics)
        if self.trace.stop(step + 1, metrics):
            progress.note(f"profile in {self.trace.folder}: open it in XProf or Perfetto")
            log.window = (time.perf_counter(), step)  # writing it is no part of a step
        if step + 1 == self.fit.steps:
            return
        if process.stopping(self.arm.label, step + 1, stop.requested):
            log.flush()
            self._save(step + 1, state)
            self.checkpoints.wait()
            raise Stopped(step + 1, stop.number)
        self._between_steps(step + 1, state, log)

    def _finish(self, state: TrainState, progress: Progress) -> None:
        total, loss = self.fit.steps, self._evaluate(state)
        self.writer.write(total, {"val_loss": loss})
        for hook in self.arm.experiment.hooks:
            self._run_hook(hook, total, state)
        self._save(total, state)  # last: a run found complete has all its rows
        unit = f" nats/token ({loss / math.log(2):.3f} bits)" if self.arm.data.seq_len else ""
        progress.note(f"validation loss {loss:.4f}{unit}")
