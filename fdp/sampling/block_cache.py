"""Block diffusion with an exact key/value cache: finished blocks are final, and see nothing that
comes after them, so their keys and values are those of any later pass.

A step of the sampler without a cache runs 2L rows: the noisy sequence beside the clean one
(`fdp.objectives.block_diffusion`). Here it runs the rows of the current block, which attend to one
another and to the cached prefix. One clean pass for each finished block fills the cache. The ids
are those of `chain.follow` of the whole sequence: the noise of a position depends on its place and
on the step, and both are handed to the block.

The states of a speculative window (`fdp.sampling.speculative`) are rows of the batch, and all W
states of a sample read one prefix: in attention their queries stand side by side before the same
keys, so nothing of the cache is copied for a state.

Legend: B samples, W states of a window, N = W·B, L positions, R rows of a pass, P prompt, H and K
query and key/value heads, C head_dim, V vocabulary (tp: V/tp columns)."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from fdp.collectives import vary_like
from fdp.kernels_pallas import attend as front
from fdp.kernels_pallas.blockwise import merge_lse
from fdp.models import module
from fdp.models.attention import Softmax
from fdp.models.transformer import Transformer, with_core
from fdp.objectives.block_diffusion import BlockCausalRule, BlockDiffusionRule
from fdp.parallel.masks import Mask
from fdp.sampling.chain import Ancestral, Chain, Denoise, Info, anywhere, initial_state
from fdp.sampling.speculative import Drafter, StaleDrafter, speculate

Array = jax.Array
BEFORE = Mask("causal")  # of the rows of a pass, placed just before its first one


@dataclass(frozen=True)
class BlockSoftmax(Softmax):
    """Softmax attention of the blocks of one sequence, each to itself and to earlier ones, beside a
    cache of those that are finished: a `PrefixCore`."""

    def check_cache(self) -> None:
        """Its rule is one of positions, so a cache changes nothing."""

    def beside(
        self, q_NxRxHxC: Array, k_NxRxKxC: Array, v: Array, held: tuple[Array, Array], index: Array
    ) -> Array:
        """As of `PrefixCore`, for whole blocks of rows: attention to the cache before the first
        row, and to the rows themselves, merged."""
        (N, R), B = q_NxRxHxC.shape[:2], len(held[0])
        assert isinstance(self.mask.rule, BlockCausalRule)
        exact = {"out_type": jnp.float32}
        given = (Mask(), None, None) if self.mask.rule.block == R else (self.mask, index, index)
        own, own_lse = front.attend(q_NxRxHxC, k_NxRxKxC, v, *given, **exact)

        def side_by_side(x_NxRx: Array) -> Array:  # [W·B, R, …] → [B, W·R, …]
            x = jnp.moveaxis(x_NxRx.reshape(N // B, B, R, *x_NxRx.shape[2:]), 0, 1)
            return x.reshape(B, -1, *x_NxRx.shape[2:])

        def by_state(x_BxWRx: Array) -> Array:  # and back
            x = jnp.moveaxis(x_BxWRx.reshape(B, N // B, R, *x_BxWRx.shape[2:]), 1, 0)
            return x.reshape(N, R, *x_BxWRx.shape[2:])

        last = side_by_side(jnp.broadcast_to(index[:, :1] - 1, index.shape))
        places = last, jnp.arange(held[0].shape[1])
        out, lse = front.attend(side_by_side(q_NxRxHxC), *held, BEFORE, *places, **exact)
        lse = jnp.moveaxis(by_state(jnp.moveaxis(lse, 1, 2)), 2, 1)
        return merge_lse(own, own_lse, by_state(out), lse)[0].astype(q_NxRxHxC.dtype)


def cacheable(model: Any) -> TypeGuard[Transformer]:
    """Whether `BlockCache` takes a model: it has the attention of block diffusion in every layer,
    and does not read the noise level."""
    return (
        isinstance(model, Transformer)
        and model.stock
        and len(set(model.pattern)) == 1
        and isinstance(model.softmax.mask.rule, BlockDiffusionRule)
        and not model.shape.time_conditioning
    )


@dataclass(frozen=True)
class BlockCache:
    """A `model` that block diffusion has trained, read through a cache.

    Raises ValueError for a model that has not the attention of block diffusion in every layer, or
    that reads the noise level."""

    model: Transformer

    def __post_init__(self) -> None:
        model = self.model
        if cacheable(model):
            return
        if not model.shape.time_conditioning:
            what = model.softmax.mask if model.stock else model.pattern
            raise ValueError(
                "finished blocks have final keys and values only where no layer shows them what "
                f"comes later, and the layers are {what}: train with "
                "objective.name=block_diffusion and softmax attention, or sample without a cache"
            )
        raise ValueError(
            "keys and values of finished blocks would depend on the noise of the block that is "
            "decoded, and model.time_conditioning = True: set it to False, or sample without a "
            "cache"
        )

    @property
    def block(self) -> int:
        """Positions of a block."""
        rule = self.model.softmax.mask.rule
        assert isinstance(rule, BlockDiffusionRule)
        return rule.block

    @property
    def reader(self) -> Transformer:
        """The model of the same parameters that reads rows of one sequence beside the cache."""
        core = BlockSoftmax(Mask(rule=BlockCausalRule(self.block)))
        return with_core(self.model, core).clone(position=None)

    def empty(self, batch: int, length: int) -> Any:
        """A cache of `batch` sequences of `length`."""
        return self.reader.decode_state(batch, length)[0]

    def fill(self, variables: Any, cache: Any, x_BxR: Array, start: Array | int) -> Any:
        """The cache with the finished blocks `x_BxR` from position `start`: one pass. What was
        cached before `start` is read, the rest is not."""
        index_BxR = _index(x_BxR, start)
        args = self.reader, variables, x_BxR, _unread(x_BxR), index_BxR
        return module.run(*args, method="hidden", cache=cache)[2]

    def denoise(self, variables: Any, cache: Any, start: Array | int) -> Denoise:
        """(rows of the block at `start` [W·B, R], noise) → logits [W·B, R, V/tp], for
        `chain.follow` and `speculative.speculate` on a chain of these rows. The noise is not
        read."""
        reader = self.reader

        def logits(z_NxR: Array, noise_N: Array) -> Array:
            args = reader, variables, z_NxR, _unread(z_NxR), _index(z_NxR, start)
            hidden, _, _ = module.run(*args, method="hidden", cache=cache, write=False)
            return module.run(reader, variables, hidden, method="outputs")[0]

        return logits

    def check(self, chain: Chain, prompt: int) -> None:
        """Raises ValueError for a chain that does not go block by block as the model does."""
        length, block = chain.draw.length, self.block
        if isinstance(chain, Ancestral):
            raise ValueError(
                "steps of the ancestral grid are of whole sequences, and a cache is decoded block "
                f"by block: use a Chain with block={block}"
            )
        if chain.block != block:
            raise ValueError(
                f"the chain's block = {chain.block} is not the model's block = {block}, after "
                f"which keys and values are final: set block={block}"
            )
        if length % block or prompt % block or prompt >= length:
            whole = -(-max(length, prompt + 1) // block) * block
            raise ValueError(
                f"prompt < length must be whole blocks of {block}: prompt % block = {prompt} % "
                f"{block} = {prompt % block}, length % block = {length} % {block} = "
                f"{length % block}; cut the prompt to {prompt // block * block} tokens, and set "
                f"length={whole}"
            )
        if chain.draw.start_BxL is not None or chain.draw.trace:
            raise ValueError(
                "blocks begin masked after prompt_BxP and no state is kept, and the draw has "
                f"{'trace=True: set it to False' if chain.draw.trace else 'start_BxL: give None'}"
            )


def _index(z_NxR: Array, start: Array | int) -> Array:
    return jnp.broadcast_to(start + jnp.arange(z_NxR.shape[1]), z_NxR.shape)


def _unread(z_NxR: Array) -> Array:
    """A noise level for a model that does not read it."""
    return vary_like(jnp.zeros(len(z_NxR)), z_NxR)


class _Blocks(NamedTuple):
    """Of the loop over blocks. start: of the next one. step_B: of the noise that comes next."""

    start: Array
    z_BxL: Array
    cache: Any
    step_B: Array
    ended_B: Array
    counts: Info
    more: Array


def sample(
    how: BlockCache,
    variables: Any,
    chain: Chain,
    drafter: Drafter | None = None,
    *,
    window: int = 1,
    prompt_BxP: Array | None = None,
) -> tuple[Array, Info]:
    """(ids int32 [B, L], info): the ids of `follow(chain, …)` without a cache, block by block.

    `window` and `drafter` (None: stale marginals) as in `speculate` with shared noise; a drafter
    sees the rows of the block. `prompt_BxP`: whole blocks that come first. With `chain.eos` no
    block is decoded after all samples have ended. Runs unsharded and inside shard_map.

    info as of `speculate`, summed over blocks, with "judged", "accepted" and "bad" [block] by the
    step inside a block; besides, int32: "fills", clean passes over finished blocks (the prompt is
    one pass; nothing reads the last block); "rows", those that the model computed for a sample.
    Raises ValueError as `BlockCache.check` does, and under cp > 1."""
    draw, R = chain.draw, how.block
    P = 0 if prompt_BxP is None else prompt_BxP.shape[1]
    how.check(chain, P)
    B, L = len(draw.sample_ids_B), draw.length
    drafter = drafter or StaleDrafter()
    z_BxL = initial_state(draw.sample_ids_B, L, draw.n_ids, None)
    cache = how.empty(B, L)
    if prompt_BxP is not None:
        prompt_BxP = vary_like(prompt_BxP.astype(jnp.int32), z_BxL)
        z_BxL, cache = z_BxL.at[:, :P].set(prompt_BxP), how.fill(variables, cache, prompt_BxP, 0)

    def decoded(at: _Blocks) -> tuple[Array, Info]:
        rows_BxR = jax.lax.dynamic_slice_in_dim(at.z_BxL, at.start, R, 1)
        if chain.eos is not None:
            rows_BxR = jnp.where(at.ended_B[:, None], chain.eos, rows_BxR)
        asked = replace(draw, length=R, start_BxL=rows_BxR)
        own = replace(chain, draw=asked, block=None, start=at.start, first=at.step_B)
        denoise = how.denoise(variables, at.cache, at.start)
        return speculate(own, denoise, drafter, window=window)

    def body(at: _Blocks) -> _Blocks:
        rows_BxR, info = decoded(at)
        ended_B = at.ended_B
        if chain.eos is not None:
            ended_B |= (rows_BxR == chain.eos).any(1)
        more = (at.start + R < L) & anywhere(~ended_B)
        cache = jax.lax.cond(
            more, lambda: how.fill(variables, at.cache, rows_BxR, at.start), lambda: at.cache
        )
        fills = more.astype(jnp.int32)
        info |= {"fills": fills, "rows": R * (info["nfe"] * window + fills)}
        z_BxL = jax.lax.dynamic_update_slice_in_dim(at.z_BxL, rows_BxR, at.start, 1)
        counts = jax.tree.map(jnp.add, at.counts, info)
        step_B = at.step_B + info["steps"]
        return _Blocks(at.start + R, z_BxL, cache, step_B, ended_B, counts, more)

    none_B = vary_like(jnp.zeros(B, jnp.int32), z_BxL)
    begin = _Blocks(jnp.int32(P), z_BxL, cache, none_B, none_B > 0, {}, jnp.bool(True))
    counts = {name: jnp.int32(0) for name in ("nfe", "states", "passes")}
    counts |= {"rounds": none_B, "steps": none_B}
    counts |= {name: jnp.zeros(R, jnp.int32) for name in ("judged", "accepted", "bad")}
    counts |= {"fills": jnp.int32(P > 0), "rows": jnp.int32(P)}
    at = jax.lax.while_loop(lambda at: at.more, body, begin._replace(counts=counts))
    if chain.eos is None:
        return at.z_BxL, at.counts
    after_BxL = at.ended_B[:, None] & (jnp.arange(L) >= at.start)
    return jnp.where(after_BxL, chain.eos, at.z_BxL), at.counts
