"""Shared by all tests: fake devices, run-time shape checks, the command line."""

import importlib.metadata
import os
import tempfile

# Before JAX starts: eight CPU devices, quick compilation (tiny models compile longer than they
# run), no network.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Half of the time to compile, by measurement; later ones end the process over an unknown flag.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# One cache of compiled programs for all processes of a run: they use the same tiny models.
OWNS_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWNS_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="moresjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from jaxtyping import install_import_hook

install_import_hook("moresjax", "beartype.beartype")

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

MAPS = 20_000


def clean_environment() -> dict[str, str]:
    """The environment of a user's process: one device, no checks."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def pytest_unconfigure():
    """Removes the cache when the process that made it ends."""
    if OWNS_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs before they are too many: each maps memory several times, of which
    a process may have 65,530 (`vm.max_map_count`), and XLA dies of one more."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def run_moresjax() -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command line in a process of its own."""

    def run(*arguments, timeout: float = 600, **options):
        command = [sys.executable, "-m", "moresjax.cli", *map(str, arguments)]
        options = {"env": clean_environment(), "capture_output": True, "text": True} | options
        return subprocess.run(command, timeout=timeout, **options)

    return run
