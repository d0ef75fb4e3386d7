"""FLOPs of the models, to the unit.

Convention, printed with every MFU: matrix products only, 2·m·n·k each; attention over all S keys (a
causal mask is not discounted); the head on the rows it really runs on; backward = every product
twice; recomputation not counted."""

from typing import TYPE_CHECKING

from fdp.models.shape import ModelShape

if TYPE_CHECKING:
    from fdp.experiment import Experiment

CONVENTION = (
    "model FLOPs: matmuls only, full attention, head on the rows it runs on, backward 2x forward, "
    "no recompute"
)


def layer_forward(m: ModelShape, length: int) -> int:
    """Forward FLOPs of one block on one sequence of `length` positions, without modulation."""
    D, C, H, K, F = m.width, m.head_dim, m.heads, m.kv_heads, m.ffn
    projections = 2 * D * C * (2 * H + 2 * K)  # q, o; k, v
    scores = 4 * length * H * C  # q·k and p·v
    return length * (projections + scores + 6 * D * F)


def noise_forward(m: ModelShape, features: int = 64) -> tuple[int, int]:
    """(embedding, modulations) FLOPs of time conditioning on one sequence; (0, 0) without it."""
    if not m.time_conditioning:
        return 0, 0
    return 2 * features * features, m.layers * 2 * 2 * features * 3 * m.width


def head_forward(m: ModelShape, rows: int) -> int:
    """Forward FLOPs of the vocabulary head on `rows` rows."""
    return 2 * rows * m.width * m.vocab


def forward(e: "Experiment", batch: int, head_rows: int) -> int:
    """Forward FLOPs of `batch` sequences, with the head on `head_rows` rows in all."""
    m, length = e.model.shape, e.input_length
    per_sequence = m.layers * layer_forward(m, length) + sum(noise_forward(m))
    return batch * per_sequence + head_forward(m, head_rows)


def train_step(e: "Experiment", head_rows: int) -> int:
    """FLOPs of one train step on the whole mesh.

    Three times the forward, except the noise embedding: its input is data, so one of its backward
    products is absent.
    """
    embedding = e.fit.batch * noise_forward(e.model.shape)[0]
    return 3 * forward(e, e.fit.batch, head_rows) - embedding


def parameters(m: ModelShape, features: int = 64) -> int:
    """Parameter count."""
    D, C, H, K = m.width, m.head_dim, m.heads, m.kv_heads
    layer = 2 * D * C * (H + K) + 3 * D * m.ffn + 2 * D + (2 * C if m.qk_norm else 0)
    layer += m.conv * D
    if m.bias:
        layer += C * (H + 2 * K)
    if m.time_conditioning:
        layer += 2 * features * 3 * D
    tables = (1 if m.tied else 2) * m.vocab * D
    return m.layers * layer + tables + D + (features * features if m.time_conditioning else 0)


def dit_parameters(
    layers: int, width: int, patch: int, channels: int = 4, classes: int = 1000
) -> int:
    """Trained parameters of DiT with learned variances (Peebles & Xie 2023, arXiv 2212.09748),
    biases included.

    A block holds attention, an FFN of 4·width and six adaptive modulations; positions are fixed
    sines."""
    D, pixels = width, patch * patch * channels
    block = 4 * D * D + 4 * D + 8 * D * D + 5 * D + 6 * D * D + 6 * D
    embeddings = pixels * D + D + (256 * D + D + D * D + D) + (classes + 1) * D
    final = 2 * D * D + 2 * D + 2 * pixels * D + 2 * pixels
    return layers * block + embeddings + final


def dit_forward(layers: int, width: int, patch: int, side: int = 32, channels: int = 4) -> int:
    """Matmul FLOPs of one forward pass on a latent of side·side: twice the multiply-adds that DiT's
    authors report.
    """
    tokens, D, pixels = (side // patch) ** 2, width, patch * patch * channels
    block = tokens * 12 * D * D + 2 * tokens * tokens * D + 6 * D * D
    ends = tokens * pixels * D + 256 * D + D * D + 2 * D * D + tokens * 2 * pixels * D
    return 2 * (layers * block + ends)


def ttt_linear_forward(width: int, heads: int, chunk: int) -> int:
    """Matmul FLOPs of one token in a TTT-Linear layer in its dual form (Sun et al. 2024, arXiv
    2407.04620, §2.5).

    Four projections of the width; then per head of size C, with one gradient step a chunk: K·W, Q·W
    and the update of W (C² each), and inside the chunk the scores Q·Kᵀ and their product with the
    gradients (chunk·C each)."""
    size = width // heads
    return 2 * (4 * width * width + heads * (3 * size * size + 2 * chunk * size))
