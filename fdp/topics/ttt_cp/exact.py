"""Every plan of the layers with a state against one device."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from fdp.count.compare import Comparison
from fdp.experiment import Experiment
from fdp.mesh import AXES
from fdp.study.claims import equality, needs_devices, on_mesh, one_device
from fdp.study.measure import Part, derive, measure
from fdp.study.report import Row
from fdp.topics.ttt_cp import arms as models

Proof = tuple[str, str, Mapping[str, int]]
# (arm, plan of its layers with a state, degrees); "" is the layer's own plan.
PROOFS: tuple[Proof, ...] = (
    ("gdn", "affine", {"cp": 4}),
    ("gdn", "affine", {"dp": 2, "cp": 2, "tp": 2}),
    ("gdn", "affine", {"cp": 8}),
    ("gdn", "affine+scan", {"cp": 8}),
    ("gdn", "heads", {"cp": 4}),
    ("lact", "tokens", {"cp": 4}),
    ("lact", "tokens", {"cp": 8}),
    ("lact", "tokens+ns", {"dp": 2, "cp": 2, "tp": 2}),
    ("lact", "heads", {"cp": 4}),
    ("lact", "heads+tokens", {"dp": 2, "cp": 4}),
    ("lact_muon", "tokens+ns", {"cp": 4}),
    ("ttt_linear", "heads", {"cp": 4}),
    ("ttt_linear", "wavefront", {"cp": 4, "tp": 2}),
    ("lact_1to1", "tokens", {"cp": 4}),
    ("gdn_1to1", "affine", {"dp": 2, "cp": 2, "tp": 2}),
)
SOME: tuple[Proof, ...] = (("lact", "tokens", {"cp": 4}),)  # of the smallest variant


def parts(config: ml_collections.ConfigDict) -> list[Part]:
    """Every plan against one device, an arm at a time; those with Muon in rows of their own."""
    if jax.device_count() < 8:
        return [needs_devices("every plan equals one device", "errors", "<= 1e-6", 8)]
    proofs = SOME if config.variant == "tiny" else PROOFS
    found: list[Part] = []
    for muon in (False, True):
        some = [p for p in proofs if p[0].endswith("muon") == muon]
        if some:
            found += _rows(config, some, 1e-5 if muon else 1e-6, " with Muon" * muon)
    return found


def compared(config: ml_collections.ConfigDict, proofs: Sequence[Proof]) -> list[Comparison]:
    """Loss, gradients and bytes of small models of one arm on each mesh against one device."""
    kind = proofs[0][0]
    plans = {f"{arm}, {plan}, {named(d)}": plan for arm, plan, d in proofs}

    def build(c: Any, case: str, degrees: Mapping[str, int]) -> Experiment:
        return models.on_mesh(c, kind, degrees, plans.get(case, ""))

    alone = one_device(build, config)
    cases = zip(plans, (d for *_, d in proofs), strict=True)
    return [on_mesh(build, config, case, alone) for case in cases]


def named(degrees: Mapping[str, int]) -> str:
    """Such as dp2·cp2."""
    return "·".join(f"{axis}{degrees[axis]}" for axis in AXES if axis in degrees)


def _rows(
    config: ml_collections.ConfigDict, proofs: Sequence[Proof], within: float, more: str
) -> list[Part]:
    by_arm: dict[str, list[Proof]] = {}
    for proof in proofs:
        by_arm.setdefault(proof[0], []).append(proof)
    found = [
        measure(f"exact {kind}", compared, config, tuple(some)) for kind, some in by_arm.items()
    ]
    note = "float32, against one device: " + "; ".join(
        f"{a} {p} on {named(d)}" for a, p, d in proofs
    )
    claims = tuple(
        f"{claim}{more}"
        for claim in (
            "every plan gives the loss of one device",
            "every plan gives the gradients of one device",
            "every plan sends what its closed formula says",
        )
    )

    def rows(*comparisons: list[Comparison]) -> list[Row]:
        every = [one for some in comparisons for one in some]
        return equality(every, note, claims, tolerances=(within, within))  # type: ignore[arg-type]

    return [*found, derive(f"every plan{more}", *found, rows=rows, group="Exactness")]
