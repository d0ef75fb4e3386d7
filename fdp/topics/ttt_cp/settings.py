"""Configuration of topic 12: which layers are compared, and how large their chunks are. Imports
neither jax nor flax."""

import math
import warnings

import ml_collections

from fdp.data.recall import RECALL
from fdp.keys import UserError, at_least, count, integers, positive, section, words

# The layers of one period of each arm; "1to3": one layer of attention to three with a state.
ARMS = {
    "attention": ("attention",),
    "window": ("window",),
    "gdn": ("gdn",),
    "ttt_linear": ("ttt_linear",),
    "ttt_mlp": ("ttt_mlp",),
    "lact": ("lact",),
    "lact_muon": ("lact_muon",),
    "lact_window": ("lact_window",),
    "two_memories": ("two_memories",),
    "gdn_1to1": ("gdn", "attention"),
    "gdn_1to3": ("gdn", "gdn", "attention", "gdn"),
    "lact_1to1": ("lact", "attention"),
    "lact_1to3": ("lact", "lact", "attention", "lact"),
}
SIZED = ("gdn", "ttt_linear", "lact")  # kinds whose state can be made as large as another's
CHUNKED = ("lact", "two_memories")  # kinds that read a chunk before they learn from it

NEEDLE, KJV, TEXT = 64, 128, 128  # positions of the sequences of these tasks
IDS, KEYS = 64, 31  # of sequences with several numbers of pairs

SECTIONS = {
    "memory": section(
        arms=words(("attention", "gdn", "lact"), tuple(ARMS), "layers in place of attention"),
        needle=words((), tuple(ARMS), "arms that are also trained on needles"),
        kjv=words((), tuple(ARMS), "arms that also find needles in the Bible, in bytes"),
        text=words((), tuple(ARMS), "arms that are also trained on the King James Bible"),
        capacity=words((), SIZED, "layers whose pairs are counted against bytes of state"),
        sizes=integers(2, (), "of their states: 48 n² bytes"),
        # Fewer are asked in the first chunk, which LaCT reads before it has learnt anything.
        pairs=integers(1, (8, 12, 16), "of the sequences that count, of 4 tokens for the most"),
        chunks=integers(1, (), "chunks that LaCT and two memories are also trained with", "tokens"),
        chunk=count(16, "read and learnt from at once; divisible by cp", "tokens"),
        near=count(4, "mini-batch of the near one of two memories; divides the chunk", "tokens"),
        group=at_least(0, 0, "chunks of LaCT computed again in the backward pass; 0: none"),
        hidden=count(2, "width of LaCT's fast network over the head dim"),
        rate=positive(0.3, "of LaCT's fast network, before its own"),
        window=count(8, "of the arms `window` and `lact_window`", "tokens"),
        width=at_least(8, 64, "of the models of text"),
        sequences=count(64, "fresh ones whose answers are judged", "sequences", high=4096),
    )
}


def small_chunk(chunk: int) -> int:
    """Tokens of a mini-batch of TTT-Linear and TTT-MLP: half a chunk, where it has one, so that
    eight devices share 64 tokens."""
    return math.gcd(chunk // (2 - chunk % 2), 16)


def check(c: ml_collections.ConfigDict) -> None:
    """Raise UserError for periods that do not divide the layers, and for objectives, data and
    lengths that the layers cannot take."""
    m = c.memory
    for arm in (*m.arms, *m.needle, *m.kjv, *m.text):
        period = len(ARMS[arm])
        if c.model.layers % period:
            raise UserError(
                f"model.layers={c.model.layers} is not divisible by the {period} layers of a "
                f"period of {arm}: set model.layers={-(-c.model.layers // period) * period}"
            )
    if c.objective.name != "autoregressive":
        raise UserError(
            f"objective.name={c.objective.name!r}: the layers of this topic read the past; set "
            "objective.name=autoregressive"
        )
    _check_lengths(c)
    _check_heads(c)


def _check_heads(c: ml_collections.ConfigDict) -> None:
    """Two memories share out heads over cp: every segment of the near one lies on one device, which
    sharing out the large chunks would cut."""
    m, among = c.memory, c.mesh.tp * c.mesh.cp
    used = "two_memories" in (*m.arms, *m.needle, *m.kjv, *m.text) or m.chunks
    if used and c.mesh.cp > 1 and c.model.heads % among:
        heads = -(-c.model.heads // among) * among
        raise UserError(
            f"model.heads={c.model.heads} is not divisible by mesh.tp·mesh.cp = {among}, and cp "
            f"shares out the heads of two memories: set model.heads={heads} and "
            f"model.kv_heads={heads}, or mesh.cp=1"
        )


def _check_lengths(c: ml_collections.ConfigDict) -> None:
    m, length = c.memory, c.data.seq_len
    if length % m.chunk:
        raise UserError(
            f"data.seq_len={length} is not divisible by memory.chunk={m.chunk}: set "
            f"data.seq_len={-(-length // m.chunk) * m.chunk}"
        )
    for name, own in (("needle", NEEDLE), ("kjv", KJV), ("text", TEXT)):
        if m[name] and own % m.chunk:
            raise UserError(
                f"memory.{name} has sequences of {own} tokens, not divisible by memory.chunk="
                f"{m.chunk}: set memory.chunk={math.gcd(own, m.chunk)}, or memory.{name}=()"
            )
    for chunk in m.chunks:
        if length % chunk:
            raise UserError(
                f"data.seq_len={length} is not divisible by {chunk} of memory.chunks={m.chunks}: "
                f"set {math.gcd(length, chunk)} in its place"
            )
    every = (*m.arms, *m.needle, *m.kjv, *m.text)
    lact = any(k.startswith("lact") for a in every for k in ARMS[a]) or "lact" in m.capacity
    shared = [("memory.chunk", m.chunk)] if lact else []
    for name, chunk in [*shared, *(("memory.chunks", n) for n in m.chunks)]:
        if chunk % c.mesh.cp:
            raise UserError(
                f"{name}={chunk} is not divisible by mesh.cp={c.mesh.cp}, which shares out every "
                f"chunk: set {name}={-(-chunk // c.mesh.cp) * c.mesh.cp}"
            )
    both = "two_memories" in every
    longest = max(m.chunk if lact or both else 0, *m.chunks, 0)
    if longest >= length:
        warnings.warn(
            f"a chunk of {longest} tokens holds all {length} of a sequence (data.seq_len): LaCT "
            "reads it with its first weights, and learns nothing from it",
            stacklevel=2,
        )
    for chunk in (*m.chunks, *((m.chunk,) if both else ())):
        if chunk % m.near:
            fix = max(n for n in range(1, m.near) if chunk % n == 0)
            raise UserError(
                f"a chunk of {chunk} tokens is not divisible by memory.near={m.near}, the "
                f"mini-batches of two memories: set memory.near={fix}"
            )
    if m.capacity:
        _check_pairs(c)
    if m.chunks and c.data.source not in (*RECALL, "blank"):
        raise UserError(
            f"memory.chunks={m.chunks} compares recall, and data.source={c.data.source} asks for "
            "none: set data.source=mqar, or memory.chunks=()"
        )


def _check_pairs(c: ml_collections.ConfigDict) -> None:
    """Of the sequences of task capacity: four tokens for each of the most pairs."""
    m, most = c.memory, max(c.memory.pairs)
    if not m.sizes:
        raise UserError("memory.capacity needs sizes: set memory.sizes=(4, 8)")
    if most > KEYS:
        raise UserError(
            f"memory.pairs={m.pairs}: {most} pairs of different keys > the {KEYS} keys among "
            f"{IDS} ids: ask for {KEYS} at most"
        )
    whole = math.lcm(m.chunk, 4)
    if "ttt_linear" in m.capacity and c.mesh.cp > 1:  # a device has whole mini-batches
        whole = math.lcm(whole, small_chunk(m.chunk) * c.mesh.cp)
    if 4 * most % whole:
        fix = max(4 * most // whole, 1) * whole // 4
        raise UserError(
            f"memory.pairs={m.pairs}: {most} pairs take 4 · {most} tokens, not divisible by "
            f"{whole} (memory.chunk={m.chunk}, mesh.cp={c.mesh.cp}): let the most be {fix}"
        )
