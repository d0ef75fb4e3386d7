"""One arm of a study with one seed: its experiment, its compiled programs, and its trained
state."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fdp import process
from fdp.count import flops
from fdp.count.counts import Unstated
from fdp.data.batches import Data
from fdp.experiment import Experiment
from fdp.state import TrainState
from fdp.step import TrainStep


class Arm:
    """One experiment of a study with one seed. All seeds of an arm share `program`."""

    def __init__(self, name: str, experiment: Experiment, program: TrainStep):
        self.name, self.experiment, self.program = name, experiment, program
        self.seed = experiment.fit.seed
        self._state: TrainState | None = None  # on the host, the key as its data

    @classmethod
    def of(cls, name: str, experiment: Experiment, mesh: Any) -> "Arm":
        """An arm with a train step of its own."""
        return cls(name, experiment, TrainStep(experiment, mesh))

    def with_seed(self, seed: int) -> "Arm":
        """The same arm with another seed; it shares the compiled programs."""
        fit = replace(self.experiment.fit, seed=seed)
        return Arm(self.name, replace(self.experiment, fit=fit), self.program)

    @property
    def mesh(self) -> Any:
        """The mesh of its programs."""
        return self.program.mesh

    @property
    def data(self) -> Data:
        """The data of its experiment."""
        return self.experiment.data

    @property
    def model(self) -> Any:
        """The model of its experiment."""
        return self.experiment.model

    @property
    def objective(self) -> Any:
        """The objective of its experiment."""
        return self.experiment.objective

    @property
    def label(self) -> str:
        """Arm and seed: the name of its checkpoint folder."""
        return f"{self.name}-s{self.seed}"

    @property
    def trained(self) -> TrainState:
        """The trained state, copied to the mesh by every call. It takes device memory as long as it
        is held.

        Raises RuntimeError before `loop.fit` has run."""
        return process.place(self.trained_on_host, self.program.specs.state_shardings())

    @property
    def trained_on_host(self) -> TrainState:
        """The trained state as NumPy arrays, with the random key as a key array.

        Raises RuntimeError before `loop.fit` has run."""
        if self._state is None:
            raise RuntimeError(f"arm {self.label} has not been trained: call fdp.loop.fit first")
        return replace(self._state, key=jax.random.wrap_key_data(self._state.key))

    @property
    def skipped(self) -> tuple[int, int]:
        """Steps that were skipped, and steps in all. Raises RuntimeError before training."""
        state = self.trained_on_host
        return int(state.skipped), int(state.step)

    def keep(self, state: TrainState) -> None:
        """Copy `state` to the host of every process, so that the next arm has the device memory."""
        self._state = jax.tree.map(_host, replace(state, key=jax.random.key_data(state.key)))

    @contextlib.contextmanager
    def reading(self, data: Data) -> Iterator[None]:
        """Within, `data` stand in for those that the arm was built with, whose shapes they must
        have. Raises ValueError where they have not."""
        built = self.experiment
        old, new = built.data.example(), data.example()
        wrong = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if wrong:
            told = (f"{n} {_shape(new.get(n))}, not {_shape(old.get(n))}" for n in wrong)
            raise ValueError(
                f"examples made for {self.label} differ from those that its program was built "
                f"for: {'; '.join(told)}; give both the same fields"
            )
        self.experiment = replace(built, data=data)
        try:
            yield
        finally:
            self.experiment = built

    def step_flops(self) -> int | None:
        """Model FLOPs of one train step on the whole mesh, in the convention of fdp.count.counts.
        None where a layer states no FLOPs."""
        try:
            return flops.train_step(self.program)
        except Unstated:
            return None

    def place(self, batch: Any) -> Any:
        """Put a host batch onto the mesh, sharded by its named dims."""
        return process.place(batch, self.program.batch_shardings())

    def init(self) -> TrainState:
        """A fresh training state."""
        return self.program.init(self.seed)

    def train_function(self) -> Any:
        """The train step compiled for this mesh, once: (state, batch) → (state, metrics)."""
        return self.program.compiled_train_step()

    def eval_function(self) -> Any:
        """The evaluation step: (variables, batch, batch index) → (summed loss, count)."""
        return self.program.jit_eval_step()


def _shape(field: Any) -> str:
    return "absent" if field is None else f"{field.dtype}{list(field.shape[1:])}"


def _host(x: Any) -> Any:
    """A copy that shares no memory with the device arrays, because a step may donate those."""
    return np.array(process.fetch(x))
