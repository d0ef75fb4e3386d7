"""Every key, of core and of a topic, refuses what it cannot be: one line with the key, the value,
what is allowed and a fix.
"""

import math
from types import ModuleType

import ml_collections
import pytest

from configs import topic1, topic3, topic15
from fdp import config, keys
from fdp.config import UserError

pytestmark = pytest.mark.fast


def replaced(name: str, value: object, topic: str = "") -> ml_collections.ConfigDict:
    """A config whose key or section `name` holds a value of any type, as an untyped file may."""
    plain = config.base(**config.topic_sections(topic)).to_dict()
    *above, key = name.split(".")
    section = plain
    for part in above:
        section = section[part]
    section[key] = value
    return ml_collections.ConfigDict(plain | ({"topic": topic} if topic else {}))


SIZES = [
    name
    for name, key in config.declared("").items()
    if isinstance(key, keys.Integer) and key.low == 1
]


@pytest.mark.parametrize("key", SIZES)
def test_a_size_of_zero_is_refused(key: str) -> None:
    with pytest.raises(
        UserError, match=rf"^{key}=0 must be an integer of at least 1 \(.*set {key}=1$"
    ):
        config.validate(replaced(key, 0))


COUNT = "must be an integer of at least 1"
INT32 = "must be an integer of at most 2147483647"
SEEDS = "(one run of every arm per seed): set seeds="
LR = "must be a finite number in (0, inf)"

# Key, value, how the message starts and how it ends.
BAD = [
    ("seeds", "a", "seeds='a' must be a tuple, such as (0,) ", "set seeds=(0,)"),
    (
        "seeds",
        ("a",),
        "seeds=('a',) holds 'a', which must be an integer of at least 0 ",
        f"{SEEDS}(0,)",
    ),
    ("seeds", (0.5, 3), "seeds=(0.5, 3) holds 0.5, which must be an integer ", f"{SEEDS}(3,)"),
    ("seeds", (10**20,), f"seeds=({10**20},) holds {10**20}, which {INT32} ", f"{SEEDS}(0,)"),
    ("seeds", (1, -1), "seeds=(1, -1) holds -1, which must be an integer ", f"{SEEDS}(1,)"),
    ("seeds", (True,), "seeds=(True,) holds True, which must be an integer ", f"{SEEDS}(0,)"),
    ("seeds", (2, 2, 1), "seeds=(2, 2, 1) names 2 twice", ": set seeds=(2, 1)"),
    ("seeds", (), "seeds=() is empty ", f"{SEEDS}(0,)"),
    ("seeds", 3, "seeds=3 must be a tuple, such as (0,) ", f"{SEEDS}(0,)"),
    ("log.profile", (8, 5), "log.profile=(8, 5) must be (first, last) with 1 ≤ ", "=(5, 8)"),
    ("log.profile", (0, 5), "log.profile=(0, 5) must be (first, last) with 1 ≤ ", "=(1, 5)"),
    ("log.profile", 5, "log.profile=5 must be (first, last) with 1 ≤ ", "=(5, 5)"),
    ("log.profile", "now", "log.profile='now' must be (first, last) with ", "=()"),
    ("log.profile", (5, 2000), "log.profile=(5, 2000) ends after train.steps=1000", "=(5, 1000)"),
    ("model", 5, "model=5 replaces a section of keys", "such as model.layers=4"),
    ("model", {"layers": 3}, "model={'layers': 3} replaces a section", "such as model.layers=4"),
    ("train", None, "train=None replaces a section of keys", "such as train.batch=32"),
    ("model.layers", {"a": 1}, f"model.layers={{'a': 1}} {COUNT} ", "set model.layers=4"),
    ("model.layerz", 3, "unknown config key 'model.layerz'", "did you mean 'model.layers'?"),
    ("sampling", 3, "unknown config key 'sampling'", "did you mean 'eval.samples'?"),
    ("train.lr", 0, f"train.lr=0 {LR} (peak learning rate)", ": set train.lr=0.003"),
    ("train.lr", -1e-3, f"train.lr=-0.001 {LR} ", "set train.lr=0.003"),
    ("train.lr", math.nan, f"train.lr=nan {LR} ", "set train.lr=0.003"),
    ("train.lr", math.inf, f"train.lr=inf {LR} ", "set train.lr=0.003"),
    ("train.lr", 1e300, f"train.lr=1e+300 {LR}, also as float32 ", "set train.lr=0.003"),
    ("train.lr", 10**400, "train.lr=1000", "set train.lr=0.003"),
    ("train.lr", 1e-60, f"train.lr=1e-60 {LR}, also as float32 ", "set train.lr=0.003"),
    ("train.lr", "3e-3", f"train.lr='3e-3' {LR} ", "set train.lr=0.003"),
    ("train.lr", True, f"train.lr=True {LR} ", "set train.lr=0.003"),
    (
        "train.clip",
        0.0,
        "train.clip=0.0 must be a number in (0, inf] (largest global gradient norm)",
        "set train.clip=1.0, or train.clip=inf to switch it off",
    ),
    ("train.clip", -1.0, "train.clip=-1.0 must be a number in (0, inf] ", "to switch it off"),
    ("train.clip", math.nan, "train.clip=nan must be a number in (0, inf] ", "to switch it off"),
    ("train.beta2", 1.0, "train.beta2=1.0 must be a finite number in [0, 1) ", "=0.98"),
    ("train.beta2", 1 - 1e-12, "train.beta2=0.99", "set train.beta2=0.98"),
    ("train.beta2", -0.1, "train.beta2=-0.1 must be a finite number in [0, 1) ", "=0.98"),
    ("train.beta2", math.nan, "train.beta2=nan must be a finite number in [0, 1) ", "=0.98"),
    (
        "train.weight_decay",
        -0.1,
        "train.weight_decay=-0.1 must be a finite number in [0, ",
        "=0.01",
    ),
    ("train.weight_decay", math.inf, "train.weight_decay=inf must be a finite number", "=0.01"),
    (
        "model.rope_base",
        0.0,
        "model.rope_base=0.0 must be a finite number in (1, inf) ",
        "=10000.0",
    ),
    ("model.rope_base", math.nan, "model.rope_base=nan must be a finite number", "=10000.0"),
    ("model.rope_base", -1.0, "model.rope_base=-1.0 must be a finite number", "=10000.0"),
    (
        "model.rope_scaling",
        0.5,
        "model.rope_scaling=0.5 must be a finite number in [1, inf)",
        "=1.0",
    ),
    ("model.epsilon", 0.0, "model.epsilon=0.0 must be a finite number in (0, inf) ", "=1e-06"),
    ("model.conv", -1, "model.conv=-1 must be an integer of at least 0 ", "set model.conv=0"),
    ("model.bias", 1, "model.bias=1 must be True or False ", "set model.bias=False"),
    ("model.tied", "no", "model.tied='no' must be True or False ", "set model.tied=False"),
    ("train.warmup", -1, "train.warmup=-1 must be an integer of at least 0 ", "set train.warmup=0"),
    ("checkpoint.every", -1, "checkpoint.every=-1 must be an integer of at least 0 ", "every=0"),
    ("eval.every", -1, "eval.every=-1 must be an integer of at least 0 ", "set eval.every=0"),
    ("train.batch", True, f"train.batch=True {COUNT} (global batch; sequences)", "=32"),
    ("train.batch", 16.0, f"train.batch=16.0 {COUNT} ", "set train.batch=16"),
    ("train.batch", "16", f"train.batch='16' {COUNT} ", "set train.batch=32"),
    ("train.batch", None, f"train.batch=None {COUNT} ", "set train.batch=32"),
    ("train.batch", math.nan, f"train.batch=nan {COUNT} ", "set train.batch=32"),
    ("train.steps", 10**20, f"train.steps={10**20} {INT32} ", "set train.steps=1000"),
    ("train.zero", True, "train.zero=True must be one of 0, 1, 3 ", "set train.zero=0"),
    ("train.nan", 3, "train.nan=3 must be one of stop, skip ", "set train.nan='stop'"),
    ("model.vocab", 10**11, f"model.vocab={10**11} {INT32} ", "set model.vocab=1024"),
    ("data.vocab", 10**7, f"data.vocab={10**7} must be an integer of at most 1048576 ", "=1024"),
    ("data.val_fraction", 1.0, "data.val_fraction=1.0 must be a finite number in (0, 1)", "=0.05"),
    ("data.source", "", "data.source='' must be a text that is not empty ", "='bible'"),
    ("data.source", 7, "data.source=7 must be a text that is not empty ", "='bible'"),
    ("topic", 7, "topic=7 must be a text ", "set topic=''"),
    (
        "mesh.dp",
        10**6,
        "pp·dp·ep·cp·tp = 1·1000000·1·1·1 = 1000000 devices are more than 65536",
        "lower a mesh.* degree",
    ),
]


@pytest.mark.parametrize(
    ("name", "value", "start", "end"), BAD, ids=[f"{row[0]} {i}" for i, row in enumerate(BAD)]
)
def test_a_bad_value_is_refused_in_one_line_with_what_is_allowed_and_a_fix(
    name: str, value: object, start: str, end: str
) -> None:
    c = replaced(name, value)
    if name == "mesh.dp":
        c.train.batch = c.mesh.dp
    with pytest.raises(UserError) as error:
        config.validate(c)
    message = str(error.value)
    assert message.startswith(start), message
    assert message.endswith(end), message
    assert "\n" not in message


# Topics: an overridden config, and how the message starts.
OF_TOPICS = [
    (
        topic1,
        "sampling.policies",
        ("drfit 0.4",),
        "sampling.policies=('drfit 0.4',) holds 'drfit 0.",
    ),
    (topic1, "sampling.policies", ("exact",), "sampling.policies=('exact',) lacks 'stale, K=3'"),
    (topic1, "sampling.policies", ("exact", "exact"), "sampling.policies=('exact', 'exact') names"),
    (topic1, "sampling.draws", 1, "sampling.draws=1 must be an integer of at least 2 (noise draws"),
    (topic1, "sampling.sequences", 0, "sampling.sequences=0 must be an integer of at least 1"),
    (
        topic1,
        "data.seq_len",
        30,
        "sequence length 30 is not divisible by positions revealed a step",
    ),
    (topic1, "objective.name", "sedd_uniform", "objective.name='sedd_uniform' is none whose loss"),
    (topic1, "data.packing", "documents", "data.packing='documents': samples of this topic have"),
    (topic1, "data.source", "mqar", "data.source='mqar' weighs answers, and this topic judges"),
    (
        topic1,
        "sampling.sequences",
        1,
        "sampling.sequences=1 is less than dp·ep = 2·1 = 2, over which they are judged: set samp",
    ),
    (topic3, "data.packing", "documents", "data.packing='documents': profiles and masks of this"),
    (topic3, "profile.tasks", ("mqarr",), "profile.tasks=('mqarr',) holds 'mqarr', which is unkn"),
    (
        topic3,
        "profile.tasks",
        (3,),
        "profile.tasks=(3,) holds 3, which must be one of mqar, needle",
    ),
    (
        topic3,
        "data.seq_len",
        72,
        "sequence length 72 is not divisible by blocks of a mask = 32: set",
    ),
    (
        topic15,
        "plan.model",
        "llama3-80b",
        "plan.model: unknown model 'llama3-80b': did you mean 'll",
    ),
    (topic15, "plan.cluster", "h10:4x8", "plan.cluster: unknown chip 'h10': did you mean 'h100'"),
    (topic15, "plan.cluster", "h100:0x8", "plan.cluster: cluster 'h100:0x8' has no nodes"),
    (topic15, "plan.cases", ("gpt-5",), "plan.cases=('gpt-5',) holds 'gpt-5', which is unknown"),
    (topic15, "plan.precision", "bf17", "plan.precision='bf17' is unknown: did you mean 'bf16'?"),
    (
        topic15,
        "plan.searches",
        0,
        "plan.searches=0 must be an integer of at least 1 (seeds of every",
    ),
    (
        topic15,
        "hardware.topology",
        "v5q:4",
        "hardware.topology: unknown chip 'v5q': did you mean 'v5",
    ),
]


@pytest.mark.parametrize(("module", "name", "value", "start"), OF_TOPICS)
def test_a_bad_value_of_a_topic_is_refused_before_anything_starts(
    module: ModuleType, name: str, value: object, start: str
) -> None:
    c = module.get_config("tiny")
    c.update_from_flattened_dict({name: value})
    with pytest.raises(UserError) as error:
        config.validate(c)
    assert str(error.value).startswith(start)
    assert "\n" not in str(error.value)


def test_the_section_of_a_topic_is_checked_like_one_of_core() -> None:
    for value, start in (
        (3, "sampling=3 replaces a section of keys: set one of them, such as sampling.policies=()"),
        ({"draws": 3}, "sampling={'draws': 3} replaces a section of keys"),
        ({"drawz": 3}, "unknown config key 'sampling.drawz': did you mean 'sampling.draws'?"),
    ):
        with pytest.raises(UserError) as error:
            config.validate(replaced("sampling", value, "parallel_dlm"))
        assert str(error.value).startswith(start)
    c = config.base()
    c.topic = "parallel_dlm"
    with pytest.raises(UserError) as error:
        config.validate(c)
    assert str(error.value) == (
        "the config lacks sampling.policies: start from "
        "fdp.config.base(**fdp.config.topic_sections('parallel_dlm'))"
    )
    c = topic1.get_config("tiny")
    c.topic = "adaptive_cp"
    with pytest.raises(UserError, match=r"unknown config key 'sampling\."):
        config.validate(c)
    with pytest.raises(ValueError, match="'train' is a section of core"):
        config.base(train=keys.section())


def test_a_copy_and_every_value_at_its_bounds_are_valid() -> None:
    c = topic1.get_config("tiny").copy_and_resolve_references()
    config.validate(c)
    config.validate(ml_collections.ConfigDict(c.to_dict()))
    c = config.base()
    c.update_from_flattened_dict(
        {
            "seeds": (0, 2**31 - 1),
            "train.lr": 1,  # an integer is a number
            "train.clip": math.inf,
            "train.weight_decay": 0.0,
            "train.beta2": 0.0,
            "train.warmup": 0,
            "eval.every": 0,
            "checkpoint.every": 0,
            "objective.schedule": "poly2.5",
            "data.packing": "documents",
            "model.epsilon": 1e-5,
            "model.bias": True,
            "model.tied": True,
            "model.conv": 4,
            "model.rope_scaling": 8.0,
        }
    )
    config.validate(c)


def test_every_key_says_what_it_is_and_holds_its_own_default() -> None:
    topics = [m.get_config("tiny").topic for m in (topic1, topic3, topic15)]
    for name, key in {k: v for topic in topics for k, v in config.declared(topic).items()}.items():
        assert key.text, name
        key.check(name, key.default)
