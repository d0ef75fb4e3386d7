"""What a pipeline sends, computes and holds, by formula, traced and compiled.

Legend: D width, N layers, m microbatches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from fdp import config, dry_run
from fdp.collectives import psum, shard_map
from fdp.count import aot, flops, hlo, jaxpr, pipeline
from fdp.count import bytes as closed
from fdp.count.compare import mismatches, sent_by
from fdp.count.step import microbatch
from fdp.data.batches import blank
from fdp.experiment import standard
from fdp.mesh import abstract_mesh, make_mesh
from fdp.models.image import FEATURES
from fdp.parallel.pipeline import executor
from fdp.parallel.pipeline.split import halves
from fdp.step import TrainStep, stages

TOKENS = 8


def setting(kind: str, m: int = 4, **changes: Any) -> Any:
    """A config of four layers and m microbatches of a sample on each device."""
    c = config.base()
    c.model.update(layers=4, width=16, heads=2, kv_heads=2, head_dim=8, ffn=64, vocab=64)
    if kind == "dit":
        c.model.kind, c.objective.name, c.data.source = "dit", "flow", "blank"
        c.model.image.update(size=8, channels=1, classes=4)
    c.data.seq_len, c.train.microbatches = TOKENS, m
    c.update_from_flattened_dict(changes)
    c.train.batch = m * c.mesh.dp
    return c


def program(c: Any, virtual: bool = True) -> TrainStep:
    """On virtual devices, or traced only."""
    e = standard(c, blank(c.data.seq_len, 64) if c.model.kind != "dit" else None)
    return TrainStep(e, (make_mesh if virtual else abstract_mesh)(e.degrees))


def compiled(p: TrainStep) -> tuple[Any, Any]:
    """(jaxpr, program) of loss and gradients."""
    state, batch = p.abstract_arguments()
    noised = jax.eval_shape(p.corrupt, batch, jax.random.key(0))
    traced = jax.jit(p.grads).trace(state.variables, noised)
    return traced.jaxpr, traced.lower().compile(hlo.QUICK)


def test_branches_of_a_loop_count_as_often_as_they_are_executed() -> None:
    kinds = [0, 1, 1, 2, 2, 2]

    def local(x: jax.Array) -> jax.Array:
        def tick(x: jax.Array, kind: jax.Array) -> tuple[jax.Array, None]:
            def send(n: int) -> Any:
                return lambda: jnp.concatenate([psum(x[:n], "dp") * 0.5, x[n:]]) @ jnp.eye(4)

            return jax.lax.switch(kind, [lambda: x @ jnp.eye(4), send(1), send(2)]), None

        return jax.lax.scan(tick, x, jnp.array(kinds))[0]

    mesh = make_mesh({"pp": 1, "dp": 2, "ep": 1, "cp": 1, "tp": 1})
    shape, spec = dict(mesh.shape), PartitionSpec("dp")
    traced = jax.jit(shard_map(local, mesh, spec, spec)).trace(jnp.ones((8, 4)))
    text, bytes_of_a_row = traced.lower().compile().as_text(), 2 * 4 * 4 / 2

    def executed(*counts: int) -> Any:
        return lambda path, n: counts

    for found in (
        hlo.collectives(text, shape, executed(1, 2, 3)),
        jaxpr.collectives(traced.jaxpr, shape, executed(1, 2, 3)),
    ):
        assert hlo.bytes_per_axis(found) == {("dp",): (2 * 1 + 3 * 2) * bytes_of_a_row}
    each = 2 * 4 * 4 * 4
    assert jaxpr.dot_flops(traced.jaxpr, shape, executed(1, 2, 3)) == 6 * each
    assert jaxpr.dot_flops(traced.jaxpr, shape, executed(0, 0, 1)) == 6 * each
    for wrong in ((1, 2, 2), (1, 5)):
        with pytest.raises(ValueError, match=r"executions \[.*\] were given for conditional"):
            hlo.collectives(text, shape, executed(*wrong))


def test_a_pipeline_of_images_sends_and_computes_what_its_layers_state() -> None:
    p = program(setting("dit", **{"mesh.pp": 2, "mesh.dp": 2, "mesh.tp": 2}))
    traced, found = compiled(p)
    for device in range(2):
        formula = closed.traffic(p, device=device)
        assert len(formula) == 5 and not mismatches(formula, sent_by(p, found, device))
    assert flops.executed(p) == pipeline.dot_flops(p, traced)
    planned = aot.memory(found).temp
    assert 0.5 * planned < pipeline.ticks(traced).carried < planned


def test_time_and_label_as_tokens_are_computed_once_more() -> None:
    changes = {"mesh.pp": 2, "model.image.conditioning": "tokens", "model.image.registers": 2}
    p = program(setting("dit", **changes), virtual=False)
    assert flops.executed(p) == pipeline.dot_flops(p, pipeline.traced(p))


def test_a_schedule_computes_what_the_fused_backward_pass_computes() -> None:
    for kind, most in (("transformer", 1.0), ("dit", 1.02)):
        sizes = {"model.width": 1152, "model.ffn": 4608, "model.layers": 28, "model.heads": 16}
        sizes |= {"model.kv_heads": 16, "model.head_dim": 72, "model.image.size": 32}
        sizes |= {"model.image.patch": 2} if kind == "dit" else {}
        one, many = (program(setting(kind, **sizes, **{"mesh.pp": n}), False) for n in (1, 4))
        assert 1.0 <= flops.executed(many) / flops.executed(one) <= most


class Twice(NamedTuple):
    """Gradients of inputs and of parameters by a vjp each."""

    trees: dict[str, Any]

    def forward(self, f: Any, params: Any, x: Any) -> Any:
        y, pull_x, aux = jax.vjp(lambda x: f(params, x), x, has_aux=True)
        _, pull_w, _ = jax.vjp(lambda params: f(params, x), params, has_aux=True)
        leaves, self.trees["x"] = jax.tree.flatten(pull_x)
        more, self.trees["w"] = jax.tree.flatten(pull_w)
        return y, [*leaves, *more], aux

    def input_gradients(self, params: Any, residuals: list[Any], dy: Any) -> Any:
        n = self.trees["x"].num_leaves
        pull = jax.tree.unflatten(self.trees["x"], residuals[:n])
        return pull(dy)[0], (residuals[n:], dy)

    def weight_gradients(self, params: Any, stash: Any) -> Any:
        return jax.tree.unflatten(self.trees["w"], stash[0])(stash[1])[0]


def test_a_second_vjp_for_the_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"mesh.pp": 2, "model.width": 64, "model.head_dim": 32}
    p = program(setting("transformer", **sizes), virtual=False)
    forward = microbatch(p.experiment, 4 * p.head_rows()).forward.flops
    once = pipeline.dot_flops(p, pipeline.traced(p)) - forward
    monkeypatch.setattr(executor, "halves", lambda *_: Twice({}))
    twice = pipeline.dot_flops(p, pipeline.traced(p)) - forward
    assert twice / once >= 1.4


def test_the_stash_of_a_block_is_sixteen_floats_a_token_and_feature() -> None:
    c = setting("dit", m=1)
    p = program(c, virtual=False)
    noised = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), p.specs.example)
    D, N = c.model.width, c.model.layers
    parts = stages(p.model, p.objective, {}, 1, staged=True)

    def stash(params: Any) -> Any:
        def blocks(params: Any, x: Any) -> Any:
            y, aux, _ = parts.stack(params, x, noised)
            return y, aux

        x = parts.embed(params, noised)[0]
        found = halves(blocks, params, x)
        y, residuals, _ = found.forward(blocks, params, x)
        return x, found.input_gradients(params, residuals, y)[1]

    x, found = jax.eval_shape(stash, p.specs.shapes)
    of_tokens = [s.size for s in jax.tree.leaves(found) if s.shape[1:3] == x.shape[:2]]
    assert sum(of_tokens) == 16 * D * N * x.shape[0] * x.shape[1]
    # the rest is of samples: modulations, and what time and label are computed from
    every = sum(s.size for s in jax.tree.leaves(found))
    assert every - sum(of_tokens) <= x.shape[0] * (FEATURES + 16 * D + 2 * 3 * D * N)


def test_slots_do_not_grow_with_the_microbatches() -> None:
    few, many = (
        pipeline.ticks(pipeline.traced(program(setting("transformer", m, **{"mesh.pp": 2}), False)))
        for m in (8, 32)
    )
    assert few == many


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_temporaries_do_not_grow_with_the_microbatches(schedule: str) -> None:
    """What grows is the table: 40 bytes a tick."""
    sizes = {"mesh.pp": 2, "pipeline.schedule": schedule, "data.seq_len": 32}
    programs = (program(setting("transformer", m, **sizes)) for m in (8, 32))
    few, many = (aot.memory(compiled(p)[1]).temp for p in programs)
    assert many <= 1.02 * few


def test_a_dry_run_describes_the_schedule_and_warns_of_few_microbatches() -> None:
    for m, warned in ((4, False), (1, True)):
        text = dry_run._pipeline(program(setting("transformer", m, **{"mesh.pp": 2}), False))
        assert ("set train.microbatches ≥ 2" in text) is warned
    assert "bubble 50.0 %" in text and "2 stages, 1 microbatches in 5 ticks" in text


@pytest.mark.aot
def test_a_compiled_pipeline_sends_bfloat16_beside_work() -> None:
    c = setting("dit", **{"mesh.pp": 2, "mesh.tp": 2, "model.dtype": "bfloat16"})
    e = standard(c)
    mesh = make_mesh(e.degrees, aot.topology_devices("v5e:2x2"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        p = TrainStep(e, mesh)
        state, batch = p.abstract_arguments()
        noised = jax.eval_shape(p.corrupt, batch, jax.random.key(0))
        found = aot.compile(jax.jit(p.grads).lower(state.variables, noised))
    assert not mismatches(closed.traffic(p), sent_by(p, found))
    sends = dry_run._sends_line(p, found)
    assert "2 in the program, 2 of them asynchronous" in sends
    assert "between start and done of 2, a product of an operation of 0" in sends
