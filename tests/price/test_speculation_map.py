"""The map of speculative decoding: baselines on the same devices, limits, what is refused."""

from dataclasses import replace

import pytest

from fdp.keys import UserError
from fdp.price import speculation_map
from fdp.price.inference import LLADA_8B
from fdp.price.speculation import BLOCKS, DEVICES, Decoding, Split, priced
from fdp.price.speculation_map import EVERYWHERE, MARKOV_ROUNDS, PLACES, drafted, self_drafted

pytestmark = pytest.mark.fast


def test_all_rivals_have_the_same_devices():
    assert all(place.used <= DEVICES == place.devices for place in (EVERYWHERE, *PLACES))


def test_self_drafting_is_twice_as_fast_as_the_verifier_alone_on_cached_blocks():
    for at in BLOCKS:
        own = self_drafted(at)
        assert own.seconds == pytest.approx(
            MARKOV_ROUNDS[32, own.window][0] * priced(LLADA_8B, at, own.window).seconds
        )
        assert speculation_map.verifier_alone(at) / own.seconds >= 2
        assert own.window < 32, "wide windows do not pay"


def test_a_cell_of_the_map():
    (never, always) = speculation_map.cells(BLOCKS[:1], (1,), (0.0, 1.0), (1,))
    assert never.gain < 0 < always.gain
    assert never.speed_up == pytest.approx(never.alone / never.own.seconds)
    assert always.alone == 32 * priced(LLADA_8B, BLOCKS[0]).seconds
    # Devices of its own are one of the choices.
    at = BLOCKS[0]
    assert drafted(at, 1, 0.0).seconds <= drafted(at, 1, 0.0, apart=True).seconds


def test_a_deeper_draft_has_to_be_right_more_often(monkeypatch):
    monkeypatch.setattr(speculation_map, "PLACES", (Split(2, 3, 2),))
    at = BLOCKS[0]
    shallow, deep = (speculation_map.rate_needed(at, layers, 0.1) for layers in (1, 16))
    assert 0.9 < shallow <= deep <= 1
    assert speculation_map.rate_needed(at, 16, gain=9.0) is None


def test_lazy_ancestral_tends_to_a_pass_a_token():
    at = BLOCKS[0]
    alone = speculation_map.verifier_alone(at)
    assert speculation_map.lazy_ancestral(at, 10**6) == pytest.approx(alone, rel=1e-4)
    assert speculation_map.lazy_ancestral(at, 1) == pytest.approx(alone / 32)
    many = speculation_map.lazy_ancestral(replace(at, requests=8), 64)
    assert many > speculation_map.lazy_ancestral(at, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_drafted(Decoding("", 48)), r"N = 48 steps were counted, only over \[32"),
        (lambda: speculation_map.lazy_ancestral(BLOCKS[0], 0), "grid = 0.*at least 1"),
    ],
)
def test_what_was_not_counted_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
