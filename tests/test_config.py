"""Every bad config is refused with the equation, the values in it and a fix; the digest and the
flags stay put.
"""

import inspect
import sys
from pathlib import Path

import ml_collections
import pytest
from absl import flags

import fdp.train  # noqa: F401  # its flags
from configs import topic1
from fdp import command, config, config_file, run, workdir
from fdp.config import UserError
from fdp.mesh import AXES, make_mesh

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[1]


def tiny(overrides: dict[str, object]) -> ml_collections.ConfigDict:
    """A small valid config on one device, then `overrides` by dotted key."""
    c = config.base()
    c.model.update(layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ffn=64, vocab=64)
    c.data.seq_len, c.train.batch = 32, 8
    c.update_from_flattened_dict(overrides)
    return c


INDIVISIBLE = {
    "query heads over tp": (
        {"mesh.tp": 8},
        "query heads 4 is not divisible by mesh.tp = 8: set model.heads=8 or another mesh.tp",
    ),
    "key/value heads over tp": (
        {"mesh.tp": 4, "model.kv_heads": 2},
        "key/value heads 2 is not divisible by mesh.tp = 4: set model.kv_heads=4 or "
        "another mesh.tp",
    ),
    "FFN over tp": (
        {"mesh.tp": 4, "model.ffn": 66},
        "FFN width 66 is not divisible by mesh.tp = 4: set model.ffn=68 or another mesh.tp",
    ),
    "vocabulary over tp": (
        {"mesh.tp": 4, "model.vocab": 258},
        "vocabulary 258 is not divisible by mesh.tp = 4: set model.vocab=260 or another mesh.tp",
    ),
    "query heads over key/value heads": (
        {"model.kv_heads": 3},
        "query heads 4 is not divisible by model.kv_heads = 3: set model.kv_heads to a divisor of "
        "model.heads",
    ),
    "rotary pairs": (
        {"model.head_dim": 7},
        "head_dim 7 is not divisible by rotary pairs = 2: set model.head_dim=8",
    ),
    "layers over pp": (
        {"mesh.pp": 4},
        "layers 2 is not divisible by mesh.pp = 4: set model.layers=4",
    ),
    "sequence over cp": (
        {"mesh.cp": 8, "data.seq_len": 36},
        "sequence length 36 is not divisible by mesh.cp = 8: set data.seq_len=40",
    ),
    "sequence over cp·tp under sequence parallelism": (
        {"mesh.cp": 2, "mesh.tp": 4, "model.sequence_parallel": True, "data.seq_len": 36},
        "sequence length 36 is not divisible by mesh.cp·mesh.tp (sequence_parallel) = 8: set "
        "data.seq_len=40",
    ),
    "batch over dp·ep·microbatches": (
        {"mesh.dp": 2, "mesh.ep": 2, "train.microbatches": 2, "train.batch": 12},
        "global batch 12 is not divisible by dp·ep·microbatches = 2·2·2 = 8: set train.batch=16 or "
        "another mesh.dp",
    ),
    "layers over pp and periods of experts": (
        {"mesh.pp": 2, "model.moe.experts": 4, "model.moe.every": 3, "model.layers": 4},
        "layers 4 is not divisible by mesh.pp·moe.every = 6: set model.layers=6",
    ),
    "microbatches over pp": (
        {"mesh.pp": 2, "pipeline.chunks": 2, "train.microbatches": 3},
        "pipeline.schedule=1f1b, train.microbatches=3: interleaved: m % p = 3 % 2 = 1, must be 0: "
        "set train.microbatches=4",
    ),
    "sequence over blocks": (
        {"objective.name": "block_diffusion", "objective.block": 5},
        "sequence length 32 is not divisible by objective.block = 5: choose a block "
        "that divides it",
    ),
}

OUTSIDE = {
    "degree of 0": (
        {"mesh.cp": 0},
        "mesh.cp=0 must be an integer of at least 1 (context parallelism): set mesh.cp=1",
    ),
    "chunks of whole stages": (
        {"mesh.pp": 2, "pipeline.schedule": "gpipe", "pipeline.chunks": 2},
        "pipeline.chunks=2, but the stages of gpipe are whole: set pipeline.chunks=1 or "
        "pipeline.schedule=1f1b",
    ),
    "variant": ({"variant": "ful"}, "variant='ful' is unknown: did you mean 'full'?"),
    "dtype": (
        {"model.dtype": "bfloat61"},
        "model.dtype='bfloat61' is unknown: did you mean 'bfloat16'?",
    ),
    "remat": ({"model.remat": "dot"}, "model.remat='dot' is unknown: did you mean 'dots'?"),
    "objective": (
        {"objective.name": "mldm"},
        "objective.name='mldm' is unknown: did you mean 'mdlm'?",
    ),
    "tokenizer": (
        {"data.tokenizer": "wordpiece"},
        "data.tokenizer='wordpiece' is unknown: known: bpe, byte",
    ),
    "NaN policy": ({"train.nan": "skp"}, "train.nan='skp' is unknown: did you mean 'skip'?"),
    "ZeRO stage": (
        {"train.zero": 2},
        "train.zero=2 must be one of 0, 1, 3 (0: parameters replicated over dp; 1: gathered once a "
        "step; 3: gathered layer by layer): set train.zero=0",
    ),
    "no seeds": (
        {"seeds": ()},
        "seeds=() is empty (one run of every arm per seed): set seeds=(0,)",
    ),
    "schedule": (
        {"objective.schedule": "linaer"},
        "objective.schedule='linaer' is unknown: did you mean 'linear'?",
    ),
    "packing": (
        {"data.packing": "document"},
        "data.packing='document' is unknown: did you mean 'documents'?",
    ),
    "topic": (
        {"topic": "paralel_dlm"},
        "topic='paralel_dlm' is unknown: did you mean 'parallel_dlm'?",
    ),
    "block diffusion over cp": (
        {"objective.name": "block_diffusion", "mesh.cp": 2},
        "block_diffusion doubles the sequence: set mesh.cp=1 and model.sequence_parallel=False",
    ),
}


@pytest.mark.parametrize("case", INDIVISIBLE)
def test_an_indivisible_size_is_refused_with_its_equation_and_a_fix(case: str) -> None:
    overrides, message = INDIVISIBLE[case]
    with pytest.raises(UserError) as error:
        config.validate(tiny(overrides))
    assert str(error.value) == message


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_value_outside_its_choices_is_refused_with_the_closest_one(case: str) -> None:
    overrides, message = OUTSIDE[case]
    with pytest.raises(UserError) as error:
        config.validate(tiny(overrides))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "case",
    [case for case, (_, message) in INDIVISIBLE.items() if "=" in message.partition(": set ")[2]],
)
def test_the_fix_of_a_message_is_a_fix(case: str) -> None:
    overrides, message = INDIVISIBLE[case]
    key, value = message.split("set ")[1].split(" ")[0].split("=")
    repaired = tiny(overrides | {key: int(value), "mesh.pp": 1})
    if key == "model.heads":  # the two go together
        repaired.model.kv_heads = int(value)
    config.validate(repaired)


def degrees(**given: int) -> dict[str, int]:
    return {a: given.get(a, 1) for a in AXES}


def test_degrees_that_do_not_multiply_to_the_devices_are_refused_with_their_product() -> None:
    with pytest.raises(ValueError, match="mesh") as error:
        make_mesh(degrees(dp=3, tp=4))
    assert str(error.value) == (
        "pp·dp·ep·cp·tp = 1·3·1·1·4 = 12 devices are needed but 8 cpu device(s) are there: "
        "change a mesh.* degree so that the product fits"
    )
    with pytest.raises(
        ValueError, match=r"mesh\.ep=0 must be at least 1: pp·dp·ep·cp·tp = 1·1·0·1·1 = 0"
    ):
        make_mesh(degrees(ep=0))


def test_every_variant_of_the_config_that_runs_here_is_valid_and_the_default_is_cpu() -> None:
    assert topic1.get_config().variant == "cpu"
    for variant in config.VARIANTS:
        c = topic1.get_config(variant)
        config.validate(c)
        assert c.variant == variant


def test_a_misspelt_key_in_a_config_file_is_refused_with_the_closest_one() -> None:
    with pytest.raises(AttributeError, match='Did you mean "steps" instead of "stepz"'):
        config.base().train.stepz = 3
    with pytest.raises(KeyError, match='Did you mean "heads" instead of "headz"'):
        config.base().model.update(headz=3)


def command_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What `python -m fdp.train` prints for `arguments` that it refuses."""
    argv = ["fdp.train", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
    try:
        with pytest.raises(SystemExit) as stop, command.one_line():
            config_file.parse_flags(argv)
    finally:
        flags.FLAGS.unparse_flags()
    assert stop.value.code == 1
    return capsys.readouterr().err


REFUSED = {
    "unknown key": (
        ["--config=configs/topic1.py:tiny", "--config.train.stepz=3"],
        "error: unknown config key 'train.stepz': did you mean 'train.steps'?\n",
    ),
    "unknown boolean key": (
        ["--config=configs/topic1.py:tiny", "--noconfig.model.qknorm"],
        "error: unknown config key 'model.qknorm': did you mean 'model.qk_norm'?\n",
    ),
    "unknown section": (
        ["--config=configs/topic1.py:tiny", "--config.trian.steps=3"],
        "error: unknown config key 'trian.steps': did you mean 'train.steps'?\n",
    ),
    "unknown variant": (
        ["--config=configs/topic1.py:tyni"],
        "error: unknown variant 'tyni': did you mean 'tiny'?\n",
    ),
    "value of another type": (
        ["--config=configs/topic1.py:tiny", "--config.train.steps=many"],
        "error: train.steps='many' must be an integer of at least 1 (length of the run; steps): "
        "set "
        "train.steps=1000\n",
    ),
    "value of another type, set apart": (
        ["--config", "configs/topic1.py:tiny", "--config.train.lr", "fast"],
        "error: train.lr='fast' must be a finite number in (0, inf) (peak learning rate): set "
        "train.lr=0.003\n",
    ),
    "whole number with a point": (
        ["--config=configs/topic1.py:tiny", "--config.train.lr=1", "--config.train.batch=16.0"],
        "error: train.batch=16.0 must be an integer of at least 1 (global batch; sequences): set "
        "train.batch=16\n",
    ),
    "no boolean": (
        ["--config=configs/topic1.py:tiny", "--config.model.bias=0", "--config.model.tied=maybe"],
        "error: model.tied='maybe' must be True or False (the head is the embedding): set "
        "model.tied=False\n",
    ),
    "section replaced by a number": (
        ["--config=configs/topic1.py:tiny", "--config.model=5"],
        "error: model='5' replaces a section of keys: set one of them, such as model.layers=4\n",
    ),
    "key below a key": (
        ["--config=configs/topic1.py:tiny", "--config.seeds.x=5"],
        "error: unknown config key 'seeds.x': did you mean 'seeds'?\n",
    ),
    "seeds that are no tuple": (
        ["--config=configs/topic1.py:tiny", "--config.seeds=0 1"],
        "error: seeds='0 1' must be a tuple, such as (0,) (one run of every arm per seed): set "
        "seeds=(0,)\n",
    ),
    "key of the topic": (
        ["--config=configs/topic1.py:tiny", "--config.sampling.drawz=3"],
        "error: unknown config key 'sampling.drawz': did you mean 'sampling.draws'?\n",
    ),
    "value of a key of the topic": (
        ["--config=configs/topic15.py:tiny", "--config.plan.batch=many"],
        "error: plan.batch='many' must be an integer of at least 1 (global batch; sequences): set "
        "plan.batch=1024\n",
    ),
    "key of another topic": (
        ["--config=configs/topic3.py:tiny", "--config.plan.batch=3"],
        "error: unknown config key 'plan.batch': did you mean 'train.batch'?\n",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_a_bad_argument_in_one_line(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = REFUSED[case]
    assert command_error(monkeypatch, capsys, *arguments) == message


def test_an_unknown_key_without_a_close_one_lists_the_known_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = command_error(
        monkeypatch, capsys, "--config=configs/topic1.py:tiny", "--config.xyzzy=3"
    )
    assert message.startswith(
        "error: unknown config key 'xyzzy': known: checkpoint.allow_config_change, "
    )
    assert "train.steps" in message
    assert message.count("\n") == 1


def test_a_config_file_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = command_error(monkeypatch, capsys, "--config=configs/topic0.py")
    assert message.startswith("error: ")
    assert "configs/topic0.py" in message
    assert message.count("\n") == 1


def parse_file(path, text: str, monkeypatch: pytest.MonkeyPatch, variant: str = "") -> None:
    """What a command does with a config file of this text."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    argv = ["fdp.train", f"--config={path}{variant}"]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        config_file.parse_flags(argv)
    finally:
        flags.FLAGS.unparse_flags()
        sys.modules.pop("config_config", None)  # where ml_collections loads every file


BASE = "from fdp import config\ndef get_config({}):\n    c = config.base()\n    {}\n"
WRONG_FILES = {
    "a misspelt key": (
        BASE.format("", "c.train.stepz = 3"),
        r"a\.py line 4, c\.train\.stepz = 3: AttributeError: .*Did you mean \"steps\"",
    ),
    "a number for a section": (
        BASE.format("", "c.train = 5"),
        r"a\.py line 4, c\.train = 5: TypeError: Could not override",
    ),
    "a dict for seeds": (BASE.format("", "c.seeds = {0: 1}"), r"line 4, c\.seeds = .*TypeError"),
    "no return": (
        BASE.format("", "pass"),
        r"a\.py: get_config\(\) returned None: return the config",
    ),
    "a number": (BASE.format("", "return 5"), r"get_config\(\) returned 5: return the config"),
    "a dict": (BASE.format("", "return {'topic': ''}"), r"returned {'topic': ''}: return the"),
    "no function": ("x = 1\n", r"a\.py has no get_config\(variant\): it makes the config"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_config_file_that_returns_or_sets_something_else_is_refused(
    name: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = WRONG_FILES[name]
    with pytest.raises(UserError, match=message):
        parse_file(tmp_path / "a.py", text, monkeypatch)


def test_a_variant_that_get_config_does_not_take_is_refused(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"takes 0 positional arguments"):
        parse_file(tmp_path / "a.py", BASE.format("", "return c"), monkeypatch, ":tiny")


def test_a_bug_inside_a_config_file_keeps_its_traceback(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="invalid literal") as error:
        parse_file(tmp_path / "a.py", BASE.format("", "int('a')"), monkeypatch)
    assert not isinstance(error.value, UserError)
    assert error.traceback[-1].path == tmp_path / "a.py"


def test_a_config_file_finds_modules_beside_it_and_its_package(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my_configs"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "pieces_of_mine.py").write_text("LR = 0.5\n")
    text = "import pieces_of_mine\nfrom my_configs.pieces_of_mine import LR\n"
    text += BASE.format("variant", "c.train.lr = pieces_of_mine.LR * LR; return c")
    before = list(sys.path)
    monkeypatch.chdir("/")
    parse_file(folder / "a.py", text, monkeypatch, ":tiny")
    assert sys.path == before
    for name in ("pieces_of_mine", "my_configs", "my_configs.pieces_of_mine"):
        del sys.modules[name]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/topic*.py")), ids=lambda p: p.stem)
def test_configs_need_nothing_but_the_package(path: Path, tmp_path, monkeypatch) -> None:
    """So they run from any folder, and with fdp installed as a wheel."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p).resolve() != ROOT])
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    parse_file(tmp_path / "mine" / "config_of_mine.py", path.read_text("utf8"), monkeypatch)


def test_what_the_study_of_topic_1_cannot_judge_is_refused_before_training() -> None:
    for key, value, message in (
        ("model.layers", 1, r"model\.layers=1: the policies .*; set model\.layers=2"),
        ("sampling.policies", ("exact", "drift int8"), r"'drift int8', which is unknown: did you"),
        ("sampling.policies", ("exact", "int8"), r"lacks 'stale, K=3', which the claims judge"),
    ):
        c = topic1.get_config("tiny")
        c.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match=message):
            config.validate(c)


def test_a_config_without_a_topic_key_is_refused() -> None:
    with pytest.raises(UserError, match="the config lacks topic: start from"):
        config.validate(ml_collections.ConfigDict({"seeds": (0,)}))


def test_an_unknown_topic_is_refused_with_the_closest_folder() -> None:
    with pytest.raises(
        UserError, match=r"^topic='paralel_dlm' is unknown: did you mean 'parallel_dlm'\?$"
    ):
        run.study_of("paralel_dlm")


def test_a_config_without_a_topic_is_refused() -> None:
    with pytest.raises(UserError, match=r"^topic='' has no study to run: set c.topic to the name"):
        run.study_of(config.base().topic)


HUGE = [
    (
        {"model.vocab": 2**31 - 1, "model.width": 2048},
        "12·(2·2147483647·2048 + (2·2048·(2·8·(4 + 4) + 3·64)))/1 = 96 TiB a device, exceed 8 TiB: "
        "lower model.vocab",
    ),
    (
        {"model.layers": 10**9},
        "12·(2·64·32 + (1000000000·32·(2·8·(4 + 4) + 3·64)))/1 = 112 TiB a device, exceed 8 TiB: "
        "lower model.layers",
    ),
    (
        {"train.batch": 2**31 - 1, "data.seq_len": 64},
        "4·2147483647·64·32/(1·1·1·1) = 16 TiB a device, exceed 8 TiB: "
        "lower train.batch or data.seq_len",
    ),
]


@pytest.mark.parametrize(("overrides", "end"), HUGE)
def test_what_no_machine_holds_is_refused_with_its_bytes(
    overrides: dict[str, object], end: str
) -> None:
    with pytest.raises(UserError) as error:
        config.validate(tiny(overrides))
    assert str(error.value).endswith(end), str(error.value)


def test_the_closed_lists_are_those_of_the_code_that_reads_them() -> None:
    from fdp.objectives import noise_schedules
    from fdp.topics.parallelism_search import settings, validate

    assert set(config.SCHEDULES) == noise_schedules.SCHEDULES.keys()
    assert tuple(case.name for case in validate.CASES) == settings.HOLD_OUTS


def test_there_is_one_list_of_free_keys() -> None:
    default = inspect.signature(workdir.differences).parameters["free"].default
    assert default is config.FREE_KEYS


# A second value for every free key: none of them changes what is computed.
FREE = {
    "mesh.dp": 2,
    "mesh.tp": 4,
    "checkpoint.every": 7,
    "checkpoint.allow_config_change": True,
    "log.every": 3,
    "hardware.topology": "v5p:4x4x8",
    "train.zero": 3,
}


@pytest.mark.parametrize("key", FREE)
def test_the_digest_ignores_what_does_not_change_the_computation(key: str) -> None:
    assert config.digest(tiny({key: FREE[key]})) == config.digest(tiny({}))


def test_the_digest_notices_every_other_key() -> None:
    c = tiny({})
    for key, value in config.flatten(c).items():
        if key.split(".")[0] in config.FREE_KEYS or key in config.FREE_KEYS:
            continue
        if isinstance(value, bool):
            other: object = not value
        elif isinstance(value, list):
            other = (*value, 1)
        else:
            other = value + ("x" if isinstance(value, str) else 1)
        assert config.digest(tiny({key: other})) != config.digest(c), key


def test_every_free_key_exists_and_a_longer_name_is_not_free() -> None:
    c = tiny({})
    known = config.flatten(c)
    for free in config.FREE_KEYS:
        assert any(key == free or key.startswith(f"{free}.") for key in known), free
    with c.unlocked():
        c.logits = ml_collections.ConfigDict({"scale": 1.0})
    before = config.digest(c)
    c.logits.scale = 2.0
    assert config.digest(c) != before


def test_the_command_line_is_frozen() -> None:
    assert {f.name for f in flags.FLAGS.flags_by_module_dict()["fdp.train"]} == {
        "config",
        "workdir",
        "dry_run",
    }
