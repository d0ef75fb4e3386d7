"""Many processes: start, what they decide together, and how arrays get in and out.

A run of several processes is one program: every process calls the same functions in the same order,
and what is decided on the host is decided here, through the key-value store of JAX's coordinator,
which needs no device. Arrays go in by `place` and come out by `fetch`. With one process, `place` is
`jax.device_put`, `fetch` is `jax.device_get`, and everything else costs nothing.
"""

import contextlib
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

import jax
import numpy as np
from jax._src import distributed  # the key-value store has no public name yet
from jax.experimental import multihost_utils

from fdp import command
from fdp.keys import UserError

VARIABLES = ("FDP_COORDINATOR", "FDP_PROCESSES", "FDP_PROCESS")
GONE = 75  # exit code after the death of another process: EX_TEMPFAIL, "try again"
START = 300.0  # seconds in which all processes must have come
BEAT = 1.0  # seconds between two signs of life
SILENCE = 12.0  # seconds without one after which a process counts as dead
GRACE = 4.0  # seconds in which a process ends by itself after another has ended
FOREVER = 10**9  # milliseconds: the watch ends a wait for a dead process
EVERY, LAG = 4, 3  # steps: see `stopping`

_count = itertools.count()  # of decisions: every process counts the same ones
_watch: "_Watch | None" = None


# Start
# -------------------------------------------------------------------------------------------------


def start(devices: int) -> None:
    """Join the other processes, if a launcher started several: SLURM and TPU as JAX finds them,
    anything else by VARIABLES. `devices`: how many virtual CPU devices all processes make together
    where there is no accelerator. Call before the first JAX computation.

    Raises UserError for variables that say no process, and where the others do not come."""
    from fdp.mesh import use_virtual_devices

    given = _given()
    if given is None and not _launched():
        use_virtual_devices(devices)
        return
    _join(given)
    if jax.config.values["jax_num_cpu_devices"] < 1:
        use_virtual_devices(-(-devices // distributed.global_state.num_processes))
    if not main():
        sys.stdout = nowhere()  # banner and progress come once
    global _watch
    _watch = _Watch()
    _watch.start()


def _join(given: tuple[str, int, int] | None) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM is written in C++ and would take the signal away from the loop.
    jax.config.update("jax_enable_preemption_service", False)
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    limits: dict[str, Any] = {"shutdown_timeout_seconds": 30}
    limits["initialization_timeout"] = int(START) + 60
    if given:
        limits["cluster_detection_method"] = "deactivate"
    patience = threading.Timer(START, _alone, [given])  # says what is wrong before JAX aborts
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(*(given or ()), **limits)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes did not find each other: {' '.join(str(error).split())[:300]}. Start "
            "all of them with the same coordinator, each with a number of its own"
        ) from error
    finally:
        patience.cancel()


def _alone(given: tuple[str, int, int] | None) -> None:
    who = f"process {given[2]} of {given[1]}, coordinator {given[0]}" if given else "this one"
    print(
        f"error: the processes did not find each other within {START:.0f} s; {who}. Start all of "
        "them, with the same coordinator, and look at what the others say",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _given() -> tuple[str, int, int] | None:
    """(coordinator, processes, process) of VARIABLES; None where none is set."""
    texts = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not texts:
        return None
    told = ", ".join(f"{name}={texts.get(name, '(not set)')}" for name in VARIABLES)
    fix = "set all three: host:port of process 0, the number of processes, and 0 ≤ process < it"
    if len(texts) < len(VARIABLES):
        raise UserError(f"{told}: {fix}")
    coordinator, *numbers = (texts[name] for name in VARIABLES)
    if ":" not in coordinator or not all(text.isdecimal() for text in numbers):
        raise UserError(f"{told}: {fix}")
    count, number = map(int, numbers)
    if not number < count:
        raise UserError(f"{told}: {fix}")
    return coordinator, count, number


def _launched() -> bool:
    """Whether SLURM or a TPU's environment says that there are several processes."""
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        return True
    if "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return True
    return len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1


# Who, and what all agree on
# -------------------------------------------------------------------------------------------------


def count() -> int:
    """Number of processes."""
    return distributed.global_state.num_processes if _client() is not None else 1


def main() -> bool:
    """Whether this is process 0: the one that prints and writes the files of a run."""
    return distributed.global_state.process_id == 0


def nowhere() -> TextIO:
    """Where the other processes write what the main one prints, in any locale."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


def _client() -> Any:
    return distributed.global_state.client


def decided(f: Callable[[], Any]) -> Any:
    """`f()` of the main process in all of them; only the main process calls it. The value is JSON.

    An error there is raised there, and as UserError with its text in the others."""
    if count() == 1:
        return f()
    key = f"fdp/decided/{next(_count)}"
    if not main():
        found = json.loads(_wait_for(key))
        if "error" in found:
            raise UserError(found["error"])
        return found["value"]
    try:
        value = f()
    except Exception as error:
        text = command.told(error).removeprefix("error: ") or str(error)
        _client().key_value_set(key, json.dumps({"error": text}))
        raise
    _client().key_value_set(key, json.dumps({"value": value}))
    return value


def agree(flag: bool) -> bool:
    """Whether `flag` is set in any process. Waits for all."""
    if count() == 1:
        return flag
    key = f"fdp/agree/{next(_count)}"
    if flag:
        _client().key_value_set(f"{key}/{distributed.global_state.process_id}", "1")
    meet(key)
    return bool(_client().key_value_dir_get(f"{key}/"))


def meet(name: str) -> None:
    """Wait for all processes at the place `name`."""
    if count() > 1:
        _client().wait_at_barrier(f"fdp/{name}/{next(_count)}", FOREVER)


def stopping(run: str, step: int, requested: bool) -> bool:
    """Whether all processes stop before step number `step` of a run: one of them was requested to.
    Called by every process before every step, after it has read the metrics of step - 2.

    No process waits. A request is posted before a step that EVERY divides and read LAG steps later.
    By then it is there: the metrics of a step need all processes, so none is two steps ahead."""
    if count() == 1:
        return requested
    round_, phase = divmod(step, EVERY)
    key = f"fdp/stop/{run}/{round_}"
    if phase == 0 and requested:
        _client().key_value_set(f"{key}/requested", "1", allow_overwrite=True)
    return phase == LAG and bool(_client().key_value_dir_get(f"{key}/"))


def _wait_for(key: str) -> str:
    """The value, once it is set. In turns, so that signals are handled meanwhile."""
    while True:
        try:
            return _client().blocking_key_value_get(key, 5000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


# Arrays
# -------------------------------------------------------------------------------------------------


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, equal in all processes, or arrays on devices, as `shardings` (a prefix tree)
    say. Each process gives its devices their blocks, so nothing is sent."""
    if count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_placed, tree, jax.tree.broadcast(shardings, tree))


def _placed(x: Any, sharding: Any) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_placed(jax.random.key_data(x), sharding))
    host = np.asarray(x)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(tree: Any) -> Any:
    """NumPy copies of whole arrays, in every process. Of arrays that lie in several processes, one
    at a time is gathered: call it in all."""
    if count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_fetched, tree)


def _fetched(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)


# The end
# -------------------------------------------------------------------------------------------------


def finish() -> None:
    """Wait for the others at the end of the work, where none can miss another any more."""
    meet("the end")
    if _watch is not None:
        _watch.over.set()
        _watch.join()


def leave(code: int, text: str) -> NoReturn:
    """End this process with `code` after an error, and so all others: say `text` on stderr.

    All processes fail alike where the input is wrong: then the main process alone says it."""
    if count() == 1:
        print(text, file=sys.stderr)
        sys.exit(code)
    _end(code, text)
    told = main() or _told_by_main() != text
    if told:
        print(text, file=sys.stderr)
    _exit(code)


def failed(error: Exception) -> NoReturn:
    """End this process, and so all others, after an error that nobody expected. Raises it where
    there is one process.

    The devices of a process fail when another one dies: it is known after SILENCE who that was, and
    the watch says so and ends this process."""
    if count() == 1:
        raise error
    if isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(SILENCE + 3 * BEAT)
    traceback.print_exception(error)
    leave(1, f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _end(code: int, text: str) -> None:
    """Tell the others that this process ends, and why."""
    if _watch is not None:
        _watch.ending = True
    me = distributed.global_state.process_id
    said = json.dumps({"code": code, "text": text, "where": _where()})
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator may be gone
        _client().key_value_set(f"fdp/end/{me}", said, allow_overwrite=True)


def _told_by_main() -> str:
    """What the main process says at its end; "" where it has not ended yet."""
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        ends = _ends()
        if "0" in ends:
            return ends["0"]["text"]
        time.sleep(BEAT / 4)
    return ""


def _ends() -> dict[str, dict[str, Any]]:
    found = _client().key_value_dir_get("fdp/end/")
    return {key.rsplit("/", 1)[1]: json.loads(value) for key, value in found}


def _exit(code: int) -> NoReturn:
    """Exit without JAX's own end, which waits for all processes. The main process goes last: the
    coordinator dies with it, and JAX then aborts the others."""
    until = time.monotonic() + 2 * GRACE
    while main() and len(_ends()) < count() and time.monotonic() < until:
        time.sleep(BEAT / 4)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(BEAT / 4 if main() else 0)
    os._exit(code)


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "").rstrip(".")


def _where() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


class _Watch(threading.Thread):
    """Says that this process lives, and ends it when another one has ended or died: whoever waits
    for that one in a collective waits for ever."""

    def __init__(self) -> None:
        super().__init__(name="fdp-watch", daemon=True)
        self.ending = False  # this process is leaving: nothing ends it any more
        self.over = threading.Event()
        self._heard: dict[str, tuple[str, float]] = {}  # process → its last beat, and when

    def run(self) -> None:
        """Until the end of the process."""
        client, me = _client(), distributed.global_state.process_id
        for beat in itertools.count():
            if self.over.wait(BEAT):
                return
            try:
                said = json.dumps([beat, _where()])
                client.key_value_set(f"fdp/beat/{me}", said, allow_overwrite=True)
                if main():
                    self._listen(client)
                self._obey(me)
            except jax.errors.JaxRuntimeError:
                return  # the coordinator has ended, and JAX ends this process

    def _listen(self, client: Any) -> None:
        """Post the end of a process that is silent, in its name."""
        now = time.monotonic()
        for key, said in client.key_value_dir_get("fdp/beat/"):
            number = key.rsplit("/", 1)[1]
            if self._heard.get(number, ("", 0.0))[0] != said:
                self._heard[number] = said, now
            elif now - self._heard[number][1] > SILENCE:
                text = f"no sign of life for {SILENCE:.0f} s"
                end = {"code": GONE, "text": text, "where": json.loads(said)[1]}
                client.key_value_set(f"fdp/end/{number}", json.dumps(end), allow_overwrite=True)

    def _obey(self, me: int) -> None:
        """End this process when another one has ended."""
        others = {number: end for number, end in _ends().items() if number != str(me)}
        if not others or self.ending:
            return
        dead = [n for n, end in others.items() if end["text"].startswith("no sign of life")]
        time.sleep(0 if dead else GRACE)  # it may be about to end as the other one did
        if self.ending:
            return
        number = min(dead or others, key=int)
        end = others[number]
        text = (
            f"error: process {number} ({end['where']}) has ended: {_first_line(end['text'])}. "
            "This process waits for it no longer; what was saved is intact, and the same command "
            "resumes"
        )
        _end(end["code"], text)
        print(text, file=sys.stderr)
        _exit(end["code"])
