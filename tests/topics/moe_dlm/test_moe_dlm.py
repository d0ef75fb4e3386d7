"""Topic 2: what its arms are, what it refuses, and what its rows make of made-up observations."""

import ml_collections
import numpy as np
import pytest

from configs import topic2
from fdp import config
from fdp.config import UserError
from fdp.count.overlap import Overlap
from fdp.topics.moe_dlm import figures, observe, rows, study
from fdp.topics.moe_dlm.observe import RANKS, Observed, Sampled
from fdp.topics.moe_dlm.settings import ARMS, BINS, DECIDING

pytestmark = pytest.mark.fast


def tiny(**overrides: object) -> ml_collections.ConfigDict:
    c = topic2.get_config("tiny")
    c.update_from_flattened_dict(overrides)
    return c


REFUSED = [
    ({"objective.form": "t", "model.moe.bins": 1}, "objective.name='mdlm' with form 't'"),
    ({"model.time_conditioning": True}, "gives every layer the noise level"),
    ({"router.arms": ("reverse",), "model.moe.topk": 1}, "takes topk - 1 to topk"),
    ({"router.arms": ("r5",)}, "holds 'r5', which"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_configs_that_ask_nothing_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        config.validate(tiny(**changes))


def test_a_config_without_experts_is_refused() -> None:
    with pytest.raises(UserError, match=r"trains experts: set model.moe.experts=16"):
        study.arms(tiny(**{"model.moe.experts": 0}))


def test_arms_differ_in_their_router_alone_and_the_dense_one_has_as_many_flops() -> None:
    c = tiny(**{"router.arms": tuple(ARMS)})
    found = study.arms(c)
    assert list(found) == [f"two_regimes-{name}" for name in ARMS]
    shapes = {name.partition("-")[2]: e.model.shape for name, e in found.items()}
    dense = shapes.pop("dense")
    assert dense.ffn == c.model.moe.topk * c.model.moe.ffn and not dense.experts
    assert len(set(shapes.values())) == 1
    flops = {s.forward_flops(32, causal=False) for s in shapes.values()}
    router = 2 * dense.layers * dense.width * c.model.moe.experts
    assert flops == {dense.forward_flops(32, causal=False) + router}
    of = {
        n.partition("-")[2]: dict(dict(e.model.pattern[0].fields)["ffn"].fields)
        for n, e in found.items()
        if not n.endswith("dense")
    }
    assert of["low_rank_blind"]["routing"].blind and not of["low_rank"]["routing"].blind
    assert of["reverse"]["routing"].range == (1.0, 3.0) and of["expert"]["routing"].scale == 8.0
    assert of["low_rank_rank"]["balance"].ranks == 8 and not of["low_rank_rank"]["balance"].switch


def test_seeds_are_those_that_the_question_needs() -> None:
    c = topic2.get_config("full")
    seeds = study.seeds(c)
    assert {n for n, s in seeds.items() if len(s) == 8} == {
        f"{task}-{name}" for task in ("markov", "two_regimes") for name in DECIDING
    }
    assert seeds["two_regimes-group"] == (0, 1, 2) and seeds["text-aux"] == (0, 1)


def observed(nelbo: float, load: np.ndarray | None = None) -> Observed:
    load = np.ones((BINS, 2, 16)) if load is None else load
    return Observed(nelbo, np.full(BINS, nelbo), load, np.zeros(2), 2.0, np.full((2, 2), 0.5), 0.1)


def sampled(overload: float) -> Sampled:
    load = np.ones((4, 2, 16))
    load[:, :, 0] += overload * 16
    return Sampled(load, np.array([0.0, overload, 0.0, 0.0]), np.zeros((1, 4), int))


def duel(gain: float, noise: float, overload: float, seeds: int = 8) -> list:
    names = ["two_regimes-aux", "two_regimes-loss_free", "two_regimes-low_rank_rank"]
    wobble = noise * np.array([1.0, -1.0] * 4)[:seeds]
    base = [observed(1.5 + w) for w in wobble]
    worse = [observed(1.6) for _ in range(seeds)]
    mine = [observed(1.5 - gain - 0.5 * w) for w in wobble]
    seen = [base, worse, mine]
    drawn = [[sampled(1.0)] * seeds, [sampled(1.0)] * seeds, [sampled(overload)] * seeds]
    return rows.pays(names, seen, drawn)


@pytest.mark.parametrize(
    ("gain", "overload", "verdict"),
    [(0.1, 1.0, "holds"), (0.0, 0.4, "holds"), (0.0, 0.6, "fails"), (-0.1, 0.1, "fails")],
)
def test_the_verdict_is_a_gain_of_three_errors_or_a_level_tie(gain, overload, verdict) -> None:
    *_, last = duel(gain, 0.01, overload)
    assert last.verdict == verdict


def test_the_baseline_is_chosen_on_two_seeds_and_judged_on_the_others() -> None:
    first, *_ = duel(0.1, 0.01, 1.0)
    assert "aux" in first.note and "judged on 6 seed(s)" in first.note
    assert first.value == pytest.approx(0.1 / (1.5 * 0.01 * np.sqrt(6 / 5) / np.sqrt(6)))


def test_one_seed_decides_nothing() -> None:
    *others, last = duel(0.1, 0.0, 0.4, seeds=1)
    assert last.verdict == "not testable here" and "run the variant full" in last.note
    assert len(others) == 2 and all("overload of the ranks" in r.metric for r in others)


def test_overload_and_step_time_follow_the_fullest_rank() -> None:
    level, skewed = np.ones(16), np.ones(16)
    skewed[:2] = 9
    assert observe.rank_overload(level) == 0
    assert observe.rank_overload(skewed) == 18 / 4 - 1
    assert rows.seconds(sampled(1.0)) > rows.seconds(sampled(0.0))


def test_what_stands_beside_the_exchange_is_a_row_that_can_fail() -> None:
    hidden, alone = Overlap(8, 4, 4, 2), Overlap(8, 0, 0, 0)
    for found, verdict in ((hidden, "holds"), (alone, "fails")):
        row = rows.beside({"h100": found, "v5p": alone})
        assert row.verdict == verdict and "v5p: 0 of 8 asynchronous" in row.note
    assert ".[aot]" in rows.beside({"v5p": alone}).note


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    share_N = rng.random(64)
    hidden = np.arange(8) % 2 == 0
    hidden_NxL = np.broadcast_to(hidden, (64, 8))
    x = rng.standard_normal((64, 8, 4))
    masked, revealed = observe.probe(x, share_N, hidden_NxL)
    assert max(masked, revealed) < 0.1
    x[:, :, 0] = np.where(hidden, share_N[:, None], x[:, :, 0])
    masked, revealed = observe.probe(x, share_N, hidden_NxL)
    assert masked > 0.95 and revealed < 0.1


def test_pictures_of_a_task_are_drawn() -> None:
    arms = ("aux", "low_rank_rank")
    seen = [[observed(1.0), observed(1.1)], [observed(1.2)]]
    drawn = [[sampled(0.5)] * 2, [sampled(0.1)]]
    found = figures.task("two_regimes", arms, seen, drawn)
    assert set(found) == {f"{w} two_regimes" for w in ("nelbo", "experts", "ranks")}
    assert RANKS == 8 and figures.plans(rows.plans())
