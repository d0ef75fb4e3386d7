"""A vocabulary that all stages of a pipeline share: operation S.

Legend: p devices, m microbatches, T ticks."""

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from fdp import config, mpmd
from fdp.count import bytes as closed
from fdp.count import flops, hlo, jaxpr, memory, pipeline
from fdp.count.compare import against_one_device, mismatches, sent_by
from fdp.data.batches import blank
from fdp.experiment import standard
from fdp.keys import UserError
from fdp.mesh import abstract_mesh, make_mesh
from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.csv_format import write_csv
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.fixed import gpipe
from fdp.parallel.pipeline.library import FIXED, WAVES, named
from fdp.parallel.pipeline.orders import Op, Order
from fdp.parallel.pipeline.placement import looped
from fdp.parallel.pipeline.table import BRANCHES, IDLE, table
from fdp.parallel.pipeline.vocabulary import with_head
from fdp.step import TrainStep

L, V, BATCH, MICRO = 8, 64, 8, 4
TOKENS = np.random.default_rng(0).integers(0, V - 2, (BATCH, L)).astype(np.int32)
SIZES = {"layers": 4, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 32, "vocab": V}
CASES = {
    "zb_h1, tp·dp, ZeRO-1": {"mesh.tp": 2, "mesh.dp": 2, "train.zero": 1}
    | {"pipeline.schedule": "zb_h1"},
    "zbv, tp, SP": {"pipeline.schedule": "zbv", "mesh.tp": 2, "model.sequence_parallel": True},
}


def program(changes: dict[str, Any], virtual: bool = True) -> TrainStep:
    c = config.base()
    c.model.update(SIZES)
    c.objective.name = "mdlm"
    c.data.seq_len, c.train.batch, c.train.microbatches = L, BATCH, MICRO
    c.mesh.pp, c.pipeline.vocabulary = 2, True
    c.update_from_flattened_dict(changes)
    e = standard(c, blank(L, c.model.vocab))
    return TrainStep(e, (make_mesh if virtual else abstract_mesh)(e.degrees))


def run(p: TrainStep) -> tuple[Any, Any, Any]:
    """(loss and gradients with the summed loss of an evaluation, jaxpr, program)."""
    variables = p.init(0).variables
    noised = jax.jit(p.corrupt)({"tokens": TOKENS}, jax.random.key(0))
    traced = jax.jit(p.grads).trace(variables, noised)
    compiled = traced.lower().compile()
    loss, grads, _ = compiled(variables, noised)
    held_out, _ = p.jit_eval_step()(variables, {"tokens": TOKENS}, 0)
    return jax.device_get(((loss, held_out), grads)), traced.jaxpr, compiled


@pytest.fixture(scope="module")
def one_device() -> Any:
    return run(program({"mesh.pp": 1}))[0]


@pytest.mark.parametrize("case", CASES)
def test_a_shared_head_equals_one_device(case: str, one_device: Any) -> None:
    p = program(CASES[case])
    got, traced, compiled = run(p)
    loss, grads = against_one_device(got, one_device)
    assert loss < 1e-6 and grads < 1e-5
    for device in range(2):
        formula = closed.traffic(p, device=device)
        assert formula and not mismatches(formula, sent_by(p, compiled, device))
    assert flops.executed(p) == pipeline.dot_flops(p, traced)
    alike = [pipeline.branches(p.experiment.grads, i) for i in range(2)]
    shape = dict(p.mesh.shape)
    assert len({jaxpr.dot_flops(traced, shape, b) for b in alike}) == 1
    assert_sends_over_pp(compiled.as_text(), shape, p.experiment.grads.table.ticks)


def assert_sends_over_pp(text: str, shape: dict[str, int], T: int) -> None:
    """Two permutes a tick whatever runs in it; all else between stages is in S or not in ticks."""

    def sent(kind: int, heads: int) -> Counter[tuple[str, tuple[str, ...]]]:
        def choose(path: str, n: int) -> Any:
            if "cond" in path.split("/")[:-1]:
                return hlo.choice(hlo.USUAL, path, n)
            return [T * (i == kind) for i in range(n)] if n == BRANCHES else [T - heads, heads]

        found = hlo.collectives(text, shape, choose)
        return Counter({key: n for key, (n, _, _) in hlo.summary(found).items() if "pp" in key[1]})

    idle = sent(IDLE, 0)
    assert all(sent(kind, 0) == idle for kind in range(BRANCHES))
    of_heads = sent(IDLE, T) - idle
    assert {op for op, _ in of_heads} == {"all-reduce"}
    assert all(n % T == 0 for n in of_heads.values()) and sum(of_heads.values()) <= 5 * T
    assert 2 * T <= idle["collective-permute", ("pp",)] < 3 * T  # layers travel once a step


def test_the_last_stage_computes_no_more_than_the_others() -> None:
    found = {}
    for vocabulary in (False, True):
        changes = {"mesh.pp": 4, "model.vocab": 256, "pipeline.vocabulary": vocabulary}
        p = program(changes, virtual=False)
        traced, shape = pipeline.traced(p), dict(p.mesh.shape)
        which = [pipeline.branches(p.experiment.grads, i) for i in range(4)]
        each = [jaxpr.dot_flops(traced, shape, branches) for branches in which]
        assert sum(each) == flops.executed(p)
        found[vocabulary] = each[-1] / np.mean(each), memory.estimate(p, traced).parameters
    (before, whole), (after, shared) = found[False], found[True]
    assert before > 1.5 and after == 1.0
    assert whole - shared == 3 / 4 * 4 * SIZES["width"] * 256


@pytest.mark.fast
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("p", [2, 4])
def test_heads_pause_an_order_and_hold_no_more(name: str, p: int) -> None:
    m = 2 * p
    order = named(name, p, m, 2 if name in ("1f1b", "zb_h1", *WAVES) else 1)
    shared = with_head(order)
    before, after = table(order), table(shared)
    assert after.ticks == before.ticks + m and after.slots == before.slots
    assert after.heads is not None and sorted(after.heads[after.heads >= 0]) == list(range(m))
    assert not after.rows[after.heads >= 0, :, 0].any()  # all idle while S runs
    costs = Costs(activation=1.0, stash=0.4)
    assert evaluate(shared, costs).peak_bytes == evaluate(order, costs).peak_bytes
    if name == "1f1b" and order.placement.v == 1:
        assert after.slots.residuals == p


def test_heads_that_cannot_run_are_named() -> None:
    F, B, S = (lambda k, kind=kind: Op(kind, k) for kind in ("F", "BW", "S"))
    early = ((F(0), S(0), B(0)), (S(0), F(0), B(0)))
    with pytest.raises(ValueError, match=r"stage 1, row 0: S0 .* waits for F0 .* in row 1"):
        table(Order(looped(2), early))
    crossed = ((F(0), F(1), S(0), S(1), B(0), B(1)), (F(0), F(1), S(1), S(0), B(0), B(1)))
    with pytest.raises(ValueError, match=r"stage 0, row 2: S0 .* in one tick, but stage 1 .* 3"):
        table(Order(looped(2), crossed))
    with pytest.raises(ValueError, match="has operations S already"):
        with_head(with_head(gpipe(2, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.tied": True}, r"set model\.tied=False or pipeline\.vocabulary=False"),
        (
            {"model.vocab": 66, "mesh.tp": 2},
            r"model\.vocab % \(pp·tp\) = 66 % \(2·2\); set model\.vocab=68",
        ),
        (
            {"model.kind": "dit", "objective.name": "flow", "data.source": "blank"},
            r"model\.kind='dit' has no vocabulary .* set pipeline\.vocabulary=False",
        ),
    ],
)
def test_a_head_that_stages_cannot_share_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        program(changes, virtual=False)


def test_an_order_and_a_model_that_disagree_are_refused() -> None:
    for vocabulary, order in ((True, gpipe(2, MICRO)), (False, with_head(gpipe(2, MICRO)))):
        p = program({"pipeline.vocabulary": vocabulary}, virtual=False)
        p.experiment = replace(p.experiment, grads=scheduled(order))
        with pytest.raises(ValueError, match=r"set pipeline\.vocabulary"):
            pipeline.traced(p)
    with pytest.raises(ValueError, match="give the order without `with_head`"):
        mpmd.StagedStep(p.experiment, order)


def test_a_schedule_of_a_file_gets_its_heads(tmp_path: Any) -> None:
    path = tmp_path / "orders.csv"
    write_csv(gpipe(2, MICRO), path)
    p = program({"pipeline.schedule": str(path)}, virtual=False)
    assert p.experiment.grads.order == with_head(gpipe(2, MICRO))
