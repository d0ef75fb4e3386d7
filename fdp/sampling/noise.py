"""Counter-based sampling noise: the noise of a sample depends only on its id, the step and the
position.

It does not depend on the batch or the mesh; a vocabulary shard draws exactly its columns of the
global Gumbel table.

`jax.random.gumbel` is not used. Its f32 default has a resolution of 2^-23 in u, so its largest
value is 15.9 and ids with p < 1e-6 are starved (Zheng et al. 2024), and it cannot draw a slice.
Here 64 bits per draw reach 45.

Shapes: B samples, P positions, V vocabulary (tp: V/tp columns)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from fdp.collectives import pmax, psum, vary_like
from fdp.parallel.tensor import vocab_argmax, vocab_offset

# Second counter word, one for each use of a position's key; fold_in puts its own data there with
# first word 0.
UNIFORM, GUMBEL, RADIUS, ANGLE = 0x80000001, 0x80000002, 0x80000003, 0x80000004


def position_keys(
    key: jax.Array, sample_ids_B: jax.Array, step: jax.Array | int, positions_P: jax.Array
) -> jax.Array:
    """fold_in(fold_in(fold_in(key, sample), step), position) of every pair: raw threefry keys,
    uint32 [B, P, 2]. `step`: of all samples, or int32 [B]. Positions too may be those of each
    sample: [B, P].

    Sample ids are global (unique over the whole job), so ids do not depend on dp. Raises ValueError
    for a key that is not threefry."""
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        if "fry" not in str(jax.random.key_impl(key)):
            raise ValueError(
                f"counter-based noise needs a threefry key, not {jax.random.key_impl(key)}"
            )
        key = jax.random.key_data(key)

    def one(sample: jax.Array, step: jax.Array | int, position: jax.Array) -> jax.Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), sample)
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(folded, step), position))

    positions_P = vary_like(positions_P, sample_ids_B)
    of_samples = 0 if jnp.ndim(step) else None
    own = 0 if positions_P.ndim == 2 else None
    every = jax.vmap(jax.vmap(one, (None, None, 0)), (0, of_samples, own))
    return every(sample_ids_B, step, positions_P)


@dataclass(frozen=True, eq=False)
class Draw:
    """What every sampler is asked for: one sequence of `length` tokens for each sample id.

    key: of all noise. sample_ids_B: int32 [B], global (unique over the whole job). Ids ≥ n_ids are
    never drawn; n_ids is the mask token of masked diffusion. temperature: 0 takes the largest
    logit. start_BxL: a prompt with n_ids where tokens are wanted, for samplers that reveal masks.
    trace: whether `info` holds every state.
    """

    key: jax.Array
    sample_ids_B: jax.Array
    length: int
    n_ids: int
    temperature: float = 1.0
    start_BxL: jax.Array | None = None
    trace: bool = False

    def keys(self, step: jax.Array | int) -> jax.Array:
        """The keys of all positions in `step`, uint32 [B, L, 2]."""
        return position_keys(self.key, self.sample_ids_B, step, jnp.arange(self.length))


def _unit(keys: jax.Array, counters: jax.Array, use: int) -> jax.Array:
    """u in (0, 1), relative precision 2^-24 down to 2^-65: keys [..., 2], counters broadcast
    against [...] → f32."""
    counters = counters.astype(jnp.uint32)
    shape = jnp.broadcast_shapes(keys.shape[:-1], counters.shape)
    words = [
        jnp.broadcast_to(w, shape) for w in (keys[..., 0], keys[..., 1], counters, jnp.uint32(use))
    ]
    # The primitive wants equal varying types: one sum of zeros takes on every axis over which an
    # operand varies.
    types = sum((w & 0 for w in words), jnp.uint32(0))
    return bits_to_unit(*threefry2x32_p.bind(*(vary_like(w, types) for w in words)))


def bits_to_unit(high: jax.Array, low: jax.Array) -> jax.Array:
    """(high·2^32 + low + 1/2) / 2^64, kept below 1: two uint32 words → f32."""
    u = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-64
    return jnp.minimum(u, 1 - 2.0**-24)


def uniform(keys: jax.Array) -> jax.Array:
    """One uniform in (0, 1) for each key: uint32 [..., 2] → f32 [...]."""
    return _unit(keys, jnp.zeros(keys.shape[:-1], jnp.uint32), UNIFORM)


def gumbel(keys: jax.Array, v_local: int) -> jax.Array:
    """Standard Gumbel noise of the vocabulary columns of this device: uint32 [..., 2] → f32 [...,
    V/tp], at most 45.1.

    -log(-log1p(-u)): the upper tail comes from small u, where floats are dense."""
    ids = vocab_offset(v_local) + jnp.arange(v_local)
    return -jnp.log(-jnp.log1p(-_unit(keys[..., None, :], ids, GUMBEL)))


def normal(keys: jax.Array, channels: int) -> jax.Array:
    """Standard normal noise: uint32 [..., 2] → f32 [..., channels], at most 9.5 (Box & Muller
    1958)."""
    keys, counters = keys[..., None, :], jnp.arange(channels)
    radius = jnp.sqrt(-2 * jnp.log(_unit(keys, counters, RADIUS)))
    return radius * jnp.cos(2 * jnp.pi * _unit(keys, counters, ANGLE))


def categorical(keys: jax.Array, logits_V: jax.Array, temperature: float = 1.0) -> jax.Array:
    """A token ~ softmax(logits / temperature), the largest logit for temperature 0: [..., V/tp] →
    int32 [...].

    Gumbel-max in f32 over the sharded vocabulary. Raises ValueError for a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    logits_V = logits_V.astype(jnp.float32)
    if temperature > 0:
        logits_V = logits_V / temperature + gumbel(keys, logits_V.shape[-1])
    return vocab_argmax(logits_V)[1]


def categorical_confidence(
    keys: jax.Array, logits_V: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """`categorical`, and the largest probability of softmax(logits) at temperature 1: [..., V/tp] →
    int32, f32 [...].

    For denoisers that reveal the most certain positions. Three reductions carry four scalars per
    row: the two maxima, the id of the winner, the sum of exponentials."""
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    logits_V = logits_V.astype(jnp.float32)
    scores_V = (
        logits_V / temperature + gumbel(keys, logits_V.shape[-1]) if temperature > 0 else logits_V
    )
    best = scores_V.max(-1)
    top_score, top_logit = pmax(jnp.stack([best, logits_V.max(-1)]), "tp")
    ids = scores_V.argmax(-1).astype(jnp.int32) + vocab_offset(scores_V.shape[-1])
    # The smallest id among the shards that hold the maximum, as `vocab_argmax`.
    token = -pmax(jnp.where(best == top_score, -ids, jnp.iinfo(jnp.int32).min), "tp")
    return token, 1 / psum(jnp.exp(logits_V - top_logit[..., None]).sum(-1), "tp")
