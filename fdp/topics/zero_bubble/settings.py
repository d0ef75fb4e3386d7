"""Configuration of topic 8: what is trained, and how it is judged. Imports neither jax nor flax."""

from collections.abc import Iterator

import ml_collections

from fdp.config_images import IMAGE_MODELS
from fdp.config_sizes import LowerBound, pictures
from fdp.keys import UserError, at_least, count, section, words

FILLERS = ("none", "stable", "larger")
COSTS = ("uniform", "coarse", "uvit")
COARSE = 0.5  # share of the noise levels, the highest, whose patches have twice the edge

SECTIONS = {
    "images": section(
        costs=words(("uniform",), COSTS, "what a sample costs: alike, by noise, or a U-ViT"),
        fillers=words(("none",), FILLERS, "what idle slots compute, and their rival"),
        references=count(256, "images that a stable target is a mean over", "images"),
        samples=at_least(
            2, 64, "drawn and judged: their features have a covariance", "images", 2**16
        ),
        steps=count(25, "of a sampler", "steps", high=10_000),
        classifier=at_least(0, 400, "training steps of the judge of samples", "steps"),
    )
}


def sizes(c: ml_collections.ConfigDict) -> Iterator[LowerBound]:
    """Of the images that are judged and averaged at once."""
    yield pictures(c, "images.references", c.images.references)
    yield pictures(c, "images.samples", c.images.samples)


def check(c: ml_collections.ConfigDict) -> None:
    """Raise UserError for a model that is no DiT, and for arms that cannot be told apart."""
    if c.model.kind not in IMAGE_MODELS:
        raise UserError(
            f"model.kind={c.model.kind!r}: topic zero_bubble trains images; set model.kind='dit'"
        )
    if not c.images.costs or "none" not in c.images.fillers:
        raise UserError(
            f"images.costs={c.images.costs} and images.fillers={c.images.fillers}: name at least "
            "one cost, and the filler 'none' that the others are compared with"
        )
