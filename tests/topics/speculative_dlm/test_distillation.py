"""Drafts that learn from the verifier: the loss, the states it is taken at, and the arms."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import build
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import topic4
from fdp import config
from fdp.arm import Arm
from fdp.mesh import AXES, make_mesh
from fdp.sampling.draw import chain_of, denoiser_of
from fdp.sampling.noise import Draw
from fdp.step import TrainStep
from fdp.topics.speculative_dlm import settings, teaching
from fdp.topics.speculative_dlm.arms import VERIFIER, arms
from fdp.topics.speculative_dlm.distillation import Distillation
from fdp.topics.speculative_dlm.hinted import drafter_from, hinted

pytestmark = pytest.mark.fast
N_IDS, VOCAB, L, REACH = 60, 64, 8, 3


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def laws(seed: int, *shape: int) -> np.ndarray:
    """Random laws over the ids that may be drawn, f32 [..., V]."""
    logits = np.random.default_rng(seed).normal(size=(*shape, VOCAB))
    logits[..., N_IDS:] = -np.inf
    return softmax(logits).astype(np.float32)


def rows(law: np.ndarray, weights=1.0):
    targets = np.arange(len(law), dtype=np.int32)
    return {
        "law": law,
        "targets": targets,
        "weights": np.broadcast_to(np.float32(weights), len(law)),
    }


@partial(jax.jit, static_argnums=0)
def scored(hard: float, logits, given):
    """(loss of every row, gradient of their sum)."""
    loss = Distillation(N_IDS, hard).loss
    return loss(logits, given), jax.grad(lambda x: loss(x, given).sum())(logits)


def test_the_gradient_is_that_of_a_cross_entropy_with_soft_labels():
    law, logits = laws(0, 5), np.random.default_rng(1).normal(size=(5, VOCAB)).astype(np.float32)
    weights = np.array([2.0, 1.0, 0.0, 1.0, 3.0], np.float32)
    value, slope = scored(0.0, logits, rows(law, weights))
    own = softmax(np.where(np.arange(VOCAB) < N_IDS, logits, -1e30))
    np.testing.assert_allclose(slope, weights[:, None] * (own - law), atol=2e-6)
    divergence = (law * np.log(np.maximum(law, 1e-30) / np.maximum(own, 1e-30))).sum(-1)
    np.testing.assert_allclose(value, weights * divergence, rtol=1e-5)


def test_it_is_zero_and_least_for_a_draft_that_agrees():
    law = laws(0, 5)
    given = rows(law)
    same = np.log(np.maximum(law, 1e-30))
    same[:, N_IDS:] = 7.0  # ids that are never drawn do not matter
    value, slope = scored(0.0, same, given)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert np.abs(slope).max() < 1e-6
    for seed in range(4):
        other = same + 0.1 * np.random.default_rng(seed).normal(size=same.shape)
        assert (np.asarray(scored(0.0, other.astype(np.float32), given)[0]) > 0).all()


def test_the_other_end_is_the_cross_entropy_of_the_last_ids():
    given, logits = rows(laws(0, 5)), np.random.default_rng(1).normal(size=(5, VOCAB))
    own = softmax(np.where(np.arange(VOCAB) < N_IDS, logits, -1e30))
    want = -np.log(own[np.arange(5), given["targets"]])
    got = [np.asarray(scored(x, logits.astype(np.float32), given)[0]) for x in (0.0, 0.25, 1.0)]
    np.testing.assert_allclose(got[2], want, rtol=1e-5)
    np.testing.assert_allclose(got[1], 0.75 * got[0] + 0.25 * got[2], rtol=1e-5)


def test_every_state_counts_once_however_much_of_it_is_masked():
    law = laws(0, 2, L)
    state = np.zeros((2, L), np.int32)
    state[0], state[1, 3] = N_IDS, N_IDS
    batch = {"tokens": np.zeros((2, L), np.int32), "state": state, "law": law}
    objective = Distillation(N_IDS)
    noised = objective.corrupt(jax.random.key(0), batch)
    np.testing.assert_array_equal(noised["noise"], [1, 1 / L])
    np.testing.assert_array_equal(noised["rows"]["weights"].sum(1), [L, L])
    assert noised["rows"]["weights"][1, 3] == L and objective.count(noised) == 2 * L


class Verifier:
    """A verifier with random weights, as an arm that was trained."""

    def __init__(self) -> None:
        c = build.tiny(**{"model.layers": 1, "data.seq_len": L, "objective.name": "mdlm"})
        self.experiment, self.seed = build.experiment(c), 0
        self.objective, self.data = self.experiment.objective, self.experiment.data
        params = build.drawn(build.shapes_and_specs(self.experiment.model, L)[0])
        self.trained_on_host = SimpleNamespace(variables={"params": params, "state": {}})


@cache
def made() -> tuple[Any, TrainStep]:
    """(a verifier, the program of a hinted draft on dp 2 · tp 2)."""
    arm = Verifier()
    e = arm.experiment
    degrees = {**e.degrees, "dp": 2, "tp": 2}
    draft = replace(
        e,
        model=hinted(e.model, N_IDS),
        data=teaching.awaited(e, 16, REACH),
        objective=Distillation(N_IDS, 0.1),
        degrees=degrees,
    )
    return arm, TrainStep(draft, make_mesh(degrees))


def variables(p: TrainStep):
    """Random ones: gates and biases that begin at 0 would hide errors."""
    return build.drawn({"params": p.specs.shapes, "state": p.specs.model_shapes})


def test_states_are_those_of_the_verifiers_chain_with_its_laws():
    arm = made()[0]
    found = teaching.visits(arm, 16)
    key = jax.random.fold_in(jax.random.key(teaching.TAUGHT), arm.seed)
    at = found.states_NxSxL[:, 5]

    @jax.jit
    def chained(law_NxSxLxV, given):
        chain = chain_of(arm.experiment, Draw(key, jnp.arange(16), L, N_IDS))

        def step(state, law):
            return chain.step(jnp.log(jnp.maximum(law, 1e-30)), state), state.z_BxL

        last, states = jax.lax.scan(step, chain.begin(), law_NxSxLxV.swapaxes(0, 1))
        said = denoiser_of(arm.experiment, given)(at, jnp.full(16, 3 / L))
        return last.z_BxL, states.swapaxes(0, 1), said

    *chain, logits = jax.device_get(chained(found.law_NxSxLxV, arm.trained_on_host.variables))
    np.testing.assert_array_equal(found.tokens_NxL, chain[0])
    np.testing.assert_array_equal(found.states_NxSxL, chain[1])
    want = softmax(np.where(np.arange(VOCAB) < N_IDS, logits, -1e30))
    np.testing.assert_allclose(found.law_NxSxLxV[:, 5], want, atol=1e-5)


def test_examples_are_the_states_of_chains_that_no_other_split_has():
    arm, program = made()
    data = teaching.examples(Arm("draft", program.experiment, program), {VERIFIER: arm})
    assert (len(data.train), len(data.val)) == (14 * L, 2 * L)
    found, some = teaching.visits(made()[0], 16), data.train.take([0, L + 5])
    states = [found.states_NxSxL[2, 0], found.states_NxSxL[3, 5]]
    np.testing.assert_array_equal(some["state"], states)
    np.testing.assert_array_equal(some["tokens"], found.tokens_NxL[[2, 3]])
    np.testing.assert_array_equal(some["law"][1], found.law_NxSxLxV[3, 5])
    assert data.example() == program.experiment.data.example()


def test_a_hint_is_what_the_verifier_said_at_most_so_many_steps_before():
    found = teaching.visits(made()[0], 16)
    lessons = teaching.Lessons(found, "states", REACH)
    every = lessons.take(range(16 * L))["hint"].reshape(16, L, L, VOCAB)
    seen = set()
    for n, s in np.ndindex(16, L):
        said = np.log(np.maximum(found.law_NxSxLxV[n], teaching.LEAST))
        steps = [g for g in range(1, s + 1) if np.array_equal(every[n, s], said[s - g])]
        assert steps or not every[n, s].any(), "no hint but none at all before the chain begins"
        assert s < REACH or steps
        seen |= set(steps)
    assert seen == set(range(1, REACH + 1))
    assert not every[:, 0].any() and every[:, 1].any() and not every[:, 1].any((1, 2)).all()


def test_a_draft_without_layers_says_what_its_hint_says():
    e, law = made()[1].experiment, laws(3, 2, L)
    own = jax.tree.map(jnp.zeros_like, variables(made()[1]))
    own["params"]["trust"] = jnp.ones(1)
    denoise = drafter_from(e, own).denoise
    state, noise = np.full((2, L), N_IDS, np.int32), np.ones(2, np.float32)
    said = jax.jit(denoise)(state, noise, jnp.log(jnp.maximum(law, 1e-9)) + 5)
    got = softmax(np.where(np.arange(VOCAB) < N_IDS, said, -1e30))
    np.testing.assert_allclose(got, law, atol=1e-5)


def test_loss_and_gradients_are_those_of_one_device():
    batch = {
        "tokens": build.tokens(build.tiny(**{"data.seq_len": L})),
        "state": np.where(np.arange(L) < np.arange(1, 9)[:, None], N_IDS, 5).astype(np.int32),
        "law": laws(2, 8, L),
        "hint": np.log(laws(3, 8, L) + 1e-9),
    }
    program = made()[1]
    alone = replace(program.experiment, degrees=dict.fromkeys(AXES, 1))
    found = []
    for p in (program, TrainStep(alone, make_mesh(alone.degrees))):
        noised = p.corrupt(build.place(p, batch), jax.random.key(0))
        given = jax.device_put(variables(p), p.specs.state_shardings().variables)
        found.append(jax.device_get(jax.jit(p.grads)(given, noised)[:2]))
    (loss, grads), (want, wants) = found
    assert loss == pytest.approx(want, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, wants)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))


def changed(**keys):
    c = topic4.get_config("cpu").copy_and_resolve_references()
    c.data.source = "blank"
    c.speculation.update(keys)
    return c


def test_a_distilled_draft_differs_from_the_plain_one_in_what_it_learns_alone():
    found = arms(changed(drafts=("tenth",), lessons=("distilled",), hard=0.1))
    assert list(found) == [VERIFIER, "tenth", "tenth-distilled"]
    plain, taught = found["tenth"], found["tenth-distilled"]
    assert taught.data.awaits == (VERIFIER,) and taught.objective.hard == 0.1
    assert taught.model == plain.model and taught.fit == plain.fit
    shown = arms(changed(drafts=("tenth",), lessons=("hinted",)))["tenth-hinted"]
    assert shown.model.shape == plain.model.shape and shown.data.train.reach == 16
    more = arms(changed(drafts=("tenth",), lessons=("distilled",), longer=5))
    steps = {name: e.fit.steps for name, e in more.items()}
    assert steps == {VERIFIER: 400, "tenth": 2000, "tenth-distilled": 2000}
    assert list(settings.drafts(changed(drafts=("tenth",), lessons=()))) == ["tenth"]


def test_more_laws_than_memory_holds_are_refused():
    c = changed(lessons=("distilled",), taught=2**30)
    bound = list(settings.sizes(c))[-1]
    assert bound.equation == "4·taught·seq_len²·vocab bytes = 4·1073741824·32²·32"
    with pytest.raises(config.UserError, match=r"holds 'distil', .* did you mean 'distilled'"):
        config.validate(changed(lessons=("distil",)))
