"""The configuration keys of core with their units and defaults, and the validation of a config
before anything starts.

Keys that only one topic reads are declared in the same form in `fdp/topics/<name>/settings.py`.
Imports neither jax nor flax: this file is read first."""

import hashlib
import importlib
import importlib.util
import json
import math
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import ml_collections

from fdp import config_images, config_pipeline, config_sizes
from fdp.config_images import IMAGE_MODELS, IMAGE_OBJECTIVES, IMAGE_SOURCES
from fdp.keys import (
    Key,
    Section,
    UserError,
    at_least,
    choice,
    closest,
    count,
    flag,
    integers,
    positive,
    section,
    shown,
    span,
    string,
    within,
)

VARIANTS = ("cpu", "tiny", "full", "h100", "pod")

# Keys that may differ between two starts in one workdir: none of them changes what is computed.
FREE_KEYS = ("mesh", "context", "pipeline", "checkpoint", "log", "hardware", "train.zero")

TOKEN_OBJECTIVES = ("autoregressive", "mdlm", "sedd_absorbing", "sedd_uniform", "block_diffusion")
OBJECTIVES = (*TOKEN_OBJECTIVES, *IMAGE_OBJECTIVES)
SCHEDULES = ("linear", "loglinear", "md4_cosine", "mdlm_cosine", "bd3_cosine", "geometric")
PACKINGS = ("stream", "documents")
PLANS = ("all_gather", "ring", "ulysses", "usp", "batch")

MAX_VOCAB = 2**20  # ids of a tokenizer that is trained here; published ones have at most 2**18

TOP = section(
    topic=string("", "folder under fdp/topics"),
    variant=choice("cpu", VARIANTS, "size of the study"),
    seeds=integers(0, (0,), "one run of every arm per seed"),
)

MESH = section(  # degrees of the mesh axes
    pp=count(1, "pipeline stages"),
    dp=count(1, "data parallelism"),
    ep=count(1, "expert parallelism, part of the data axes"),
    cp=count(1, "context parallelism"),
    tp=count(1, "tensor parallelism"),
)

MODEL = section(
    layers=count(4, "blocks, divisible by pp"),
    width=count(128, "D, residual stream"),
    heads=count(4, "query heads, divisible by tp"),
    kv_heads=count(4, "key/value heads (GQA), divisible by tp, divides heads"),
    head_dim=count(32, "even (rotary pairs)"),
    ffn=count(344, "F, SwiGLU hidden width, divisible by tp"),
    vocab=count(1024, "embedding rows ≥ token ids (mask included), divisible by tp"),
    rope_base=within("(1, inf)", 10_000.0, "base of the rotary wavelengths"),
    rope_scaling=within("[1, inf)", 1.0, "positions are divided by this; 1 = none"),
    epsilon=positive(1e-6, "added to the mean square in norms"),
    qk_norm=flag(False, "RMSNorm on queries and keys"),
    joint_norm=flag(False, "that norm is over all heads together, not over each"),
    bias=flag(False, "biases on q, k and v"),
    tied=flag(False, "the head is the embedding"),
    conv=at_least(0, 0, "width of a causal convolution before q, k, v; 0 = none", "positions"),
    time_conditioning=flag(False, "adaptive norms fed with the noise level"),
    dtype=choice(
        "float32", ("float32", "bfloat16"), "of compute; parameters and logits are always float32"
    ),
    remat=choice("none", ("none", "dots", "full"), "what the backward pass recomputes"),
    sequence_parallel=flag(False, "between blocks, shard the sequence over tp (Megatron SP)"),
    window=at_least(0, 0, "attention to keys less than this far away; 0 = no limit", "positions"),
    kind=choice("transformer", ("transformer", *IMAGE_MODELS), "of tokens, or of images"),
)

# A mixture of experts in place of the FFN; experts lie over ep, their hidden width over tp.
MOE = section(
    experts=at_least(0, 0, "E, routed experts, divisible by ep; 0 = dense"),
    topk=count(2, "experts of a token"),
    ffn=count(128, "hidden width of an expert, divisible by tp"),
    shared=at_least(0, 0, "experts that every token visits"),
    shared_gate=flag(False, "a sigmoid of the token weighs them"),
    first_dense=at_least(0, 0, "first layers without experts"),
    every=count(1, "of the others, every so many-th layer has experts"),
    choice=choice("token", ("token", "expert"), "tokens choose experts, or experts their tokens"),
    low=within("[0, inf)", 0.0, "expert choice: experts a token where all is masked; 0 = topk"),
    high=within("[0, inf)", 0.0, "expert choice: experts a token where nothing is; 0 = topk"),
    score=choice("softmax", ("softmax", "sigmoid"), "of the router's logits"),
    normalise=flag(True, "token choice: the gates of a token sum to `scale`"),
    scale=positive(1.0, "of the gates"),
    groups=count(1, "groups of experts, divides experts"),
    kept=count(1, "groups that a token may visit"),
    best=count(1, "scores of a group that decide whether it is kept"),
    noise=choice(
        "none",
        ("none", "additive", "film", "low_rank", "group"),
        "how the router reads the share of masked tokens",
    ),
    dispatch=choice("flat", ("flat", "two_level", "gather"), "how rows reach the experts over ep"),
    node=count(1, "two_level: devices of a node, divides ep"),
    capacity=within("[0, inf)", 0.0, "most pairs of an expert over its level load; 0 = dropless"),
    buffer=within("[0, inf)", 0.0, "rows of the buffers over level loads; 0 = the worst case"),
    wire=choice("same", ("same", "bfloat16"), "format of rows between devices"),
    switch=within("[0, inf)", 0.0, "coefficient of the load-balancing loss"),
    z=within("[0, inf)", 0.0, "coefficient of the loss of large logits"),
    sequence=within("[0, inf)", 0.0, "coefficient of the balance within each sequence"),
    rank=within("[0, inf)", 0.0, "coefficient of the balance of ep's ranks in each noise bin"),
    bins=count(1, "noise bins of that balance and of the logged load"),
    ranks=count(1, "parts of the experts that `rank` keeps level, such as ep"),
    bias=within("[0, inf)", 0.0, "step of the selection bias that levels the load without a loss"),
)

CONTEXT = section(  # how attention communicates over cp; none of it changes the result
    plan=choice("all_gather", PLANS, "what attention sends over cp"),
    # The other devices form a ring; ulysses takes cp.
    head_split=count(1, "usp, batch: devices that share out heads (or sequences)"),
    layout=choice(
        "contiguous", ("contiguous", "zigzag", "striped"), "which positions a device holds"
    ),
    stripe=count(1, "striped: length of a block", "positions"),
)

OBJECTIVE = section(
    name=choice("mdlm", OBJECTIVES, "what is learnt"),
    form=choice("k", ("t", "k"), "masks: k (exactly k, weight L/k) | t (continuous time)"),
    schedule=choice(
        "linear",
        SCHEDULES,
        "of the t form and of sedd_uniform (geometric there); poly<p> is α = 1 - t^p",
        pattern=r"poly\d+(\.\d+)?",
    ),
    antithetic=flag(True, "stratify k or t over the global batch"),
    block=count(16, "block_diffusion: length of a block", "tokens"),
    masked_head=flag(True, "run the head on rows that carry loss only"),
)

DATA = section(
    source=string(
        "bible",
        "bible | stdlib | bible+stdlib | markov | two_regimes | mqar | needle | induction | "
        "kjv_needle | blank | hf:<name> | path; images: openmoji | mnist | gaussians",
    ),
    tokenizer=choice(
        "bpe",
        ("byte", "bpe"),
        "bytes, byte pairs learnt from the corpus, or the path of a tokenizer.json",
        pattern=r"(?s).*\.json",
    ),
    vocab=count(1024, "token ids of bpe incl. end-of-text and mask", high=MAX_VOCAB),
    seq_len=count(64, "L", "tokens"),
    packing=choice(
        "stream", PACKINGS, "windows of one stream | attention and positions stay inside a document"
    ),
    val_fraction=within("(0, 1)", 0.05, "share of the documents or images kept for validation"),
    split_seed=at_least(0, 0, "which documents these are"),
)

TRAIN = section(
    batch=count(32, "global batch", "sequences"),
    microbatches=count(1, "gradient accumulation steps inside one train step"),
    steps=count(1000, "length of the run", "steps"),
    lr=positive(3e-3, "peak learning rate"),
    warmup=at_least(0, 50, "linear warm-up, then cosine decay to lr/10", "steps"),
    weight_decay=within("[0, inf)", 0.01, "decoupled (AdamW), times the learning rate"),
    beta2=within("[0, 1)", 0.98, "decay of the second moment"),
    clip=within("(0, inf]", 1.0, "largest global gradient norm", off=math.inf),
    zero=choice(
        0,
        (0, 1, 3),
        "0: parameters replicated over dp; 1: gathered once a step; 3: gathered layer by layer",
    ),
    nan=choice("stop", ("stop", "skip"), "both leave the state untouched; skip goes on and counts"),
)

EVAL = section(
    every=at_least(0, 250, "0 = only at the end", "steps"),
    batches=count(8, "validation batches per evaluation"),
    samples=count(4, "drawn and stored at the end", "sequences"),
)

CHECKPOINT = section(
    every=at_least(0, 250, "0 = only at the end", "steps"),
    keep=count(3, "newest checkpoints that stay"),
    allow_config_change=flag(False, "resume although the workdir was made by another config"),
)

LOG = section(
    every=count(10, "between metric rows", "steps"),
    profile=span(1, "first and last step of a profiler trace, as (5, 8); () = none", "steps"),
)

HARDWARE = section(
    topology=string(
        "", '--dry_run target, such as v5p:4x4x8 or h100:8x8; "" = the devices that are here'
    )
)

SECTIONS: dict[str, Section] = {
    "mesh": MESH,
    "model": MODEL,
    "model.moe": MOE,
    "model.image": config_images.MODEL,
    "context": CONTEXT,
    "pipeline": config_pipeline.PIPELINE,
    "objective": OBJECTIVE,
    "objective.image": config_images.OBJECTIVE,
    "data": DATA,
    "train": TRAIN,
    "eval": EVAL,
    "checkpoint": CHECKPOINT,
    "log": LOG,
    "hardware": HARDWARE,
}


def base(**sections: Section) -> ml_collections.ConfigDict:
    """Every core key with its default, and a topic's `sections`; locked. A config file starts from
    it.

    Raises ValueError for a section name that core uses."""
    if taken := sorted(sections.keys() & (SECTIONS.keys() | TOP.keys())):
        raise ValueError(f"{taken[0]!r} is a section of core: give the topic's another name")
    c = ml_collections.ConfigDict({name: key.default for name, key in TOP.items()})
    for name, keys in (SECTIONS | sections).items():
        *above, last = name.split(".")
        parent = c[above[0]] if above else c
        parent[last] = ml_collections.ConfigDict({k: key.default for k, key in keys.items()})
    return c.lock()


def lock(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Freeze the set of keys."""
    config.lock()
    return config


def topic_settings(topic: str) -> ModuleType | None:
    """`fdp.topics.<topic>.settings`, which holds SECTIONS and `check(config)`; None for a topic
    without keys of its own. Raises UserError with the closest topic for an unknown one.
    """
    if not topic:
        return None
    topics = importlib.import_module("fdp.topics")
    known = [module.name for module in pkgutil.iter_modules(topics.__path__) if module.ispkg]
    if topic not in known:
        raise UserError(f"topic={shown(topic)} is unknown: {closest(topic, known)}")
    name = f"fdp.topics.{topic}.settings"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def topic_sections(topic: str) -> Mapping[str, Section]:
    """The sections that the topic declares, for `base(**topic_sections(topic))`."""
    settings = topic_settings(topic)
    return settings.SECTIONS if settings else {}


def declared(topic: str) -> dict[str, Key]:
    """Every key of a config of this topic, by dotted name."""
    sections = SECTIONS | dict(topic_sections(topic))
    nested = {f"{name}.{k}": key for name, keys in sections.items() for k, key in keys.items()}
    return dict(TOP) | nested


def check_keys(keys: Iterable[str], topic: str = "") -> None:
    """Raise UserError naming the closest key for the first of `keys` (dotted) that is neither a key
    nor a section.
    """
    known = declared(topic)
    for key in keys:
        if key not in known and not any(k.startswith(f"{key}.") for k in known):
            raise UserError(f"unknown config key {key!r}: {closest(key, known)}")


def check_override(name: str, text: str | None, topic: str = "") -> None:
    """Raise UserError where `--config.<name>=<text>` names no key, or where `text` cannot be read
    as a value of that key. `text` None: a switch without a value."""
    check_keys([name], topic)
    known = declared(topic)
    if text is None:
        return
    if name in known:
        known[name].check(name, known[name].read(text))
    else:
        _refuse_replaced(name, text, known)


def check_variant(variant: str) -> str:
    """Return `variant` or raise UserError naming the closest one."""
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}: {closest(variant, VARIANTS)}")
    return variant


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values, for hashing, comparing and error messages."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ml_collections.ConfigDict)):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out


def digest(config: ml_collections.ConfigDict) -> str:
    """12 hex digits of a hash over all keys that change what is computed."""
    kept = {
        k: v
        for k, v in flatten(config).items()
        if not any(k == f or k.startswith(f"{f}.") for f in FREE_KEYS)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


# Validation
# --------------------------------------------------------------------------------------------------


def validate(c: ml_collections.ConfigDict) -> None:
    """Check every key of core and of the config's topic, then the conditions between keys, before
    anything starts.

    Raises UserError with the equation, the values in it and a fix."""
    if "topic" not in c:
        raise UserError("the config lacks topic: start from fdp.config.base()")
    TOP["topic"].check("topic", c.topic)
    settings = topic_settings(c.topic)
    _check_values(c)
    config_pipeline.check(c)
    _check_divisors(c)
    config_sizes.check_devices(c)
    most = config_sizes.MAX_BYTES
    config_sizes.refuse(c, most, config_sizes.amount(most))
    if c.log.profile and c.log.profile[1] > c.train.steps:
        raise UserError(
            f"log.profile={shown(tuple(c.log.profile))} ends after train.steps={c.train.steps}: "
            f"set log.profile=({min(c.log.profile[0], c.train.steps)}, {c.train.steps})"
        )
    if settings:
        try:
            settings.check(c)
        except ValueError as error:
            raise UserError(str(error)) from error


def _check_values(c: ml_collections.ConfigDict) -> None:
    """Every declared key exists, there is no other key, and every value is allowed."""
    known = declared(c.topic)
    values = _leaves(c.to_dict(), known)
    for name in values:
        if name not in known and any(key.startswith(f"{name}.") for key in known):
            _refuse_replaced(name, values[name], known)
    check_keys(values, c.topic)
    for name, key in known.items():
        if name not in values:
            _refuse_missing(name, c, known)
        key.check(name, values[name])


def _leaves(tree: Mapping[str, Any], known: Mapping[str, Key], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name. A mapping is a section, except in the place of a known key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        below = isinstance(value, dict) and name not in known
        found |= _leaves(value, known, f"{name}.") if below else {name: value}
    return found


def _refuse_replaced(name: str, value: Any, known: Mapping[str, Key]) -> None:
    first = next(key for key in known if key.startswith(f"{name}."))
    raise UserError(
        f"{name}={shown(value)} replaces a section of keys: set one of them, such as "
        f"{first}={known[first].default!r}"
    )


def _refuse_missing(name: str, c: ml_collections.ConfigDict, known: Mapping[str, Key]) -> None:
    parent = name.partition(".")[0]
    if parent != name and parent in c:
        _refuse_replaced(parent, c[parent].to_dict(), known)
    own = f"**fdp.config.topic_sections({c.topic!r})" if c.topic else ""
    raise UserError(f"the config lacks {name}: start from fdp.config.base({own})")


def _divides(what: str, value: int, by: str, divisor: int, fix: str) -> None:
    if value % divisor:
        raise UserError(f"{what} {value} is not divisible by {by} = {divisor}: {fix}")


def _next_multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _check_divisors(c: ml_collections.ConfigDict) -> None:
    """Divisibility by the degrees of the mesh, microbatches and heads."""
    m, mesh, t = c.model, c.mesh, c.train
    tp = mesh.tp
    chunks = config_pipeline.chunks_of(c)
    every = m.moe.every if m.moe.experts and mesh.pp > 1 else 1
    each = mesh.pp * chunks * every
    by = "mesh.pp" + "·chunks" * (chunks > 1) + "·moe.every" * (every > 1)
    if m.kind != "uvit":  # whose halves are shared out
        _divides("layers", m.layers, by, each, f"set model.layers={_next_multiple(m.layers, each)}")
    if mesh.pp > 1 and m.moe.experts and m.moe.first_dense:
        raise UserError(
            f"model.moe.first_dense={m.moe.first_dense} blocks before the stack lie on no stage of "
            f"mesh.pp={mesh.pp}: set model.moe.first_dense=0"
        )
    for what, key in (
        ("query heads", "heads"),
        ("key/value heads", "kv_heads"),
        ("FFN width", "ffn"),
        ("vocabulary", "vocab"),
    ):
        fix = f"set model.{key}={_next_multiple(m[key], tp)} or another mesh.tp"
        _divides(what, m[key], "mesh.tp", tp, fix)
    if m.moe.experts:
        _check_moe(c)
    fix = "set model.kv_heads to a divisor of model.heads"
    _divides("query heads", m.heads, "model.kv_heads", m.kv_heads, fix)
    per_step = mesh.dp * mesh.ep * t.microbatches
    equation = f"dp·ep·microbatches = {mesh.dp}·{mesh.ep}·{t.microbatches}"
    fix = f"set train.batch={_next_multiple(t.batch, per_step)} or another mesh.dp"
    _divides("global batch", t.batch, equation, per_step, fix)
    if t.zero:
        fix = f"set model.width={_next_multiple(m.width, mesh.dp)}"
        _divides("model width", m.width, "mesh.dp (ZeRO)", mesh.dp, fix)
    if m.kind in IMAGE_MODELS:
        config_images.check(c)
    else:
        _check_tokens(c)


def _check_tokens(c: ml_collections.ConfigDict) -> None:
    """Conditions on a model of tokens: its objective and data, rotary positions, the sequence."""
    m, mesh, seq = c.model, c.mesh, c.data.seq_len
    if c.objective.name in IMAGE_OBJECTIVES or c.data.source in IMAGE_SOURCES[:-1]:
        raise UserError(
            f"model.kind={m.kind!r} reads tokens, which objective.name={c.objective.name!r} and "
            f"data.source={c.data.source!r} are not for both: set model.kind='dit', or an "
            "objective and data of tokens"
        )
    _divides("head_dim", m.head_dim, "rotary pairs", 2, f"set model.head_dim={m.head_dim + 1}")
    split = mesh.cp * (mesh.tp if m.sequence_parallel else 1)
    by = "mesh.cp·mesh.tp (sequence_parallel)" if m.sequence_parallel else "mesh.cp"
    fix = f"set data.seq_len={_next_multiple(seq, split)}"
    _divides("sequence length", seq, by, split, fix)
    if c.objective.name == "block_diffusion":
        fix = "choose a block that divides it"
        _divides("sequence length", seq, "objective.block", c.objective.block, fix)
        if mesh.cp > 1 or m.sequence_parallel:
            raise UserError(
                "block_diffusion doubles the sequence: set mesh.cp=1 and "
                "model.sequence_parallel=False"
            )


def _check_moe(c: ml_collections.ConfigDict) -> None:
    """Conditions on a mixture of experts that need no router: degrees, layers, objective."""
    m, moe, mesh = c.model, c.model.moe, c.mesh
    more = _next_multiple(moe.experts, mesh.ep)
    fix = f"set model.moe.experts={more} or another mesh.ep"
    _divides("experts", moe.experts, "mesh.ep", mesh.ep, fix)
    fix = f"set model.moe.ffn={_next_multiple(moe.ffn, mesh.tp)} or another mesh.tp"
    _divides("hidden width of an expert", moe.ffn, "mesh.tp", mesh.tp, fix)
    if moe.first_dense >= m.layers:
        raise UserError(
            f"model.moe.first_dense={moe.first_dense} of model.layers={m.layers} leave no layer "
            f"with experts: set model.moe.first_dense={m.layers - 1}"
        )
    fix = "change model.layers, model.moe.first_dense or model.moe.every"
    rest = m.layers - moe.first_dense
    _divides("layers after first_dense", rest, "model.moe.every", moe.every, fix)
    fix = f"set model.moe.experts={_next_multiple(moe.experts, moe.ranks)} or other ranks"
    _divides("experts", moe.experts, "model.moe.ranks", moe.ranks, fix)
    if moe.shared_gate and not moe.shared:
        raise UserError("model.moe.shared_gate weighs shared experts: set model.moe.shared=1")
    if moe.dispatch == "gather" and moe.wire != "same":
        raise UserError(
            f"model.moe.wire={moe.wire!r}, but dispatch='gather' sends rows in the type of "
            "compute: set wire='same', or dispatch='flat'"
        )
    _check_choice(c)
    _check_noise(c)


def _check_choice(c: ml_collections.ConfigDict) -> None:
    """Conditions on who chooses: what belongs to the other side is refused, not ignored."""
    moe, length = c.model.moe, c.data.seq_len
    if moe.choice == "token":
        if moe.low or moe.high:
            raise UserError(
                f"model.moe.low={moe.low} and high={moe.high} say how many tokens experts choose: "
                "set choice='expert', or low=0 and high=0"
            )
        return
    if c.objective.name == "autoregressive":
        raise UserError(
            "model.moe.choice='expert' compares a token with later ones of its sequence, which a "
            "causal model must not see: set model.moe.choice='token'"
        )
    if moe.bias:
        raise UserError("model.moe.bias moves what tokens choose: set it to 0 with choice='expert'")
    if moe.groups > 1:
        raise UserError(
            f"model.moe.groups={moe.groups} limits what tokens choose: set groups=1 with "
            "choice='expert'"
        )
    least = moe.low or moe.topk
    if least * length < moe.experts:
        raise UserError(
            f"an expert takes low·seq_len/experts = {least:g}·{length}/{moe.experts} = "
            f"{least * length / moe.experts:.3g} tokens of a sequence, less than one (low=0: "
            f"topk): set model.moe.low={moe.experts / length:.3g}, or fewer experts"
        )


def _check_noise(c: ml_collections.ConfigDict) -> None:
    """Conditions on what reads the share of masked tokens."""
    moe = c.model.moe
    if moe.rank and (moe.bins < 2 or moe.ranks < 2):
        raise UserError(
            f"model.moe.rank={moe.rank} balances ranks in noise bins, but model.moe.bins="
            f"{moe.bins} and ranks={moe.ranks}, where one of either leaves nothing to balance: "
            "set model.moe.bins=10 and ranks=mesh.ep, two at least"
        )
    if moe.noise == "group" and moe.groups < 2:
        raise UserError(
            "model.moe.noise='group' opens some of the groups, but model.moe.groups=1: set "
            "model.moe.groups=4 and kept=2"
        )
    reads = moe.noise != "none" or moe.bins > 1 or moe.low or moe.high
    if reads and (c.objective.name != "mdlm" or c.objective.form != "k"):
        raise UserError(
            "model.moe.noise, bins, low and high read the share of masked tokens, which only "
            "objective.name='mdlm' with objective.form='k' states: set those, or noise='none', "
            "bins=1, low=0, high=0"
        )
