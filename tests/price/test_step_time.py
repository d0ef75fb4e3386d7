"""The analytic step time: limits, monotonicity, gradients, and closed forms it must contain."""

import dataclasses

import jax
import numpy as np
import pytest

from fdp.price import hybrid, step_time
from fdp.price.hardware import chip
from fdp.price.shapes import named
from fdp.price.workload import Job, Plan, check, columns
from tests.price.planning_jobs import with_plan

pytestmark = pytest.mark.fast

BASE = Job(named("llama3-8b"), Plan(tp=2, pp=2, dp=8, cp=2, microbatch=1), chip("h100"), 256, 8192)
K = {name: start for name, (_, _, start) in step_time.BOUNDS.items()} | {
    "linear": 0.75,
    "scale": 1.0,
}


def price(*jobs: Job, k=K, **x_changes):
    x = {
        n: v for n, v in columns(jobs).items() if n not in ("stack", "cluster", "chip")
    } | x_changes
    with jax.enable_x64(True):
        return {
            n: np.broadcast_to(np.asarray(v), len(jobs))
            for n, v in step_time.step_time(x, k).items()
        }


def test_one_chip_has_no_communication_and_no_bubble():
    alone = price(with_plan(BASE, tp=1, pp=1, dp=1, cp=1))
    for name in ("tp", "ep", "cp", "dp", "pp"):
        assert alone[name] == 0


def test_the_parts_sum_to_the_whole():
    t = price(BASE)
    parts = sum(t[n] for n in ("compute", "tp", "ep", "cp", "pp", "dp", "optimizer", "step"))
    assert t["total"] == pytest.approx(parts)
    assert t["stalled"] > t["total"]


@pytest.mark.parametrize("name", ["peak", "hbm", "up", "out_bw"])
def test_faster_hardware_is_never_slower(name):
    jobs = [BASE, with_plan(BASE, tp=16, pp=1, dp=4, cp=1), with_plan(BASE, zero=3, pp=1, dp=16)]
    x = columns(jobs)
    assert (
        price(*jobs, **{name: 2 * x[name]})["total"] <= price(*jobs)["total"] * (1 + 1e-12)
    ).all()


def test_the_bubble_vanishes_with_many_microbatches():
    def share(batch: int) -> float:
        job = dataclasses.replace(with_plan(BASE, tp=1, cp=1, dp=1, pp=8), batch=batch)
        t = price(job)
        return float(t["pp"][0] / t["total"][0])

    assert share(8) > 0.3
    assert share(4096) < 0.05


def test_interleaving_divides_the_bubble_by_the_chunks():
    k = K | {"exposed_pp": 0.0, "stage": 0.0}
    jobs = [with_plan(BASE, tp=1, cp=1, dp=8, pp=4, virtual=v) for v in (1, 2, 4)]
    bubble = price(*jobs, k=k)["pp"]
    np.testing.assert_allclose(bubble[0] / bubble, [1, 2, 4])


def test_tensor_parallelism_across_nodes_pays_for_the_shared_nics():
    inside, across = (with_plan(BASE, tp=t, pp=1, cp=1, dp=64 // t) for t in (8, 16))
    t = price(inside, across)
    assert t["tp"][1] > 3 * t["tp"][0]


def test_attention_that_is_not_fused_computes_the_masked_half_too():
    """Fused and causal halves the scores' FLOPs; unfused costs the same with and without a mask."""
    old = dataclasses.replace(BASE, modern=False)
    both = [dataclasses.replace(job, causal=False) for job in (BASE, old)]
    t = price(BASE, both[0], old, both[1])["compute"]
    assert t[1] > t[0] and t[3] == pytest.approx(t[2])


def test_recomputation_costs_a_forward():
    none, full = price(BASE, with_plan(BASE, recompute="full"))["compute"]
    assert full / none == pytest.approx(4 / 3, rel=0.05)


def test_gradients_in_log_degrees_agree_with_central_differences():
    """At 200 random interior points, float64: differentiable between the corners."""
    names = ("tp", "pp", "dp", "cp", "microbatch")
    rng = np.random.default_rng(0)
    base = {
        n: float(v[0]) for n, v in columns([BASE]).items() if n not in ("stack", "cluster", "chip")
    }
    with jax.enable_x64(True):

        def log_time(z):
            degrees = {n: 2.0 ** z[i] for i, n in enumerate(names)}
            x = base | degrees | {"shards": degrees["dp"] * degrees["cp"]}
            x["microbatches"] = x["batch"] / (x["dp"] * x["microbatch"])
            return jax.numpy.log(step_time.step_time(x, K)["total"])

        gradient, value = jax.jit(jax.grad(log_time)), jax.jit(log_time)
        wrong = 0
        for z in rng.uniform(0.13, 2.87, (200, len(names))):
            exact, h = np.asarray(gradient(z)), 1e-5
            steps = h * np.eye(len(names))
            around = np.array([(value(z + s) - value(z - s)) / (2 * h) for s in steps])
            wrong += np.abs(exact - around).max() > 1e-5 * max(np.abs(exact).max(), 1e-3)
        assert wrong <= 2, "corners of max() may fall inside a difference, rarely"


def test_memory_grows_with_the_microbatch_and_shrinks_with_sharding():
    from fdp.price import footprint

    k = {n: start for n, (_, _, start) in footprint.BOUNDS.items()}

    def gib(**changes):
        x = hybrid.numeric(columns([with_plan(BASE, **changes)]))
        return float(footprint.memory(x, k)[0]) / 2**30

    assert gib(microbatch=2) > gib()
    assert gib(zero=0) > gib(zero=1) > gib(zero=3)
    assert gib(recompute="full") < gib(recompute="none")
    assert gib(tp=4, cp=1) < gib(tp=2, cp=1)


def test_state_bytes_are_16_and_18_a_parameter():
    from fdp.price import footprint

    for precision, each in (("fp16", 16), ("bf16", 18)):
        job = dataclasses.replace(
            with_plan(BASE, tp=1, pp=1, dp=1, cp=1, zero=0), precision=precision
        )
        x = hybrid.numeric(columns([job]))
        state = float(footprint.state_bytes(x, 4.0)[0])
        norms = (2 * 32 + 1) * 4096  # replicated scales are not worth a formula
        assert state == pytest.approx(each * (job.shape.parameters() - norms), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 3}, r"heads 32 is not divisible by tp = 3: set tp to 2"),
        ({"dp": 3}, r"batch 256 is not divisible by dp·microbatch = 3"),
        ({"cp": 3}, r"sequence length 8192 is not divisible by cp = 3"),
        ({"pp": 64}, r"pp·virtual = 64·1 exceeds layers = 32"),
        ({"ep": 2}, r"ep=2, but llama3-8b has no experts"),
        ({"tp": 0}, r"tp=0 must be at least 1"),
        ({"zero": 5}, r"zero=5 is none of"),
    ],
)
def test_a_plan_that_cannot_run_is_refused_with_its_equation(changes, message):
    with pytest.raises(ValueError, match=message):
        check(with_plan(BASE, **changes))
