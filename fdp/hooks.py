"""Hooks of the training loop: what a study wants to see of a state while it is there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fdp.state import TrainState

if TYPE_CHECKING:
    from fdp.arm import Arm


@dataclass(frozen=True)
class Hook:
    """`run(arm, step, state)` before the step of that number, every `every` steps and after the
    last; step 0 is left out.

    What it returns, numbers and arrays by name, becomes a row of metrics.jsonl, so that a resumed
    run does not measure it again. It must leave the state as it is.
    """

    name: str
    every: int
    run: Callable[["Arm", int, TrainState], Mapping[str, Any]]

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"hook {self.name!r}: every = {self.every} steps must be at least 1")


class HookError(RuntimeError):
    """A hook failed; the state before the step has been saved."""
