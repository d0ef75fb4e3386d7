"""The models that topic 12 compares: one shape, other mixing layers, on several tasks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_collections

from fdp.data.batches import Data
from fdp.data.recall import RECALL, AssociativeRecall, RecallTask, WordNeedle, task_data, task_of
from fdp.data.ruler_text import ByteNeedle
from fdp.experiment import Experiment, standard
from fdp.models.attention import Attention, Softmax
from fdp.models.lact import LaCT
from fdp.models.layers import SwiGLU
from fdp.models.recurrent import GatedDeltaNet
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, Layer, layer
from fdp.models.ttt import TTTMLP, TTTLinear
from fdp.models.two_memories import TwoMemories
from fdp.parallel.context.layouts import CONTIGUOUS, SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.state import StatePlan
from fdp.parallel.masks import Mask
from fdp.topics.ttt_cp.settings import ARMS, CHUNKED, IDS, KJV, NEEDLE, SECTIONS, TEXT, small_chunk
from fdp.topics.ttt_cp.tasks import MixedPairs

SLOW = (1e-5, 1e-3)  # decay of Gated DeltaNet before training: it remembers all of a short sequence


@dataclass(frozen=True)
class MemoryCase:
    """An arm: layers `kind`, one of settings.ARMS, on a task. `number`: the size n of a state, 48
    n² bytes (task `capacity`), or the tokens of a chunk (task `chunk`)."""

    kind: str
    task: str = "main"
    number: int = 0

    @property
    def name(self) -> str:
        """Of the arm."""
        parts = [] if self.task == "main" else [self.task]
        return "-".join([*parts, self.kind, *([str(self.number)] if self.number else [])])


def cases(c: ml_collections.ConfigDict) -> dict[str, MemoryCase]:
    """All arms of a config, by name."""
    m = c.memory
    found = [MemoryCase(kind) for kind in m.arms]
    found += [MemoryCase(kind, "needle") for kind in m.needle]
    found += [MemoryCase(kind, "kjv") for kind in m.kjv]
    found += [MemoryCase(kind, "text") for kind in m.text]
    found += [MemoryCase(kind, "capacity", n) for kind in m.capacity for n in m.sizes]
    found += [MemoryCase(kind, "chunk", n) for kind in CHUNKED for n in m.chunks]
    return {case.name: case for case in found}


def recall_task(case: MemoryCase, c: ml_collections.ConfigDict) -> RecallTask | None:
    """What the arm is asked, or None for text. Eight tokens of a sequence for each pair; of task
    `capacity`, four for each of the most."""
    length = c.data.seq_len
    if case.task == "needle":
        return WordNeedle(NEEDLE, 64)
    if case.task == "kjv":
        return ByteNeedle(KJV)
    if case.task == "capacity":
        return MixedPairs(4 * max(c.memory.pairs), tuple(c.memory.pairs), IDS)
    if case.task == "text" or c.data.source not in RECALL:
        return None
    if c.data.source == "mqar":
        pairs = max(length // 8, 1)
        return AssociativeRecall(length, pairs, max(64, 2 * pairs + 1))
    return task_of(c.data.source, length)


def layout_of(kinds: tuple[str, ...], chunk: int, cp: int) -> SequenceLayout:
    """Every chunk on all devices where a LaCT layer is among `kinds`, else parts in order."""
    shared = cp > 1 and any(kind.startswith("lact") for kind in kinds)
    return SequenceLayout("striped", max(chunk // cp, 1)) if shared else CONTIGUOUS


def mixing(
    kind: str,
    layout: SequenceLayout,
    m: ml_collections.ConfigDict,
    state: str = "",
    packed: bool = False,
) -> Layer:
    """The mixing layer of a name in settings.ARMS. `state`: a plan in place of the layer's own.
    `packed`: whether a sequence holds documents, which layers with a state see by themselves. The
    latter go without their output gate: at this size they learn sooner."""
    ring = CommPlan("ring", layout=layout)
    if kind == "attention":
        return layer(Attention, core=Softmax(Mask("causal", packed=packed), ring))
    if kind == "window":
        gather = CommPlan("all_gather", layout=layout)
        return layer(Attention, core=Softmax(Mask("causal", m.window, packed), gather))
    at = {"chunk": m.chunk, "gate": False}
    if kind == "gdn":
        own = "affine" if layout == CONTIGUOUS else "heads"
        # Its result does not depend on the chunk, and its memory grows with it.
        near = at | {"chunk": math.gcd(m.chunk, 64)}
        return layer(GatedDeltaNet, plan=StatePlan(state or own, layout), decay=SLOW, **near)
    if kind in ("ttt_linear", "ttt_mlp"):
        own = "wavefront" if layout == CONTIGUOUS else "heads"
        small = at | {"chunk": small_chunk(m.chunk)}
        cls = TTTLinear if kind == "ttt_linear" else TTTMLP
        return layer(cls, plan=_plan(state or own, layout), **small)
    fast = {"hidden": m.hidden, "rate": m.rate, "rotate": False, "group": m.group}
    if kind == "two_memories":  # whole segments on every device
        near = {"near": m.near, "reset": m.chunk}
        return layer(TwoMemories, plan=_plan(state or "heads", layout), **at, **fast, **near)
    muon = kind == "lact_muon"
    plan = _plan(state or ("tokens+ns" if muon else "tokens"), layout)
    window = m.window if kind == "lact_window" else 0
    return layer(LaCT, plan=plan, muon=muon, window=window, **at, **fast)


def _plan(kind: str, layout: SequenceLayout) -> StatePlan:
    """Two devices that share heads where there are two levels, a wavefront of four pieces."""
    u, pieces = 2 if kind == "heads+tokens" else 1, 4 if kind == "wavefront" else 1
    return StatePlan(kind, layout, u, pieces)


def arm(kind: str, base: Experiment, m: ml_collections.ConfigDict, state: str = "") -> Experiment:
    """`base` with the mixing layers of `kind`. `state`: the plan of its layers with a state."""
    kinds = ARMS[kind]
    layout = layout_of(kinds, m.chunk, base.degrees["cp"])
    packed = "segments" in base.data.dims
    mixed = [mixing(k, layout, m, state, packed) for k in kinds]
    blocks = [layer(Block, mixing=one, ffn=layer(SwiGLU)) for one in mixed]
    return replace(base, model=base.model.clone(pattern=tuple(blocks), layout=layout))


def arms_of(c: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """All arms of a config."""
    base = lru_cache(lambda task: standard(_of_task(task, c)))
    return {name: _experiment(case, base(case.task), c) for name, case in cases(c).items()}


def _of_task(task: str, c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a task's arms."""
    own = c.copy_and_resolve_references()
    if task != "main":  # the other tasks' settings are not for these data
        own.memory.update(needle=(), kjv=(), text=(), capacity=(), chunks=())
    if task == "needle":
        own.data.update(source="needle", seq_len=NEEDLE)
        own.train.lr = c.train.lr / 4  # at the rate for pairs, attention stays at chance
    if task == "capacity":
        own.data.seq_len = 4 * max(c.memory.pairs)
    if task in ("kjv", "text"):
        source, length = {"kjv": ("kjv_needle", KJV), "text": ("bible", TEXT)}[task]
        own.data.update(source=source, tokenizer="byte", seq_len=length)
        wide = c.memory.width
        own.model.update(width=wide, head_dim=wide // c.model.heads, ffn=2 * wide, vocab=264)
        own.train.lr = c.train.lr / 4
    if c.data.source == "blank":
        own.data.source = "blank"
    return own


def _experiment(case: MemoryCase, base: Experiment, c: ml_collections.ConfigDict) -> Experiment:
    task, m, fit = recall_task(case, c), c.memory.copy_and_resolve_references(), base.fit
    if task is not None and base.data.name != "blank":
        # No sequence is seen twice: small models learn few ones by heart.
        data = _fresh(task, fit.steps * fit.batch)  # type: ignore[arg-type]
        base = replace(base, data=data)
    if case.task in ("capacity", "chunk"):
        base = _resized(base, layers=1)
    if case.task == "capacity":
        base = _resized(base, **sized(case.kind, case.number))
        m.hidden = 1
    if case.task == "chunk":
        m.chunk = case.number
    return arm(case.kind, base, m)


@lru_cache(maxsize=8)
def _fresh(task: Any, train: int) -> Data:
    """The data of a task, which all its arms share."""
    return task_data(task, train)


def sized(kind: str, n: int) -> dict[str, int]:
    """Heads and head dim for a state of 48 n² bytes: 2 heads of n for LaCT, whose fast network of
    width n has weights and momentum of 6 n² numbers a head; 3 heads of 2n for the others, of which
    TTT-Linear has a bias of 24 n bytes, too."""
    return {"heads": 2, "head_dim": n} if kind == "lact" else {"heads": 3, "head_dim": 2 * n}


def state_bytes(kind: str, n: int) -> int:
    """Of a state of that size (`StateLayer.state_bytes`), float32."""
    m = ml_collections.ConfigDict({name: key.default for name, key in SECTIONS["memory"].items()})
    m.hidden, dims = 1, sized(kind, n)
    shape = ModelShape(1, 8, dims["heads"], dims["heads"], dims["head_dim"], 8, 8)
    return mixing(kind, CONTIGUOUS, m)(shape, parent=None).state_bytes()


def _resized(base: Experiment, **dims: int) -> Experiment:
    if "heads" in dims:
        dims["kv_heads"] = dims["heads"]
    shape = replace(base.model.shape, **dims)
    return replace(base, model=base.model.clone(shape=shape))


def on_mesh(
    c: ml_collections.ConfigDict, kind: str, degrees: Mapping[str, int], state: str
) -> Experiment:
    """A small experiment of `kind` on `degrees`, in float32, for proofs; blank data, as only
    programs and random tokens are compared. Two periods: a loop of one trip is no loop to XLA."""
    small = c.copy_and_resolve_references()
    small.mesh.update(dict(degrees))
    small.model.update(
        layers=2 * len(ARMS[kind]), width=32, heads=8, kv_heads=8, head_dim=8, ffn=32, vocab=64
    )
    small.model.dtype = "float32"
    small.memory.update(arms=(kind,), needle=(), kjv=(), text=(), capacity=(), chunks=())
    small.data.update(source="blank", tokenizer="bpe", vocab=62, seq_len=4 * c.memory.chunk)
    small.train.update(batch=8, zero=0, microbatches=1)
    return arm(kind, standard(small), small.memory, state)
