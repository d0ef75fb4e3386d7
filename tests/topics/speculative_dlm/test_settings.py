"""Topic 4: what a config may ask for, the sizes of drafts, and the rows of counts."""

from dataclasses import replace

import numpy as np
import pytest

from configs import topic4
from fdp import config
from fdp.keys import UserError
from fdp.topics.speculative_dlm import rows, settings
from fdp.topics.speculative_dlm.arms import VERIFIER, arms, check_pair
from fdp.topics.speculative_dlm.counted import LawDistance, RoundCounts
from fdp.topics.speculative_dlm.study import groups

pytestmark = pytest.mark.fast


def changed(**keys):
    c = topic4.get_config("cpu").copy_and_resolve_references()
    c.speculation.update(keys)
    return c


@pytest.fixture(scope="module")
def found():
    c = changed()
    c.data.source = "blank"
    return arms(c)


def test_windows_longer_than_the_chain_are_cut_and_it_is_said_once():
    c = changed(lengths=(8, 32), windows=(4, 16))
    assert settings.windows(c, 8) == (4, 8)
    assert settings.windows(c, 32) == (4, 16, 32)
    said = settings.cut(c)
    assert said == (
        "speculation.windows=(4, 16) > steps = speculation.lengths=(8, 32): 16 cut to the steps "
        "there are"
    )
    assert settings.cut(changed(lengths=(32,), windows=(4, 16))) == ""


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"windows": (0, 4)}, r"speculation\.windows.*0"),
        ({"targets": ()}, r"speculation\.targets=\(\) is empty"),
        ({"drafters": ("exact",)}, r"lacks what drafts are judged against: add one of stale"),
    ],
)
def test_what_cannot_be_counted_is_refused(keys, text):
    with pytest.raises(UserError, match=text):
        config.validate(changed(**keys))


def test_an_objective_that_is_no_masked_denoiser_is_refused():
    c = changed()
    c.objective.name = "sedd_uniform"
    with pytest.raises(UserError, match=r"sedd_uniform.*set objective.name=mdlm"):
        settings.check(c)


def test_drafts_of_block_diffusion_do_not_learn_from_the_verifier():
    c = changed()
    c.objective.name = "block_diffusion"
    with pytest.raises(UserError, match=r"set speculation.lessons=\(\) or objective.name=mdlm"):
        settings.check(c)


def test_texts_have_verifiers_and_plain_drafts_of_bytes():
    c = changed(texts=("bible-blocks",), lessons=())
    c.data.source = "blank"
    made = arms(c)
    assert list(made) == [VERIFIER, "tenth", "bible-blocks-verifier", "bible-blocks-tenth"]
    assert made["bible-blocks-tenth"].objective.block == 16
    assert made["bible-blocks-tenth"].model.shape.vocab == 264


def test_drafts_of_other_tokens_are_refused_and_both_are_named(found):
    verifier, draft = found[VERIFIER], found["tenth"]
    n_ids = verifier.objective.n_ids
    other = replace(draft, objective=replace(draft.objective, n_ids=n_ids - 1))
    with pytest.raises(
        UserError, match=f"mask id of the draft = {n_ids - 1}, of the verifier = {n_ids}"
    ):
        check_pair(verifier, other)
    c = changed()
    c.data.source, c.model.vocab = "blank", 40
    with pytest.raises(UserError, match="vocabulary of the draft = 40, of the verifier = 32"):
        check_pair(verifier, arms(c)["tenth"])


def test_every_target_and_drafter_is_counted_once():
    found = groups(changed(lengths=(32, 64)))
    runs = [(*group, name) for group, drafters in found for name in drafters]
    assert len(set(runs)) == len(runs)
    assert {name for *_, name in runs} == set(changed().speculation.drafters)
    assert {group.target for group, _ in found} == set(settings.TARGETS)
    assert {group.window for group, _ in found if group.length == 64} == {16, 64}


def counts(drafter, rounds, differ=0, window=16, length=32):
    rounds_B, of_S = np.full(4, rounds), np.zeros(length, int)
    job = "first-hitting", length, drafter, window
    return RoundCounts(*job, rounds_B, of_S, of_S, 1, 1, 0, differ, 2.5)


def test_one_id_that_differs_fails_the_claim():
    assert rows.equality([counts("jacobi", 6)], "here").verdict == "holds"
    row = rows.equality([counts("jacobi", 6), counts("stale", 7, differ=1)], "here", "16 cut")
    assert (row.verdict, row.value) == ("fails", 1)
    assert "16 cut" in row.note


def test_drafts_are_judged_against_the_best_self_drafter_of_their_window():
    given = [
        counts("stale", 8.0),
        counts("jacobi", 6.0),
        counts("noisy 0.07", 5.0),
        counts("jacobi", 1.0, window=32),
        counts("exact", 1.0),
    ]
    _, few, against = rows.oracle("", given)
    assert (few.value, few.verdict) == (5.0, "holds")
    assert against.baseline == "best self-drafter: jacobi"
    assert against.ratio == pytest.approx(5 / 6) and against.verdict == "holds"


def test_laws_are_judged_in_units_of_noise():
    names = "coupling", "leap", "draft", "0 edits"
    variations = 0.014, 0.2, 0.3, 0.09
    given = [LawDistance(n, v, 0.01) for n, v in zip(names, variations, strict=True)]
    coupling, edits = rows.laws(given)
    assert (coupling.verdict, edits.verdict) == ("holds", "fails")
    assert "leap: 0.200; draft: 0.300" in edits.note
