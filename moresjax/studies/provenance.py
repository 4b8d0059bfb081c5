"""What numbers were made with: the code, the versions it ran on, the machine."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from moresjax._version import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


def provenance() -> dict[str, Any]:
    """Facts that belong beside every number.

    >>> facts = provenance()
    >>> list(facts)
    ['version', 'commit', 'versions', 'machine']

    Returns:
      `version` of this package; `commit` of its checkout, with a `+` behind it where files differ
      from it, or None outside of a checkout; `versions` of Python and libraries; `machine`.
    """
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "version": __version__,
        "commit": commit(Path(__file__).parents[2]),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "system": platform.platform(terse=True),
        },
    }


def commit(folder: Path) -> str | None:
    """The commit of a checkout, with a `+` behind it where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (folder / ".git").exists():  # such as an installed package below another checkout
        return None
    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(facts: dict[str, Any]) -> str:
    """The facts in a line."""
    machine, versions = facts["machine"], facts["versions"]
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    where = f"{machine['cores']} cores of {machine['processor']}"
    return (
        f"moresjax {facts['version']} at commit {facts['commit'] or 'unknown'}; {numbers}; {where}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
