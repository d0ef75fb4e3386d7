"""Which parallel plan for a model on a cluster, and how fast: the ten fastest, with reasons.

    from fdp.price import planner
    ranking = planner.plan("llama3-70b", "h100:32x8", batch=1024, length=4096)
    print(ranking)

A model is a name of `fdp.price.shapes.PUBLISHED` or a ModelShape. Clusters are written nodes x
chips: `h100:32x8`, `gb200:4x72`, a TPU slice `v5p:4x4x8`; mixed ones, `h100:4x8+a100:4x8`, are
priced with their weakest chip. `ranking.plans[0]` is the fastest plan, `ranking.trainable` the
fastest that this code base trains, `fdp.price.ranking_text.fragment(ranking, topic)` its config.
The same in a shell:

    python -m fdp.price.planner --model=llama3-70b --cluster=h100:32x8 --batch=1024 --seq_len=4096

A table of configurations is priced by `fdp.price.predict`; every plan, not the best alone, by
`fdp.price.ranking.price` of `fdp.price.space.space`. All of it is simulated, with coefficients that
state their held-out errors (`fdp.price.hybrid`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from fdp import command
from fdp.keys import UserError
from fdp.models.shape import ModelShape
from fdp.price import hardware, shapes
from fdp.price.hardware import Cluster
from fdp.price.workload import PRECISIONS, job_on

if TYPE_CHECKING:
    from fdp.price.ranking import Ranking


def plan(
    model: str | ModelShape,
    cluster: str | Cluster,
    batch: int,
    length: int,
    precision: str = "bf16",
    causal: bool = True,
) -> "Ranking":
    """Rank every valid plan on all chips of the cluster; `batch` in sequences, `length` in tokens.

    Raises ValueError with the closest name for an unknown model or chip, for a cluster without
    nodes and for sizes below 1, and UserError with the constraint that binds and the nearest
    relaxation where no plan is valid or none fits into memory."""
    shape = shapes.named(model) if isinstance(model, str) else model
    here = hardware.cluster(cluster) if isinstance(cluster, str) else cluster
    job = job_on(shape, here, batch, length, precision, causal)
    from fdp.price import hybrid, ranking  # scipy: not for a mistake, nor for --help

    return ranking.rank(hybrid.shipped(), job, here)


def _write(ranking: "Ranking", path: Path, topic: str) -> None:
    from fdp.price import ranking_text

    try:
        path.write_text(ranking_text.fragment(ranking, topic), encoding="utf8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"\nconfig    {path}")


def declare(values: flags.FlagValues) -> None:
    """The flags of the command; not at import, or they would be flags of every other command."""
    name, number = flags.DEFINE_string, flags.DEFINE_integer
    name("model", "llama3-70b", "a published model", flag_values=values)
    name("cluster", "h100:32x8", "nodes x chips, or a TPU slice v5p:4x8x8", flag_values=values)
    number("batch", 1024, "global batch, sequences", flag_values=values)
    number("seq_len", 4096, "length, tokens", flag_values=values)
    flags.DEFINE_enum("precision", "bf16", PRECISIONS, "of the matmuls", flag_values=values)
    note = "whether a token sees only earlier ones"
    flags.DEFINE_bool("causal", True, note, flag_values=values)
    name("out", None, "file for a config of the best plan that fdp.train runs", flag_values=values)
    name("topic", None, "with --out: the topic whose study the config runs", flag_values=values)


def run(f: flags.FlagValues, rest: Sequence[str]) -> None:
    """The command. Raises ValueError for what the user can fix."""
    command.refuse_arguments(["", *rest])
    if bool(f.out) != bool(f.topic):
        raise UserError("--out=FILE and --topic=NAME belong together: give both or neither")
    found = plan(f.model, f.cluster, f.batch, f.seq_len, f.precision, f.causal)
    print(found)
    if f.out:
        _write(found, command.folder(f.out, "--out"), f.topic)


def main(argv: Sequence[str]) -> None:
    """`run` on the process's flags."""
    run(flags.FLAGS, argv[1:])


if __name__ == "__main__":
    declare(flags.FLAGS)
    command.launch(main, None, ValueError)
