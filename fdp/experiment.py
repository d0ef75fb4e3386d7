"""What is trained, as one frozen value.

A topic makes such values; the training code reads no config. `standard(c)` is the one function that
turns the stock sections of a config into an experiment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import ml_collections

from fdp import config, objectives, optimizer
from fdp.data.batches import Data, blank, load_text
from fdp.data.recall import RECALL, recall_data
from fdp.data.synthetic import CHAINS, markov_data
from fdp.grads import Grads, plain
from fdp.hooks import Hook
from fdp.mesh import AXES
from fdp.models import balance
from fdp.models.module import Module
from fdp.models.moe import mixture
from fdp.models.shape import ModelShape
from fdp.models.transformer import transformer
from fdp.objectives.base import Objective
from fdp.optimizer import Optimizer
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.library import named


@dataclass(frozen=True)
class Fit:
    """The numbers that the loop reads. `batch`: examples of the whole mesh in a step. Evaluation,
    checkpoints and log rows come every so many steps (0: only at the end). `nan`: stop | skip."""

    steps: int
    batch: int
    seed: int = 0
    eval_every: int = 0
    eval_batches: int = 8
    checkpoint_every: int = 0
    keep: int = 3
    log_every: int = 10
    nan: str = "stop"


PLAIN = plain(1)
BYTE_IDS = 258  # of the byte tokenizer: 256, end-of-text and mask

# (state without gradient, aux summed over the data axes, step) → the new state
StateRule = Callable[[Any, Any, jax.Array], Any]


@dataclass(frozen=True)
class Experiment:
    """Everything that one arm of a study trains with.

    model: a `Module` with `embed(noised)`, `stack(x, noised, inputs_N)`, `outputs(x)` and
    `__call__(noised)`. objective: `fdp.objectives.base.Objective`. degrees: of the five axes. zero:
    0, 1 or 3. grads: how loss and gradients of a step are computed. rules: change the model state
    (without gradient) after a step, in order. hooks: of the loop."""

    model: Module
    objective: Objective
    data: Data
    optimizer: Optimizer
    degrees: Mapping[str, int]
    fit: Fit
    zero: int = 0
    grads: Grads = PLAIN
    rules: tuple[StateRule, ...] = ()
    hooks: tuple[Hook, ...] = ()

    def batch_example(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of the data as ShapeDtypeStructs."""
        return {
            name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
            for name, x in self.data.example().items()
        }

    def noised_example(self, batch: int = 1) -> Any:
        """A corrupted batch as ShapeDtypeStructs."""
        key = jax.random.key(0)
        return jax.eval_shape(self.objective.corrupt, key, self.batch_example(batch))

    @property
    def input_length(self) -> int:
        """Length of the model's input: twice that of the data for block diffusion."""
        return self.noised_example()["inputs"].shape[1]


def load_data(c: ml_collections.ConfigDict) -> Data:
    """Corpus, tokenizer and the two splits of config `c`. Synthetic sources need no corpus. The
    source "blank" suffices to compile a program."""
    d = c.data
    if d.source == "blank":
        ids = d.vocab if d.tokenizer == "bpe" else BYTE_IDS
        return blank(d.seq_len, ids, d.packing)
    if d.source in CHAINS:
        return markov_data(d.seq_len, chain=CHAINS[d.source])
    if d.source in RECALL:
        return recall_data(d.source, d.seq_len)
    return load_text(
        d.source, d.tokenizer, d.vocab, d.seq_len, d.val_fraction, d.split_seed, packing=d.packing
    )


def standard(c: ml_collections.ConfigDict, data: Data | None = None) -> Experiment:
    """The experiment of the stock config sections: a Transformer, a token objective, AdamW.

    `data` replaces the data section, for programs that are built without a corpus. Raises
    ValueError for sizes that do not fit, and the errors of loading."""
    config.validate(c)
    data = load_data(c) if data is None else data
    shape, t, length = ModelShape.of(c.model), c.train, c.data.seq_len
    ids = data.tokenizer
    if ids is None:
        raise config.UserError(f"data {data.name} are no tokens: the stock model reads token ids")
    if ids.vocab_size > shape.vocab:
        raise config.UserError(
            f"model.vocab = {shape.vocab} embedding rows cannot hold {ids.vocab_size} token ids "
            f"(mask included): set model.vocab={-(-ids.vocab_size // 8) * 8}"
        )
    objective = objectives.from_section(c.objective, ids.n_data, ids.eos_id)
    mask = objective.mask(length)
    mask = type(mask)(mask.kind, c.model.window, "segments" in data.dims, mask.rule)
    moe = mixture(c.model.moe) if shape.experts else None
    rules = (balance.LoadRule(dict(moe.fields)["balance"]),) if moe else ()
    return Experiment(
        # The same architecture for every objective; what it may see follows from the objective.
        model=transformer(shape, mask, comm_plan(c), objective.position(length), moe),
        objective=objective,
        data=data,
        optimizer=optimizer.adamw(
            optimizer.warmup_cosine(t.lr, t.warmup, t.steps), t.beta2, t.weight_decay, t.clip
        ),
        degrees={axis: c.mesh[axis] for axis in AXES},
        fit=fit_of(c),
        zero=t.zero,
        grads=grads_of(c),
        rules=rules,
    )


def grads_of(c: ml_collections.ConfigDict) -> Grads:
    """Gradients without a pipeline, or by the schedule of the `pipeline` section. Raises ValueError
    for numbers of microbatches that the schedule does not take."""
    p, m = c.mesh.pp, c.train.microbatches
    return plain(m) if p == 1 else scheduled(named(c.pipeline.schedule, p, m, c.pipeline.chunks))


def fit_of(c: ml_collections.ConfigDict) -> Fit:
    """The loop's numbers from a config, for its first seed."""
    t = c.train
    return Fit(
        steps=t.steps,
        batch=t.batch,
        seed=c.seeds[0],
        eval_every=c.eval.every,
        eval_batches=c.eval.batches,
        checkpoint_every=c.checkpoint.every,
        keep=c.checkpoint.keep,
        log_every=c.log.every,
        nan=t.nan,
    )


def comm_plan(c: ml_collections.ConfigDict) -> CommPlan:
    """How attention communicates over cp, from the `context` section."""
    x = c.context
    layout = SequenceLayout(x.layout, x.stripe if x.layout == "striped" else 1)
    return CommPlan(x.plan, c.mesh.cp if x.plan == "ulysses" else x.head_split, layout=layout)
