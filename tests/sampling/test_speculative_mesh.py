"""A thousand prompts on tp = 1, 2, 4 and 8: the ids of the verifier alone and of speculation.

Sums over tp are rounded in another order, so that a choice between near-equals may differ: the
margins of all choices are measured, and only a text that holds such a choice may differ. An order
by scores needs a prompt: without one all positions are alike to rotary attention, and rounding
alone chooses the first."""

import functools
from dataclasses import replace

import build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdp.collectives import shard_map
from fdp.mesh import AXES, make_mesh
from fdp.models import module
from fdp.parallel.tensor import suppress
from fdp.sampling.chain import Chain, follow, picked
from fdp.sampling.noise import Draw, gumbel
from fdp.sampling.speculative import JacobiDrafter, speculate

pytestmark = pytest.mark.slow

PROMPTS, L, N_IDS, EOS = 1000, 12, 29, 3
DEGREES = (1, 2, 4, 8)
ORDERS = {"first_hitting": "random", "entropy": "entropy"}
NEAR = 1e-4  # of the scores that a choice takes the largest of
MODEL = build.model("bidirectional", layers=1, heads=8, kv_heads=8, head_dim=4, vocab=32)
SCALE = 1.0  # of weights: of the scores of positions, too
IDS_B = np.arange(PROMPTS, dtype=np.int32)


@functools.cache
def given(order):
    """(parameters, their specs, prompts int32 [B, L] of up to L - 1 tokens, then masks)."""
    shapes, specs = build.shapes_and_specs(MODEL, L)
    start_BxL = np.random.default_rng(0).integers(0, N_IDS, (PROMPTS, L))
    least = 0 if order == "first_hitting" else 1
    length_Bx1 = least + (IDS_B % (L - least))[:, None]
    start_BxL = np.where(np.arange(L) < length_Bx1, start_BxL, N_IDS).astype(np.int32)
    return build.drawn(shapes, SCALE), specs, start_BxL


def verifier(params):
    """The model as a denoiser."""

    def denoise(z_BxL, noise_B):
        hidden = module.run(MODEL, {"params": params}, z_BxL, noise_B, method="hidden")[0]
        return module.run(MODEL, {"params": params}, hidden, method="outputs")[0]

    return denoise


def chain_of(order, ids_B, start_BxL):
    """What every run follows."""
    draw = Draw(jax.random.key(5), ids_B, L, N_IDS, start_BxL=start_BxL)
    return Chain(draw, ORDERS[order], eos=EOS)


@functools.cache
def drawn(order, tp):
    """(ids of the verifier alone, those of speculation, its rounds) with dp · tp = 8."""
    params, specs, start_BxL = given(order)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"dp": 8 // tp, "tp": tp})

    def both(params, ids_B, start_BxL):
        chain, denoise = chain_of(order, ids_B, start_BxL), verifier(params)
        ids, info = speculate(chain, denoise, JacobiDrafter(), window=4)
        return follow(chain, denoise)[0], ids, info["rounds"]

    rows = P("dp")
    run = jax.jit(shard_map(both, mesh, (specs, rows, rows), (rows, rows, rows)))
    return jax.tree.map(np.asarray, run(params, IDS_B, start_BxL))


@functools.cache
def margins(order):
    """By how much the closest choice of each text was won, on one device: f32 [B]."""

    @jax.jit
    def closest(params, ids_B, start_BxL):
        chain, denoise = chain_of(order, ids_B, start_BxL), verifier(params)
        traced = replace(chain, draw=replace(chain.draw, trace=True))
        trace = follow(traced, denoise)[1]["trace"]

        def of_step(step, z_BxL):
            state = chain.begin()._replace(z_BxL=z_BxL, step_B=jnp.full(PROMPTS, step))
            logits, masked_BxL = denoise(z_BxL, chain.level(state)), chain.masked(state)
            score_BxL = chain.score(logits, state)
            at_Bx1 = chain.places(chain.chosen(score_BxL, state))
            noise = gumbel(picked(chain.keys(state), at_Bx1), logits.shape[-1])
            token_BxV = (suppress(picked(logits, at_Bx1), N_IDS) + noise)[:, 0]
            won_B = gap(token_BxV)
            if not chain.by_noise:
                won_B = jnp.minimum(won_B, gap(jnp.where(masked_BxL, score_BxL, -jnp.inf)))
            return step + 1, jnp.where(masked_BxL.any(1), won_B, jnp.inf)

        return jax.lax.scan(of_step, jnp.int32(0), trace[:-1])[1].min(0)

    params, _, start_BxL = given(order)
    return np.asarray(closest(params, IDS_B, start_BxL))


def gap(score_BxN):
    """The largest of a row less the second."""
    first, second = jnp.moveaxis(jax.lax.top_k(score_BxN, 2)[0], -1, 0)
    return first - second


@pytest.mark.parametrize("tp", DEGREES)
@pytest.mark.parametrize("order", ORDERS)
def test_ids_differ_only_where_the_verifier_cannot_tell(order, tp):
    alone, drafted, rounds_B = drawn(order, tp)
    reference = drawn(order, 1)[0]
    differ_B = ((drafted != alone) | (alone != reference)).any(1)
    won_B = margins(order)
    assert (won_B[differ_B] < NEAR).all(), won_B[differ_B]
    assert (won_B < NEAR).mean() < 0.02  # so that nearly all texts must be equal
    ended_B = ((alone == EOS) & (given(order)[2] == N_IDS)).any(1)
    assert 50 < ended_B.sum() < PROMPTS and (alone < N_IDS).all()
    assert 1 < rounds_B.mean() < L / 2
