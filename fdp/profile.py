"""A profiler trace of some steps of a run, for XProf and Perfetto."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


class StepTrace:
    """Traces the steps `first` to `last`, counted from 1, into `folder`; nothing where `steps` is
    empty. A run that resumes inside them traces the rest."""

    def __init__(self, steps: tuple[int, ...], folder: Path):
        self.first, self.last = steps or (0, 0)
        self.folder = folder
        self._running = False

    @contextlib.contextmanager
    def step(self, number: int, state: Any) -> Iterator[None]:
        """Around the dispatch of step `number`, which takes `state`."""
        if not self.first <= number <= self.last:
            yield
            return
        if not self._running:
            jax.block_until_ready(state)  # else the trace begins with the steps before
            jax.profiler.start_trace(self.folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def stop(self, number: int, result: Any) -> bool:
        """After step `number`, which gives `result`: whether the trace ended here and is on
        disk."""
        if not self._running or number < self.last:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Write what was traced."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
