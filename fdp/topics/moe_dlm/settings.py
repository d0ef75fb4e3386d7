"""Configuration of topic 2: which routers are trained, on what. Imports neither jax nor flax."""

from collections.abc import Iterator

import ml_collections

from fdp.config_sizes import LowerBound, sequences
from fdp.keys import UserError, at_least, count, section, words

# How an arm differs from a token's choice without any balance: keys of `model.moe`.
LEVEL: dict[str, object] = {"switch": 0.01}
# Chosen on seed 0 of two regimes: 0.01 levels little, 0.1 costs 0.013 nats.
RANKS: dict[str, object] = {"switch": 0.0, "rank": 0.03}
ARMS: dict[str, dict[str, object]] = {
    "dense": {"experts": 0},
    "aux": LEVEL,
    "loss_free": {"switch": 0.0, "bias": 0.001},
    "expert": {"switch": 0.0, "choice": "expert", "normalise": False},
    "reverse": {"switch": 0.0, "choice": "expert", "normalise": False},
    "additive": LEVEL | {"noise": "additive"},
    "film": LEVEL | {"noise": "film"},
    "low_rank": LEVEL | {"noise": "low_rank"},
    "group": LEVEL | {"noise": "group", "groups": 4, "kept": 2},
    "film_rank": RANKS | {"noise": "film"},
    "low_rank_rank": RANKS | {"noise": "low_rank"},
    "low_rank_blind": LEVEL | {"noise": "low_rank"},
}
BASELINES = ("aux", "loss_free", "reverse")
NOISE_AWARE = ("film_rank", "low_rank_rank")
DECIDING = (*BASELINES, *NOISE_AWARE)
OTHERS = 3  # seeds of the other arms
TASKS = ("markov", "two_regimes")
SEVERAL_NODES = "deepseek-v3", "h100:4x8"  # of which the bytes of dispatch plans are told
BINS = 10  # of the noise, in which losses and loads are reported

SECTIONS = {
    "router": section(
        arms=words(tuple(ARMS), tuple(ARMS), "routers"),
        tasks=words((), TASKS, "oracles, whose likelihood is known"),
        text=at_least(0, 1, "seeds of the arms on text; one arm alone for 1", "seeds"),
        sequences=count(64, "of a sampling run, and of each noise bin", "sequences"),
    )
}


def sizes(c: ml_collections.ConfigDict) -> Iterator[LowerBound]:
    """Of the sequences that are drawn at once."""
    yield sequences(c, "router.sequences", c.router.sequences)


def check(c: ml_collections.ConfigDict) -> None:
    """Raise UserError for a config whose masks state no share, or whose arms cannot differ."""
    moe = c.model.moe
    if c.objective.name != "mdlm" or c.objective.form != "k":
        raise UserError(
            f"objective.name={c.objective.name!r} with form {c.objective.form!r}: the routers of "
            "this topic read the share of masked tokens; set objective.name=mdlm and form=k"
        )
    if c.model.time_conditioning:
        raise UserError(
            "model.time_conditioning=True gives every layer the noise level, so that nothing is "
            "left to compare: set it to False"
        )
    if "reverse" in c.router.arms and moe.topk < 2:
        raise UserError(
            f"arm 'reverse' takes topk - 1 to topk + 1 experts a token, and model.moe.topk = "
            f"{moe.topk}: set model.moe.topk=2, or leave the arm out"
        )
    if c.router.text and not c.router.arms:
        raise UserError("router.arms is empty: name at least one router")
