"""Time of collectives: α–β formulas by algorithm, the NIC-sharing rule, and coefficients fitted on
measurements.

Formulas take numbers, numpy or jax arrays, work elementwise, hold for real-valued degrees and are
differentiable. They cost nothing for one rank. Symbols: n ranks; α seconds per step; β bytes/s per
rank one way; `nbytes` the whole operand: the full array of an all-reduce, the gathered one of an
all-gather, the unscattered one of a reduce-scatter, what one rank holds for an all-to-all, what is
sent point to point. Fits, data and held-out errors: `coefficients/network.json`, rewritten by
`python -m tools.fit_network DATA`.

Two sets of rates stand on these formulas and this rule.

* `collective_time`, fitted to collectives that run alone: for inference and comm plans, which wait
  for one collective at a time, from a few KB on.
* `link_up`, `link_out`, `alpha_*`, `congestion` of `fdp.price.step_time`, fitted to whole training
  steps: for the planner and the dry run, where overlap, contention with compute and a cluster's own
  fabric are part of what a link reaches.

The second is not the first times a correction, because that was worse. Mean error (%) per landscape
of the fourteen hold-outs, every fit with the same data and iterations (dense models, experts, long
sequences, release, cluster; mean):

    rates of its own                                       20.3  19.5   5.5   9.6  15.3;  17.9
    `collective_time`, links and latencies corrected       22.7  21.4   4.6   9.6  57.8;  22.6
    measured bandwidths, latencies of its own              23.2  22.9   4.7  10.2  64.3;  23.8
    measured efficiency by op in a node, the rest its own  20.7  19.5   5.6   8.9  14.9;  18.0

What is measured across nodes comes from one cluster a chip (`evidence` in the file: 17 % of the
NICs' rate on A100s, 84 % on H100s) and misleads on any other; in a node both agree within what the
steps can tell (H100: 0.84 in steps; 0.97 all-reduce, 0.56 all-gather, 0.67 all-to-all alone)."""

import dataclasses
import difflib
import functools
import importlib.resources
import json
import sys
from typing import Any

import numpy as np

from fdp.price import hardware

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "point_to_point")
# of the soft minimum between the two protocols: within 16 % of the minimum, equal far from the tie
SHARPNESS = 4.0
SMALL = 2**20  # bytes: below, collectives are predicted less well


def namespace(*values: Any) -> Any:
    """jax.numpy where one of the values is a jax array, else numpy. No value is one where nobody
    has imported jax, which takes longer than a whole ranking of plans."""
    jax = sys.modules.get("jax")
    return jax.numpy if jax and any(isinstance(v, jax.Array) for v in values) else np


def all_reduce(nbytes: Any, n: Any, alpha: Any, beta: Any) -> Any:
    """Ring: 2(n−1)α + 2(n−1)/n·N/β seconds (Patarasuk & Yuan 2009; the bandwidth term is
    optimal).
    """
    return 2 * (n - 1) * alpha + 2 * (n - 1) / n * nbytes / beta


def all_gather(nbytes: Any, n: Any, alpha: Any, beta: Any) -> Any:
    """Ring: (n−1)α + (n−1)/n·N/β seconds; N is the gathered array."""
    return (n - 1) * alpha + (n - 1) / n * nbytes / beta


def all_gather_torus(nbytes: Any, n: Any, alpha: Any, link: Any) -> Any:
    """One axis of a torus with wrap-around, both directions at once: n/2·α + (n−1)/n·N/(2·link)
    seconds.

    `link` is one way of one link. Reduce-scatter costs the same, all-reduce twice (JAX scaling
    book, "Sharding")."""
    ends = namespace(nbytes, n, alpha, link).minimum(n - 1, 1)
    return n / 2 * alpha * ends + (n - 1) / n * nbytes / (2 * link)


def all_to_all_torus(nbytes: Any, n: Any, alpha: Any, link: Any) -> Any:
    """One axis of a torus: each rank sends N/n to every other, n/4 hops away on average, over 2
    links.

    n/2·α + n·N/(8·link) seconds, exact for even n: a quarter of the all-gather of the whole array
    of n·N bytes."""
    ends = namespace(nbytes, n, alpha, link).minimum(n - 1, 1)
    return ends * (n / 2 * alpha + n * nbytes / (8 * link))


def reduce_scatter(nbytes: Any, n: Any, alpha: Any, beta: Any) -> Any:
    """Ring: the all-gather backwards, same seconds; N is the array before it is scattered."""
    return all_gather(nbytes, n, alpha, beta)


def all_to_all(nbytes: Any, n: Any, alpha: Any, beta: Any) -> Any:
    """Pairwise on equal links: (n−1)α + (n−1)/n·N/β seconds; N is what one rank holds."""
    return (n - 1) * alpha + (n - 1) / n * nbytes / beta


def all_to_all_nodes(nbytes: Any, n: Any, local: Any, alpha: Any, betas: tuple[Any, Any]) -> Any:
    """All-to-all over nodes that hold `local` ranks each; seconds.

    (local−1)/n of N stays in the node, (n−local)/n leaves it through each rank's own NIC; both move
    at once, so the slower part counts. `betas`: bytes/s per rank (in the node, NIC)."""
    xp = namespace(nbytes, n, local, alpha, *betas)
    local = xp.minimum(local, n)
    inside = (local - 1) / n * nbytes / betas[0]
    return (n - 1) * alpha + xp.maximum(inside, (n - local) / n * nbytes / betas[1])


def point_to_point(nbytes: Any, alpha: Any, beta: Any) -> Any:
    """One send: α + N/β seconds."""
    return alpha + nbytes / beta


def local_ranks(degree: Any, inner: Any, per_node: Any) -> Any:
    """Ranks of a group in one node, when the axes inside it have `inner` ranks:
    clip(per_node/inner, 1, degree).
    """
    xp = namespace(degree, inner, per_node)
    return xp.maximum(1, xp.minimum(degree, per_node / inner))


def group_bandwidth(n: Any, local: Any, scale_up: Any, scale_out: Any) -> Any:
    """Bytes/s per rank of a ring over `n` ranks with `local` of them in a node.

    scale_up inside one node (local ≥ n), else min(scale_up, scale_out·local): a ring leaves a node
    once per lane, and the node's NICs, one per chip, are shared by all groups that cross it, so a
    group owns those of its `local` ranks."""
    xp = namespace(n, local, scale_up, scale_out)
    return xp.where(local >= n, scale_up, xp.minimum(scale_up, scale_out * local))


@dataclasses.dataclass(frozen=True)
class LinkCoefficients:
    """What a chip's network reaches. Seconds ≥ 0, efficiencies in (0, 1] of the maker's peak."""

    launch: float  # per call
    launch_out: float  # more, per call that leaves the node
    hop: float  # α in a node
    hop_out: float  # α of a group over several nodes
    ramp: float  # per call of the high-bandwidth protocol, which a send point to point does not pay
    short: float  # bandwidth of the low-latency protocol, share of the other's
    all_reduce: float  # efficiency
    all_gather: float  # and reduce-scatter
    all_to_all: float
    point_to_point: float
    scale_out: float  # efficiency of the NICs, on top
    congestion: float  # NIC bandwidth falls as (nodes/2)^−congestion, in [0, 1]

    def efficiency(self, op: str) -> float:
        """Share of the peak bandwidth that `op` reaches in a node."""
        return {**dataclasses.asdict(self), "reduce_scatter": self.all_gather}[op]


@functools.cache
def document() -> dict[str, Any]:
    """The shipped fits with their sources, counts, date and held-out errors."""
    return json.loads(
        (importlib.resources.files("fdp.price") / "coefficients" / "network.json").read_text(
            "utf-8"
        )
    )


def coefficients(chip_name: str) -> LinkCoefficients:
    """Fit of a chip; "default" (pooled over all measured GPUs) or "torus" (assumed) for chips
    without data.

    Raises ValueError for an unknown chip.
    """
    chip = hardware.chip(chip_name)
    fallback = "torus" if chip.scale_out_bandwidth is None else "default"
    fits = document()["coefficients"]
    return LinkCoefficients(**fits.get(chip.name, fits[fallback]))


def held_out_error(chip: str, small: bool, crosses: bool = False) -> tuple[float, float]:
    """(median, 90 % quantile) of |error| of collectives in a node or across nodes, of a class of
    group left out of the fit; small: below `SMALL` bytes.

    Raises ValueError for a chip without measured collectives.
    """
    held_out, name = document()["errors"]["held_out_class"], hardware.chip(chip).name
    if name not in held_out:
        raise ValueError(
            f"no held-out error of collectives on {name}: measured are {', '.join(held_out)}"
        )
    where = "across nodes" if crosses else "in a node"
    found = held_out[name][f"{where}, {'below' if small else 'from'} 1 MiB"]
    return found["median_pct"] / 100, found["p90_pct"] / 100


def _protocols(c: LinkCoefficients, transfer: Any) -> Any:
    """Soft minimum of the two protocols' seconds; `transfer(share)` is the time at that share of
    the bandwidth.

    NCCL picks the faster of a low-latency protocol and one with full bandwidth that costs more to
    start: that choice, not a latency alone, makes the bandwidth rise with the size of the message
    (Hu et al. 2025, arXiv 2507.04786)."""
    low, high = (
        transfer(c.short),
        c.ramp + transfer(1.0) + 1e-12,
    )  # a picosecond keeps 0/0 out for one rank
    return low * (1 + (low / high) ** SHARPNESS) ** (-1 / SHARPNESS)


def _links(
    op: str, n: Any, local: Any, chip: hardware.Chip, c: LinkCoefficients
) -> tuple[Any, Any, Any, Any]:
    """(bytes/s in the node, bytes/s of a NIC, seconds a hop, seconds to start) of `op`."""
    xp = namespace(n, local)
    crosses = xp.where(local >= n, 0.0, 1.0)
    nodes = xp.maximum(n / xp.minimum(local, n), 2.0)
    up = chip.scale_up_bandwidth * c.efficiency(op)
    out = (
        (chip.scale_out_bandwidth or 0.0)
        * c.efficiency(op)
        * c.scale_out
        * (nodes / 2) ** -c.congestion
    )
    alpha = c.hop + crosses * (c.hop_out - c.hop)
    return up, out, alpha, c.launch + crosses * c.launch_out


def _gpu_time(
    op: str, nbytes: Any, n: Any, local: Any, chip: hardware.Chip, c: LinkCoefficients
) -> Any:
    xp = namespace(nbytes, n, local)
    up, out, alpha, start = _links(op, n, local, chip, c)
    beta = group_bandwidth(n, local, up, out)
    transfers = {
        "all_reduce": lambda share: all_reduce(nbytes, n, alpha, share * beta),
        "all_gather": lambda share: all_gather(nbytes, n, alpha, share * beta),
        "reduce_scatter": lambda share: reduce_scatter(nbytes, n, alpha, share * beta),
        "all_to_all": lambda share: all_to_all_nodes(
            nbytes, n, local, alpha, (share * up, share * out)
        ),
    }
    if op == "point_to_point":
        one = xp.where(
            local >= n, n, 1
        )  # a send has its own rank's NIC, whoever else sits in the node
        return start + point_to_point(nbytes, alpha, group_bandwidth(n, one, up, out))
    return start + _protocols(c, transfers[op])


def exchange_time(
    inside: Any,
    outside: Any,
    n: Any,
    local: Any,
    chip_name: str,
    fit: LinkCoefficients | None = None,
) -> Any:
    """Seconds of an all-to-all of unequal parts among `n` ranks, `local` of them in each node.

    The fullest rank moves `inside` bytes in its node and `outside` through its NIC, one way; what
    it keeps counts nowhere. With equal parts of N, (local−1)/n·N and (n−local)/n·N, it is
    `collective_time` of an all-to-all. `fit` and errors as in that function."""
    for name, value, least in (("inside", inside, 0), ("outside", outside, 0), ("n", n, 1)):
        _refuse("all_to_all", name, value, least)
    chip, c = hardware.chip(chip_name), fit or coefficients(chip_name)
    xp = namespace(inside, outside, n, local)
    if chip.scale_out_bandwidth is None:
        held = (inside + outside) * n / xp.maximum(n - 1, 1)
        return _torus_time("all_to_all", held, n, chip, c) * xp.minimum(n - 1, 1)
    up, out, alpha, start = _links("all_to_all", n, local, chip, c)

    def transfer(share: float) -> Any:
        return (n - 1) * alpha + xp.maximum(inside / (share * up), outside / (share * out))

    return (start + _protocols(c, transfer)) * xp.minimum(n - 1, 1)


def _torus_time(op: str, nbytes: Any, n: Any, chip: hardware.Chip, c: LinkCoefficients) -> Any:
    link = chip.scale_up_bandwidth * c.efficiency(op)
    if op == "all_to_all":
        return c.launch + all_to_all_torus(nbytes, n, c.hop, link)
    if op == "point_to_point":
        return c.launch + point_to_point(nbytes, c.hop, link)
    gather = all_gather_torus(nbytes, n, c.hop, link)
    return c.launch + (2 * gather if op == "all_reduce" else gather)


def _refuse(op: str, name: str, value: Any, least: float) -> None:
    jax = sys.modules.get("jax")
    if jax and isinstance(value, jax.core.Tracer):
        return  # an abstract value cannot be compared while it is traced
    if not np.all(np.isfinite(value)) or np.any(np.asarray(value) < least):
        raise ValueError(
            f"{op}: {name} = {value}; time = latency + bytes/bandwidth needs a finite {name} ≥ "
            f"{least:g}"
        )


def collective_time(
    op: str, nbytes: Any, n: Any, local: Any, chip_name: str, fit: LinkCoefficients | None = None
) -> Any:
    """Seconds of one collective of `n` ranks, `local` of them in each node, on `chip_name`.

    `op` is one of OPS; `nbytes` as in the head of this file. `fit` replaces the shipped
    coefficients, as for another cluster. 0 for one rank. A group on a TPU is one axis of its torus.
    Raises ValueError for an unknown op or chip, n < 1, local < 1 and bytes < 0; traced values are
    not checked."""
    if op not in OPS:
        close = difflib.get_close_matches(op, OPS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown collective {op!r}: did you mean {close!r}? Known: {', '.join(OPS)}"
        )
    for name, value, least in (("nbytes", nbytes, 0), ("n", n, 1), ("local", local, 1)):
        _refuse(op, name, value, least)
    chip, c = hardware.chip(chip_name), fit or coefficients(chip_name)
    if chip.scale_out_bandwidth is None:
        seconds = _torus_time(op, nbytes, n, chip, c)
    else:
        seconds = _gpu_time(op, nbytes, n, local, chip, c)
    return seconds * namespace(nbytes, n, local).minimum(n - 1, 1)
