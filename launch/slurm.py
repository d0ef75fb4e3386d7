"""The command: python -m launch.slurm --config=configs/topic1.py:h100 --nodes=2 [--print]

Writes a batch script for Slurm and submits it; --print shows it instead. One process a GPU, as JAX
expects of Slurm; before the time limit every process gets SIGTERM, saves its state and ends, and
the job is queued again, which resumes in the same workdir. The workdir must be a folder that all
nodes share.
"""

import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from fdp import command, config_file, train
from fdp import config as fdp_config
from fdp.files import write_atomic
from fdp.keys import UserError

NODES = flags.DEFINE_integer("nodes", 1, "number of nodes", lower_bound=1)
GPUS = flags.DEFINE_integer("gpus", None, "GPUs of a node; default: of hardware.topology")
TIME = flags.DEFINE_string("time", "24:00:00", "time limit of one start, as Slurm writes it")
WARNING = flags.DEFINE_integer("warning", 300, "seconds between SIGTERM and the limit", 10)
PARTITION = flags.DEFINE_string("partition", None, "Slurm's partition; default: that of the site")
ACCOUNT = flags.DEFINE_string("account", None, "Slurm's account; default: the user's own")
PRINT = flags.DEFINE_bool("print", False, "print the script and submit nothing")

RESTARTS = 20  # starts of the job, after which the death of a process ends it; SIGTERM never does


@dataclass(frozen=True)
class Job:
    """What the script asks of Slurm, and the arguments of fdp.train."""

    name: str
    nodes: int
    gpus: int
    time: str
    warning: int
    partition: str | None
    account: str | None
    workdir: Path
    arguments: tuple[str, ...]

    def script(self) -> str:
        """The batch script."""
        asked = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.gpus,  # a process a GPU
            "gpus-per-node": self.gpus,  # all visible to all: JAX takes the one of its number
            "time": self.time,
            "signal": f"TERM@{self.warning}",  # to the processes, which save and end
            "output": self.workdir / "slurm-%j.log",
            "open-mode": "append",
            "partition": self.partition,
            "account": self.account,
        }
        lines = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
        call = shlex.join([sys.executable, "-m", "fdp.train", *self.arguments])
        return SCRIPT.format(
            asked="\n".join([*lines, "#SBATCH --requeue"]),
            workdir=shlex.quote(str(self.workdir)),
            folder=shlex.quote(os.getcwd()),
            call=call,
            restarts=RESTARTS,
        )


SCRIPT = """\
#!/bin/bash
{asked}
# Submit it with: mkdir -p {workdir} && sbatch FILE

cd {folder} || exit 1
srun --kill-on-bad-exit=0 {call}
status=$?
case $status in
  143) again=1 ;;  # SIGTERM before the limit: the state is saved
  75|134|137) again=$((${{SLURM_RESTART_COUNT:-0}} < {restarts})) ;;  # a process died
  *) again=0 ;;
esac
[ $again = 1 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
"""


def gpus_of(topology: str) -> int:
    """GPUs of a node of `hardware.topology`, such as h100:8 or h100:4x8."""
    last = topology.partition(":")[2].rpartition("x")[2]
    if not last.isdecimal() or topology.startswith(("v", "tpu")):
        raise UserError(
            f"hardware.topology={topology!r} names no node with GPUs: say how many it has, such as "
            "--gpus=8"
        )
    return int(last)


def job() -> Job:
    """The job that the flags ask for. Raises UserError for a config that its devices cannot run."""
    c, where = train.CONFIG.value, train.workdir().absolute()
    gpus = GPUS.value or gpus_of(c.hardware.topology)
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    changed = dict(config_flags.get_override_values(flags.FLAGS["config"]))
    devices, others = NODES.value * gpus, math.prod(c.mesh.values()) // c.mesh.dp
    if "mesh.dp" not in changed and devices % others == 0:
        c.mesh.dp = changed["mesh.dp"] = devices // others  # the rest of the job is data parallel
    fdp_config.validate(c)
    if math.prod(c.mesh.values()) != devices:
        from fdp.mesh import degrees_equation  # on use: it imports jax

        raise UserError(
            f"{degrees_equation(c.mesh)} devices, but nodes·gpus = {NODES.value}·{gpus} = "
            f"{devices}: change --nodes, --gpus or a --config.mesh.* degree"
        )
    given = [f"--config={file}", *(f"--config.{k}={v}" for k, v in changed.items())]
    return Job(
        name=where.name,
        nodes=NODES.value,
        gpus=gpus,
        time=TIME.value,
        warning=WARNING.value,
        partition=PARTITION.value,
        account=ACCOUNT.value,
        workdir=where,
        arguments=(*given, f"--workdir={where}"),
    )


def main(argv: list[str]) -> int:
    """Print the script, or write and submit it; the exit status."""
    command.refuse_arguments(argv)
    text, where = job().script(), train.workdir()
    if PRINT.value:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: run this where Slurm is, or look with --print")
    where.mkdir(parents=True, exist_ok=True)
    write_atomic(where / "slurm.sh", text)
    return subprocess.run(["sbatch", str(where / "slurm.sh")], check=False).returncode


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.launch(main, config_file.parse_flags)
