"""What was measured is found again, and nothing else is: not of another config, version, seed,
value or code, and not from a damaged file."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from fdp.arm import Arm
from fdp.config import UserError
from fdp.study import cache as kept
from fdp.study import claims
from fdp.study.cache import Cache
from fdp.study.figures import figure
from fdp.study.measure import derive, each, measure, perform
from fdp.study.report import Report, Row

pytestmark = pytest.mark.fast
CONTEXT = {"config": "0123", "jax": "0.10.2"}
calls: list[Any] = []


@dataclass(frozen=True)
class Point:
    """A result with parts."""

    name: str
    at: tuple[int, float]
    more: dict[Any, Any] = field(default_factory=dict)


class Pair(NamedTuple):
    """Another."""

    a: Any
    b: Any


def square(x):
    """Counts its calls."""
    calls.append(x)
    return np.square(x)


def label(arm, scale=1):
    """Of an arm."""
    calls.append((arm.label, scale))
    return Point(arm.label, (arm.seed, 0.5), {("all-reduce", ("tp",)): scale})


def add(*xs):
    """Of results."""
    calls.append(("add", *xs))
    return sum(float(np.sum(x)) for x in xs)


def row(value):
    """One row."""
    return Row.judged("it is small", "value", value, "", "<= 100", "counted")


def arm_of(seed: int, step: int = 3, weight: float = 1.0) -> Arm:
    """An arm that has been trained, as far as the cache can see."""
    arm = Arm.__new__(Arm)
    arm.name, arm.seed = "mdlm", seed
    weights = {"params": {"w": np.full(4, weight, np.float32)}}
    state = SimpleNamespace(step=np.int32(step), variables=weights)
    arm.__class__ = type("Trained", (Arm,), {"trained_on_host": state})
    return arm


@pytest.fixture
def go(tmp_path, capsys):
    """Performs parts in one workdir: (what was found, what was called, what was said)."""

    def run(*parts, context=CONTEXT, workdir=tmp_path):
        calls.clear()
        found = perform(parts, Cache(workdir, context), workdir)
        return found, list(calls), capsys.readouterr().out

    return run


# Finding again
# --------------------------------------------------------------------------------------------------


def test_a_second_start_measures_nothing_and_reports_the_same(go, tmp_path) -> None:
    def parts():
        squares = measure("square", square, each([1, 2, 3]), plot=curve)
        arms = measure("label", label, each([arm_of(0), arm_of(1)]), 5, group="Arms", rows=three)
        return squares, arms, derive("sum", measure("total", add, squares, 4), rows=row)

    def curve(values):
        fig, axes = figure()
        axes.plot(values)
        return {"curve": fig}

    def three(points):
        assert [p.at for p in points] == [(0, 0.5), (1, 0.5)]
        return [row(points[0].at[1])]

    first, called, said = go(*parts())
    assert called == [1, 2, 3, ("mdlm-s0", 5), ("mdlm-s1", 5), ("add", [1, 4, 9], 4)]
    lines = said.splitlines()
    assert [x.split(": ")[-1] for x in lines[:5]] == [
        "square 1",
        "square 2",
        "square 3",
        "label mdlm-s0",
        "label mdlm-s1",
    ]
    assert re.fullmatch(r"study     1 of 6 after \d:\d\d: square 1", lines[0])
    assert re.match(r"study     4 of 6 after \d:\d\d, about \d:\d\d left: label", lines[3])
    second, called, said = go(*parts())
    assert called == []
    assert re.fullmatch(r"study     6 measured, 6 of them at an earlier start; \d:\d\d\n", said)
    assert (second.rows, second.raw, second.plots) == (first.rows, first.raw, first.plots)
    assert [r.group for r in second.rows] == ["Arms", ""]
    assert second.plots == [Path("plots/curve.png")]
    assert (tmp_path / "plots" / "curve.png").is_file()
    assert second.raw["square"] == [1, 4, 9] and second.raw["total"] == 18.0


@pytest.mark.parametrize(
    ("context", "said"),
    [
        ({"config": "4567", "jax": "0.10.2"}, "of another config: 0123, now 4567"),
        ({"config": "0123", "jax": "0.12.0"}, "of another jax: 0.10.2, now 0.12.0"),
        ({"config": "0123"}, "of another jax: 0.10.2, now not stated"),
    ],
)
def test_what_another_config_or_version_measured_is_measured_again(go, context, said) -> None:
    go(measure("s", square, 2))
    _, called, out = go(measure("s", square, 2), context=context)
    assert called == [2]
    (line,) = [x for x in out.splitlines() if "measured again" in x]
    assert said in line


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (arm_of(1), '"mdlm-s0 at step 3'),
        (arm_of(0, step=4), '"mdlm-s0 at step 3'),
        (arm_of(0, weight=2.0), '"mdlm-s0 at step 3'),
    ],
)
def test_what_another_seed_step_or_state_gave_is_measured_again(go, other, said) -> None:
    go(measure("l", label, arm_of(0)))
    assert go(measure("l", label, arm_of(0)))[1] == []
    _, called, out = go(measure("l", label, other))
    assert len(called) == 1
    assert "l.npz is of another argument 1: " + said in out


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 2),
        (1.0, 1),
        ("1", 1),
        ([1], (1,)),
        (np.arange(3), np.arange(3.0)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (Point("a", (1, 2.0)), Point("b", (1, 2.0))),
        ({"a": 1}, {"a": 2}),
        (ml_collections.ConfigDict({"a": {"b": 1}}), ml_collections.ConfigDict({"a": {"b": 2}})),
        (square, add),
        (Path("a"), Path("b")),
        ([arm_of(0)], [arm_of(1)]),
    ],
)
def test_other_values_are_told_apart(a, b) -> None:
    assert kept.describe(a) == kept.describe(a) != kept.describe(b)


def test_a_result_that_changed_changes_what_builds_on_it(go) -> None:
    first = measure("s", square, 2)
    go(measure("sum", add, first))
    assert go(measure("sum", add, measure("s", square, 2)))[1] == []
    _, called, out = go(measure("sum", add, measure("s", square, 3)))
    assert called == [3, ("add", 9)]
    assert out.count("measured again") == 2


@pytest.mark.parametrize(
    "changed", ["work.py", "constants.py", "deeper.py", "coefficients/link.json"]
)
def test_changed_code_constants_and_data_are_measured_again(tmp_path, monkeypatch, changed) -> None:
    """Of the function's module, of one that it only takes a constant from, of one behind that, and
    of the coefficients beside them."""
    folder = tmp_path / "kit_package"
    (folder / "coefficients").mkdir(parents=True)
    sources = {
        "__init__.py": "",
        "work.py": "from kit_package.constants import X\n\ndef f():\n    return X\n",
        "constants.py": "from kit_package.deeper import Y\nX = Y + 1\n",
        "deeper.py": "Y = 1\n",
        "coefficients/link.json": "{}",
    }
    for name, source in sources.items():
        (folder / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.startswith("kit_package")]:
        monkeypatch.delitem(sys.modules, name)
    work = importlib.import_module("kit_package.work")

    def code() -> str:
        for function in (kept._source, kept._imported):
            function.cache_clear()
        return kept.code_of(work.f)

    before = code()
    assert code() == before
    with (folder / changed).open("a") as file:
        file.write("\n")
    assert code() != before


def test_a_measurement_reaches_what_its_module_stands_on() -> None:
    assert {"fdp.count.compare", "fdp.step", "fdp.collectives"} <= kept.reached(claims.__name__)


# Damaged and foreign files
# --------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not a result")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60] ^= 255  # in the compressed result.json
    path.write_bytes(bytes(content))


def other_arrays(path: Path) -> None:
    np.savez(path, a=np.zeros(3))


def other_class(path: Path) -> None:
    """A file may not name what is run."""
    key = {**CONTEXT, "function": "", "code": "", "argument 1": "2"}
    value = {"~class": "subprocess:Popen", "fields": {"args": "true"}}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("result.json", json.dumps({"key": key, "value": value}))


@pytest.mark.parametrize("damage", [truncated, empty, text, flipped, other_arrays, other_class])
def test_a_damaged_or_foreign_file_is_measured_again_and_said(go, tmp_path, damage) -> None:
    parts = measure("s", square, np.arange(100.0)), row(1)
    first, _, _ = go(*parts)
    damage(tmp_path / "measured" / "s.npz")
    second, called, out = go(*parts)
    assert len(called) == 1 and second.raw == first.raw
    (line,) = [x for x in out.splitlines() if "measured again" in x]
    assert "measured/s.npz is truncated or no result of this program" in line
    assert go(*parts)[1] == []


def test_a_folder_where_a_file_should_be_is_said(go, tmp_path) -> None:
    (tmp_path / "measured" / "s.npz").mkdir(parents=True)
    with pytest.raises(UserError, match=r"keeping .*measured/s.npz: .* Fix: free space there"):
        go(measure("s", square, 2))


# Results
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2.5, "a", True, None, float("inf")],
        {"a": (1, 2), 3: [Pair(1, {"x": np.float32(2)})]},
        Point("p", (1, 0.1), {("all-reduce", ("tp",)): np.arange(4)}),
        {"bool": np.array([True]), "text": np.array(["a", "bc"]), "big": np.uint64(2**63)},
    ],
)
def test_results_come_back_as_they_were(tmp_path, value) -> None:
    store = Cache(tmp_path, CONTEXT)
    for got in (store.keep("r", {}, value, 0.1), store.find("r", {})):
        assert repr(got) == repr(value)


def test_arrays_of_jax_come_back_as_arrays(tmp_path) -> None:
    got = Cache(tmp_path, {}).keep("r", {}, {"x": jnp.arange(3.0)}, 0.1)
    np.testing.assert_array_equal(got["x"], [0, 1, 2])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "object .* cannot be kept"),
        (jnp.zeros(2, jnp.bfloat16), "an array of bfloat16 cannot be kept: give it as float32"),
        ({"f": square}, "function .* cannot be kept"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path, value, message) -> None:
    with pytest.raises(TypeError, match=message):
        Cache(tmp_path, {}).keep("r", {}, value, 0.1)
    assert not list(tmp_path.rglob("*.npz"))


def test_raw_json_holds_numbers_and_the_shapes_of_long_arrays(go) -> None:
    found, _, _ = go(
        measure("long", square, np.arange(2000.0)), measure("short", square, 3, raw=str)
    )
    assert found.raw == {"long": "float64 [2000] in measured/", "short": "9"}


# Mistakes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "names"),
    [
        (["a", "b"], ["a", "b"]),
        ([("dp2", {}), ("tp2", {})], ["dp2", "tp2"]),
        ([Point("p", (0, 1.0)), Point("q", (0, 1.0))], ["p", "q"]),
        ([Point("p", (0, 1.0)), Point("p", (1, 1.0))], ["0", "1"]),
        (["a/b", "a b"], ["0", "1"]),
        ([{"a": 1}, {"b": 2}], ["0", "1"]),
    ],
)
def test_each_call_is_named_after_its_item(go, tmp_path, items, names) -> None:
    go(measure("m", text_of, each(items)))
    found = sorted(p.stem for p in (tmp_path / "measured").iterdir())
    assert found == [f"m_{name}" for name in names]


def text_of(item):
    return str(item)


def test_mistakes_in_a_study_are_named(go) -> None:
    with pytest.raises(ValueError, match="measure a function that has a name in a module"):
        measure("m", lambda: 1)
    with pytest.raises(ValueError, match="two measurements are named 'a b'"):
        go(measure("a b", square, 1), measure("a/b", square, 2))
    with pytest.raises(ValueError, match=r"'m': each\(\) of 2, 3 values cannot go in step"):
        go(measure("m", add, each([1, 2]), each([1, 2, 3])))
    with pytest.raises(TypeError, match=r"made of measurements and rows, not of 'text'"):
        go("text")
    with pytest.raises(TypeError, match=r"argument 1 of 'm': object .* cannot be kept"):
        go(measure("m", square, object()))


# Killed
# --------------------------------------------------------------------------------------------------


def test_a_study_killed_at_ten_random_instants_repeats_nothing(tmp_path) -> None:
    script, workdirs = Path(__file__).with_name("killed.py"), (tmp_path / "a", tmp_path / "b")
    done = subprocess.run([sys.executable, script, *workdirs, "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [x for x in done.stdout.splitlines() if x.startswith("killed")]
    assert said == [f"killed {n} times, exit status 0" for n in (0, 10)]
    for name in ("report.json", "report.md", "raw.json"):
        assert (workdirs[0] / name).read_bytes() == (workdirs[1] / name).read_bytes()


class Killed(BaseException):
    """What a kill is to the code that it strikes."""


@pytest.mark.parametrize("at", range(6))
def test_killed_before_or_after_any_replacement_of_a_file(go, tmp_path, monkeypatch, at) -> None:
    replace, writes = os.replace, [0]

    def failing(source, target):
        writes[0] += 1
        if writes[0] == at // 2 + 1:
            if at % 2:
                replace(source, target)
            raise Killed
        replace(source, target)

    parts = measure("square", square, each([1, 2, 3])), row(1)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Killed):
        go(*parts)
    monkeypatch.setattr(os, "replace", replace)
    found, called, _ = go(*parts)
    assert len(called) == 3 - (at + 1) // 2
    assert found.raw == {"square": [1, 4, 9]}
    Report("t", "tiny", "0", found.rows, found.plots, found.raw).write(tmp_path)
