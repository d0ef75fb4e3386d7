"""Topic 1: conformance tests T1.1 to T1.5 of the selective sums, the policies' bytes, the
estimators, the int8 sum.

Legend: B sequences, L positions, R rows, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import PartitionSpec as P

from fdp import config, sharding
from fdp.arm import Arm
from fdp.collectives import shard_map
from fdp.count import hlo
from fdp.count.compare import outcome, sent
from fdp.data.batches import Arrays, blank
from fdp.experiment import Experiment, standard
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models import module
from fdp.parallel.tensor import cross_entropy, suppress
from fdp.parallel.wire import int8_psum, quantise
from fdp.sampling.masked import reveal
from fdp.sampling.noise import Draw, categorical, categorical_confidence, position_keys
from fdp.step import TrainStep
from fdp.topics.parallel_dlm import checks, estimators, figures, pareto, rows
from fdp.topics.parallel_dlm.selective import Policy, Step, capacities, forward

L = 16


def tiny(**overrides: object) -> Experiment:
    c = config.base()
    c.model.update(layers=3, width=32, heads=8, kv_heads=8, head_dim=4, ffn=64, vocab=32)
    c.data.seq_len, c.train.batch = L, 8
    c.update_from_flattened_dict(overrides)
    return standard(c, blank(L, 31))


@functools.cache
def an_arm() -> Arm:
    """With initial parameters made large enough for sharp distributions, as if trained."""
    e = tiny()
    arm = Arm.of("mdlm", e, make_mesh(e.degrees, jax.devices()[:1]))
    state = arm.init()
    arm.keep(state.replace(params=jax.tree.map(lambda p: 1.3 * p, state.params)))
    return arm


def variables() -> Any:
    return {"params": an_arm().trained_on_host.params, "state": {}}


def run(policy: Policy, per_step: int = 1, tp: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """(ids, comparison with exact sums) of eight sequences on a mesh of `tp` devices."""
    arm = an_arm()
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp, "dp": 8 // tp})
    specs = arm.program.specs.specs
    params = jax.device_put(arm.trained_on_host.params, sharding.shardings(mesh, specs))
    key = jax.random.key_data(jax.random.key(0))
    ids, sums = pareto.sampler(arm, mesh, policy, per_step)(params, key, jnp.arange(8))
    return np.asarray(ids), np.asarray(sums)


# T1.1, T1.2, T1.3: training
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_loss_and_gradients_equal_one_device_for_every_tp(tp: int) -> None:
    batch = {"tokens": np.random.default_rng(0).integers(0, 30, (8, L), np.int32)}
    whole = outcome(an_arm().program, variables(), batch)
    e = tiny(**{"mesh.tp": tp})
    split = outcome(TrainStep(e, make_mesh(e.degrees)), variables(), batch)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(split.grads), jax.tree.leaves(whole.grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.fast
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_vocabulary_parallel_loss_is_the_sum_of_shards_done_by_hand(tp: int) -> None:
    rng = np.random.default_rng(tp)
    logits, targets = rng.normal(0, 3, (5, 32)).astype(np.float32), rng.integers(0, 32, 5)
    shards = np.split(logits.astype(np.float64), tp, axis=1)
    top = np.max([s.max(1) for s in shards], 0)
    exponentials = sum(np.exp(s - top[:, None]).sum(1) for s in shards)
    width = 32 // tp
    picked = sum(
        np.where(targets // width == r, s[np.arange(5), targets % width] - top, 0.0)
        for r, s in enumerate(shards)
    )
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp})
    ours = shard_map(cross_entropy, mesh, (P(None, "tp"), P()), P())(
        jnp.asarray(logits), jnp.asarray(targets)
    )
    np.testing.assert_allclose(ours, np.log(exponentials) - picked, rtol=1e-5)


def test_masked_rows_head_is_the_full_head_on_those_rows() -> None:
    arm = an_arm()
    batch = {"tokens": np.random.default_rng(1).integers(0, 30, (8, L), np.int32)}
    noised = arm.program.corrupt(batch, jax.random.key(3))
    logits, _, _ = module.run(arm.model, variables(), noised)
    full = arm.objective.loss(logits, noised["rows"])
    saving = checks.head_saving(arm.program, batch)
    assert saving.loss_error < 1e-6
    assert saving.masked.flops < saving.whole.flops
    assert saving.flops / saving.full_flops <= 0.6
    assert float(full[noised["rows"]["weights"] == 0].sum()) == 0


# T1.4: selective sums
# -------------------------------------------------------------------------------------------------


def outputs(
    policy: Policy, changed: np.ndarray, read: np.ndarray, steps: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Activations of exact sums and of `policy` in the step after `changed` tokens became others,
    on tp = 8.
    """
    arm = an_arm()
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": 8})
    rng = np.random.default_rng(0)
    before = jnp.asarray(rng.integers(0, 30, changed.shape, np.int32))
    after = jnp.where(changed, (before + 7) % 30, before)
    per_step = max(1, int(read.sum(1).max()))

    def f(
        params: object, old: jax.Array, new: jax.Array, changed: jax.Array, read: jax.Array
    ) -> tuple:
        step = Step(changed, read, jnp.int32(steps - 1))
        _, cache = forward(arm.model, params, old, None, policy, per_step, None)
        x, _ = forward(arm.model, params, new, cache, policy, per_step, step)
        exact, _ = forward(arm.model, params, new, None, Policy("exact", "exact"), per_step, None)
        return exact, x

    specs = (arm.program.specs.specs, *[P(BATCH_AXES)] * 4)
    each = P(BATCH_AXES, None, "tp")  # every device's own activations, side by side
    program = jax.jit(shard_map(f, mesh, specs, (each, each)))
    exact, x = program(
        arm.trained_on_host.params, before, after, jnp.asarray(changed), jnp.asarray(read)
    )
    return np.asarray(exact), np.asarray(x)


def rows_of(*columns: int) -> np.ndarray:
    flags = np.zeros((4, L), bool)
    flags[:, list(columns)] = True
    return flags


@pytest.mark.parametrize("rule", ["drift", "attention", "window"])
def test_everything_selected_is_exact_bit_for_bit(rule: str) -> None:
    exact, x = outputs(Policy("all", rule=rule, rows=1.0, lean=False), rows_of(3), rows_of(9))
    np.testing.assert_array_equal(x, exact)


def test_lean_sums_are_exact_on_the_rows_that_are_read_and_only_there() -> None:
    exact, x = outputs(Policy("lean", rows=1.0), rows_of(3), rows_of(9))
    np.testing.assert_array_equal(x[:, 9], exact[:, 9])
    assert np.abs(x[:, 4] - exact[:, 4]).max() > 1e-4


def test_nothing_selected_without_refresh_is_stale_and_fewer_rows_are_worse() -> None:
    errors = []
    for policy in (Policy("stale", "stale"), Policy("few", rows=0.25), Policy("most", rows=0.75)):
        exact, x = outputs(policy, rows_of(3), rows_of(9))
        errors.append(float(np.abs(x[:, 9] - exact[:, 9]).max()))
    assert errors[0] > errors[1] > errors[2] > 0


def test_devices_of_a_group_agree_on_a_row_that_was_sent() -> None:
    _, x = outputs(Policy("few", rows=0.25), rows_of(3), rows_of(9))
    devices = x.reshape(4, L, 8, -1)
    np.testing.assert_array_equal(devices[:, 9], np.repeat(devices[:, 9, :1], 8, 1))
    assert (
        np.abs(np.diff(devices[:, 12], axis=1)).max() > 0
    )  # an unsent row forks: it must never be sampled from


@pytest.mark.parametrize(
    "policy", [Policy("K1", "stale", refresh=1), Policy("K1 rows", rows=0.25, refresh=1)]
)
def test_refresh_in_every_step_is_exact(policy: Policy) -> None:
    ids, sums = run(policy)
    np.testing.assert_array_equal(ids, run(Policy("exact", "exact"))[0])
    assert abs(sums[1, 0]) < 1e-5 * sums[1, 2]
    assert sums[1, 1] == sums[1, 2]


@pytest.mark.parametrize("per_step", [1, 4])
def test_exact_policies_draw_the_ids_of_the_core_sampler(per_step: int) -> None:
    arm = an_arm()
    given = jax.tree.map(jnp.asarray, variables())
    denoise = lambda z, noise: module.run(arm.model, given, {"inputs": z, "noise": noise})[0]
    asked = Draw(jax.random.key(0), jnp.arange(8), L, 30)
    ids, _ = reveal(denoise, asked, order="random", per_step=per_step)
    for policy in (Policy("exact", "exact"), Policy("read rows", rows=1.0)):
        for tp in (1, 2, 8):
            np.testing.assert_array_equal(run(policy, per_step, tp)[0], ids)


def test_drift_keeps_the_distributions_that_are_read() -> None:
    stale, few, int8 = (
        run(p, 2)[1]
        for p in (
            Policy("stale", "stale", refresh=3),
            Policy("few", rows=0.4),
            Policy("int8", rows=0.8, int8=True),
        )
    )
    kl = [s[0, 0] / s[0, 2] for s in (stale, few, int8)]
    assert kl[0] > 2 * kl[1] > 0
    assert kl[1] > 2 * kl[2] > 0


def test_channels_take_turns() -> None:
    _, sums = run(Policy("channels", "channels", refresh=2))
    assert sums[0, 0] / sums[0, 2] > 1e-4
    with pytest.raises(ValueError, match="not divisible by refresh = 3"):
        outputs(Policy("channels", "channels", refresh=3), rows_of(3), rows_of(9))


# Bytes
# -------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_shares_of_bytes_follow_from_the_rows_that_are_sent() -> None:
    arm = an_arm()
    D, sites, steps = arm.model.shape.width, 2 * arm.model.shape.layers + 1, L
    share = lambda policy: pareto.share_of_bytes(arm, policy, 1)
    assert share(Policy("exact", "exact")) == 1
    assert share(Policy("stale", "stale", refresh=4)) == pytest.approx(1 / 4)
    assert share(Policy("channels", "channels", refresh=4)) == pytest.approx(
        (1 + (steps - 1) / 4) / steps
    )
    # Embedding and last layer send the one changed or read row of each sequence, the other sites
    # half of the rows.
    later = (3 * 1 / L + (sites - 3) / 2) / sites
    drift = 4 / (2 * D) * (sites - 3) / sites
    assert share(Policy("drift", rows=0.5)) == pytest.approx(
        (1 + (steps - 1) * (later + drift)) / steps
    )
    mass = drift / 2  # once a layer
    attention = share(Policy("mass", rule="attention", rows=0.5))
    assert attention == pytest.approx((1 + (steps - 1) * (later + mass)) / steps)
    assert share(Policy("int8", "exact", int8=True)) == pytest.approx((1 + 2 * 8 / D) / 2)


def test_compiled_program_sends_what_the_count_says() -> None:
    arm = an_arm()
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": 8})
    policy = Policy("drift", rows=0.5)

    def f(params: object, z: jax.Array, changed: jax.Array, read: jax.Array) -> jax.Array:
        _, cache = forward(arm.model, params, z, None, policy, 1, None)
        return forward(arm.model, params, z, cache, policy, 1, Step(changed, read, jnp.int32(1)))[0]

    flags = jnp.zeros((8, L), bool)
    program = jax.jit(
        shard_map(f, mesh, (arm.program.specs.specs, *[P()] * 3), P(None, None, "tp"))
    )
    given = arm.trained_on_host.params, jnp.zeros((8, L), jnp.int32), flags, flags
    wire = sum(sent(program.lower(*given).compile(), mesh).values())
    rows, D, layers = 8 * L, 32, 3
    all_reduce = lambda n, width: 2 * 7 / 8 * 4 * n * width
    scores = all_reduce(rows, 1) * 2 * (layers - 1)
    later = sum(all_reduce(n, D) for n in (8, *[rows / 2] * 2 * (layers - 1), 8, 8)) + scores
    assert wire == all_reduce(rows, D) * (2 * layers + 1) + later


@pytest.mark.fast
def test_sequence_parallelism_sends_the_same_bytes() -> None:
    # Half an all-reduce after the embedding, a whole one around each sublayer, half of one before
    # the head.
    assert pareto.sequence_parallel_share(an_arm()) == pytest.approx(1)


@pytest.mark.fast
def test_a_policy_that_cannot_hold_what_must_be_sent_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rows·B·L = 0.1·512 = 51 rows cannot hold .* 2·32: set rows=0.125"
    ):
        capacities(Policy("few", rows=0.1), 4, 512, 4, 64)
    assert capacities(Policy("half", rows=0.5), 3, 512, 4, 64) == [32, 256, 256, 32]
    assert capacities(Policy("half", rows=0.5, lean=False), 3, 512, 4, 64) == [32, 256, 256, 256]


@pytest.mark.fast
@pytest.mark.parametrize(
    "wrong",
    [{"kind": "row"}, {"rule": "drfit"}, {"rows": 1.5}, {"kind": "channels"}, {"refresh": -1}],
)
def test_a_policy_of_unknown_words_or_impossible_numbers_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="policy 'p'"):
        Policy("p", **wrong)


@pytest.mark.fast
def test_policies_are_chosen_by_name_and_uneven_steps_are_refused() -> None:
    assert pareto.chosen(()) == pareto.POLICIES
    assert [p.name for p in pareto.chosen(("int8", "exact"))] == ["int8", "exact"]
    with pytest.raises(ValueError, match="length 16 is not divisible by per_step = 3"):
        pareto.sampler(an_arm(), make_mesh(dict.fromkeys(AXES, 1)), Policy("exact", "exact"), 3)


# T1.5: ids on the wire
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_token_and_confidence_do_not_depend_on_the_shards(tp: int) -> None:
    logits = suppress(
        jnp.asarray(np.random.default_rng(0).normal(0, 2, (4, 64, 32)), jnp.float32), 30
    )
    keys = position_keys(jax.random.key(5), jnp.arange(4), 0, jnp.arange(64))
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp})
    token, sure = shard_map(categorical_confidence, mesh, (P(), P(None, None, "tp")), (P(), P()))(
        keys, logits
    )
    np.testing.assert_array_equal(token, categorical(keys, logits))
    np.testing.assert_allclose(sure, jax.nn.softmax(logits).max(-1), rtol=1e-6)


@pytest.mark.fast
def test_drawn_tokens_follow_the_softmax() -> None:
    logits = jnp.asarray([1.0, 0.0, -1.0, 2.0, -3.0])
    keys = position_keys(jax.random.key(1), jnp.arange(100), 0, jnp.arange(100))
    tokens, _ = categorical_confidence(keys, jnp.broadcast_to(logits, (100, 100, 5)))
    expected = scipy.special.softmax(np.asarray(logits, float)) * tokens.size
    assert scipy.stats.chisquare(np.bincount(np.ravel(tokens), minlength=5), expected).pvalue > 1e-3
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        categorical_confidence(keys, jnp.zeros((100, 100, 5)), -1.0)


def test_sampling_sends_a_thousandth_of_the_logits() -> None:
    found = checks.sampling_bytes(4)
    assert found.scalars == 2 * 3 / 4 * 4 * checks.ROWS * 4  # four scalars a row, all-reduced
    assert found.gather == 3 / 4 * 4 * checks.ROWS * checks.V_WIDE


# Estimators and int8
# --------------------------------------------------------------------------------------------------


def test_scatter_tells_the_estimators_apart() -> None:
    ids = np.random.default_rng(0).integers(0, 30, (8, L)).astype(np.int32)
    arm, val = an_arm(), Arrays({"tokens": ids}, "random ids", "draw more")
    data = dataclasses.replace(arm.data, train=val, val=val)
    arm.experiment = dataclasses.replace(arm.experiment, data=data)
    found = estimators.scatter(arm, 40)
    assert {name: x.shape for name, x in found.losses.items()} == dict.fromkeys(
        estimators.ESTIMATORS, (40,)
    )
    assert found.variance(estimators.BASELINE) > 2 * found.variance(estimators.METHOD)
    assert abs(estimators.z_score([found])) < 4
    biased = estimators.Scatter(
        found.losses | {estimators.METHOD: 1.5 * found.losses[estimators.METHOD]}
    )
    assert abs(estimators.z_score([biased])) > 4


@pytest.mark.parametrize("tp", [2, 8])
def test_int8_sum_is_near_and_sends_a_quarter(tp: int) -> None:
    x = np.random.default_rng(0).normal(0, 1, (tp, 6, 64)).astype(np.float32)
    x[:, 0] = 0
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp})
    run = jax.jit(shard_map(lambda a: int8_psum(a[0], "tp")[None], mesh, P("tp"), P("tp")))
    summed = np.asarray(run(x))
    exact = x.sum(0)
    np.testing.assert_array_equal(
        summed, np.broadcast_to(summed[:1], summed.shape)
    )  # all devices hold the same sum
    assert np.abs(summed[0] - exact).max() <= (tp + 1) / 2 * 1.02 * np.abs(x).sum(0).max() / 127
    assert np.abs(summed[0] - exact).max() > 0
    assert not summed[0, 0].any()
    text = run.lower(x).compile().as_text()
    sent = sum(
        x.wire_bytes * x.count for x in hlo.collectives(text, dict(mesh.shape)) if x.dtype == "s8"
    )
    assert sent == 2 * (tp - 1) / tp * 6 * 64


@pytest.mark.fast
def test_int8_never_clips_and_refuses_uneven_chunks() -> None:
    x = jnp.asarray(
        np.random.default_rng(0).normal(0, 1, (1000, 8)) * 10.0 ** np.arange(-4, 4), jnp.float32
    )
    q, scale = quantise(x)
    assert (np.abs(np.asarray(x)).max(1) <= 127.001 * np.asarray(scale, np.float32)).all()
    assert np.abs(np.asarray(q)).max() <= 127
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": 4})
    with pytest.raises(ValueError, match="width 6 is not divisible by the 4 devices"):
        shard_map(lambda a: int8_psum(a, "tp"), mesh, P(), P())(jnp.zeros((2, 6)))


@pytest.mark.fast
def test_heads_that_eight_devices_cannot_share_leave_the_switch_undecided_and_say_why() -> None:
    row = rows.indivisible_heads(12, 4)
    assert row.verdict == "not testable here" and "heads % tp = 12 % 8" in row.note


@pytest.mark.fast
def test_a_picture_of_a_sample_draws_no_control_character_and_no_formula() -> None:
    assert figures.printable("a\n$\x01é") == r"a⏎\$·é"
