"""A run's devices in named disjoint groups, each a five-axis mesh of its own.

Programs of different groups run side by side: the host dispatches them without waiting, and a
thread of each group notes when its programs began and ended. One process holds all devices.

A buffer that another group may still read is never donated: an array that was sent or recorded is
only dropped. What a program donates stays within its group and is neither."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from fdp import sharding
from fdp.mesh import AXES, degrees_equation, make_mesh

AHEAD = 32  # programs and messages that may wait, of all groups: virtual devices deadlock above 35


class Event(NamedTuple):
    """dispatched, begin, end: seconds of `time.perf_counter`. dispatched: when the host called the
    program, or noted it. begin: once it is dispatched, its inputs are there and the group's
    operation before has ended. nbytes: of what was sent, each array once, however many devices of
    the other group hold it."""

    group: str
    op: str
    begin: float = 0.0
    end: float = 0.0
    dispatched: float = 0.0
    nbytes: int = 0


class DeviceGroups:
    """Disjoint groups of devices by name. Raises ValueError where two groups share a device."""

    def __init__(self, meshes: Mapping[str, Mesh]):
        self.meshes = dict(meshes)
        owner: dict[Any, str] = {}
        for name, mesh in self.meshes.items():
            for device in mesh.devices.flat:
                if device in owner:
                    raise ValueError(
                        f"groups overlap: {device} is in {owner[device]!r} and in {name!r}; "
                        "give each group devices of its own"
                    )
                owner[device] = name
        self._lanes: dict[Any, ThreadPoolExecutor] = {}
        self._waiting: deque[Future] = deque()  # in the order of dispatch
        self._events: list[Event] = []

    def mesh(self, name: str) -> Mesh:
        """Raises ValueError for a name that is unknown."""
        if name not in self.meshes:
            raise ValueError(f"no group {name!r}: choose one of {', '.join(self.meshes)}")
        return self.meshes[name]

    def place(self, tree: Any, name: str, specs: Any) -> Any:
        """Parameters, state or batches on the mesh of a group, by their PartitionSpecs."""
        return jax.device_put(tree, sharding.shardings(self.mesh(name), specs))

    def send(self, tree: Any, source: str, target: str) -> Any:
        """Arrays of one group, sharded over the other's mesh as they were over their own. The
        meshes have equal degrees, or the arrays dims that both divide. Does not wait."""
        self.mesh(source)
        to = self.mesh(target)
        sent = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(to, x.sharding.spec)), tree)
        nbytes = sum(x.nbytes for x in jax.tree.leaves(tree))
        event = Event(source, f"send to {target}", nbytes=nbytes)
        self._note((source, target), event, tree, sent)
        return sent

    def dispatch(self, name: str, op: str, program: Callable[..., Any], *given: Any) -> Any:
        """What `program(*given)` of a group will give. Does not wait, but for the oldest program
        where more than `AHEAD` are under way. Raises ValueError where the program donates an array
        of `given`: another group may still read it."""
        self.mesh(name)
        event = Event(name, op, dispatched=time.perf_counter())
        out = program(*given)
        gone = [x for x in jax.tree.leaves(given) if isinstance(x, jax.Array) and x.is_deleted()]
        if gone:
            raise ValueError(
                f"{op!r} of group {name!r} donates {len(gone)} of the arrays that it was given, "
                f"{gone[0].dtype}{list(gone[0].shape)} first, which another group may still read: "
                "jit it without donate_argnums"
            )
        self._note(name, event, given, out)
        return out

    def record(self, name: str, op: str, inputs: Any, outputs: Any) -> None:
        """Note an operation that was just dispatched. No array of `inputs` and `outputs` may be
        donated later on."""
        self.mesh(name)
        self._note(name, Event(name, op), inputs, outputs)

    def events(self) -> list[Event]:
        """All events since the last call, by their begin. Waits for what was dispatched, and
        raises what went wrong there."""
        while self._waiting:
            self._events.append(self._waiting.popleft().result())
        found, self._events = sorted(self._events, key=lambda e: e.begin), []
        return found

    def _note(self, lane: Any, event: Event, inputs: Any, outputs: Any) -> None:
        event = event._replace(dispatched=event.dispatched or time.perf_counter())

        def watch() -> Event:
            jax.block_until_ready(inputs)
            begin = time.perf_counter()
            jax.block_until_ready(outputs)
            return event._replace(begin=begin, end=time.perf_counter())

        if lane not in self._lanes:
            self._lanes[lane] = ThreadPoolExecutor(1)
        self._waiting.append(self._lanes[lane].submit(watch))
        if len(self._waiting) > AHEAD:
            self._events.append(self._waiting.popleft().result())


def divided(
    degrees: Mapping[str, Mapping[str, int]], devices: Sequence[jax.Device] | None = None
) -> DeviceGroups:
    """Groups of these degrees on consecutive devices (default: those of this process). Axes that
    are not named have degree 1. Raises ValueError for more devices than there are."""
    available = list(jax.devices() if devices is None else devices)
    whole = {name: {axis: d.get(axis, 1) for axis in AXES} for name, d in degrees.items()}
    counts = {name: _product(d) for name, d in whole.items()}
    if sum(counts.values()) > len(available):
        raise ValueError(
            f"{' + '.join(f'{n} ({name})' for name, n in counts.items())} = "
            f"{sum(counts.values())} devices are needed but {len(available)} are there: lower a "
            f"degree of a group ({'; '.join(map(degrees_equation, whole.values()))})"
        )
    left = iter(available)
    return DeviceGroups(
        {name: make_mesh(d, [next(left) for _ in range(counts[name])]) for name, d in whole.items()}
    )


def _product(degrees: Mapping[str, int]) -> int:
    n = 1
    for axis in AXES:
        n *= degrees[axis]
    return n
