"""What layers state is what their programs do: bytes by axis, FLOPs and parameters of a layer that
a topic brings, of a pattern of unlike blocks and of native sparse attention."""

import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build import experiment, tiny

from fdp import audit, config, dry_run
from fdp.arm import Arm
from fdp.collectives import psum
from fdp.count import bytes as closed
from fdp.count import flops, hlo, jaxpr, memory
from fdp.count.compare import sent
from fdp.count.counts import GATHER, REDUCE, SCATTER, Counts, Ledger, Unstated, Work, merged
from fdp.count.step import microbatch, unstated
from fdp.mesh import AXES, make_mesh
from fdp.models.attention import Attention, Softmax
from fdp.models.layers import SwiGLU, enter_tp, entered, hidden_bytes, leave_tp, left, normal
from fdp.models.module import Module, compact
from fdp.models.nsa import Budget, NativeSparseAttention
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, Layer, layer
from fdp.parallel.context.layouts import CONTIGUOUS
from fdp.parallel.masks import Mask
from fdp.price.hardware import chip
from fdp.step import TrainStep

pytestmark = pytest.mark.fast


class Silent(Module):
    """A feed-forward layer that also hands out a metric, and states nothing."""

    shape: ModelShape
    reduction: Any = None

    @compact
    def __call__(self, x, where, given):
        s, F = self.shape, 2 * self.shape.ffn
        w_in = self.weight("w_in", normal(0.1), (s.width, F), (None, "tp"))
        w_out = self.weight("w_out", normal(0.1), (F, s.width), ("tp", None))
        h = jnp.tanh(enter_tp(x, s.sequence_parallel) @ w_in)
        self.aux("size", psum((h**2).sum((0, 1))[:3], "tp"))
        return leave_tp(h @ w_out, s.sequence_parallel, self.reduction)


class Stated(Silent):
    """The same with counts."""

    def counts(self, rows, degrees):
        s, weights = self.shape, self.shape.width * 2 * self.shape.ffn
        there, back = entered(s, rows, degrees)
        leave, leave_back = left(s, rows, degrees, self.reduction)
        size = Ledger(degrees).add(REDUCE, ("tp",), 12).sent  # of the metric
        last = Work(2 * rows.positions * weights, sent=merged(leave, size))
        forward = Work(2 * rows.positions * weights, sent=there) + last
        saved = hidden_bytes(s, rows, degrees)[0]
        backward = forward.backward(merged(back, leave_back))
        return Counts(2 * weights, forward, backward, last, saved=saved)


BUDGET = Budget(8, 4, 8, 3, 1, 1, 9)
MIXED: dict[str, Any] = {
    "mesh.dp": 2,
    "mesh.cp": 2,
    "mesh.tp": 2,
    "train.zero": 3,
    "train.microbatches": 2,
    "model.sequence_parallel": True,
    "model.remat": "full",
    "model.layers": 4,
    "model.qk_norm": True,
}


def block(mixing: Layer | None = None, ffn: type[Module] = SwiGLU) -> Layer:
    mixing = mixing or layer(Attention, core=Softmax(Mask("causal")))
    return layer(Block, mixing=mixing, ffn=layer(ffn))


NSA = block(layer(NativeSparseAttention, budget=BUDGET))
PATTERNS = {
    "a topic's layer": (block(ffn=Stated),),
    "unlike": (block(), block(ffn=Stated)),
    "nsa": (NSA,),
}


def program(pattern: tuple[Layer, ...], **overrides: Any) -> TrainStep:
    c = tiny(**{"objective.name": "autoregressive"}, **overrides)
    e = experiment(c)
    return TrainStep(replace(e, model=e.model.clone(pattern=pattern)), make_mesh(c.mesh))


def traced(p: TrainStep) -> Any:
    state, batch = p.abstract_arguments()
    noised = jax.eval_shape(p.corrupt, batch, jax.random.key(0))
    return jax.jit(p.grads).trace(state.variables, noised)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("case", [MIXED, {"mesh.cp": 4}], ids=["mixed", "cp4"])
def test_bytes_flops_and_parameters_are_those_of_the_program(name: str, case: dict) -> None:
    p = program(PATTERNS[name], **case)
    found = traced(p)
    assert sent(found.lower().compile(hlo.QUICK), p.mesh) == pytest.approx(closed.traffic(p))
    sizes = [int(np.prod(x.shape)) for x in jax.tree.leaves(p.specs.shapes)]
    assert microbatch(p.experiment, 0).parameters == sum(sizes)
    if name != "nsa":
        assert flops.executed(p) == p.mesh.size * jaxpr.dot_flops(found.jaxpr)
    assert Arm("arm", p.experiment, p).step_flops() is not None


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_flops_of_native_sparse_attention_are_those_of_its_program(remat: str) -> None:
    """On one device of cp: over cp, blocks that reach over the end are compressed as well."""
    p = program(PATTERNS["nsa"], **{"mesh.tp": 2, "model.remat": remat})
    assert flops.executed(p) == 2 * jaxpr.dot_flops(traced(p).jaxpr)


def test_what_is_saved_follows_rematerialisation() -> None:
    saved = {}
    for remat in ("none", "dots", "full"):
        p = program(PATTERNS["nsa"], **{"model.remat": remat, "model.layers": 8})
        saved[remat] = memory.activations(p)
    assert saved["full"] < saved["dots"] < saved["none"]


@dataclass(frozen=True)
class Mean:
    """A core without counts: every query gets the mean of the values."""

    layout = CONTIGUOUS

    def __call__(self, q, k, v, where, given):
        return jnp.broadcast_to(v.mean(1, keepdims=True), q.shape)


UNSTATED = {
    "Silent": block(ffn=Silent),
    "Mean": block(layer(Attention, core=Mean())),
    "Sum": layer(
        Block,
        mixing=layer(Attention, core=Softmax(Mask("causal"))),
        ffn=layer(SwiGLU),
        reduction=Layer(type("Sum", (Module,), {})),
    ),
}


@pytest.mark.parametrize("name", UNSTATED)
def test_what_states_nothing_is_named_and_its_model_has_no_numbers(name: str) -> None:
    e = experiment(tiny())
    e = replace(e, model=e.model.clone(pattern=(UNSTATED[name],)))
    assert unstated(e) == f"{name} has no counts"
    with pytest.raises(Unstated, match=name):
        microbatch(e, 1)


def test_an_unstated_model_is_dry_run_and_audited_as_not_stated() -> None:
    p = program((UNSTATED["Silent"],), **{"mesh.dp": 2, "mesh.tp": 2})
    e = p.experiment
    assert Arm("arm", e, p).step_flops() is None and memory.estimate(p).activations is None
    text = dry_run.describe(p, dry_run.Target(p.mesh, chip("h100"), ""))
    assert "counts    not stated: Silent has no counts" in text
    assert re.search(r"all-reduce over tp +not stated +[0-9.]+", text) and "predicted" not in text
    rows = {f.check: (f.holds, f.found) for f in audit.audit_arm("arm", e)}
    assert rows.pop("bytes = formula") == (None, "Silent has no counts")
    assert all(holds for holds, _ in rows.values())


@pytest.mark.parametrize(
    "sizes",
    [
        {"objective.name": "block_diffusion", "objective.block": 64, "data.seq_len": 64},
        {"model.conv": 40, "data.seq_len": 64},
    ],
)
def test_what_is_valid_at_full_size_is_valid_at_the_size_of_the_audit(sizes: dict) -> None:
    c = tiny(**{"mesh.dp": 2} | sizes)
    for degrees in audit.small_degrees(c.mesh):
        config.validate(audit.small(c, degrees))


def test_a_stated_model_is_dry_run_and_audited_with_numbers() -> None:
    p = program(PATTERNS["a topic's layer"], **{"mesh.dp": 2, "mesh.tp": 2})
    text = dry_run.describe(p, dry_run.Target(p.mesh, chip("h100"), ""))
    assert "not stated" not in text and "priced as softmax attention and SwiGLU" in text
    rows = {f.check: f.holds for f in audit.audit_arm("arm", p.experiment)}
    assert rows.pop("bytes = formula") is True and all(rows.values())


def test_a_ledger_adds_up_rings_and_leaves_out_what_does_not_move() -> None:
    ledger = Ledger(dict.fromkeys(AXES, 1) | {"dp": 2, "tp": 4})
    ledger.add(REDUCE, ("tp", "dp"), 8).add(GATHER, ("tp",), 8, 2).add(SCATTER, ("cp",), 8)
    assert ledger.sent == {(REDUCE, ("dp", "tp")): 14.0, (GATHER, ("tp",)): 48.0}
    assert not ledger.put(SCATTER, ("tp",), 0.0).sent.keys() & {(SCATTER, ("tp",))}
