"""Checkpoints of Hugging Face: the same logits, bitwise back, and every mistake named.

`hf.json` holds, for ten model types, a config.json, names and shapes of the tensors, and logits of
two sequences. It comes from transformers 5.24 with torch 2.13: a model of the config
(`AutoModelForCausalLM.from_config`) is written by `save_pretrained`, its tensors are replaced by
`values`, and the directory is read again by `from_pretrained` in float32 with eager attention.
"deepseek_v2" is a Llama whose FFNs, from layer 1 on, are DeepseekV2Moe modules: that gate without
latent attention."""

import json
import resource
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fdp.audit import audit_arm
from fdp.checkpoint import CheckpointError, Checkpoints
from fdp.command import one_line
from fdp.config import base, validate
from fdp.count.hlo import QUICK
from fdp.experiment import standard
from fdp.keys import UserError
from fdp.mesh import AXES, make_mesh
from fdp.models import hf, hf_config, hf_files, hf_names, module
from fdp.models.shape import ModelShape
from fdp.state import StateSpecs
from fdp.workdir import locked

FILE = json.loads((Path(__file__).parent / "hf.json").read_text())
FAMILIES: dict[str, Any] = FILE["families"]
TOKENS = jnp.array(FILE["tokens"])


def values(name: str, shape: list[int]) -> np.ndarray:
    """A tensor of the fixtures: the same for each name, and exact in bfloat16."""
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("norm.weight"):
        return (1 + draw.randint(-16, 17, shape) / 64).astype(np.float32)
    scale = 64 if "embed" in name else 256
    return (draw.randint(-64, 65, shape) / scale).astype(np.float32)


def tensors_of(family: str) -> dict[str, np.ndarray]:
    return {name: values(name, shape) for name, shape in FAMILIES[family]["tensors"].items()}


def write(
    folder: Path, family: str, dtype: Any = np.float32, files: int = 1, **changes: Any
) -> Path:
    """The directory that transformers would write, with `changes` of its config."""
    folder.mkdir()
    tensors = {name: x.astype(dtype) for name, x in tensors_of(family).items()}
    (folder / "config.json").write_text(json.dumps(FAMILIES[family]["config"] | changes))
    names = sorted(tensors)
    index = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::files]}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names[i::files], file)
    if files > 1:
        (folder / hf_files.INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def logits(model: Any, variables: Any) -> np.ndarray:
    """Of the fixtures' sequences, by a program that compiles fast."""

    def run(variables: Any) -> jax.Array:
        return module.run(model, variables, {"inputs": TOKENS, "noise": jnp.zeros(2)})[0]

    return np.asarray(jax.jit(run, compiler_options=QUICK)(variables))


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, by the library that defines the format."""
    found = [load_file(path) for path in folder.glob("*.safetensors")]
    return {name: x for part in found for name, x in part.items()}


def assert_bitwise(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        assert got[name].tobytes() == x.tobytes(), name


ALIKE = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v2")
EACH = [pytest.param(f, marks=[pytest.mark.slow] if f in ALIKE else []) for f in FAMILIES]


@pytest.mark.parametrize("family", EACH)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model, variables = hf.load(write(tmp_path / "source", family))
    want = np.array(FAMILIES[family]["logits"])
    np.testing.assert_allclose(logits(model, variables), want, rtol=1e-5, atol=2e-6)


def ours(family: str, model: Any = None, tensors: Any = None) -> dict[str, np.ndarray]:
    """Our arrays of a fixture, by path."""
    model = model or hf_config.section(FAMILIES[family]["config"])
    tensors = tensors or tensors_of(family)
    rules = hf_names.rules(family, model)
    return {p: r.read(tensors, (slice(None),) * len(r.shape)) for p, r in rules.items()}


@pytest.mark.fast
@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_is_bitwise(family: str, tmp_path: Path) -> None:
    source, config = write(tmp_path / "source", family), FAMILIES[family]["config"]
    hf.export(tmp_path / "back", ours(family), config)
    assert_bitwise(stored(tmp_path / "back"), stored(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


# Streams
# --------------------------------------------------------------------------------------------------


class Watched(dict):
    """Tensors that note which are asked for."""

    def __init__(self, tensors: Mapping[str, Any]):
        super().__init__(tensors)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


def test_every_device_holds_its_block_and_files_come_back_from_any_mesh(tmp_path: Path) -> None:
    """bfloat16 in three files, ZeRO-3 on dp·ep·tp, and back in files of at most 4 kB."""
    source = write(tmp_path / "source", "dots1", jnp.bfloat16, files=3)
    found = hf.read(source)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"dp": 2, "ep": 2, "tp": 2})
    model = hf.model_of(hf.configured(found.model))
    variables = hf.place(model, found.rules, found.tensors, mesh, zero=3)
    for path, want in ours("dots1").items():
        got = hf._paths(variables)[path]
        np.testing.assert_array_equal(got, want, path)
    spec = variables["params"]["layers"]["mlp"]["w_in"].sharding.spec
    assert {"dp", "ep", "tp"} <= set(spec)
    kinds = dict.fromkeys(found.tensors, "BF16")
    hf.export(tmp_path / "back", variables, found.config, kinds, shard=4000)
    assert_bitwise(stored(tmp_path / "back"), stored(source))
    files = list((tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back" / hf_files.INDEX).read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored(source).values())
    for file in files:
        with safe_open(file, "np") as opened:
            parts = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(parts) <= 4000 or len(parts) == 1


def test_a_block_reads_its_experts_and_no_others(tmp_path: Path) -> None:
    rule = hf.read(write(tmp_path / "source", "dots1")).rules["params/layers/mlp/w_in"]
    tensors = Watched(tensors_of("dots1"))
    whole = rule.read(tensors, (slice(None),) * 5)
    tensors.asked.clear()
    box = (slice(1, 2), slice(2, 4), slice(None), slice(0, 8), slice(4, 8))
    np.testing.assert_array_equal(rule.read(tensors, box), whole[box])
    layer = "model.layers.2.mlp.experts"
    assert tensors.asked == {
        f"{layer}.{e}.{part}_proj.weight" for e in (2, 3) for part in ("gate", "up")
    }


def test_rules_read_any_block_as_they_read_the_whole() -> None:
    """Blocks that split every dim, heads and what they flatten with included."""
    for family in ("qwen2", "olmoe", "qwen2_moe"):
        tensors = tensors_of(family)
        model = hf_config.section(FAMILIES[family]["config"])
        for path, rule in hf_names.rules(family, model).items():
            whole = rule.read(tensors, (slice(None),) * len(rule.shape))
            for half in (0, 1):
                box = tuple(slice(half * n // 2, (n + half * n + 1) // 2) for n in rule.shape)
                np.testing.assert_array_equal(rule.read(tensors, box), whole[box], path)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_a_tied_head_comes_back(dtype: Any, tmp_path: Path) -> None:
    """Our tied head divides by √D, which the scale of the last norm makes up for. Where √D is no
    power of two, a float32 scale comes back to the last bit but one; others are exact."""
    folder = tmp_path / "source"
    config = FAMILIES["qwen2"]["config"] | {"hidden_size": 12, "head_dim": 4}
    rules = hf_names.rules("qwen2", hf_config.section(config))
    want = {n: values(n, r.tensor).astype(dtype) for r in rules.values() for _, n in r.names()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        want | {"lm_head.weight": want["model.embed_tokens.weight"]}, folder / "a.safetensors"
    )
    found = hf.read(folder)
    arrays = ours("qwen2", found.model, found.tensors)
    kinds = {name: hf._kind(x) for name, x in found.tensors.items()}
    hf.export(tmp_path / "back", arrays, config, kinds)
    got = stored(tmp_path / "back")
    norm = "model.norm.weight"
    np.testing.assert_allclose(got[norm].astype(float), want[norm].astype(float), rtol=1.2e-7)
    if dtype == np.float32:
        del got[norm], want[norm]
    assert_bitwise(got, want)
    save_file(
        want | {"lm_head.weight": 2 * want["model.embed_tokens.weight"]}, folder / "a.safetensors"
    )
    with pytest.raises(UserError, match=r"unknown: lm_head.weight \(32, 12\)"):
        hf.read(folder)


# The command
# --------------------------------------------------------------------------------------------------


def command(*argv: str) -> int:
    f = flags.FlagValues()
    hf.declare(f)
    try:
        with one_line(ValueError):
            hf.run(f(["hf", *argv])[1:], f)
    except SystemExit as stop:
        return stop.code
    return 0


def test_import_writes_what_training_restores_and_export_gives_it_back(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, w = write(tmp_path / "source", "dots1", jnp.bfloat16), str(tmp_path / "w")
    assert command("import", str(source), f"--workdir={w}") == 0
    c = hf.configured(hf.read(source).model)
    specs = StateSpecs(standard(c), make_mesh(c.mesh))
    fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), specs.abstract_state())
    store = Checkpoints(Path(w) / "checkpoints" / "model-s0")
    step, state, meta = store.restore(specs.abstract_state(), lambda: fresh)
    store.close()
    assert step == 0 and meta["source"] == "dots1"
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(fresh.opt_state)
    got, want = hf._paths(state.variables), ours("dots1")
    assert got.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_array_equal(got[path], x, path)
    assert np.abs(state.model["layers"]["mlp"]["router"]["bias"]).max() > 0
    config = Path(w) / "config.json"  # of a time before one of its keys
    config.write_text(config.read_text().replace('"model.joint_norm": false,', ""))
    assert command("export", w, str(tmp_path / "back")) == 0
    assert_bitwise(stored(tmp_path / "back"), stored(source))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == hf.read(source).config
    assert command("export", w, str(tmp_path / "other"), "--family=deepseek_v3") == 1
    assert "model.qk_norm=True, not False" in capsys.readouterr().err
    assert command("export", w, str(tmp_path / "other"), "--arm=gate-s0") == 1
    assert "checkpoints of model-s0: name one in --arm" in capsys.readouterr().err
    changed = max((Path(w) / "checkpoints").rglob("state/d/*"), key=lambda p: p.stat().st_size)
    content = changed.read_bytes()
    changed.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert command("export", w, str(tmp_path / "other")) == 1
    assert "model-s0/0 is damaged: state/d/" in capsys.readouterr().err
    assert command("import", str(source), f"--workdir={w}") == 1
    assert "holds checkpoints: choose another --workdir" in capsys.readouterr().err
    with locked(Path(w)):
        assert command("import", str(source), f"--workdir={w}", "--arm=other") == 1
    assert "is in use by process" in capsys.readouterr().err
    assert command("import", str(source)) == 1 and command("import") == 1
    said = capsys.readouterr().err
    assert "name it in --workdir=W" in said and "export WORKDIR DIR" in said
    assert not (tmp_path / "other").exists()


# Upcycling
# --------------------------------------------------------------------------------------------------


def test_an_upcycled_model_computes_what_the_dense_one_did(tmp_path: Path) -> None:
    """The dense one is ours, by path: any mapping of names to arrays will do."""
    dense = hf.read(write(tmp_path / "source", "llama"))
    found, old = dense.upcycled(experts=4, topk=2), ours("llama")
    model = hf.model_of(hf.configured(found.model))
    mesh = make_mesh(dict.fromkeys(AXES, 1))
    made = hf.place(model, found.rules, hf.Named(dense.rules, old), mesh)
    mlp = made["params"]["layers"]["mlp"]
    for e in range(4):
        np.testing.assert_array_equal(mlp["w_in"][:, e], old["params/layers/mlp/w_in"])
        np.testing.assert_array_equal(mlp["w_out"][:, e], old["params/layers/mlp/w_out"])
    assert np.std(mlp["router"]["w"]) > 0.1
    want = np.array(FAMILIES["llama"]["logits"])
    np.testing.assert_allclose(logits(model, made), want, rtol=1e-5, atol=2e-6)
    config = hf_config.config_of("mixtral", found.model)
    hf.export(tmp_path / "mixtral", made, config)
    again = hf.read(tmp_path / "mixtral").tensors[
        "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    ]
    dense_w2 = tensors_of("llama")["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(again[:, :], dense_w2)
    with pytest.raises(UserError, match="has 4 experts already"):
        found.upcycled(experts=8, topk=2)


# config.json
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_is_made_says_what_the_given_one_says(family: str) -> None:
    model = hf_config.section(FAMILIES[family]["config"])
    assert hf_config.section(hf_config.config_of(family, model)) == model
    c = hf.configured(model)
    hf_config.check_same(FAMILIES[family]["config"], c.model.to_dict())
    validate(c)


@pytest.mark.parametrize(
    ("family", "changes", "first_dense", "every"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0]}, 1, 1),
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 6}, 0, 2),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, 3, 1),
        ("qwen3_moe", {"decoder_sparse_step": 1}, 0, 1),
        ("qwen3_moe", {"decoder_sparse_step": 4}, 3, 1),
        ("dots1", {"first_k_dense_replace": 2}, 2, 1),
        (
            "deepseek_v2",
            {"first_k_dense_replace": 0, "moe_layer_freq": 2, "num_hidden_layers": 1},
            0,
            1,
        ),
    ],
)
def test_layers_with_experts(family: str, changes: Any, first_dense: int, every: int) -> None:
    moe = hf_config.section(FAMILIES[family]["config"] | changes)["moe"]
    assert (moe["first_dense"], moe["every"]) == (first_dense, every)


def test_fields_of_older_configs_are_read() -> None:
    config = dict(FAMILIES["llama"]["config"])
    config |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}
    del config["rope_parameters"], config["head_dim"], config["num_key_value_heads"]
    found = hf_config.section(config)
    assert (found["rope_base"], found["rope_scaling"]) == (5e5, 2.0)
    assert (found["head_dim"], found["kv_heads"]) == (4, 4)
    assert (
        hf_config.section(config | {"rope_scaling": None, "rope_theta": None})["rope_base"] == 1e4
    )


YARN = {"rope_type": "yarn", "factor": 4.0}
MIXED = ["full_attention", "sliding_attention"]
REFUSED = [
    ("llama", {"model_type": "lama"}, "model_type='lama' is unknown: did you mean 'llama'"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 is no whole number from 1"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only silu"),
    ("llama", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported, only 0"),
    ("llama", {"rope_parameters": YARN}, "rope_type='yarn' is not supported"),
    ("llama", {"rope_parameters": {"mrope_section": [1, 1]}}, "mrope_section of rope_parameters"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"logit_scale": 2.0, "use_mup": True}, "logit_scale=2.0 is not known; use_mup=True"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not known"),
    ("llama", {"sliding_window": 8}, "sliding_window=8 is not known"),
    (
        "qwen3",
        {"layer_types": MIXED},
        "layers of full_attention, sliding_attention are not supported",
    ),
    (
        "qwen3",
        {"max_window_layers": 1, "layer_types": None},
        "layers of full_attention, sliding_attention",
    ),
    ("qwen2", {"layer_types": ["linear_attention"] * 2}, "layers of linear_attention are not"),
    ("mixtral", {"router_jitter_noise": 0.01}, "router_jitter_noise=0.01 is not supported"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 12}, "12 is no multiple of 8"),
    ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("qwen3_moe", {"mlp_only_layers": [3]}, "experts in layers [1] do not lie at equal distances"),
    ("deepseek_v2", {"kv_lora_rank": 512}, "multi-head latent attention (kv_lora_rank) is not"),
    (
        "deepseek_v2",
        {"topk_method": "noaux_tc"},
        "topk_method='noaux_tc' is not supported, only gr",
    ),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported, only False"),
    ("dots1", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only sigmoid"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_fields_that_change_the_function_are_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        hf_config.section(FAMILIES[family]["config"] | changes)
    assert message in str(refused.value)


@pytest.mark.fast
def test_a_field_may_be_ignored_and_all_that_is_wrong_is_named_at_once() -> None:
    config = FAMILIES["llama"]["config"] | {"soft_cap": 30.0, "mlp_bias": True, "norm": "l2"}
    with pytest.raises(
        UserError, match=r"mlp_bias=True.*norm='l2'.*soft_cap.*--ignore=norm,soft_cap"
    ):
        hf_config.section(config)
    hf_config.section(config, ["soft_cap", "mlp_bias", "norm"])


# Damage
# --------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "place", lambda *_: pytest.fail("loaded"))
    source = write(tmp_path / "source", "mixtral")
    (path,) = source.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
    tensors["model.norm.weight"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = np.ones((32, 16), np.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, path)
    with pytest.raises(UserError) as refused:
        hf.load(source)
    assert str(refused.value) == (
        "these tensors are not the model's: lm_head.weight is I8, not F32, F16, BF16; "
        "missing: model.layers.1.self_attn.k_proj.weight (8, 16); "
        "model.norm.weight has shape (8,), not (16,); "
        "unknown: model.layers.0.self_attn.q_norm.weight (4,)"
    )


@pytest.mark.fast
def test_damaged_directories_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "llama", files=2)
    first, second = sorted(source.glob("*.safetensors"))
    data = second.read_bytes()
    second.write_bytes(data[:-8])
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        hf.read(source)
    second.unlink()
    with pytest.raises(
        UserError, match=r"model-00002-of-00002\.safetensors cannot be read: No such"
    ):
        hf.read(source)
    (source / hf_files.INDEX).write_text("{}")
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        hf.read(source)
    (source / hf_files.INDEX).unlink()
    first.unlink()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        hf.read(source)
    (source / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json holds no object, but list"):
        hf.read(source)
    shutil.rmtree(source)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        hf.read(source)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return ours("llama")


@pytest.fixture
def small_files() -> Iterator[None]:
    """A file size limit stands for the full disk: the write fails in the same place, with EFBIG for
    ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.fast
def test_a_full_disk_leaves_nothing(arrays: Any, tmp_path: Path, small_files: None) -> None:
    with pytest.raises(
        CheckpointError, match=r"exporting .* bytes to .*back failed: File too large"
    ):
        hf.export(tmp_path / "back", arrays, FAMILIES["llama"]["config"], shard=4000)
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_room_is_asked_for_first(arrays: Any, tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=99)
    monkeypatch.setattr(hf_files.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(hf_files, "save_file", lambda *_: pytest.fail("written"))
    with pytest.raises(
        CheckpointError, match="No space left on device, 99 bytes are free; nothing"
    ):
        hf.export(tmp_path / "back", arrays, FAMILIES["llama"]["config"])
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_exports_that_would_mean_something_else_are_refused(arrays: Any, tmp_path: Path) -> None:
    config, back = FAMILIES["llama"]["config"], tmp_path / "back"
    with pytest.raises(UserError, match=r"no name in a llama checkpoint: params/noise_embedding/w"):
        hf.export(back, arrays | {"params/noise_embedding/w": np.ones(3)}, config)
    with pytest.raises(UserError, match=r"w_o \(2, 4, 4, 16\), where the model has nothing"):
        hf.export(back, {k: v for k, v in arrays.items() if not k.endswith("w_o")}, config)
    with pytest.raises(UserError, match=r"embed/table \(64, 16\), where the model has \(32, 16\)"):
        hf.export(back, arrays, config | {"vocab_size": 64})
    model = base().model.to_dict()
    for changes, said in (
        ({"window": 8}, r"model\.window=8, not 0"),
        ({"bias": True, "conv": 4}, r"model\.bias=True, not False; model\.conv=4, not 0"),
        ({"time_conditioning": True}, r"model\.time_conditioning=True"),
    ):
        with pytest.raises(UserError, match=said):
            hf_config.config_of("llama", model | changes)
    moe = model["moe"] | {"experts": 8, "noise": "film", "ffn": 128}
    with pytest.raises(UserError, match=r"model\.moe\.noise='film', not 'none'"):
        hf_config.config_of("mixtral", model | {"moe": moe})
    back.mkdir()
    (back / "mine").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        hf.export(back, arrays, config)
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


# What our model has for the sake of some families
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_joint_norms_and_gates_of_shared_experts_are_exact_and_counted(split: bool) -> None:
    """Loss and gradients of one device, and the bytes of the formula, over tp."""
    c = base()
    c.update_from_flattened_dict({"model.layers": 2, "model.width": 16, "model.head_dim": 4})
    c.model.update(heads=4, kv_heads=2, ffn=16, vocab=32, qk_norm=True, joint_norm=True)
    c.model.moe.update(experts=4, ffn=8, shared=2, shared_gate=True, switch=0.01)
    c.model.sequence_parallel = split
    c.data.update(source="blank", vocab=30, seq_len=16)
    c.train.batch, c.mesh.tp, c.mesh.ep = 8, 2, 2
    equal = [finding for finding in audit_arm("both", standard(c)) if " = " in finding.check]
    assert len(equal) == 3 and not [finding for finding in equal if not finding.holds]
    e = standard(c)
    shapes = module.abstract(e.model, e.noised_example())[0]["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == ModelShape.of(c.model).parameters()
