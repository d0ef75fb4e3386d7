"""The planner's call and its command: the answer, a config of it, and what it says of bad input."""

import os
import pkgutil
import re
import subprocess
import sys

import pytest
from absl.flags import FlagValues

import fdp.topics
from fdp import config
from fdp.command import one_line
from fdp.keys import UserError
from fdp.price import planner
from fdp.price.hardware import cluster
from tests.price.planning_jobs import SMALL

pytestmark = pytest.mark.fast

REFUSED = [
    ({"model": "llama3-80b"}, "unknown model 'llama3-80b': did you mean 'llama3-"),
    ({"cluster": "h10:4x8"}, "unknown chip 'h10': did you mean 'h100'?"),
    ({"cluster": "h100:0x8"}, "cluster 'h100:0x8' has no nodes: 0×8 h100; every group needs ≥ 1"),
    ({"cluster": "h100:axb"}, "'h100:axb' is not chip:AxB with whole numbers"),
    ({"batch": 0}, "chips=32, batch=0 and seq=4096 must be at least 1"),
    ({"length": 0}, "chips=32, batch=64 and seq=0 must be at least 1"),
    ({"precision": "fp4"}, "h100:4x8 has a chip without fp4: set precision=bf16"),
    ({"cluster": "h100:1x127"}, "none divides the batch 64: set batch="),
    ({"cluster": "l40s:1x1"}, "fits no plan on 1 chips of l40s:1x1: the smallest footprint is"),
]
ASKED = {"model": "llama3-8b", "cluster": "h100:4x8", "batch": 64, "length": 4096}


def test_three_lines_plan_a_model_by_name_or_shape():
    named = planner.plan("llama3-8b", "h100:2x8", batch=64, length=4096)
    assert str(named).startswith("llama3-8b on h100:2x8: 16 chips, batch 64 × 4096 tokens")
    own = planner.plan(SMALL, cluster("h100:1x8"), batch=16, length=1024)
    assert own.job.shape is SMALL and own.plans[0].plan.chips == 8


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_input_is_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        planner.plan(**ASKED | changes)


def test_what_binds_is_a_mistake_of_the_user():
    """Batch or memory, not a bug: commands show the message without a traceback."""
    for where, binds in (("h100:1x127", "divides the batch"), ("l40s:1x1", "GiB of HBM")):
        with pytest.raises(UserError, match=binds):
            planner.plan(**ASKED | {"cluster": where})


def test_the_command_answers_within_five_seconds_and_writes_a_config(tmp_path):
    """A process of its own, with nothing compiled or imported: CPU time, as the machine may be
    shared."""
    flags = ["--model=llama3-8b", "--cluster=h100:2x8", "--batch=64", "--seq_len=4096"]
    before, out = os.times(), tmp_path / "planned.py"
    done = command(*flags, f"--out={out}", f"--topic={topics()[0]}")
    after = os.times()
    spent = sum(after[i] - before[i] for i in (2, 3))  # of children
    assert done.returncode == 0, done.stderr
    assert "llama3-8b on h100:2x8" in done.stdout and f"config    {out}" in done.stdout
    assert spent < 5, f"{spent:.1f} s"
    exec(compile(out.read_text("utf8"), str(out), "exec"), names := {})
    config.validate(names["get_config"]())


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--cluster=h100:0x8"], "error: cluster 'h100:0x8' has no nodes"),
        (["--cluster=h100:1x1"], "error: llama3-70b fits no plan on 1 chips of h100:1x1"),
        (["llama3-8b"], "error: unexpected argument(s) llama3-8b"),
        (
            ["--model=llama3-8b", "--cluster=h100:1x8", "--out=/no/folder/x.py", "--topic=t"],
            "error: cannot write /no/folder/x.py",
        ),
        (["--out=x.py"], "error: --out=FILE and --topic=NAME belong together"),
    ],
)
def test_a_mistake_is_one_line(flags, line, capsys):
    values = FlagValues()
    planner.declare(values)
    rest = values(["planner", *flags])[1:]
    with pytest.raises(SystemExit) as stop, one_line(ValueError):
        planner.run(values, rest)
    assert stop.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith(line) and text.count("\n") == 1


def test_an_unknown_flag_is_one_line_and_help_names_every_flag():
    wrong, told = command("--bach=8"), command("--help")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: Unknown command line flag 'bach'")
    for name in ("model", "cluster", "batch", "seq_len", "precision", "[no]causal", "out", "topic"):
        assert f"--{name}:" in told.stdout, told.stdout
    assert "print(ranking)" in told.stdout


def topics():
    return sorted(m.name for m in pkgutil.iter_modules(fdp.topics.__path__) if m.ispkg)


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "fdp.price.planner", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
