"""Configuration of topic 3: what is profiled, and on which tasks. Imports neither jax nor flax."""

from collections.abc import Iterator

import ml_collections

from fdp.config_sizes import LowerBound, sequences
from fdp.data.recall import RECALL
from fdp.keys import UserError, count, flag, section, words

BLOCKS = 32  # of a sequence: four for each of eight devices

SECTIONS = {
    "profile": section(
        tasks=words((), RECALL, "recall tasks, one arm each beside the text"),
        # As many choose the coverage, and as many judge it.
        sequences=count(32, "whose attention is profiled", "sequences"),
        every=count(100, "between profiles of a run", "steps"),
        native_sparse=flag(False, "an arm with native sparse attention beside the text"),
    )
}


def sizes(c: ml_collections.ConfigDict) -> Iterator[LowerBound]:
    """Of the sequences that are profiled at once."""
    yield sequences(c, "profile.sequences", c.profile.sequences)


def check(c: ml_collections.ConfigDict) -> None:
    """Raise UserError for a length that has no whole blocks, and for documents."""
    if c.data.packing != "stream":
        raise UserError(
            f"data.packing={c.data.packing!r}: profiles and masks of this topic are of whole "
            "windows; set data.packing=stream"
        )
    length = c.data.seq_len
    if length % BLOCKS:
        raise UserError(
            f"sequence length {length} is not divisible by blocks of a mask = {BLOCKS}: set "
            f"data.seq_len={-(-length // BLOCKS) * BLOCKS}"
        )
