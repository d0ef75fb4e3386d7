"""Checkpoints by Orbax: asynchronous, atomic, verified, restored onto any mesh."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from fdp import checksums, files, process
from fdp.keys import UserError

_UNFINISHED = ".orbax-checkpoint-tmp"  # the name suffix under which Orbax writes before it renames


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _not_an_orbax_task(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    files_of_error = [frame.filename for frame in traceback.extract_tb(trace)]
    return not any("/orbax/" in text for text in (*files_of_error, record.getMessage()))


@dataclasses.dataclass(frozen=True)
class _WithoutClosedLoops:
    """A `sys.unraisablehook` that leaves out callbacks of a closed event loop."""

    inner: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        trace = unraisable.exc_traceback
        if trace is None or trace.tb_frame.f_code.co_name != "call_soon_threadsafe":
            self.inner(unraisable)


def mute_orbax() -> None:
    """Leave out what Orbax prints of a failed save, beside the error that it raises: it has no
    option for that. Calling it twice changes nothing."""
    # Four tracebacks. absl has one verbosity for the whole process, so a filter is needed.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    # And one for every task whose error nobody reads, whenever that task is collected.
    logging.getLogger("asyncio").addFilter(_not_an_orbax_task)
    # TensorStore reports the other arrays of that save to an event loop that is closed by then.
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


class CheckpointError(UserError):
    """A checkpoint could not be written or read; the message names the path, the reason and a
    fix.
    """


def _root_cause(error: BaseException) -> BaseException:
    cause = error.__cause__ or error.__context__
    return error if cause is None else _root_cause(cause)


def _first_line(error: BaseException) -> str:
    cause = _root_cause(error)
    text = str(cause).split(" [tensorstore_spec=")[0].strip()
    return f"{type(cause).__name__}: {text.splitlines()[0][:300] if text else '(no message)'}"


def _os_code(error: BaseException) -> int | None:
    """errno of an OSError, or the one that TensorStore quotes in its text."""
    cause = _root_cause(error)
    if isinstance(cause, OSError):
        return cause.errno
    found = re.search(r"os_error_code='(\d+)'", str(cause))
    return int(found.group(1)) if found else None


def _write_error(what: str, path: Path, error: BaseException) -> CheckpointError:
    code = _os_code(error)
    name = errno.errorcode.get(code or 0, code)
    reason = f"{os.strerror(code)} ({name})" if code else _first_line(error)[:300]
    fix = files.fix(code) or "name another --workdir"
    if code in (errno.ENOSPC, errno.EDQUOT):
        fix = f"lower checkpoint.keep, {fix}"
    return CheckpointError(
        f"{what} {path} failed: {reason}. Fix: {fix}; earlier checkpoints are intact"
    )


def topology(state: Any) -> dict[str, Any]:
    """Where a checkpoint was written: degrees of the first sharded leaf's mesh, number and kind of
    devices, JAX version."""
    meshes = (
        x.sharding.mesh for x in jax.tree.leaves(state) if isinstance(x.sharding, NamedSharding)
    )
    mesh = next(meshes, None)
    devices = {"count": jax.device_count(), "kind": jax.devices()[0].device_kind}
    return {
        "mesh": dict(mesh.shape) if mesh is not None else {},
        "devices": devices,
        "jax": jax.__version__,
    }


class Checkpoints:
    """The checkpoints of one arm and seed: directory/<step>, the newest `keep` of them.

    A state is a dataclass of pytrees of jax.Arrays (bf16, integers and typed PRNG keys included).
    Stored states have no mesh: on restore, every process reads only the shards of the target
    shardings."""

    def __init__(self, directory: Path, keep: int = 3, read_only: bool = False):
        """`read_only`: for a reader beside a running training, whose unfinished save stays.

        Raises CheckpointError when the directory cannot be made."""
        self.directory = Path(directory).absolute()
        self._pending: int | None = None  # the step being written
        self._damaged: set[int] = set()  # steps that a restore could not read
        mute_orbax()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._unfinished = sorted(
                p.name for p in self.directory.iterdir() if _UNFINISHED in p.name
            )
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
            )
            # Without handlers a manager that has saved nothing yet knows no metadata.
            handlers = {
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            }
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise _write_error("opening checkpoint directory", self.directory, error) from error

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Start writing `state` as step `step` and return once it is safe to donate its buffers.

        `meta` is JSON; step and topology are added to it. Waits for the previous save, and raises
        CheckpointError if that one failed, if this one cannot start, or if the step is already
        complete."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_fields(state)),
            meta=ocp.args.JsonSave(
                json.loads(json.dumps({"step": step, "topology": topology(state)} | dict(meta)))
            ),
        )
        self.wait()
        self._set_damaged_aside()
        if step in self._manager.all_steps():
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} exists and is complete: a step is "
                "written once. "
                "Fix: resume from it or choose another --workdir"
            )
        self._pending = step
        with self._reported():
            # force: Orbax would otherwise skip a step that is not newer than the newest one.
            self._manager.save(step, args=args, force=True)

    def _add_checksums(self) -> None:
        """Called by Orbax in the first process, in the thread that writes, once all files of all
        processes are complete and before the rename that makes them a step."""
        for folder in self.directory.glob(f"{self._pending}{_UNFINISHED}*"):
            checksums.write(folder)

    def wait(self) -> None:
        """Return when the last save is complete on disk. Raises CheckpointError if it failed."""
        with self._reported():
            self._manager.wait_until_finished()
        self._pending = None

    def close(self) -> None:
        """Finish the last save and stop the writer threads. Raises CheckpointError if that save
        failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn a failure of the pending save into a CheckpointError and remove what it left on the
        disk.
        """
        try:
            yield
        except Exception as error:
            path = self.directory / str(self._pending)
            self._pending = None
            with contextlib.suppress(Exception):
                # Its other threads may still write: their errors would be those of the next save.
                self._manager.wait_until_finished()
            if process.main():
                for rest in self.directory.glob(f"*{_UNFINISHED}*"):
                    shutil.rmtree(rest, ignore_errors=True)
            self._manager.reload()
            raise _write_error("saving checkpoint", path, error) from error

    def _set_damaged_aside(self) -> None:
        """Rename unreadable steps to damaged-<step>: they can be inspected, and saved again."""
        if not self._damaged:
            return
        if process.main():
            for step in self._damaged:
                target = self.directory / f"damaged-{step}"
                shutil.rmtree(target, ignore_errors=True)
                try:
                    os.replace(self.directory / str(step), target)
                except OSError as error:
                    raise _write_error(
                        "setting aside damaged checkpoint", self.directory / str(step), error
                    ) from error
        process.meet("damaged checkpoints set aside")
        self._manager.reload()
        self._damaged.clear()

    def latest_step(self) -> int | None:
        """The newest complete step that is not known to be damaged."""
        return max(set(self._manager.all_steps()) - self._damaged, default=None)

    def restore(
        self, abstract_state: Any, initial: Callable[[], Any] | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, meta) of the newest readable checkpoint, or None where there is none.

        `abstract_state`: ShapeDtypeStructs with the shardings of the target mesh. Fields that an
        older checkpoint lacks, such as model state added later, come from `initial()`. An
        unreadable checkpoint gives a warning, and the one before it is tried. Raises
        CheckpointError when there are checkpoints and none is readable."""
        steps = process.decided(lambda: sorted(self._manager.all_steps(), reverse=True))
        if not steps and self._unfinished:
            names = ", ".join(self._unfinished)
            warnings.warn(
                f"{self.directory} holds only an unfinished save ({names}): starting afresh",
                stacklevel=2,
            )
        reasons = []
        for step in steps:
            try:
                state, meta = self._read(step, abstract_state, initial)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # the machine failed, not the checkpoint
            except Exception as error:
                self._damaged.add(step)
                reasons.append(f"step {step}: {_first_line(error)}")
            if process.agree(step in self._damaged):  # in one process is in all
                self._damaged.add(step)
                continue
            if reasons:
                warnings.warn(
                    f"fell back to the checkpoint of step {step} in {self.directory}; unreadable, "
                    "and set aside as "
                    f"damaged-<step> by the next save: {'; '.join(reasons)}",
                    stacklevel=2,
                )
            return step, state, meta
        if reasons:
            raise CheckpointError(
                f"none of the {len(reasons)} checkpoints in {self.directory} is readable: "
                f"{'; '.join(reasons)}. "
                "Fix: restore the directory from a copy, check that the model config is the one "
                "that wrote it, or "
                "start afresh with another --workdir"
            )
        return None

    def _read(
        self, step: int, abstract_state: Any, initial: Callable[[], Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if not process.decided(lambda: checksums.verify(self.directory / str(step))):
            warnings.warn(
                f"{self.directory / str(step)} has no checksums: an older version wrote it, and "
                "changed bytes in it would not be found",
                stacklevel=3,
            )
        wanted = _fields(abstract_state)
        held = self._manager.item_metadata(step).state
        absent = set() if held is None or initial is None else wanted.keys() - set(held)
        read = {name: part for name, part in wanted.items() if name not in absent}
        _check_shapes(held, read)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(read), meta=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args)
        own = found.meta.get("step", step)
        if own != step:
            raise ValueError(f"the folder holds step {own}: rename it back")
        fields = dict(found.state)
        if absent and initial is not None:
            fresh = _fields(initial())
            fields |= {name: fresh[name] for name in absent}
        return dataclasses.replace(abstract_state, **fields), found.meta


def _fields(state: Any) -> dict[str, Any]:
    """The fields of a state (a dataclass) that hold arrays, by name."""
    parts = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path, of all leaves but random keys, whose stored shape differs."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
        for path, x in leaves
        if getattr(x, "shape", None) is not None
        and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    }


def _check_shapes(held: Any, wanted: Any) -> None:
    """Raises ValueError naming an array whose stored shape differs from the wanted one."""
    stored = _named_shapes(held)
    for name, shape in _named_shapes(wanted).items():
        if stored.get(name, shape) != shape:
            raise ValueError(f"{name} has shape {stored[name]} there, not {shape}")
