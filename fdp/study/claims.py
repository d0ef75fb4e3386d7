"""Claims that many topics make, as measurements and rows.

Legend: B sequences, L positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fdp.arm import Arm
from fdp.count import bytes as closed
from fdp.count.compare import Comparison, Outcome, outcome
from fdp.experiment import Experiment
from fdp.grads import plain
from fdp.loop import evaluate
from fdp.mesh import AXES, make_mesh
from fdp.objectives.base import TokenObjective
from fdp.step import TrainStep
from fdp.study.measure import Measurement, derive, each, measure
from fdp.study.report import Row

Build = Callable[[Any, str, Mapping[str, int]], Experiment]
EQUAL = (
    "sharded loss equals unsharded",
    "sharded gradients equal unsharded",
    "bytes per axis equal the closed formula",
)


# Sharded equals unsharded
# -------------------------------------------------------------------------------------------------


def sharded_equals_unsharded(
    build: Build,
    config: Any,
    meshes: Mapping[str, Mapping[str, int]],
    plot: Callable[[list[Comparison]], Any] | None = None,
    group: str = "",
) -> list[Measurement]:
    """Loss, gradients and bytes of a small experiment on every mesh of `meshes` {name: degrees}
    against one device and the closed formula.

    `build(config, name, degrees)` makes the experiment of a mesh, in float32 so that errors show.
    The same parameters and noise everywhere; that every mesh would also draw them equal is for the
    tests to show."""
    alone = measure("one device", one_device, build, config, raw=_nothing)
    cases = [(name, dict(degrees)) for name, degrees in meshes.items()]
    compared = measure("meshes", on_mesh, build, config, each(cases), alone)
    note = "float32, against one device, on " + "; ".join(meshes)

    def rows(found: list[Comparison]) -> list[Row]:
        return equality(found, note)

    return [alone, replace(compared, rows=rows, plot=plot, group=group)]


def _nothing(result: Any) -> None:
    """Gradients are no raw number of a row."""


def one_device(build: Build, config: Any) -> tuple[Any, dict[str, np.ndarray], Outcome]:
    """(initial variables, batch of random tokens or first training examples, outcome) on one
    device."""
    e = build(config, "one device", dict.fromkeys(AXES, 1))
    e = replace(e, degrees=dict.fromkeys(AXES, 1), zero=0, grads=plain(1))
    program = TrainStep(e, make_mesh(e.degrees, jax.local_devices()[:1]))
    if isinstance(e.objective, TokenObjective):
        rng, shape = np.random.default_rng(0), (e.fit.batch, e.data.seq_len)
        batch = {"tokens": rng.integers(0, e.objective.n_ids, shape).astype(np.int32)}
    else:
        batch = e.data.train.take(range(e.fit.batch))
    variables = jax.device_get(program.init(0).variables)
    return variables, batch, outcome(program, variables, batch)


def on_mesh(
    build: Build,
    config: Any,
    case: tuple[str, Mapping[str, int]],
    alone: tuple[Any, dict[str, np.ndarray], Outcome],
) -> Comparison:
    """The experiment of a (name, degrees) against `one_device`."""
    name, degrees = case
    e = build(config, name, dict.fromkeys(AXES, 1) | dict(degrees))
    program = TrainStep(e, make_mesh(e.degrees))
    variables, batch, want = alone
    formula = dict(closed.traffic(program))
    return Comparison.of(name, outcome(program, variables, batch), want, formula)


def equality(
    comparisons: Sequence[Comparison],
    note: str,
    claims: tuple[str, str, str] = EQUAL,
    metrics: tuple[str, str] = (
        "largest relative error of the loss",
        "largest |Δg|/|g|, whole tree",
    ),
    tolerances: tuple[float, float] = (1e-5, 1e-5),
) -> list[Row]:
    """Rows of outputs, gradients and bytes of programs against one device and the formula."""
    errors = (max(c.output_error for c in comparisons), max(c.gradient_error for c in comparisons))
    rows = [
        Row.judged(claim, metric, error, "", f"<= {limit:g}", "measured", note=note)
        for claim, metric, error, limit in zip(claims, metrics, errors, tolerances, strict=False)
    ]
    wrong, entries = (sum(map(f, comparisons)) for f in (_wrong, _entries))
    text = f"compiled HLO against fdp.count to the byte, {entries} entries"
    return [*rows, bytes_equal_formula(wrong, text, claims[2])]


def _wrong(comparison: Comparison) -> int:
    return len(comparison.mismatches())


def _entries(comparison: Comparison) -> int:
    return len(comparison.formula)


def bytes_equal_formula(wrong: int, note: str, claim: str = EQUAL[2]) -> Row:
    """`wrong`: (op, axes) entries whose bytes differ."""
    metric = "(op, axes) entries that differ"
    return Row.judged(claim, metric, wrong, "", "== 0", "counted", note=note)


def needs_devices(claim: str, metric: str, threshold: str, devices: int) -> Row:
    """What fewer devices cannot decide."""
    note = f"needs {devices} devices: run the cpu variant with JAX_PLATFORMS=cpu"
    return Row.untestable(claim, metric, "", threshold, "measured", note)


# Likelihood and samples
# -------------------------------------------------------------------------------------------------


def validation_loss(arm: Arm) -> float:
    """Of the trained state, as the loop evaluates it."""
    return evaluate(arm, arm.trained)


def likelihood(
    claim: str,
    arms: Sequence[Arm],
    others: Sequence[Arm],
    threshold: str,
    baseline: str,
    metric: str = "validation loss",
    note: str = "",
    decides: bool = False,
) -> list[Measurement]:
    """The validation losses of two arms, and one row of their ratio over seeds."""
    mine, theirs = (
        measure(f"validation loss {many[0].name}", validation_loss, each(many))
        for many in (arms, others)
    )
    seeds = f"{len(arms)} seed(s)"
    note = f"{seeds}; {note}" if note else seeds

    def row(mine: list[float], theirs: list[float]) -> Row:
        unit, told = "nats/token", {"note": note, "decides": decides}
        texts = claim, metric, mine, unit, threshold, "measured", baseline, theirs
        return Row.judged(*texts, **told)  # type: ignore[arg-type]

    return [mine, theirs, derive(f"likelihood {arms[0].name}", mine, theirs, rows=row)]


def unigram_entropy(ids: np.ndarray) -> float:
    """Entropy in nats of the token frequencies in `ids`: a collapsed sampler shows here, not in its
    likelihood.
    """
    counts = np.unique(ids, return_counts=True)[1] / ids.size
    return float(-(counts * np.log(counts)).sum())


def entropy(name: str, arm: Arm, ids_BxL: np.ndarray, threshold: str = "ratio >= 0.9") -> Row:
    """Samples of an arm against as many tokens of its validation data."""
    val = arm.data.val
    text = val.take(range(min(len(ids_BxL), len(val))))["tokens"]
    return Row.judged(
        f"{name} samples are as diverse as text",
        "unigram entropy of the samples",
        unigram_entropy(ids_BxL),
        "nats",
        threshold,
        "measured",
        "validation text, as many tokens",
        unigram_entropy(text),
        note=f"{ids_BxL.size} tokens, temperature 1",
    )
