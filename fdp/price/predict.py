"""Price a file of configurations: step time with a 90 % interval, tokens/s, memory, feasibility and
the bottleneck.

    python -m fdp.price.predict configs.csv --anchors anchors.csv --out predictions.csv

Columns of both files: see fdp.price.measurements. What the first file says was
measured is not read; anchors are a few runs with step_time_s or tokens_s_gpu, and mem_gb where
known, and correct the prediction of whatever resembles them. Every input row comes back in its
place with all its columns; one that cannot be priced says why under `reason`. Times in seconds a
step with a 90 % interval, memory in GB (1e9 bytes) a device with its 90 % quantile, `feasible` the
probability that it runs."""

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from fdp.keys import UserError
from fdp.price import hybrid
from fdp.price.anchors import correct
from fdp.price.hybrid import Model, PricedJobs
from fdp.price.measurements import MeasuredRun, measurement, read
from fdp.price.workload import Job, columns

Row = dict[str, str]

MEASURED = (
    "step_time_s",
    "tokens_s_gpu",
    "tflops_gpu_reported",
    "mfu_reported_pct",
    "mem_gb",
    "status",
)
ADDED = (
    "predicted_step_time_s",
    "predicted_tokens_s_gpu",
    "predicted_mem_gb",
    "high_mem_gb",
    "low_step_time_s",
    "high_step_time_s",
    "feasible",
    "bottleneck",
    "reason",
)
# What the numbers of a row may be: outside of it the cost model divides by zero or leaves the range
# of floats.
LARGEST = 10**9
COUNTS = (
    "tp",
    "pp",
    "cp",
    "dp",
    "ep",
    "etp",
    "gbs",
    "seq",
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "vocab",
)
SIZES = (
    "gpus",
    "vp",
    "mbs",
    "ffn",
    "experts",
    "topk",
    "moe_ffn",
    "fsdp_size",
    "gpus_per_nvl_domain",
)
LIMITS = (
    dict.fromkeys(COUNTS, (1, LARGEST))
    | dict.fromkeys(SIZES, (0, LARGEST))
    | {"zero_stage": (0, 3)}
)
BLOCK = 8192  # rows priced at once


def unmeasured(row: Mapping[str, str]) -> Row:
    """The row without what was measured on it, so that no prediction can look at its answer."""
    return {name: cell for name, cell in row.items() if name not in MEASURED}


def checked(i: int, row: Mapping[str, str]) -> MeasuredRun:
    """`measurement` with every number within `LIMITS`. Raises ValueError that names the column and
    says why.
    """
    for name, (low, high) in LIMITS.items():
        try:
            value = float(row.get(name) or low)
        except ValueError:
            continue  # `measurement` says so where it needs the column
        if not low <= value <= high:
            raise ValueError(f"column {name!r}: {row[name]!r} is not within {low}..{high}")
    return measurement(i, row)


def to_jobs(rows: Sequence[Mapping[str, str]]) -> tuple[dict[int, Job], dict[int, str]]:
    """({place of a row: its job}, {place: why it cannot be priced}); measured columns are not
    read.
    """
    jobs, refused = {}, {}
    for i, row in enumerate(rows):
        try:
            jobs[i] = checked(i, unmeasured(row)).job
        except ValueError as error:
            refused[i] = str(error)
    return jobs, refused


def to_anchors(rows: Sequence[Mapping[str, str]]) -> tuple[list[MeasuredRun], list[str]]:
    """(usable measurements, why each other row is rejected, by its line in the file)."""
    used, rejected = [], []
    for i, row in enumerate(rows):
        try:
            found = checked(i, row)
            if found.failed:
                raise ValueError(
                    f"column 'status': {row['status']!r}: a run that failed has no step time"
                )
            if np.isnan(found.step_time) and np.isnan(found.memory):
                raise ValueError(
                    "columns 'step_time_s', 'tokens_s_gpu' and 'mem_gb' are empty: nothing was "
                    "measured"
                )
            used.append(found)
        except ValueError as error:
            rejected.append(f"row {i + 2}: {error}")
    return used, rejected


def price(
    model: Model, jobs: Sequence[Job], anchors: Sequence[MeasuredRun] = ()
) -> tuple[PricedJobs, np.ndarray]:
    """(prediction of the jobs that have a finite one, corrected by the anchors; bool (N,): which
    have).
    """
    known = [m.job for m in anchors]
    with np.errstate(all="ignore"):
        both = hybrid.predict(model, columns([*jobs, *known]))  # one table: one compilation
    fine = np.all(
        [
            np.isfinite(v) & (v > 0)
            for v in (both.time, both.low, both.high, both.memory, both.log_std)
        ],
        0,
    )
    ours, theirs = fine[: len(jobs)], fine[len(jobs) :]
    told = [m for m, ok in zip(anchors, theirs, strict=True) if ok]
    corrected = correct(
        both.at(np.flatnonzero(ours)),
        [job for job, ok in zip(jobs, ours, strict=True) if ok],
        [m.job for m in told],
        both.at(len(jobs) + np.flatnonzero(theirs)),
        np.array([m.step_time for m in told]),
        np.array([m.memory for m in told]),
        model.fit["slope"],
    )
    return corrected, ours


def predict(
    rows: Sequence[Mapping[str, str]], model: Model, anchors: Sequence[MeasuredRun] = ()
) -> list[Row]:
    """The rows, in order and with their columns, and the columns `ADDED`: empty but for `reason`
    where not priced.
    """
    jobs, refused = to_jobs(rows)
    priced: dict[int, Row] = {}
    places = list(jobs)
    for start in range(0, len(places), BLOCK):
        block = places[start : start + BLOCK]
        found, finite = price(model, [jobs[i] for i in block], anchors)
        for i in (i for i, ok in zip(block, finite, strict=True) if not ok):
            refused[i] = "the cost model gives no finite time or memory for these sizes"
        kept = [i for i, ok in zip(block, finite, strict=True) if ok]
        priced |= dict(zip(kept, _cells(found, [jobs[i] for i in kept]), strict=True))
    empty = dict.fromkeys(ADDED, "")
    return [
        {**row, **empty, **priced.get(i, {"reason": refused.get(i, "")})}
        for i, row in enumerate(rows)
    ]


def _cells(p: PricedJobs, jobs: Sequence[Job]) -> list[Row]:
    tokens_N = np.array([job.batch * job.seq / job.plan.chips for job in jobs]) / p.time
    numbers = (p.time, tokens_N, p.memory / 1e9, p.memory_high / 1e9, p.low, p.high, p.feasible)
    texts = [[f"{value:.6g}" for value in values] for values in numbers]
    return [
        dict(zip(ADDED, cells, strict=False)) for cells in zip(*texts, p.bottleneck(), strict=True)
    ]


def load(path: Path | None) -> Model:
    """The shipped model, or another fitted one. Raises UserError for a file that is not one, naming
    what it lacks.
    """
    if path is None:
        return hybrid.shipped()
    try:
        model = hybrid.from_json(path.read_text("utf8"))
        parts = [
            (part, name)
            for part in ("time", "memory", "spread", "fit")
            for name in getattr(hybrid.shipped(), part)
        ]
        lacking = [f"{part}.{name}" for part, name in parts if name not in getattr(model, part)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error
    if lacking:
        raise UserError(f"{path}: lacks {lacking[0]!r}; write it with the fitting command")
    return model


def write(rows: Sequence[Row], out: Path | None) -> None:
    """The rows as CSV to a file, or to stdout. Raises UserError where the file cannot be
    written.
    """
    header = [name for name in rows[0] if name not in ADDED] + list(ADDED)

    def to(file: IO[str]) -> None:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    if out is None:
        return to(sys.stdout)
    try:
        with out.open("w", newline="", encoding="utf8") as file:
            to(file)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line in one line, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _rows(path: Path) -> list[Row]:
    rows = read(path)
    if not rows:
        raise UserError(f"{path}: no rows below the header")
    return rows


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 after one line that says what is wrong with a
    file.
    """
    parser = _Parser(
        prog="predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", type=Path, help="CSV of configurations")
    parser.add_argument("--anchors", type=Path, help="CSV of a few measured configurations")
    parser.add_argument("--out", type=Path, help="CSV to write (default: stdout)")
    parser.add_argument(
        "--model-file", type=Path, help="fitted coefficients other than the shipped ones (JSON)"
    )
    args = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        model, rows = load(args.model_file), _rows(args.configs)
        anchors, rejected = to_anchors(_rows(args.anchors)) if args.anchors else ([], [])
        done = predict(rows, model, anchors)
        write(done, args.out)
    except UserError as error:
        _say([f"error: {' '.join(str(error).split())}"])
        return 2
    refused = sum(bool(row["reason"]) for row in done)
    _say(f"warning: anchor rejected: {args.anchors}, {line}" for line in rejected)
    if refused == len(done):
        _say(
            [
                f"warning: no row of {args.configs} could be priced; first reason: "
                f"{done[0]['reason']}"
            ]
        )
    _say(
        [
            f"priced {len(done) - refused} rows, refused {refused}; anchors used {len(anchors)}, "
            f"rejected {len(rejected)}; "
            f"{time.perf_counter() - began:.1f} s"
        ]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
