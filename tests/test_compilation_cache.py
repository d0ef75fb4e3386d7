"""Broken entries of the compilation cache are replaced; beyond a limit the least used ones go."""

import os
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as of_jax

from fdp import compilation_cache
from fdp.compilation_cache import mend

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path):
    """An empty cache of JAX; afterwards that of the tests again."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update(names[0], None)
    of_jax.reset_cache()
    compilation_cache.use(tmp_path)
    yield tmp_path
    of_jax.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def start(folder) -> list[str]:
    """The warnings of a new start that compiles one program."""
    mend(folder)
    jax.clear_caches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.jit(lambda x: jnp.cosh(x) * 3)(jnp.arange(3.0)).block_until_ready()
    return [str(w.message) for w in caught if "compilation cache" in str(w.message)]


def test_a_broken_entry_is_compiled_again_without_a_word(folder) -> None:
    assert start(folder) == []
    (entry,) = folder.glob("jit__lambda*-cache")
    whole = entry.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:30] + b"?" + whole[31:]):
        entry.write_bytes(broken)
        assert start(folder) == []
        assert len(entry.read_bytes()) > len(whole) // 2 and start(folder) == []
    entry.write_bytes(whole[:9])
    os.utime(entry, (0, 0))  # it was looked at before: nobody reads all entries at every start
    said = start(folder)
    assert len(said) == 1 and "Error reading persistent compilation cache" in said[0]


def test_the_least_used_entries_go_beyond_the_limit(tmp_path) -> None:
    mend(tmp_path / "absent")
    for i, name in enumerate("abcd"):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        (tmp_path / f"{name}-atime").touch()
        os.utime(path, (1000 * (4 - i), 1000))
    (tmp_path / ".checked").touch()
    mend(tmp_path, limit=250)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".checked",
        "a-atime",
        "a-cache",
        "b-atime",
        "b-cache",
    ]
