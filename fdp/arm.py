"""An arm: one trained variant of a study, built from its config. Data, objective, model and
programs in one place.
"""

from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from fdp import objectives
from fdp.cost import flops
from fdp.data.batches import TextData, load_text
from fdp.data.recall import RECALL, recall_data
from fdp.data.synthetic import markov_data
from fdp.models import transformer
from fdp.state import TrainState
from fdp.step import Program, tokens_sharding


def load_data(c: ml_collections.ConfigDict) -> TextData:
    """Corpus, tokenizer and the two window sets of config `c`; synthetic sources need no corpus."""
    d = c.data
    if d.source == "markov":
        return markov_data(d.seq_len)
    if d.source in RECALL:
        return recall_data(d.source, d.seq_len)
    return load_text(d.source, d.tokenizer, d.vocab, d.seq_len, d.val_fraction, d.split_seed)


class Arm:
    """Everything needed to train one variant with one seed on one mesh."""

    def __init__(self, name: str, c: ml_collections.ConfigDict, data: TextData, mesh: Mesh):
        tokenizer = data.tokenizer
        if tokenizer.vocab_size > c.model.vocab:
            raise ValueError(
                f"model.vocab = {c.model.vocab} embedding rows cannot hold {tokenizer.vocab_size} "
                "token ids "
                f"(mask included): set model.vocab={-(-tokenizer.vocab_size // 8) * 8}"
            )
        self.name, self.c, self.data, self.mesh = name, c, data, mesh
        self.objective = objectives.from_config(c, tokenizer.n_data, tokenizer.eos_id)
        # The same architecture for every objective; only the attention mask follows from what the
        # objective may see.
        self.model = transformer.from_config(c, self.objective.attention, self.objective.block)
        self.program = Program(c, self.model, self.objective, mesh)
        self.state: TrainState | None = None
        self._train: Any = None
        self._eval: Any = None

    @property
    def trained(self) -> TrainState:
        """The state after training. Raises RuntimeError before `loop.fit` has run."""
        if self.state is None:
            raise RuntimeError(f"arm {self.label} has not been trained: call fdp.loop.fit first")
        return self.state

    @property
    def label(self) -> str:
        """Arm and seed, the name of its checkpoint folder."""
        return f"{self.name}-s{self.c.seeds[0]}"

    def head_rows(self) -> int:
        """Rows of the whole mesh on which one train step runs the head."""
        mesh = self.c.mesh
        return self.program.head_rows() * mesh.dp * mesh.ep * mesh.cp * self.c.train.microbatches

    def step_flops(self) -> int:
        """Model FLOPs of one train step on the whole mesh (convention: fdp.cost.flops)."""
        return flops.train_step(self.c, self.head_rows())

    def place(self, tokens_BxL: np.ndarray) -> jax.Array:
        """A host batch onto the mesh, sequences over (dp, ep) and positions over cp."""
        return jax.device_put(tokens_BxL, tokens_sharding(self.mesh))

    def abstract_step_arguments(self) -> tuple[Any, jax.ShapeDtypeStruct]:
        """Shapes and shardings of the train step's arguments."""
        shape = (self.c.train.batch, self.c.data.seq_len)
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=tokens_sharding(self.mesh))
        return self.program.layout.abstract_state(), tokens

    def init(self) -> TrainState:
        """A fresh training state."""
        return self.program.init(self.c.seeds[0])

    def train_function(self) -> Any:
        """The train step compiled for this mesh, once: (state, tokens_BxL) → (state, metrics)."""
        if self._train is None:
            self._train = (
                self.program.jit_train_step().lower(*self.abstract_step_arguments()).compile()
            )
        return self._train

    def eval_function(self) -> Any:
        """The evaluation step: (params, tokens_BxL, batch index) → mean loss."""
        if self._eval is None:
            self._eval = jax.jit(self.program.eval_step)
        return self._eval
