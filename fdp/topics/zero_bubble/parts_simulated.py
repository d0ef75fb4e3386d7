"""The simulated half of topic 8 as measurements of a study."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from fdp.parallel.pipeline import published
from fdp.study.measure import Measurement, each, measure
from fdp.topics.zero_bubble import (
    barrier,
    figures_simulated,
    rows_simulated,
    simulated,
    skips,
    worth,
)
from fdp.topics.zero_bubble.op_costs import OpCosts
from fdp.topics.zero_bubble.simulated import EQUAL, HALVES, LAWS, PIXELS, SHAPES, VIDEO

EVERY = tuple(SHAPES)


class Size(NamedTuple):
    """How much is simulated. p, m, effort, shapes, more, laws: of the contests. proofs: (p, m, most
    seconds of HiGHS on a case, shapes). caps: memory of the sweep over `swept`, (p, m); none for no
    picture. drawn: (p, m) of the schedules in the picture, or none. skips: microbatches of the
    U-ViT. few: of the map's cells. tables: whether the published ones are computed again. measured:
    whether contests also have the measured costs."""

    p: int = 8
    m: int = 32
    effort: float = 0.25
    shapes: tuple[str, ...] = EVERY
    more: tuple[str, ...] = (VIDEO,)
    laws: tuple[str, ...] = LAWS
    proofs: tuple[tuple[int, int, float, tuple[str, ...]], ...] = ((3, 4, 20.0, EVERY),)
    caps: tuple[float, ...] = (2, 3, 4, 6, 8)
    swept: tuple[int, int] = (4, 16)
    drawn: tuple[int, int] | None = (4, 8)
    skips: int = 16
    few: bool = False
    tables: bool = True
    measured: bool = True


CPU = Size()
TINY = Size(
    p=4,
    m=8,
    effort=0.0,
    shapes=(PIXELS,),
    more=(),
    laws=(HALVES,),
    proofs=((2, 4, 5.0, (EQUAL,)),),
    caps=(),
    drawn=None,
    skips=4,
    few=True,
    tables=False,
    measured=False,
)
FULL = Size(
    effort=1.0,
    more=EVERY,
    proofs=((3, 4, 20.0, EVERY), (4, 4, 60.0, EVERY), (2, 8, 60.0, EVERY)),
    caps=(3, 4, 5, 6, 8, 10, 12, 16),
    swept=(8, 32),
    skips=32,
)
SIZES = {"tiny": TINY, "cpu": CPU, "full": FULL}


def parts(size: Size, costs: Measurement) -> list[Measurement]:
    """Everything, in the order of the report. costs: the measured `OpCosts` of a stage, the finest
    patches first."""
    return [*_contests(size, costs), *_others(size)]


def cases(size: Size, costs: Sequence[OpCosts]) -> list[simulated.ContestCase]:
    """The contests, beside them those of the measured costs."""
    given = (size.p, size.m, size.effort, size.shapes, size.more, size.laws)
    seconds = [[costs[0].median(kind)] * size.p for kind in ("F", "B", "W")]
    measured = (seconds[0], seconds[1], seconds[2]) if size.measured else None
    return simulated.cases(*given, measured)


def drawn(size: Size, costs: Sequence[OpCosts]) -> dict[str, simulated.Bars]:
    """Every schedule at the measured costs, in units of F."""
    assert size.drawn
    p, m = size.drawn
    return simulated.schedules(costs[0].ratio, HALVES, p, m, size.effort)


def nothing(*_: Any) -> None:
    """For results that are no numbers of a report."""


def _contests(size: Size, costs: Measurement) -> list[Measurement]:
    """The searched schedule against others."""
    group = "Searched schedules"
    some = measure("cases", cases, size, costs, raw=nothing)
    shown = figures_simulated
    contest = partial(measure, "contest", simulated.contest, each(some))
    found = [contest(rows=rows_simulated.contests, plot=shown.contests, group=group)]
    if size.drawn:
        every = partial(measure, "schedules", drawn, size, costs, raw=nothing)
        found.append(every(plot=shown.schedules))
    for p, m, seconds, shapes in size.proofs:
        sizes = p, m, seconds, size.effort, shapes
        name = f"proofs p={p} m={m}"
        judged = {"rows": rows_simulated.proofs, "group": group}
        found.append(measure(name, simulated.proofs, *sizes, **judged))  # type: ignore[arg-type]
    if size.caps:
        swept = PIXELS, HALVES, size.caps, *size.swept
        found.append(measure("memory", simulated.sweep, *swept, plot=figures_simulated.sweep))
    return found


def _others(size: Size) -> list[Measurement]:
    """Published tables, steps without a barrier, skips, the map."""
    r, cells = rows_simulated, worth.cells(size.few)
    tables = measure("tables", tables_again, rows=r.tables, group="Published tables")
    free, skip, worth_it = "Without a barrier", "Skips of a U-ViT", "When a pipeline pays"
    return [
        *([tables] if size.tables else []),
        measure("no barrier", barrier.bubbles, rows=r.no_barrier, group=free),
        measure("clipping", barrier.clippings, rows=r.clippings, group=free),
        measure("transfers", skips.transfers, rows=r.transfers, group=skip),
        measure("links", skips.on_links, size.skips, size.effort, rows=r.on_links, group=skip),
        measure("worth", worth.worths, cells, rows=r.worth, plot=_map, group=worth_it),
    ]


def tables_again() -> list[published.Entry]:
    """Every published number with ours."""
    return list(published.entries())


def _map(found: list[worth.Worth]) -> Any:
    return {"where a pipeline wins": figures_simulated.worth(found)}
