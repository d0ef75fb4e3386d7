"""Plans of hybrids, the baselines beside them, and the command."""

import pytest
from absl import flags

from fdp.count.counts import EXCHANGE, REDUCE
from fdp.keys import UserError
from fdp.parallel.context.planner_machine import INFINIBAND
from fdp.topics.ttt_cp import plan, planned
from fdp.topics.ttt_cp.planned import HybridJob


def test_no_baseline_is_ahead_of_the_plan():
    gains = planned.cells()
    assert len(gains) == 24
    assert min(gains.values()) >= -1e-12


def test_the_busiest_device_of_a_causal_mask():
    contiguous = planned._seen(planned.CONTIGUOUS, 64, 4, 1)
    assert contiguous * 64 == 48 + 17 / 2  # positions 48 … 63 see 49 … 64 keys
    assert planned._seen(planned.ZIGZAG, 64, 4, 1) * 64 == 65 / 2
    assert planned._seen(planned.CONTIGUOUS, 64, 4, 4) * 64 == 65 / 2


def test_bytes_of_an_option_are_those_of_the_layer():
    job = HybridJob(1024, 4096, 4, 512)
    found = {o.plan: o for o in planned.options("attention", job, False)[0]}
    unit = 2 * 1024 * 2 * 128 * 2  # keys and values of 1,024 positions, two heads of 128, bf16
    assert found["all_gather"].wire == 2 * 3 * unit
    assert found["ring"].steps == 2 * 3


def test_a_single_chunk_has_no_update_to_hide():
    job = HybridJob(1024, 4096, 2, 4096)
    made = planned._layer("lact", planned.StatePlan(), job)
    assert planned.reading(made, job) == 0


def test_sums_hide_from_some_chunk_on():
    least, reached, found = planned.exposed(INFINIBAND)
    assert found[2048] > 0.03 and 2048 < least < reached
    assert sorted(found.values(), reverse=True)[0] == found[2048]


def test_pictures_mark_moves_and_the_least_chunk():
    plans = planned.plan_drawn()["plan of a hybrid"].axes[0]
    assert len(plans.patches) == 2 * len(planned.HYBRIDS[2])
    assert len(planned.shares_drawn()["exposed against chunk"].axes[0].lines) == 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("gnd*3", "--layers=gnd*3: 'gnd' is no layer; did you mean 'gdn'?"),
        ("gdn*0", "--layers=gdn*0: '0' in 'gdn*0' is not 1 to 256: write gdn*3"),
        ("gdn*200,gdn*99", "--layers=gdn*200,gdn*99 are 299 layers > 256: plan one period"),
    ],
)
def test_bad_layers(text, error):
    with pytest.raises(UserError) as found:
        plan.layers(text)
    assert str(found.value) == error


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("h100:1", "--cluster=h100:1 is 1 group(s) of 1 chip(s): take one group of at least 2"),
        ("h1000:8", "--cluster=h1000:8: unknown chip 'h1000': did you mean 'h100'?"),
        (
            "h100:1x8+a100:1x8",
            "--cluster=h100:1x8+a100:1x8 is 2 group(s) of 16 chip(s): take one group of at least 2",
        ),
        ("v5p:4by4", "--cluster=v5p:4by4: cluster 'v5p:4by4': 'v5p:4by4' is not chip:AxB"),
    ],
)
def test_bad_clusters(text, error):
    with pytest.raises(UserError) as found:
        plan.on(text)
    assert str(found.value).startswith(error)


def test_two_levels_exchange_among_neighbours_and_sum_among_their_groups():
    job = HybridJob(4096, 2**15, 4, 8192)
    found = {o.plan: o for o in planned.options("lact", job, True)[0]}
    one, two = found["tokens"], found["heads+tokens u=2"]
    among = {t.op: (t.ranks, t.inner, t.times) for t in two.transfers}
    assert among == {EXCHANGE: (2, 1, 2), REDUCE: (2, 2, 3)}
    sums = {o.plan: sum(t.wire for t in o.transfers if t.op == REDUCE) for o in (one, two)}
    # Half of the heads, among two: 1 · ½ instead of 2 · ¾ of all.
    assert sums["heads+tokens u=2"] == sums["tokens"] / 3


def test_a_wavefront_computes_in_every_tick_and_waits_for_each():
    job = HybridJob(4096, 2**15, 4, 8192)
    found = {o.plan: o for o in planned.options("ttt_linear", job, False)[0]}
    heads, wave = found["heads"], found["wavefront m=8"]
    ticks = 8 + 4 - 1
    assert wave.chained == pytest.approx(heads.chained * ticks / 8)
    assert (heads.chain, wave.chain) == (2 * 2**15 // 16, 2 * ticks * 2**15 // 4 // 16)
    assert wave.steps == 2 * ticks
    assert wave.wire == 2 * ticks * 4 * 4 * 128 * (128 + 1)  # four heads of f32 weights and biases


def test_a_scan_of_maps_sends_fewer_of_them_in_more_steps():
    found = {o.plan: o for o in planned.options("gdn", HybridJob(4096, 2**17, 8), False)[0]}
    gather, scan = found["affine"], found["affine+scan"]
    state = 4 * 32 * 128 * 128  # f32 bytes of 32 heads
    assert (gather.wire, gather.steps) == (2 * 7 * 2 * state, 2)
    assert (scan.wire, scan.steps) == (2 * (2 + 2 + 1) * state, 2 * 3)
    assert gather.chain - scan.chain == 2 * (8 - 2 * 2)


def test_prices_of_a_torus_say_that_nothing_was_measured():
    devices, evidence = plan.on("v5p:4x4")
    assert devices.count == 16 and devices.move(2.0**30) > 0
    assert "nothing was measured on v5p" in evidence and "one axis of a torus" in evidence
    assert "|error|" in plan.on("h100:2x8")[1]


def test_windows_fetch_only_what_they_reach():
    job = HybridJob(1024, 4096, 4, 512, window=700)
    found = {(o.plan, o.layout.kind): o for o in planned.options("window", job, False)[0]}
    whole = {(o.plan, o.layout.kind): o for o in planned.options("attention", job, False)[0]}
    near = found["ring hops=1", "contiguous"]
    # One hop of three, of the last 699 keys of 1,024.
    assert near.wire == whole["ring", "contiguous"].wire / 3 * 699 / 1024 and near.steps == 2
    assert near.flops < whole["ring", "zigzag"].flops
    # Positions 3,072 … 4,095 see 700 keys each, the first 700 fewer.
    assert planned._seen(planned.CONTIGUOUS, 4096, 4, 1, 700) * 4096 == 700
    assert planned._seen(planned.CONTIGUOUS, 4096, 4, 4, 700) * 4096 == 700 - 700 * 699 / 2 / 4096


def test_attention_in_every_layer_takes_longer_the_fewer_a_hybrid_keeps():
    found = planned.over_attention()
    for name in ("ring", "best USP"):
        low = [found[name, many][0] for many in (1, 3, 7)]
        assert 1 < low[0] < low[1] < low[2] < 8


def test_a_window_of_no_position_is_refused_and_a_long_one_is_the_whole():
    with pytest.raises(UserError, match=r"--window=0 reads no position: set --window=512"):
        plan.job_of(1024, 512, 512, 8, 0)
    assert plan.job_of(1024, 512, 512, 8, 4096).window == 512


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ((1000, 4096, 512), "--width=1000 is not divisible by heads of 512"),
        ((1024, 4097, 512), "--seq=4097 is not divisible by 2·devices = 16"),
        ((1024, 4096, 500), "--chunk=500 must be divisible by 8 devices and divide --seq=4096"),
    ],
)
def test_bad_sizes_name_a_fix_that_works(sizes, error):
    with pytest.raises(UserError) as found:
        plan.job_of(*sizes, 8)
    said = str(found.value)
    assert said.startswith(error)
    key, number = said.rpartition("set --")[2].split("=")
    fixed = dict(zip(("width", "seq", "chunk"), sizes, strict=True)) | {key: int(number)}
    plan.job_of(*fixed.values(), 8)


def test_the_command_prints_plans_moves_and_reasons(capsys, monkeypatch):
    values = flags.FlagValues()
    plan.declare(values)
    sizes = ["--width=1024", "--seq=65536", "--cluster=h100:1x4"]
    values(["plan", "--layers=gdn,window,attention", *sizes])
    monkeypatch.setattr(flags, "FLAGS", values)
    plan.main(["plan"])
    said = capsys.readouterr().out
    assert "ring hops=1" in said and "attention in every layer, best USP" in said
    assert "affine" in said and "moves between layouts" in said
    assert "gdn, affine zigzag: the affine plan composes ranges of positions" in said


def test_devices_are_split_into_powers_of_two_only():
    job = HybridJob(4096, 3 * 2**13, 12, 1536)
    for kind, name in (("attention", "usp"), ("lact", "heads+tokens")):
        found, refused = planned.options(kind, job, True)
        assert not [o.plan for o in found if o.plan.startswith(name)]
        for u in (2, 3, 4, 6):
            assert any(key.startswith(f"{name} u={u} ") for key in refused), (name, u)
