"""Speculative decoding: ids equal to those of the verifier alone whatever drafts, the law of rule
coupling by enumeration, and the counts.
"""

import functools
import hashlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdp.data.synthetic import MarkovChain
from fdp.objectives.noise_schedules import schedule
from fdp.sampling import masked
from fdp.sampling.chain import Ancestral, Chain, follow
from fdp.sampling.noise import Draw
from fdp.sampling.speculative import (
    JacobiDrafter,
    ModelDrafter,
    RefreshedDrafter,
    StaleDrafter,
    edit_distance,
    jump,
    speculate,
)
from tests.oracles import EnumerableJoint

pytestmark = pytest.mark.fast

MARKOV = MarkovChain(n=5, concentration=0.3)
JOINT = EnumerableJoint()
KEY = jax.random.key(11)
B, L, EOS = 10, 8, 2
PROMPT = np.full((B, L), 5)
PROMPT[:, 0] = np.arange(B) % 5
PROMPT[3, 4] = 1


def exact(z_BxL, noise_B):
    """The verifier: exact conditionals, with columns that must never be drawn."""
    return jnp.pad(MARKOV.denoiser(z_BxL), ((0, 0), (0, 0), (0, 2)), constant_values=9.0)


def mixed(z_BxL, noise_B):
    """Draft models, by sample: exact, blunt, constant, contrary and without numbers."""
    right = exact(z_BxL, noise_B)
    constant = jnp.zeros_like(right).at[..., 1].set(50.0)
    every = jnp.stack([right, 0.5 * right, constant, -right, jnp.full_like(right, jnp.nan)])
    return every[jnp.arange(len(z_BxL)) % 5, jnp.arange(len(z_BxL))]


def asked(temperature=1.0, start=None, trace=False):
    """What all tests of ids ask for."""
    return Draw(KEY, jnp.arange(20, 20 + B), L, 5, temperature, start, trace)


CHAINS = {
    "first_hitting": Chain(asked(), "random"),
    "entropy": Chain(asked(), "entropy"),
    "greedy": Chain(asked(0.0), "top_prob"),
    "threshold": Chain(asked(0.7, jnp.asarray(PROMPT)), "margin", threshold=0.4),
    "blocks": Chain(asked(1.0, jnp.asarray(PROMPT)), "random", per_step=2, block=4, eos=EOS),
    "ancestral": Ancestral(asked(), grid=11, schedule=schedule("linear", eps=0.0)),
    "left_to_right": Chain(asked(), "left_to_right", eos=EOS),
}


MODEL = ModelDrafter(mixed)
CORRECTED = JacobiDrafter(MODEL)


@functools.cache
def alone(name):
    """Ids of the verifier only."""
    return np.asarray(jax.jit(lambda: follow(CHAINS[name], exact)[0])())


@functools.cache
def drafted(name, drafter, window):
    """(ids, info) of a speculative run."""
    ids, info = jax.jit(lambda: speculate(CHAINS[name], exact, drafter, window=window))()
    return np.asarray(ids), jax.tree.map(np.asarray, info)


@pytest.mark.parametrize(
    ("name", "drafter"),
    [
        *((name, MODEL) for name in CHAINS),
        *((name, JacobiDrafter()) for name in ("threshold", "ancestral")),
        *((name, CORRECTED) for name in ("first_hitting", "blocks")),
        ("blocks", StaleDrafter()),
        ("greedy", RefreshedDrafter(exact)),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_whatever_drafts_the_ids_are_those_of_the_verifier_alone(name, drafter):
    ids, info = drafted(name, drafter, 4)
    np.testing.assert_array_equal(ids, alone(name))
    assert (ids < 5).all()
    most = CHAINS[name].steps
    assert (info["rounds"] >= 1).all() and (info["rounds"] <= most).all()
    assert info["nfe"] == info["rounds"].max() and info["states"] == 4 * info["rounds"].sum()
    assert (info["accepted"] <= info["judged"]).all()
    if isinstance(drafter, ModelDrafter):
        assert info["passes"] == 3 * info["nfe"]
        assert info["bad"].sum() > 0


@given(window=st.integers(1, 10), seed=st.integers(0, 3))
@settings(max_examples=2, deadline=None)
def test_windows_do_not_change_ids(window, seed):
    chain = replace(CHAINS["blocks"], draw=replace(asked(), key=jax.random.key(seed)))
    want, got = jax.jit(
        lambda: (
            follow(chain, exact)[0],
            speculate(chain, exact, JacobiDrafter(), window=window)[0],
        )
    )()
    np.testing.assert_array_equal(got, want)


def test_a_draft_that_is_the_verifier_is_accepted_throughout():
    _, info = drafted("first_hitting", MODEL, 4)
    assert (info["rounds"][::5] == -(-L // 4)).all()  # samples that the verifier drafts
    assert info["rounds"][3::5].mean() > 3  # those of its contrary
    assert (info["rounds"][4::5] == L).all()  # without numbers: one step a round


def test_steps_that_the_verifier_has_judged_are_drafted_by_what_it_drew():
    _, plain = drafted("first_hitting", MODEL, 4)
    _, info = drafted("first_hitting", CORRECTED, 4)
    assert (info["rounds"][::5] == -(-L // 4)).all()  # right ones stay
    assert info["rounds"][3::5].sum() < plain["rounds"][3::5].sum()  # contrary ones are corrected
    assert info["bad"].sum() > 0


def test_a_corrected_model_drafts_what_no_round_gave_and_nothing_past_the_end():
    _, info = drafted("first_hitting", JacobiDrafter(ModelDrafter(exact)), 5)
    assert (info["rounds"] == 2).all() and info["passes"] == 4 + 3


def test_early_ends_and_prompts_are_part_of_the_state():
    ids = alone("left_to_right")
    ended = (ids == EOS).any(1)
    assert ended.any()
    for row in ids[ended]:
        assert (row[row.tolist().index(EOS) :] == EOS).all()
    prompt = PROMPT[:, 0]
    np.testing.assert_array_equal(alone("blocks")[:, 0], prompt)
    with_end = alone("blocks")[prompt == EOS]
    assert (with_end != EOS).any()  # an end in the prompt ends nothing


def test_rounds_can_be_looked_at():
    chain = replace(CHAINS["first_hitting"], draw=asked(trace=True))
    info = jax.jit(lambda: speculate(chain, exact, StaleDrafter(), window=3)[1])()
    trace, taken = np.asarray(info["trace"]), np.asarray(info["taken"])
    assert trace.shape == (L, 3, B, L) and (trace[0, 0] == 5).all()
    rounds = int(info["nfe"])
    revealed = (trace[1:rounds, 0] != 5).sum(-1)
    np.testing.assert_array_equal(revealed, np.minimum((taken[: rounds - 1] + 1).cumsum(0), L))


# Laws
# -------------------------------------------------------------------------------------------------

MANY = 40_000


def joint(z_BxL, noise_B):
    """Exact conditionals of a joint of three states at four positions."""
    return JOINT.denoiser(z_BxL)


def law(ids):
    """Share of each of the 81 outcomes."""
    cells = np.asarray(ids) @ 3 ** np.arange(3, -1, -1)
    return np.bincount(cells, minlength=81) / len(ids)


def distance(ids):
    """(total variation from the joint, what that of as many exact draws is on average)."""
    p = JOINT.table.reshape(-1)
    noise = 0.5 * np.sqrt(2 * p * (1 - p) / (np.pi * len(ids))).sum()
    return 0.5 * np.abs(law(ids) - p).sum(), noise


def test_coupling_keeps_the_law_and_edit_distance_does_not():
    draw = Draw(jax.random.key(5), jnp.arange(MANY), 4, 3)
    blunt = ModelDrafter(lambda z, noise: 0.3 * joint(z, noise) + jnp.arange(3.0))

    @jax.jit
    def every():
        fine = Chain(draw, "random")
        coupled, info = speculate(fine, joint, blunt, window=3, rule="coupling")
        tolerances = [0, 1, 4]
        lossy = [jump(fine, joint, blunt, steps=2, tolerance=t, lossy=True)[0] for t in tolerances]
        return coupled, info, lossy

    coupled, info, lossy = every()
    far, noise = distance(coupled)
    assert far <= 1.5 * noise, (far, noise)
    assert info["accepted"].sum() < info["judged"].sum()
    for ids in lossy:
        assert distance(ids)[0] > 10 * noise


@given(
    a=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    b=st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
@settings(max_examples=20, deadline=None)
def test_edit_distance(a, b):
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b[1:]) + (a[0] != b[0]), slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    assert (
        int(edit_distance(jnp.array([a]), jnp.array([b]))[0])
        == functools.cache(lambda: slow(tuple(a), tuple(b)))()
    )


# What is refused
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "drafter", "options", "message"),
    [
        (
            "entropy",
            ModelDrafter(mixed),
            {"rule": "coupling"},
            "order 'entropy' chooses them by what",
        ),
        ("threshold", ModelDrafter(mixed), {"rule": "coupling"}, "with a threshold"),
        ("first_hitting", StaleDrafter(), {"rule": "coupling"}, "needs the law that drafts"),
        ("first_hitting", StaleDrafter(), {"rule": "greedy"}, "unknown rule 'greedy'"),
        ("first_hitting", StaleDrafter(), {"window": 0}, "set 1 or more"),
    ],
)
def test_what_cannot_be_judged_is_refused(chain, drafter, options, message):
    with pytest.raises(ValueError, match=message):
        speculate(CHAINS[chain], exact, drafter, **{"window": 3} | options)


def test_edit_distance_has_to_be_asked_for():
    with pytest.raises(ValueError, match=r"changes the law .* set lossy=True"):
        jump(CHAINS["first_hitting"], exact, StaleDrafter(), steps=2, tolerance=0)
    with pytest.raises(ValueError, match="reveals one token a step"):
        jump(CHAINS["blocks"], exact, StaleDrafter(), steps=2, tolerance=0, lossy=True)


def test_ids_are_those_of_before_chains():
    d = Draw(jax.random.key(3), jnp.arange(7, 12), 16, 27)
    whole = MarkovChain()

    @jax.jit
    def every():
        run = functools.partial(masked.reveal, lambda z, _: whole.denoiser(z), d)
        linear = schedule("linear", eps=0.0)
        return (
            run(order="random", block=8, per_step=2)[0],
            run(order="entropy", threshold=0.6)[0],
            masked.ancestral(lambda z, _: whole.denoiser(z), d, steps=20, schedule=linear)[0],
        )

    found = [hashlib.sha256(np.asarray(x).tobytes()).hexdigest()[:12] for x in every()]
    assert found == GOLDEN


GOLDEN = ["3bf201b12e9a", "81b3b760a711", "a0cef1bf704b"]
