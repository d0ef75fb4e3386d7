"""What approximate sums over tp cost and save: wire bytes of a forward pass against the
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
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from fdp import sharding
from fdp.arm import Arm
from fdp.collectives import psum, shard_map, vary, vary_like
from fdp.count import jaxpr
from fdp.mesh import AXES, BATCH_AXES, make_mesh
from fdp.models import module
from fdp.models.shape import ModelShape
from fdp.parallel.tensor import suppress, vocab_argmax, vocab_logsumexp
from fdp.sampling.masked import choose, initial_state
from fdp.sampling.noise import categorical, position_keys, uniform
from fdp.topics.parallel_dlm import settings
from fdp.topics.parallel_dlm.selective import Policy, Step, forward

P = PartitionSpec
TP = 8  # a node

POLICIES = tuple(Policy(name, **options) for name, options in settings.POLICIES.items())


@dataclass(frozen=True)
class Outcome:
    """One policy on one task: share of the exact bytes, and per seed KL in nats and top-1 agreement
    with exact.

    `read`: rows whose distribution is sampled from; `masked`: all rows still masked.
    """

    policy: str
    steps: int
    share: float
    kl_read: list[float]
    kl_masked: list[float]
    agree_read: list[float]
    agree_masked: list[float]
    ids: list[np.ndarray]


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


def share_of_bytes(arm: Arm, policy: Policy, per_step: int, sequences: int = 8) -> float:
    """Bytes that a whole run of `policy` sends over tp, as a share of the exact sums; counted in
    the bf16 program.
    """
    specs, length, mesh_shape = arm.program.specs, arm.data.seq_len, node(arm.model.shape)
    model = arm.model.clone(shape=replace(arm.model.shape, dtype="bfloat16"))
    mesh = AbstractMesh(tuple(mesh_shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    ids = jax.ShapeDtypeStruct((sequences, length), jnp.int32)
    flags = jax.ShapeDtypeStruct((sequences, length), bool)

    def sent(p: Policy, passes: int) -> float:
        """Wire bytes a device of the first pass, which sends all, or of it and one more."""

        def run(params: Any, z: jax.Array, changed: jax.Array, read: jax.Array) -> jax.Array:
            hidden, cache = forward(model, params, z, None, p, per_step, None)
            if passes == 2:
                hidden, _ = forward(
                    model, params, z, cache, p, per_step, Step(changed, read, jnp.int32(1))
                )
            return hidden

        rows = P(BATCH_AXES)
        # Each device's own activations side by side: they need not agree, so no collective may join
        # them.
        program = shard_map(run, mesh, (specs.specs, rows, rows, rows), P(BATCH_AXES, None, "tp"))
        found = jaxpr.collectives(
            jax.make_jaxpr(program)(specs.shapes, ids, flags, flags), mesh_shape
        )
        return sum(x.wire_bytes * x.count for x in found)

    steps = length // per_step
    full, first = policy.refreshes(steps), sent(policy, 1)
    later = sent(policy, 2) - first if full < steps else 0.0
    return (full * first + (steps - full) * later) / (steps * sent(Policy("exact", "exact"), 1))


def sequence_parallel_share(arm: Arm, sequences: int = 8) -> float:
    """Bytes of the exact forward pass with sequence parallelism, as a share of the all-reduces; the
    same count.
    """
    specs, length, mesh_shape = arm.program.specs, arm.data.seq_len, node(arm.model.shape)
    mesh = AbstractMesh(tuple(mesh_shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    sent = []
    for parallel in (True, False):
        shape = replace(arm.model.shape, dtype="bfloat16", sequence_parallel=parallel)
        model = arm.model.clone(shape=shape)

        def hidden(params: Any, z: jax.Array, model: Any = model) -> jax.Array:
            args = {"params": params}, z, jnp.zeros(sequences)
            return vary(module.run(model, *args, method="hidden")[0], "tp")

        out = P(BATCH_AXES, None, "tp")
        program = shard_map(hidden, mesh, (specs.specs, P(BATCH_AXES)), out)
        ids = jax.ShapeDtypeStruct((sequences, length), jnp.int32)
        found = jaxpr.collectives(jax.make_jaxpr(program)(specs.shapes, ids), mesh_shape)
        sent.append(sum(x.wire_bytes * x.count for x in found))
    return sent[0] / sent[1]


def _compare(
    z_BxL: jax.Array, read_BxL: jax.Array, n_ids: int, exact: jax.Array, approximate: jax.Array
) -> jax.Array:
    """[2, 3]: (Σ KL, Σ top-1 agreement, rows) over the rows read and over all masked rows of the
    whole mesh.
    """
    logp, logq = (x - vocab_logsumexp(x)[..., None] for x in (exact, approximate))
    kl = psum(jnp.where(logp > -1e20, jnp.exp(logp) * (logp - logq), 0.0).sum(-1), "tp")
    agree = vocab_argmax(exact)[1] == vocab_argmax(approximate)[1]
    sums = lambda rows: jnp.stack(
        [(kl * rows).sum(), (agree * rows).sum(), rows.sum().astype(jnp.float32)]
    )
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

        step_to = functools.partial(forward, model, params, policy=policy, per_step=per_step)
        noise_B = vary_like(jnp.zeros(sample_ids_B.shape), sample_ids_B)

        def body(carry: Any, number: jax.Array) -> Any:
            z, before, cache, sums = carry
            keys = position_keys(key, sample_ids_B, number, jnp.arange(length))
            read = choose(uniform(keys), z == n_ids, per_step)
            step = Step(z != before, read, number)
            hidden, cache = jax.lax.cond(
                policy.full(number),
                lambda c: step_to(z, c, step=None),
                lambda c: step_to(z, c, step=step),
                cache,
            )
            logits = outputs(hidden, "outputs")
            exact = outputs({"inputs": z, "noise": noise_B}, None)
            sums += _compare(z, read, n_ids, exact, logits)
            return (jnp.where(read, categorical(keys, logits), z), z, cache, sums), None

        z = initial_state(sample_ids_B, length, n_ids, None)
        _, cache = step_to(
            z, None, step=None
        )  # step 0 sends everything again: this only shapes the carry
        (z, _, _, sums), _ = jax.lax.scan(
            body, (z, z, cache, jnp.zeros((2, 3))), jnp.arange(length // per_step)
        )
        return z, sums

    specs = arm.program.specs.specs
    return jax.jit(shard_map(draw, mesh, (specs, P(), P(BATCH_AXES)), (P(BATCH_AXES), P())))


def measure(arms: list[Arm], policy: Policy, per_step: int, sequences: int) -> Outcome:
    """`policy` on the trained arms of every seed: one compiled program for all of them."""
    arm = arms[0]
    mesh = make_mesh(node(arm.model.shape))
    specs = arm.program.specs.specs
    run = sampler(arm, mesh, policy, per_step)
    table, ids = [], []
    for a in arms:
        params = jax.device_put(a.trained_on_host.params, sharding.shardings(mesh, specs))
        key = jax.random.key_data(jax.random.key(a.seed))
        drawn, sums = jax.block_until_ready(run(params, key, jnp.arange(sequences)))
        table.append(np.asarray(sums, np.float64))
        ids.append(np.asarray(drawn))
    means = np.stack(table)
    means = means[:, :, :2] / means[:, :, 2:]
    share = share_of_bytes(arm, policy, per_step)
    column = lambda i, j: [max(float(x), 0.0) for x in means[:, i, j]]
    columns = (column(0, 0), column(1, 0), column(0, 1), column(1, 1))
    return Outcome(policy.name, arm.data.seq_len // per_step, share, *columns, ids)
