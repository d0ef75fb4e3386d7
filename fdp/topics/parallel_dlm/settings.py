"""Configuration of topic 1: the policies by which sums over tp are made while sampling, and how
much is sampled. Imports neither jax nor flax.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from fdp.config_sizes import LowerBound, sequences
from fdp.data.recall import RECALL
from fdp.keys import UserError, at_least, count, section, words

EXACT = "exact"
# The policies that the claims speak of. 0.8 of the rows is the largest round share that keeps every
# task below 35 % of the bytes; with 0.55 a quarter of the steps takes 35.5 % on the short chain.
# K-refresh sends 34 to 38 %.
HEADLINE, EVERY_ROW, REFRESH = "drift, int8", "drift, int8, every row", "stale, K=3"
JUDGED = (EXACT, REFRESH, HEADLINE)

# Name to the arguments of `selective.Policy`.
POLICIES: dict[str, dict[str, Any]] = {
    EXACT: {"kind": "exact"},
    "exact, read rows only": {"rows": 1.0},
    **{f"stale, K={k}": {"kind": "stale", "refresh": k} for k in (2, 3, 4)},
    "channels, 1/2": {"kind": "channels", "refresh": 2},
    "int8": {"kind": "exact", "int8": True},
    "skip tokens": {"rule": "attention", "rows": 0.4, "skip": True},
    "window": {"rule": "window", "rows": 0.4},
    "attention": {"rule": "attention", "rows": 0.4},
    **{f"drift {rows}": {"rows": rows} for rows in (0.25, 0.4)},
    HEADLINE: {"rows": 0.8, "int8": True},
    EVERY_ROW: {"rows": 0.55, "lean": False, "int8": True},
}

OBJECTIVES = ("mdlm", "sedd_absorbing", "autoregressive")  # the last one of an arm
PER_STEP = 4  # positions revealed by a step of the shorter of the two samplings

SECTIONS = {
    "sampling": section(
        policies=words((), tuple(POLICIES), f"those measured, {JUDGED} among them; () = all"),
        sequences=count(32, "drawn for each policy and arm", "sequences"),
        draws=at_least(2, 256, "noise draws of every estimator of the loss", high=2**20),
    )
}


def sizes(c: ml_collections.ConfigDict) -> Iterator[LowerBound]:
    """Of the sequences that are drawn at once."""
    yield sequences(c, "sampling.sequences", c.sampling.sequences)


def check(c: ml_collections.ConfigDict) -> None:
    """Raise UserError for what the study could judge only in part, after training."""
    named = c.sampling.policies
    if named and (lacking := [name for name in JUDGED if name not in named]):
        raise UserError(
            f"sampling.policies={tuple(named)} lacks {lacking[0]!r}, which the claims judge: add "
            f"it, or set sampling.policies=() for all"
        )
    if c.objective.name not in OBJECTIVES:
        raise UserError(
            f"objective.name={c.objective.name!r} is none whose loss and sampler this topic "
            f"judges: set objective.name to one of {', '.join(OBJECTIVES)}"
        )
    if c.model.layers < 2:
        raise UserError(
            f"model.layers={c.model.layers}: the policies of this topic tell the last layer from "
            "those before it; set model.layers=2"
        )
    _check_data(c)
    shards = c.mesh.dp * c.mesh.ep
    if c.sampling.sequences < shards:
        raise UserError(
            f"sampling.sequences={c.sampling.sequences} is less than dp·ep = {c.mesh.dp}·"
            f"{c.mesh.ep} = {shards}, over which they are judged: set sampling.sequences={shards}"
        )
    length = c.data.seq_len
    if length % PER_STEP:
        raise UserError(
            f"sequence length {length} is not divisible by positions revealed a step = {PER_STEP}: "
            f"set data.seq_len={-(-length // PER_STEP) * PER_STEP}"
        )


def _check_data(c: ml_collections.ConfigDict) -> None:
    """Samples are whole windows of text, and are judged as such."""
    if c.data.packing != "stream":
        raise UserError(
            f"data.packing={c.data.packing!r}: samples of this topic have no documents; set "
            "data.packing=stream"
        )
    if c.data.source in RECALL:
        raise UserError(
            f"data.source={c.data.source!r} weighs answers, and this topic judges whole texts: set "
            "data.source=bible"
        )
