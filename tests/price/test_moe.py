"""The price of a layer of experts: closed forms, counts by brute force, published dispatch figures,
held-out kernel times, the command, and the step time with loads.

Legend: N tokens, K choices, E experts, M devices.
"""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from fdp import config
from fdp.command import one_line
from fdp.data.traces import Writer
from fdp.keys import UserError
from fdp.price import hardware, hybrid, moe, moe_matmul, moe_traffic, network, shapes, step_time
from fdp.price.moe_traffic import PricedLayer, counted, exchanges, loaded, reach, uniform
from fdp.price.workload import Job, Plan, columns
from tools import fit_moe

pytestmark = pytest.mark.fast
DATA = Path(__file__).parents[2].parent / "shared" / "data"
V3 = shapes.named("deepseek-v3")
SMALL = dataclasses.replace(V3, experts=8, topk=2, name="small")


@pytest.fixture(scope="module")
def kernels():
    """Measured times by (chip, D, W, e), with ep ≤ k and with ep > k."""
    if not (DATA / fit_moe.FILE).exists():
        pytest.skip(f"the measured kernels are not beside the project: {DATA / fit_moe.FILE}")
    rows = fit_moe.read(DATA / fit_moe.FILE)
    return fit_moe.measured(rows), fit_moe.measured(rows, walking=True)


def layer(shape=V3, cluster="h100:4x8", tokens=4096, devices=0, **more) -> PricedLayer:
    here = hardware.cluster(cluster)
    return PricedLayer(shape, here, tokens, devices or here.size, **more)


# Copies and bytes
# -------------------------------------------------------------------------------------------------


def test_a_row_of_v3_has_the_published_bytes():
    fp8 = layer(wire="fp8")
    assert (fp8.row_out, fp8.row_back, layer().row_out) == (7392, 14336, 14336)


@pytest.mark.parametrize(
    ("experts", "topk", "parts", "expected"),
    [(64, 8, 4, 3.66), (64, 8, 8, 5.43), (8, 2, 2, 1.571), (8, 2, 4, 1.857)],
)
def test_distinct_parts_of_uniform_routing(experts, topk, parts, expected):
    """Published for OLMoE and Mixtral; parts·(1 − C(E − E/parts, k)/C(E, k))."""
    one = layer(dataclasses.replace(SMALL, experts=experts, topk=topk), devices=8)
    found = reach(one, parts).sum()
    missed = math.comb(experts - experts // parts, topk) / math.comb(experts, topk)
    assert found == pytest.approx(parts * (1 - missed)) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(("groups", "kept", "parts"), [(4, 2, 4), (4, 2, 2), (2, 1, 8), (4, 3, 8)])
def test_reach_of_limited_groups_is_that_of_all_choices(groups, kept, parts):
    one = layer(SMALL, "h100:1x8", groups=groups, kept=kept)
    hits = []
    for chosen in itertools.combinations(range(groups), kept):
        experts = [e for e in range(8) if e * groups // 8 in chosen]
        for pair in itertools.combinations(experts, 2):
            hits.append([any(e * parts // 8 == p for e in pair) for p in range(parts)])
    np.testing.assert_allclose(reach(one, parts), np.mean(hits, 0))


def test_a_token_of_v3_reaches_at_most_four_nodes():
    free, limited = (layer(cluster="h100:8x8", **more) for more in ({"groups": 1, "kept": 1}, {}))
    assert limited.limit == (8, 4)
    assert reach(free, 8).sum() == pytest.approx(5.3, abs=0.05)
    assert 3.5 < reach(limited, 8).sum() < 4
    np.testing.assert_allclose(reach(limited, 8), reach(limited, 8)[0])


def drawn(seed: int, tokens: int, experts: int = 8, topk: int = 2) -> np.ndarray:
    draw = np.random.default_rng(seed).random((tokens, experts))
    return np.argsort(draw, axis=1)[:, :topk]


def test_counted_copies_are_those_of_a_walk_over_tokens():
    """Two nodes of four devices, one expert in each, 6 tokens a device."""
    one, ids, source = layer(SMALL, "h100:2x4", 6), drawn(0, 48), np.arange(48) // 6
    ids[5, 1] = -1
    routing = counted(one, ids, source)
    first, second = np.zeros((8, 8)), np.zeros((8, 8))
    for chosen, at in zip(ids, source, strict=True):
        devices = {int(e) for e in chosen if e >= 0}
        for node in {d // 4 for d in devices}:
            landed = node * 4 + at % 4
            first[at, landed] += 1
            for d in devices:
                if d // 4 == node:
                    second[landed, d] += 1
    between, inside = exchanges(one, routing, "two_level")
    outside = [[first[i, j] if i // 4 != j // 4 else 0 for j in range(8)] for i in range(8)]
    assert between.out * 48 == np.sum(outside) and between.node == inside.out == 0
    assert between.outside == max(np.sum(outside, 0).max(), np.sum(outside, 1).max())
    moved = second - np.diag(np.diag(second))
    assert inside.node * 48 == moved.sum() and inside.own * 48 == np.trace(second)
    assert inside.inside == max(moved.sum(0).max(), moved.sum(1).max())
    assert inside.held == (second.sum(0) + second.sum(1)).max()
    (flat,) = exchanges(one, routing, "flat")
    assert (flat.own + flat.node + flat.out) * 48 == (ids >= 0).sum()
    by_hand = sum(
        e // 4 != s // 4 for row, s in zip(ids, source, strict=True) for e in row if e >= 0
    )
    assert flat.out * 48 == by_hand


def test_expected_copies_are_the_mean_of_counted_ones():
    one = layer(SMALL, "h100:2x4", 4000)
    routing = counted(one, drawn(1, 32_000), np.arange(32_000) // 4000)
    for plan in moe_traffic.PLANS:
        pairs = zip(exchanges(one, uniform(one), plan), exchanges(one, routing, plan), strict=True)
        for expected, found in pairs:
            for level in ("own", "node", "out", "held"):
                wanted = getattr(expected, level)
                assert getattr(found, level) == pytest.approx(wanted, rel=0.03), (plan, level)
            assert found.held <= found.most and expected.held <= expected.most


def test_a_short_trace_is_scaled_and_loads_alone_give_the_flat_plan():
    one = layer(SMALL, "h100:2x4", 60)
    ids, source = drawn(2, 48), np.arange(48) // 6
    short, repeated = (
        counted(one, ids, source),
        counted(one, np.tile(ids, (10, 1)), np.tile(source, 10)),
    )
    np.testing.assert_allclose(short.rows_MxM, repeated.rows_MxM)
    skewed = loaded(one, np.bincount(ids.reshape(-1), minlength=8))
    np.testing.assert_allclose(skewed.rows_MxM.sum(0), short.rows_MxM.sum(0))
    with pytest.raises(UserError, match="two_level needs the choices of tokens"):
        exchanges(one, skewed, "two_level")


def test_bytes_steps_and_buffers_of_the_plans():
    one = layer(tokens=128, wire="fp8")
    flat, two, gather = (moe.price(one, uniform(one), plan) for plan in moe_traffic.PLANS)
    assert (flat.own, flat.node, flat.out) == pytest.approx((8 / 32, 8 * 7 / 32, 8 * 24 / 32))
    assert flat.bytes_out == pytest.approx(7.75 * 7392)
    assert flat.bytes_back == pytest.approx(7.75 * 14336) == flat.bytes_backward / 2
    assert two.out == pytest.approx(3 / 4 * reach(one, 4).sum())
    assert two.bytes_between == pytest.approx(two.out * (7392 + 64 + 14336))
    assert two.node == pytest.approx(28 / 32 * reach(one, 32).sum())
    assert (gather.node, gather.out) == (28, 3)
    assert (flat.steps, two.steps, gather.steps) == (3, 6, 2)
    assert flat.fullest == two.fullest == gather.fullest == 1
    assert flat.most == 128 * (8 + 32 * 8) * (7392 + 14336)
    assert two.out < 2.3 < 6 == flat.out


def test_one_node_has_one_level_and_one_device_sends_nothing():
    one = layer(SMALL, "h100:1x8", 64)
    assert len(exchanges(one, uniform(one), "two_level")) == 1
    alone = moe.price(layer(SMALL, "h100:1x1", 64), uniform(layer(SMALL, "h100:1x1", 64)), "flat")
    assert alone.bytes_out == 0 and alone.forward == pytest.approx(alone.matmul)
    torus = layer(SMALL, "v5p:2x2x2", 64)
    assert torus.nodes == 1 and moe.price(torus, uniform(torus), "gather").forward > 0


# Published figures
# -------------------------------------------------------------------------------------------------


def test_low_latency_dispatch_has_the_published_bandwidths():
    """DeepEP on H800: microseconds of 128 tokens, eight copies each, and its bandwidth column."""
    table = {
        8: (77, 98),
        16: (118, 64),
        32: (155, 49),
        64: (173, 44),
        128: (192, 39),
        256: (194, 39),
    }
    for ranks, (micros, published) in table.items():
        one = layer(cluster=f"h100:{ranks // 8}x8", tokens=128, wire="fp8")
        (flat,) = exchanges(one, uniform(one), "flat")
        nbytes = one.tokens * (flat.own + flat.node + flat.out) * one.row_out
        assert nbytes / micros / 1e3 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(("nodes", "logical", "physical"), [(4, 58, 43.5), (8, 51, 44.6)])
def test_normal_dispatch_has_the_published_bandwidth_of_the_nic(nodes, logical, physical):
    """Published figures count copies to the own node. Priced in 4096 tokens within a tenth."""
    one = layer(cluster=f"h100:{nodes}x8", wire="fp8", groups=nodes, kept=4)
    between, _ = exchanges(one, uniform(one), "two_level")
    copies = reach(one, nodes).sum()
    assert logical * between.out / copies == pytest.approx(physical, abs=0.05)
    published = 4096 * copies * 7392 / (logical * 1e9)
    moved = between.outside * one.row_out
    args = (0.0, moved, between.ranks, between.local, "h100", moe.links("h100"))
    assert network.exchange_time(*args) == pytest.approx(published, rel=0.1)
    nic = moe_matmul.document()["nic_share"] * 50
    assert nic == pytest.approx(physical, rel=0.02)


def test_dispatch_in_a_node_has_the_published_line():
    """38 µs + 536 GB/s and 57 µs + 292 GB/s, mean error 10 %, on bytes that leave a device; 536
    counts two bytes an element and passes the link's 450: fp8 with its scales is 276."""
    found = moe_matmul.document()["deepep_8_h100"]
    out, back = found["dispatch"], found["combine"]
    assert (out["alpha_us"], back["alpha_us"]) == pytest.approx((38, 57), rel=0.1)
    assert out["gbytes_per_s"] * 2 / (1 + 4 / 128) == pytest.approx(536, rel=0.1)
    assert back["gbytes_per_s"] == pytest.approx(292, rel=0.1)
    assert out["gbytes_per_s"] < 450
    assert max(out["mape_pct"], back["mape_pct"]) < 11
    if (DATA / "moe/deepep_normal_h100_1node.csv.gz").exists():
        assert fit_moe.dispatch(fit_moe.deepep(DATA)) == found


def test_equal_parts_take_the_time_of_an_all_to_all():
    for n, local, chip in ((32, 8, "h100"), (8, 8, "b200"), (16, 16, "v5p"), (1, 1, "h100")):
        parts = ((local - 1) / n * 1e8, (n - local) / n * 1e8)
        expected = network.collective_time("all_to_all", 1e8, n, local, chip)
        assert network.exchange_time(*parts, n, local, chip) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"all_to_all: outside = -1"):
        network.exchange_time(1.0, -1.0, 8, 8, "h100")


# Matmuls
# -------------------------------------------------------------------------------------------------


def test_the_table_gives_back_its_rows_and_lines_between_them():
    *shape, first, micros = moe_matmul.document()["curves"]["h100"][40]
    rows = first * 2.0 ** np.arange(len(micros))
    np.testing.assert_allclose(moe_matmul.seconds("h100", rows, *shape), 1e-6 * np.array(micros))
    middle = moe_matmul.seconds("h100", rows[3] * 1.4, *shape) * 1e6
    assert min(micros[3:5]) * 0.9 < middle < max(micros[3:5]) * 1.1
    assert moe_matmul.seconds("h100", 0, *shape) == 0
    with pytest.raises(ValueError, match="experts 0: rows ≥ 0 and sizes ≥ 1"):
        moe_matmul.seconds("h100", 1, 1, 1, 0)


def test_errors_widen_away_from_the_data():
    errors = moe_matmul.document()["errors"]
    known = moe_matmul.error("h100", 4096, 7168, 2048, 256)
    assert known[0] == "a measured shape" and known[1] == errors[known[0]]["median_pct"] / 100
    between = moe_matmul.error("h100", 4096, 7168, 1500, 256)
    few = moe_matmul.error("h100", 4096, 7168, 2048, 8)
    chip = moe_matmul.error("v5p", 4096, 7168, 2048, 256)
    far = moe_matmul.error("h100", 1e7, 7168, 2048, 256)
    assert "fewer experts than measured" in few[0] and "past the measured rows" in far[0]
    assert "a chip that was not measured" in chip[0] and moe_matmul.stand_in("b300") == "b200"
    assert known[1] < between[1] < few[1] and known[2] < chip[2] and known[1] < far[1]
    assert {"licence", "source", "made_by", "date", "changes"} < moe_matmul.document().keys()


def test_kernels_have_the_published_rates():
    """TFLOP/s at 16k tokens, width 4096 and hidden 3584: 740 on H100, 187, 780, 1720."""
    for chip, teraflops in (("h100", 740), ("a100", 187), ("h200", 780), ("b200", 1720)):
        seconds = moe_matmul.seconds(chip, 32768, 4096, 3584, 8)
        assert 6 * 32768 * 4096 * 3584 / seconds / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_rows_left_out_of_the_table_are_predicted(kernels):
    """Median 1.4-2.3 %, 90 % below 13 % by the notes' log-log lines over all rows."""
    times, _ = kernels
    for chip in ("a100", "b200", "h100", "h200", "l40s"):
        errors = []
        for key, points in times.items():
            if key[0] == chip:
                kept = fit_moe.thin(points)
                own = fit_moe.to_curve(chip, key[1:], kept)
                rest = {r: s for r, s in points.items() if r not in kept}
                errors.append(fit_moe.logs(chip, key[1:], rest, [own]))
        found = fit_moe.scores(errors)
        assert found["median_pct"] < 2.3 and found["p90_pct"] < 13


def test_the_tool_reproduces_the_shipped_table(kernels):
    made = {}
    for (chip, *shape), points in kernels[0].items():
        kept = fit_moe.thin(points)
        micros = [fit_moe.rounded(s) for s in kept.values()]
        made.setdefault(chip, []).append([*shape, min(kept), micros])
    assert made == moe_matmul.document()["curves"]


def test_shapes_left_out_of_the_table_are_predicted(kernels):
    """Every fifth shape of H100 without its own rows, and kernels with fewer experts than any."""
    times, few = kernels
    own = {
        k: fit_moe.to_curve(k[0], k[1:], fit_moe.thin(p))
        for k, p in times.items()
        if k[0] == "h100"
    }
    errors = []
    for key in list(own)[::5]:
        errors.append(fit_moe.logs("h100", key[1:], times[key], [own[k] for k in own if k != key]))
    found, stated = fit_moe.scores(errors), moe_matmul.document()["errors"]
    assert found["median_pct"] < 1.3 * stated["a shape between measured ones"]["median_pct"] < 13
    assert found["p90_pct"] < 1.3 * stated["a shape between measured ones"]["p90_pct"] < 50
    cells = {key: points for key, points in few.items() if key[0] == "h100"}
    errors = [fit_moe.logs("h100", key[1:], p, list(own.values())) for key, p in cells.items()]
    assert fit_moe.scores(errors)["median_pct"] < stated["fewer experts than measured"]["p90_pct"]


# The command
# -------------------------------------------------------------------------------------------------


def command(capsys, *args: str) -> tuple[int, str, str]:
    values = flags.FlagValues()
    moe.declare(values)
    rest = values(["moe", *args])[1:]
    try:
        with one_line(ValueError):
            moe.run(values, rest)
    except SystemExit as stop:
        return stop.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_the_command_prices_the_plans(capsys):
    code, out, _ = command(capsys, "--model=deepseek-v3", "--cluster=h100:4x8", "--tokens=4096")
    assert code == 0 and "uniform routing, 4 of 8 groups" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert rows["flat"][1:4] == ["0.25", "1.75", "6.00"] and rows["flat"][10] == "3"
    one = layer()
    found = moe.price(one, uniform(one), "two_level")
    assert rows["two_level"][-2:] == [f"{1e3 * s:.3f}" for s in (found.forward, found.backward)]
    assert float(rows["two_level"][-2]) < float(rows["flat"][-2]) < 100
    assert "fewer experts than measured, held-out |error| 17%" in out


@pytest.fixture
def skewed(tmp_path):
    """Folder of a trace of OLMoE's layout whose first experts are chosen more often."""
    draw = np.random.default_rng(0)
    chosen = np.argsort(draw.random((600, 16, 64)) * np.linspace(0.4, 1, 64), axis=-1)[..., :8]
    Writer(tmp_path / "run", 64).append(chosen)
    return tmp_path / "run", np.bincount(chosen.reshape(-1), minlength=64)


def test_the_command_counts_a_trace(capsys, skewed, tmp_path):
    folder, loads_E = skewed
    args = ("--model=olmoe-1b-7b", "--cluster=h100:2x4", "--tokens=512")
    code, out, _ = command(capsys, *args, f"--trace={folder}")
    assert code == 0 and "mean of 16 routings of a trace" in out
    part_M = loads_E.reshape(8, 8).sum(1)
    balance = float(out.split("over the mean ")[1].split(",")[0])
    assert balance == pytest.approx(part_M.max() / part_M.mean(), rel=0.02) and balance > 1.4
    even, these = (float(w) for w in out.split("training step ")[1].split() if w[0].isdigit())
    assert these > even
    rows = ["layer_id,expert_id,count"]
    rows += [f"{i},{e},{n}" for i in range(16) for e, n in enumerate(loads_E)]
    (tmp_path / "counts.csv").write_text("\n".join(rows))
    code, out, _ = command(capsys, *args, f"--trace={tmp_path / 'counts.csv'}")
    assert code == 0 and "two_level is not priced" in out and f"mean {balance:.1f}" in out[: 10**4]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model=llama3-8b",), "llama3-8b has no experts"),
        (("--model=deepseek-v4",), "did you mean 'deepseek-v"),
        (("--model=mixtral-8x7b",), r"experts 8 are not divisible by ep = 32: set ep to 8"),
        (("--ep=64",), r"ep=64 on 32 chips: tokens ≥ 1 and 1 ≤ ep ≤ 32 must hold"),
        (("--cluster=h100:4x6", "--ep=8"), r"ep=8 is not divisible by the 6 chips of a node: .* 6"),
        (("--overlap=1.5",), r"overlap=1.5 in \[0, 1\]"),
        (("--trace=/none.npz",), "cannot be read as a trace"),
        (("more",), "unexpected argument\\(s\\) more"),
    ],
)
def test_mistakes_end_in_one_line(capsys, args, message):
    code, out, error = command(capsys, *args)
    assert code == 1 and not out and error.count("\n") == 1
    assert re.search(message, error)


def test_a_trace_of_another_model_is_refused(capsys, skewed):
    code, _, error = command(capsys, f"--trace={skewed[0]}")
    assert code == 1 and "layers 16 is not 58" in error


def test_overlap_hides_the_shorter_part():
    one = layer(tokens=256)
    alone, half, all_of_it = (moe.price(one, uniform(one), "flat", o) for o in (0, 0.5, 1))
    wire = alone.forward - alone.matmul
    assert alone.backward > 2 * alone.matmul
    assert all_of_it.forward == pytest.approx(max(wire, alone.matmul))
    assert half.forward == pytest.approx((alone.forward + all_of_it.forward) / 2)


def test_the_slowest_chip_of_a_mixed_cluster_decides():
    shape = shapes.named("olmoe-1b-7b")
    both = layer(shape, "h100:1x4+a100:1x4", 512)
    rows = np.zeros(8)
    rows[0] = rows[4] = 4096.0
    sizes = (4096, 2048, 1024, 8)
    assert moe.matmul_seconds(both, rows) == moe_matmul.seconds("a100", *sizes)
    rows[4] = 1.0
    assert moe.matmul_seconds(both, rows) == moe_matmul.seconds("h100", *sizes)


# With fdp.price.step_time
# -------------------------------------------------------------------------------------------------


def test_step_time_takes_the_seconds_of_given_loads():
    job = Job(V3, Plan(tp=2, dp=32, ep=32, etp=1, zero=1), hardware.chip("h100"), 64, 4096)
    k = {n: s for n, (_, _, s) in step_time.BOUNDS.items()} | {"linear": 0.75, "scale": 1.0}
    plain = hybrid.numeric(columns([job]))
    even, uneven = np.ones((3, 256)), np.ones((3, 256))
    uneven[:, :8] = 4.0

    def price(**more):
        return {n: float(np.squeeze(v)) for n, v in step_time.step_time(plain | more, k).items()}

    loads = [moe.columns_of_loads([job], [found]) for found in (even, uneven)]
    none, level, heavy = price(), *(price(**found) for found in loads)
    assert level["compute"] == pytest.approx(none["compute"], rel=0.2)
    assert level["total"] < heavy["total"] and level["ep"] < heavy["ep"]
    assert level["tp"] == pytest.approx(none["tp"], rel=0.1) and none["ep"] > 0
    share = uneven[0, :8].sum() / uneven[0].sum()
    rows = 4096 / 2 * 8 * 32 * share
    expected = moe_matmul.seconds("h100", rows, 7168, 2048, 8)
    assert loads[1]["routed_seconds"][0] == pytest.approx(float(expected))
    again = moe.columns_of_loads([job], [7 * uneven])
    assert again["exchange_seconds"] == pytest.approx(loads[1]["exchange_seconds"])
    whole = dataclasses.replace(job, plan=dataclasses.replace(job.plan, recompute="full"))
    x = hybrid.numeric(columns([whole])) | loads[1]
    ep = float(np.squeeze(step_time.step_time(x, k)["ep"]))
    assert ep == pytest.approx(1.5 * heavy["ep"], rel=0.05)
    with pytest.raises(UserError, match="precision=fp8: expert loads are priced in bf16"):
        moe.columns_of_loads([dataclasses.replace(job, precision="fp8")], [even])


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("olmoe-1b-7b", 6.92, 1.28),
        ("deepseek-moe-16b", 16.38, 2.83),
        ("deepseek-v2", 235.74, 21.4),
        ("llada-moe-7b-a1b", 7.36, 1.72),
    ],
)
def test_models_with_experts_have_their_published_parameters(name, total, active):
    model = shapes.named(name)
    assert model.parameters() / 1e9 == pytest.approx(total, rel=2e-3)
    assert model.active_parameters() / 1e9 == pytest.approx(active, rel=5e-3)


def test_the_model_of_a_run_is_named_by_its_workdir(tmp_path):
    c = config.base()
    c.model.moe.update(experts=16, topk=3, ffn=48, first_dense=1)
    text = json.dumps({"config": config.flatten(c)})
    (tmp_path / "config.json").write_text(text)
    shape = shapes.named(str(tmp_path))
    assert (shape.experts, shape.topk, shape.moe_ffn, shape.first_dense) == (16, 3, 48, 1)
    (tmp_path / "config.json").write_text(text[:99])
    with pytest.raises(ValueError, match="is not the workdir of a run"):
        shapes.named(str(tmp_path))
