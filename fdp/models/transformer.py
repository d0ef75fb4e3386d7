"""The Transformer, for every mesh: outside shard_map it is the single-device reference, inside the
sharded program.

Legend: B sequences, L positions (local over cp), R rows of a pass over a few positions, D width, V
vocabulary (local over tp)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax

from fdp.collectives import all_gather, vary
from fdp.count.counts import Counts, Degrees, Rows, Staged, Unstated, Work
from fdp.models.attention import GATHER, Attention, Core, Softmax, Where
from fdp.models.layers import (
    Embedding,
    Head,
    NoiseEmbedding,
    RMSNorm,
    SwiGLU,
    entered,
    hidden_bytes,
)
from fdp.models.module import Module
from fdp.models.shape import ModelShape
from fdp.models.stack import Block, Layer, Stack, layer
from fdp.parallel.context import layouts
from fdp.parallel.context.plan import CommPlan
from fdp.parallel.context.state import StatePlan
from fdp.parallel.masks import Mask

Array = jax.Array


class Transformer(Module):
    """From token ids to vocabulary-parallel logits.

    `pattern`: the blocks of one period (`fdp.models.stack`). `layout`: which positions each device
    of cp holds. `position`: maps indices to rotary positions; None is the identity. `gather`, for
    ZeRO-3: maps the name of a stack to the function that gathers the stored parameters of one
    period. `reduction` builds the module that replaces the all-reduce over tp at the end of the
    embedding. `lead`: blocks before the stack, one layer each, all equal; they take no layer
    inputs and keep no cache."""

    shape: ModelShape
    pattern: tuple[Layer, ...]
    layout: layouts.SequenceLayout = layouts.CONTIGUOUS
    position: Callable[[Array], Array] | None = None
    gather: Callable[[str], Any] | None = None
    reduction: Layer | None = None
    lead: tuple[Layer, ...] = ()

    def setup(self) -> None:
        s = self.shape
        self.embedding = Embedding(s, self.reduction, name="embed")
        self.norm = RMSNorm(s.epsilon)
        if not s.tied:
            self.head = Head(s)
        if s.time_conditioning:
            self.noise_embedding = NoiseEmbedding()
        gather = None if self.gather is None else self.gather("layers")
        self.layers = self._main.build(gather, "layers")
        if self.lead:
            gather = None if self.gather is None else self.gather("lead")
            self.first = self._lead.build(gather, "lead")

    @property
    def _lead(self) -> Stack:
        return Stack(replace(self.shape, layers=len(self.lead)), self.lead[:1])

    @property
    def _main(self) -> Stack:
        return Stack(replace(self.shape, layers=self.shape.layers - len(self.lead)), self.pattern)

    def embed(self, noised: dict[str, Any], given: Any = None) -> Array:
        """Embeddings [B, L, D] of noised["inputs"], int32 [B, L]."""
        # The stacked layers are typed varying over pp.
        return vary(self.embedding(noised["inputs"], given), "pp")

    def stack(
        self,
        x_BxLxD: Array,
        noised: dict[str, Any],
        inputs_N: Any = None,
        index_BxR: Array | None = None,
        given: Any = None,
    ) -> Array:
        """The layers of this pp shard and the final norm: [B, L, D].

        Reads noised["segments"], and with time conditioning noised["noise"], f32 [B] of any scale.
        `inputs_N`: layer inputs, a pytree whose leading dim is the periods. `index_BxR`: run a few
        rows against a cache. `given`: data of the pass for the layers of a topic (`Where`)."""
        shared = self._shared(noised, index_BxR, given)
        if self.lead:
            x_BxLxD, _ = self.first(x_BxLxD, shared, None)
        return self.finish(self._blocks(x_BxLxD, shared, inputs_N), noised)

    def start(self, noised: dict[str, Any]) -> Array:
        """What the first stage of a pipeline does before its layers."""
        x_BxLxD = self.embed(noised)
        if self.lead:
            x_BxLxD, _ = self.first(x_BxLxD, self._shared(noised), None)
        return x_BxLxD

    def blocks(self, x_BxLxD: Array, noised: dict[str, Any], inputs_N: Any = None) -> Array:
        """The layers of a stage of a pipeline."""
        return self._blocks(x_BxLxD, self._shared(noised), inputs_N)

    def finish(self, x_BxLxD: Array, noised: dict[str, Any]) -> Array:
        """What the last stage of a pipeline does after its layers, before `outputs`."""
        del noised  # the final norm is not modulated
        x_BxLxD = self.norm(x_BxLxD)
        # Not `enter_tp`: without SP the rows are marked varying in the head, after the caller has
        # selected some.
        return all_gather(x_BxLxD, "tp", dim=1) if self.shape.sequence_parallel else x_BxLxD

    def _blocks(self, x_BxLxD: Array, shared: tuple, inputs_N: Any) -> Array:
        self._main.check_inputs(inputs_N)
        return self.layers(x_BxLxD, shared, inputs_N)[0]

    def _shared(
        self, noised: dict[str, Any], index_BxR: Array | None = None, given: Any = None
    ) -> tuple[Array | None, Where]:
        """What all layers of a pass read."""
        conditioned = self.shape.time_conditioning
        noise_BxE = self.noise_embedding(noised["noise"]) if conditioned else None
        index = index_BxR
        if index is None:
            index = layouts.positions(self.layout, noised["inputs"].shape[1])
        position = index if self.position is None else self.position(index)
        return noise_BxE, Where(index, position, noised.get("segments"), given, noised.get("noise"))

    def outputs(self, x_D: Array) -> Array:
        """The output head on any selection of rows: [..., D] → float32 [..., V/tp]."""
        return self.embedding.logits(x_D) if self.shape.tied else self.head(x_D)

    def hidden(
        self,
        ids_BxL: Array,
        noise_B: Array,
        index_BxR: Array | None = None,
        inputs_N: Any = None,
        given: Any = None,
    ) -> Array:
        """`stack` of `embed` of plain ids, for samplers."""
        noised = {"inputs": ids_BxL, "noise": noise_B}
        return self.stack(self.embed(noised, given), noised, inputs_N, index_BxR, given)

    def __call__(self, noised: dict[str, Any]) -> Array:
        """Logits [B, L, V/tp], float32."""
        return self.outputs(self.stack(self.embed(noised), noised))

    def decode_state(self, batch: int, length: int) -> tuple[Any, Any]:
        """(values, PartitionSpecs) of an empty cache for `batch` sequences of `length`.

        A causal model may fill it row by row. A bidirectional model reads all of it, so it must
        first run a pass over all rows."""
        if self.lead:
            raise ValueError("blocks before the stack have no cached decoding: use first_dense=0")
        state, specs = self._main.decode_state(batch, length)
        return {"layers": state}, {"layers": specs}

    def counts(self, rows: Rows, degrees: Degrees) -> Counts:
        """The sum of `staged`."""
        return self.staged(rows, degrees).whole

    def staged(self, rows: Rows, degrees: Degrees) -> Staged:
        """Embedding, noise embedding, stack, and final norm (with its gather) with head. Raises
        Unstated, naming the layer that states no counts."""
        s = self.shape
        if self.reduction is not None:
            raise Unstated(f"{self.reduction.cls.__name__} has no counts")
        start = Embedding(s, parent=None).counts(rows, degrees)
        if self.lead:
            start += self._lead.counts(rows, degrees)
        shared = Counts()
        if s.time_conditioning:
            shared = NoiseEmbedding(parent=None).counts(rows, degrees)
        finish = RMSNorm(s.epsilon, parent=None).counts(s.width, s.sequence_parallel, degrees)
        if s.sequence_parallel:
            there, back = entered(s, rows, degrees)
            finish += Counts(forward=Work(sent=there), backward=Work(sent=back))
        head = Head(s, parent=None).counts(rows, degrees)
        finish += replace(head, parameters=0) if s.tied else head
        message, layers = hidden_bytes(s, rows, degrees)[0], self._main.counts(rows, degrees)
        return Staged(start, shared, layers, finish, message=message)

    def check(self, batch: int, noised: dict[str, Any], degrees: Mapping[str, int]) -> None:
        """Raises ValueError for layers that cannot run `batch` sequences per device on
        `degrees`."""
        length = noised["inputs"].shape[1]
        for block in {*self.lead, *self.pattern}:
            made = block(self.shape, parent=None)
            if hasattr(made, "check"):
                made.check(batch, length, degrees)

    @property
    def stock(self) -> bool:
        """Whether every block is softmax attention and SwiGLU, and every all-reduce over tp is
        exact."""
        if self.reduction is not None or self.lead:
            return False
        cores = [(block, core_of(block)) for block in self.pattern]
        return all(isinstance(c, Softmax) and block == attention_block(c) for block, c in cores)

    @property
    def core(self) -> Core:
        """The attention core of the first block. Raises KeyError for other mixing layers."""
        return dict(dict(self.pattern[0].fields)["mixing"].fields)["core"]

    @property
    def softmax(self) -> Softmax:
        """The softmax core of the first block. Raises ValueError for other mixing layers and
        cores."""
        core = core_of(self.pattern[0])
        if not isinstance(core, Softmax):
            raise ValueError(f"the model needs softmax attention in its first block, not {core}")
        return core

    @property
    def parts(self) -> dict[str, int]:
        """Devices of the parts into which plans split an axis: those of cp that share heads or
        sequences, the fewest of a block that splits, and those of ep that form a node. 1: no
        split."""
        splits = [n for n in map(_head_split, self.pattern) if n > 1]
        ffns = [dict(block.fields).get("ffn") for block in self.pattern]
        nodes = [f.cls.parts(dict(f.fields)) for f in ffns if f and hasattr(f.cls, "parts")]
        return {"cp": min(splits, default=1), "ep": max(nodes, default=1)}


def core_of(block: Layer) -> Any:
    """The attention core of a block; None for other mixing layers."""
    mixing = dict(block.fields).get("mixing")
    return dict(mixing.fields).get("core") if isinstance(mixing, Layer) else None


def _head_split(block: Layer) -> int:
    """Devices of cp that share heads or sequences, by the plan of a block; 1: none."""
    mixing = dict(block.fields).get("mixing")
    fields = dict(mixing.fields) if isinstance(mixing, Layer) else {}
    plan = fields.get("plan", getattr(fields.get("core"), "plan", None))
    return plan.head_split if isinstance(plan, CommPlan | StatePlan) else 1


def attention_block(core: Core, ffn: Layer | None = None) -> Layer:
    """The stock block with `core` as its attention core; `ffn` in place of SwiGLU."""
    return layer(Block, mixing=layer(Attention, core=core), ffn=ffn or layer(SwiGLU))


def transformer(
    shape: ModelShape,
    mask: Mask,
    plan: CommPlan = GATHER,
    position: Any = None,
    moe: Layer | None = None,
) -> Transformer:
    """The stock model: softmax attention under `mask` with `plan` over cp. `moe`: the FFN of the
    layers that have experts. Raises ValueError, by name, for features of `shape` that the stock
    blocks lack."""
    shape.check()
    dense = attention_block(Softmax(mask, plan))
    if moe is None:
        return Transformer(shape, (dense,), plan.layout, position)
    pattern = (dense,) * (shape.moe_every - 1) + (attention_block(Softmax(mask, plan), moe),)
    lead = (dense,) * shape.first_dense
    return Transformer(shape, pattern, plan.layout, position, lead=lead)


def with_core(model: Transformer, core: Core) -> Transformer:
    """`model` with `core` in every layer, and with the layout of that core."""
    ffns = [dict(block.fields)["ffn"] for block in model.pattern]
    pattern = tuple(attention_block(core, ffn) for ffn in ffns)
    lead = tuple(attention_block(core) for _ in model.lead)
    return model.clone(pattern=pattern, layout=core.layout, lead=lead)
