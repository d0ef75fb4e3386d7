"""Configuration of a topic that the contract test moves into fdp/topics."""

from fdp.keys import UserError, count, positive, section

SECTIONS = {
    "herding": section(
        groups=count(4, "groups of images, divisible by tp"),
        rate=positive(0.1, "how fast a group's bias follows its load"),
        measure_every=count(2, "between two looks at the weights", "steps"),
    )
}


def check(c):
    """Groups are sharded over tp."""
    if c.herding.groups % c.mesh.tp:
        raise UserError(
            f"herding.groups = {c.herding.groups} is not divisible by mesh.tp = {c.mesh.tp}"
        )
