"""A run's devices in disjoint groups."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fdp.mesh import AXES, make_mesh
from fdp.parallel.groups import AHEAD, DeviceGroups, divided

DEGREES = {"actor": {"dp": 2, "tp": 2}, "learner": {"dp": 2}}


def test_groups_send_and_note_what_ran_when():
    groups = divided(DEGREES)
    meshes = [groups.mesh(name) for name in DEGREES]
    assert [m.axis_names for m in meshes] == [AXES, AXES]
    assert [d.id for m in meshes for d in m.devices.flat] == list(range(6))
    x = jax.device_put(np.arange(8.0), NamedSharding(meshes[0], PartitionSpec("dp")))
    y = jax.jit(jnp.square)(x)
    groups.record("actor", "square", x, y)
    (square,) = groups.events()  # waits for it: what is sent below begins later
    there = groups.send({"y": y}, "actor", "learner")["y"]
    assert there.sharding == NamedSharding(meshes[1], PartitionSpec("dp"))
    np.testing.assert_array_equal(there, np.arange(8.0) ** 2)
    (sent,) = groups.events()
    assert square[:2] == ("actor", "square") and sent[:2] == ("actor", "send to learner")
    assert square.begin <= square.end <= sent.begin <= sent.end and not groups.events()
    assert sent.nbytes == y.nbytes and square.nbytes == 0


class Held:
    """A result that is there once it is let go."""

    def __init__(self):
        self.ready = threading.Event()

    def block_until_ready(self):
        self.ready.wait(30)
        return self


def test_the_host_dispatches_ahead_within_a_bound():
    """While one program holds, the host goes on until `AHEAD` wait, of all groups."""
    groups, first, dispatched = divided(DEGREES), Held(), []

    def ahead():
        for i in range(AHEAD + 5):
            name = list(DEGREES)[i % 2]
            groups.dispatch(name, str(i), lambda: None if dispatched else first)
            dispatched.append(i)

    with ThreadPoolExecutor(1) as host:
        running = host.submit(ahead)
        while len(dispatched) < AHEAD and not running.done():
            time.sleep(0.001)
        time.sleep(0.02)  # it would go on
        found = len(dispatched)
        first.ready.set()
        running.result()
    assert found == AHEAD
    events = {int(e.op): e for e in groups.events()}
    assert sorted(events) == list(range(AHEAD + 5))
    assert events[1].dispatched < events[0].end <= events[2].begin  # of one group, in order


def test_what_another_group_may_read_is_not_donated():
    groups = divided(DEGREES)
    x = groups.place(np.zeros(4, np.float32), "actor", PartitionSpec("dp"))
    there = groups.send(x, "actor", "learner")
    with pytest.raises(ValueError, match=r"'step' of group 'actor' donates 1 .*float32\[4\] first"):
        groups.dispatch("actor", "step", jax.jit(jnp.square, donate_argnums=0), x)
    np.testing.assert_array_equal(there, 0)


def test_what_groups_refuse():
    message = r"4 \(actor\) \+ 2 \(learner\) = 6 devices are needed but 5 are there.* = 1·2·1·1·2"
    with pytest.raises(ValueError, match=message):
        divided(DEGREES, jax.devices()[:5])
    one = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with pytest.raises(ValueError, match=r"overlap: .* is in 'a' and in 'b'"):
        DeviceGroups({"a": one, "b": one})
    groups = divided({"a": {}})
    with pytest.raises(ValueError, match=r"no group 'c': choose one of a"):
        groups.send(jnp.zeros(1), "a", "c")
    with pytest.raises(ValueError, match=r"mesh\.tp=0 must be at least 1"):
        divided({"a": {"tp": 0}})
