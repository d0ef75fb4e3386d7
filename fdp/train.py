"""The command: python -m fdp.train --config=configs/topic1.py[:variant] [--workdir=…] [--dry_run]
[--config.key=…]
"""

import logging
import math
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

# Before jax is imported: queued multi-device programs starve XLA's CPU thread pool otherwise (jax <
# 0.12).
os.environ.setdefault("NPROC", "64")

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


def default_workdir() -> Path:
    """runs/<config file>-<variant>, under the current directory."""
    stem = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    return Path("runs") / f"{stem}-{CONFIG.value.variant}"


def refused_override(argv: list[str]) -> str:
    """Why an override in `argv` is refused by the declaration of its key; "" where none is."""
    words = "\0".join(argv)  # no argument holds this character
    file = re.search(r"\0--?config[=\0]([^\0]+)", words)
    overrides = re.finditer(r"\0--?(?:no)?config\.([\w.]+)(?:=([^\0]*)|\0(?!-)([^\0]*))?", words)
    if file is None:
        return ""
    try:
        config: Any = flags.FLAGS["config"].parser.parse(file[1])
    except (flags.Error, OSError, ValueError):  # the file itself is refused: the caller says why
        return ""
    try:
        for found in overrides:
            key, *texts = found.groups()
            text = next((text for text in texts if text is not None), None)
            fdp_config.check_override(key, text, config.topic)
    except fdp_config.UserError as error:
        return str(error)
    return ""


def parse_flags(argv: list[str]) -> list[str]:
    """Parse with absl. Every mistake becomes one `error:` line; a bug inside a config file keeps
    its traceback."""
    flags.FLAGS.set_default("verbosity", -1)  # warnings: libraries narrate at absl's default
    try:
        rest = flags.FLAGS(argv)
        _ = CONFIG.value.topic  # a config file that is not there shows itself at the first access
        return rest
    except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        if not isinstance(error, flags.Error | OSError) and any(
            frame.name == "get_config" for frame in traceback.extract_tb(error.__traceback__)
        ):
            raise
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        told = error.args[0] if isinstance(error, KeyError) else error
        message = " ".join(str(cause if isinstance(cause, fdp_config.UserError) else told).split())
    print(f"error: {refused_override(argv) or message}", file=sys.stderr)
    sys.exit(1)


def quiet() -> None:
    """JAX reports, at level info, each accelerator that is not there, and matplotlib that it lists
    fonts; absl's handler would print it.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)


def main(argv: list[str]) -> None:
    """Validate, then dry-run or train every arm and write the topic's report."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument(s): {' '.join(argv[1:])}")
    config = CONFIG.value
    quiet()
    try:
        fdp_config.validate(config)
        needed = math.prod(config.mesh.values())
        if DRY_RUN.value:
            from fdp.dry_run import dry_run

            dry_run(config)
            return
        from fdp import process

        process.start(max(needed, 8))  # a study may compare meshes although training uses one
        from fdp.run import run

        run(
            config,
            Path(WORKDIR.value) if WORKDIR.value else default_workdir(),
            " ".join(sys.argv[1:]),
        )
        process.finish()
    except fdp_config.UserError as error:
        from fdp import process

        process.leave(1, f"error: {error}")
    except KeyboardInterrupt:  # while modules are imported, or in a dry run
        print(f"\nstopped. Start again with:\n  python -m fdp.train {' '.join(sys.argv[1:])}")
    except Exception as error:
        from fdp import process

        process.failed(error)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
