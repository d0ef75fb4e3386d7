"""Topic 1: what its study says where it cannot decide, and what its pictures show."""

import pytest

from fdp.topics.parallel_dlm import figures, rows


@pytest.mark.fast
def test_heads_that_eight_devices_cannot_share_leave_the_switch_undecided_and_say_why() -> None:
    row = rows.indivisible_heads(12, 4, 8)
    assert row.verdict == "not testable here" and "heads % tp = 12 % 8" in row.note


@pytest.mark.fast
def test_a_picture_of_a_sample_draws_no_control_character_and_no_formula() -> None:
    assert figures.printable("a\n$\x01é") == r"a⏎\$·é"
