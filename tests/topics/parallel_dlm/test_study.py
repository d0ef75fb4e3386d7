"""Topic 1: what its study says where it cannot decide, and what its pictures show."""

import numpy as np
import pytest

from configs.topic1 import get_config
from fdp.config import UserError
from fdp.study.figures import smallest_text
from fdp.topics.parallel_dlm import figures, policies, rows, study
from fdp.topics.parallel_dlm.settings import POLICIES

pytestmark = pytest.mark.fast


def test_experts_are_refused_before_anything_is_trained() -> None:
    c = get_config("tiny")
    c.model.moe.experts = 4
    with pytest.raises(UserError, match=r"model\.moe\.experts=4: .* set model\.moe\.experts=0"):
        study.arms(c)


def test_an_autoregressive_config_leaves_no_diffusion_lm_to_judge() -> None:
    c = get_config("tiny")
    c.objective.name = "autoregressive"
    with pytest.raises(UserError, match=r"leaves no diffusion LM to judge: .*\.name=mdlm"):
        study.arms(c)


def test_heads_that_eight_devices_cannot_share_leave_the_switch_undecided_and_say_why() -> None:
    row = rows.indivisible_heads(12, 4, 8)
    assert row.verdict == "not testable here"
    assert "heads % tp = 12 % 8" in row.note


def results(kl: float) -> list[policies.PolicyResult]:
    """Every policy, the exact ones without error."""
    ids, none = [np.zeros((1, 4), np.int32)], [0.0]
    return [
        policies.PolicyResult(
            name, 4, 0.3, none if "exact" in name else [kl], none, none, none, ids, none
        )
        for name in POLICIES
    ]


def test_every_policy_is_drawn_and_exact_ones_stand_on_the_edge() -> None:
    fig = figures.trade_off({("mdlm", 4): results(1e-3), ("markov", 4): results(1e-5)})
    axes = fig.axes[0]
    lines = {line.get_label(): line for line in axes.lines if line.get_label() in figures.GROUPS}
    assert lines.keys() == set(figures.GROUPS)
    assert sum(len(line.get_xdata()) for line in lines.values()) == len(POLICIES)
    assert set(lines["exact"].get_ydata()) == {axes.get_ylim()[0]}
    assert len({(x.get_color(), x.get_markerfacecolor()) for x in lines.values()}) == len(lines)
    assert smallest_text(fig) >= 8.999


def test_a_picture_of_a_sample_draws_no_control_character_and_no_formula() -> None:
    assert figures.printable("a\n$\x01é") == r"a⏎\$·é"
