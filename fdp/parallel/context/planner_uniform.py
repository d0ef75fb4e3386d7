"""One comm plan for all layers: the bar that a plan of its own for every layer must clear, and what
no plan of static shapes can reach.

Legend: J lists of a layer, D devices, O ring offsets.
"""

from collections.abc import Iterable

from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.planner import LayerPlan, ModelPlan, model_value
from fdp.parallel.context.planner_price import Price, block_bytes
from fdp.parallel.context.planner_problem import Problem, dense, sparse
from fdp.parallel.context.planner_search import ROUNDING


def uniform(problem: Problem, plan: CommPlan) -> ModelPlan | str:
    """One plan in every layer, or why some layer cannot run it."""
    found = [problem.price(layer, plan) for layer in range(problem.layers)]
    if refused := [f"layer {i}: {f}" for i, f in enumerate(found) if isinstance(f, str)]:
        return refused[0]
    model = ModelPlan(tuple(LayerPlan(plan, f) for f in found if isinstance(f, Price)))
    if model.imbalance > problem.balance * (1 + ROUNDING):
        return f"max/mean FLOPs {model.imbalance:.2f} exceeds {problem.balance:.2f}"
    return model


def best_or_why(problem: Problem, plans: Iterable[CommPlan]) -> ModelPlan | str:
    """The best of some plans, each run in all layers, or why none can."""
    found = {plan: uniform(problem, plan) for plan in plans if plan.layout in problem.places}
    runs = [f for f in found.values() if isinstance(f, ModelPlan)]
    if runs:
        return min(runs, key=lambda f: model_value(problem, f))
    why = "; ".join(f"{p.kind}: {f}" for p, f in found.items())
    return f"no uniform plan can run: {why or 'the layout divides blocks'}"


def best_uniform(problem: Problem, plans: Iterable[CommPlan]) -> ModelPlan:
    """As `best_or_why`. Raises ValueError, with the reasons, when none can run."""
    found = best_or_why(problem, plans)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def uniform_dense(problem: Problem) -> ModelPlan:
    """The best plan that sends all keys in every layer. Raises ValueError when none can run."""
    return best_uniform(
        problem, [plan for layout in problem.places for plan in dense(layout, problem.shape.cp)]
    )


def uniform_sparse(problem: Problem) -> ModelPlan | str:
    """The best plan with one set of hops or one capacity for all layers, or why there is none."""
    layers = range(problem.layers)
    plans = [plan for layout in problem.places for plan in sparse(problem, layout, layers)]
    return best_or_why(problem, plans)


def uniform_any(problem: Problem) -> ModelPlan:
    """The best uniform plan of all kinds: the bar of every claim."""
    both = (uniform_dense(problem), uniform_sparse(problem))
    return min((f for f in both if isinstance(f, ModelPlan)), key=lambda f: model_value(problem, f))


def need_only_bytes(problem: Problem, layout: SequenceLayout, padded: bool = False) -> float:
    """Forward and backward bytes when a device receives exactly the blocks that it needs, mean over
    devices.

    A bound for plans that fetch keys, which static shapes cannot reach; a head split may send less
    than any of them. padded: one static size for each ring offset, the most that any device needs
    over it (one permute an offset), which lies between this bound and the gather. Gradients in the
    type of the keys, as the gather's; ids are not counted."""
    blocks = 0.0
    for layer in range(problem.layers):
        remote_JxDxO = problem.counts(layer, layout).remote_JxDxO
        per_offset = remote_JxDxO.max((0, 1)) if padded else remote_JxDxO.mean((0, 1))
        blocks += float(per_offset.sum())
    return 2 * blocks * block_bytes(problem.shape, problem.block)


def uniform_plans(found: Problem) -> list[ModelPlan]:
    """Every uniform plan that can run, of all kinds and layouts."""
    layers, cp = range(found.layers), found.shape.cp
    plans = [p for at in found.places for p in (*dense(at, cp), *sparse(found, at, layers))]
    return [f for f in (uniform(found, p) for p in plans) if isinstance(f, ModelPlan)]
