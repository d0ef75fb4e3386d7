"""What the layers of topic 12 cost, by their own counts: FLOPs against length, and bytes over cp.

Legend: S positions, c tokens of a chunk, d head dim."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_collections

from fdp.count.counts import EXCHANGE, GATHER, REDUCE, Counts, Rows
from fdp.mesh import AXES
from fdp.models.lact import LaCT
from fdp.models.recurrent import GatedDeltaNet, StateLayer, bytes_of
from fdp.models.shape import ModelShape
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout
from fdp.parallel.context.state import StatePlan
from fdp.study.figures import figure, legend
from fdp.study.measure import Part, derive
from fdp.study.report import Row
from fdp.topics.ttt_cp.arms import mixing
from fdp.topics.ttt_cp.settings import ARMS

CP, MILLION = 8, 2**20
# The published 760M model of LaCT: width 1536, four heads of 384, fast width 384.
LARGE = ModelShape(24, 1536, 4, 4, 384, 4096, 32_000, dtype="bfloat16", name="LaCT 760M")


def parts(config: ml_collections.ConfigDict) -> list[Part]:
    """Rows and pictures; nothing is run."""
    return [
        derive("linear", config, rows=linear, group="Cost"),
        derive("state", config, rows=constant, group="Cost"),
        derive("scan", rows=scanned, group="Cost"),
        derive("polish", rows=polished, group="Cost"),
        derive("wire", rows=wire, plot=drawn, group="Cost"),
    ]


def linear(config: ml_collections.ConfigDict) -> Row:
    """FLOPs of every layer with a state at 8 S over those at S."""
    shape, m = ModelShape.of(config.model), config.memory
    kinds = sorted({k for arm in m.arms for k in ARMS[arm]} - {"attention", "window"})
    alone, short = dict.fromkeys(AXES, 1), 64 * m.chunk
    ratios = []
    for kind in kinds:
        made = mixing(kind, SequenceLayout(), m)(shape, parent=None)
        at = [made.counts(Rows(1, n, 0), alone).flops for n in (short, 8 * short)]
        ratios.append(at[1] / at[0])
    note = f"{', '.join(kinds)}; S = {short}"
    return Row.judged(
        "cost is linear in the length",
        "FLOPs at 8 S over FLOPs at S, largest",
        max(ratios, default=8.0),
        "",
        "<= 8.08",
        "counted",
        note=note,
    )


def constant(config: ml_collections.ConfigDict) -> Row:
    """Bytes that every layer with a state keeps in decoding, at 1M tokens over those at 1K."""
    shape, m = ModelShape.of(config.model), config.memory
    kept = {}
    for kind in sorted({k for kinds in ARMS.values() for k in kinds} - {"window"}):
        made = mixing(kind, CONTIGUOUS, m)(shape, parent=None)
        kept[kind] = [cache_bytes(made, length) for length in (2**10, MILLION)]
    short, long = kept.pop("attention")
    said = ", ".join(f"{kind} {at[0]:,}" for kind, at in kept.items())
    return Row.judged(
        "the state is of the same bytes at 1M tokens as at 1K",
        "bytes of the cache of a layer at 1M over those at 1K, largest",
        max(long / short for short, long in kept.values()),
        "",
        "<= 1",
        "counted",
        note=f"no length enters its shapes; bytes: {said}; attention's cache {short:,}, {long:,}",
    )


def cache_bytes(made: Any, length: int) -> int:
    """Of what a layer keeps of a sequence of `length` in decoding."""
    return bytes_of(lambda: made.decode_state(1, length)[0])


def scanned() -> Row:
    """Bytes of a prefix scan of maps over those of their gather."""
    shares, said = [], []
    for cp in (8, 16, 64):
        scan, gather = (
            sum(sent(delta(kind), MILLION, cp).values()) for kind in ("affine+scan", "affine")
        )
        shares.append(scan / gather)
        said.append(f"{scan / 2**20:.1f} and {gather / 2**20:.1f} MiB at cp {cp}")
    return Row.judged(
        "a prefix scan of affine maps sends at most 40 % of what their gather sends, from cp 8 on",
        "bytes of Gated DeltaNet's scan over those of its gather, largest",
        max(shares),
        "",
        "<= 0.4",
        "counted",
        note=f"{LARGE.name}, forward: {', '.join(said)}; 3, 4 and 6 dependent steps instead of one",
    )


def sent(layer: StateLayer, length: int, cp: int = CP) -> dict[str, float]:
    """Forward bytes of a device over cp by op, of one sequence."""
    degrees = dict.fromkeys(AXES, 1) | {"cp": cp}
    found: Counts = layer.work(Rows(1, length, 0), degrees)
    return {op: wire for (op, _), wire in found.forward.sent.items()}


def lact(chunk: int, kind: str = "tokens", hidden: int = 1) -> LaCT:
    """The large LaCT layer with chunks of `chunk`."""
    layout = SequenceLayout("striped", chunk // CP)
    return LaCT(LARGE, StatePlan(kind, layout), chunk, hidden=hidden, parent=None)


def delta(kind: str = "affine") -> GatedDeltaNet:
    """Gated DeltaNet of the same heads."""
    return GatedDeltaNet(LARGE, StatePlan(kind), 64, parent=None)


def wire() -> list[Row]:
    """Where summing updates and exchanging heads send equally, and what an affine state sends."""
    chunk = 3 * LARGE.head_dim * CP
    length = chunk * (MILLION // chunk)
    tokens = sent(lact(chunk), length)[REDUCE]
    heads = sent(lact(chunk, "heads"), length)[EXCHANGE]
    small = sent(lact(2048), MILLION)[REDUCE]
    affine = sent(delta(), MILLION)[GATHER]
    at = f"{LARGE.name}, cp {CP}, bf16 activations, f32 updates"
    return [
        Row.judged(
            "summed updates and exchanged heads send equally at c = 3·d·cp",
            "|bytes of tokens / bytes of heads - 1|",
            abs(tokens / heads - 1),
            "",
            "<= 0.02",
            "counted",
            note=f"{at}; c = {chunk:,}, {tokens / 2**30:.2f} and {heads / 2**30:.2f} GiB a layer",
        ),
        Row.judged(
            "an affine state costs at most 1 % of the bytes of summed updates",
            "bytes of Gated DeltaNet's exchange over those of LaCT's sums",
            affine / small,
            "",
            "<= 0.01",
            "counted",
            note=f"{at}, 1M tokens, c = 2,048: {affine / 2**20:.0f} MiB, {small / 2**30:.2f} GiB",
        ),
    ]


def polished() -> list[Row]:
    """How much faster the busiest of eight devices is than one device alone, with Muon, by FLOPs:
    every device orthogonalises the whole update, or its own heads."""
    shape = replace(LARGE, heads=CP, kv_heads=CP, head_dim=LARGE.width // CP)
    chunk, length = 2048, 2**22
    layout = SequenceLayout("striped", chunk // CP)
    v = 5 * shape.head_dim / chunk
    closed = {
        "tokens": (1 + v) / (1 / CP + v),
        "tokens+ns": (1 + v) / (1 / CP + v / min(shape.heads, CP)),
    }
    rows = []
    for kind, expected in closed.items():
        layer = LaCT(shape, StatePlan(kind, layout), chunk, hidden=1, muon=True, parent=None)
        one = dict.fromkeys(AXES, 1)
        # Products of activations with activations: the fast network and its update.
        alone, shared = (layer.work(Rows(1, length, 0), one | {"cp": cp}) for cp in (1, CP))
        again = shared.again.batched / 3  # of forward and backward
        faster = alone.forward.batched / ((shared.forward.batched + again) / CP)
        where = "all of it everywhere" if kind == "tokens" else "shared out by heads"
        rows.append(
            Row.judged(
                f"Newton-Schulz, {where}, costs what its formula says",
                "|speed-up by FLOPs / closed form - 1|",
                abs(faster / expected - 1),
                "",
                "<= 0.01",
                "counted",
                note=f"cp {CP}, {CP} heads of {shape.head_dim}, c = {chunk}: {faster:.2f} ×",
            )
        )
    return rows


def drawn() -> Mapping[str, object]:
    """Bytes against the chunk."""
    chunks = [2**n for n in range(9, 20)]
    fig, axes = figure(width=7.0)
    axes.loglog(
        chunks, [sent(lact(c), MILLION).get(REDUCE, 0) / 2**30 for c in chunks], label="LaCT, sums"
    )
    levels = {
        "LaCT, heads": sent(lact(2048, "heads"), MILLION)[EXCHANGE],
        "Gated DeltaNet, affine": sent(delta(), MILLION)[GATHER],
    }
    for i, (label, level) in enumerate(levels.items(), 1):
        axes.axhline(level / 2**30, label=label, color=f"C{i}", linestyle="--")
    axes.axvline(3 * LARGE.head_dim * CP, color="#444444", linestyle=":", label="c = 3·d·cp")
    axes.set(
        xlabel="tokens of a chunk, c",
        ylabel="GiB sent by a device and layer",
        title=f"Forward bytes at 1M tokens, cp {CP} ({LARGE.name})",
    )
    legend(fig)
    return {"bytes against chunk": fig}
