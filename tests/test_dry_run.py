"""`--dry_run`: what it prints without a compiler at hand, and, in the ahead-of-time tier, what real
compilers find.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from fdp import dry_run
from fdp.config import UserError
from fdp.count import aot
from fdp.count.step import microbatch
from fdp.experiment import standard
from fdp.objectives.autoregressive import Autoregressive
from fdp.price import workload
from fdp.price.hardware import chip

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("topic*.py"))


def config(name: str, variant: str):
    import importlib

    return importlib.import_module(f"configs.{name}").get_config(variant)


@pytest.mark.fast
def test_without_a_compiler_the_program_is_counted_and_the_note_says_so(
    monkeypatch, capsys
) -> None:
    monkeypatch.setattr(aot, "available", lambda platform: False)
    dry_run.dry_run(config("topic1", "pod"))
    out = capsys.readouterr().out
    assert (
        "pip install -e '.[aot]'" in out and "lowered abstractly" in out and "not compiled" in out
    )
    for word in ("parameters", "optimizer", "activations", "bytes per axis", "FLOPs", "fits"):
        assert word in out


@pytest.mark.fast
def test_a_program_larger_than_the_chip_does_not_fit_by_the_analytic_count(
    monkeypatch, capsys
) -> None:
    monkeypatch.setattr(aot, "available", lambda platform: False)
    c = config("topic1", "pod")
    c.model.width, c.model.ffn, c.train.zero = 16384, 65536, 0
    dry_run.dry_run(c)
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert re.search(r"largest arrays of the program.*\n  \d+\.\d+ \w+\[", out), out


@pytest.mark.fast
def test_unknown_topology_names_the_closest() -> None:
    c = config("topic1", "pod")
    c.hardware.topology = "v5q:4x4x8"
    with pytest.raises(UserError, match=r"unknown platform 'v5q'.*did you mean 'v5"):
        dry_run.dry_run(c)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100:banana", "topology 'h100:banana' is not of the form 'h100:2x8'"),
        ("h100:0", "topology 'h100:0' is not of the form"),
        ("h100:", "topology 'h100:' is not of the form"),
        ("h100:1x2x3", "is not of the form"),
        ("h100:1", r"pp·dp·ep·cp·tp = 1·2·1·1·4 = 8 devices, and h100:1 has 1: change a mesh\.\* "),
        ("v4:2x2x2", r"= 8 devices, and v4:2x2x2 has 16: change"),
    ],
)
def test_degrees_are_checked_against_the_topology_without_a_compiler(
    topology, message, monkeypatch
) -> None:
    monkeypatch.setattr(aot, "available", lambda platform: False)
    c = config("topic1", "tiny")
    c.hardware.topology = topology
    with pytest.raises(UserError, match=rf"^hardware\.topology: .*{message}"):
        dry_run.dry_run(c)
    assert dry_run.target_of("v4:2x2x1", c.mesh).mesh.size == 8


@pytest.mark.fast
def test_more_token_ids_than_embedding_rows_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(aot, "available", lambda platform: False)
    c = config("topic1", "pod")
    c.data.vocab = 2 * c.model.vocab
    with pytest.raises(UserError, match=r"set model\.vocab=65536"):
        dry_run.dry_run(c)


@pytest.mark.fast
def test_chips_without_a_cluster_stand_in_nodes_of_eight_gpus() -> None:
    for name, chips, groups in (
        ("h100", 1, [(1, 1)]),
        ("h100", 12, [(1, 8), (1, 4)]),
        ("h100", 64, [(8, 8)]),
        ("v5p", 128, [(32, 4)]),
    ):
        found = dry_run._nodes(chip(name), chips)
        assert [(g.count, g.chips) for g in found.groups] == groups and found.size == chips


def time_line(variant: str, monkeypatch, capsys, **overrides) -> dict[str, float]:
    """Numbers of the first arm's time line, its text under "text"."""
    monkeypatch.setattr(aot, "available", lambda platform: False)
    c = config("topic1", variant)
    c.update_from_flattened_dict(overrides)
    dry_run.dry_run(c)
    text = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("time "))
    m = re.search(
        r"predicted (\S+) ms a step \(90 % interval (\S+)-(\S+)\), MFU (\S+) %; "
        r"bottleneck (\w.*?);",
        text,
    )
    assert m, text
    return dict(zip(("time", "low", "high", "mfu"), map(float, m.groups()[:4]), strict=True)) | {
        "text": text
    }


@pytest.mark.fast
def test_the_time_line_prices_an_h100_with_interval_energy_and_evidence(
    monkeypatch, capsys
) -> None:
    got = time_line("h100", monkeypatch, capsys)
    assert 0 < got["low"] < got["time"] < got["high"] and 1 < got["mfu"] < 100
    assert "simulated: fitted on" in got["text"] and "held-out error median" in got["text"]
    assert " was in the fit" not in got["text"] and "bfloat16 rates" not in got["text"]
    joules, rate = map(
        float, re.search(r"energy (\S+) J a step, (\S+) tokens/J", got["text"]).groups()
    )
    assert joules * rate == pytest.approx(288 * 2048, rel=0.01)
    watts = 1e3 * joules / got["time"]
    assert (
        70 + 150 < watts < 700 + 250
    )  # one chip between idle and its cap, and its share of the host
    double = time_line("h100", monkeypatch, capsys, **{"train.batch": 576, "train.microbatches": 8})
    assert 1.8 < double["time"] / got["time"] < 2.05  # twice the microbatches, the optimizer once
    assert (
        "priced at bfloat16 rates"
        in time_line("h100", monkeypatch, capsys, **{"model.dtype": "float32"})["text"]
    )


@pytest.mark.fast
def test_the_time_line_says_what_is_not_known_of_a_tpu(monkeypatch, capsys) -> None:
    got = time_line("pod", monkeypatch, capsys)
    assert "no TPU was in the fit" in got["text"] and "energy: not known for v5p" in got["text"]


@pytest.mark.fast
def test_an_experiment_becomes_the_job_that_is_priced() -> None:
    c = config("topic1", "pod")
    c.mesh.ep, c.train.microbatches, c.data.source = 2, 2, "blank"
    e = standard(c)
    job = workload.of_experiment(e, chip("h100"))
    p = job.plan
    assert (p.chips, p.tp, p.dp, p.cp, p.ep, p.shards) == (256, 4, 32, 2, 1, 16)
    assert (p.microbatch, job.microbatches, job.batch, job.seq) == (1, 2, 64, 4096)
    assert (p.zero, p.recompute, p.sequence_parallel) == (3, "full", True)
    assert job.shape.parameters() == microbatch(e, 0).parameters
    assert not job.causal
    causal = dataclasses.replace(e, objective=Autoregressive(e.objective.n_ids, 0))
    assert workload.of_experiment(causal, chip("h100")).causal
    c.mesh.cp, c.model.remat, c.model.sequence_parallel = 1, "dots", False
    c.topic, c.objective.name = "", "block_diffusion"
    with c.unlocked():
        del c.sampling  # the topic's, whose study judges other objectives
    job = workload.of_experiment(standard(c), chip("h100"))
    assert job.seq == 8192 and job.plan.recompute == "selective"
    uneven = dataclasses.replace(e, fit=dataclasses.replace(e.fit, batch=63))
    with pytest.raises(ValueError, match="batch 63 is not divisible"):
        workload.of_experiment(uneven, chip("h100"))


# The compiler of TPUs takes five minutes for a pod with experts: 64 nodes of eight H100 instead.
INSTEAD: dict[tuple[str, str], dict[str, Any]] = {
    ("topic2", "pod"): {
        "hardware.topology": "h100:64x8",
        "mesh.dp": 8,
        "mesh.tp": 1,
        "train.batch": 512,
    }
}


@pytest.mark.aot
@pytest.mark.parametrize("variant", ["pod", "h100"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_compiles_for_its_hardware_and_fits(name: str, variant: str, capsys) -> None:
    c = config(name, variant)
    c.update_from_flattened_dict(INSTEAD.get((name, variant), {}))
    dry_run.dry_run(c)
    out = capsys.readouterr().out
    assert "compiled ahead of time" in out and "fits" in out and "DOES NOT FIT" not in out
    # The compiler's count agrees with the formula where nothing is cast on the way: as many MiB
    # scattered, or twice as many all-reduced, up to its merging of scalars.
    rows = re.findall(r"^(\S+) over ([tc]p)\s+([\d,.]+)\s+([\d,.]+)$", out, re.M)
    moved = {(op, axis): [float(n.replace(",", "")) for n in both] for op, axis, *both in rows}
    for (op, axis), (formula, counted) in moved.items():
        if op == "reduce-scatter" and formula != counted:
            more = moved["all-reduce", axis][1] - moved["all-reduce", axis][0]
            assert counted + more / 2 == pytest.approx(formula, rel=1e-4), (
                name,
                variant,
                axis,
                moved,
            )


@pytest.mark.aot
def test_the_pod_with_experts_compiles_for_fewer_tpus(capsys) -> None:
    """The same program in small, with the compiler's least effort, which changes no collective."""
    c = config("topic2", "pod")
    c.hardware.topology = "v5p:2x2x2"
    c.mesh.update(dp=1, ep=4, tp=2)
    c.model.update(width=256, heads=2, kv_heads=2, vocab=1024)
    c.model.moe.update(experts=8, topk=2, ffn=128, node=2, ranks=4)
    c.data.update(seq_len=256, vocab=1024)
    c.train.batch = 4
    effort = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, effort)
    jax.config.update(effort, -1.0)
    try:
        dry_run.dry_run(c)
    finally:
        jax.config.update(effort, before)
    out = capsys.readouterr().out
    assert re.search(r"overlap   ragged-all-to-all: \d\d in the program", out), out
    assert "where routing is uniform" in out


@pytest.mark.aot
def test_a_program_that_overflows_hbm_says_so(capsys) -> None:
    c = config("topic1", "h100")
    c.hardware.topology, c.mesh.dp = "v5e:2x2", 4
    c.train.update(microbatches=1, batch=256)
    c.model.update(layers=4, remat="none")
    dry_run.dry_run(c)
    out = capsys.readouterr().out
    assert re.search(r"DOES NOT FIT: \d+\.\d+ GiB \(compiler\) of \d+\.\d+ GiB HBM", out), out
    assert "largest" in out
