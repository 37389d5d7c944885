"""What every test runs under: the CPU backend with eight simulated devices, and no display.

Compiling is most of what the tests do: so programs are optimised less (those of the fast tests not
at all), and each is compiled once for all workers and for the commands that tests start.
"""

import importlib.metadata
import os
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

collect_ignore = ["fixtures/make_torch_fixture.py"]  # imports PyTorch


def _flags(fast):
    """XLA's flags; slow tests compute more than they compile."""
    flags = {
        "--xla_force_host_platform_device_count": "8",
        "--xla_backend_optimization_level": "1",
    }
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA refuses unknown flags
        flags["--xla_cpu_use_fusion_emitters"] = "false"
        flags["--xla_backend_optimization_level"] = "0" if fast else "1"
    return flags


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the workers inherit the environment
        given = os.environ.get("XLA_FLAGS", "")
        flags = _flags(fast=config.option.markexpr == "not slow").items()
        new = (f"{flag}={value}" for flag, value in flags if flag not in given)
        os.environ["XLA_FLAGS"] = " ".join([given, *new]).strip()
        config.stash["cache"] = tempfile.TemporaryDirectory(prefix="megajax-test-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash["cache"].name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        # JAX writes a cached program in place: who reads half of one compiles it, and warns.
        os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"


def pytest_unconfigure(config):
    cache = config.stash.get("cache", None)
    if cache is not None:
        cache.cleanup()


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """What a module compiled, no other one needs: a worker would end with gigabytes of it."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
