"""Speculative decoding on two groups of devices: ids, bytes on the link, what overlaps."""

import functools
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdp.collectives import index, size
from fdp.count import hlo
from fdp.data.synthetic import MarkovChain
from fdp.objectives.noise_schedules import schedule
from fdp.parallel.groups import divided
from fdp.sampling.chain import Ancestral, Chain, follow
from fdp.sampling.noise import Draw
from fdp.sampling.overlap import GroupDenoiser, OverlappedSpeculation, link_bytes, wire_dtype
from fdp.sampling.speculative import StaleDrafter, speculate

pytestmark = pytest.mark.fast

MARKOV = MarkovChain(n=5, concentration=0.3)
B, L, W = 4, 8, 3
PROMPT = np.full((B, L), 5)
PROMPT[:, 0] = np.arange(B)
DRAW = Draw(jax.random.key(3), jnp.arange(20, 20 + B), L, 5)
GIVEN = replace(DRAW, start_BxL=jnp.asarray(PROMPT))
CHAINS = {
    "random": Chain(DRAW, "random"),
    "blocks": Chain(GIVEN, "entropy", block=4, eos=2),
    "ancestral": Ancestral(DRAW, grid=11, schedule=schedule("linear", eps=0.0)),
}


def exact(variables, z_BxL, noise_B):
    """The verifier: this device's columns of exact conditionals, and of some never drawn."""
    whole = jnp.pad(MARKOV.denoiser(z_BxL), ((0, 0), (0, 0), (0, 3)), constant_values=9.0)
    columns = whole.shape[-1] // size("tp")
    return jax.lax.dynamic_slice_in_dim(whole, index("tp") * columns, columns, 2) * variables


def mixed(variables, z_BxL, noise_B):
    """Draft models, by what stands at the first position: exact, blunt, constant, no numbers."""
    right = exact(variables, z_BxL, noise_B)
    constant = jnp.zeros_like(right).at[..., 1].set(50.0)
    every = jnp.stack([right, 0.5 * right, constant, jnp.full_like(right, jnp.nan)])
    return every[z_BxL[:, 0] % 4, jnp.arange(len(z_BxL))]


def speculation(chain, mesh, judge=exact, draft=mixed, window=W, **draft_degrees):
    groups = divided({"draft": draft_degrees, "verifier": mesh})
    one = jnp.float32(1.0), jax.sharding.PartitionSpec()
    return OverlappedSpeculation(
        chain,
        GroupDenoiser("verifier", judge, *one),
        GroupDenoiser("draft", draft, *one),
        groups,
        window=window,
    )


@pytest.mark.parametrize(
    ("name", "window", "mesh", "dp"),
    [
        ("random", W, {"dp": 4}, 1),
        ("blocks", W, {"dp": 2, "tp": 2}, 2),
        ("ancestral", 1, {"tp": 2}, 1),
    ],
)
def test_ids_are_those_of_the_verifier_alone(name, window, mesh, dp):
    chain = CHAINS[name]
    found = speculation(chain, mesh, window=window, dp=dp).run()
    denoise = functools.partial(exact, 1.0)
    ids = jax.jit(lambda: follow(chain, denoise)[0])()
    np.testing.assert_array_equal(found.ids, ids)
    if name == "random":
        ids = jax.jit(lambda: speculate(chain, denoise, StaleDrafter(), window=window)[0])()
        np.testing.assert_array_equal(found.ids, ids)
    assert (found.hits_B <= found.rounds_B).all() and found.hits_B.sum() > 0
    assert found.rounds_B.max() <= found.dispatched <= found.rounds_B.max() + 1
    assert found.sent_bytes == found.dispatched * link_bytes(window, B, L, 5)
    assert link_bytes(W, B, L, 5) == (W + 1) * B * L * 2 + B * 2


def test_the_draft_group_drafts_on_while_the_other_judges():
    """Each verification holds until the draft of its round has begun."""
    turn, begun, judged, late = threading.Condition(), [], [], []

    def hold(_):
        with turn:
            judged.append(None)
            r = (len(judged) - 1) // 4  # four devices
            late.extend([] if turn.wait_for(lambda: len(begun) > r * W, timeout=30) else [r])

    def begin(_):
        with turn:
            begun.append(None)
            turn.notify_all()

    def judge(variables, z_BxL, noise_B):
        jax.debug.callback(hold, z_BxL[0, 0])
        return exact(variables, z_BxL, noise_B)

    def draft(variables, z_BxL, noise_B):
        jax.debug.callback(begin, z_BxL[0, 0])
        return exact(variables, z_BxL, noise_B)

    found = speculation(CHAINS["random"], {"dp": 4}, judge, draft).run()
    assert not late and len(judged) == 4 * found.dispatched
    events = {e.op: e for e in found.events}
    for r in range(found.dispatched):
        drafts, verifies = events[f"draft {r}"], events[f"verify {r}"]
        assert drafts.group != verifies.group
        assert verifies.dispatched <= drafts.dispatched < verifies.end
    # The verifier drafts: a round of one state, then whole windows, then the round ahead.
    assert (found.rounds_B == 1 + -(-(L - 1) // W)).all()


@pytest.mark.parametrize("mesh", [{"dp": 4}, {"dp": 2, "tp": 2}])
def test_no_collective_runs_between_states(mesh):
    run = speculation(CHAINS["random"], mesh)
    side = run.verifier
    text = run.judge.lower(*run.start(side, jax.jit(run.chain.begin)())).compile().as_text()
    axes = {c.axes for c in hlo.collectives(text, dict(run.groups.mesh(side.group).shape))}
    assert axes == ({("tp",)} if "tp" in mesh else set())


def test_what_is_refused():
    with pytest.raises(ValueError, match="a window of 0 states"):
        speculation(CHAINS["random"], {}, window=0)
    message = r"'verifier': 3 states · requests = 12 is not divisible by dp·ep = 5·1 = 5: ask"
    with pytest.raises(ValueError, match=message):
        speculation(CHAINS["random"], {"dp": 5})
    with pytest.raises(ValueError, match=r"'draft': requests = 4 .* dp·ep = 3·1 = 3"):
        speculation(CHAINS["random"], {}, dp=3)
    run = speculation(CHAINS["random"], {})
    with pytest.raises(ValueError, match="both on group 'draft'"):
        OverlappedSpeculation(run.chain, run.draft, run.draft, run.groups, window=W)
    assert wire_dtype(65535).itemsize == 2 and wire_dtype(65536).itemsize == 4
