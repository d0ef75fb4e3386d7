"""A trained model trains on with sparse attention: in every window its masks are measured again,
each layer's plan is chosen again, and the one compiled step is given the new plans and lists as
data.

Legend: N layers, W blocks of a sequence.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fdp.arm import Arm
from fdp.data.batches import batch
from fdp.loop import evaluate
from fdp.models.transformer import with_core
from fdp.parallel.context import layouts
from fdp.parallel.context.plan import CommPlan
from fdp.sharding import shardings
from fdp.topics.adaptive_cp import baselines, checks
from fdp.topics.adaptive_cp import predict as simulate
from fdp.topics.adaptive_cp.cores import Listed
from fdp.topics.adaptive_cp.hysteresis import Scheduler
from fdp.topics.adaptive_cp.price import Price
from fdp.topics.adaptive_cp.problem import Masks, Problem
from fdp.topics.adaptive_cp.profile import TAU, block_masks, profile

LAYOUT = layouts.ZIGZAG


@dataclass(frozen=True)
class Window:
    """Plans that ran, share of the causal blocks on each layer's lists, wire bytes of attention a
    step and device (the planner's count), and those of the best uniform plan with lists on the same
    masks."""

    plans: tuple[CommPlan, ...]
    share_N: np.ndarray
    bytes: float
    uniform: float

    def plain(self) -> dict[str, Any]:
        """For a file."""
        plans = [baselines.describe(plan) for plan in self.plans]
        return {"plans": plans, "share": self.share_N, "bytes": self.bytes, "uniform": self.uniform}


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
    held = blocks // checks.DEVICES
    plans = [
        CommPlan("gather", capacity=2**i, layout=LAYOUT) for i in range((held - 1).bit_length())
    ]
    if heads % checks.DEVICES == 0:
        plans.append(CommPlan("ulysses", checks.DEVICES, layout=LAYOUT))
    return (*plans, CommPlan("all_gather", layout=LAYOUT))


def adapt(
    arm: Arm, probe_BxS: np.ndarray, blocks: int, coverage: float, windows: int, steps: int
) -> Adapted:
    """`windows` of `steps` train steps each, after the trained state, beside the same steps with
    dense attention.

    probe_BxS: held-out sequences from which masks of `coverage` are measured. The plans minimise
    bytes, with the hysteresis of `Scheduler`. The arm's own state stays as it is."""
    fit, block = arm.experiment.fit, block_of(probe_BxS.shape[1], blocks)
    plans = branches(arm.model.shape.heads, blocks)
    model = with_core(arm.model, Listed(plans, block))
    program = checks.program_over_cp(arm, fit.batch, model, checks.CHOICE)
    other = Arm(arm.name, program.experiment, program)
    # One program each: it takes any plans and lists of these shapes.
    step, dense_step = program.jit_train_step(), arm.train_function()
    state = jax.device_put(arm.trained_on_host, program.specs.state_shardings())
    dense, scheduler, ran = arm.trained, Scheduler(plans, windows=2), []
    for window in range(windows):
        variables = jax.device_get(state.variables)
        masks = block_masks(profile(arm, variables, probe_BxS, block, TAU).mass_NxWxW, coverage)
        problem = _problem(arm, masks)
        numbers = scheduler.observe(problem)
        choice: Any = (numbers, checks.place_ids(masks, block, LAYOUT, blocks))
        choice = jax.device_put(choice, shardings(program.mesh, checks.CHOICE))
        ran.append(_window(problem, plans, numbers, masks))
        for i in range(fit.steps + window * steps, fit.steps + (window + 1) * steps):
            host = batch(arm.data.train, i, fit.batch, arm.seed)
            state, _ = jax.block_until_ready(step(state, other.place(host), choice))
            dense, _ = jax.block_until_ready(dense_step(dense, arm.place(host)))
    return Adapted(ran, windows * steps, evaluate(other, state, choice), evaluate(arm, dense))


def block_of(length: int, blocks: int) -> int:
    """Positions of a block. Raises ValueError when the sequence is not whole blocks, or devices do
    not share them.
    """
    if length % blocks or blocks % (2 * checks.DEVICES):
        raise ValueError(
            f"data.seq_len = {length} must be a multiple of {blocks} blocks, and they of 2·cp = "
            f"{2 * checks.DEVICES}"
        )
    return length // blocks


def _problem(arm: Arm, masks_NxWxW: np.ndarray) -> Problem:
    """The arm's own attention over DEVICES, planned for bytes."""
    shape = checks.shape_of(arm, arm.experiment.fit.batch, arm.experiment.input_length)
    on = simulate.machine(simulate.INFINIBAND)
    return Problem(Masks(masks_NxWxW), shape, on, objective="bytes", layouts=(LAYOUT,))


def _window(
    problem: Problem, plans: tuple[CommPlan, ...], numbers: np.ndarray, masks: np.ndarray
) -> Window:
    W = masks.shape[-1]
    chosen = tuple(plans[n] for n in numbers)
    prices = [problem.price(i, plan) for i, plan in enumerate(chosen)]
    wire = sum(
        found.wire for found in prices if isinstance(found, Price)
    )  # the scheduler runs no other
    uniform = baselines.best_uniform(problem, plans).bytes
    return Window(chosen, masks.sum((1, 2)) / (W * (W + 1) / 2), wire, uniform)
