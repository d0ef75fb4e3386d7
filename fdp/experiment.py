"""What is trained, as one frozen value.

A topic makes such values; the training code reads no config. `standard(c)` is the one function that
turns the stock sections of a config into an experiment."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import ml_collections

from fdp import config, objectives, optimizer, process
from fdp.config_images import IMAGE_MODELS, share
from fdp.config_pipeline import shares_head
from fdp.data.batches import Data, blank, load_text
from fdp.data.images import SOURCES, blank_images, check_images, image_data
from fdp.data.pretrained import pretrained
from fdp.data.recall import RECALL, recall_data
from fdp.data.synthetic import CHAINS, GaussianMixture, markov_data, mixture_data
from fdp.data.tokenizer import check_rows, is_path
from fdp.grads import Grads, plain
from fdp.hooks import Hook
from fdp.mesh import AXES
from fdp.models import balance
from fdp.models.dit import DiT, dit
from fdp.models.image import ImageShape
from fdp.models.module import Module
from fdp.models.moe import mixture
from fdp.models.shape import ModelShape
from fdp.models.stack import Layer
from fdp.models.transformer import transformer
from fdp.models.uvit import UViT
from fdp.objectives.base import Objective
from fdp.objectives.cost import CostLaw
from fdp.optimizer import Optimizer
from fdp.parallel.context.layouts import SequenceLayout
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.pipeline.executor import scheduled
from fdp.parallel.pipeline.folded import folded
from fdp.parallel.pipeline.library import named
from fdp.parallel.pipeline.vocabulary import with_head


@dataclass(frozen=True)
class Fit:
    """The numbers that the loop reads. `batch`: examples of the whole mesh in a step. Evaluation,
    checkpoints and log rows come every so many steps (0: only at the end). `nan`: stop | skip.
    `profile`: first and last step of a profiler trace, counted from 1, or ()."""

    steps: int
    batch: int
    seed: int = 0
    eval_every: int = 0
    eval_batches: int = 8
    checkpoint_every: int = 0
    keep: int = 3
    log_every: int = 10
    nan: str = "stop"
    profile: tuple[int, ...] = ()


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
        """Tokens that the model's layers see of an example: twice those of the data for block
        diffusion; of an image its finest patches and the tokens before them."""
        if isinstance(self.model, DiT | UViT):
            return self.model.image.tokens() + self.model.extras
        return self.noised_example()["inputs"].shape[1]


def load_data(c: ml_collections.ConfigDict) -> Data:
    """Corpus, tokenizer and the two splits of config `c`. Synthetic sources need no corpus. The
    source "blank" suffices to compile a program."""
    d, x = c.data, c.model.image
    if c.model.kind in IMAGE_MODELS and d.source not in SOURCES:
        if d.source == "blank":
            return blank_images(x.size, x.channels)
        return mixture_data(GaussianMixture(x.size, x.channels, x.classes))
    if d.source in SOURCES:
        return image_data(d.source, x.size, d.val_fraction, d.split_seed)
    if d.source == "blank":
        return blank(d.seq_len, _ids(d), d.packing)
    if d.source in CHAINS:
        return markov_data(d.seq_len, chain=CHAINS[d.source])
    if d.source in RECALL:
        return recall_data(d.source, d.seq_len)
    read = functools.cache(
        lambda: load_text(
            d.source,
            d.tokenizer,
            d.vocab,
            d.seq_len,
            d.val_fraction,
            d.split_seed,
            packing=d.packing,
            rows=c.model.vocab,
        )
    )
    # The main process fills the cache, then the others read it. Each host may have its own.
    main = process.decided(lambda: _hashes(read()))
    for name, there, here in zip(("source", "tokenizer"), main, _hashes(read()), strict=True):
        if there != here:
            raise config.UserError(
                f"data.{name}={d[name]!r} holds sha256 {there[:12]} in process 0, and {here[:12]} "
                "in this one: give every host the same files"
            )
    return read()


def _hashes(data: Data) -> list[str]:
    """Of the text and of the map to tokens."""
    return [data.sha256, getattr(data.tokenizer, "fingerprint", "")]


def _ids(data: ml_collections.ConfigDict) -> int:
    """Token ids without a corpus, where bpe has as many as were asked for."""
    if is_path(data.tokenizer):
        return pretrained(data.tokenizer).vocab_size
    return data.vocab if data.tokenizer == "bpe" else BYTE_IDS


def standard(c: ml_collections.ConfigDict, data: Data | None = None) -> Experiment:
    """The experiment of the stock config sections: a Transformer and a token objective, or a model
    and an objective of images, and AdamW.

    `data` replaces the data section, for programs that are built without a corpus. Raises
    ValueError for sizes that do not fit, and the errors of loading."""
    config.validate(c)
    data = load_data(c) if data is None else data
    t, moe = c.train, mixture(c.model.moe) if c.model.moe.experts else None
    parts = _of_images if c.model.kind in IMAGE_MODELS else _of_tokens
    model, objective = parts(c, data, moe)
    return Experiment(
        model=model,
        objective=objective,
        data=data,
        optimizer=optimizer.adamw(
            optimizer.warmup_cosine(t.lr, t.warmup, t.steps), t.beta2, t.weight_decay, t.clip
        ),
        degrees={axis: c.mesh[axis] for axis in AXES},
        fit=fit_of(c),
        zero=t.zero,
        grads=grads_of(c),
        rules=(balance.LoadRule(dict(moe.fields)["balance"]),) if moe else (),
    )


def _of_tokens(
    c: ml_collections.ConfigDict, data: Data, moe: Layer | None
) -> tuple[Module, Objective]:
    """The Transformer and its objective. What the model may see follows from the objective."""
    shape, length = ModelShape.of(c.model), c.data.seq_len
    ids = data.tokenizer
    if ids is None:
        raise config.UserError(f"data {data.name} are no tokens: the stock model reads token ids")
    check_rows(ids.vocab_size, shape.vocab)
    if shares_head(c):
        shape = replace(shape, vocab_axes=("pp", "tp"))
    objective = objectives.from_section(c.objective, ids.n_data, ids.eos_id)
    objective = replace(objective, axes=shape.vocab_axes)
    mask = objective.mask(length)
    mask = type(mask)(mask.kind, c.model.window, "segments" in data.dims, mask.rule)
    # The same architecture for every objective.
    return transformer(shape, mask, comm_plan(c), objective.position(length), moe), objective


def _of_images(
    c: ml_collections.ConfigDict, data: Data, moe: Layer | None
) -> tuple[Module, Objective]:
    """DiT or U-ViT and their objective."""
    m, x = c.model, c.model.image
    check_images(data, x.size, x.channels, x.classes)
    image, law = _image_of(c)
    shape = replace(
        ModelShape.of(m),
        vocab=x.patch**2 * x.channels,  # what a token holds, for the prices
        gated=False,
        time_conditioning=x.conditioning == "adaln",
        bias=m.kind == "dit",
        conv=0,
    )
    objective = objectives.of_images(c.objective, x.classes, law)
    if m.kind == "uvit":
        return UViT(shape, image, comm_plan(c)), objective
    return dit(shape, image, comm_plan(c), moe), objective


def _image_of(c: ml_collections.ConfigDict) -> tuple[ImageShape, CostLaw]:
    """What images are, and what they cost."""
    x = c.model.image
    coarse, dropped = share("coarse", x.coarse), share("dropped", x.dropped)
    law = CostLaw(coarse, dropped, x.group, x.self_conditioning)
    image = ImageShape(
        size=x.size,
        channels=x.channels,
        classes=x.classes,
        patch=x.patch,
        coarse=bool(coarse),
        dropping=bool(dropped),
        self_conditioned=x.self_conditioning,
        registers=x.registers,
    )
    return image, law


def grads_of(c: ml_collections.ConfigDict) -> Grads:
    """Gradients without a pipeline, or by the schedule of the `pipeline` section. Raises UserError
    for numbers of microbatches that the schedule does not take, and for a schedule that no table of
    neighbours holds. Where the stages share the head, S is added to any schedule, to one of a file
    too."""
    p, m = c.mesh.pp, c.train.microbatches
    if p == 1:
        return plain(m)
    shares = _shares(c) if c.model.kind in IMAGE_MODELS else ()
    skips = c.model.kind == "uvit"
    half = c.model.layers // 2 / p
    blocks = (*[half] * p, half + 1, *[half] * (p - 1)) if skips else ()  # the middle on stage p
    try:
        order = named(c.pipeline.schedule, p, m, c.pipeline.chunks, shares, blocks)
        order = with_head(order) if shares_head(c) else order
        found: scheduled = folded(order, UViT.stacks) if skips else scheduled(order)
        _ = found.table  # made now: what it refuses must not show while a step is traced
    except ValueError as error:
        text = str(error).replace("set m=", "set train.microbatches=")
        raise config.UserError(f"pipeline.schedule={c.pipeline.schedule}: {text}") from error
    return found


def _shares(c: ml_collections.ConfigDict) -> tuple[float, ...]:
    """What each microbatch of a step costs, in tokens of an image over those of the finest patches,
    class after class; none where all cost alike."""
    image, law = _image_of(c)
    pattern, m = law.costs.pattern, c.train.microbatches
    if len(law.costs.classes) == 1:
        return ()
    found = [
        image.tokens(cost, kept=True) / image.tokens()
        for cost in law.costs.classes
        for _ in range(m * pattern.count(cost) // len(pattern))
    ]
    return tuple(found)


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
        profile=tuple(c.log.profile),
    )


def comm_plan(c: ml_collections.ConfigDict) -> CommPlan:
    """How attention communicates over cp, from the `context` section."""
    x = c.context
    layout = SequenceLayout(x.layout, x.stripe if x.layout == "striped" else 1)
    return CommPlan(x.plan, c.mesh.cp if x.plan == "ulysses" else x.head_split, layout=layout)
