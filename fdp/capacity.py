"""What a run needs against the memory that is free, before anything is allocated."""

import contextlib
import math
import os
from pathlib import Path

import ml_collections
from jax.sharding import Mesh

from fdp import config as fdp_config
from fdp import config_sizes
from fdp.mesh import is_virtual


def check(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raise UserError, with the equation, for what the devices of `mesh` cannot hold."""
    devices = [d for d in mesh.devices.flat if d.process_index == d.client.process_index()]
    if not devices:
        return
    stats = None if devices[0].platform == "cpu" else devices[0].memory_stats()
    if stats is not None:
        free = stats.get("bytes_limit", math.inf) - stats.get("bytes_in_use", 0)
        whose = f"the {config_sizes.amount(free)} that are free on {devices[0].device_kind}"
    elif devices[0].platform == "cpu":
        free = host_free() / len(devices)
        each = f" for each of {len(devices)} virtual devices" if is_virtual(devices) else ""
        whose = f"the {config_sizes.amount(free)} of this machine's memory that are free{each}"
    else:
        return
    settings = fdp_config.topic_settings(config.topic)
    more = getattr(settings, "sizes", lambda c: ())(config)
    config_sizes.refuse(config, free, whose, more)


def host_free() -> float:
    """Bytes of memory that processes can still have; infinite where the system does not say."""
    return min(_system(Path("/proc/meminfo")), _group(Path("/sys/fs/cgroup")))


def _system(meminfo: Path) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = [line.split() for line in meminfo.read_text("ascii").splitlines()]
        return next((1024.0 * int(x[1]) for x in lines if x[0] == "MemAvailable:"), math.inf)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no Linux
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def _group(folder: Path) -> float:
    """Of the control group of a container, whose limit the system's figures do not show."""
    for limit, used, parts in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": none
            most, now = ((folder / name).read_text("ascii") for name in (limit, used))
            return max(0.0, int(most) - max(0, int(now) - _cached(folder / parts)))
    return math.inf


def _cached(parts: Path) -> int:
    """Bytes of files that a control group caches: they count as used, and give way at once."""
    with contextlib.suppress(OSError, ValueError):
        found = dict(line.split() for line in parts.read_text("ascii").splitlines())
        names = ("active_file", "inactive_file")
        # "total_": with the groups below, which the older interface tells apart.
        return sum(int(found.get(f"total_{name}", found.get(name, 0))) for name in names)
    return 0
