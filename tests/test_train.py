"""The real command, as a process of its own: what it leaves, and that no kill, signal or full disk
loses what it saved.

One small experiment is run four ways: from start to end (`reference`), killed, stopped and starved
of disk again and again until it is through (`history`), and from damaged or foreign working
directories."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from fdp.metrics import read_metrics
from fdp.study import report

ROOT = Path(__file__).parent.parent
STEPS = 24
ARMS = ("mdlm", "ar")
PATIENCE = 300.0  # seconds for one process on a crowded machine


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same few thousand bytes of text at every call."""
    draw = random.Random(0)
    words = [
        "in",
        "the",
        "beginning",
        "was",
        "a",
        "word",
        "and",
        "it",
        "went",
        "on",
        "until",
        "stones",
        "spoke",
    ]
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(100)))
    return path


def flags(corpus: Path, workdir: Path, *more: str) -> list[str]:
    """A short experiment with many saves; later flags win."""
    small = {
        "data.source": corpus,
        "data.tokenizer": "byte",
        "data.seq_len": 16,
        "data.val_fraction": 0.1,
        "model.vocab": 264,
        "model.layers": 1,
        "model.width": 32,
        "model.head_dim": 8,
        "train.batch": 8,
        "train.steps": STEPS,
        "eval.every": 9,
        "eval.batches": 2,
        "eval.samples": 1,
        "checkpoint.every": 4,
        "log.every": 1,
    }
    return [
        "--config=tests/stub/config.py:tiny",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in small.items()),
        *more,
    ]


def environment() -> dict[str, str]:
    """That of a user's shell: the command has to ask for its eight devices itself."""
    return {
        k: v
        for k, v in os.environ.items()
        if k not in ("JAX_NUM_CPU_DEVICES", "NPROC", "XLA_FLAGS")
    }


# Runs the interpreter with the arguments that follow; no file may grow beyond 16 KiB: metrics fit,
# checkpoints do not.
ON_A_FULL_DISK = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
# Or half-written programs stay in the cache.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@dataclass
class Outcome:
    """How a process ended and what it printed."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def started(arguments: list[str], launcher: list[str] | None = None) -> Iterator[subprocess.Popen]:
    """`python -m fdp.train` with `arguments`, killed if the test leaves it running."""
    process = subprocess.Popen(
        [sys.executable, *(launcher or []), "-m", "fdp.train", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process: subprocess.Popen) -> Outcome:
    out, err = process.communicate(timeout=PATIENCE)
    return Outcome(process.returncode, out, err)


def train(arguments: list[str], launcher: list[str] | None = None) -> Outcome:
    with started(arguments, launcher) as process:
        return finish(process)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    """Poll until `happened` or fail: the process ended first, or the patience did."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, (
            f"the command ended first:\n{process.communicate()[1][-2000:]}"
        )
        assert time.monotonic() < deadline, "the command did not get there"
        time.sleep(0.002)


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Metric rows without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")}
        for row in read_metrics(workdir)
    ]


def newest_row(workdir: Path, arm: str) -> int:
    """The last step that the arm has logged."""
    path = workdir / "metrics.jsonl"
    text = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((row["step"] for row in map(json.loads, text) if row["arm"] == arm), default=0)


def checkpoints(workdir: Path, arm: str) -> list[int]:
    """Steps of the complete checkpoints."""
    folder = workdir / "checkpoints" / f"{arm}-s0"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Workdir and outcome of the uninterrupted run."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    return workdir, train(flags(corpus, workdir))


def test_the_command_trains_every_arm_and_leaves_its_report(
    reference: tuple[Path, Outcome],
) -> None:
    workdir, outcome = reference
    assert outcome.code == 0, outcome.err
    assert "8 virtual CPU devices" in outcome.out
    assert "pp·dp·ep·cp·tp = 1·2·1·1·4 = 8" in outcome.out
    found = json.loads((workdir / "report.json").read_text())
    report.validate(found, workdir)
    assert {r["evidence"] for r in found["rows"]} >= {"measured", "counted"}
    for plot in found["plots"]:
        assert matplotlib.image.imread(workdir / plot).std() > 0, f"{plot} is one flat colour"
    samples = (workdir / "samples.txt").read_text()
    assert all(f"[{arm}] " in samples for arm in ARMS)
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["config"]["train.steps"] == STEPS
    assert stored["config_hash"] == found["config_hash"]


def test_the_command_logs_every_step_and_keeps_the_newest_checkpoints(
    reference: tuple[Path, Outcome],
) -> None:
    workdir, _ = reference
    for arm in ARMS:
        mine = [row for row in rows(workdir) if row["arm"] == arm]
        assert [r["step"] for r in mine if "loss" in r] == list(range(1, STEPS + 1))
        assert [r["step"] for r in mine if "val_loss" in r] == [9, 18, STEPS]
        assert mine[-1]["val_loss"] < mine[0]["loss"]
        assert checkpoints(workdir, arm) == [STEPS - 8, STEPS - 4, STEPS]


def kill_after_a_save(arguments: list[str], workdir: Path) -> Outcome:
    """kill -9 once a checkpoint is complete and a later step logged."""
    later = lambda: newest_row(workdir, "mdlm") > min(checkpoints(workdir, "mdlm"), default=STEPS)
    with started(arguments) as process:
        wait_until(later, process)
        process.kill()
        return finish(process)


def kill_in_a_save(arguments: list[str], workdir: Path) -> Outcome:
    """kill -9 while a checkpoint is half-written: the process is frozen first, to be sure that it
    is.
    """
    unfinished = lambda: list((workdir / "checkpoints").glob("*/*.orbax-checkpoint-tmp*"))
    with started(arguments) as process:
        while True:
            wait_until(lambda: bool(unfinished()), process)
            process.send_signal(signal.SIGSTOP)
            if unfinished():
                break
            process.send_signal(signal.SIGCONT)
        process.kill()
        outcome = finish(process)
    assert unfinished(), "nothing half-written was left: this test tests nothing"
    return outcome


def stop_in_the_second_arm(arguments: list[str], workdir: Path) -> Outcome:
    with started(arguments) as process:
        wait_until(lambda: newest_row(workdir, "ar") >= 2, process)
        process.send_signal(signal.SIGTERM)
        return finish(process)


@dataclass
class Stage:
    """One start of the interrupted run: its outcome and the checkpoints of the first arm after
    it.
    """

    outcome: Outcome
    saved: list[int]


@pytest.fixture(scope="module")
def history(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Stage]]:
    """kill -9, kill -9 in a save, full disk, SIGTERM, and at last the resume command that the
    latter printed.
    """
    workdir = tmp_path_factory.mktemp("history") / "run"
    arguments = flags(corpus, workdir)
    stages: dict[str, Stage] = {}

    def stage(name: str, outcome: Outcome) -> Outcome:
        stages[name] = Stage(outcome, checkpoints(workdir, "mdlm"))
        return outcome

    stage("killed", kill_after_a_save(arguments, workdir))
    stage("killed in a save", kill_in_a_save(arguments, workdir))
    stage("full disk", train(arguments, ["-c", ON_A_FULL_DISK]))
    stopped = stage("stopped", stop_in_the_second_arm(arguments, workdir))
    resume = shlex.split(stopped.out.strip().splitlines()[-1])
    stage("finished", train(resume[3:]))
    return workdir, stages


def test_a_killed_run_resumes_from_its_newest_checkpoint(
    history: tuple[Path, dict[str, Stage]],
) -> None:
    _, stages = history
    assert stages["killed"].outcome.code == -signal.SIGKILL
    before, after = stages["killed"].saved, stages["killed in a save"].saved
    assert before
    assert after[-1] >= before[-1]
    assert f"mdlm-s0: resumed at step {after[-1]} of {STEPS}" in stages["full disk"].outcome.out


def test_a_full_disk_is_one_clear_line_and_costs_no_checkpoint(
    history: tuple[Path, dict[str, Stage]],
) -> None:
    workdir, stages = history
    full = stages["full disk"]
    assert full.outcome.code == 1
    assert "Traceback" not in full.outcome.err
    (line,) = [x for x in full.outcome.err.splitlines() if x.startswith("error: ")]
    assert line.startswith(f"error: saving checkpoint {workdir / 'checkpoints' / 'mdlm-s0'}/")
    assert "File too large (EFBIG). Fix: raise the limit of a file's size" in line
    before = stages["killed in a save"].saved
    assert full.saved == before
    assert f"resumed at step {before[-1]} of {STEPS}" in stages["stopped"].outcome.out


def test_sigterm_saves_exits_143_and_prints_the_command_that_resumes(
    history: tuple[Path, dict[str, Stage]],
) -> None:
    workdir, stages = history
    stopped = stages["stopped"].outcome
    assert stopped.code == 143, stopped.err
    *_, said, command = stopped.out.strip().splitlines()
    assert said.startswith("stopped after step ")
    assert said.endswith("; state saved. Resume with:")
    assert command.split()[:3] == ["python", "-m", "fdp.train"]
    assert f"--workdir={workdir}" in command.split()
    step = said.split("stopped after step ")[1].split(";")[0]
    assert f"ar-s0: resumed at step {step} of {STEPS}" in stages["finished"].outcome.out


def test_a_run_interrupted_in_every_way_ends_in_the_losses_of_the_uninterrupted_one(
    history: tuple[Path, dict[str, Stage]], reference: tuple[Path, Outcome]
) -> None:
    workdir, stages = history
    assert stages["finished"].outcome.code == 0, stages["finished"].outcome.err
    assert rows(workdir) == rows(reference[0])
    for name in ("report.json", "report.md", "samples.txt"):
        assert (workdir / name).exists(), name
    assert (workdir / "samples.txt").read_bytes() == (reference[0] / "samples.txt").read_bytes()


def copy_of(workdir: Path, target: Path) -> Path:
    return Path(shutil.copytree(workdir, target))


def test_a_truncated_newest_checkpoint_falls_back_to_the_previous_one_and_says_so(
    corpus: Path, reference: tuple[Path, Outcome], tmp_path: Path
) -> None:
    workdir = copy_of(reference[0], tmp_path / "run")
    damaged = workdir / "checkpoints" / "ar-s0" / str(STEPS)
    for path in damaged.rglob("*"):
        if path.is_file() and path.stat().st_size:
            os.truncate(path, path.stat().st_size // 2)
    outcome = train(flags(corpus, workdir))
    assert outcome.code == 0, outcome.err
    assert f"fell back to the checkpoint of step {STEPS - 4} in {damaged.parent}" in outcome.err
    assert f"ar-s0: resumed at step {STEPS - 4} of {STEPS}" in outcome.out
    assert rows(workdir) == rows(reference[0])
    assert checkpoints(workdir, "ar")[-1] == STEPS
    assert (damaged.parent / f"damaged-{STEPS}").is_dir()


def refused(arguments: list[str]) -> str:
    """The one error line of a command that refuses to run."""
    outcome = train(arguments)
    assert outcome.code == 1, outcome.out
    assert "Traceback" not in outcome.err
    (line,) = [x for x in outcome.err.splitlines() if x.startswith("error: ")]
    return line


def test_the_workdir_of_another_config_is_refused_unless_allowed(
    corpus: Path, reference: tuple[Path, Outcome], tmp_path: Path
) -> None:
    workdir = copy_of(reference[0], tmp_path / "run")
    longer = flags(corpus, workdir, f"--config.train.steps={STEPS + 2}")
    before = (workdir / "config.json").read_bytes()
    message = refused(longer)
    assert f"{workdir} was made by another config: train.steps: {STEPS} -> {STEPS + 2}" in message
    assert "--workdir=" in message
    assert "--config.checkpoint.allow_config_change=True" in message
    assert (workdir / "config.json").read_bytes() == before
    with started([*longer, "--config.checkpoint.allow_config_change=True"]) as process:
        wait_until(lambda: newest_row(workdir, "mdlm") == STEPS + 2, process)
    mine = [row["step"] for row in rows(workdir) if row["arm"] == "mdlm" and "loss" in row]
    assert mine == list(range(1, STEPS + 3))


def test_no_config_is_one_error_line_and_help_shows_three_flags() -> None:
    asked = "name a file, such as --config=configs/topic1.py:tiny"
    assert refused([]) == f"error: there is no --config: {asked}"
    assert refused(["--config=configs"]) == f"error: --config=configs is a folder: {asked}"
    gone = "error: --config=configs/topic0.py: there is no such file: did you mean 'topic"
    assert refused(["--config=configs/topic0.py:tiny"]).startswith(gone)
    shown = train(["--help"])
    own = shown.out.split("/train.py:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  --(\S+):", own, re.MULTILINE) == ["config", "[no]dry_run", "workdir"]


# Runs the command once for each list of arguments, in one process.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from absl import flags
from fdp import command, config_file, train
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            command.launch(train.main, config_file.parse_flags)
        except SystemExit as stop:
            print(json.dumps([stop.code, err.getvalue()]))
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
"""

WITHOUT_JAX = f'import sys\nsys.modules["jax"] = None\n{ONE_AFTER_ANOTHER}'


def refusals(script: str, commands: list[list[str]]) -> list[str]:
    """The one error line of each of several commands that refuse to run, from one process."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _ in found] == [1] * len(commands)
    for _, err in found:
        assert err.startswith("error: ") and err.count("\n") == 1, err
    return [err.removeprefix("error: ") for _, err in found]


def test_a_bad_corpus_is_one_error_line(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    texts = {
        "absent": None,
        "empty": " \n",
        "short": "\n\n".join("abcdefghij"),
        "lopsided": "\n\n".join(["a long first paragraph " * 40, "a short second one"]),
    }
    paths = {name: tmp_path / f"{name}.txt" for name in texts}
    for name, text in texts.items():
        if text is not None:
            paths[name].write_text(text)
    more = {"short": ("--config.data.seq_len=4096",), "lopsided": ("--config.data.seq_len=8",)}
    commands = [flags(path, workdir, *more.get(name, ())) for name, path in paths.items()]
    absent, empty, short, lopsided = refusals(ONE_AFTER_ANOTHER, commands)
    assert absent.strip() == (
        f"data.source='{paths['absent']}': no such file or folder ({paths['absent']}); "
        "sources are bible, stdlib, bible+stdlib, hf:<name> and paths of text"
    )
    assert empty.strip() == (
        f"{paths['empty']} is not UTF-8 text (holds no text): write some into it"
    )
    assert short.startswith(
        "sequence length 4096 is longer than the training split of the corpus ("
    )
    assert "set data.seq_len=16 or use a larger corpus" in short
    assert "a batch of 8 sequences of 8 tokens is longer than the validation split" in lopsided
    assert not workdir.exists(), "a refused command binds no workdir to its config"


BAD_CONFIGS = {
    "train.stepz=3": "unknown config key 'train.stepz': did you mean 'train.steps'?",
    "train.batch=abc": "train.batch='abc' must be an integer of at least 1 (global batch; ",
    "train.batch=0": "train.batch=0 must be an integer of at least 1 (global batch; sequences): "
    "set",
    "train.batch=12.0": "train.batch=12.0 must be an integer of at least 1 (global batch; sequenc",
    "train.lr=nan": "train.lr=nan must be a finite number in (0, inf) (peak learning rate): set ",
    "train.clip=0": "train.clip=0.0 must be a number in (0, inf] (largest global gradient norm): ",
    "seeds=a": "seeds=('a',) holds 'a', which must be an integer of at least 0 (one run of every",
    "seeds=0,0": "seeds=(0, 0) names 0 twice: set seeds=(0,)",
    "model=5": "model='5' replaces a section of keys: set one of them, such as model.layers=4",
    "model={'layers':3}": "model={'layers': 3} replaces a section of keys: set one of them, such ",
    "model.vocab=100000000000": "model.vocab=100000000000 must be an integer of at most 2147483647",
    "sampling.policies=drift": "sampling.policies=('drift',) holds 'drift', which is unknown: did ",
    "plan.batch=8": "unknown config key 'plan.batch': did you mean 'train.batch'?",
}


def test_a_bad_config_is_one_error_line_before_jax_is_imported() -> None:
    commands = [["--config=configs/topic1.py:tiny", f"--config.{bad}"] for bad in BAD_CONFIGS]
    for start, err in zip(BAD_CONFIGS.values(), refusals(WITHOUT_JAX, commands), strict=True):
        assert err.startswith(start), err
