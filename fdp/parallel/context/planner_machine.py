"""Machines to plan for, by fits of measured hardware; and the problem of a named model on one.

Attention runs at the fitted rate of dense kernels: no block-sparse kernel was timed. Collectives
are those of fdp.price.network.

Legend: N draws of the models' errors (draw 0 is nominal).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fdp.count.context import AttentionShape
from fdp.count.counts import EXCHANGE, GATHER, PERMUTE, REDUCE, SCATTER
from fdp.models.shape import ModelShape
from fdp.parallel.context.planner_problem import Masks, Problem
from fdp.parallel.context.planner_time import Machine
from fdp.price import hardware, inference, network
from fdp.price.shapes import named

OPS = {
    GATHER: "all_gather",
    SCATTER: "reduce_scatter",
    EXCHANGE: "all_to_all",
    PERMUTE: "point_to_point",
    REDUCE: "all_reduce",
}
# 90 % quantile of |error| of attention, block-sparse kernels included: assumed, wide on purpose
ATTENTION_ERROR = 0.5
# Factors [N] of the error of a named thing, given the 90 % quantile of its |error|; the first is 1.
Errors = Callable[[Any, float], np.ndarray]


def none(what: Any, p90: float) -> np.ndarray:
    """No errors: the nominal figure alone."""
    return np.ones(1)


@dataclass(frozen=True)
class Fabric:
    """Where the devices of cp sit: `local` of them in a node; `congested` keeps the fit's loss of
    bandwidth with the number of nodes, which was measured on one busy cluster."""

    name: str
    local: int
    congested: bool = False


NVLINK, INFINIBAND = Fabric("NVLink", 8), Fabric("InfiniBand", 1)
CONGESTED = Fabric("InfiniBand, congested", 1, True)


@dataclass(frozen=True)
class Fitted:
    """Network of a chip by its fit, with draws of its error."""

    fabric: Fabric
    chip: str = "h100"
    errors: Errors = none

    def seconds(self, op: str, wire: float, ranks: int, inner: int) -> np.ndarray:
        """Seconds [N] of a collective, as `planner_time.Network`; errors of one op, group and size
        class are the same.
        """
        return _seconds(self, op, wire, ranks, inner)


@lru_cache(maxsize=4096)  # many plans of many layers send the same
def _seconds(of: Fitted, op: str, wire: float, ranks: int, inner: int) -> np.ndarray:
    local = min(ranks, max(1, of.fabric.local // inner))
    fit = network.coefficients(of.chip)
    if not of.fabric.congested:
        fit = replace(fit, congestion=0.0)
    # fdp.price.network speaks of whole operands, of which a device sends (n-1)/n, in an all-reduce
    # twice.
    operand = wire if op == PERMUTE else wire * ranks / (ranks - 1) / (2 if op == REDUCE else 1)
    nominal = float(network.collective_time(OPS[op], operand, ranks, local, of.chip, fit))
    if of.errors is none:  # of a chip without measured collectives, too
        return np.atleast_1d(nominal)
    small, crosses = operand < network.SMALL, local < ranks
    p90 = network.held_out_error(of.chip, small, crosses)[1]
    return nominal * of.errors((op, ranks, inner, small), p90)


def machine(fabric: Fabric, chip: str = "h100", errors: Errors = none) -> Machine:
    """Attention at the fitted share of the chip's peak and a network. Raises ValueError for an
    unknown chip; with `errors`, so does sending on one that was not measured."""
    rate = hardware.chip(chip).peak_bf16_flops * inference.coefficient("attention", chip)
    return Machine(rate / errors("attention", ATTENTION_ERROR), Fitted(fabric, chip, errors))


def problem(
    model: ModelShape | str,
    masks: Masks | np.ndarray,
    seq_len: int,
    cp: int,
    on: Machine | None = None,
    objective: str = "seconds",
    **limits: Any,
) -> Problem:
    """Planning problem of a model's layers, one sequence at a time; `on`: by default H100 over
    InfiniBand; `limits`: further fields of `Problem`. Raises ValueError for a model that
    is not known and for sizes that do not fit.
    """
    model = named(model) if isinstance(model, str) else model
    masks = masks if isinstance(masks, Masks) else Masks(masks)
    shape = AttentionShape.of(model, 1, seq_len, cp)
    return Problem(masks, shape, on or machine(INFINIBAND), objective=objective, **limits)
