"""Finds a pipeline schedule, says what it costs and why the known ones lost, and draws it.

    python -m fdp.topics.zero_bubble.schedule --p=8 --m=32 --times=1,1.26,.87 --costs=costs.csv \
        --memory=8 --send=.02 --export=schedule.csv
    python -m fdp.topics.zero_bubble.schedule --check=theirs.csv --times=1,1,1

Legend: p devices, m microbatches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tabulate import tabulate

from fdp import command
from fdp.keys import UserError
from fdp.parallel.pipeline import certificate, library
from fdp.parallel.pipeline.check import check
from fdp.parallel.pipeline.costs import STASH, Costs
from fdp.parallel.pipeline.csv_format import read_csv, write_csv
from fdp.parallel.pipeline.evaluate import evaluate
from fdp.parallel.pipeline.orders import Order
from fdp.parallel.pipeline.placement import Placement, looped
from fdp.parallel.pipeline.search import Candidate, PipelineProblem, SearchResult, search
from fdp.price.simulate import MODES
from fdp.topics.zero_bubble.figures import gantt

SHORTEST, LONGEST = 1e-12, 1e12  # seconds other than 0: no sum of them overflows or vanishes


def declare(values: flags.FlagValues) -> None:
    """The flags of the command; not at import, or they would be flags of every other command."""
    name, number = flags.DEFINE_string, flags.DEFINE_integer
    number("p", 8, "devices of the pipeline", flag_values=values)
    number("m", 32, "microbatches of a step", flag_values=values)
    name("times", "1,1,1", "F,B,W of one device and microbatch, seconds", flag_values=values)
    note = "file with one number a microbatch, which multiplies --times"
    name("costs", None, note, flag_values=values)
    note = "microbatches whose activations a device may hold"
    flags.DEFINE_float("memory", None, note, flag_values=values)
    flags.DEFINE_float("send", 0.0, "seconds of a message between devices", flag_values=values)
    note = "file for the schedule, as torch.distributed.pipelining reads it"
    name("export", None, note, flag_values=values)
    note = "file with a schedule to check and price in place of a search"
    name("check", None, note, flag_values=values)


def run(f: flags.FlagValues, rest: Sequence[str]) -> None:
    """The command. Raises ValueError and OSError for what the user can fix."""
    command.refuse_arguments(["", *rest])
    if f.check is not None:
        _checked(f)
    else:
        _searched(f)


def costs_of(times: str, file: str | None, send: float, m: int) -> Costs:
    """Activation and message count 1 a microbatch of a device. Raises UserError for numbers that
    are no seconds, and for another number of microbatches than m."""
    parts = _numbers(times, "--times")
    if len(parts) != 3:
        raise UserError(f"--times={times} has {len(parts)} numbers: give three, F,B,W")
    _seconds(parts, "--times")
    _seconds([send], "--send")
    share_m = np.ones(m)
    if file:
        try:
            text = Path(file).read_text(encoding="utf-8-sig").replace(",", "\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"--costs={file} is no text: {error}; write one number a line"
            ) from error
        share_m = np.array(_numbers(",".join(text.split()), f"--costs={file}"))
        _seconds(share_m, f"--costs={file}")
        if len(share_m) != m:
            raise UserError(
                f"--costs={file} has {len(share_m)} numbers, one a microbatch, and m={m}: give "
                f"{m}, or set --m={len(share_m)} for a search"
            )
    if not sum(parts) * share_m.sum() > 0:
        raise UserError(
            f"all operations of --times={times} take no time together: give one above 0"
        )
    f, b, w = (part * share_m[None] for part in parts)
    return Costs(f, b, w, send=send, activation=1.0, stash=STASH, message=1.0)


def _numbers(text: str, source: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{source}: {text[:80]!r} is not a list of numbers, a,b,c") from None


def _seconds(values: Sequence[float] | np.ndarray, source: str) -> None:
    for n, x in enumerate(values):
        if x != 0 and not SHORTEST <= x <= LONGEST:
            raise UserError(
                f"{source}: number {n + 1} is {x}: give 0, or one from {SHORTEST:g} to {LONGEST:g}"
            )


def _checked(f: flags.FlagValues) -> None:
    for name in ("memory", "export"):
        if f[name].present:
            raise UserError(f"--{name} belongs to a search: leave it out with --check")
    order = read_csv(f.check, p=f.p if f["p"].present else None)
    check(order)
    m = order.microbatches
    if f["m"].present and f.m != m:
        raise UserError(f"{f.check} has {m} microbatches, not --m={f.m}: leave --m out")
    priced = _priced(order, costs_of(f.times, f.costs, f.send, m))
    print(f"{f.check} runs: {_where(order.placement)}, {m} microbatches, {len(order)} operations")
    print(priced)


def _searched(f: flags.FlagValues) -> None:
    if min(f.p, f.m) < 1 or f.p * f.m > library.MOST:
        raise UserError(
            f"--p={f.p} and --m={f.m} must be at least 1 and p·m = {f.p * f.m} at most "
            f"{library.MOST}: set --p and --m within"
        )
    if f.memory is not None and not f.memory > 0:
        raise UserError(f"--memory={f.memory} must be above 0: a device holds at least 1")
    picture = _picture(f.export)
    costs = costs_of(f.times, f.costs, f.send, f.m)
    found = search(f.p, f.m, costs, f.memory)
    best = found.best
    assert best.order is not None and best.result is not None
    # Before anything is printed: a closed pipe must not cost the schedule.
    gantt(best.result, f"{best.name}, bubble {best.result.bubble:.1%}").savefig(picture)
    if f.export:
        write_csv(best.order, f.export)
    if f.m < f.p:
        print(
            f"warning: m={f.m} < p={f.p}: the pipeline never fills, {best.result.bubble:.1%} of it "
            f"idles; set m ≥ {f.p}"
        )
    print(f"{best.name}, {_where(best.order.placement)}, microbatches {best.sequence}")
    print(_priced(best.order, costs))
    print(_optimal(found, costs, f))
    print()
    print(_rivals(found))
    print(f"\npicture   {picture}")
    if f.export:
        print(f"schedule  {f.export}")


def _picture(export: str | None) -> Path:
    """The path of the picture. Raises UserError for an --export that cannot be written, before the
    search."""
    path = Path(export or "schedule.csv")
    if not path.name or path.is_dir() or path.suffix == ".png" or not path.parent.is_dir():
        raise UserError(
            f"--export={export} is no file that can be written, or the picture's: name one such as "
            "schedule.csv in a folder that is there"
        )
    return path.with_suffix(".png")


def _where(placement: Placement) -> str:
    shape = "looped" if placement == looped(placement.p, placement.v) else "wave"
    return f"p={placement.p}, {shape} with {placement.v} chunks a device"


def _priced(order: Order, costs: Costs) -> str:
    """Three modes, memory, messages, idle time by cause."""
    results = {mode: evaluate(order, costs, mode) for mode in MODES}
    first = results["asynchronous"]
    rows = [
        (mode, r.makespan, f"{r.bubble:.2%}", f"{r.span_bubble:.2%}") for mode, r in results.items()
    ]
    table = tabulate(rows, ("mode", "makespan s", "bubble", "bubble of the span"), floatfmt=".4g")
    causes = ", ".join(f"{cause} {np.mean(x):.3g}" for cause, x in first.idle.items() if any(x))
    peaks = " ".join(f"{peak:.3g}" for peak in first.peak_bytes)
    sent = sum(first.sent_bytes) / order.microbatches
    return (
        f"{table}\nidle      {causes or 'none'} (mean s of a device)\n"
        f"held      {peaks} microbatches\nsent      {sent:.3g} messages a microbatch"
    )


def _optimal(found: SearchResult, costs: Costs, f: flags.FlagValues) -> str:
    text = f"bound     {found.bound:.4g} s for any order and sequence, {found.gap:.2%} below"
    if f.p * f.m > certificate.MOST or found.gap < 1e-6:
        return text
    order = found.best.order
    assert order is not None
    sequence = [op.microbatch for op in order.ops[0] if op == ("F", op.microbatch, 0)]
    proof = certificate.certificate(
        order.placement,
        f.m,
        costs,
        PipelineProblem(f.p, f.m, costs, f.memory).caps,
        found.best.makespan,
        sequence,
        seconds=10.0,
    )
    proven = f"proof     {proof.bound:.4g} s for its placement and sequence, {proof.gap:.2%} below"
    return f"{text}\n{proven}"


def _rivals(found: SearchResult) -> str:
    return tabulate(
        [_rival(c, found.best.makespan) for c in found.rivals],
        ("schedule", "microbatches", "bubble", "held", "why it lost"),
    )


def _rival(c: Candidate, best: float) -> tuple[str, ...]:
    if c.result is None:
        return (c.name, "", "", "", c.lost)
    slower = f"{c.result.makespan / best - 1:.1%} slower" if c.makespan > best else "equal"
    held = f"{max(c.result.peak_bytes):.3g}"
    return (c.name, c.sequence, f"{c.result.bubble:.2%}", held, c.lost or slower)


def main(argv: Sequence[str]) -> None:
    """`run` on the process's flags."""
    run(flags.FLAGS, argv[1:])


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main, None, ValueError)
