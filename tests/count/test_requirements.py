"""Every axis of degree > 1 has the collectives that it must have, and no other: of invented counts
and of compiled programs, one of which leaves out context parallelism."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import pytest
from build import experiment, tiny

from fdp.count import context, hlo
from fdp.count.compare import Sent, sent
from fdp.count.context import AttentionShape
from fdp.count.counts import GATHER, PERMUTE, REDUCE, SCATTER
from fdp.count.requirements import exchanges, missing, required, required_of, unexpected
from fdp.kernels_pallas import attend
from fdp.mesh import AXES, make_mesh
from fdp.models.attention import Softmax
from fdp.models.transformer import with_core
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.masks import Mask
from fdp.step import TrainStep

pytestmark = pytest.mark.fast

ONE = dict.fromkeys(AXES, 1)
GRADIENTS = {"dp": 800.0, "ep": 800.0, "cp": 800.0}


def purposes(degrees: dict[str, int], counted: Sent, *more: Any) -> list[tuple[str, str]]:
    needs = required(ONE | degrees, GRADIENTS, *more)
    return [(r.axis, r.purpose) for r in missing(needs, counted)]


def test_one_device_needs_nothing_and_may_send_nothing() -> None:
    assert required(ONE, GRADIENTS) == []
    assert unexpected([], {(GATHER, ("tp",)): 1.0}) == {(GATHER, ("tp",)): 1.0}


@pytest.mark.parametrize("axis", ["dp", "ep", "cp"])
def test_the_loss_alone_is_no_reduction_of_gradients(axis: str) -> None:
    # 800 bytes over 4 devices by all-reduce: each sends 2 · 3/4 of them
    over = (axis,)
    context = ()
    lacks = [(axis, "reduction of gradients")]
    assert purposes({axis: 4}, {}, None, False, context) == lacks
    assert purposes({axis: 4}, {(REDUCE, over): 6.0}, None, False, context) == lacks
    assert purposes({axis: 4}, {(REDUCE, over): 1206.0}, None, False, context) == []
    assert purposes({axis: 4}, {(REDUCE, ("dp", "ep", "cp")): 1300.0}, None, False, context) == []


def test_gradients_may_be_scattered_over_dp_only() -> None:
    scattered = {(SCATTER, (a,)): 600.0 for a in ("dp", "cp")}
    assert purposes({"dp": 4, "cp": 4}, scattered, None, False, ()) == [
        ("cp", "reduction of gradients")
    ]


@pytest.mark.parametrize("ops", [(REDUCE,), (GATHER, SCATTER)])
def test_activations_cross_tp_by_all_reduce_or_in_shards(ops: tuple[str, ...]) -> None:
    sequence_parallel = len(ops) == 2
    enough = {(op, ("tp",)): 2 / len(ops) * 3 / 4 * 1000 for op in ops}
    assert purposes({"tp": 4}, enough, 1000.0, sequence_parallel) == []
    for op in ops:
        fewer = enough | {(op, ("tp",)): enough[op, ("tp",)] - 4}
        assert len(purposes({"tp": 4}, fewer, 1000.0, sequence_parallel)) == 1
    assert purposes({"tp": 4}, enough, 1000.0, not sequence_parallel)
    needs = required(ONE | {"tp": 4}, GRADIENTS, 1000.0)
    assert (needs[0].found(enough) > 0) is not sequence_parallel
    other = unexpected(needs, enough)
    assert set(other) == ({(op, ("tp",)) for op in ops} if sequence_parallel else set())


def test_an_axis_that_nothing_serves_is_named_with_its_bytes() -> None:
    degrees, counted = ONE | {"pp": 2, "cp": 2, "tp": 2}, {(REDUCE, ("cp",)): 900.0}
    texts = [r.describe(counted) for r in missing(required(degrees, GRADIENTS), counted)]
    assert texts[0] == (
        "pp: activations between stages by collective-permute, 0 of at least 1 bytes"
    )
    assert [t.split(":")[0] for t in texts] == ["pp", "cp", "tp"]
    assert "all-gather or reduce-scatter or all-to-all or collective-permute" in texts[1]


def test_a_collective_over_several_axes_must_be_asked_for_over_each() -> None:
    needs = required(ONE | {"dp": 2, "cp": 2}, GRADIENTS, None, False, {GATHER})
    both, one = (GATHER, ("dp", "cp")), (GATHER, ("cp",))
    counted = {both: 5.0, one: 7.0, (REDUCE, ("dp", "cp")): 9.0}
    assert unexpected(needs, counted) == {both: 5.0}


PLANS = [CommPlan("ring"), CommPlan("ring", hops=(1,)), CommPlan("ring", hops=())]
PLANS += [CommPlan("ulysses", 8), CommPlan("usp", 2), CommPlan("batch", 2), CommPlan("batch", 8)]
PLANS += [CommPlan("all_gather")]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_exchanges_of_a_plan_are_the_ops_of_its_formula(plan: CommPlan) -> None:
    shape, mask = AttentionShape(8, 64, 8, 8, 4, 8), Mask("causal", 1 if plan.hops == () else 8)
    given = plan, shape, mask
    formula = context.forward_bytes(*given).keys() | context.backward_bytes(*given).keys()
    assert exchanges(plan, 8) == formula


@dataclass(frozen=True)
class Off(Softmax):
    """Attention to the positions of this device alone: context parallelism that is off."""

    def __call__(self, q: Any, k: Any, v: Any, where: Any, given: Any) -> Any:
        """As `Core`."""
        return attend.attend(q, k, v, self.mask, where.index, where.index)[0]


MIXED = {
    "mesh.dp": 2,
    "mesh.cp": 2,
    "mesh.tp": 2,
    "train.zero": 3,
    "train.microbatches": 2,
    "model.sequence_parallel": True,
    "model.remat": "full",
    "model.conv": 4,
    "context.plan": "ring",
    "objective.name": "autoregressive",
}


def program(core: type[Softmax] = Softmax, **overrides: Any) -> TrainStep:
    e = experiment(tiny(**overrides))
    stock = e.model.core
    model = with_core(e.model, core(stock.mask, stock.plan))
    return TrainStep(replace(e, model=model), make_mesh(e.degrees))


def count(p: TrainStep) -> Sent:
    """Bytes of loss and gradients in the compiled program."""
    state, batch = p.abstract_arguments()
    noised = jax.eval_shape(p.objective.corrupt, jax.random.key(0), batch)
    return sent(jax.jit(p.grads).lower(state.variables, noised).compile(hlo.QUICK), p.mesh)


def test_a_program_on_every_axis_has_what_it_needs_and_misses_what_is_taken_out() -> None:
    p = program(**MIXED)
    needs, counted = required_of(p), count(p)
    assert missing(needs, counted) == [] and unexpected(needs, counted) == {}
    assert {r.axis for r in needs} == {"dp", "cp", "tp"}
    for r in needs:
        rest = {k: w for k, w in counted.items() if not (k[0] in r.ops and r.axis in k[1])}
        assert r in missing(needs, rest)
    # Not only there, but all of it: gradients and activations within the remat's and the norms'
    # share
    for r in needs:
        assert r.least <= r.found(counted) <= 4 * r.least or r.purpose == "exchange of positions"


def test_context_parallelism_that_is_off_is_found_where_gradients_are_reduced() -> None:
    p = program(Off, **{"mesh.cp": 4})
    counted = count(p)
    assert counted[REDUCE, ("cp",)] > 0  # loss falls, gradients are reduced
    assert [r.describe(counted) for r in missing(required_of(p), counted)] == [
        "cp: exchange of positions by all-gather, 0 of at least 1 bytes",
        "cp: exchange of positions by reduce-scatter, 0 of at least 1 bytes",
    ]


def test_layers_of_a_topic_may_exchange_by_any_op_but_must_exchange() -> None:
    e = experiment(tiny(**{"mesh.cp": 4, "mesh.tp": 2}))
    unlike = e.model.clone(pattern=e.model.pattern * 2)
    needs = required_of(TrainStep(replace(e, model=unlike), make_mesh(e.degrees)))
    exchange = [r for r in needs if r.purpose == "exchange of positions"]
    assert len(exchange) == 1 and len(exchange[0].ops) == 4
    assert missing(exchange, {(PERMUTE, ("cp",)): 1.0}) == []
    assert missing(exchange, {(REDUCE, ("cp",)): 1.0}) == exchange
