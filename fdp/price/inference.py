"""Prices one forward step of a Transformer that samples with a key/value cache, on one node, at
{tp, dp}.

A step runs `rows` positions of every sequence against `keys` cached ones: all of them (a refresh),
a block (a reuse) or one (autoregressive). FLOPs and collectives are exact: tests hold them equal to
the jaxpr of the real programs. Seconds:

    matmul      max(FLOPs / (peak·gemm) · (1 + h_n/N)(1 + h_k/K), bytes / (HBM·hbm))
                M×K by K×N, weights read once
    attention   max(FLOPs / (peak·attention), bytes / (HBM·hbm)),  elementwise = bytes / (HBM·hbm)
    network     fdp.price.network.collective_time,                  launch = KERNEL a kernel

Coefficients are fitted to training steps (fdp.price.hybrid: gemm, h_n = half_columns, h_k =
half_depth, attention, hbm, bytes_width, bytes_hidden, with the chip's shifts) and to collectives
(fdp.price.network), never to inference. Its term half_rows is left out: the weights' bytes do its
work at few rows. Checked on kernel times that no fit had seen, Vidur's bfloat16 matmuls of 1-4096
rows (MIT licence; tests recompute it): |error| of KERNEL + matmul has median 9 % and 90 % quantile
24 % on 2,346 H100 matmuls, 12 % and 21 % on 2,748 of the A100. Collectives:
`network.held_out_error`. Attention and elementwise kernels: nothing to check them with here. CUDA
graphs are assumed, so the host is never waited for.

Legend: B sequences of a device, R rows, S keys, D width, H query heads, K key/value heads, C
head_dim, F FFN hidden, V vocabulary, t = tp; bytes and FLOPs are per device, of the busiest one.
"""

from dataclasses import dataclass, field

from fdp.models.shape import ModelShape
from fdp.price import hardware, hybrid, network, step_time
from fdp.price.shapes import named

KERNEL = 4e-6  # s a kernel: the shortest of the H100 matmuls above
# a layer: qkv, attention, output, gate-up, down; norms with residuals (2), rotary with cache write,
# gating
KERNELS = 9
MATMUL_ERROR = {
    "h100": (0.091, 0.244),
    "a100": (0.119, 0.209),
}  # (median, 90 % quantile) of |error|, as above
LOGIT_BYTES = 8  # traffic of one float32 logit: written, and read by the draw
USABLE = 0.9  # share of the HBM, as serving engines reserve it


# Nie et al. 2025 (arXiv 2502.09992)
LLADA_8B = ModelShape(32, 4096, 32, 32, 128, 12288, 126_464, dtype="bfloat16", name="llada-8b")
GQA_70B = named("llama3-70b")


@dataclass(frozen=True, order=True)
class Degrees:
    """tp splits heads, hidden and vocabulary, dp the requests."""

    tp: int
    dp: int

    def __str__(self) -> str:
        return f"dp{self.dp}·tp{self.tp}"

    def sequences(self, requests: int) -> int:
        """Sequences of the busiest device."""
        return -(-requests // self.dp)


@dataclass(frozen=True)
class ForwardPass:
    """One step over all requests: `rows` positions of each run, `keys` are attended to, `head_rows`
    reach the head, where one token is drawn. Of the keys, `prefix` are cached once for every
    `states` requests in a row, such as the states of a window of speculative decoding.
    """

    requests: int
    rows: int
    keys: int
    head_rows: int
    prefix: int = 0
    states: int = 1


def check(shape: ModelShape, work: ForwardPass, degrees: Degrees) -> None:
    """Raises ValueError for a model that is not priced (dense attention and SwiGLU without time
    conditioning are), and where the degrees do not divide it or exceed the requests."""
    if shape.time_conditioning:
        raise ValueError(
            "inference steps are priced without time conditioning: set "
            "model.time_conditioning=False"
        )
    if shape.experts:
        raise ValueError(
            f"model {shape.name!r}: prices of inference lack a mixture of {shape.experts} experts"
        )
    shape.check()
    for name in ("heads", "kv_heads", "ffn", "vocab"):
        size = getattr(shape, name)
        if degrees.tp < 1 or size % degrees.tp:
            fits = [
                t
                for t in range(1, 65)
                if not any(getattr(shape, n) % t for n in ("heads", "kv_heads", "ffn"))
            ]
            raise ValueError(
                f"{name} = {size} is not divisible by tp = {degrees.tp}: choose tp among {fits}, "
                "which divide heads, "
                "kv_heads and ffn"
            )
    if not 1 <= degrees.dp <= work.requests:
        raise ValueError(
            f"dp = {degrees.dp} replicas and {work.requests} requests: 1 ≤ dp ≤ requests must "
            "hold, or replicas idle; "
            f"set dp ≤ {work.requests}"
        )
    if not 1 <= work.head_rows <= work.rows <= work.keys:
        raise ValueError(
            f"1 ≤ head_rows ≤ rows ≤ keys must hold: {work.head_rows}, {work.rows}, {work.keys}; "
            "the cache holds every "
            "row that runs"
        )
    if not (0 <= work.prefix <= work.keys - work.rows and work.states >= 1):
        raise ValueError(
            f"0 ≤ prefix ≤ keys - rows and states ≥ 1 must hold: prefix = {work.prefix}, keys = "
            f"{work.keys}, rows = {work.rows}, states = {work.states}; rows that run are no prefix"
        )


# Exact counts
# -------------------------------------------------------------------------------------------------


def matmuls(
    shape: ModelShape, work: ForwardPass, degrees: Degrees
) -> list[tuple[int, int, int, int]]:
    """(M rows, N columns, K depth, times) of the products with weights, q, k, v and gate, up each
    as one.
    """
    s, t, rows = shape, degrees.tp, degrees.sequences(work.requests) * work.rows
    return [
        (rows, (s.heads + 2 * s.kv_heads) * s.head_dim // t, s.width, s.layers),
        (rows, s.width, s.heads * s.head_dim // t, s.layers),
        (rows, 2 * s.ffn // t, s.width, s.layers),
        (rows, s.width, s.ffn // t, s.layers),
        (degrees.sequences(work.requests) * work.head_rows, s.vocab // t, s.width, 1),
    ]


def attention_flops(shape: ModelShape, work: ForwardPass, degrees: Degrees) -> int:
    """q·kᵀ and p·v of one layer, every key counted."""
    return (
        4
        * degrees.sequences(work.requests)
        * work.rows
        * work.keys
        * shape.heads
        // degrees.tp
        * shape.head_dim
    )


def flops(shape: ModelShape, work: ForwardPass, degrees: Degrees) -> int:
    """Matmul FLOPs of the step (2·m·n·k each)."""
    products = sum(2 * m * n * k * times for m, n, k, times in matmuls(shape, work, degrees))
    return products + shape.layers * attention_flops(shape, work, degrees)


def collectives(
    shape: ModelShape, work: ForwardPass, degrees: Degrees, sequence_parallel: bool
) -> list[tuple[str, int, int]]:
    """(op of fdp.price.network, payload bytes, times) over tp: sublayer sums, and two numbers a
    request to draw a token.
    """
    if degrees.tp == 1:
        return []
    b, sums = (
        degrees.sequences(work.requests),
        2 * shape.layers + 1,
    )  # two sublayers a layer, and the embedding
    hidden = b * work.rows * shape.width * shape.itemsize
    draw = ("all_reduce", 4 * b, 2)
    if sequence_parallel:
        return [("all_gather", hidden, sums), ("reduce_scatter", hidden, sums), draw]
    return [("all_reduce", hidden, sums), draw]


def wire_bytes(found: list[tuple[str, int, int]], ranks: int) -> float:
    """Bytes a device sends by ring algorithms for what `collectives` lists."""
    return sum(
        (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks * n * times for op, n, times in found
    )


def weight_bytes(shape: ModelShape, tp: int) -> int:
    """Embedding, layers and head; the norms' scales, some thousands, are left out."""
    layer = sum(shape.attention_parameters()) + shape.ffn_parameters()
    return (
        shape.itemsize
        * (shape.layers * layer + (1 if shape.tied else 2) * shape.vocab * shape.width)
        // tp
    )


def cache_bytes(shape: ModelShape, requests: int, keys: int, degrees: Degrees) -> int:
    """Keys and values that the busiest device holds."""
    heads = shape.kv_heads // degrees.tp
    return (
        2
        * shape.layers
        * degrees.sequences(requests)
        * keys
        * heads
        * shape.head_dim
        * shape.itemsize
    )


def workspace_bytes(shape: ModelShape, work: ForwardPass, degrees: Degrees) -> int:
    """Activations alive at once in one layer, and the float32 logits."""
    s, t, b = shape, degrees.tp, degrees.sequences(work.requests)
    widths = 4 * s.width + ((s.heads + 2 * s.kv_heads) * s.head_dim + 3 * s.ffn) // t
    return b * work.rows * widths * s.itemsize + 4 * b * work.head_rows * s.vocab // t


# Seconds
# -------------------------------------------------------------------------------------------------

# Which resource a term waits for.
BOUND = {
    "matmul compute": "compute", "attention compute": "compute", "matmul memory": "memory",
    "attention memory": "memory", "elementwise": "memory", "launch": "launch",
    "network below 1 MiB": "network", "network from 1 MiB": "network",
}  # fmt: skip


@dataclass(frozen=True)
class PassTime:
    """A priced step. `terms`: seconds by the keys of BOUND; `sequence_parallel`: whether the faster
    program is that.
    """

    terms: dict[str, float] = field(default_factory=dict)
    sequence_parallel: bool = False

    @property
    def seconds(self) -> float:
        """Nothing overlaps: the step waits for every sum over tp, as engines without fused
        collectives do.
        """
        return sum(self.terms.values())

    @property
    def bound(self) -> str:
        """The resource that takes most of the time: compute, memory, network or launch."""
        totals = dict.fromkeys(BOUND.values(), 0.0)
        for name, seconds in self.terms.items():
            totals[BOUND[name]] += seconds
        return max(totals, key=totals.__getitem__)


def coefficient(name: str, chip: str) -> float:
    """Fitted coefficient `name` of fdp.price.step_time.BOUNDS with the shift of `chip`."""
    model = hybrid.shipped()
    shift = model.effects.get(f"{name}|chip", {}).get(hardware.chip(chip).name, 0.0)
    bounds = {name: step_time.BOUNDS[name]}
    return float(hybrid.bounded({name: model.time[name] + shift}, bounds)[name])


def matmul_error(chip: str) -> tuple[float, float]:
    """(median, 90 % quantile) of |error| of a matmul's seconds. Raises ValueError for a chip
    without measured ones.
    """
    name = hardware.chip(chip).name
    if name not in MATMUL_ERROR:
        raise ValueError(
            f"no measured matmuls of {name} to judge its times by: known are "
            f"{', '.join(MATMUL_ERROR)}"
        )
    return MATMUL_ERROR[name]


def matmul_bounds(m: int, n: int, k: int, chip: str, itemsize: int = 2) -> tuple[float, float]:
    """Seconds of an M×K by K×N product by (compute, memory); the larger counts, and KERNEL comes on
    top.
    """
    c, rate = hardware.chip(chip), lambda name: coefficient(name, chip)
    bend = (1 + rate("half_columns") / n) * (1 + rate("half_depth") / k)
    moved = itemsize * (m * k + k * n + m * n)
    return 2 * m * n * k / (c.peak_bf16_flops * rate("gemm")) * bend, moved / (
        c.hbm_bandwidth * rate("hbm")
    )


def price(
    shape: ModelShape,
    work: ForwardPass,
    degrees: Degrees,
    chip: str,
    sequence_parallel: bool = False,
) -> PassTime:
    """Seconds of one step on a node of `chip`, all ranks in one scale-up domain.

    Raises ValueError as `check` does, for tp beyond the domain, and for rows that tp does not
    divide where the sequence is parallel."""
    check(shape, work, degrees)
    c, t = hardware.chip(chip), degrees.tp
    if t > c.domain:
        raise ValueError(
            f"tp = {t} exceeds the {c.domain} chips of one scale-up domain of {c.name}: set tp ≤ "
            f"{c.domain}"
        )
    if sequence_parallel and work.rows % t:
        raise ValueError(
            f"rows % tp = {work.rows} % {t} = {work.rows % t}: a parallel sequence needs 0"
        )
    terms = dict.fromkeys(BOUND, 0.0)
    for m, n, k, times in matmuls(shape, work, degrees):
        compute, memory = matmul_bounds(m, n, k, chip, shape.itemsize)
        terms["matmul compute" if compute > memory else "matmul memory"] += times * max(
            compute, memory
        )
    _attention(terms, shape, work, degrees, chip)
    terms["elementwise"] = _elementwise(shape, work, degrees, chip, t if sequence_parallel else 1)
    terms["launch"] = KERNEL * (KERNELS * shape.layers + 4)  # embedding, last norm, head, draw
    for op, nbytes, times in collectives(shape, work, degrees, sequence_parallel):
        name = "network below 1 MiB" if nbytes < network.SMALL else "network from 1 MiB"
        terms[name] += times * float(network.collective_time(op, nbytes, t, t, chip))
    return PassTime(terms, sequence_parallel)


def _attention(
    terms: dict[str, float], shape: ModelShape, work: ForwardPass, degrees: Degrees, chip: str
) -> None:
    c, b = hardware.chip(chip), degrees.sequences(work.requests)
    compute = attention_flops(shape, work, degrees) / (
        c.peak_bf16_flops * coefficient("attention", chip)
    )
    queries = (
        2 * b * work.rows * shape.heads * shape.head_dim * shape.itemsize / degrees.tp
    )  # read, and outputs written
    copies = -(-b // work.states)
    cached = cache_bytes(shape, b, work.keys - work.prefix, Degrees(degrees.tp, 1))
    cached += cache_bytes(shape, copies, work.prefix, Degrees(degrees.tp, 1))
    memory = (queries + cached / shape.layers) / (c.hbm_bandwidth * coefficient("hbm", chip))
    terms["attention compute" if compute > memory else "attention memory"] += shape.layers * max(
        compute, memory
    )


def _elementwise(
    shape: ModelShape, work: ForwardPass, degrees: Degrees, chip: str, split: int
) -> float:
    """Norms, residuals, rotary, gating and the draw; `split`: tp where the sequence is parallel
    between sublayers.
    """
    s, t, b = shape, degrees.tp, degrees.sequences(work.requests)
    residual = s.width * coefficient("bytes_width", chip) / split
    hidden = (s.heads * s.head_dim + s.ffn) / t * coefficient("bytes_hidden", chip)
    logits = b * work.head_rows * s.vocab / t * LOGIT_BYTES
    moved = s.layers * b * work.rows * (residual + hidden) * s.itemsize / 2 + logits
    return moved / (hardware.chip(chip).hbm_bandwidth * coefficient("hbm", chip))


def fastest(shape: ModelShape, work: ForwardPass, degrees: Degrees, chip: str) -> PassTime:
    """The faster of the plain and, where tp divides the rows, the sequence-parallel program."""
    steps = [price(shape, work, degrees, chip)]
    if degrees.tp > 1 and work.rows % degrees.tp == 0:
        steps.append(price(shape, work, degrees, chip, sequence_parallel=True))
    return min(steps, key=lambda step: step.seconds)
