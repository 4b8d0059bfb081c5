"""What all tests share: fake devices, kept programs, shape checks, the command line."""

import gc
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Before JAX starts: eight CPU devices, quick compilation (tiny models compile longer than they
# run), no network.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
jaxlib = importlib.metadata.version("jaxlib")
if jaxlib.startswith("0.10."):
    # Half of the time to compile, by measurement; later ones end the process over an unknown flag.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Compiled programs are kept between runs, in a folder for each version of JAX and set of flags.
FLAGS = hashlib.sha256(os.environ["XLA_FLAGS"].encode()).hexdigest()[:8]
CACHE = Path.home() / ".cache" / "moresjax" / "tests" / f"{jaxlib}-{FLAGS}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # no operation needs to know its line
# Operations on a few numbers run sooner than another thread is woken: half of their time.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # torch: as many processes as cores run already
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


import hypothesis
import jax
import pytest
from one_context import forget_context, use_one_context

# No test fails because the machine is busy.
SLOW = hypothesis.HealthCheck.too_slow
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[SLOW])
hypothesis.settings.load_profile("busy")

TESTS = Path(__file__).parent
FAST = set((TESTS / "fast.txt").read_text().split())
MAPS = 30_000
use_one_context()
# The packages make hundreds of thousands of objects that stay, and tracing a model as many that
# go at once: to look through them seldom saves a tenth of the time.
gc.set_threshold(100_000, 20, 50)


def clean_environment() -> dict[str, str]:
    """The environment of a user's process, but for the quick compilation: one device that works on
    its own, no checks."""
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device" not in flag)
    environment = {k: v for k, v in os.environ.items() if k != "JAX_CPU_ENABLE_ASYNC_DISPATCH"}
    return environment | {"XLA_FLAGS": flags}


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--shape-checks", action="store_true", help="check array shapes at run time")
    parser.addoption("--all-faults", action="store_true", help="every fault of tests/faults")
    parser.addoption("--fuzz", type=int, default=5000, metavar="N", help="cases of tests/fuzz")


def pytest_configure(config: pytest.Config):
    if config.getoption("--shape-checks"):
        from jaxtyping import install_import_hook

        install_import_hook("moresjax", "beartype.beartype")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m fast` does not even import other files, among them those that take torch."""
    if config.option.markexpr == "fast" and collection_path.suffix == ".py":
        return str(collection_path.relative_to(TESTS)) not in FAST or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """Marks the tests of the files that `fast.txt` names and leaves them for the end, when workers
    would wait for each other's long files. Faults beyond the sample come with `--all-faults`."""
    if not config.getoption("--all-faults"):
        beyond = [item for item in items if item.get_closest_marker("all_faults")]
        config.hook.pytest_deselected(items=beyond)
        items[:] = [item for item in items if item not in beyond]
    for item in items:
        if str(item.path.relative_to(TESTS)) in FAST:
            item.add_marker("fast")
    items.sort(key=lambda item: item.get_closest_marker("fast") is not None)


def pytest_collection_finish():
    """What the imports made is never looked through again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Every test draws the same weights, whichever tests its process ran before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs before they are too many: each maps memory several times, of which
    a process may have 65,530 (`vm.max_map_count`), and XLA dies of one more."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MAPS:
        jax.clear_caches()
        forget_context()


@pytest.fixture(scope="session")
def run_moresjax() -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command line in a process of its own."""

    def run(*arguments, timeout: float = 600, **options):
        command = [sys.executable, "-m", "moresjax.cli", *map(str, arguments)]
        options = {"env": clean_environment(), "capture_output": True, "text": True} | options
        return subprocess.run(command, timeout=timeout, **options)

    return run
