"""Programs of single operations, and processes of single stages, run a schedule exactly."""

import jax
import numpy as np
import pytest

from fdp import config
from fdp.count.compare import against_one_device
from fdp.data.batches import blank
from fdp.experiment import standard
from fdp.mesh import make_mesh
from fdp.mpmd import StagedStep
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.fixed import zb_h1, zbv
from fdp.parallel.pipeline.library import named
from fdp.parallel.pipeline.orders import Op, Order
from fdp.parallel.pipeline.placement import looped
from fdp.parallel.pipeline.stage_process import Sleeping, StageError, StageProcesses
from fdp.step import TrainStep
from tests.parallel.pipeline.broken_stages import Broken, dies, fails, hangs

L, V, BATCH, MICRO = 8, 64, 8, 4
TOKENS = np.random.default_rng(0).integers(0, V - 2, (BATCH, L)).astype(np.int32)
DENSE = {"layers": 4, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32, "vocab": V}
CASES = {"1f1b": {"pp": 4, "dp": 2}, "zbv": {"pp": 2, "tp": 2}}


def experiment(degrees: dict[str, int], **changes):
    c = config.base()
    c.model.update(DENSE)
    c.objective.name = "mdlm"
    c.data.seq_len, c.train.batch, c.train.microbatches = L, BATCH, MICRO
    c.mesh.update(degrees)
    c.update_from_flattened_dict(changes)
    return standard(c, blank(L, V))


@pytest.mark.parametrize("schedule", CASES)
def test_programs_of_single_operations_equal_the_plain_step(schedule):
    degrees = CASES[schedule]
    e = experiment({**degrees, "pp": 1})
    plain = TrainStep(e, make_mesh(e.degrees))
    state = plain.init(0)
    noised = jax.jit(plain.corrupt)({"tokens": TOKENS}, jax.random.key(0))
    want = jax.device_get(jax.jit(plain.grads)(state.variables, noised))
    variables, noised = jax.device_get((state.variables, noised))

    order = named(schedule, degrees["pp"], MICRO)
    staged = StagedStep(experiment(degrees), order)
    got = staged.grads(variables, noised)
    loss, grads = against_one_device(got[:2], want[:2])
    assert loss < 1e-6 and grads < 1e-5
    assert jax.tree.structure(got[2]) == jax.tree.structure(want[2])
    events = staged.groups.events()
    ran = [e for e in events if "virtual" in e.op]
    assert len(ran) == 3 * MICRO * len(order.placement.devices)


def test_an_order_of_other_stages_is_refused():
    with pytest.raises(ValueError, match=r"p=4 stages on mesh\.pp=2"):
        StagedStep(experiment({"pp": 2}), named("gpipe", 4, MICRO))


# Processes
# -------------------------------------------------------------------------------------------------


def test_sleeping_stages_keep_to_their_order():
    """Eight stages, messages of more than a pipe holds, each way at once. Emulation."""
    order, cost = zbv(8, 8), 0.004
    with StageProcesses({"zbv": order}, Sleeping(dict.fromkeys("FBW", cost), 100_000)) as stages:
        run = stages.run("zbv")
        alone = stages.alone("zbv", 3)
    ends = {(r.kind, r.virtual, r.microbatch): r.end for r in run.ran}
    assert len(ends) == len(order)
    for r in run.ran:
        reads = {"F": r.virtual - 1, "B": r.virtual + 1}.get(r.kind, -1)
        assert ends.get((r.kind, reads, r.microbatch), 0.0) <= r.begin
    least = evaluate(order, Costs(F=2 * cost, B=2 * cost, W=2 * cost)).makespan
    assert least <= run.makespan < len(order) * cost
    assert [r.stage for r in alone.ran] == [3] * len(order.ops[3])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dies, r"stage 1 of h1 runs B0 of chunk 0 \(row 1\): died, exit code 3"),
        (hangs, r"stage 1 of h1 runs B0 of chunk 0 \(row 1\): for .* s > timeout = 0\.5 s"),
        (fails, r"stage 1 of h1 runs B0 of chunk 0 \(row 1\): FloatingPointError: not a number"),
    ],
)
def test_a_stage_that_goes_wrong_is_named(how, message):
    with StageProcesses({"h1": zb_h1(2, 4)}, Broken(1, how), timeout=0.5) as stages:
        processes = list(stages._processes)
        with pytest.raises(StageError, match=message):
            stages.run("h1")
        assert not any(p.is_alive() for p in processes)
        with pytest.raises(StageError, match="have ended"):
            stages.run("h1")


def test_what_processes_refuse():
    orders = {"a": zb_h1(2, 4), "b": zb_h1(4, 4)}
    with pytest.raises(ValueError, match=r"\{'a': 2, 'b': 4\}"):
        StageProcesses(orders, Sleeping({}))
    swapped = Order(looped(2), ((Op("F", 0), Op("BW", 0)), (Op("BW", 0), Op("F", 0))))
    with pytest.raises(ValueError, match="stage 1, row 0"):
        StageProcesses({"a": swapped}, Sleeping({}))
    some = Sleeping(dict.fromkeys("FB", 0.0))
    with (
        StageProcesses({"h1": zb_h1(2, 2)}, some) as stages,
        pytest.raises(StageError, match=r"of h1 starts: ValueError: no operation for W"),
    ):
        stages.run("h1")
