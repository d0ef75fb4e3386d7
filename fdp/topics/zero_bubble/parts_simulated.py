"""The simulated half of topic 8 as measurements of a study."""

from collections.abc import Sequence
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
from fdp.topics.zero_bubble.simulated import EQUAL, HALVES, LAWS, PIXELS, SHAPES, VIDEO

EVERY = tuple(SHAPES)
Times = tuple[Sequence[float], Sequence[float], Sequence[float]]


class Size(NamedTuple):
    """How much is simulated. p, m, effort, shapes, more, laws: of the contests. proofs: (p, m, most
    seconds of HiGHS on a case, shapes). caps: memory of the sweep over `swept`, (p, m); none for no
    picture. drawn: (p, m) of the schedules in the picture, or none. skips: microbatches of the
    U-ViT. few: of the map's cells. tables: whether the published ones are computed again."""

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


def parts(size: Size, measured: Times | None = None) -> list[Measurement]:
    """Everything, in the order of the report. measured: seconds of F, B, W by stage; contests then
    have cases of them, and the picture of schedules shows them."""
    return [*_contests(size, measured), *_others(size)]


def _contests(size: Size, measured: Times | None) -> list[Measurement]:
    """The searched schedule against others."""
    given = (size.p, size.m, size.effort, size.shapes, size.more, size.laws)
    group = "Searched schedules"
    found = [
        measure(
            "contest",
            simulated.contest,
            each(simulated.cases(*given, measured)),
            rows=rows_simulated.contests,
            plot=figures_simulated.contests,
            group=group,
        )
    ]
    if size.drawn:
        p, m = size.drawn
        times: Any = SHAPES[PIXELS]
        if measured is not None:
            p, times = len(measured[0]), tuple(map(tuple, measured))
        drawn = times, HALVES, p, m, size.effort
        plot = figures_simulated.schedules
        found.append(measure("schedules", simulated.schedules, *drawn, plot=plot))
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
