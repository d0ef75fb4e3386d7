"""A trained model trains on with sparse attention: in every window its masks are measured again,
each layer's plan is chosen again, and the one compiled step is given the new plans and lists as
data.

Legend: B sequences, S positions, N layers, W blocks of a sequence.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fdp import loop, process
from fdp.arm import Arm
from fdp.count.compare import Comparison
from fdp.models.transformer import with_core
from fdp.parallel.context.cores import Listed
from fdp.parallel.context.layouts import ZIGZAG
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner_hysteresis import Scheduler
from fdp.parallel.context.planner_machine import INFINIBAND, machine
from fdp.parallel.context.planner_price import Price
from fdp.parallel.context.planner_problem import Masks, Problem
from fdp.parallel.context.planner_uniform import best_uniform
from fdp.parallel.context.profile import TAU, block_masks, profile
from fdp.sharding import shardings
from fdp.state import TrainState
from fdp.study import context_switching as switching
from fdp.study.context_exactness import DEVICES
from fdp.topics.adaptive_cp.measured import Measured, share
from fdp.topics.adaptive_cp.settings import BLOCKS


@dataclass(frozen=True)
class Window:
    """Plans that ran, share of the causal blocks on each layer's lists, wire bytes of attention a
    step and device (the planner's count), and those of the best uniform plan with lists on the same
    masks."""

    plans: tuple[CommPlan, ...]
    share_N: np.ndarray
    bytes: float
    uniform: float


@dataclass(frozen=True)
class Adapted:
    """Validation loss after the windows, and that of dense attention after the same batches."""

    windows: list[Window]
    steps: int
    loss: float
    dense_loss: float

    @property
    def switches(self) -> int:
        """Windows that ran other plans than the one before."""
        return sum(a.plans != b.plans for a, b in zip(self.windows, self.windows[1:], strict=False))


def branches(heads: int, blocks: int) -> tuple[CommPlan, ...]:
    """What the step compiles: gathers of 1, 2, 4, … blocks a pair of devices, less than a device
    holds, Ulysses where heads allow it, and all-gather."""
    held = blocks // DEVICES
    sizes = [2**i for i in range((held - 1).bit_length())]
    gathers = [CommPlan("gather", capacity=size, layout=ZIGZAG) for size in sizes]
    return (*gathers, *(switching.WHOLE if heads % DEVICES == 0 else switching.WHOLE[1:]))


def adapt(arm: Arm, found: Measured, sequences: int, windows: int, steps: int) -> Adapted:
    """`windows` of `steps` train steps each, after the trained state, beside the same steps with
    dense attention.

    Masks are measured on the first `sequences` of the validation split, at the coverage of `found`.
    The plans minimise bytes, with the hysteresis of `Scheduler`. The arm's own state stays as it
    is."""
    fit, block = arm.experiment.fit, arm.experiment.input_length // BLOCKS
    probe_BxS = arm.data.val.take(range(sequences))["tokens"]
    plans = branches(arm.model.shape.heads, BLOCKS)
    model = with_core(arm.model, Listed(plans, block))
    program = switching.program_over_cp(arm, fit.batch, model, switching.CHOICE)
    other = Arm(arm.name, program.experiment, program)  # its programs take any plans and lists
    state = process.place(arm.trained_on_host, program.specs.state_shardings())
    dense, scheduler, ran = arm.trained, Scheduler(plans, windows=2), []
    for start in range(fit.steps, fit.steps + windows * steps, steps):
        variables = process.fetch(state.variables)
        mass_NxWxW = profile(arm.model, arm.objective, variables, probe_BxS, block, TAU).mass_NxWxW
        masks = block_masks(mass_NxWxW, found.coverage)
        problem = _problem(arm, masks)
        numbers = scheduler.observe(problem)
        ran.append(_window(problem, plans, numbers, masks))
        choice: Any = (numbers, switching.place_ids(masks, block, BLOCKS))
        choice = process.place(choice, shardings(program.mesh, switching.CHOICE))
        state = _train(loop.Segment(start + steps, other, (choice,)), start, state)
        dense = _train(loop.Segment(start + steps, arm), start, dense)
    return Adapted(
        ran, windows * steps, loop.evaluate(other, state, choice), loop.evaluate(arm, dense)
    )


def _train(segment: loop.Segment, start: int, state: TrainState) -> TrainState:
    """The state after a segment."""
    for done in loop.steps(segment, start, state):
        _, state, _ = jax.block_until_ready(done)  # bounds the queue of programs on virtual devices
    return state


def _problem(arm: Arm, masks_NxWxW: np.ndarray) -> Problem:
    """The arm's own attention over DEVICES, planned for bytes."""
    shape, on = switching.shape_of(arm, arm.experiment.fit.batch), machine(INFINIBAND)
    return Problem(Masks(masks_NxWxW), shape, on, objective="bytes", layouts=(ZIGZAG,))


def _window(
    problem: Problem, plans: tuple[CommPlan, ...], numbers: np.ndarray, masks_NxWxW: np.ndarray
) -> Window:
    chosen = tuple(plans[n] for n in numbers)
    prices = [problem.price(i, plan) for i, plan in enumerate(chosen)]
    # The scheduler runs no plan without a price.
    wire = sum(found.wire for found in prices if isinstance(found, Price))
    return Window(chosen, share(masks_NxWxW), wire, best_uniform(problem, plans).bytes)


def switch_listed(arm: Arm, found: Measured) -> tuple[switching.Switching, Comparison]:
    """The measured masks as data of one program, and plans that are constants of another."""
    return switching.switch_listed(arm, found.masks_NxWxW)
