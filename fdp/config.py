"""The one place where configuration keys, units and defaults live. Imports neither jax nor flax: it
is read first.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

VARIANTS = ("cpu", "tiny", "full", "h100", "pod")

# Keys that may differ between two starts in one workdir: none of them changes what is computed.
FREE_KEYS = ("mesh", "context", "checkpoint", "log", "hardware", "train.zero")

# Sizes and divisors.
POSITIVE = (
    "model.layers",
    "model.width",
    "model.heads",
    "model.kv_heads",
    "model.head_dim",
    "model.ffn",
    "model.vocab",
    "objective.block",
    "context.head_split",
    "context.stripe",
    "data.seq_len",
    "train.batch",
    "train.microbatches",
    "train.steps",
    "eval.batches",
    "eval.sequences",
    "eval.draws",
    "checkpoint.keep",
    "log.every",
    "plan.batch",
    "plan.seq_len",
    "plan.steps",
    "plan.searches",
    "plan.counted",
)


class UserError(ValueError):
    """A mistake the user can fix: shown as one message, without a traceback."""


def base() -> ml_collections.ConfigDict:
    """Every key with its default, locked. A topic config starts here and changes fields;
    `unlocked()` adds some.
    """
    c = ml_collections.ConfigDict()
    c.topic = ""  # folder under fdp/topics
    c.variant = "cpu"  # cpu | tiny | full | h100 | pod
    c.seeds = (0,)  # one run of every arm per seed

    c.mesh = ml_collections.ConfigDict({"pp": 1, "dp": 1, "ep": 1, "cp": 1, "tp": 1})  # degrees

    m = c.model = ml_collections.ConfigDict()
    m.layers = 4  # divisible by pp
    m.width = 128  # D, residual stream
    m.heads = 4  # query heads, divisible by tp
    m.kv_heads = 4  # key/value heads (GQA), divisible by tp, divides heads
    m.head_dim = 32  # even (rotary pairs)
    m.ffn = 344  # F, SwiGLU hidden width, divisible by tp
    m.vocab = 1024  # embedding rows ≥ token ids (mask included), divisible by tp
    m.rope_base = 10_000.0
    m.qk_norm = False  # RMSNorm on queries and keys
    m.conv = 0  # taps of a causal convolution before q, k and v; 0 = none
    m.time_conditioning = False  # adaptive norms fed with the noise level
    m.dtype = "float32"  # compute dtype; parameters and logits are always float32
    m.remat = "none"  # none | dots | full: what the backward pass recomputes
    m.sequence_parallel = False  # between blocks, shard the sequence over tp (Megatron SP)

    m.window = 0  # attention to keys less than this many positions away; 0 = no limit

    x = c.context = (
        ml_collections.ConfigDict()
    )  # how attention communicates over cp; none of it changes the result
    x.plan = "all_gather"  # all_gather | ring | ulysses | usp | batch
    # usp, batch: devices that share out heads (or sequences), the others form a ring; ulysses: cp
    x.head_split = 1
    x.layout = "contiguous"  # contiguous | zigzag | striped: which positions a device holds
    x.stripe = 1  # striped: positions in a block

    o = c.objective = ml_collections.ConfigDict()
    o.name = "mdlm"  # autoregressive | mdlm | sedd_absorbing | sedd_uniform | block_diffusion
    o.form = "k"  # masks: k (exactly k, weight L/k) | t (continuous time)
    o.schedule = (
        "linear"  # of the t form and of sedd_uniform (geometric there): fdp.objectives.schedules
    )
    o.antithetic = True  # stratify k or t over the global batch
    o.block = 16  # block_diffusion: tokens per block
    o.masked_head = True  # run the head on rows that carry loss only

    d = c.data = ml_collections.ConfigDict()
    d.source = "bible"  # bible | stdlib | markov | mqar | needle | induction | hf:<name> | path
    d.tokenizer = "bpe"  # byte | bpe
    d.vocab = 1024  # token ids incl. end-of-text and mask (bpe)
    d.seq_len = 64  # L, tokens
    d.packing = "stream"  # stream | documents
    d.val_fraction = 0.05  # of the documents
    d.split_seed = 0

    t = c.train = ml_collections.ConfigDict()
    t.batch = 32  # global batch, sequences
    t.microbatches = 1  # gradient accumulation steps inside one train step
    t.steps = 1000
    t.lr = 3e-3
    t.warmup = 50  # steps of linear warm-up, then cosine decay to lr/10
    t.weight_decay = 0.01
    t.beta2 = 0.98
    t.clip = 1.0  # global gradient norm
    t.zero = (
        0  # 0: parameters replicated over dp; 1: gathered once a step; 3: gathered layer by layer
    )
    t.nan = "stop"  # stop | skip (both leave the state untouched; skip goes on and counts)

    e = c.eval = ml_collections.ConfigDict()
    e.every = 250  # steps; 0 = only at the end
    e.batches = 8  # validation batches per evaluation
    e.samples = 4  # sequences printed and stored at the end
    e.sequences = 32  # sequences drawn for each arm of a sampling study
    e.draws = 256  # noise draws of a study of loss estimators
    # topic 1: names of the policies measured; () = all (fdp/topics/parallel_dlm/pareto.py)
    e.policies = ()

    k = c.checkpoint = ml_collections.ConfigDict()
    k.every = 250  # steps
    k.keep = 3
    k.allow_config_change = False  # resume although the workdir was made by another config

    g = c.log = ml_collections.ConfigDict()
    g.every = 10  # steps between metric rows

    p = c.plan = ml_collections.ConfigDict()  # topic 15: what to find a parallel plan for
    p.model = ""  # a published model such as llama3-70b or deepseek-v3; "" = the model section
    p.cluster = (
        "h100:32x8"  # nodes x chips of each; a TPU slice as v5p:4x8x8; mixed: h100:4x8+a100:4x8
    )
    p.batch = 1024  # global batch, sequences
    p.seq_len = 4096  # tokens
    p.precision = "bf16"  # bf16 | fp8 | fp4
    p.measurements = (
        "../shared/data/planning"  # folder of published measurements to fit on; absent: what ships
    )
    p.steps = 200  # optimizer iterations of one fit
    # names of the hold-outs to run (fdp/topics/parallelism_search/validate.py); () = all
    p.cases = ()
    p.searches = 5  # seeds of every search algorithm on every measured landscape
    p.counted = 100  # random programs whose bytes and FLOPs are compared with the compiler

    h = c.hardware = ml_collections.ConfigDict()
    h.topology = (
        ""  # --dry_run target, such as v5p:4x4x8 or h100:8x8; "" = the devices that are here
    )
    return c.lock()


def lock(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Validate a finished config and freeze its set of keys."""
    config.lock()
    return config


def closest(word: str, known: Any) -> str:
    """` (did you mean 'x'?)` or the list of known words."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


def check_keys(keys: Iterable[str]) -> None:
    """Raise UserError naming the closest key for the first of `keys` (dotted) that is neither a key
    nor a section.
    """
    known = flatten(base())
    for key in keys:
        if key not in known and not any(k.startswith(f"{key}.") for k in known):
            raise UserError(f"unknown config key {key!r}: {closest(key, known)}")


def check_variant(variant: str) -> str:
    """Return `variant` or raise ValueError naming the closest one."""
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
    """12 hex digits over all keys that change what is computed."""
    kept = {
        k: v
        for k, v in flatten(config).items()
        if not any(k == f or k.startswith(f"{f}.") for f in FREE_KEYS)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _divides(
    config: ml_collections.ConfigDict, what: str, value: int, by: str, divisor: int, fix: str
) -> None:
    if value % divisor:
        raise UserError(f"{what} {value} is not divisible by {by} = {divisor}: {fix}")


def _next_multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def validate(c: ml_collections.ConfigDict) -> None:
    """Every divisibility and every closed choice; raises ValueError with the equation, the values
    and a fix.
    """
    _check_choices(c)
    m, mesh, t = c.model, c.mesh, c.train
    for axis in ("pp", "dp", "ep", "cp", "tp"):
        if mesh[axis] < 1:
            raise UserError(f"mesh.{axis}={mesh[axis]} must be at least 1")
    _divides(
        c,
        "layers",
        m.layers,
        "mesh.pp",
        mesh.pp,
        f"set model.layers={_next_multiple(m.layers, mesh.pp)}",
    )
    if mesh.pp > 1:
        raise UserError(f"mesh.pp={mesh.pp}: this model has no pipeline schedule; set mesh.pp=1")
    tp, shards = mesh.tp, mesh.dp * mesh.ep
    for what, value, key in (
        ("query heads", m.heads, "model.heads"),
        ("key/value heads", m.kv_heads, "model.kv_heads"),
        ("FFN width", m.ffn, "model.ffn"),
        ("vocabulary", m.vocab, "model.vocab"),
    ):
        _divides(
            c,
            what,
            value,
            "mesh.tp",
            tp,
            f"set {key}={_next_multiple(value, tp)} or another mesh.tp",
        )
    _divides(
        c,
        "query heads",
        m.heads,
        "model.kv_heads",
        m.kv_heads,
        "set model.kv_heads to a divisor of model.heads",
    )
    _divides(c, "head_dim", m.head_dim, "rotary pairs", 2, f"set model.head_dim={m.head_dim + 1}")
    seq = c.data.seq_len
    split = mesh.cp * (tp if m.sequence_parallel else 1)
    split_name = "mesh.cp·mesh.tp (sequence_parallel)" if m.sequence_parallel else "mesh.cp"
    _divides(
        c,
        "sequence length",
        seq,
        split_name,
        split,
        f"set data.seq_len={_next_multiple(seq, split)}",
    )
    per_step = shards * t.microbatches
    equation = f"dp·ep·microbatches = {mesh.dp}·{mesh.ep}·{t.microbatches}"
    fix = f"set train.batch={_next_multiple(t.batch, per_step)} or another mesh.dp"
    _divides(c, "global batch", t.batch, equation, per_step, fix)
    if t.zero:
        _divides(
            c,
            "model width",
            m.width,
            "mesh.dp (ZeRO)",
            mesh.dp,
            f"set model.width={_next_multiple(m.width, mesh.dp)}",
        )
    if c.objective.name == "block_diffusion":
        _divides(
            c,
            "sequence length",
            seq,
            "objective.block",
            c.objective.block,
            "choose a block that divides it",
        )
        if mesh.cp > 1 or m.sequence_parallel:
            raise UserError(
                "block_diffusion doubles the sequence: set mesh.cp=1 and "
                "model.sequence_parallel=False"
            )


def _check_choices(c: ml_collections.ConfigDict) -> None:
    closed = {
        "variant": (c.variant, VARIANTS),
        "model.dtype": (c.model.dtype, ("float32", "bfloat16")),
        "model.remat": (c.model.remat, ("none", "dots", "full")),
        "objective.name": (
            c.objective.name,
            ("autoregressive", "mdlm", "sedd_absorbing", "sedd_uniform", "block_diffusion"),
        ),
        "objective.form": (c.objective.form, ("t", "k")),
        "data.tokenizer": (c.data.tokenizer, ("byte", "bpe")),
        "context.plan": (c.context.plan, ("all_gather", "ring", "ulysses", "usp", "batch")),
        "context.layout": (c.context.layout, ("contiguous", "zigzag", "striped")),
        "train.nan": (c.train.nan, ("stop", "skip")),
        "plan.precision": (c.plan.precision, ("bf16", "fp8", "fp4")),
    }
    for key, (value, known) in closed.items():
        if value not in known:
            raise UserError(f"{key}={value!r} is unknown: {closest(value, known)}")
    if c.train.zero not in (0, 1, 3):
        raise UserError(
            f"train.zero={c.train.zero} is unknown: 0 (replicated), 1 (gathered per step), 3 (per "
            "layer)"
        )
    if not c.seeds:
        raise UserError("seeds=() names no run: set seeds=(0,)")
    values = flatten(c)
    for key in POSITIVE:
        if values[key] < 1:
            raise UserError(f"{key}={values[key]} must be at least 1")
