"""Topic 1, selective sums (T1.4): exact where they must be, drawn ids, bytes of every policy.

Legend: B sequences, L positions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp import sharding
from fdp.collectives import shard_map
from fdp.count.compare import sent
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models import module
from fdp.sampling.masked import reveal
from fdp.sampling.noise import Draw
from fdp.topics.parallel_dlm import policies
from fdp.topics.parallel_dlm.selective import Policy, StepRows, capacities, forward
from tests.topics.parallel_dlm.arms import IDS, L, an_arm

EXACT, READ = Policy("exact", "exact"), Policy("read rows", rows=1.0)
FEW = Policy("few", rows=0.25)
RULES = {r: Policy(r, rule=r, rows=1.0, lean=False) for r in ("drift", "attention", "window")}
OTHERS = {p.name: p for p in (READ, Policy("stale", "stale"), FEW, Policy("most", rows=0.75))}
CHANGED, IS_READ = 3, 9


@functools.cache
def run(policy: Policy, per_step: int = 1, tp: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(ids, comparison with exact sums) of eight sequences on a mesh of `tp` devices."""
    arm = an_arm()
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": tp, "dp": 8 // tp})
    specs = arm.program.specs.specs
    params = jax.device_put(arm.trained_on_host.params, sharding.shardings(mesh, specs))
    key = jax.random.key_data(jax.random.key(0))
    ids, sums = policies.sampler(arm, mesh, policy, per_step)(params, key, jnp.arange(8))
    return np.asarray(ids), np.asarray(sums)


@functools.cache
def activations() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Exact activations, and those of every policy above, of each device on tp = 8 after one token
    changed and while one is read: one program, since the first pass is the same for all."""
    arm = an_arm()
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"tp": 8})
    changed, read = (jnp.zeros((4, L), bool).at[:, i].set(True) for i in (CHANGED, IS_READ))
    before = jnp.asarray(np.random.default_rng(0).integers(0, IDS, (4, L), np.int32))
    after = jnp.where(changed, (before + 7) % IDS, before)

    def f(params: Any, old: jax.Array, new: jax.Array, changed: jax.Array, read: jax.Array) -> Any:
        step = StepRows(changed, read, jnp.int32(1))
        _, cache = forward(arm.model, params, old, None, EXACT, 1, None)
        exact, _ = forward(arm.model, params, new, None, EXACT, 1, None)
        every = (RULES | OTHERS).values()
        found = [forward(arm.model, params, new, cache, p, 1, step)[0] for p in every]
        return exact, dict(zip(RULES | OTHERS, found, strict=True))

    specs = (arm.program.specs.specs, *[P(BATCH_AXES)] * 4)
    side_by_side = P(BATCH_AXES, None, "tp")
    program = jax.jit(shard_map(f, mesh, specs, side_by_side))
    given = arm.trained_on_host.params, before, after, changed, read
    return jax.device_get(program(*given))


# Activations
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_everything_selected_is_exact_bit_for_bit(rule: str) -> None:
    exact, found = activations()
    np.testing.assert_array_equal(found[rule], exact)


def test_lean_sums_are_exact_on_the_rows_that_are_read_and_only_there() -> None:
    exact, found = activations()
    np.testing.assert_array_equal(found["read rows"][:, IS_READ], exact[:, IS_READ])
    assert np.abs(found["read rows"][:, 4] - exact[:, 4]).max() > 1e-4


def test_nothing_selected_without_refresh_is_stale_and_fewer_rows_are_worse() -> None:
    exact, found = activations()
    off = [np.abs(found[n] - exact)[:, IS_READ].max() for n in ("stale", "few", "most")]
    assert off[0] > off[1] > off[2] > 0


def test_devices_of_a_group_agree_on_a_row_that_was_sent() -> None:
    devices = activations()[1]["few"].reshape(4, L, 8, -1)
    np.testing.assert_array_equal(devices[:, IS_READ], np.repeat(devices[:, IS_READ, :1], 8, 1))
    # A row that is not sent differs by device: it must never be sampled from.
    assert np.abs(np.diff(devices[:, 12], axis=1)).max() > 0


# Samples
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [Policy("K1", "stale", refresh=1), Policy("K1 rows", rows=0.25, refresh=1)]
)
def test_refresh_in_every_step_is_exact(policy: Policy) -> None:
    ids, sums = run(policy)
    np.testing.assert_array_equal(ids, run(EXACT)[0])
    assert abs(sums[1, 0]) < 1e-5 * sums[1, 2]
    assert sums[1, 1] == sums[1, 2]


@functools.cache
def core_ids(per_step: int) -> np.ndarray:
    """Of the core sampler on one device."""
    arm = an_arm()
    given = {"params": jax.tree.map(jnp.asarray, arm.trained_on_host.params), "state": {}}

    def denoise(z: jax.Array, noise: jax.Array) -> jax.Array:
        return module.run(arm.model, given, {"inputs": z, "noise": noise})[0]

    draw = Draw(jax.random.key(0), jnp.arange(8), L, IDS)
    return np.asarray(reveal(denoise, draw, order="random", per_step=per_step)[0])


# Every pair of a policy, a degree and a number of positions occurs.
@pytest.mark.parametrize(
    ("policy", "per_step", "tp"),
    [(EXACT, 1, 8), (EXACT, 4, 2), (EXACT, 1, 1), (READ, 4, 8), (READ, 1, 2), (READ, 4, 1)],
)
def test_exact_policies_draw_the_ids_of_the_core_sampler(
    policy: Policy, per_step: int, tp: int
) -> None:
    np.testing.assert_array_equal(run(policy, per_step, tp)[0], core_ids(per_step))


def test_drift_keeps_the_distributions_that_are_read() -> None:
    some = Policy("stale", "stale", refresh=3), Policy("few", rows=0.4)
    sums = [run(p, 2)[1] for p in (*some, Policy("int8", rows=0.8, int8=True))]
    kl = [s[0, 0] / s[0, 2] for s in sums]
    assert kl[0] > 2 * kl[1] > 0
    assert kl[1] > 2 * kl[2] > 0


def test_channels_take_turns() -> None:
    _, sums = run(Policy("channels", "channels", refresh=2))
    assert sums[0, 0] / sums[0, 2] > 1e-4
    with pytest.raises(ValueError, match="not divisible by refresh = 3"):
        policies.share_of_bytes(an_arm(), Policy("channels", "channels", refresh=3), 1)


# Bytes
# -------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_shares_of_bytes_follow_from_the_rows_that_are_sent() -> None:
    arm = an_arm()
    D, sites, steps = arm.model.shape.width, 2 * arm.model.shape.layers + 1, L
    share = functools.partial(policies.share_of_bytes, arm, per_step=1)
    assert share(EXACT) == 1
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
        return forward(
            arm.model, params, z, cache, policy, 1, StepRows(changed, read, jnp.int32(1))
        )[0]

    flags = jnp.zeros((8, L), bool)
    program = jax.jit(
        shard_map(f, mesh, (arm.program.specs.specs, *[P()] * 3), P(None, None, "tp"))
    )
    given = arm.trained_on_host.params, jnp.zeros((8, L), jnp.int32), flags, flags
    wire = sum(sent(program.lower(*given).compile(), mesh).values())
    rows, D, layers = 8 * L, 32, 2

    def all_reduce(n: float, width: int) -> float:
        return 2 * 7 / 8 * 4 * n * width

    scores = all_reduce(rows, 1) * 2 * (layers - 1)
    later = sum(all_reduce(n, D) for n in (8, *[rows / 2] * 2 * (layers - 1), 8, 8)) + scores
    assert wire == all_reduce(rows, D) * (2 * layers + 1) + later


@pytest.mark.fast
def test_sequence_parallelism_sends_the_same_bytes() -> None:
    # Half an all-reduce after the embedding, a whole one around each sublayer, half of one before
    # the head.
    assert policies.sequence_parallel_share(an_arm()) == pytest.approx(1)


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
    assert policies.chosen(()) == policies.POLICIES
    assert [p.name for p in policies.chosen(("int8", "exact"))] == ["int8", "exact"]
    with pytest.raises(ValueError, match="length 16 is not divisible by per_step = 3"):
        policies.sampler(an_arm(), make_mesh(dict.fromkeys(AXES, 1)), EXACT, 3)
