"""Checkpoints restore bit-exactly on any mesh, survive damage, kill -9 and a full disk, and name
what went wrong.
"""

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fdp.checkpoint import CheckpointError, Checkpoints, mute_orbax
from fdp.mesh import AXES, make_mesh

META = {"config": {"train.lr": 3e-3}}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


@flax.struct.dataclass
class Small:
    """A state of one array, and perhaps model state."""

    params: Any
    model: Any = flax.struct.field(default_factory=dict)


def target_of(state):
    """Its abstract value on one device."""
    sharding = NamedSharding(mesh_of(), PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def mesh_of(**degrees):
    devices = jax.devices()[: int(np.prod(list(degrees.values()) or [1]))]
    return make_mesh({a: degrees.get(a, 1) for a in AXES}, devices)


def build(seed):
    """Leaves of every kind: fp32 matrix, bf16, int, uint8, a typed key, optax's named tuples and
    masked nodes.
    """
    key = jax.random.key(seed)
    params = {
        "w_DxF": jax.random.normal(key, (16, 32)),
        "b_F": jax.random.normal(key, (32,), jnp.bfloat16),
        "table_E": jnp.arange(8, dtype=jnp.uint8),
    }
    trained = {k: params[k] for k in ("w_DxF", "b_F")}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask={"w_DxF": True, "b_F": False})
    )
    _, opt_state = tx.update(trained, tx.init(trained), trained)
    return State(jnp.int32(seed), params, opt_state, jax.random.split(key, 2))


def shardings(mesh, spec):
    """`spec` for the matrices, everything else replicated."""
    return jax.tree.map(
        lambda x: NamedSharding(mesh, spec if x.shape == (16, 32) else PartitionSpec()),
        jax.eval_shape(build, 0),
    )


def state_on(mesh, spec, seed=0):
    return jax.device_put(build(seed), shardings(mesh, spec))


def abstract(mesh, spec):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(build, 0),
        shardings(mesh, spec),
    )


def bits(x):
    return np.asarray(
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    ).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, bits(x)) == (y.dtype, y.shape, bits(y)), jax.tree_util.keystr(
            path
        )


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "ck")
    yield opened
    opened.close()


def damage(step_dir: Path):
    """Halve the files that hold the arrays."""
    for path in step_dir.glob("state/**/d/*"):
        os.truncate(path, path.stat().st_size // 2)


DP8, ROWS = {"dp": 8}, PartitionSpec("dp")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("degrees", "spec"),
    [
        ({}, PartitionSpec()),
        ({"dp": 2, "tp": 4}, PartitionSpec("dp", "tp")),
        ({"dp": 8}, PartitionSpec()),
        ({"dp": 8}, PartitionSpec(None, "dp")),
    ],
    ids=["8to1", "dp8_to_dp2tp4", "sharded_to_replicated", "other_zero_dim"],
)
def test_restore_on_another_mesh_is_bit_exact(checkpoints, degrees, spec):
    saved = state_on(mesh_of(**DP8), ROWS)
    checkpoints.save(5, saved, META)
    target = abstract(mesh_of(**degrees), spec)
    checkpoints.wait()
    step, state, meta = checkpoints.restore(target)
    assert step == checkpoints.latest_step() == 5
    assert_same(state, saved)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert meta["config"] == META["config"]
    assert meta["topology"]["mesh"] == {"pp": 1, "dp": 8, "ep": 1, "cp": 1, "tp": 1}
    assert meta["topology"]["jax"] == jax.__version__


@pytest.mark.fast
def test_nothing_saved_restores_to_none_and_keep_bounds_the_steps(checkpoints):
    mesh = mesh_of()
    assert checkpoints.restore(abstract(mesh, PartitionSpec())) is None
    assert checkpoints.latest_step() is None
    for step in range(1, 6):
        checkpoints.save(step, Small(jnp.float32(step)), {})
    checkpoints.wait()
    assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["3", "4", "5"]
    with pytest.raises(CheckpointError, match="5 exists and is complete"):
        checkpoints.save(5, Small(jnp.float32(0)), {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(6, Small(jnp.float32(0)), {"bad": object()})


@pytest.mark.fast
def test_donating_the_state_right_after_save_does_not_change_the_checkpoint(checkpoints):
    saved = Small(jax.random.normal(jax.random.key(0), (512, 512)))
    expected, target = np.array(saved.params), target_of(saved)
    checkpoints.save(1, saved, {})
    overwritten = jax.jit(lambda s: s.replace(params=s.params * 0 - 1), donate_argnums=0)(saved)
    jax.block_until_ready(overwritten)
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore(target)[1].params, expected)


@pytest.mark.fast
def test_truncated_checkpoint_falls_back_and_its_step_can_be_saved_again(tmp_path, capfd):
    mesh = mesh_of(**DP8)
    with_steps = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        with_steps.save(step, state_on(mesh, ROWS, seed=step), META)
    with_steps.close()
    damage(tmp_path / "3")
    (tmp_path / "2" / "meta" / "metadata").unlink()

    opened = Checkpoints(tmp_path)
    with pytest.warns(
        UserWarning, match=r"fell back to the checkpoint of step 1 .*step 3: .*; step 2: "
    ):
        step, state, _ = opened.restore(abstract(mesh, ROWS))
    assert step == opened.latest_step() == 1
    assert_same(state, build(1))
    opened.save(2, state_on(mesh, ROWS, seed=20), META)
    opened.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "damaged-2", "damaged-3"]
    reopened = Checkpoints(tmp_path)
    assert reopened.restore(abstract(mesh, ROWS))[0] == 2
    reopened.close()
    assert "Traceback" not in capfd.readouterr().err


def two_steps(folder: Path):
    """The states of steps 1 and 2, and all files of step 2."""
    written = Checkpoints(folder)
    for step in (1, 2):
        written.save(step, state_on(mesh_of(**DP8), ROWS, seed=step), META)
    written.close()
    return {n: build(n) for n in (1, 2)}, sorted(
        p for p in (folder / "2").rglob("*") if p.is_file()
    )


def flip(content: bytes, byte: int, bit: int) -> bytes:
    return content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :]


def step_with(path: Path, content: bytes, folder: Path, states) -> int:
    """The step that is restored, to its own state, while `path` has another content."""
    before = path.read_bytes()
    path.write_bytes(content)
    opened = Checkpoints(folder)
    step, state, _ = opened.restore(abstract(mesh_of(**DP8), ROWS))
    opened.close()
    path.write_bytes(before)
    assert_same(state, states[step])
    return step


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:fell back")
def test_no_truncated_and_no_changed_file_ever_yields_another_state(tmp_path):
    """The largest file of every folder, which are of unlike kinds: metadata, manifests, arrays."""
    states, files = two_steps(tmp_path)
    largest = {p.parent: p for p in sorted(files, key=lambda p: p.stat().st_size)}
    steps = []
    for i, path in enumerate(largest.values()):
        content = path.read_bytes()
        half = len(content) // 2
        changed = content[:half] if i % 2 else flip(content, half, 0)
        steps.append(step_with(path, changed, tmp_path, states))
    # The checksums themselves are the largest file of the step's own folder.
    assert len(steps) >= 5 and set(steps) == {1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fell back")
def test_a_hundred_flipped_bits_in_all_files_never_yield_another_state(tmp_path):
    states, files = two_steps(tmp_path)
    rng, steps = np.random.default_rng(0), []
    for i in range(100):
        path = files[i % len(files)]
        content = path.read_bytes()
        changed = flip(content, rng.integers(len(content)), rng.integers(8))
        steps.append(step_with(path, changed, tmp_path, states))
    assert len(files) > 10 and steps.count(1) > 80  # Orbax's two files of the folder hold no state


@pytest.mark.fast
def test_damage_is_named_and_a_missing_file_is_damage(tmp_path):
    _, files = two_steps(tmp_path)
    arrays = max(files, key=lambda p: p.stat().st_size)
    arrays.write_bytes(flip(arrays.read_bytes(), 10, 3))
    opened = Checkpoints(tmp_path)
    said = (
        r"fell back to the checkpoint of step 1 .*: step 2: Damaged: .* has other bytes than were "
    )
    with pytest.warns(UserWarning, match=said):
        opened.restore(abstract(mesh_of(**DP8), ROWS))
    (tmp_path / "1" / "state" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match=r"step 1: Damaged: state/_METADATA is absent"):
        opened.restore(abstract(mesh_of(**DP8), ROWS))
    opened.close()


@pytest.mark.fast
def test_a_checkpoint_without_checksums_is_restored_with_a_note(checkpoints):
    checkpoints.save(1, Small(jnp.arange(4.0)), {})
    checkpoints.wait()
    (checkpoints.directory / "1" / "checksums.json").unlink()
    with pytest.warns(UserWarning, match="ck/1 has no checksums: an older version wrote it"):
        assert checkpoints.restore(target_of(Small(jnp.zeros(4))))[0] == 1


@pytest.mark.fast
def test_a_renamed_step_is_not_taken_for_another(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, Small(jnp.full(4, float(step))), {})
    checkpoints.wait()
    (checkpoints.directory / "2").rename(checkpoints.directory / "7")
    other = Checkpoints(checkpoints.directory, read_only=True)
    with pytest.warns(UserWarning, match=r"step 1 .*step 7: ValueError: the folder holds step 2"):
        step, state, _ = other.restore(target_of(Small(jnp.zeros(4))))
    other.close()
    assert step == 1 and float(state.params[0]) == 1


@pytest.mark.fast
def test_no_readable_checkpoint_is_an_error_and_never_a_fresh_start(checkpoints):
    mesh = mesh_of()
    for step in (1, 2):
        checkpoints.save(step, state_on(mesh, PartitionSpec()), META)
    checkpoints.wait()
    for step in ("1", "2"):
        damage(checkpoints.directory / step)
    with pytest.raises(
        CheckpointError, match=r"none of the 2 checkpoints .*step 2: .*step 1: .*Fix: "
    ):
        checkpoints.restore(abstract(mesh, PartitionSpec()))


@pytest.mark.fast
@pytest.mark.parametrize("field", ["params", "model"])
def test_an_array_of_another_shape_is_named(checkpoints, field, capfd):
    wanted = {"params": {"w": jnp.zeros((4, 4))}, "model": {"bias": jnp.zeros(3)}}
    checkpoints.save(1, Small(**wanted), {})
    checkpoints.wait()
    ((name, array),) = wanted[field].items()
    wanted[field] = {name: jnp.zeros((*array.shape[:-1], 5))}
    message = rf"step 1: ValueError: {field}/{name} has shape \(.*\) there, not \(.*5,?\)"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(target_of(Small(**wanted)))
    assert capfd.readouterr().err == ""


@pytest.mark.fast
def test_what_an_older_checkpoint_does_not_hold_is_initial(checkpoints):
    """Model state that was added since starts at its initial value, on the mesh that asks. A new
    process, whose manager has saved nothing, asks."""
    checkpoints.save(1, Small({"w": jnp.arange(4.0)}), {})
    checkpoints.wait()
    fresh = Small({"w": jnp.zeros(4)}, {"bias": jnp.full(3, 7.0)})
    other = Checkpoints(checkpoints.directory)
    _, got, _ = other.restore(target_of(fresh), lambda: fresh)
    other.close()
    np.testing.assert_array_equal(got.params["w"], np.arange(4.0))
    np.testing.assert_array_equal(got.model["bias"], np.full(3, 7.0))
    checkpoints.save(2, got, {})
    checkpoints.wait()
    _, again, _ = checkpoints.restore(target_of(fresh), lambda: pytest.fail("all fields are there"))
    np.testing.assert_array_equal(again.model["bias"], np.full(3, 7.0))


@pytest.mark.fast
def test_full_disk_is_reported_and_earlier_checkpoints_survive(checkpoints, capfd):
    """A file size limit stands for the full disk: the write fails in the same place, with EFBIG for
    ENOSPC.
    """
    small = Small(jnp.arange(4.0))
    big = Small(jax.random.normal(jax.random.key(0), (400, 400)))
    checkpoints.save(1, small, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(2, big, {})
        with pytest.raises(
            CheckpointError,
            match=r"saving checkpoint .*/ck/2 failed: File too large .*Fix: raise the limit",
        ):
            checkpoints.save(3, small, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]
    assert checkpoints.latest_step() == 1
    checkpoints.save(2, big, {})
    checkpoints.wait()
    assert checkpoints.latest_step() == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.fast
def test_a_disk_that_is_full_for_the_checksums_makes_no_step(checkpoints, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    small = Small(jnp.arange(4.0))
    checkpoints.save(1, small, {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr("fdp.checksums.write", full)
        checkpoints.save(2, small, {})
        with pytest.raises(CheckpointError, match=r"ck/2 failed: No space .*Fix: lower checkp"):
            checkpoints.wait()
    assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]
    checkpoints.save(2, small, {})
    checkpoints.wait()
    assert checkpoints.latest_step() == 2


@pytest.mark.fast
@pytest.mark.parametrize(("place", "kept"), [("/orbax/checkpoint/x.py", False), ("/a/x.py", True)])
def test_only_tasks_of_orbax_are_left_out(place, kept, caplog):
    mute_orbax()
    logging.getLogger("asyncio").error("Task exception was never retrieved: running at %s", place)
    assert bool(caplog.records) is kept


@pytest.mark.fast
def test_a_file_in_the_way_names_path_reason_and_fix(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(
        CheckpointError, match=r"run.* failed: (Not a directory|File exists).*Fix: a file is in the"
    ):
        Checkpoints(tmp_path / "run" / "ck")


def test_kill_9_during_a_save_keeps_the_earlier_step(tmp_path):
    script = textwrap.dedent(f"""
        import dataclasses, os, signal, threading
        import jax, jax.numpy as jnp
        from pathlib import Path
        from fdp.checkpoint import Checkpoints

        @jax.tree_util.register_dataclass
        @dataclasses.dataclass
        class Small:
            params: jax.Array

        directory = Path({str(tmp_path)!r})
        checkpoints = Checkpoints(directory)
        checkpoints.save(1, Small(jnp.arange(8.0)), {{}})
        checkpoints.wait()
        big = jax.random.normal(jax.random.key(0), (16, 1024, 1024))

        def kill():
            while not list(directory.glob("2.*")):
                pass
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        checkpoints.save(2, Small(big), {{}})
        checkpoints.wait()
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.latest_step() == 1
    reader.close()
    assert any(p.name.startswith("2.") for p in tmp_path.iterdir())  # perhaps of a running save
    opened = Checkpoints(tmp_path)
    assert opened.latest_step() == 1
    target = target_of(Small(jnp.zeros(8)))
    np.testing.assert_array_equal(opened.restore(target)[1].params, np.arange(8.0))
    opened.save(2, Small(jnp.zeros(8)), {})
    opened.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.fast
def test_an_unfinished_first_save_is_mentioned(tmp_path):
    (tmp_path / "1.orbax-checkpoint-tmp").mkdir()
    opened = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=r"only an unfinished save \(1.orbax-checkpoint-tmp\)"):
        assert opened.restore(Small({})) is None
    opened.close()
