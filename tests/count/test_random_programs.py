"""Formulas against compiled programs on random configs, and that a wrong formula is noticed."""

import dataclasses
import math

import jax
import pytest

from fdp import config
from fdp.count import bytes as closed
from fdp.count import flops, hlo, jaxpr
from fdp.count import random_programs as counts
from fdp.count.counts import GATHER, REDUCE, SCATTER, Counts, Ledger
from fdp.count.random_programs import ProgramCheck
from fdp.mesh import make_mesh
from fdp.models.layers import Head, RMSNorm
from fdp.step import TrainStep

SEED = (
    53  # its first six configs use every axis, ZeRO stage, kind of remat and sequence parallelism
)


@pytest.fixture(scope="module")
def six() -> list[tuple]:
    """(program, comparison); the first with memory."""
    drawn = map(counts.experiment, counts.random_configs(SEED, 6))
    return [
        (TrainStep(e, make_mesh(e.degrees)), counts.compare(e, memory=i == 0))
        for i, e in enumerate(drawn)
    ]


@pytest.mark.fast
def test_random_configs_are_valid_small_varied_and_reproducible() -> None:
    drawn = counts.random_configs(0, 200)
    for c in drawn:
        config.validate(c)
        assert math.prod(c.mesh.values()) <= 8 and c.mesh.pp == 1
        assert 16 <= c.model.width <= 64 and c.model.layers in (1, 2)
    again = [config.flatten(c) for c in counts.random_configs(0, 20)]
    assert [config.flatten(c) for c in drawn[:20]] == again
    assert config.flatten(drawn[0]) != config.flatten(counts.random_configs(1, 1)[0])
    for read, values in (
        (lambda c: c.objective.name, set(config.TOKEN_OBJECTIVES)),
        (lambda c: c.train.zero, {0, 1, 3}),
        (lambda c: c.model.remat, {"none", "dots", "full"}),
        (lambda c: c.train.microbatches, {1, 2, 3}),
        (lambda c: c.model.sequence_parallel, {False, True}),
        (lambda c: c.model.time_conditioning, {False, True}),
        (lambda c: c.model.heads // c.model.kv_heads, {1, 2}),
    ):
        assert {read(c) for c in drawn} == values
    for axis in ("dp", "ep", "cp", "tp"):
        assert {1, 2, 3, 4, 8} == {c.mesh[axis] for c in drawn}
    assert all(math.prod(c.mesh.values()) <= 2 for c in counts.random_configs(0, 20, devices=2))


@pytest.mark.fast
@pytest.mark.parametrize("bad", [{"count": 0}, {"count": 1, "devices": 0}])
def test_nothing_to_draw_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        counts.random_configs(0, **bad)


@pytest.mark.fast
def test_configs_that_cannot_be_counted_are_refused() -> None:
    (c,) = counts.random_configs(0, 1)
    c.model.dtype = "bfloat16"
    with pytest.raises(ValueError, match="XLA:CPU widens"):
        counts.compare(counts.experiment(c))
    with pytest.raises(ValueError, match="at least one config"):
        counts.summarise([])


@pytest.mark.fast
def test_summary_of_known_comparisons() -> None:
    key, other = ("all-reduce", ("dp",)), ("all-gather", ("tp",))
    right = ProgramCheck({key: 8.0}, {key: 8.0}, 100, 100, 90, 100)
    wrong = ProgramCheck({key: 8.0}, {key: 9.0, other: 1.0}, 102, 100, 130, 100)
    bare = ProgramCheck({}, {}, 99, 100)
    assert (
        [m.key for m in wrong.mismatches()] == [other, key]
        and not right.mismatches()
        and bare.memory_error is None
    )
    got = counts.summarise([right, wrong, bare])
    assert dataclasses.astuple(got)[:4] == (3, 3, 2, 1)
    assert got.flops_error == pytest.approx(0.02)
    assert (got.memory_configs, got.memory_error, got.memory_error_max) == pytest.approx(
        (2, 0.2, 0.3)
    )
    assert math.isnan(counts.summarise([bare]).memory_error)


@pytest.mark.fast
def test_bytes_and_flops_of_random_configs_equal_the_compiled_program(six: list) -> None:
    for p, got in six:
        assert not got.mismatches(), (p.experiment.degrees, got)
        assert got.formula_flops == got.counted_flops
    assert sum(got.entries for _, got in six) >= 12
    first = six[0][1]
    assert abs(first.memory_error) < 0.6 and all(got.memory_error is None for _, got in six[1:])


def with_formula(p, got: ProgramCheck) -> ProgramCheck:
    """The comparison with the formulas, as they are now, evaluated again."""
    formula = dict(closed.traffic(p))
    return dataclasses.replace(got, formula=formula, formula_flops=flops.executed(p))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("op", "axis"),
    [(REDUCE, a) for a in ("dp", "ep", "cp", "tp")]
    + [(op, a) for op in (GATHER, SCATTER) for a in ("dp", "cp", "tp")],
)
def test_a_term_of_the_formula_that_is_off_by_four_bytes_is_noticed(
    op: str, axis: str, six, monkeypatch
) -> None:
    put = Ledger.put

    def off(self, kind, axes, wire):
        return put(self, kind, axes, wire + 4 * (kind == op and axis in axes))

    assert not any(with_formula(*pair).mismatches() for pair in six)
    monkeypatch.setattr(Ledger, "put", off)
    assert any(with_formula(*pair).mismatches() for pair in six)


@pytest.mark.fast
def test_missing_terms_are_noticed(six: list, monkeypatch) -> None:
    monkeypatch.setattr(RMSNorm, "counts", lambda *args: Counts())
    assert any(with_formula(*pair).mismatches() for pair in six)
    monkeypatch.setattr(Head, "counts", lambda *args: Counts())
    assert all(with_formula(*pair).flops_error > 0.01 for pair in six)


@pytest.mark.fast
def test_what_xla_merges_in_one_layer_the_program_itself_still_asks_for() -> None:
    """Configs that `random_configs` leaves out: the formula equals the jaxpr, which no compiler has
    touched.
    """
    c = next(c for c in counts.random_configs(SEED, 60) if _rich(c))
    c.model.layers = 1
    assert counts._merged(c)
    p = TrainStep(counts.experiment(c), make_mesh(c.mesh))
    state, batch = p.abstract_arguments()
    noised = jax.eval_shape(p.objective.corrupt, jax.random.key(0), batch)
    program = jax.make_jaxpr(p.grads)(state.variables, noised)
    asked = hlo.summary(jaxpr.collectives(program, dict(p.mesh.shape)))
    want = dict(closed.traffic(p))
    assert {k: wire for k, (_, _, wire) in asked.items() if wire} == pytest.approx(want)


def _rich(c) -> bool:
    return (
        c.model.layers == 2
        and c.model.remat != "none"
        and c.train.zero == 3
        and c.mesh.dp > 1
        and c.mesh.tp > 1
    )


@pytest.mark.slow
def test_a_hundred_random_configs() -> None:
    got = counts.summary(counts.random_configs(0, 100))
    assert got.configs == 100 and got.entries > 200
    assert got.mismatches == 0
    assert got.flops_error <= 0.01
    assert got.memory_configs == 10 and got.memory_error_max < 0.6
