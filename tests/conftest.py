"""One process, eight virtual CPU devices, one compilation cache for the whole suite, kept between
runs beside the one of `fdp.train`.

The environment must be complete before jax is imported: NPROC >= 2 x devices keeps XLA's CPU thread
pool from starving when several multi-device programs are queued (jax < 0.12)."""

import os
from pathlib import Path

os.environ.setdefault("NPROC", "32")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdp" / "xla-tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# On a loaded machine a device may come to a collective later than the 40 s after which XLA aborts.
LATE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
if LATE not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {LATE}"

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Compiling is most of what these tests cost, so the tiers that CI runs do it without LLVM's
    optimizations. XLA's older emitters of fusions compile in half the time, but what they compiled
    computes wrong numbers once it comes from the compilation cache (jaxlib 0.10.2).

    Studies (slow) run long enough to want them, and what is compiled for other hardware (aot) is
    judged with them."""
    if config.option.markexpr in ("not slow and not aot", "fast"):
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of processes that tests start


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
    """Too few devices fail, never skip."""
    assert jax.device_count() == 8, f"tests need 8 virtual CPU devices, found {jax.device_count()}"
