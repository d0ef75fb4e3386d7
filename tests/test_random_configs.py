"""Random values of every key: a config runs, or one line says what is wrong before training."""

import collections
import contextlib
import io
import itertools
import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import ml_collections
import pytest
from stub.config import get_config as stub

from configs import topic1, topic2, topic3, topic8, topic15
from fdp import capacity, command, config, loop, run
from fdp.keys import Choice, Flag, Integer, Key, Number, Several, UserError

TOPICS = (topic1, topic2, topic3, topic8, topic15)
MADE = {"stub": stub} | {made.__name__.split(".")[-1]: made.get_config for made in TOPICS}
OTHERS: tuple[Any, ...] = (
    None,
    (),
    {},
    {"a": 1},
    [1, 2],
    "",
    "x",
    "~",
    "1",
    True,
    0,
    -1,
    0.5,
    "\0",
)
WHOLE = (0, 1, 2, 3, 4, 7, 8, 64, 1000, 2**20, 2**31 - 1, 2**31, 2**63, 10**11, 10**30)
REAL = (0.0, 1.0, 0.1, 1e-300, 1e-30, 1e30, 1e38, 1e300, 2.0**-149, math.nan, math.inf, -math.inf)


def edges(key: Key) -> tuple[Any, ...]:
    """Values at the edges of what a key allows, and beyond."""
    if isinstance(key, Integer):
        near = (key.default * factor for factor in (1, 2, 3, 4))
        return (key.low - 1, key.low, key.low + 1, key.high, key.high + 1, *near, *WHOLE)
    if isinstance(key, Number):
        ends = [float(end) for end in key.interval[1:-1].split(",")]
        return (*ends, *(end + d for end in ends for d in (-1e-3, 1e-3)), *REAL, -1.0)
    if isinstance(key, Flag):
        return (True, False)
    if isinstance(key, Choice):
        return (*key.choices, *key.choices, *(f"{word}x" for word in key.choices[:2]))
    if isinstance(key, Several):
        one = edges(key.each)
        return ((), one[:1], one[:2], one[1:3], one[:1] * 2, key.default, *one[:3])
    return ("blank", "/nowhere/at/all", "hf:", "h100:banana", "h100:8", "bible", "topic")


def small(name: str) -> ml_collections.ConfigDict:
    """The smallest config of a topic, on one device: what it costs is compiling."""
    c = MADE[name]("tiny")
    c.mesh.update(dict.fromkeys(c.mesh, 1))
    c.data.source = {"topic8": "gaussians", "topic2": "two_regimes"}.get(name, "markov")
    c.train.microbatches = 1
    c.train.batch = 4
    c.eval.batches = c.eval.samples = 1
    if name in ("stub", "topic1", "topic3"):
        c.model.update(layers=2, width=16, heads=2, kv_heads=2, head_dim=8, ffn=16)
    return c


def overridden(draw: random.Random, name: str) -> tuple[str, ml_collections.ConfigDict]:
    """A small config with one or two random values, and which."""
    c = small(name)
    keys = config.declared(c.topic)
    own = [key for key in keys if name == "stub" or key.split(".")[0] in own_sections(c)]
    said = []
    for key in draw.sample(own, draw.choice((1, 1, 2)) if len(own) > 1 else 1):
        values = edges(keys[key]) if draw.random() < 0.85 else OTHERS
        put(c, key, value := draw.choice(values))
        said.append(f"{key}={value!r}")
    return f"{name}: {', '.join(said)}", c


def own_sections(c: ml_collections.ConfigDict) -> set[str]:
    """Names of the sections that the topic adds."""
    return set(config.topic_sections(c.topic))


def put(c: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Set a key to a value of any type, as a config file can."""
    *above, last = key.split(".")
    for part in above:
        c = c[part]
    with c.unlocked(), c.ignore_type():
        c[last] = value


def cases(count: int, seed: int):
    """As many configs of the core keys as of all topics' own."""
    draw, names = random.Random(seed), [n for n in MADE if n != "stub"]
    for i, name in zip(range(count), itertools.cycle(names), strict=False):
        yield overridden(draw, "stub" if i % 4 else name)


def line(error: UserError) -> str:
    """What the command prints."""
    text = command.told(error)
    assert text.startswith("error: ") and 20 < len(text) < 1200, text
    return text


def refusal(c: ml_collections.ConfigDict) -> str:
    """What `validate` says; "" where it says nothing."""
    try:
        config.validate(c)
    except UserError as error:
        return line(error)
    return ""


@pytest.mark.fast
def test_a_random_config_is_valid_or_refused_in_a_line() -> None:
    said = collections.Counter(bool(refusal(c)) for _, c in cases(120, seed=1))
    assert min(said[True], said[False]) > 20, said


@pytest.mark.fast
@pytest.mark.parametrize("name", MADE)
def test_every_key_refuses_other_types(name: str) -> None:
    c = MADE[name]("tiny")
    for key, declared in config.declared(c.topic).items():
        for value in (None, {"a": 1}, object(), math.nan, b"x"):
            assert not declared.holds(value), (key, value)
            wrong = MADE[name]("tiny")
            put(wrong, key, value)
            assert refusal(wrong), (key, value)


class TookTooLong(Exception):
    """More than the seconds of a case."""


@contextlib.contextmanager
def seconds(limit: int):
    def late(number, frame):
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def started(c: ml_collections.ConfigDict, workdir: Path) -> str:
    """How the start of a run ends: "trained" after a step, or else the line of its refusal."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), seconds(120):
            run.run(c, workdir)
    except UserError as error:
        return line(error)
    return "trained"


@pytest.mark.slow
def test_500_random_configs_start_or_are_refused_in_a_line(tmp_path, monkeypatch) -> None:
    """Prints what it counted. Of a valid config of core keys the train step is traced, and every
    tenth trains a step; of a topic's own keys, whose arms take long, the arms are built."""
    after, fit = loop._Run._after_step, loop.fit
    said, wrong, begun = collections.Counter(), [], time.perf_counter()

    def one_step(self, step, *rest):
        after(self, step, *rest)
        raise loop.Stopped(step + 1)

    def begin(arm, workdir, **more):
        kind = "built"
        if workdir.name.startswith("stub"):
            kind = "trained" if said["traced"] > 10 * said["trained"] else "traced"
        if kind == "traced":
            arm.program.jit_train_step().trace(*arm.program.abstract_arguments())
        said[kind] += 1
        if kind == "trained":
            fit(arm, workdir, **more)
        raise loop.Stopped(0)

    monkeypatch.setattr(loop._Run, "_after_step", one_step)
    monkeypatch.setattr(loop, "fit", begin)
    monkeypatch.setattr(capacity, "host_free", lambda: 6.0 * 2**30)
    for i, (what, c) in enumerate(cases(500, seed=2)):
        if refusal(c):
            said["refused"] += 1
            continue
        try:
            end = started(c, tmp_path / f"{what.split(':')[0]}-{i}")
            said["refused before training"] += end != "trained"
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            print(wrong[-1], flush=True)
        if i % 25 == 0:
            print(i, dict(said), f"{time.perf_counter() - begun:.0f} s", flush=True)
    print(dict(said), f"{len(wrong)} wrong, {time.perf_counter() - begun:.0f} s")
    assert not wrong, "\n".join(wrong)
