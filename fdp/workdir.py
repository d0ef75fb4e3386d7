"""What a workdir belongs to: the run that writes there now, the experiment that it was made by, and
the segments of its training.

`lock` is held by the run and names it. config.json is the record of the newest training;
segments.json holds every record, and which steps of which arm were trained by it."""

import contextlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from fdp import config as fdp_config
from fdp import process
from fdp.config import FREE_KEYS, UserError, declared
from fdp.data.tokenizer import is_path
from fdp.files import lock, write_atomic

# Settings of JAX that change numbers.
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
FIX = "choose another --workdir=... or pass --config.checkpoint.allow_config_change=True"


# One run at a time
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold workdir/lock, which the system releases when the process dies in whatever way.

    Raises UserError, naming the holder, where another run holds it; OSError where the folder
    cannot be written. A file system that knows no locks (flock) gives a warning."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "lock"
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+") as file:
        try:
            if not lock(file, wait=False):
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"{workdir} is in use by {holder}: wait for it, stop it, or choose another "
                    "--workdir"
                )
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}): nothing keeps a second run out of "
                f"{workdir}",
                stacklevel=3,
            )
        file.truncate()
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        file.flush()
        try:
            yield
        finally:
            os.ftruncate(file.fileno(), 0)


# The experiment
# --------------------------------------------------------------------------------------------------


class OneArm(Protocol):
    """What a record needs of an arm."""

    name: str
    seed: int

    @property
    def data(self) -> Any:
        """With the hash of its corpus, and its tokenizer."""


@dataclass(frozen=True)
class Record:
    """All that decides the numbers of a run. config: keys and values. facts: what no key says, by
    name. versions: of the programs that compute."""

    config: Mapping[str, Any]
    config_hash: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it is stored, tuples as lists."""
        return json.loads(json.dumps(asdict(self)))


def record_of(config: Any, arms: Iterable[OneArm], versions: Mapping[str, str]) -> Record:
    """The record of a run. Raises UserError for two seeds of one random key."""
    flat = fdp_config.flatten(config)
    facts: dict[str, Any] = {name: jax.config.values[name] for name in SETTINGS}
    seeds: dict[tuple[int, ...], int] = {}
    for arm in arms:
        facts[f"corpus of {arm.name}"] = arm.data.sha256
        if is_path(str(flat.get("data.tokenizer", ""))):  # which may be another file by now
            facts[f"tokenizer of {arm.name}"] = getattr(arm.data.tokenizer, "fingerprint", "")
        key = tuple(np.asarray(jax.random.key_data(jax.random.key(arm.seed))).tolist())
        other = seeds.setdefault(key, arm.seed)
        if other != arm.seed:
            raise UserError(
                f"seeds {other} and {arm.seed} have the same random key {list(key)}: they are one "
                "seed, as all that differ by multiples of 2³²; set seeds below 4294967296"
            )
        facts[f"random key of seed {arm.seed}"] = list(key)
    return Record(flat, fdp_config.digest(config), facts, versions)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...] = FREE_KEYS
) -> list[str]:
    """A line for every key and fact of two records, as JSON, whose values differ; keys under a
    dotted prefix in `free` may.

    A key added later had its default before; one that is no longer declared is ignored, and so are
    facts of only one of them."""
    facts, known = old.get("facts", {}), new.get("facts", {})
    lines = _changes(facts, {name: known[name] for name in facts if name in known}, {})
    defaults = declared(str(new["config"].get("topic", "")))
    before, after = old["config"], new["config"]
    keys = [k for k in after if not any(k == f or k.startswith(f"{f}.") for f in free)]
    keys += [k for k in before if k not in after and k in defaults]
    absent = {name: key.default for name, key in defaults.items()}
    return lines + _changes(before, {k: after.get(k, "(absent)") for k in keys}, absent)


def _changes(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    def of(key: str) -> Any:
        value = old.get(key, defaults.get(key, "(absent)"))
        return list(value) if isinstance(value, tuple) else value

    pairs = {key: (of(key), new[key]) for key in sorted(new)}
    return [f"{k}: {_shown(a)} -> {_shown(b)}" for k, (a, b) in pairs.items() if a != b]


def _shown(value: Any) -> str:
    """Hashes in short."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def check(workdir: Path, record: Record, allow_other: bool = False) -> list[str]:
    """Compare with what the workdir and its newest checkpoints were made by; nothing is written.

    Returns what changed and may: versions and, with `allow_other`, all else. Raises UserError
    naming the keys and facts that differ."""
    new, path = record.to_json(), workdir / "config.json"
    found, bound, ledger = [], path.exists(), SegmentLog(workdir, record)
    if bound:
        try:
            found.append(("", _read(path)))
        except UserError:
            if not allow_other:
                raise
    found += [
        (f"checkpoint {label} in ", old)
        for label, old in _of_checkpoints(workdir)
        if not (bound and ledger.knows(label, old))
    ]
    notes: dict[str, None] = {}
    for where, old in found:
        lines = differences(old, new)
        if lines and not allow_other:
            said = "; ".join(lines)
            raise UserError(f"{where}{workdir} was made by another config: {said}. Fix: {FIX}")
        changed = _changes(old.get("versions", {}), _common(record.versions, old), {})
        notes |= dict.fromkeys([*lines, *changed])
    return list(notes)


def _common(versions: Mapping[str, str], old: Mapping[str, Any]) -> dict[str, str]:
    return {name: v for name, v in versions.items() if name in old.get("versions", {})}


def _read(path: Path) -> dict[str, Any]:
    try:
        old = json.loads(path.read_text(encoding="utf8"))
        dict(old["config"])
        return old
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a config file of fdp ({error}): {FIX}") from error


def _of_checkpoints(workdir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(arm and seed, record) of the newest checkpoint of each, where it says so."""
    for folder in sorted((workdir / "checkpoints").glob("*")):
        steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        if steps:
            meta = folder / str(max(steps)) / "meta" / "metadata"
            # What cannot be read is found damaged when it is restored.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                old = json.loads(meta.read_bytes())["run"]
                dict(old["config"])
                yield folder.name, old


def bind(workdir: Path, record: Record, allow_other: bool = False) -> None:
    """`check` the workdir and write its config.json. Raises UserError and OSError."""
    check(workdir, record, allow_other)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomic(workdir / "config.json", json.dumps(record.to_json(), indent=1) + "\n")


# Segments
# --------------------------------------------------------------------------------------------------


class SegmentLog:
    """Which record trained which steps, in workdir/segments.json. Nothing is written before a step
    is about to be trained, so that a start that fails changes nothing."""

    def __init__(self, workdir: Path, record: Record):
        self.workdir, self.record = workdir, record.to_json()
        self.path = workdir / "segments.json"
        self.records, self.segments = self._read()

    def _read(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if not self.path.exists():
            return [], []
        try:
            kept = json.loads(self.path.read_text(encoding="utf8"))
            records, segments = list(kept["records"]), list(kept["segments"])
            for s in segments:
                _ = (
                    s["arm"] + "",
                    int(s["first"]),
                    dict(s["mesh"]),
                    records[s["record"]]["config"],
                )
            return records, segments
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.path} is not a file of fdp ({error}): move it away") from error

    def knows(self, label: str, record: Mapping[str, Any]) -> bool:
        """Whether steps of this arm and seed are known to be of the record."""
        return any(record == self.records[s["record"]] for s in self._of(label))

    def _of(self, label: str) -> list[dict[str, Any]]:
        return [s for s in self.segments if s["arm"] == label]

    def begin(self, label: str, step: int, mesh: Mapping[str, int]) -> None:
        """From `step` on, this record trains the arm. Raises OSError."""
        if self.record not in self.records:
            self.records.append(self.record)
        now = {"arm": label, "first": step, "mesh": dict(mesh)}
        now["record"] = self.records.index(self.record)
        # Steps that were trained again count once.
        self.segments = [s for s in self.segments if s["arm"] != label or s["first"] < step]
        last = (self._of(label) or [{}])[-1]
        if {**last, "first": 0} != {**now, "first": 0}:
            self.segments.append(now)
        kept = {"records": self.records, "segments": self.segments}
        if not process.main():
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(kept, indent=1) + "\n")
        write_atomic(self.workdir / "config.json", json.dumps(self.record, indent=1) + "\n")

    def told(self, labels: Iterable[str]) -> list[str]:
        """A line for every arm and seed that this record did not train from its first step to its
        last: which config trained which steps."""
        return [line for label in labels if (line := self._told(label))]

    def _told(self, label: str) -> str:
        parts, before = [], None
        mine = self._of(label)
        for s in mine:
            now = self.records[s["record"]]
            steps = f"from step {s['first']} by config {now['config_hash']}"
            parts.append(steps + _since(before, {**now, "mesh": s["mesh"]}))
            before = {**now, "mesh": s["mesh"]}
        if before is None:
            return ""
        if lines := differences(before, self.record):
            now_hash = self.record["config_hash"]
            parts.append(f"reported by config {now_hash} ({'; '.join(lines)})")
        if len(parts) == 1 and not mine[0]["first"]:
            return ""
        return f"{label}: {'; '.join(parts)}"


def _since(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    """What changed from one segment to the next."""
    if old is None:
        return ""
    lines = differences(old, new)
    lines += _changes(old["versions"], _common(new["versions"], old), {})
    if old["mesh"] != new["mesh"]:
        shape = [" ".join(f"{a}{n}" for a, n in x["mesh"].items()) for x in (old, new)]
        lines.append(f"mesh: {shape[0]} -> {shape[1]}")
    return f" ({'; '.join(lines)})" if lines else ""
