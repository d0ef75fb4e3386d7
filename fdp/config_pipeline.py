"""Configuration keys of pipelines, and the conditions on them.

Imports neither jax nor flax, as `fdp.config`, which lists this section."""

from typing import Any

from fdp.keys import UserError, choice, count, section
from fdp.parallel.pipeline import library

PIPELINE = section(  # how a step uses pp; none of it changes the result
    schedule=choice(
        "1f1b",
        (*library.FIXED, "searched"),
        "order of the operations of a step; or a file in torch's format, *.csv",
        pattern=r".+\.csv",
    ),
    chunks=count(
        1, "parts of a device's layers that are stages of their own (1f1b, zb_h1, searched)"
    ),
)


def chunks_of(c: Any) -> int:
    """Parts of a device's layers. Raises UserError for a file that holds no schedule."""
    if c.mesh.pp == 1:
        return 1
    try:
        return library.chunks(c.pipeline.schedule, c.mesh.pp, c.pipeline.chunks)
    except (ValueError, OSError) as error:
        raise UserError(f"pipeline.schedule={c.pipeline.schedule!r}: {error}") from error


def check(c: Any) -> None:
    """Chunks and microbatches that a fixed schedule takes. Raises UserError for others."""
    name, chunks, m = c.pipeline.schedule, c.pipeline.chunks, c.train.microbatches
    if c.mesh.pp == 1 or name not in library.FIXED:
        return
    if name in library.WHOLE and chunks > 1:
        raise UserError(
            f"pipeline.chunks={chunks}, but the stages of {name} are whole: set pipeline.chunks=1 "
            "or pipeline.schedule=1f1b"
        )
    try:
        library.named(name, c.mesh.pp, m, chunks)
    except ValueError as error:
        text = str(error).replace("set m=", "set train.microbatches=")
        raise UserError(f"pipeline.schedule={name}, train.microbatches={m}: {text}") from error
