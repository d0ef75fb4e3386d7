"""Steps of a pipeline without a barrier between them, and what three ways of clipping by the global
norm cost.

Each device updates its own stage after the last W of a step and goes on with the next step, so what
only the stagger of the devices costs is paid once for all steps of a program. Simulated; really run
they are in `fdp.topics.zero_bubble.steps`.

Legend: p devices, m microbatches of a step, K steps of a program."""

from typing import NamedTuple

from fdp.parallel.pipeline import fixed
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.orders import Order, repeat

P, M = 8, 16
STEPS = (1, 2, 4, 8)
SHARES = (0.0, 0.01, 0.1, 1.0)  # of the steps that are rolled back
BUILD = {"1F1B": fixed.one_f_one_b, "ZB-H1": fixed.zb_h1, "ZB-H2": fixed.zb_h2, "ZBV": fixed.zbv}
# Bubbles at F = B = W, from an evaluator written apart from this one.
STATED = {
    "1F1B": (0.304, 0.304, 0.304, 0.304),
    "ZB-H1": (0.127, 0.127, 0.127, 0.127),
    "ZB-H2": (0.127, 0.068, 0.035, 0.018),
    "ZBV": (0.068, 0.035, 0.018, 0.009),
}


def bubbles() -> dict[str, list[float]]:
    """{schedule: bubble after STEPS steps of one program} at F = B = W."""
    return {
        name: [evaluate(repeat(build(P, M), k), Costs()).bubble for k in STEPS]
        for name, build in BUILD.items()
    }


class Clipping(NamedTuple):
    """Seconds of a step.

    barrier: all stages wait for the norm, then update. delayed: by the norm of the step before,
    which no stage waits for; not the same update. validated: every stage updates as if nothing were
    clipped, and the norm is checked when it arrives; a step that is clipped after all is rolled
    back, so it costs one with a barrier and its update twice. By the share of steps rolled back."""

    schedule: str
    barrier: float
    delayed: float
    validated: dict[float, float]


def clipping(order: Order, name: str, costs: Costs, norm: float) -> Clipping:
    """costs: with seconds of U, one number. norm: seconds of the all-reduce of the norm, which is
    the barrier's alone: others have it behind the next step. A step without a barrier is what the
    last of STEPS adds."""
    many, fewer = (evaluate(repeat(order, STEPS[-1] - n), costs).makespan for n in (0, 1))
    update = float(costs.U)
    # With a barrier U starts on all stages at once, after the last W of any.
    barrier = evaluate(order, costs).makespan + norm + update
    free = many - fewer
    rolled = {q: (1 - q) * free + q * (barrier + update) for q in SHARES}
    return Clipping(name, barrier, free, rolled)


def clippings(update: float = 0.5, norm: float = 0.1) -> list[Clipping]:
    """Of every schedule at F = B = W = 1, in whose units `update` and `norm` are."""
    costs = Costs(U=update)
    return [clipping(build(P, M), name, costs, norm) for name, build in BUILD.items()]
