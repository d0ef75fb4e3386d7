"""The simulated half of topic 8: identities, stated numbers, rows and pictures of a small size."""

import dataclasses
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest

from fdp.parallel.pipeline.costs import Costs
from fdp.parallel.pipeline.fixed import one_f_one_b
from fdp.parallel.pipeline.placement import looped, wave
from fdp.parallel.pipeline.published import Entry
from fdp.price import planner, space
from fdp.price.hardware import chip
from fdp.study.cache import Cache
from fdp.study.measure import perform
from fdp.topics.zero_bubble import barrier, rows_simulated, simulated, skips, worth
from fdp.topics.zero_bubble.op_costs import OpCosts
from fdp.topics.zero_bubble.parts_simulated import SIZES, Size, parts
from fdp.topics.zero_bubble.simulated import EQUAL, HALVES, LAWS, NORMAL

pytestmark = pytest.mark.fast

SMALL = Size(
    p=2,
    m=4,
    effort=0.0,
    shapes=(EQUAL,),
    more=(),
    laws=(HALVES,),
    proofs=((2, 2, 5.0, (EQUAL,)),),
    caps=(2,),
    swept=(2, 4),
    drawn=(2, 4),
    skips=4,
    few=True,
    tables=False,
)
MEASURED = (1.0, 1.25), (1.0, 1.5), (0.75, 1.0)
TIMED = [OpCosts(1, 4, {"F": [1.0], "B": [1.25], "W": [0.75], "BW": [2.0]})]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(found, workdir) of everything, measured costs included."""
    workdir = tmp_path_factory.mktemp("simulated")
    return perform(parts(SMALL, TIMED), Cache(workdir, {}), workdir), workdir


def test_every_part_gives_rows_and_pictures(small):
    found, workdir = small
    groups = {row.group for row in found.rows}
    assert groups == {
        "Searched schedules",
        "Without a barrier",
        "Skips of a U-ViT",
        "When a pipeline pays",
    }
    claims = [row.claim for row in found.rows]
    assert len(set(claims)) == len(claims)
    assert sum(row.decides for row in found.rows) == 2
    assert len(found.plots) == 4
    for path in found.plots:
        assert matplotlib.image.imread(workdir / path).std() > 0.05


@pytest.mark.parametrize("law", LAWS)
def test_laws_share_the_same_work(law):
    share = simulated.shares(law, 32)
    assert share.mean() == pytest.approx(1) and share.std() > 0.4
    np.testing.assert_array_equal(share, simulated.shares(law, 32))


def test_contests_are_between_equal_work_and_memory():
    (case,) = simulated.cases(2, 4, 0.0, [EQUAL], [], [NORMAL])
    c = simulated.contest(case)
    work = 4 * 3.0  # of each device
    for name in ("searched", "fixed", "equal_searched", "sorted_1f1b", "random_1f1b"):
        found = getattr(c, name)
        assert found.makespan * (1 - found.bubble) == pytest.approx(work)
        assert c.over(name) >= 1 or name == "equal_searched"
    assert c.bound <= c.searched.makespan * (1 + 1e-9)
    assert c.possible >= c.over("fixed")
    assert c.over("random_1f1b") > c.over("sorted_1f1b") > c.over("split_1f1b") > 1


def test_a_claim_that_cannot_hold_says_so():
    """The bound of all orders is named where it leaves no room."""
    (case,) = simulated.cases(2, 2, 0.0, [EQUAL], [], [HALVES])
    c = simulated.contest(case)
    tight = c._replace(bound=c.fixed.makespan / 1.01, searched=c.fixed)
    first, *_ = rows_simulated.contests([tight])
    assert first.verdict == "fails" and "leaves 4 % open in 0 of 1" in first.note


def test_measured_costs_are_cases_of_their_own():
    found = simulated.cases(8, 32, measured=MEASURED)
    mine = [c for c in found if c.name.startswith("measured")]
    assert [(c.p, c.held) for c in mine] == [(2, 2.0)] * 2
    assert len({c.name for c in found}) == len(found) == 10


def test_steps_without_a_barrier():
    for name, row in barrier.bubbles().items():
        assert tuple(round(x, 3) for x in row) == barrier.STATED[name]


def test_clipping_checked_afterwards_lies_between_its_limits():
    for c in barrier.clippings(update=0.5, norm=0.1):
        assert c.validated[0.0] == c.delayed <= c.barrier
        assert c.validated[1.0] == pytest.approx(c.barrier + 0.5)
    lines = [c.schedule for c in barrier.clippings() if c.validated[0.1] / c.barrier < 0.99]
    assert lines == ["ZB-H2", "ZBV"]  # only a stagger can be saved
    one = barrier.clipping(one_f_one_b(2, 4), "1F1B", Costs(), 0.0)
    assert one.barrier == one.delayed == 5 * 3


def test_messages_of_a_u_vit():
    found = {t.placement: (t.straight, t.relayed) for t in skips.transfers()}
    assert found["V"] == (12, 12)
    assert found["line, stages of 6, 8, 9, 6 blocks"] == (34, 58)
    assert min(straight for straight, _ in found.values()) == 12
    for placement in (wave(4), looped(4), looped(4, 2)):
        first = skips.cuts(placement)
        ends = (*first[1:], skips.DEPTH + 1)
        assert first[0] == 0 and all(a < b for a, b in pairwise((*first, ends[-1])))
        on = placement.devices
        if placement == wave(4):
            assert all(on[a] == on[b] for a, b in skips.pairs(first))
        assert sum(skips.stage_costs(placement, 0.0).F) == pytest.approx(4)


JOB = next(c for c in worth.cells() if c.name.startswith("12B 512 px, 64 chips, batch 256, 50"))


def test_plans_are_those_of_the_planner():
    """At the chip's own link the better of both halves is the planner's best plan."""
    assert JOB.link == chip("h100").scale_out_bandwidth
    w = worth.worth(JOB)
    best = planner.plan(
        JOB.workload.shape, f"h100:{JOB.nodes}x8", JOB.batch, JOB.workload.tokens, causal=False
    ).plans[0]
    assert min(w.without, w.interleaved) == pytest.approx(best.time, rel=1e-5)
    assert w.free <= w.searched <= w.interleaved
    assert " pp" not in w.plan_without and "pp" in w.plan_searched


def test_share_of_the_bubble():
    """(p − 1)/v of the work of a microbatch, and nothing without stages."""
    job = dataclasses.replace(
        planner.job_on(JOB.workload.shape, planner.hardware.cluster("h100:8x8"), 256, 1024),
        causal=False,
    )
    points = space.space(job.shape, 64, 256, 1024)
    share = worth.bubble_share(job, points)
    assert (share[points["pp"] == 1] == 0).all()
    assert ((share > 0) & (share < 1))[points["pp"] > 1].all()


@pytest.mark.parametrize(("p", "v"), [(4, 1), (4, 2), (8, 1)])
def test_idle_time_of_searched_schedules(p, v):
    for m in (p, 4 * p):
        least, found = (f(p, v, m, 0.8) for f in (worth.least_idle, worth.searched_idle))
        assert 0 < least <= found + 1e-9 and found < 1
    many = worth.searched_idle(p, v, 8 * p, 0.8)
    assert many == pytest.approx(worth.searched_idle(p, v, worth.ENOUGH * p, 0.8), rel=0.02)


def test_the_map_has_the_cells_asked_for():
    found = worth.cells()
    assert len(found) == len({c.name for c in found}) == 72
    assert len(worth.cells(few=True)) == 4
    assert 1.9e9 < 12 * 40 * 2048**2 < 2.2e9 and 2.8e10 < 12 * 48 * 7168**2 < 3.1e10


def test_a_number_that_differs_is_told():
    right, wrong = (Entry("t", "r", "c", 0.1234, x) for x in (0.12341, 0.1236))
    assert rows_simulated.tables([right]).verdict == "holds"
    row = rows_simulated.tables([right, wrong])
    assert row.verdict == "fails" and "t r c: 0.12360" in row.note
    assert set(SIZES) == {"tiny", "cpu", "full"}
