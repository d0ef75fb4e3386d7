"""Configuration keys of pipelines, and the conditions on them.

Imports neither jax nor flax, as `fdp.config`, which lists this section."""

from typing import Any

from fdp.config_images import IMAGE_MODELS
from fdp.keys import UserError, choice, count, flag, section
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
    vocabulary=flag(
        False, "the output head is sharded over pp, and every stage computes its share of the loss"
    ),
)

PERMUTING = ("ring", "usp")  # plans whose devices of cp pass keys on


def chunks_of(c: Any) -> int:
    """Parts of a device's layers. Raises UserError for a file that holds no schedule."""
    if c.mesh.pp == 1:
        return 1
    try:
        return library.chunks(c.pipeline.schedule, c.mesh.pp, c.pipeline.chunks)
    except (ValueError, OSError) as error:
        raise UserError(f"pipeline.schedule={c.pipeline.schedule!r}: {error}") from error


def check(c: Any) -> None:
    """Chunks and microbatches that a fixed schedule takes, a vocabulary that all stages can share,
    and attention that a stage can run. Raises UserError for others."""
    name, chunks, m = c.pipeline.schedule, c.pipeline.chunks, c.train.microbatches
    _check_vocabulary(c)
    if c.mesh.pp > 1 and c.mesh.cp > 1 and c.context.plan in PERMUTING:
        raise UserError(
            f"context.plan={c.context.plan} permutes over cp, and the devices of mesh.pp="
            f"{c.mesh.pp} run different operations at a time, for which no permute can wait: set "
            "context.plan=all_gather or ulysses, or mesh.pp=1"
        )
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


def shares_head(c: Any) -> bool:
    """Whether all stages run the output head."""
    return bool(c.pipeline.vocabulary) and c.mesh.pp > 1


def _check_vocabulary(c: Any) -> None:
    if not shares_head(c):
        return
    m, pp, tp = c.model, c.mesh.pp, c.mesh.tp
    if m.kind in IMAGE_MODELS:
        raise UserError(
            f"model.kind={m.kind!r} has no vocabulary that stages can share: set "
            "pipeline.vocabulary=False"
        )
    if m.tied:
        raise UserError(
            "pipeline.vocabulary=True shards the output head over pp, and model.tied=True gives it "
            "the weights of the embedding, which the first stage alone reads: set model.tied=False "
            "or pipeline.vocabulary=False"
        )
    if m.vocab % (pp * tp):
        raise UserError(
            f"the vocabulary is not divisible by the devices that share the head: model.vocab % "
            f"(pp·tp) = {m.vocab} % ({pp}·{tp}); set model.vocab="
            f"{-(-m.vocab // (pp * tp)) * pp * tp}"
        )
