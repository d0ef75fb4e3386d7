"""Matrix products of rows with the weights of their group, and the feed-forward network of experts.

Rows of one group are contiguous and start at a multiple of `block`; the rest of its last block, and
all blocks past the last group, are zero rows. So a block of rows needs the weights of one group,
and no weight is ever copied per row or per block. Source of the layout: Gale et al. 2022
(MegaBlocks), section 4.

- a TPU, a GPU: our kernels (Mosaic, Triton);
- elsewhere: XLA, block by block.

Not used: `jax.lax.ragged_dot`, which is a product of all rows with all experts on a CPU and, with
buffers to match, on NVIDIA GPUs; JAX's `ragged_dot_mgpu`, which has no gradient and wants K in
whole tiles; tokamax, which looks for its kernels on the devices of the process, so that nothing can
be compiled for others, and takes 1.6 to 2.5 times as long (docs/experts.md).

Legend: E groups (experts), R rows of the buffer, K and N contracted and free dim of a weight, D
width, F hidden width, B rows of a block."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fdp.kernels_pallas import walks
from fdp.kernels_pallas.grouped_tpu import Mosaic
from fdp.kernels_pallas.grouped_triton import Triton
from fdp.kernels_pallas.grouped_xla import Loop
from fdp.kernels_pallas.tiles import power_of_two

Array = jax.Array
Kernels = Loop | Triton | Mosaic
BLOCKS = {"xla": (16, 64), "gpu": (16, 128), "tpu": (16, 512)}  # least and most rows of a block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """How the rows of a buffer belong to experts: `blocks` blocks of `block` rows.

    sizes_E int32: rows of each expert. Their blocks must fit: Σ ⌈size / block⌉ ≤ blocks; see
    `most_blocks`."""

    sizes_E: Array
    block: int = field(metadata={"static": True})
    blocks: int = field(metadata={"static": True})

    @property
    def rows(self) -> int:
        """R: rows of the buffer."""
        return self.block * self.blocks

    @property
    def blocks_E(self) -> Array:
        """Blocks of each expert: int32 [E]."""
        return lax.div(self.sizes_E + (self.block - 1), jnp.int32(self.block))

    @property
    def first_E(self) -> Array:
        """The first block of each expert: int32 [E]."""
        return jnp.cumsum(self.blocks_E, dtype=jnp.int32) - self.blocks_E

    @property
    def starts_E(self) -> Array:
        """The row where each expert starts: int32 [E]."""
        return self.first_E * self.block

    @property
    def expert_of_block(self) -> Array:
        """The expert of each block, E for blocks past the last group: int32 [blocks]."""
        ends_E = jnp.cumsum(self.blocks_E, dtype=jnp.int32)
        places = jnp.arange(self.blocks, dtype=jnp.int32)
        return (ends_E <= places[:, None]).sum(1, dtype=jnp.int32)


def most_blocks(rows: int, experts: int, block: int) -> int:
    """The most blocks that `rows` rows fill, however they fall on the experts.

    n = min(rows, experts) experts have at least one row, which begins a block; every further block
    takes `block` rows more: n + ⌊(rows - n) / block⌋."""
    n = min(rows, experts)
    return max(1, n + (rows - n) // block)


def buffer_rows(rows: int, experts: int, block: int) -> int:
    """Rows of the smallest buffer that holds `rows` rows, however they fall on the experts."""
    return block * most_blocks(rows, experts, block)


def make_groups(sizes_E: Array, rows: int, block: int) -> Groups:
    """Groups of at most `rows` rows in all, in the smallest buffer that always suffices."""
    return Groups(sizes_E, block, most_blocks(rows, sizes_E.shape[0], block))


def choose_block(rows: int, experts: int, backend: str | None = None) -> int:
    """Rows of a block for about `rows` rows over `experts` experts; backend as in `grouped_matmul`.

    At most half of an expert's rows, a power of two within the limits of the platform, so that
    padding adds a quarter on average. Measured on a CPU, where 512, 128, 64 and 16 rows an expert
    are fastest in blocks of 64, 64, 32 and 16; the limits of accelerators are what fits a tile, not
    measured."""
    least, most = BLOCKS[walks.choose_backend(backend)]
    half = max(1, rows // (2 * experts))
    return min(max(1 << half.bit_length() - 1, least), most)


# Products
# -------------------------------------------------------------------------------------------------


def reference_matmul(x_RxK: Array, w_ExKxN: Array, groups: Groups) -> Array:
    """The oracle of `grouped_matmul`: every row with every weight, f32 [R, N].

    Padding in the blocks of an expert counts as rows of that expert; it is zero."""
    x, w = x_RxK.astype(jnp.float32), w_ExKxN.astype(jnp.float32)
    expert_R = jnp.repeat(groups.expert_of_block, groups.block)
    mine_RxE = expert_R[:, None] == jnp.arange(len(w))
    y_RxExN = jnp.einsum("rk,ekn->ren", x, w, precision="highest")
    return jnp.where(mine_RxE[..., None], y_RxExN, 0.0).sum(1)


def reference_ffn(x_RxD: Array, w_in_Ex2xDxF: Array, w_out_ExFxD: Array, groups: Groups) -> Array:
    """The oracle of `grouped_ffn`, f32 [R, D]."""
    gate, up = (reference_matmul(x_RxD, w_in_Ex2xDxF[:, i], groups) for i in (0, 1))
    return reference_matmul(jax.nn.silu(gate) * up, w_out_ExFxD, groups)


def grouped_matmul(
    x_RxK: Array,
    w_ExKxN: Array,
    groups: Groups,
    *,
    backend: str | None = None,
    interpret: object = False,
) -> Array:
    """x[r] · w[expert of row r] → [R, N] like x; zero rows stay zero rows.

    Differentiable in x and w; accumulates in f32. A group of no row has a zero gradient. backend:
    "tpu", "gpu" or "xla", None by platform. interpret: as `pl.pallas_call` takes it, for tests.
    Raises ValueError for shapes and dtypes that do not fit."""
    _check(x_RxK, (w_ExKxN,), (w_ExKxN.shape,), groups)
    kernels = _choose(backend, interpret, groups)
    return _matmul(kernels, *walks.alike((x_RxK, w_ExKxN, groups)))


def grouped_ffn(
    x_RxD: Array,
    w_in_Ex2xDxF: Array,
    w_out_ExFxD: Array,
    groups: Groups,
    *,
    backend: str | None = None,
    interpret: object = False,
) -> Array:
    """(silu(x w_in[e, 0]) * (x w_in[e, 1])) w_out[e] with e the expert of each row → [R, D] like x.

    The backward pass keeps x and both products with w_in. Arguments and errors as in
    `grouped_matmul`."""
    shape = (*w_in_Ex2xDxF.shape[:1], *w_in_Ex2xDxF.shape[2:])  # of the gate's half
    _check(x_RxD, (w_in_Ex2xDxF, w_out_ExFxD), (shape, w_out_ExFxD.shape), groups)
    kernels = _choose(backend, interpret, groups)
    return _ffn(kernels, *walks.alike((x_RxD, w_in_Ex2xDxF, w_out_ExFxD, groups)))


def _choose(backend: str | None, interpret: object, groups: Groups) -> Kernels:
    """The kernels of the platform; raises ValueError for a block that they cannot cut."""
    backend = walks.choose_backend(backend)
    if backend == "xla":
        return Loop()
    block = groups.block
    if backend == "gpu" and block != power_of_two(block, 16):
        raise ValueError(f"block = {block} on the GPU: choose a power of two, 16 at least")
    if backend == "tpu" and block % 16:
        raise ValueError(f"block = {block} on the TPU: choose a multiple of 16")
    return Triton(interpret) if backend == "gpu" else Mosaic(interpret)


def _check(
    x: Array, weights: tuple[Array, ...], chain: tuple[tuple[int, ...], ...], groups: Groups
) -> None:
    """Raise ValueError unless the chain of products with weights of these shapes fits together."""
    E, K = groups.sizes_E.shape[0], x.shape[1]
    for shape in chain:
        if len(shape) != 3 or shape[:2] != (E, K):
            raise ValueError(
                f"weights of {E} groups that take width {K} must be [{E}, {K}, ·], not "
                f"{list(shape)}: x {x.shape}, weights {', '.join(str(w.shape) for w in weights)}"
            )
        K = shape[2]
    if x.shape[0] != groups.rows:
        raise ValueError(
            f"x has {x.shape[0]} rows but groups have blocks · block = {groups.blocks} · "
            f"{groups.block} = {groups.rows}: lay the rows out as `Groups.starts_E` says"
        )
    dtypes = {str(a.dtype) for a in (x, *weights)}
    if len(dtypes) > 1 or x.dtype not in walks.DTYPES:
        raise ValueError(
            f"dtypes {', '.join(sorted(dtypes))} must be equal, float32 or bfloat16: cast them"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(kernels: Kernels, x: Array, w: Array, groups: Groups) -> Array:
    return kernels.product(x[None], w[:, None], groups, False)


def _matmul_forward(kernels, x, w, groups):
    return _matmul(kernels, x, w, groups), (x, w, groups)


def _matmul_backward(kernels, saved, dy):
    x, w, groups = saved
    dx = kernels.product(dy[None], w[:, None], groups, True)
    return dx, kernels.weight_gradients(x, dy[None], groups, w.dtype)[:, 0], None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(kernels: Kernels, x: Array, w_in: Array, w_out: Array, groups: Groups) -> Array:
    (h,) = kernels.hidden(x, w_in, groups, False)
    return kernels.product(h[None], w_out[:, None], groups, False)


def _ffn_forward(kernels, x, w_in, w_out, groups):
    h, kept = kernels.hidden(x, w_in, groups, True)
    y = kernels.product(h[None], w_out[:, None], groups, False)
    return y, (x, w_in, w_out, kept, groups)


def _ffn_backward(kernels, saved, dy):
    x, w_in, w_out, kept, groups = saved
    grads, h = kernels.hidden_gradients(dy, w_out, kept, groups)
    dw_out = kernels.weight_gradients(h, dy[None], groups, w_out.dtype)[:, 0]
    dx = kernels.product(grads, w_in, groups, True)
    return dx, kernels.weight_gradients(x, grads, groups, w_in.dtype), dw_out, None


_ffn.defvjp(_ffn_forward, _ffn_backward)
