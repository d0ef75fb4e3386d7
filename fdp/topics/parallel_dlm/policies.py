"""What approximate all-reduces over tp cost and save: wire bytes of a forward pass against the
distributions it yields.

Every policy runs the real sharded program over tp. At each state it visits, the exact forward pass
is run as well, so that KL and agreement compare distributions at equal inputs; the noise is the
same for all policies.

Legend: B sequences, L positions, N denoising steps, V vocabulary (local over tp).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fdp import process, sharding
from fdp.arm import Arm
from fdp.collectives import psum, shard_map, vary, vary_like
from fdp.count import jaxpr
from fdp.data.synthetic import MarkovChain
from fdp.mesh import AXES, BATCH_AXES, abstract_mesh, make_mesh
from fdp.models import module
from fdp.models.shape import ModelShape
from fdp.parallel.tensor import suppress, vocab_argmax, vocab_logsumexp
from fdp.sampling.chain import choose, initial_state
from fdp.sampling.masked import first_hitting
from fdp.sampling.noise import Draw, categorical, position_keys, uniform
from fdp.topics.parallel_dlm import settings
from fdp.topics.parallel_dlm.selective import Policy, StepRows, forward

P = PartitionSpec
TP = 8  # a node

POLICIES = tuple(Policy(name, **options) for name, options in settings.POLICIES.items())


@dataclass(frozen=True)
class PolicyResult:
    """One policy on one task: share of the exact bytes, and per seed KL in nats and top-1 agreement
    with exact, the samples and their NLL in nats a token.

    `read`: rows whose distribution is sampled from; `masked`: all rows still masked."""

    policy: str
    steps: int
    share: float
    kl_read: list[float]
    kl_masked: list[float]
    agree_read: list[float]
    agree_masked: list[float]
    ids: list[np.ndarray]
    nll: list[float]


def chosen(names: tuple[str, ...]) -> tuple[Policy, ...]:
    """The policies of `names`, all for ()."""
    known = {p.name: p for p in POLICIES}
    return tuple(known[n] for n in names) if names else POLICIES


def node(m: ModelShape) -> dict[str, int]:
    """Degrees of the mesh of the study: tp = 8, or the largest power of two that divides the
    model.
    """
    tp = TP
    while any(n % tp for n in (m.heads, m.kv_heads, m.ffn, m.vocab, m.width)):
        tp //= 2
    return dict.fromkeys(AXES, 1) | {"tp": tp}


# Bytes
# -------------------------------------------------------------------------------------------------


def _wire_bytes(
    arm: Arm, run: Callable[..., jax.Array], sequences: int = 8, **fields: Any
) -> float:
    """Wire bytes a device of `run`(bfloat16 model with `fields`, params, ids, changed, read), which
    gives each device's own activations, from its jaxpr: nothing runs."""
    model = arm.model.clone(shape=replace(arm.model.shape, dtype="bfloat16", **fields))
    specs, degrees = arm.program.specs, node(arm.model.shape)
    rows = [jax.ShapeDtypeStruct((sequences, arm.data.seq_len), t) for t in (jnp.int32, bool, bool)]

    def local(*given: Any) -> jax.Array:
        return vary(run(model, *given), "tp")

    # Activations side by side: they need not agree, so no collective may join them.
    out = P(BATCH_AXES, None, "tp")
    program = shard_map(local, abstract_mesh(degrees), (specs.specs, *[P(BATCH_AXES)] * 3), out)
    found = jaxpr.collectives(jax.make_jaxpr(program)(specs.shapes, *rows), degrees)
    return sum(x.wire_bytes * x.count for x in found)


def share_of_bytes(arm: Arm, policy: Policy, per_step: int) -> float:
    """Bytes that a whole run of `policy` sends over tp, as a share of exact all-reduces; counted in
    the bfloat16 program."""

    def passes(policy: Policy, more: bool, model: Any, params: Any, *given: Any) -> jax.Array:
        """The first pass, which sends everything, and with `more` one that does not."""
        z, changed, read = given
        hidden, cache = forward(model, params, z, None, policy, per_step, None)
        if more:
            rows = StepRows(changed, read, jnp.int32(1))
            hidden, _ = forward(model, params, z, cache, policy, per_step, rows)
        return hidden

    def count(policy: Policy, more: bool) -> float:
        return _wire_bytes(arm, functools.partial(passes, policy, more))

    steps = arm.data.seq_len // per_step
    full, whole = policy.refreshes(steps), count(policy, False)
    later = count(policy, True) - whole if full < steps else 0.0
    exact = count(Policy("exact", "exact"), False) if policy.int8 else whole
    return (full * whole + (steps - full) * later) / (steps * exact)


def sequence_parallel_share(arm: Arm) -> float:
    """Bytes of the exact forward pass with sequence parallelism, as a share of the all-reduces; the
    same count.
    """

    def hidden(model: Any, params: Any, z: jax.Array, *_: Any) -> jax.Array:
        return module.run(model, {"params": params}, z, jnp.zeros(len(z)), method="hidden")[0]

    parallel, plain = (_wire_bytes(arm, hidden, sequence_parallel=s) for s in (True, False))
    return parallel / plain


# Distributions
# -------------------------------------------------------------------------------------------------


def _compare(
    z_BxL: jax.Array, read_BxL: jax.Array, n_ids: int, exact: jax.Array, approximate: jax.Array
) -> jax.Array:
    """[2, 3]: (Σ KL, Σ top-1 agreement, rows) over the rows read and over all masked rows of the
    whole mesh.
    """
    logp, logq = (x - vocab_logsumexp(x)[..., None] for x in (exact, approximate))
    kl = psum(jnp.where(logp > -1e20, jnp.exp(logp) * (logp - logq), 0.0).sum(-1), "tp")
    agree = vocab_argmax(exact)[1] == vocab_argmax(approximate)[1]

    def sums(rows: jax.Array) -> jax.Array:
        return jnp.stack([(kl * rows).sum(), (agree * rows).sum(), rows.sum().astype(jnp.float32)])

    return psum(jnp.stack([sums(read_BxL), sums(z_BxL == n_ids)]), BATCH_AXES)


def sampler(
    arm: Arm, mesh: Mesh, policy: Policy, per_step: int
) -> Callable[[Any, jax.Array, jax.Array], Any]:
    """Compiled (params, raw key, sample ids [B]) → (ids [B, L], comparison [2, 3]): `per_step`
    random positions a step.

    With exact sums, the ids of `fdp.sampling.masked.reveal(order="random")`.
    """
    model, n_ids, length = arm.model, arm.objective.n_ids, arm.data.seq_len
    if length % per_step:
        raise ValueError(f"length {length} is not divisible by per_step = {per_step} positions")

    def draw(params: Any, key: jax.Array, sample_ids_B: jax.Array) -> Any:
        def outputs(x: Any, method: str | None) -> jax.Array:
            return suppress(module.run(model, {"params": params}, x, method=method)[0], n_ids)

        def step_to(z: jax.Array, cache: Any, step: StepRows | None) -> tuple[jax.Array, Any]:
            return forward(model, params, z, cache, policy, per_step, step)

        noise_B = vary_like(jnp.zeros(sample_ids_B.shape), sample_ids_B)

        def body(carry: Any, number: jax.Array) -> Any:
            z, before, cache, sums = carry
            keys = position_keys(key, sample_ids_B, number, jnp.arange(length))
            read = choose(uniform(keys), z == n_ids, per_step)
            rows = StepRows(z != before, read, number)
            whole, some = (functools.partial(step_to, z, step=given) for given in (None, rows))
            if policy.kind == "exact":
                hidden, cache = whole(cache)
            else:
                hidden, cache = jax.lax.cond(policy.full(number), whole, some, cache)
            logits = outputs(hidden, "outputs")
            exact = outputs({"inputs": z, "noise": noise_B}, None)
            sums += _compare(z, read, n_ids, exact, logits)
            return (jnp.where(read, categorical(keys, logits), z), z, cache, sums), None

        z = initial_state(sample_ids_B, length, n_ids, None)
        # Step 0 sends everything, so what the first cache holds does not matter.
        shapes = jax.eval_shape(lambda: step_to(z, None, step=None)[1])
        cache = jax.tree.map(lambda s: vary(jnp.zeros(s.shape, s.dtype), AXES), shapes)
        start = z, z, cache, jnp.zeros((2, 3))
        (z, _, _, sums), _ = jax.lax.scan(body, start, jnp.arange(length // per_step))
        return z, sums

    specs = arm.program.specs.specs
    return jax.jit(shard_map(draw, mesh, (specs, P(), P(BATCH_AXES)), (P(BATCH_AXES), P())))


def evaluate(
    arms: list[Arm], judges: list[Arm] | None, per_step: int, sequences: int, policy: Policy
) -> PolicyResult:
    """`policy` on the trained arms of every seed: one compiled program for all of them. `judges`
    give the likelihood of samples; None: they are of the Markov chain, whose law is known."""
    arm = arms[0]
    mesh = make_mesh(node(arm.model.shape))
    run, specs = sampler(arm, mesh, policy, per_step), arm.program.specs.specs
    table, ids = [], []
    for a in arms:
        params = process.place(a.trained_on_host.params, sharding.shardings(mesh, specs))
        key = jax.random.key_data(jax.random.key(a.seed))
        drawn, sums = process.fetch(run(params, key, jnp.arange(sequences)))
        table.append(sums.astype(np.float64))
        ids.append(drawn)
    sums = np.stack(table)
    means = np.maximum(sums[:, :, :2] / sums[:, :, 2:], 0.0)  # [seeds, read or masked, KL or top-1]
    (kl_read, agree_read), (kl_masked, agree_masked) = means.transpose(1, 2, 0).tolist()
    nll = [likelihood(judges[i] if judges else None, x) for i, x in enumerate(ids)]
    steps, share = arm.data.seq_len // per_step, share_of_bytes(arm, policy, per_step)
    found = kl_read, kl_masked, agree_read, agree_masked
    return PolicyResult(policy.name, steps, share, *found, ids, nll)


def likelihood(judge: Arm | None, ids_BxL: np.ndarray) -> float:
    """Mean NLL of `ids_BxL` in nats per token under the arm's model and objective, of as many whole
    rows as its mesh divides; None: the exact one of the Markov chain."""
    if judge is None:
        return float(MarkovChain().nll(ids_BxL).mean() / ids_BxL.shape[1])
    ways = judge.mesh.shape["dp"] * judge.mesh.shape["ep"]
    batch = {"tokens": ids_BxL[: len(ids_BxL) // ways * ways]}
    given = judge.trained.variables, judge.place(batch), np.int32(0)
    total, count = judge.eval_function()(*given)
    return float(total) / float(count)


def states(arm: Arm) -> np.ndarray:
    """Every state of one first-hitting sample on one device: int32 [L + 1, L]."""
    key, length, n_ids = jax.random.key(arm.seed), arm.data.seq_len, arm.objective.n_ids

    @jax.jit
    def run(params: Any) -> jax.Array:
        def denoise(z: jax.Array, noise_B: jax.Array) -> Any:
            noised = {"inputs": z, "noise": noise_B}
            return module.run(arm.model, {"params": params}, noised)[0]

        draw = Draw(key, jnp.arange(1), length, n_ids, trace=True)
        return first_hitting(denoise, draw)[1]["trace"]

    return np.asarray(run(arm.trained_on_host.params))[:, 0]
