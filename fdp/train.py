"""The command: python -m fdp.train --config=configs/topic1.py[:variant] [--workdir=…] [--dry_run]
[--config.key=…]
"""

if __name__ == "__main__":  # before the imports below, which take a second
    from fdp import signals

    signals.exit_at_once("\nstopped")

import logging
import math
import os
import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

# Before jax is imported: queued multi-device programs starve XLA's CPU thread pool otherwise (jax <
# 0.12).
os.environ.setdefault("NPROC", "64")

from fdp import command, config_file
from fdp import config as fdp_config

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/topicN.py[:variant]; override with --config.key=value"
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "results and checkpoints; default runs/<config>-<variant>"
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "compile for the target hardware and print what it needs; run nothing"
)


def workdir() -> Path:
    """--workdir, or runs/<config file>-<variant> under the current directory."""
    if WORKDIR.value:
        return command.folder(WORKDIR.value)
    stem = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    return Path("runs") / f"{stem}-{CONFIG.value.variant}"


def quiet() -> None:
    """JAX reports, at level info, each accelerator that is not there, and matplotlib that it lists
    fonts; absl's handler would print it.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)


def main(argv: list[str]) -> int:
    """Validate, then dry-run or train every arm and write the topic's report; the exit status.
    Raises UserError for what the user can fix."""
    command.refuse_arguments(argv)
    config = CONFIG.value
    quiet()
    fdp_config.validate(config)
    where = workdir()
    if DRY_RUN.value:
        from fdp.dry_run import dry_run

        dry_run(config)
        return 0
    from fdp import process

    try:
        # A study may compare meshes although training uses one device.
        process.start(max(math.prod(config.mesh.values()), 8))
        from fdp.run import run

        status = run(config, where, shlex.join(sys.argv[1:]))
        process.finish()
    except Exception as error:
        if text := command.told(error):
            process.leave(command.ERROR, text)
        process.failed(error)
    return status


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.launch(main, config_file.parse_flags)
