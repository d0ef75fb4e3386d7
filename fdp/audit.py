"""Check that the program of a config is correct.

    python -m fdp.audit --config=configs/topic3.py[:variant] [--config.key=…]

Every arm is shrunk to at most eight virtual devices in float32: degrees and sizes are cut, the
structure is kept. Four checks follow. Loss and gradients equal those of one device. Bytes on the
wire equal the closed formula. Every axis of degree > 1 has the collectives that it needs and no
others. A position reads exactly what the mask allows. The exit status is 1 if a check fails.

Legend: B sequences, L positions."""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("NPROC", "64")  # before jax is imported, as in fdp.train

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from tabulate import tabulate

from fdp import command, config_file
from fdp import config as fdp_config
from fdp.config_images import IMAGE_MODELS, pattern_rows
from fdp.config_pipeline import chunks_of
from fdp.count import bytes as closed
from fdp.count.compare import Comparison, Key, outcome
from fdp.count.requirements import is_stock, missing, required_of, unexpected
from fdp.count.step import unstated
from fdp.data.batches import Batch
from fdp.experiment import Experiment
from fdp.grads import plain
from fdp.mesh import AXES, degrees_equation, make_mesh, use_virtual_devices
from fdp.models import module
from fdp.models.transformer import Transformer
from fdp.parallel.masks import allowed
from fdp.run import study_of, use_compilation_cache
from fdp.step import TrainStep
from fdp.train import CONFIG, quiet

DEVICES = 8
TOLERANCE = 1e-4  # of float32 sums in another order, relative, by norm


@dataclass(frozen=True)
class Finding:
    """One check of one arm on one mesh."""

    arm: str
    mesh: str
    check: str
    holds: bool | None  # None: not stated
    found: str


def small_degrees(degrees: Mapping[str, int]) -> list[dict[str, int]]:
    """Degrees of the small meshes, at most DEVICES devices each. Every axis in use keeps degree 2.
    Where four axes are in use, two meshes cover them."""
    used = [a for a in AXES if degrees[a] > 1]
    cut = {a: min(degrees[a], 2) for a in AXES}
    if 2 ** len(used) <= DEVICES:
        return [cut]
    return (
        [cut | {"dp": 1}, cut | {"ep": 1}]
        if "ep" in used and "dp" in used
        else [cut | {used[0]: 1}, cut | {used[-1]: 1}]
    )


def small(c: ml_collections.ConfigDict, degrees: Mapping[str, int]) -> ml_collections.ConfigDict:
    """The config on `degrees` with smaller sizes; ratios of heads, switches and plans are kept."""
    c = c.copy_and_resolve_references()
    m, x, tp, cp = c.model, c.context, degrees["tp"], degrees["cp"]
    c.mesh.update(degrees)
    c.hardware.topology = ""
    group = m.heads // m.kv_heads
    x.head_split = min(x.head_split, cp)
    kv_heads = tp * (cp if x.plan in ("ulysses", "usp") else 1)
    if c.pipeline.schedule.endswith(".csv"):  # of the whole mesh
        c.pipeline.schedule = "zbv" if m.kind == "uvit" else "zb_h1"
    each = degrees["pp"] * chunks_of(c) * (m.moe.every if m.moe.experts else 1)
    m.update(
        layers=max(2, each), kv_heads=kv_heads, heads=kv_heads * min(group, 2), head_dim=8, width=32
    )
    if m.kind == "uvit":
        m.layers = 2 * degrees["pp"] + 1
    m.update(ffn=32 * tp, vocab=72, dtype="float32", window=min(m.window, 8), conv=min(m.conv, 4))
    x.stripe = min(x.stripe, 4)
    c.data.update(source="blank", vocab=64, tokenizer="bpe", seq_len=32 * cp)
    c.objective.block = math.gcd(c.objective.block, 8)
    most = 2 * degrees["pp"]
    c.train.microbatches = most if degrees["pp"] > 1 else min(c.train.microbatches, most)
    c.train.batch = 2 * degrees["dp"] * degrees["ep"] * c.train.microbatches
    c.train.batch *= x.head_split if x.plan == "batch" else 1
    c.train.batch *= pattern_rows(m) if m.kind in IMAGE_MODELS else 1
    settings = fdp_config.topic_settings(c.topic)
    if settings is not None and hasattr(settings, "shrink"):
        settings.shrink(c)
    return c


def batch_of(e: Experiment) -> Batch:
    """A batch with values in every field: random tokens, random document boundaries, and examples
    of an in-memory split."""
    rng, n = np.random.default_rng(0), e.fit.batch
    batch = e.data.train.take([i % len(e.data.train) for i in range(n)])
    if "tokens" in batch and e.data.tokenizer is not None and e.data.name == "blank":
        shape = batch["tokens"].shape
        batch["tokens"] = rng.integers(0, e.data.tokenizer.n_data - 1, shape, np.int32)
        if "segments" in batch:
            batch["segments"] = (rng.random(shape) < 0.1).cumsum(1).astype(np.int32)
    return batch


def audit_arm(name: str, e: Experiment) -> list[Finding]:
    """All checks of one small experiment."""
    alone = replace(e, degrees=dict.fromkeys(AXES, 1), zero=0, grads=plain(1))
    one = TrainStep(alone, make_mesh(alone.degrees, jax.devices()[:1]))
    p, batch = TrainStep(e, make_mesh(e.degrees)), batch_of(e)
    rng = np.random.default_rng(1)

    def shaken(x: np.ndarray) -> np.ndarray:
        """`x` plus noise: gates and biases that start at 0 would hide errors in what they
        multiply."""
        return x + 0.02 * rng.normal(size=x.shape).astype(x.dtype)

    variables = jax.tree.map(shaken, jax.device_get(one.init(0).variables))
    want, got = outcome(one, variables, batch), outcome(p, variables, batch)
    unknown = unstated(e)
    formula = {} if unknown else closed.traffic(p)
    c = Comparison.of(name, got, want, formula)
    mesh = degrees_equation(e.degrees)

    def found(check: str, holds: bool | None, text: str) -> Finding:
        return Finding(name, mesh, check, holds, text)

    findings = [
        found("loss = one device", c.output_error <= TOLERANCE, f"{c.output_error:.1e}"),
        found("gradients = one device", c.gradient_error <= TOLERANCE, f"{c.gradient_error:.1e}"),
    ]
    wrong = c.mismatches()
    text = "; ".join(f"{_name(m.key)} {m.counted:,.0f}, not {m.formula:,.0f}" for m in wrong)
    holds, text = (None, unknown) if unknown else (not wrong, text or f"{len(formula)} entries")
    findings.append(found("bytes = formula", holds, text))
    needs = required_of(p)
    silent, other = missing(needs, got.sent), unexpected(needs, got.sent)
    text = "; ".join(r.describe(got.sent) for r in silent) or f"{len(needs)} of {len(needs)}"
    findings.append(found("every axis has its collectives", not silent, text))
    findings.append(found("and no others", not other, ", ".join(map(_name, other)) or "none"))
    if isinstance(e.model, Transformer):
        findings.append(found("positions read what the mask shows", *reach(alone, variables)))
    return findings


def _name(key: Key) -> str:
    return f"{key[0]} over {'·'.join(key[1])}"


def reach(e: Experiment, variables: Any) -> tuple[bool, str]:
    """(whether the mask is respected, what was seen): one token of the input is changed on one
    device. Exactly those positions may change that the mask connects to it within the layers of the
    model."""
    noised = jax.jit(e.objective.corrupt)(jax.random.key(0), batch_of(e))
    length, layers = noised["inputs"].shape[1], e.model.shape.layers
    at = length // 2
    changed = (noised["inputs"].at[:, at].add(1)) % e.model.shape.vocab
    other = noised | {"inputs": changed}

    @jax.jit
    def hidden(variables: Any, noised: Any) -> Any:
        x, _, _ = module.run(e.model, variables, noised, method="embed")
        return module.run(e.model, variables, x, noised, method="stack")[0]

    moved = np.asarray(jnp.abs(hidden(variables, other) - hidden(variables, noised)).max(-1)) > 0
    if not is_stock(e.model):
        return bool(moved[:, at].all()), f"{moved.mean():.0%} of the positions notice"
    index, segment = jnp.arange(length), noised.get("segments")
    args = () if segment is None else (segment, segment)
    seen = np.broadcast_to(allowed(e.model.softmax.mask, index, index, *args), (1, length, length))
    reached = np.eye(length, dtype=bool)[None] | seen
    for _ in range(math.ceil(math.log2(max(layers, 2)))):
        reached = (reached[:, :, :, None] & reached[:, None]).any(2)
    if 2 ** math.ceil(math.log2(max(layers, 2))) != layers:
        return not (moved & ~reached[..., at]).any(), "none beyond the mask notices"
    wrong = int((moved != reached[..., at]).sum())
    return wrong == 0, f"{int(moved.sum())} of {moved.size} notice, {wrong} wrongly"


def audit(config: ml_collections.ConfigDict) -> list[Finding]:
    """The findings for every arm on every small mesh."""
    findings = []
    study = study_of(config.topic)
    for degrees in small_degrees(config.mesh):
        c = small(config, degrees)
        fdp_config.validate(c)
        for name, e in study.arms(c).items():
            findings += audit_arm(name, e)
    return findings


def main(argv: list[str]) -> int:
    """Audit the config and print the table; the exit status is 1 if anything fails."""
    command.refuse_arguments(argv)
    quiet()
    started = time.perf_counter()
    fdp_config.validate(CONFIG.value)
    use_virtual_devices(DEVICES)
    use_compilation_cache()
    findings = audit(CONFIG.value)
    verdict = {True: "holds", False: "FAILS", None: "not stated"}
    rows = [(f.arm, f.mesh, f.check, verdict[f.holds], f.found) for f in findings]
    print(tabulate(rows, headers=("arm", "mesh", "check", "verdict", "found")))
    failed = sum(f.holds is False for f in findings)
    seconds = time.perf_counter() - started
    print(f"\n{len(findings)} checks, {failed} failed, {seconds:.0f} s, at reduced size in float32")
    return int(failed > 0)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.launch(main, config_file.parse_flags)
