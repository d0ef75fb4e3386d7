"""Shapes of published models, to price training and inference of them."""

import difflib
import json
from pathlib import Path
from typing import Any

from fdp.models.shape import ModelShape


def _dense(
    name: str, layers: int, width: int, heads: int, kv: int, ffn: int, vocab: int, **more: Any
) -> ModelShape:
    sizes = (layers, width, heads, kv, width // heads, ffn, vocab)
    return ModelShape(*sizes, name=name, dtype="bfloat16", **more)


def _mpt(name: str, layers: int, width: int, heads: int) -> ModelShape:
    return _dense(name, layers, width, heads, heads, 4 * width, 50368, gated=False, tied=True)


def _moe(
    name: str,
    layers: int,
    width: int,
    heads: int,
    kv: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    experts: int,
    topk: int,
    moe_ffn: int,
    **more: Any,
) -> ModelShape:
    more |= {"experts": experts, "topk": topk, "moe_ffn": moe_ffn}
    sizes = (layers, width, heads, kv, head_dim, ffn, vocab)
    return ModelShape(*sizes, name=name, dtype="bfloat16", **more)


_MLA: dict[str, Any] = {
    "kv_rank": 512,
    "rope_dim": 64,
    "value_dim": 128,
    "q_rank": 1536,
    "shared_experts": 1,
}

# From the models' public configuration files (and nanotron's scaling benchmark for the ultrascale
# ones).
PUBLISHED = {
    a.name: a
    for a in (
        _dense("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
        _dense("llama3-70b", 80, 8192, 64, 8, 28672, 128256),
        _dense("llama3.1-405b", 126, 16384, 128, 8, 53248, 128256),
        _dense("llama2-7b", 32, 4096, 32, 32, 11008, 32000),
        _dense("llama2-70b", 80, 8192, 64, 8, 28672, 32000),
        _dense("gpt3-175b", 96, 12288, 96, 96, 49152, 51200, gated=False, tied=True),
        _dense("gpt-5b", 24, 4096, 32, 32, 16384, 51200, gated=False, tied=True),
        _dense("nemotron4-15b", 32, 6144, 48, 8, 24576, 256000, gated=False),
        _dense("nemotron4-340b", 96, 18432, 96, 8, 73728, 256000, gated=False),
        _dense("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064),
        _dense("qwen2.5-32b", 64, 5120, 40, 8, 27648, 152064),
        _dense("ultrascale-1b", 16, 2048, 32, 32, 8192, 131072, tied=True),
        _dense("ultrascale-3b", 28, 3072, 24, 24, 8192, 131072, tied=True),
        _dense("ultrascale-8b", 32, 4096, 32, 32, 14336, 131072),
        _mpt("mpt-125m", 12, 768, 12),
        _mpt("mpt-350m", 24, 1024, 16),
        _mpt("mpt-760m", 24, 1536, 12),
        _mpt("mpt-1b", 24, 2048, 16),
        _mpt("mpt-3b", 32, 2560, 20),
        _mpt("mpt-7b", 32, 4096, 32),
        _mpt("mpt-13b", 40, 5120, 40),
        _mpt("mpt-30b", 48, 7168, 56),
        _mpt("mpt-70b", 80, 8192, 64),
        _moe("grok1-314b", 64, 6144, 48, 8, 128, 32768, 131072, 8, 2, 32768, tied=True),
        _moe("mixtral-8x7b", 32, 4096, 32, 8, 128, 14336, 32000, 8, 2, 14336),
        _moe("mixtral-8x22b", 56, 6144, 48, 8, 128, 16384, 32768, 8, 2, 16384),
        _moe("deepseek-v3", 61, 7168, 128, 128, 192, 18432, 129280, 256, 8, 2048,
             first_dense=3, **_MLA),
        _moe("deepseek-v2", 60, 5120, 128, 128, 192, 12288, 102400, 160, 6, 1536,
             first_dense=1, **_MLA | {"shared_experts": 2}),
        _moe("deepseek-moe-16b", 28, 2048, 16, 16, 128, 10944, 102400, 64, 6, 1408,
             first_dense=1, shared_experts=2),
        _moe("olmoe-1b-7b", 16, 2048, 16, 16, 128, 1024, 50304, 64, 8, 1024, qk_norm=True),
        _moe("llada-moe-7b-a1b", 16, 2048, 16, 16, 128, 8192, 157184, 64, 8, 1024, qk_norm=True),
        _moe("kimi-k2", 61, 7168, 64, 64, 192, 18432, 163840, 384, 8, 2048, first_dense=1, **_MLA),
        _moe("llama4-maverick", 48, 5120, 40, 8, 128, 16384, 202048, 128, 1, 8192,
             shared_experts=1, moe_every=2),
        _moe("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 6144, 151936, 128, 8, 768),
        _moe("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 12288, 151936, 128, 8, 1536),
        _moe("gpt-oss-20b", 24, 2880, 64, 8, 64, 2880, 201088, 32, 4, 2880),
        _moe("gpt-oss-120b", 36, 2880, 64, 8, 64, 2880, 201088, 128, 4, 2880),
    )
}  # fmt: skip


# (groups of experts, groups that a token may choose from) of models whose routing is limited
GROUPS = {"deepseek-v2": (8, 3), "deepseek-v3": (8, 4)}


def trained(workdir: Path) -> ModelShape:
    """The model of a run. Raises ValueError for a folder that is none."""
    try:
        flat = json.loads((workdir / "config.json").read_text("utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{workdir} is not the workdir of a run: {error}") from error
    below = {name.removeprefix("model."): v for name, v in flat.items() if name[:6] == "model."}
    moe = {name[4:]: v for name, v in below.items() if name[:4] == "moe."}
    return ModelShape.of(below | {"moe": moe})


def named(name: str) -> ModelShape:
    """The model called `name` in `PUBLISHED`, or that of the run whose workdir it is. Raises
    ValueError with the closest known name."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    if Path(name).is_dir():
        return trained(Path(name))
    close = difflib.get_close_matches(name.lower(), PUBLISHED, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown model {name!r}: did you mean {close!r}? Known: {', '.join(PUBLISHED)}"
    )
