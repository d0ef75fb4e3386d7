"""CSV rows of published measurements, or of a user's own configurations, as Jobs that the cost
model prices.

The columns are those of public collections of training throughput: model, arch, layers, hidden,
heads, kv_heads, ffn, vocab, experts, topk, moe_ffn, seq, gpus, gpu, gpus_per_nvl_domain, tp, pp,
vp, dp, cp, ep, etp, zero_stage, fsdp_size, mbs, gbs, recompute, precision, framework, task, group,
era; and, for fits and anchors, step_time_s or tokens_s_gpu, mem_gb, status. Only model or shapes,
gpu, seq, gbs and the degrees are needed; the rest has defaults."""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fdp.keys import UserError
from fdp.models.shape import ModelShape
from fdp.price import shapes
from fdp.price.hardware import chip
from fdp.price.shapes import PUBLISHED
from fdp.price.workload import Job, Plan

# Scale-out GB/s per chip of clusters whose owners state it; elsewhere the chip's own figure holds.
CLUSTERS = {
    "vtrain": 12.5,  # 800 Gb/s per node of eight (vTrain, ground-truth description)
    "bloom": 6.25,  # Jean Zay: four 100 Gb/s Omni-Path links per node of eight
    "dlperf": 1.5625,  # 100 Gb/s per node of eight
    "mpt": 25.0,  # 1600 Gb/s RoCE per node of eight
}
PLAYBOOK = {"1B": "ultrascale-1b", "3B": "ultrascale-3b", "8B": "ultrascale-8b"}
OLD_STACKS = (
    "vtrain",
    "bloom",
    "dlperf",
    "korthikanti",
)  # before fused attention and sequence parallelism
FP4, FP8, FP16, BF16 = ("fp4",), ("fp8", "mx"), ("fp16", "half"), ("bf16", "bfloat16")
UNKNOWN = ("", "nan", "unknown")


@dataclass(frozen=True)
class MeasuredRun:
    """A priced row: its place in the file, the job, and what was measured (NaN: nothing; `failed`:
    it did not run).
    """

    row: int
    task: str  # configurations that may be ranked against each other share one
    job: Job
    step_time: float = math.nan
    memory: float = math.nan  # bytes
    failed: bool = False


@dataclass(frozen=True)
class Table:
    """All rows of a file: those that can be priced, and why each other one cannot (row number →
    reason).
    """

    measurements: tuple[MeasuredRun, ...]
    refused: dict[int, str]


class Malformed(UserError):
    """A file or cell that is not what its column says; names row and column."""


def read(path: Path, needed: Iterable[str] = ("gpu", "seq", "gbs")) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises Malformed for a missing file, an empty one, or a missing
    column.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Malformed(f"{path}: {error}") from error
    missing = [name for name in needed if name not in names]
    if missing:
        raise Malformed(
            f"{path}: column {missing[0]!r} is missing; found {', '.join(names) or 'none'}"
        )
    long = next((i for i, row in enumerate(rows, 2) if None in row), None)
    if long is not None:
        raise Malformed(f"{path}, row {long}: more cells than the header has columns")
    return rows


def table(rows: Iterable[Mapping[str, str]]) -> Table:
    """Price what can be priced. A measured value that is NaN or not positive refuses its row."""
    kept, refused = [], {}
    for i, row in enumerate(rows):
        try:
            kept.append(measurement(i, row))
        except ValueError as error:
            refused[i] = str(error)
    return Table(tuple(kept), refused)


def measurement(i: int, row: Mapping[str, str]) -> MeasuredRun:
    """Row `i` as a MeasuredRun. Raises ValueError that names the column and says why it cannot be
    priced.
    """
    job = to_job(row)
    failed = (row.get("status") or "ok").strip().lower() not in ("ok", "")
    time = _measured(row, "step_time_s")
    rate = _measured(row, "tokens_s_gpu")
    if math.isnan(time) and not math.isnan(rate):
        time = job.batch * job.seq / (rate * job.plan.chips)
    task = "|".join(
        (
            job.stack,
            job.cluster,
            job.shape.name,
            job.chip.name,
            str(job.plan.chips),
            job.precision,
            str(job.seq),
            str(job.batch),
        )
    )
    return MeasuredRun(i, task, job, time, _measured(row, "mem_gb") * 1e9, failed)


def _measured(row: Mapping[str, str], name: str) -> float:
    text = (row.get(name) or "").strip()
    if not text:
        return math.nan
    value = _number(row, name)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"column {name!r}: {text!r} is not a positive finite measurement")
    return value


def _number(row: Mapping[str, str], name: str, default: float | None = None) -> float:
    text = (row.get(name) or "").strip()
    if not text:
        if default is None:
            raise ValueError(f"column {name!r} is empty")
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"column {name!r}: {text!r} is not a number") from None


def _whole(row: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = _number(row, name, default)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"column {name!r}: {row.get(name)!r} is not a whole number")
    return int(value)


def to_shape(row: Mapping[str, str]) -> ModelShape:
    """Shapes from the row's own columns, completed by the table of known models."""
    name = (row.get("model") or "").strip()
    name = PLAYBOOK.get(name, name) if _group(row) == "playbook" else name
    known = PUBLISHED.get(name)
    if (row.get("arch") or "").strip() == "hybrid":
        raise ValueError(
            f"model {name!r} is a hybrid with state-space layers, which the cost model does not "
            "price"
        )
    if not (row.get("hidden") or "").strip():
        return known or shapes.named(name)  # raises, with the closest name
    width, heads = _whole(row, "hidden"), _whole(row, "heads")
    experts, ffn = _whole(row, "experts", 0), _whole(row, "ffn", 0)
    sizes: dict[str, Any] = {
        "layers": _whole(row, "layers"),
        "width": width,
        "heads": heads,
        "kv_heads": _whole(row, "kv_heads", heads),
        "ffn": ffn or 4 * width,
        "vocab": _whole(row, "vocab", 51200),
        "experts": experts,
        "topk": _whole(row, "topk", 0),
        "moe_ffn": _whole(row, "moe_ffn", 0) or (ffn if experts else 0),
    }
    if known is not None:
        return replace(known, **sizes)
    # Unknown models: a plain FFN is four times as wide as the model, gated ones are not.
    gated = bool(experts) or sizes["ffn"] != 4 * width
    return ModelShape(name=name or "unnamed", head_dim=width // heads, gated=gated, **sizes)


def _precision(text: str) -> str:
    name = text.strip().lower().replace("_", "-")
    for precision, words in (("fp4", FP4), ("fp8", FP8), ("fp16", FP16), ("bf16", BF16)):
        if any(word in name for word in words):
            return precision
    if name not in UNKNOWN:
        raise ValueError(
            f"column 'precision': {text!r} is none of bf16, fp16, fp8, mxfp8, nvfp4 and their like"
        )
    return "bf16"


def _recompute(text: str) -> str:
    name = text.strip().lower()
    if name == "full" or name.startswith("selective"):
        return name[:4] if name == "full" else "selective"
    if name != "none" and name not in UNKNOWN:
        raise ValueError(f"column 'recompute': {text!r} is none of none, selective, full")
    return "none"


def _divides(what: str, value: int, by: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{what} = {value} is not divisible by {by} = {divisor}")


def _check(job: Job) -> None:
    """Refuse degrees that cannot divide. Published sweeps pad heads, so tp need only divide the
    heads or the FFN.
    """
    a, p = job.shape, job.plan
    _divides("gbs", job.batch, "dp·mbs", p.dp * p.microbatch)
    _divides("seq", job.seq, "cp", p.cp)
    if a.heads % p.tp and (a.moe_ffn or a.ffn) % p.tp:
        raise ValueError(
            f"neither heads = {a.heads} nor ffn = {a.moe_ffn or a.ffn} is divisible by tp = {p.tp}"
        )
    if a.experts:
        _divides("experts", a.experts, "ep", p.ep)
        _divides("dp·cp·tp", p.dp * p.cp * p.tp, "ep·etp", p.ep * p.etp)
    if p.shards:
        _divides("dp·cp", p.dp * p.cp, "fsdp_size", p.shards)
    # Embedding and head may take a stage of their own: 126 layers ran as 16·8 stages.
    if p.pp * p.virtual > a.layers + 2:
        raise ValueError(
            f"pp·vp = {p.pp}·{p.virtual} stages exceed the {a.layers} layers, embedding and head"
        )


def _group(row: Mapping[str, str]) -> str:
    """The collection; the Ultra-Scale Playbook goes by several names."""
    name = (row.get("group") or "").strip()
    return "playbook" if "playbook" in name.lower() else name


def stack_of(row: Mapping[str, str]) -> str:
    """Software and release as the collection names them: group, framework, era."""
    if _group(row) == "playbook":
        return "playbook/nanotron/"
    return "/".join((_group(row), *((row.get(key) or "").strip() for key in ("framework", "era"))))


def cluster_of(row: Mapping[str, str]) -> str:
    """The machine room: the group up to its first underscore (vtrain_single and vtrain_multi share
    one).
    """
    return _group(row).partition("_")[0]


def to_plan(row: Mapping[str, str], modern: bool) -> Plan:
    """Degrees and schedule; dp follows from the GPUs where its cell is empty."""
    tp, pp, cp = (_whole(row, name, 1) for name in ("tp", "pp", "cp"))
    gpus = _whole(row, "gpus", 0)
    dp = _whole(row, "dp", max(gpus // (tp * pp * cp), 1))
    if gpus and dp * tp * pp * cp != gpus:
        raise ValueError(
            f"gpus = {gpus} is not tp·pp·cp·dp = {tp}·{pp}·{cp}·{dp} = {tp * pp * cp * dp}"
        )
    recompute, ep = row.get("recompute") or "", _whole(row, "ep", 1)
    if ep == 1 and "deepep" in (row.get("notes") or "").lower():
        # It dispatches over ep. With ep = 1, gathering gpt-oss-120b over 64 H100 alone would take
        # longer than its step.
        ep = math.gcd(_whole(row, "experts", 0), dp * cp * tp) or 1
    return Plan(
        tp,
        pp,
        dp,
        cp,
        ep,
        _whole(row, "etp", 1),
        max(_whole(row, "vp", 1), 1),
        max(_whole(row, "mbs", 1), 1),
        _whole(row, "zero_stage", 1),
        _whole(row, "fsdp_size", 0),
        _recompute(recompute),
        modern or "SP" in recompute,
    )


def to_job(row: Mapping[str, str]) -> Job:
    """The job of one row. Raises ValueError that says which column is wrong and why."""
    cluster = cluster_of(row)
    precision = _precision(row.get("precision") or "")
    modern = cluster not in OLD_STACKS and precision != "fp16"
    job = Job(
        to_shape(row),
        to_plan(row, modern),
        chip((row.get("gpu") or "").strip()),
        _whole(row, "gbs"),
        _whole(row, "seq"),
        precision,
        _whole(row, "gpus_per_nvl_domain", 0),
        modern,
        "lora" in (row.get("task") or ""),
        CLUSTERS.get(cluster, 0.0) * 1e9,
        stack_of(row),
        cluster,
    )
    if job.batch < job.plan.dp * job.plan.microbatch:
        raise ValueError(
            f"gbs = {job.batch} is less than dp·mbs = {job.plan.dp}·{job.plan.microbatch}"
        )
    _check(job)
    return job


PLAYBOOK_COLUMNS = (
    "model",
    "nodes",
    "micro_batch",
    "global_batch_seqs",
    "dp",
    "pp",
    "tp",
    "zero_stage",
    "status",
    "tok_s_gpu",
    "peak_mem_gb",
)


def playbook(rows: Iterable[Mapping[str, str]]) -> Table:
    """The Ultra-Scale Playbook's runs (H100, nodes of 8, 256 sequences of 4096): its columns in
    ours.

    Rows whose batch contradicts their degrees (`batch_consistent` = 0) are refused.
    """
    kept, refused = [], {}
    for i, row in enumerate(rows):
        try:
            if row.get("batch_consistent") == "0":
                raise ValueError("column 'batch_consistent': the batch contradicts the degrees")
            kept.append(
                measurement(
                    i,
                    {
                        "model": row["model"],
                        "gpu": "h100",
                        "seq": "4096",
                        "gbs": row["global_batch_seqs"],
                        "gpus": str(8 * _whole(row, "nodes")),
                        "tp": row["tp"],
                        "pp": row["pp"],
                        "dp": row["dp"],
                        "mbs": row["micro_batch"],
                        "zero_stage": row["zero_stage"],
                        "group": "playbook",
                        "precision": "bf16",
                        "status": row["status"],
                        "tokens_s_gpu": row["tok_s_gpu"],
                        "mem_gb": row["peak_mem_gb"],
                    },
                )
            )
        except ValueError as error:
            refused[i] = str(error)
    return Table(tuple(kept), refused)


def published(folder: Path) -> tuple[list[MeasuredRun], list[str]]:
    """(priced rows, why each other one is refused) of measured_configs.csv and
    ultrascale_playbook_runs.csv.

    Either file may be absent. Raises Malformed when both are, and for a file without the columns it
    needs."""
    folder = Path(folder)
    found: list[MeasuredRun] = []
    refused: list[str] = []
    for name, needed, parse in (
        ("measured_configs.csv", ("gpu", "seq", "gbs"), table),
        ("ultrascale_playbook_runs.csv", PLAYBOOK_COLUMNS, playbook),
    ):
        if (folder / name).is_file():
            read_table = parse(read(folder / name, needed))
            found += read_table.measurements
            refused += [
                f"{name}, row {row + 2}: {reason}" for row, reason in read_table.refused.items()
            ]
    if not found:
        raise Malformed(
            f"{folder}: holds neither measured_configs.csv nor ultrascale_playbook_runs.csv"
        )
    return found, refused
