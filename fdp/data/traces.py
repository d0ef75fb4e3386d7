"""Traces of routing: which experts every token took in every layer. Their metrics are in
`fdp.data.expert_loads`.

    writer = Writer(folder, experts=64)       # any run: one shard an append, atomic
    writer.append(ids_NxLxK, noise_N=r)       # ids of -1: no expert in this slot
    found = read(folder, Layout(64, 16, 8))   # or a routed_experts array of vLLM, SGLang

`read` takes a folder of shards or one file: a shard, `routed_experts` arrays of vLLM and SGLang
(npy or npz, int16 or int32 [tokens, layers, k]; base64 of int32 in a .txt or .b64, as SGLang's
responses hold them), or SGLang's csv `layer_id,expert_id,count`, an `ExpertCounts`. NumPy alone.

Legend: N tokens, L layers with experts, K choices a token, E experts.
"""

import base64
import binascii
import csv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdp.files import write_atomic
from fdp.keys import UserError

PROMPT, GENERATED = "prompt_routed_experts", "routed_experts"  # names of vLLM's two arrays


class Layout(NamedTuple):
    """The sizes of a model's routing. 0: whatever the file has."""

    experts: int
    layers: int = 0
    topk: int = 0


@dataclass(frozen=True)
class RoutingTrace:
    """Choices of N tokens. Raises UserError for ids outside −1 … E − 1 and unequal lengths."""

    ids_NxLxK: np.ndarray  # int16
    experts: int
    sequence_N: np.ndarray  # int32
    position_N: np.ndarray  # int32, in its sequence
    source_N: np.ndarray  # int32, the device over ep that held the token; -1 unknown
    domain_N: np.ndarray  # names
    noise_N: np.ndarray  # float32, masked share or time; nan where there is none

    def __post_init__(self) -> None:
        ids = self.ids_NxLxK
        if ids.ndim != 3 or ids.dtype.kind != "i":
            raise UserError(
                f"routed experts have shape {ids.shape} and type {ids.dtype}: whole numbers "
                "[tokens, layers, k] are needed"
            )
        if ids.size and not -1 <= ids.min() <= ids.max() < self.experts:
            raise UserError(
                f"expert ids reach from {ids.min()} to {ids.max()}, and the model has "
                f"{self.experts} experts: ids are 0 … {self.experts - 1}, or -1 for none; give the "
                "number of experts of the model that was traced"
            )
        for name, value in self.tokens().items():
            if len(value) != len(ids):
                raise UserError(f"{name} has {len(value)} values for {len(ids)} tokens")

    def tokens(self) -> dict[str, Any]:
        """The arrays (N,), by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)[2:]}

    def take(self, index: slice | np.ndarray) -> "RoutingTrace":
        """Some of the tokens."""
        kept = {name: value[index] for name, value in self.tokens().items()}
        return replace(self, ids_NxLxK=self.ids_NxLxK[index], **kept)


class ExpertCounts(NamedTuple):
    """Choices of an expert, without who chose it: [L, E]."""

    counts_LxE: np.ndarray


def trace(
    ids_NxLxK: np.ndarray,
    experts: int,
    sequence_N: np.ndarray | int = 0,
    position_N: np.ndarray | None = None,
    source_N: np.ndarray | int = -1,
    domain_N: np.ndarray | str = "",
    noise_N: np.ndarray | float = np.nan,
) -> RoutingTrace:
    """A trace whose arrays are given whole or as one value for all tokens; positions count from
    0.
    """
    ids = np.asarray(ids_NxLxK)
    if ids.dtype.kind in "iu" and np.all(np.abs(ids.astype(np.int64)) < 2**15):
        ids = ids.astype(np.int16)

    def each(value: Any, kind: type) -> np.ndarray:
        one: np.ndarray = np.asarray(value, kind)
        return np.broadcast_to(one, ids.shape[:1]) if one.ndim == 0 else one

    place = np.arange(len(ids)) if position_N is None else position_N
    return RoutingTrace(
        ids,
        experts,
        each(sequence_N, np.int32),
        each(place, np.int32),
        each(source_N, np.int32),
        each(domain_N, str),
        each(noise_N, np.float32),
    )


def join(parts: Sequence[RoutingTrace]) -> RoutingTrace:
    """All tokens, in order. Raises UserError where models differ."""
    first = parts[0]
    for part in parts:
        check(part, Layout(first.experts, *first.ids_NxLxK.shape[1:]), "a shard")
    rest: dict[str, Any] = {
        name: np.concatenate([p.tokens()[name] for p in parts]) for name in first.tokens()
    }
    return replace(first, ids_NxLxK=np.concatenate([p.ids_NxLxK for p in parts]), **rest)


def check(found: RoutingTrace | ExpertCounts, layout: Layout, what: object) -> None:
    """Raise UserError where the routing is not of a model with this layout."""
    if isinstance(found, ExpertCounts):
        layers, experts = found.counts_LxE.shape
        has = Layout(experts, layers, layout.topk)
    else:
        has = Layout(found.experts, *found.ids_NxLxK.shape[1:])
    wrong = [f for f in Layout._fields if getattr(layout, f) not in (0, getattr(has, f))]
    if wrong:
        values = ", ".join(f"{f} {getattr(has, f)} is not {getattr(layout, f)}" for f in wrong)
        raise UserError(f"{what} is a trace of another model: {values}; give its own model or file")


# Files
# -------------------------------------------------------------------------------------------------


class Writer:
    """Appends shards to a folder; after kill -9 every shard is whole. A folder goes on."""

    def __init__(self, folder: Path | str, experts: int) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.experts, self.next = folder, experts, len(_shards(folder))

    def append(self, ids_NxLxK: np.ndarray, **tokens: Any) -> None:
        """One shard; arguments as `trace` takes them. Raises OSError as the system reports it."""
        made = trace(ids_NxLxK, self.experts, **tokens)
        path = self.folder / f"shard-{self.next:05d}.npz"
        arrays: dict[str, Any] = {"ids_NxLxK": made.ids_NxLxK, "experts": made.experts}
        arrays |= made.tokens()
        write_atomic(path, lambda file: np.savez_compressed(file, **arrays))
        self.next += 1


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.npz"))


def read(path: Path | str, layout: Layout) -> RoutingTrace | ExpertCounts:
    """The trace in a folder or file of a model with `layout` (base64 needs its layers and topk).

    Raises UserError, one line, for a missing, truncated or unknown file, ids out of range and a
    trace of another model."""
    path = Path(path)
    try:
        if path.is_dir():
            if not _shards(path):
                raise UserError(f"{path} holds no shard-*.npz: give the folder of a traced run")
            found: RoutingTrace | ExpertCounts = join([_shard(p, layout) for p in _shards(path)])
        elif path.suffix == ".csv":
            found = _counts(path, layout)
        else:
            found = _shard(path, layout)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} cannot be read as a trace ({reason}): it is truncated or of another format; "
            "write it again, or remove the shard"
        ) from error
    check(found, layout, path)
    if isinstance(found, RoutingTrace) and not len(found.ids_NxLxK):
        raise UserError(f"{path} holds no tokens: trace a run that has some")
    return found


def _shard(path: Path, layout: Layout) -> RoutingTrace:
    if path.suffix == ".npy":
        return trace(np.load(path), layout.experts)
    if path.suffix in (".txt", ".b64"):
        return decode(path.read_text("ascii"), layout)
    if path.suffix != ".npz":
        raise UserError(f"{path}: a trace is a folder, or a file .npz, .npy, .csv, .txt or .b64")
    with np.load(path) as arrays:
        if "ids_NxLxK" in arrays:
            names = [f.name for f in fields(RoutingTrace)[2:]]
            own = (arrays[name] for name in names)
            return RoutingTrace(arrays["ids_NxLxK"], int(arrays["experts"]), *own)
        names = [name for name in (PROMPT, GENERATED) if name in arrays]
        if not names:
            raise UserError(f"{path} has {sorted(arrays)}, but no array {GENERATED!r}")
        return trace(np.concatenate([arrays[name] for name in names]), layout.experts)


def decode(text: str, layout: Layout) -> RoutingTrace:
    """Base64 of int32 ids, token by token, layer by layer. Raises UserError where the bytes are no
    whole tokens of `layout`."""
    try:
        raw = base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise UserError(
            f"routed experts are no base64 ({error}): the text is truncated or of another kind; "
            "give the whole text of the response"
        ) from error
    each = 4 * layout.layers * layout.topk
    if not each or len(raw) % each:
        raise UserError(
            f"{len(raw)} bytes of routed experts are no multiple of 4·layers·k = 4·{layout.layers}·"
            f"{layout.topk} = {each}: the text is truncated or of another model"
        )
    ids = np.frombuffer(raw, "<i4").reshape(-1, layout.layers, layout.topk)
    return trace(ids, layout.experts)


def _counts(path: Path, layout: Layout) -> ExpertCounts:
    with open(path, newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    names = ("layer_id", "expert_id", "count")
    if not rows or any(n not in rows[0] for n in names):
        raise UserError(f"{path}: a csv of counts has the columns {', '.join(names)} and rows")
    values = np.array([[int(r[n] or "") for n in names] for r in rows])
    experts = layout.experts or int(values[:, 1].max()) + 1
    if values[:, 1].min() < 0 or values[:, 1].max() >= experts or values[:, 2].min() < 0:
        raise UserError(
            f"{path}: expert_id reaches from {values[:, 1].min()} to {values[:, 1].max()} of "
            f"{experts} experts, count from {values[:, 2].min()}: give the model that was traced"
        )
    layers, layer_N = np.unique(values[:, 0], return_inverse=True)  # dense layers have none
    counts = np.zeros((len(layers), experts), np.int64)
    np.add.at(counts, (layer_N, values[:, 1]), values[:, 2])
    return ExpertCounts(counts)
