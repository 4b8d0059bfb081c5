"""Plug-ins: code of users that registers methods, benchmarks, sources, templates and objectives.

A plug-in is either a Python file, named by `--plugin` or in the environment variable
`MORESJAX_PLUGINS`, or a module that an installed package declares as an entry point of the group
`moresjax.plugins`. Every registry calls `load_plugins` before it looks a name up, so that all
processes (workers of a data check, processes of `--distributed`) know the same names: the variable
is inherited, and packages are installed for all.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from moresjax.core.errors import UnknownName, UserError

VARIABLE = "MORESJAX_PLUGINS"  # absolute paths, separated like those of PATH
GROUP = "moresjax.plugins"
# Files become modules below this one, which loads them when one of their objects is unpickled.
PARENT = "moresjax.core.plugin_files"

_lock = threading.RLock()
_loaded: dict[str, str] = {}  # module name to the file or the installed package


def use_plugins(files: Iterable[str | Path]) -> None:
    """Makes files plug-ins of this process and of those it starts; they run at the next lookup.

    Raises:
      UserError: When a file does not exist.
    """
    paths = _files()
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"plug-in {file} does not exist")
        path = str(Path(file).resolve())
        if os.pathsep in path:
            raise UserError(f"plug-in {file}: its path must not contain {os.pathsep!r}")
        if path not in paths:
            paths.append(path)
    if paths:
        os.environ[VARIABLE] = os.pathsep.join(paths)


def load_plugins() -> None:
    """Runs every plug-in that has not run in this process.

    Raises:
      UserError: When one cannot be loaded, or two files have the same name.
    """
    with _lock:
        for point in _entry_points():
            package = point.dist.name if point.dist else point.value
            if point.value not in _loaded:
                _load(point.value, package, lambda point=point: point.load())
        for path in _files():
            name = _module_name(path)
            if _loaded.get(name, path) != path:
                raise UserError(f"plug-ins {_loaded[name]} and {path} have the same name")
            if name not in _loaded:
                _load(name, path, lambda name=name, path=path: _run(name, path))


def plugin_module(file: str | Path) -> ModuleType:
    """The module that a file is as a plug-in; it runs once in a process.

    Raises:
      UserError: When it does not exist or cannot be loaded.
    """
    use_plugins([file])
    load_plugins()
    return sys.modules[_module_name(Path(file).resolve())]


def _module_name(path: str | Path) -> str:
    return f"{PARENT}.{re.sub(r'[^A-Za-z0-9_]', '_', Path(path).stem)}"


def active_plugins() -> list[str]:
    """Files and installed packages whose plug-ins have been loaded in this process."""
    load_plugins()
    return sorted({*_loaded.values()})


@contextlib.contextmanager
def explain_missing(plugins: Iterable[str], what: str) -> Iterator[None]:
    """Inside, an unknown name also tells which plug-ins of a saved run are not loaded.

    Files that a folder names are never run for that alone: a folder from elsewhere must not be able
    to execute code.

    Args:
      plugins: `active_plugins` of the process that saved the run.
      what: The run, for the error message.

    Raises:
      UserError: For an unknown name.
    """
    try:
        yield
    except UnknownName as error:
        names = {Path(plugin).name for plugin in active_plugins()}
        missing = [plugin for plugin in plugins if Path(plugin).name not in names]
        if not missing:
            raise
        # Which names are known here matters less than what is missing.
        raise UserError(
            f"{str(error).partition(';')[0]}; {what} was made with plug-ins that are not loaded "
            f"here: {', '.join(missing)} (name files with --plugin or in {VARIABLE}, install "
            "packages)"
        ) from None


@functools.cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def _files() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _load(name: str, origin: str, run: Callable[[], object]) -> None:
    _loaded[name] = origin  # before it runs: it may look names up itself
    try:
        run()
    except Exception as error:
        del _loaded[name]
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"plug-in {origin} cannot be loaded: {reason}") from error


def _run(name: str, path: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("it is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
