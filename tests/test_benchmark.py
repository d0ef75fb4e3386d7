"""The yardstick computes what fdp computes, and the benchmark's verdict follows from its
numbers.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pipeline, plain_transformer, speculative, step, ttt
from fdp.mesh import make_mesh
from fdp.step import TrainStep

pytestmark = pytest.mark.fast

TINY = {
    "layers": 3,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 48,
    "vocab": 64,
    "seq_len": 16,
    "batch": 4,
}


def test_plain_transformer_has_fdps_loss_and_gradients() -> None:
    c = step.benchmark_config(TINY)
    sides = step.build(c)
    program = TrainStep(step.experiment(c), make_mesh(c.mesh))
    noised = program.corrupt(sides["fdp"].batch, jnp.int32(0))
    variables = sides["fdp"].state.variables
    want_loss, want, _ = jax.device_get(jax.jit(program.grads)(variables, noised))
    value_and_grad = jax.jit(jax.value_and_grad(plain_transformer.loss), static_argnums=(2, 3))
    params, tokens_BxL = sides["plain"].state[0], sides["plain"].batch
    loss, grads = jax.device_get(value_and_grad(params, tokens_BxL, step.BOS, c.model.rope_base))
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(want)
    for (path, got), expected in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want), strict=True
    ):
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error <= 1e-5, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def test_both_sides_train_alike() -> None:
    sides = step.build(step.benchmark_config(TINY))
    for side in sides.values():
        side.compile()
    losses = {name: [side.step()[1] for _ in range(5)] for name, side in sides.items()}
    assert losses["fdp"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["fdp"][-1] < losses["fdp"][0]


def test_measure_returns_every_figure_and_restores_the_cache_switch() -> None:
    before = jax.config.jax_enable_compilation_cache
    result = step.measure(step.benchmark_config(TINY), pairs=4, warmup=1, compiles=1)
    assert jax.config.jax_enable_compilation_cache == before
    assert result.compile_s.keys() == result.step_s.keys() == {"fdp", "plain"}
    assert all(s.shape == (4,) and (s > 0).all() for s in result.step_s.values())
    assert all(0 < s < 600 for s in result.compile_s.values())
    assert result.ci[0] <= result.ratio <= result.ci[1]
    layer = 32 * (4 + 2 * 2 + 4) * 8 + 3 * 32 * 48 + 2 * 32
    assert result.parameters == 2 * 64 * 32 + 32 + 3 * layer
    assert "fdp / plain" in result.table()


@pytest.mark.parametrize(("factor", "verdict", "status"), [(1.02, "holds", 0), (1.10, "fails", 1)])
def test_verdict_follows_the_ratio_under_a_neighbours_load(
    monkeypatch, factor, verdict, status
) -> None:
    rng = np.random.default_rng(0)
    load = 1 + rng.exponential(2.0, 60)  # shared by a pair
    fdp, plain = (f * load * rng.normal(1, 0.01, 60) for f in (factor, 1.0))
    fdp[::10] *= 5  # spikes that hit one side only
    ratio, ci = step.paired_ratio(fdp, plain)
    assert ratio == pytest.approx(factor, rel=0.01)
    result = step.Result(1, {"fdp": 1.0, "plain": 1.0}, {"fdp": fdp, "plain": plain}, ratio, ci)
    assert result.verdict == verdict
    monkeypatch.setattr(step, "measure", lambda *_: result)
    assert step.main(["--steps=60"]) == status


def test_an_interval_across_the_limit_is_undecided_and_no_failure() -> None:
    times = {"fdp": np.array([1.0, 1.2]), "plain": np.ones(2)}
    result = step.Result(
        1, {"fdp": 1.0, "plain": 1.0}, times, *step.paired_ratio(times["fdp"], times["plain"])
    )
    assert result.verdict.startswith("undecided")


def test_parting_losses_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(plain_transformer, "rms_norm", lambda x, scale: x * scale)
    monkeypatch.setattr(step, "no_compilation_cache", contextlib.nullcontext)  # no time is read
    with pytest.raises(RuntimeError, match="not the same computation"):
        step.measure(step.benchmark_config(TINY), pairs=1, compiles=1)


def test_first_step_reports_its_stages_in_order() -> None:
    ends = step.first_step()
    assert tuple(ends) == step.STAGES
    assert list(ends.values()) == sorted(ends.values())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--repeats=1", "--repeats=1 rounds: at least 2"),
        ("--batch=0", "--batch=0 images are no multiple of 8"),
        ("--batch=7", "--batch=7 images are no multiple of 8"),
    ],
)
def test_a_benchmark_of_nothing_is_refused(args: str, said: str, capsys) -> None:
    with pytest.raises(SystemExit):
        pipeline.main([args])
    assert said in capsys.readouterr().err


def test_prompts_of_any_length_share_one_program() -> None:
    verifier = speculative.Verifier.of(step.benchmark_config(TINY | {"layers": 1}))
    rows, good = speculative.programs(verifier)
    assert good and rows[0][1:] == ("1", "= 1")
    assert [row[0] for row in speculative.knee(verifier, 1, (1,))] == ["call on 1 states, ms"]


@pytest.mark.slow
def test_every_figure_of_speculation_is_printed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(speculative, "SIZE", TINY)
    speculative.main(["--repeats=2"])  # limits are for larger sizes: a tiny call is all overhead
    said = capsys.readouterr().out
    assert "8 states / 1" in said and "tokens a second on one cpu" in said
    assert said.count("round / bare call") == 3 and "not measured: no GPU" in said


@pytest.mark.parametrize("muon", [False, True], ids=["plain", "muon"])
def test_the_plain_scan_is_the_same_computation(muon: bool) -> None:
    read, weights = ttt.lact_arrays(24, 2, 4, 8)
    ours, plain = (jax.jit(f, static_argnums=(0, 1)) for f in (ttt.ours, ttt.plain))
    arrays = (*read, *weights)
    want, got = plain(8, muon, *arrays), ours(8, muon, *arrays)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    still = ours(8, muon, *read._replace(rates=0 * read.rates), *weights)
    assert np.abs(got - still).max() > 1e-4  # it learns


def test_a_row_is_judged_by_its_median() -> None:
    ratios = np.array([1.0, 1.04, 9.0])
    assert ttt.Judged("", "", ratios, 1.05).holds and ttt.Judged("", "", ratios, 1, True).holds
    assert not ttt.Judged("", "", ratios, 1.03).holds
    assert ttt.Judged("a", "b", ratios[:1], 5, True).cells() == ("a", "b", "1.000", "≥ 5", "fails")
    with pytest.raises(SystemExit):
        ttt.main(["--repeats=0"])
    with pytest.raises(SystemExit):
        speculative.main(["--repeats=1"])
