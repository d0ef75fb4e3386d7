"""Hooks of the training loop: measurements of a state while it is being trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fdp.state import TrainState

if TYPE_CHECKING:
    from fdp.arm import Arm


@dataclass(frozen=True)
class Hook:
    """`run(arm, step, state)` is called before step number `step`, every `every` steps and after
    the last step, but not at step 0.

    The numbers and arrays that it returns, by name, become a row of metrics.jsonl, so a resumed run
    does not measure them again. It must not change the state.
    Every process runs it, and what lies in several processes is read by `fdp.process.fetch`."""

    name: str
    every: int
    run: Callable[["Arm", int, TrainState], Mapping[str, Any]]

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"hook {self.name!r}: every = {self.every} steps must be at least 1")


class HookError(RuntimeError):
    """A hook failed; the state before the step has been saved."""
