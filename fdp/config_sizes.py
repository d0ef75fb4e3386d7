"""Bytes that a config certainly needs on a device, each with its equation, to be compared with what
is there before anything is allocated. Lower bounds: what they refuse cannot run.

Imports neither jax nor flax."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fdp.config_images import IMAGE_MODELS
from fdp.config_pipeline import shares_head
from fdp.keys import UserError

MAX_DEVICES = 2**16
MAX_BYTES = 2**43  # of one device: neither a device nor a host holds 8 TiB


@dataclass(frozen=True)
class LowerBound:
    """`what` takes `count` bytes a device by `equation`, in which the key `lower` decides."""

    what: str
    equation: str
    count: float
    lower: str


def refuse(c: Any, limit: float, whose: str, more: Iterator[LowerBound] | tuple[()] = ()) -> None:
    """Raise UserError for the first size above `limit` bytes, which `whose` describes. `more`: of a
    topic."""
    for size in (*sizes(c), *more):
        if size.count > limit:
            raise UserError(
                f"{size.what}, {size.equation} = {amount(size.count)} a device, exceed {whose}: "
                f"lower {size.lower}"
            )


def check_devices(c: Any) -> None:
    """Raise UserError for a mesh that no machine has."""
    if (devices := math.prod(c.mesh.values())) > MAX_DEVICES:
        equation = "·".join(str(degree) for degree in c.mesh.values())
        raise UserError(
            f"pp·dp·ep·cp·tp = {equation} = {devices} devices are more than {MAX_DEVICES}: lower a "
            "mesh.* degree"
        )


def amount(count: float) -> str:
    """Bytes in GiB or TiB."""
    if count >= 2**40:
        return f"{count / 2**40:.3g} TiB"
    return f"{count / 2**30:.3g} GiB"


def sizes(c: Any) -> Iterator[LowerBound]:
    """Of state, experts, a batch between blocks, and what is drawn at the end of an arm."""
    yield _state(c)
    if c.model.moe.experts:
        yield from _experts(c)
    if c.model.kind in IMAGE_MODELS:
        yield from _images(c)
        return
    m, mesh, t = c.model, c.mesh, c.train
    ways = mesh.dp * mesh.ep * mesh.cp * t.microbatches
    yield LowerBound(
        "the residual streams",
        "4·batch·seq_len·width/(dp·ep·cp·microbatches) bytes = "
        f"4·{t.batch}·{c.data.seq_len}·{m.width}/({mesh.dp}·{mesh.ep}·{mesh.cp}·{t.microbatches})",
        4 * t.batch * c.data.seq_len * m.width / ways,
        "train.batch or data.seq_len",
    )
    yield sequences(c, "eval.samples", c.eval.samples)


def sequences(c: Any, key: str, n: int) -> LowerBound:
    """`n` sequences that go through the model at once, over the data axes."""
    m, mesh, length = c.model, c.mesh, c.data.seq_len
    return LowerBound(
        f"the residual streams of {key}",
        f"4·{key.split('.')[-1]}·seq_len·width/(dp·ep·cp) bytes = 4·{n}·{length}·{m.width}/"
        f"({mesh.dp}·{mesh.ep}·{mesh.cp})",
        4 * n * length * m.width / (mesh.dp * mesh.ep * mesh.cp),
        key,
    )


def pictures(c: Any, key: str, n: int) -> LowerBound:
    """`n` images of float32 at once, over the data axes."""
    x, mesh = c.model.image, c.mesh
    return LowerBound(
        f"the images of {key}",
        f"4·{key.split('.')[-1]}·size²·channels/(dp·ep·cp) bytes = 4·{n}·{x.size}²·{x.channels}/"
        f"({mesh.dp}·{mesh.ep}·{mesh.cp})",
        4 * n * x.size**2 * x.channels / (mesh.dp * mesh.ep * mesh.cp),
        key if n / 64 > x.channels / 3 else "model.image.channels",
    )


def _state(c: Any) -> LowerBound:
    """Parameters and AdamW's moments outside experts, on the stage of pp that holds the
    embedding."""
    m, mesh, t = c.model, c.mesh, c.train
    image = m.kind in IMAGE_MODELS  # no embedding of ids, and no gate in the FFN
    ffn, gates = (0 if m.moe.experts else m.ffn), 2 if image else 3
    vocab = 0 if image else m.vocab
    # The table of the embedding, and that of the head, of which each stage may hold a share.
    tables = 1 if m.tied else 1 + 1 / (mesh.pp if shares_head(c) else 1)
    inner = 2 * m.head_dim * (m.heads + m.kv_heads) + gates * ffn
    shards = mesh.tp * (mesh.dp if t.zero else 1)
    kernels = m.layers * m.conv * m.head_dim  # of one head at least
    state = 12 * (tables * vocab * m.width + (m.layers * m.width * inner + kernels) / mesh.pp)
    names = ("vocab", "width", "layers", "ffn", "heads", "head_dim", "conv")
    usual = {"vocab": 1024, "width": 128, "layers": 4, "ffn": 344, "heads": 4, "head_dim": 32}
    lower = _largest({f"model.{name}": m[name] for name in names},
                     {f"model.{name}": usual.get(name, 4) for name in names})  # fmt: skip
    stages = f"/{mesh.pp}" if mesh.pp > 1 else ""
    conv = f" + {m.layers}·{m.conv}·{m.head_dim}" if m.conv else ""
    return LowerBound(
        "parameters and AdamW's moments",
        f"12·({tables:g}·vocab·width + (layers·width·(2·head_dim·(heads + kv_heads) + {gates}·ffn)"
        f"{' + layers·conv·head_dim' if conv else ''}){'/pp' if stages else ''}"
        f") bytes over tp{'·dp' if t.zero else ''} = 12·({tables:g}·{vocab}·{m.width} + ("
        f"{m.layers}·{m.width}·(2·{m.head_dim}·({m.heads} + {m.kv_heads}) + {gates}·{ffn}){conv}"
        f"){stages})/{shards}",
        state / shards,
        lower,
    )


def _experts(c: Any) -> Iterator[LowerBound]:
    m, moe, mesh, t = c.model, c.model.moe, c.mesh, c.train
    layers = (m.layers - moe.first_dense) / moe.every / mesh.pp
    shards = mesh.ep * mesh.tp * (mesh.dp if t.zero else 1)
    keys = {"experts": moe.experts, "ffn": moe.ffn}
    lower = _largest({f"model.moe.{k}": v for k, v in keys.items()},
                     {"model.moe.experts": 16, "model.moe.ffn": 128})  # fmt: skip
    yield LowerBound(
        "experts and AdamW's moments",
        "12·layers·experts·3·width·ffn bytes over ep·tp (and dp with train.zero) = "
        f"12·{layers:g}·{moe.experts}·3·{m.width}·{moe.ffn}/{shards}",
        12 * layers * moe.experts * 3 * m.width * moe.ffn / shards,
        lower,
    )
    yield LowerBound(
        "shared experts and AdamW's moments",
        f"12·layers·shared·3·width·ffn bytes over tp = 12·{layers:g}·{moe.shared}·3·{m.width}·"
        f"{moe.ffn}/{mesh.tp * (mesh.dp if t.zero else 1)}",
        12 * layers * moe.shared * 3 * m.width * moe.ffn / (mesh.tp * (mesh.dp if t.zero else 1)),
        "model.moe.shared",
    )
    yield LowerBound(
        "loads in noise bins",
        f"4·layers·bins·experts bytes = 4·{layers:g}·{moe.bins}·{moe.experts}",
        4 * layers * moe.bins * moe.experts,
        "model.moe.bins",
    )


def _images(c: Any) -> Iterator[LowerBound]:
    m, x, mesh, t = c.model, c.model.image, c.mesh, c.train
    yield pictures(c, "train.batch", t.batch)
    tokens = (x.size // x.patch) ** 2 + x.registers
    ways = mesh.dp * mesh.ep * mesh.cp * t.microbatches
    yield LowerBound(
        "the residual streams",
        "4·batch·((size/patch)² + registers)·width/(dp·ep·cp·microbatches) bytes = "
        f"4·{t.batch}·(({x.size}/{x.patch})² + {x.registers})·{m.width}/{ways}",
        4 * t.batch * tokens * m.width / ways,
        "train.batch, model.image.registers or model.image.size",
    )
    yield LowerBound(
        "labels and AdamW's moments",
        f"12·(classes + 1)·width bytes = 12·({x.classes} + 1)·{m.width}",
        12 * (x.classes + 1) * m.width,
        "model.image.classes",
    )


def _largest(values: Mapping[str, float], usual: Mapping[str, float]) -> str:
    """The key that exceeds its usual value by the largest factor."""
    return max(values, key=lambda key: values[key] / usual[key])
