"""A trained model trains on with sparse attention: in every window its masks are measured again,
each layer's plan is chosen again, and the one compiled step is given the new plans and lists as
data.

Legend: N layers, W blocks of a sequence.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdp.arm import Arm
from fdp.data.batches import batch, eval_batches
from fdp.loop import evaluate
from fdp.parallel import layouts
from fdp.parallel.context import CommPlan
from fdp.sharding import shardings
from fdp.step import tokens_sharding
from fdp.topics.adaptive_cp import baselines, checks, simulate
from fdp.topics.adaptive_cp.mixers import listed
from fdp.topics.adaptive_cp.price import Price
from fdp.topics.adaptive_cp.problem import Masks, Problem
from fdp.topics.adaptive_cp.profile import block_masks, profile
from fdp.topics.adaptive_cp.schedule import Scheduler

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


def branches(c: Any, blocks: int) -> tuple[CommPlan, ...]:
    """What the step compiles: gathers of 1, 2, 4, … blocks a pair of devices, less than a device
    holds, Ulysses where heads allow it, and all-gather."""
    held = blocks // checks.DEVICES
    plans = [
        CommPlan("gather", capacity=2**i, layout=LAYOUT) for i in range((held - 1).bit_length())
    ]
    if c.model.heads % checks.DEVICES == 0:
        plans.append(CommPlan("ulysses", checks.DEVICES, layout=LAYOUT))
    return (*plans, CommPlan("all_gather", layout=LAYOUT))


def adapt(
    arm: Arm, probe_BxS: np.ndarray, blocks: int, coverage: float, windows: int, steps: int
) -> Adapted:
    """`windows` of `steps` train steps each, after the trained state, beside the same steps with
    dense attention.

    probe_BxS: held-out sequences from which masks of `coverage` are measured. The plans minimise
    bytes, with the hysteresis of `Scheduler`. The arm's own state stays as it is."""
    c, block = arm.c, block_of(arm, blocks)
    plans = branches(c, blocks)
    program = checks.program_over_cp(
        arm, c.train.batch, listed(plans, block), LAYOUT, checks.CHOICE
    )
    place = lambda choice: jax.device_put(choice, shardings(program.mesh, checks.CHOICE))
    state = jax.device_put(jax.device_get(arm.trained), program.layout.state_shardings())
    dense, step = jax.tree.map(jnp.copy, arm.trained), None
    scheduler, done, ran = Scheduler(plans, windows=2), c.train.steps, []
    for _ in range(windows):
        mass = profile(arm, jax.device_get(state.params), probe_BxS, block, 0.95).mass_NxWxW
        masks = block_masks(mass, coverage)
        problem = _problem(arm, masks)
        numbers = scheduler.observe(problem)
        choice = place((numbers, checks.place_ids(masks, block, LAYOUT, blocks)))
        ran.append(_window(problem, plans, numbers, masks))
        for _ in range(steps):
            host = batch(arm.data.train, done, c.train.batch, c.seeds[0])
            tokens = jax.device_put(host, tokens_sharding(program.mesh))
            if (
                step is None
            ):  # compiled once: it takes any plans and lists of these shapes, and nothing else
                step = program.jit_train_step().lower(state, tokens, choice).compile()
            state, _ = jax.block_until_ready(step(state, tokens, choice))
            dense, _ = jax.block_until_ready(arm.train_function()(dense, arm.place(host)))
            done += 1
    loss = jax.jit(program.eval_step)
    found = [
        float(loss(state.params, tokens, np.int32(i), choice))
        for i, tokens in enumerate(eval_batches(arm.data.val, c.train.batch, c.eval.batches))
    ]
    return Adapted(ran, windows * steps, float(np.mean(found)), evaluate(arm, dense))


def block_of(arm: Arm, blocks: int) -> int:
    """Positions of a block. Raises ValueError when the sequence is not whole blocks, or devices do
    not share them.
    """
    S = arm.c.data.seq_len
    if S % blocks or blocks % (2 * checks.DEVICES):
        raise ValueError(
            f"data.seq_len = {S} must be a multiple of {blocks} blocks, and they of 2·cp = "
            f"{2 * checks.DEVICES}"
        )
    return S // blocks


def _problem(arm: Arm, masks_NxWxW: np.ndarray) -> Problem:
    """The arm's own attention over DEVICES, planned for bytes."""
    shape = checks.shape_of(arm, arm.c.train.batch, arm.c.data.seq_len)
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
