"""What the config.json of a Hugging Face checkpoint says in our keys, and the reverse.

A field that changes the function in a way that our model lacks is refused by name."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fdp.keys import UserError, closest, shown

Values = dict[str, Any]
REQUIRED: Any = object()
BIAS_STEP = 1e-3  # model.moe.bias of a checkpoint whose router has a selection bias

# Fields of config.json that do not change the function.
SILENT = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "model_type"),
    *("_name_or_path", "tokenizer_class", "use_cache", "id2label", "label2id", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "ep_size"),
    *("initializer_range", "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha"),
    "seq_aux",
}
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
ROPE = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}
LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

# Keys of `model` that no checkpoint sets, with the only value that a checkpoint can express.
PLAIN = {
    "conv": 0,
    "time_conditioning": False,
    "moe.choice": "token",
    "moe.noise": "none",
    "moe.capacity": 0.0,
}


@dataclass
class Fields:
    """The fields of a config.json, with those that were read and what is wrong with them.

    `ignore`: fields that the user says to ignore."""

    values: Mapping[str, Any]
    ignore: Collection[str] = ()
    read: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def get(self, *names: str, default: Any = REQUIRED) -> Any:
        """The first of `names` that has a value."""
        self.read |= set(names)
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is REQUIRED:
            self.problems.append(f"{' or '.join(names)} is missing")
            return 1
        return default

    def size(self, *names: str, default: Any = REQUIRED) -> int:
        """As `get`, a whole number of at least 1."""
        value = self.get(*names, default=default)
        if isinstance(value, int) and value >= 1:
            return value
        self.problems.append(f"{' or '.join(names)}={shown(value)} is no whole number from 1")
        return 1

    def only(self, name: str, *allowed: Any) -> None:
        """Note a problem unless the field is absent or one of `allowed`."""
        value = self.get(name, default=None)
        if value is not None and value not in allowed and name not in self.ignore:
            self.problems.append(
                f"{name}={shown(value)} is not supported, only {' or '.join(map(str, allowed))}"
            )

    def finish(self) -> None:
        """Raises UserError, naming every field that is missing, unsupported or not known."""
        rest = self.values.keys() - self.read - SILENT - set(self.ignore)
        unknown = sorted(name for name in rest if self.values[name] not in NOTHING)
        lines = [*self.problems, *(f"{n}={shown(self.values[n])} is not known" for n in unknown)]
        if lines:
            fix = f". Fix: pass --ignore={','.join(unknown)} if the function stays the same"
            kind = self.values["model_type"]
            raise UserError(f"config.json of {kind}: {'; '.join(lines)}{fix if unknown else ''}")


# From config.json to our keys
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A model type. `routing`: reads the fields of the experts, None for a dense one. `block`: name
    of an FFN with experts in a layer, `parts`: of the gate, up and down matrices of an expert,
    `shared`: of the experts that every token visits. `theta`: base of the rotary wavelengths where
    config.json has none. `own`: what its attention has: bias, qk_norm, joint_norm, window."""

    routing: Callable[[Fields], Values] | None = None
    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"
    theta: float = 1e4
    own: tuple[str, ...] = ()


def section(config: Mapping[str, Any], ignore: Collection[str] = ()) -> Values:
    """The values that a config.json gives to the `model` section of a config; "moe" holds those of
    `model.moe`.

    Raises UserError for a model type that is not known, and for fields that are missing or change
    the function in a way that our model lacks; all of them are named."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type={kind!r} is unknown: {closest(str(kind), FAMILIES)}"
        )
    family, f = FAMILIES[kind], Fields(config, ignore)
    values = _dense(f, family)
    moe = {"experts": 0} if family.routing is None else family.routing(f)
    f.finish()
    return values | {"moe": moe}


def _dense(f: Fields, family: Family) -> Values:
    """Everything but the experts."""
    width, heads = f.size("hidden_size"), f.size("num_attention_heads")
    f.only("hidden_act", "silu")
    for name in ("attention_bias", "mlp_bias"):
        f.only(name, False)
    for name in ("attention_dropout", "clip_qkv"):
        f.only(name, 0)
    return {
        "layers": f.size("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": f.size("num_key_value_heads", default=heads),
        "head_dim": f.size("head_dim", default=width // heads),
        "ffn": f.size("intermediate_size"),
        "vocab": f.size("vocab_size"),
        "epsilon": f.get("rms_norm_eps"),
        "qk_norm": "qk_norm" in family.own,
        "joint_norm": "joint_norm" in family.own,
        "bias": "bias" in family.own and bool(f.get("qkv_bias", default=True)),
        "tied": bool(f.get("tie_word_embeddings", default=False)),
        "window": _window(f) if "window" in family.own else 0,
    } | _rope(f, family)


def _rope(f: Fields, family: Family) -> Values:
    """Base and scaling of the rotary positions, from old and new fields."""
    given = dict(f.get("rope_parameters", "rope_scaling", default={}))
    kind = given.get("rope_type", given.get("type", "default"))
    base = f.get("rope_theta", default=given.get("rope_theta", family.theta))
    if kind not in ("default", "linear"):
        f.problems.append(f"rope_type={kind!r} is not supported, only default or linear")
    share = f.get("partial_rotary_factor", default=given.get("partial_rotary_factor", 1))
    if share != 1:
        f.problems.append(f"partial_rotary_factor={share} is not supported, only 1")
    if kind in ("default", "linear") and (rest := given.keys() - ROPE):
        f.problems.append(f"{', '.join(sorted(rest))} of rope_parameters is not known")
    return {
        "rope_base": float(base),
        "rope_scaling": float(given.get("factor", 1.0)) if kind == "linear" else 1.0,
    }


def _window(f: Fields) -> int:
    """Width of the sliding window, 0 for none: one for all layers."""
    width, used = f.get("sliding_window", default=0), f.get("use_sliding_window", default=True)
    layers, after = f.size("num_hidden_layers"), f.get("max_window_layers", default=0)
    slides = [i >= after for i in range(layers)]
    types = f.get("layer_types", default=[("full", "sliding")[s] + "_attention" for s in slides])
    kinds = {kind if width and used else kind.replace("sliding", "full") for kind in types}
    if kinds not in ({"full_attention"}, {"sliding_attention"}):
        f.problems.append(f"layers of {', '.join(sorted(kinds))} are not supported")
    return 0 if kinds == {"full_attention"} else width


def _moe(f: Fields, experts: int, ffn: int, sparse: Sequence[bool], **more: Any) -> Values:
    """Values of `model.moe`. `sparse`: whether each layer has experts."""
    if not any(sparse):
        return {"experts": 0}
    choices = itertools.product(range(1, len(sparse) + 1), range(len(sparse)))
    found = (choice for choice in choices if _placed(len(sparse), *choice) == list(sparse))
    every, first_dense = next(found, (0, 0))
    if not every:
        layers = [i for i, s in enumerate(sparse) if s]
        f.problems.append(f"experts in layers {shown(layers)} do not lie at equal distances")
    values = {"score": "softmax", "normalise": True, "scale": 1.0, "bias": 0.0}
    values |= {"shared": 0, "shared_gate": False}
    values |= {"groups": 1, "kept": 1, "best": 1, "topk": f.size("num_experts_per_tok")}
    return values | {
        "experts": experts,
        "ffn": ffn,
        "first_dense": first_dense,
        "every": every,
        **more,
    }


def _placed(layers: int, every: int, first_dense: int) -> list[bool] | None:
    """Which layers have experts; None where the rest is not whole periods."""
    if (layers - first_dense) % every:
        return None
    return [i >= first_dense and (i - first_dense + 1) % every == 0 for i in range(layers)]


def _mixtral(f: Fields) -> Values:
    f.only("router_jitter_noise", 0)
    all_layers = [True] * f.size("num_hidden_layers")
    return _moe(f, f.size("num_local_experts"), f.size("intermediate_size"), all_layers)


def _olmoe(f: Fields) -> Values:
    all_layers = [True] * f.size("num_hidden_layers")
    normalise = f.get("norm_topk_prob", default=False)
    ffn = f.size("intermediate_size")
    return _moe(f, f.size("num_experts"), ffn, all_layers, normalise=normalise)


def _qwen(f: Fields) -> Values:
    f.only("use_sliding_window", False)
    experts = f.size("num_experts", "num_local_experts")
    step = f.size("decoder_sparse_step", default=1)
    without, layers = f.get("mlp_only_layers", default=[]), range(f.size("num_hidden_layers"))
    sparse = [i not in without and (i + 1) % step == 0 for i in layers]
    ffn, wide = f.size("moe_intermediate_size"), f.get("shared_expert_intermediate_size", default=0)
    if wide % ffn:
        f.problems.append(
            f"shared_expert_intermediate_size={wide} is no multiple of {ffn}, an expert"
        )
    more = {"shared": wide // ffn, "shared_gate": wide > 0}
    return _moe(f, experts, ffn, sparse, normalise=f.get("norm_topk_prob", default=False), **more)


def _deepseek(f: Fields, methods: tuple[str, ...], score: str) -> Values:
    """DeepSeek's gates. `methods`: its names of how experts are chosen."""
    if any(f.get(name, default=0) for name in LATENT[:2]):
        f.problems.append("multi-head latent attention (kv_lora_rank) is not supported")
        f.read |= {*LATENT, "rope_interleave"}
    method = f.get("topk_method", default=methods[0])
    f.only("topk_method", *methods)
    f.only("scoring_func", score)
    experts, first = f.size("n_routed_experts"), f.get("first_k_dense_replace", default=0)
    step, layers = f.size("moe_layer_freq", default=1), range(f.size("num_hidden_layers"))
    sparse = [i >= first and i % step == 0 for i in layers]
    values = {
        "score": score,
        "shared": f.get("n_shared_experts", default=0),
        "normalise": f.get("norm_topk_prob", default=False),
        "scale": float(f.get("routed_scaling_factor", default=1.0)),
        "bias": BIAS_STEP if method == "noaux_tc" else 0.0,
    }
    groups, kept = f.size("n_group", default=1), f.size("topk_group", default=1)
    if method != "greedy" and groups > 1:
        best = 2 if method == "noaux_tc" else 1
        values |= {"groups": groups, "kept": kept, "best": best}
    return _moe(f, experts, f.size("moe_intermediate_size"), sparse, **values)


def _deepseek_v1(f: Fields) -> Values:
    return _deepseek(f, ("greedy",), "softmax")


def _deepseek_v2(f: Fields) -> Values:
    """Where gates are normalised, published implementations differ in whether they are scaled."""
    f.only("norm_topk_prob", False)
    return _deepseek(f, ("greedy", "group_limited_greedy"), "softmax")


def _deepseek_v3(f: Fields) -> Values:
    return _deepseek(f, ("noaux_tc",), "sigmoid")


# Of the deepseek types only plain attention, which the classes of transformers do not have.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(own=("window",)),
    "qwen2": Family(own=("bias", "window")),
    "qwen3": Family(own=("qk_norm", "window")),
    "mixtral": Family(_mixtral, "block_sparse_moe", ("w1", "w3", "w2"), theta=1e6, own=("window",)),
    "olmoe": Family(_olmoe, own=("qk_norm", "joint_norm")),
    "qwen2_moe": Family(_qwen, shared="shared_expert", own=("bias", "window")),
    "qwen3_moe": Family(_qwen, own=("qk_norm", "window")),
    "deepseek": Family(_deepseek_v1),
    "deepseek_v2": Family(_deepseek_v2),
    "deepseek_v3": Family(_deepseek_v3),
    "dots1": Family(_deepseek_v3, own=("qk_norm", "window")),
}


# From our keys to config.json
# --------------------------------------------------------------------------------------------------


def config_of(kind: str, model: Mapping[str, Any]) -> Values:
    """The config.json of model type `kind` for our `model` section, which may be nested or have
    other keys too. Raises UserError, naming them, for values that the type cannot express."""
    if kind not in FAMILIES:
        raise UserError(f"family {kind!r} is unknown: {closest(kind, FAMILIES)}")
    m, moe = model, model["moe"]
    found: Values = {
        "model_type": kind,
        "num_hidden_layers": m["layers"],
        "hidden_size": m["width"],
        "num_attention_heads": m["heads"],
        "num_key_value_heads": m["kv_heads"],
        "head_dim": m["head_dim"],
        "intermediate_size": m["ffn"],
        "vocab_size": m["vocab"],
        "rms_norm_eps": m["epsilon"],
        "rope_theta": m["rope_base"],
        "tie_word_embeddings": m["tied"],
        "hidden_act": "silu",
    }
    if m["rope_scaling"] != 1:
        found["rope_scaling"] = {"rope_type": "linear", "factor": m["rope_scaling"]}
    if "window" in FAMILIES[kind].own:  # stated in any case, as the classes' defaults differ
        found |= {"sliding_window": m["window"] or None, "use_sliding_window": m["window"] > 0}
        found["max_window_layers"] = 0 if m["window"] else m["layers"]
    if moe["experts"]:
        found |= _moe_fields(kind, moe, m["layers"])
    check_same(found, model)
    return found


def _moe_fields(kind: str, moe: Mapping[str, Any], layers: int) -> Values:
    """Fields of the experts."""
    found = {
        "num_experts_per_tok": moe["topk"],
        "moe_intermediate_size": moe["ffn"],
        "norm_topk_prob": moe["normalise"],
    }
    if kind in ("mixtral", "olmoe"):
        name = {"mixtral": "num_local_experts", "olmoe": "num_experts"}[kind]
        found |= {name: moe["experts"], "intermediate_size": moe["ffn"]}
        left_out = ("moe_intermediate_size", *(("norm_topk_prob",) if kind == "mixtral" else ()))
        return {name: value for name, value in found.items() if name not in left_out}
    if kind.startswith("qwen"):
        placed = _placed(layers, moe["every"], moe["first_dense"]) or []
        dense = [i for i, s in enumerate(placed) if not s]
        return found | {
            "num_experts": moe["experts"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "shared_expert_intermediate_size": moe["shared"] * moe["ffn"],
        }
    method = "group_limited_greedy" if moe["groups"] > 1 else "greedy"
    method = "noaux_tc" if moe["bias"] else method
    return found | {
        "n_routed_experts": moe["experts"],
        "n_shared_experts": moe["shared"],
        "first_k_dense_replace": moe["first_dense"],
        "routed_scaling_factor": moe["scale"],
        "scoring_func": moe["score"],
        "topk_method": method,
        "n_group": moe["groups"],
        "topk_group": moe["kept"],
    }


def check_same(config: Mapping[str, Any], model: Mapping[str, Any], ignore: Any = ()) -> None:
    """Raises UserError, naming the keys, where a config.json does not describe the `model` section
    of a config."""
    want, have = flat(section(config, ignore)) | PLAIN, PLAIN | flat(model)
    if not want["moe.experts"]:
        want = {name: want[name] for name in want if name in have and not name.startswith("moe.")}
        want["moe.experts"] = 0
    elif "moe_intermediate_size" not in config:
        del want["ffn"]  # no layer is dense
    pairs = {name: (have.get(name), value) for name, value in want.items()}
    pairs["moe.bias"] = (bool(have.get("moe.bias")), bool(want.get("moe.bias")))
    wrong = [f"model.{name}={shown(a)}, not {shown(b)}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise UserError(f"a {config['model_type']} checkpoint has {'; '.join(wrong)}")


def flat(values: Mapping[str, Any]) -> Values:
    """The `model` section with dotted names, such as "moe.experts"."""
    moe = {f"moe.{name}": value for name, value in values["moe"].items()}
    return {name: value for name, value in values.items() if name != "moe"} | moe


def upcycled(model: Mapping[str, Any], experts: int, topk: int) -> Values:
    """The section of a dense checkpoint whose FFNs become experts: every expert starts as a copy of
    the FFN, and gates sum to 1, so the function stays the same (Komatsuzaki et al. 2023).

    Raises UserError where the model has experts already."""
    if model["moe"]["experts"]:
        raise UserError(
            f"the checkpoint has {model['moe']['experts']} experts already: leave out --experts"
        )
    placed = [True] * model["layers"]
    config = {"num_experts_per_tok": topk}
    return {**model, "moe": _moe(Fields(config), experts, model["ffn"], placed)}
