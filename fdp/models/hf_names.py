"""Which tensors of a Hugging Face checkpoint our arrays are made of.

Names are those of checkpoints, with one tensor for each expert. Rotary positions turn the two
halves of a head on both sides, so no projection is permuted.

Legend: D width, H query heads, K key/value heads, C head_dim, F FFN hidden, E experts, V
vocabulary."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdp.models.hf_config import FAMILIES, Family

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Naming:
    """How one of our arrays is made of tensors.

    `name`: a template that the values of the leading dims fill in. `lead`: these values, such as
    the numbers of the layers. `tail`: the other dims. `order`: for every dim of a tensor the dims
    of the tail that it flattens. `scale`: our values over the tensor's."""

    name: str
    lead: tuple[Sequence[Any], ...]
    tail: tuple[int, ...]
    order: tuple[tuple[int, ...], ...]
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our array."""
        return (*map(len, self.lead), *self.tail)

    @property
    def tensor(self) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(math.prod(self.tail[d] for d in dims) for dims in self.order)

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index of the leading dims, name of the tensor there)."""
        for at in itertools.product(*(range(len(values)) for values in self.lead)):
            yield at, self.at(at)

    def at(self, index: Sequence[int]) -> str:
        """Name of the tensor at an index of the leading dims."""
        return self.name.format(*(v[i] for v, i in zip(self.lead, index, strict=True)))

    def read(self, tensors: Mapping[str, Any], box: Box) -> np.ndarray:
        """A block of our array, float32. Only the rows of the tensors that it needs are read."""
        spans = [range(n)[s] for s, n in zip(box, self.shape, strict=True)]
        lead, tail = spans[: len(self.lead)], spans[len(self.lead) :]
        block = np.empty([len(s) for s in spans], np.float32)
        for at in itertools.product(*map(enumerate, lead)):
            name = self.at([i for _, i in at])
            block[tuple(place for place, _ in at)] = self._part(tensors[name], tail)
        return block if self.scale == 1.0 else block * np.float32(self.scale)

    def _part(self, tensor: Any, tail: Sequence[range]) -> np.ndarray:
        """The block of one tensor, in the order of our dims."""
        cut, sizes, inner = [], [], [slice(None)] * len(tail)
        for first, *rest in self.order:
            step = math.prod(self.tail[d] for d in rest)
            span = tail[first]
            cut.append(slice(span.start * step, span.stop * step))
            sizes += [len(span), *(self.tail[d] for d in rest)]
            for d in rest:
                inner[d] = slice(tail[d].start, tail[d].stop)
        dims = [d for group in self.order for d in group]
        whole = np.asarray(tensor[tuple(cut)]).reshape(sizes).transpose(np.argsort(dims))
        return whole[tuple(inner)].astype(np.float32)

    def write(self, value: np.ndarray) -> np.ndarray:
        """The tensor, float32, of our values at one index of the leading dims."""
        dims = [d for group in self.order for d in group]
        value = value if self.scale == 1.0 else value / np.float32(self.scale)
        return np.ascontiguousarray(value.transpose(dims).reshape(self.tensor))


SAME, TURNED = ((0,),), ((1,), (0,))


def rules(kind: str, model: Mapping[str, Any]) -> dict[str, Naming]:
    """The rule of every array of a model of type `kind`, by its path, such as
    "params/layers/attention/w_q". Where a dense checkpoint is upcycled, routers have none."""
    family, moe, D, V = FAMILIES[kind], model["moe"], model["width"], model["vocab"]
    first, every = (moe["first_dense"], moe["every"]) if moe["experts"] else (0, 1)
    scale = math.sqrt(D) if model["tied"] else 1.0  # our tied head divides by √D
    found = {
        "params/embed/table": Naming("model.embed_tokens.weight", (), (V, D), ((0,), (1,))),
        "params/norm/scale": Naming("model.norm.weight", (), (D,), SAME, scale),
    }
    if not model["tied"]:
        found["params/head/w"] = Naming("lm_head.weight", (), (D, V), TURNED)
    stacks = {"lead": range(first)} if first else {}
    for b in range(every):
        name = "layers" if every == 1 else f"layers/{b}"
        stacks[name] = range(first + b, model["layers"], every)
    for name, layers in stacks.items():
        routed = moe["experts"] and name != "lead" and (every == 1 or name == f"layers/{every - 1}")
        block = _attention(model, layers)
        block |= _experts(family, model, layers) if routed else _ffn(model, layers)
        found |= {path.replace("/", f"/{name}/", 1): rule for path, rule in block.items()}
    return found


def _attention(m: Mapping[str, Any], layers: range) -> dict[str, Naming]:
    """Attention and both norms of a block."""
    D, H, K, C = m["width"], m["heads"], m["kv_heads"], m["head_dim"]
    of, lead, both = "model.layers.{0}.", (layers,), (layers, ("k", "v"))
    into = ((1, 2), (0,))
    found = {
        "w_q": Naming(of + "self_attn.q_proj.weight", lead, (D, H, C), into),
        "w_kv": Naming(of + "self_attn.{1}_proj.weight", both, (D, K, C), into),
        "w_o": Naming(of + "self_attn.o_proj.weight", lead, (H, C, D), ((2,), (0, 1))),
    }
    if m["bias"]:
        found["b_q"] = Naming(of + "self_attn.q_proj.bias", lead, (H, C), ((0, 1),))
        found["b_kv"] = Naming(of + "self_attn.{1}_proj.bias", both, (K, C), ((0, 1),))
    if m["qk_norm"]:
        for one, heads in (("q_norm", H), ("k_norm", K)):
            tail, order = ((heads, C), ((0, 1),)) if m["joint_norm"] else ((C,), SAME)
            found[f"{one}/scale"] = Naming(of + f"self_attn.{one}.weight", lead, tail, order)
    norms = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    return {f"params/attention/{path}": rule for path, rule in found.items()} | {
        f"params/{ours}_norm/scale": Naming(of + f"{theirs}.weight", lead, (D,), SAME)
        for ours, theirs in norms.items()
    }


def _ffn(m: Mapping[str, Any], layers: range) -> dict[str, Naming]:
    """A dense FFN."""
    D, F, of = m["width"], m["ffn"], "model.layers.{0}.mlp."
    into = (layers, ("gate", "up"))
    return {
        "params/mlp/w_in": Naming(of + "{1}_proj.weight", into, (D, F), TURNED),
        "params/mlp/w_out": Naming(of + "down_proj.weight", (layers,), (F, D), TURNED),
    }


def _experts(family: Family, m: Mapping[str, Any], layers: range) -> dict[str, Naming]:
    """Router, experts and shared experts; copies of the dense FFN where the checkpoint is dense."""
    moe, D, (gate, up, down) = m["moe"], m["width"], family.parts
    E, F = moe["experts"], moe["ffn"]
    of = "model.layers.{0}." + family.block + "."
    one = of if family.routing is None else of + "experts.{1}."
    each = (layers, range(E))
    found = {
        "params/mlp/w_in": Naming(one + "{2}.weight", (*each, (gate, up)), (D, F), TURNED),
        "params/mlp/w_out": Naming(one + f"{down}.weight", each, (F, D), TURNED),
    }
    if family.routing is not None:
        found["params/mlp/router/w"] = Naming(of + "gate.weight", (layers,), (D, E), TURNED)
    if moe["bias"]:
        bias = of + "gate.e_score_correction_bias"
        found["state/mlp/router/bias"] = Naming(bias, (layers,), (E,), SAME)
    if moe["shared"]:
        if moe["shared_gate"]:
            gate_of = of + f"{family.shared}_gate.weight"
            found["params/mlp/shared_gate"] = Naming(gate_of, (layers,), (D, 1), TURNED)
        wide, of = F * moe["shared"], of + family.shared + "."
        into = (layers, (gate, up))
        found["params/mlp/shared_in"] = Naming(of + "{1}.weight", into, (D, wide), TURNED)
        found["params/mlp/shared_out"] = Naming(of + f"{down}.weight", (layers,), (wide, D), TURNED)
    return found
