"""fdp's attention against JAX's own and torch's, on the device that is there: forward, forward and
backward, and block-sparse; and what a mask saves, counted.

    python -m benchmarks.attention      # sizes for 2 CPU cores, < 2 min
    python -m benchmarks.attention --seq=32768 --heads=32 --kv_heads=8 --head_dim=128 \\
        --dtype=bfloat16                # a GPU

All contenders compute the same function of the same arrays, except block-sparse, which keeps
`--density` of the blocks. torch's takes part on a CPU where torch is installed. Times and memory as
`timing` takes them. Counted figures come from the jaxpr, from the tiles that the program computes,
and from compiled programs.

Legend: B batch, S tokens, H query heads, K key/value heads, C head_dim; I blocks a side, T capacity
of a list."""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.timing import MODES, banner, compile_modes, table, time_interleaved
from fdp.count import jaxpr
from fdp.kernels_pallas.attend import attend
from fdp.kernels_pallas.block_sparse import BlockLists, block_lists, block_sparse_attention
from fdp.kernels_pallas.blockwise import tiles_computed
from fdp.parallel.context import layouts
from fdp.parallel.masks import Mask

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
SIZE = {
    "batch": 1,
    "seq": 2048,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "block": 64,
    "repeats": 15,
}
YARDSTICK = "jax.nn"


def random_lists(n_blocks: int, share: float, causal: bool) -> BlockLists:
    """The diagonal and random others, `share` of all visible pairs if that is more than the
    diagonal: [1, 1, I, T].
    """
    rng = np.random.default_rng(0)
    others = [
        rng.permutation(i if causal else np.delete(np.arange(n_blocks), i)) for i in range(n_blocks)
    ]
    room_I = np.cumsum([len(o) for o in others])
    extra = max(0, share * (room_I[-1] + n_blocks) - n_blocks)
    count_I = np.diff(np.floor(room_I / max(1, room_I[-1]) * extra).astype(int), prepend=0)
    chosen = [
        np.append(i, o[:count]) for i, (o, count) in enumerate(zip(others, count_I, strict=True))
    ]
    ids_IxT = np.stack([np.pad(c, (0, count_I.max() + 1 - len(c))) for c in chosen])
    return jax.jit(block_lists, static_argnums=2)(
        ids_IxT[None, None], count_I[None, None] + 1, n_blocks
    )


def contenders(args: argparse.Namespace) -> dict[str, Attend]:
    """Name → attention [B, S, H, C]; on a GPU, "fdp" in bfloat16 is cuDNN, and "fdp, our kernel"
    the one that serves cp and windows.
    """
    mask = Mask("causal" if args.causal else "bidirectional")
    n_blocks = -(-args.seq // args.block)
    lists = random_lists(n_blocks, args.density, args.causal)
    pairs = n_blocks * (n_blocks + 1) // 2 if args.causal else n_blocks**2
    density = int(lists.k_counts.sum()) / pairs

    def sparse(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return block_sparse_attention(q, k, v, lists, args.block, args.block, mask)[0]

    found: dict[str, Attend] = {
        YARDSTICK: lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=args.causal, implementation="xla"
        ),
        "fdp": lambda q, k, v: attend(q, k, v, mask)[0],
    }
    if jax.default_backend() == "gpu":
        place = jnp.arange(args.seq)
        found["fdp, our kernel"] = lambda q, k, v: attend(q, k, v, mask, place, place)[0]
    return found | {f"fdp, {density:.0%} of blocks": sparse}


def torch_modes(args: argparse.Namespace, arrays: tuple[Array, ...]) -> dict[str, Any]:
    """The same modes of torch's scaled_dot_product_attention on copies of the arrays."""
    import torch

    tensors = [torch.from_numpy(np.array(x, np.float32)).transpose(1, 2) for x in arrays]
    q, k, v, do = (x.to(getattr(torch, args.dtype)).contiguous() for x in tensors)
    grouped = args.heads != args.kv_heads

    def forward(*_: Array) -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=args.causal, enable_gqa=grouped
            )

    def both(*_: Array) -> Any:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *inputs, is_causal=args.causal, enable_gqa=grouped
        )
        return out, torch.autograd.grad(out, inputs, do)

    return {"forward": forward, "forward + backward": both}


def step_flops(mask: Mask, args: argparse.Namespace) -> int:
    """FLOPs of forward and backward tile by tile, positions known before tracing."""
    shape = (args.batch, args.seq, args.heads, args.head_dim)
    q = jax.ShapeDtypeStruct(shape, args.dtype)
    kv = jax.ShapeDtypeStruct((*shape[:2], args.kv_heads, shape[3]), args.dtype)
    place = np.arange(args.seq)
    how = {"backend": "xla", "out_type": "float32"}

    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, mask, place, place, **how)[0].sum()

    return jaxpr.dot_flops(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, kv, kv))


def busiest_tiles(layout: layouts.SequenceLayout, seq: int, cp: int) -> int:
    """Tiles that the busiest device computes in one pass of a causal ring of cp devices."""
    held = layouts.permutation(layout, seq, cp).reshape(cp, -1)
    return max(sum(tiles_computed(Mask("causal"), q, k) for k in held) for q in held)


def temporary(call: Attend, seq: int, cp: int, args: argparse.Namespace) -> int:
    """Bytes of temporaries of forward and backward on one device of cp, which gathered all keys."""
    q, kv = (
        jax.ShapeDtypeStruct((args.batch, n, heads, args.head_dim), args.dtype)
        for n, heads in ((seq // cp, args.heads), (seq, args.kv_heads))
    )
    return (
        compile_modes(call, (q, kv, kv, q))["forward + backward"]
        .memory_analysis()
        .temp_size_in_bytes
    )


def counted(args: argparse.Namespace) -> str:
    """What the mask saves: FLOPs, the busiest device of a ring, memory over cp."""
    causal, full = (step_flops(Mask(kind), args) for kind in ("causal", "bidirectional"))
    zigzag, contiguous = (
        busiest_tiles(layout, 8192, 8) for layout in (layouts.ZIGZAG, layouts.CONTIGUOUS)
    )
    mask, at, place = Mask("causal"), jnp.arange(2048) + 6144, jnp.arange(8192)
    seen = (place <= at[:, None])[None, None]
    tiled = temporary(lambda q, k, v: attend(q, k, v, mask, at, place)[0], 8192, 4, args)
    whole = temporary(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=seen), 8192, 4, args
    )
    rows = [
        (f"FLOPs, causal, {args.seq} tokens", f"{causal:.3g}", f"{full:.3g}", "bidirectional"),
        ("tiles of the busiest device, ring of 8, zig-zag", zigzag, contiguous, "contiguous"),
        ("temporaries, 8,192 tokens, cp = 4, MiB", tiled >> 20, whole >> 20, "whole scores"),
    ]
    ratios = causal / full, zigzag / contiguous, tiled / whole
    lines = [(*row, f"{ratio:.3f}") for row, ratio in zip(rows, ratios, strict=True)]
    headers = ("counted, forward + backward", "fdp", "against", "", "ratio")
    return tabulate(lines, headers=headers, disable_numparse=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line: sizes, dtype, mask and density."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=(__doc__ or "").splitlines()[0]
    )
    for key, value in SIZE.items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--density", type=float, default=0.1, help="share of the visible blocks (default 0.1)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compile, time and print."""
    args = parse(argv)
    print(banner())
    print(
        f"problem   batch {args.batch}, {args.seq} tokens, {args.heads} heads over "
        f"{args.kv_heads}, "
        f"head_dim {args.head_dim}, {args.dtype}, {'causal' if args.causal else 'bidirectional'}, "
        f"{args.repeats} rounds"
    )
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    shapes = [(args.batch, args.seq, n, args.head_dim) for n in heads]
    arrays = tuple(
        jax.random.normal(key, s, args.dtype) for key, s in zip(keys, shapes, strict=True)
    )
    compiled = {name: compile_modes(call, arrays) for name, call in contenders(args).items()}
    if jax.default_backend() == "cpu" and importlib.util.find_spec("torch"):
        compiled["torch"] = torch_modes(args, arrays)
    for mode in MODES:
        programs = {name: (modes[mode], arrays) for name, modes in compiled.items()}
        seconds = time_interleaved(programs, args.repeats)
        print("\n" + table(mode, programs, seconds, YARDSTICK))
    print("\n" + counted(args))


if __name__ == "__main__":
    main()
