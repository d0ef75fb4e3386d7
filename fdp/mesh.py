"""The five-axis device mesh: pp, dp, ep, cp, tp. All five always exist, with degree 1 when
unused."""

import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

# Outermost first: tp, the most talkative axis, gets neighbouring devices. Nested shard_maps abort
# when their axes are out of this order, so it is fixed.
AXES = ("pp", "dp", "ep", "cp", "tp")
BATCH_AXES = ("dp", "ep")  # expert parallelism lives inside the data dimension
DATA_AXES = ("dp", "ep", "cp")  # along these, tokens differ and parameters are equal

AnyMesh = Mesh | AbstractMesh  # programs are built, and lowered, without devices too


# On a loaded machine a device may come to a collective later than the 40 s after which XLA aborts.
LATE = "--xla_cpu_collective_call_terminate_timeout_seconds"


def use_virtual_devices(n: int) -> None:
    """Make `n` virtual CPU devices; a no-op when a real accelerator has enough. Call before the
    first JAX computation.

    Raises RuntimeError if the CPU backend already exists with fewer devices.
    """
    os.environ.setdefault("NPROC", str(max(32, 2 * n)))
    given = os.environ.get("XLA_FLAGS", "")
    if LATE not in given:
        os.environ["XLA_FLAGS"] = f"{given} {LATE}=600".strip()
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError as error:
        if jax.device_count() < n:
            raise RuntimeError(
                f"{n} devices are needed but JAX has already started with {jax.device_count()}: "
                f"call fdp.mesh.use_virtual_devices({n}) before anything touches a device"
            ) from error


def is_virtual(devices: Sequence[jax.Device]) -> bool:
    """Whether several of `devices` share one CPU: their wall time is then no evidence of parallel
    speed.
    """
    return len(devices) > 1 and devices[0].platform == "cpu"


def degrees_equation(degrees: Mapping[str, int]) -> str:
    """The product of the degrees, spelled out: `pp·dp·ep·cp·tp = 1·2·1·1·4 = 8`."""
    total = math.prod(degrees[a] for a in AXES)
    return f"{'·'.join(AXES)} = {'·'.join(str(degrees[a]) for a in AXES)} = {total}"


def make_mesh(degrees: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: the first pp·dp·ep·cp·tp there are, equally many of every
    process; fewer than there are processes: this process's own, and each computes the same).

    Raises ValueError when a degree is not positive or the product does not match the devices.
    """
    for axis in AXES:
        if degrees[axis] < 1:
            raise ValueError(
                f"mesh.{axis}={degrees[axis]} must be at least 1: {degrees_equation(degrees)}"
            )
    total = math.prod(degrees[a] for a in AXES)
    available = _shared_out(total) if devices is None else list(devices)
    if total > len(available) or (devices is not None and total != len(available)):
        raise ValueError(
            f"{degrees_equation(degrees)} devices are needed but {len(available)} "
            f"{available[0].platform} device(s) are there: change a mesh.* degree so that the "
            "product fits"
            + (
                ""
                if available[0].platform == "cpu"
                else ", or set JAX_PLATFORMS=cpu to use virtual devices"
            )
        )
    shape = tuple(degrees[a] for a in AXES)
    if devices is None and total == len(available) and available[0].platform != "cpu":
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(
        np.array(available[:total]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def _shared_out(total: int) -> list[jax.Device]:
    """The devices of which the first `total` are equally many of every process."""
    every, processes = jax.devices(), jax.process_count()
    if processes == 1 or total == len(every):
        return every
    if total < processes:
        return jax.local_devices()
    own: dict[int, list[jax.Device]] = {}
    for device in every:
        own.setdefault(device.process_index, []).append(device)
    share, rest = divmod(total, processes)
    if rest:
        raise ValueError(
            f"{total} devices cannot be shared out among {processes} processes, equally many of "
            "each: change a mesh.* degree, or start another number of processes"
        )
    return [device for devices in own.values() for device in devices[:share]]


def abstract_mesh(degrees: Mapping[str, int]) -> AbstractMesh:
    """The mesh of `degrees` without devices, to trace and lower for."""
    shape = tuple(degrees[a] for a in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parts(mesh: AnyMesh, axis: str) -> tuple[str, ...]:
    """Names of `mesh` that make up the logical `axis`: itself, or its binary sub-axes, outermost
    first.
    """
    return tuple(n for n in mesh.shape if n == axis or n.rstrip("0123456789") == axis)


def expand(mesh: AnyMesh, spec: PartitionSpec) -> PartitionSpec:
    """`spec` with every logical axis spelled as the names of `mesh`: factored, "cp" reads ("cp0",
    "cp1", …).
    """

    def entry(e: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = tuple(n for a in ((e,) if isinstance(e, str) else e or ()) for n in parts(mesh, a))
        return names[0] if isinstance(e, str) and len(names) == 1 else names or None

    return PartitionSpec(*map(entry, spec))


def factor(mesh: AnyMesh, axis: str) -> AnyMesh:
    """The same devices with `axis` (degree 2^n) split into n binary sub-axes `axis0` (outermost) …
    `axis{n-1}`.

    One compiled program can then run layers at different degrees of that axis. Raises ValueError if
    the degree is not a power of two."""
    degree = mesh.shape[axis]
    n = degree.bit_length() - 1
    if degree != 1 << n:
        raise ValueError(
            f"mesh.{axis}={degree} is not a power of two: only powers of two split into binary "
            "sub-axes"
        )
    names: list[str] = []
    shape: list[int] = []
    for name, size in mesh.shape.items():
        names += [f"{axis}{i}" for i in range(n)] if name == axis and n else [name]
        shape += [2] * n if name == axis and n else [size]
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(shape), tuple(names), axis_types=types)
    return Mesh(mesh.devices.reshape(shape), tuple(names), axis_types=types)
