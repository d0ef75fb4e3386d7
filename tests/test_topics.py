"""The contract of topics: what every folder of fdp/topics and every configs/topic*.py must have,
and who imports whom.

Folders and configs are discovered: topic 16 is tested as soon as its files are there.
"""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import ml_collections
import pytest

from fdp import config
from fdp.count import aot
from fdp.dry_run import dry_run
from fdp.experiment import Experiment
from fdp.study import report

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("topic*.py"))
TOPICS = sorted(
    p.name
    for p in (ROOT / "fdp" / "topics").iterdir()
    if p.is_dir() and not p.name.startswith(("_", "."))
)
SOURCES = sorted(
    p for d in ("fdp", "configs", "tests", "benchmarks", "launch") for p in (ROOT / d).rglob("*.py")
)

# Section of a topic's README → what one of its headings says; the seed idea may also open the text
# in bold.
SECTIONS = {
    "question or seed idea": r"^(#+ .*(question|idea)|\*\*(question|seed idea))",
    "prior work": r"^#+ .*prior work",
    "method": r"^#+ .*method",
    "how to run": r"^#+ .*run",
    "measured": r"^#+ .*(measured|results)",
    "limits": r"^#+ .*limit",
    "next": r"^#+ .*next",
}

each_config = pytest.mark.parametrize("name", CONFIGS)
each_topic = pytest.mark.parametrize("topic", TOPICS)


def get_config(name: str, variant: str) -> ml_collections.ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(variant)


def topic_of(name: str) -> str:
    return get_config(name, "cpu").topic


def study_module(topic: str):
    return importlib.import_module(f"fdp.topics.{topic}.study")


# Configs and folders
# --------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_every_topic_has_a_config_and_every_config_a_topic() -> None:
    assert TOPICS, "no topic was found"
    assert sorted(topic_of(name) for name in CONFIGS) == TOPICS


@pytest.mark.fast
@pytest.mark.parametrize("variant", config.VARIANTS)
@each_config
def test_variant_is_valid(name: str, variant: str) -> None:
    c = get_config(name, variant)
    config.validate(c)
    assert c.variant == variant
    own = config.topic_sections(c.topic)
    assert config.flatten(c).keys() == config.flatten(config.base(**own)).keys()
    assert not own.keys() & config.base().keys()
    with pytest.raises(AttributeError):
        c.mesh.no_such_key = 1
    found = arms(c)
    assert found, f"{c.topic} has no arms"
    assert all(isinstance(e, Experiment) for e in found.values())


def arms(c: ml_collections.ConfigDict) -> dict[str, Experiment]:
    """Those of a config, without reading a corpus that is not here."""
    c = c.copy_and_resolve_references()
    c.data.source = "blank"
    return study_module(c.topic).arms(c)


@pytest.mark.fast
@each_config
def test_default_variant_is_cpu_and_unknown_ones_are_refused(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    assert module.get_config() == module.get_config("cpu")
    with pytest.raises(config.UserError, match="unknown variant 'tyni': did you mean 'tiny'"):
        module.get_config("tyni")


@pytest.mark.fast
@each_config
def test_config_docstring_names_claims_commands_and_a_variation(name: str) -> None:
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    command = f"python -m fdp.train --config=configs/{name}.py"
    for needed in (
        "Claim",
        f"{command} ",
        f"{command}:tiny",
        f"{command}:pod --dry_run",
        "--config.",
    ):
        assert needed in text, f"the docstring of configs/{name}.py lacks {needed!r}"
    assert re.search(r"\d+ (s|min)\b", text), (
        f"the docstring of configs/{name}.py names no expected run time"
    )


@pytest.mark.fast
@each_topic
def test_topic_has_arms_and_a_study(topic: str) -> None:
    module = study_module(topic)
    assert list(inspect.signature(module.arms).parameters) == ["config"]
    assert list(inspect.signature(module.study).parameters) == ["run"]
    assert (module.__doc__ or "").strip()


@pytest.mark.fast
@each_topic
def test_topic_readme_has_every_section(topic: str) -> None:
    path = ROOT / "fdp" / "topics" / topic / "README.md"
    assert path.is_file(), f"{topic} has no README.md"
    text = path.read_text(encoding="utf8")
    missing = [
        name for name, pattern in SECTIONS.items() if not re.search(pattern, text, re.M | re.I)
    ]
    assert not missing, f"fdp/topics/{topic}/README.md lacks {missing}"
    measured = re.split(SECTIONS["measured"], text, maxsplit=1, flags=re.M | re.I)[-1]
    measured = re.split(SECTIONS["limits"], measured, maxsplit=1, flags=re.M | re.I)[0]
    assert re.search(r"^\|[ :|-]+\|$", measured, re.M), (
        f"fdp/topics/{topic}/README.md has no measured table"
    )
    commands = {
        f"python -m fdp.train --config=configs/{name}.py"
        for name in CONFIGS
        if topic_of(name) == topic
    }
    assert all(command in text for command in commands), (
        f"fdp/topics/{topic}/README.md lacks {commands}"
    )


# The command
# -------------------------------------------------------------------------------------------------


def train(*arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """`python -m fdp.train …` at the root; it asks for its own devices."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-m", "fdp.train", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=env, timeout=timeout, capture_output=True, text=True, check=False
    )


def relative_to_root(path: Path) -> Path:
    """How a user names a workdir: relative to where the command runs."""
    return Path(os.path.relpath(path, ROOT))


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, str]:
    """(config name, workdir, stdout) of one finished run of its `tiny` variant."""
    name, workdir = request.param, tmp_path_factory.mktemp(request.param)
    done = train(f"--config=configs/{name}.py:tiny", f"--workdir={relative_to_root(workdir)}")
    assert done.returncode == 0, f"{name}:tiny failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return name, workdir, done.stdout


def test_tiny_run_reports_legal_rows(tiny: tuple[str, Path, str]) -> None:
    name, workdir, stdout = tiny
    found = json.loads((workdir / "report.json").read_text(encoding="utf8"))
    report.validate(found, workdir)
    c = get_config(name, "tiny")
    assert (found["topic"], found["variant"], found["config_hash"]) == (
        c.topic,
        "tiny",
        config.digest(c),
    )
    text = (workdir / "report.md").read_text(encoding="utf8")
    for row in found["rows"]:
        assert row["verdict"] in report.VERDICTS
        assert row["evidence"] in report.EVIDENCE
        assert row["claim"] in text
    assert str(relative_to_root(workdir) / "report.md") in stdout


def test_tiny_run_draws_plots(tiny: tuple[str, Path, str]) -> None:
    name, workdir, _ = tiny
    plots = json.loads((workdir / "report.json").read_text(encoding="utf8"))["plots"]
    assert plots, f"{name} draws nothing"
    for plot in plots:
        assert (workdir / plot).read_bytes().startswith(b"\x89PNG\r\n\x1a\n"), f"{plot} is no PNG"
        pixels = matplotlib.image.imread(workdir / plot)
        assert min(pixels.shape[:2]) > 100
        assert pixels[..., :3].std() > 0, f"{plot} is one flat colour"


def test_tiny_run_leaves_what_a_run_must_leave(tiny: tuple[str, Path, str]) -> None:
    name, workdir, _ = tiny
    assert json.loads((workdir / "config.json").read_text(encoding="utf8"))
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf8").splitlines()
    logged = {json.loads(line).get("arm") for line in lines}
    assert logged >= arms(get_config(name, "tiny")).keys()
    assert any((workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("variant", ["pod", "h100"])
@each_config
def test_dry_run_without_compilers_is_abstract(
    name: str, variant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "available", lambda platform: False)
    c = get_config(name, variant)
    dry_run(c)
    out = capsys.readouterr().out
    for word in ("parameters", "optimizer", "activations", "bytes", "FLOPs"):
        assert word in out, f"--dry_run of {name}:{variant} does not print {word}"
    assert "lowered abstractly" in out
    for arm in arms(c):
        assert f"arm {arm}" in out


# Imports run one way
# --------------------------------------------------------------------------------------------------

MAY_IMPORT_TOPICS = (
    "fdp/config.py",
    "fdp/train.py",
    "fdp/run.py",
    "fdp/dry_run.py",
)  # and only by a name made at run time
APART = {"fdp/price/": "fdp.count", "fdp/count/": "fdp.price"}  # neither needs the other
# What a run is made of knows nothing of runs.
PARTS = ("models", "objectives", "sampling", "parallel", "data", "kernels_pallas")
RUNS = ("fdp.arm", "fdp.step", "fdp.loop", "fdp.run", "fdp.study")
BOTTOM = ("fdp.kernels_pallas", "fdp.parallel.masks", "fdp.collectives", "fdp.mesh")


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of everything that a module in `package` imports, wherever the statement
    stands.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offences(source: str, path: str) -> list[str]:
    """What a file at `path` (relative to the root) may not import."""
    tree = ast.parse(source)
    package = ".".join(Path(path).parent.parts)
    found = [name for name in imports(tree, package) if inside(name, "fdp")]
    if path.startswith("fdp/topics/"):
        own = ".".join(Path(path).parts[:3])
        return [name for name in found if inside(name, "fdp.topics") and not inside(name, own)]
    wrong = [name for name in found if inside(name, "fdp.topics")]
    if path not in MAY_IMPORT_TOPICS:
        texts = (
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        )
        wrong += [text for text in texts if re.match(r"fdp\.topics\b", text)]
    for folder, other in APART.items():
        wrong += [name for name in found if path.startswith(folder) and inside(name, other)]
    if path.startswith(tuple(f"fdp/{part}/" for part in PARTS)):
        wrong += [name for name in found if any(inside(name, run) for run in RUNS)]
    if any(inside(path.removesuffix(".py").replace("/", "."), module) for module in BOTTOM):
        wrong += [name for name in found if not any(inside(name, module) for module in BOTTOM)]
    return wrong


@pytest.mark.fast
def test_imports_run_one_way() -> None:
    files = {p.relative_to(ROOT).as_posix(): p for p in SOURCES if p.is_relative_to(ROOT / "fdp")}
    found = {path: offences(p.read_text(encoding="utf8"), path) for path, p in files.items()}
    assert not {path: wrong for path, wrong in found.items() if wrong}


@pytest.mark.fast
def test_one_file_imports_flax_linen() -> None:
    found = [
        p.relative_to(ROOT).as_posix()
        for p in SOURCES
        if p.is_relative_to(ROOT / "fdp")
        and any(
            inside(name, "flax.linen")
            for name in imports(ast.parse(p.read_text(encoding="utf8")), "fdp")
        )
    ]
    assert found == ["fdp/models/module.py"]


COLLECTIVES = {
    *("psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "psum_scatter"),
    *("axis_index", "ragged_all_to_all"),
}


def raw_collectives(source: str) -> list[str]:
    """Collectives of jax.lax that a file names, as `lax.psum` or by import."""
    tree = ast.parse(source)
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    used = [
        n.attr
        for n in attributes
        if n.attr in COLLECTIVES and getattr(n.value, "attr", getattr(n.value, "id", "")) == "lax"
    ]
    return used + [
        name
        for name in imports(tree, "fdp")
        if inside(name, "jax.lax") and name.rpartition(".")[2] in COLLECTIVES
    ]


@pytest.mark.fast
def test_one_file_calls_the_collectives_of_jax() -> None:
    found = {
        p.relative_to(ROOT).as_posix(): used
        for p in SOURCES
        if p.is_relative_to(ROOT / "fdp")
        and (used := raw_collectives(p.read_text(encoding="utf8")))
    }
    assert set(found) == {"fdp/collectives.py"}, found


@pytest.mark.fast
@pytest.mark.parametrize(
    "source",
    ["jax.lax.psum(x, 'tp')", "lax.ppermute(x, 'cp', p)", "from jax.lax import all_to_all"],
)
def test_a_raw_collective_is_found(source: str) -> None:
    assert raw_collectives(source)
    assert not raw_collectives("from fdp.collectives import psum\npsum(x, 'tp')")


@pytest.mark.fast
def test_core_names_no_topic() -> None:
    words = re.compile(rf"\b({'|'.join(TOPICS)})\b")
    core = [p for p in SOURCES if p.is_relative_to(ROOT / "fdp") and "topics" not in p.parts]
    assert not [p for p in core if words.search(p.read_text(encoding="utf8"))]


@pytest.mark.fast
def test_every_class_has_a_name_of_its_own() -> None:
    names: dict[str, list[str]] = {}
    for path in (p for p in SOURCES if p.is_relative_to(ROOT / "fdp")):
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert not {name: paths for name, paths in names.items() if len(paths) > 1}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from fdp.topics.a import checks", "fdp/loop.py"),
        ("from fdp import topics", "fdp/models/layers.py"),
        ("from ..topics.a import study", "fdp/models/layers.py"),
        ("def f():\n    import fdp.topics.a.study", "fdp/step.py"),
        ("from fdp.topics.a import study", "fdp/run.py"),
        ("import importlib\nimportlib.import_module(f'fdp.topics.{x}.study')", "fdp/loop.py"),
        ("from fdp.topics.b.study import arms", "fdp/topics/a/study.py"),
        ("from ..b import study", "fdp/topics/a/study.py"),
        ("from fdp.models import layers", "fdp/kernels_pallas/flash.py"),
        ("from fdp.models import layers", "fdp/collectives.py"),
        ("from fdp.count import flops", "fdp/price/hybrid.py"),
        ("from fdp.price import hardware", "fdp/count/flops.py"),
        ("from fdp.arm import Arm", "fdp/parallel/context/profile.py"),
        ("from fdp import loop", "fdp/objectives/base.py"),
        ("from fdp.study import measure", "fdp/sampling/draw.py"),
    ],
)
def test_a_wrong_import_is_found(source: str, path: str) -> None:
    assert offences(source, path)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("import importlib\nimportlib.import_module(f'fdp.topics.{x}.study')", "fdp/run.py"),
        ("from fdp.topics.a import checks\nfrom fdp.count import hlo", "fdp/topics/a/study.py"),
        ("from . import checks", "fdp/topics/a/study.py"),
        ("from fdp.collectives import psum\nimport jax", "fdp/kernels_pallas/flash.py"),
    ],
)
def test_a_right_import_is_let_through(source: str, path: str) -> None:
    assert not offences(source, path)


# Size and substance of files
# ------------------------------------------------------------------------------------------


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.fast
def test_no_file_exceeds_600_lines() -> None:
    lengths = {relative(p): len(p.read_text(encoding="utf8").splitlines()) for p in SOURCES}
    assert not {path: n for path, n in lengths.items() if n > 600}


@pytest.mark.fast
def test_no_function_exceeds_100_lines() -> None:
    too_long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.end_lineno - node.lineno >= 100
            ):
                too_long[f"{relative(path)}:{node.lineno} {node.name}"] = (
                    node.end_lineno - node.lineno + 1
                )
    assert not too_long


def asserts_something(source: str) -> bool:
    """Whether a test file holds an assert statement, a pytest.raises or an assert_… call."""
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "attr", getattr(node, "id", ""))
        if (
            isinstance(node, ast.Assert)
            or name.startswith("assert_")
            or name in ("raises", "warns")
        ):
            return True
    return False


@pytest.mark.fast
def test_no_test_file_asserts_nothing() -> None:
    files = [p for p in SOURCES if p.is_relative_to(ROOT / "tests") and p.name.startswith("test_")]
    assert not [relative(p) for p in files if not asserts_something(p.read_text(encoding="utf8"))]
    assert not asserts_something("def test_nothing():\n    print('looks fine')\n")
