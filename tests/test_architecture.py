"""The house: imports run downwards only, and files and functions stay small."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "moresjax"

# From the ground up; a package may import those below it, and a neighbour on its own floor as long
# as no circle comes of it.
FLOORS = (
    {"core"},
    {"data", "tuning", "sharding", "hardware"},
    {"models"},
    {"generation"},
    {"weights"},
    {"analysis"},
    {"runs"},
    {"configs"},
    {"inference"},
    {"training"},
    {"evaluation"},
    {"plans"},
    {"reports"},
    {"studies", "serve", "testing"},
    {"cli"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MAX_LINES = 450
MAX_STATEMENTS = 60
# The package's own face and version; every package may know the version.
FACE = {"__init__", "_version", "__main__"}

FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path) for path in FILES}


def package(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "moresjax":
                continue
            while rest and rest not in MODULES and "." in rest:
                rest = rest.rpartition(".")[0]
            yield rest or "__init__"


def edges() -> dict[tuple[str, str], list[str]]:
    """Which packages import which, with the files where they do."""
    found = defaultdict(list)
    for path in FILES:
        own = package(name_of(path))
        if own in FACE:
            continue
        for module in imports_of(path):
            if package(module) not in {own} | FACE:
                found[own, package(module)].append(str(path.relative_to(ROOT)))
    return found


def test_every_package_has_a_floor():
    assert {package(module) for module in MODULES} - FACE <= set(FLOOR)


def test_imports_run_downwards():
    up = {pair: files for pair, files in edges().items() if FLOOR[pair[0]] < FLOOR[pair[1]]}
    assert not up


def test_packages_import_each_other_in_no_circle():
    below = defaultdict(set)
    for one, other in edges():
        below[one].add(other)

    def reach(name: str, seen: set[str]) -> set[str]:
        for other in below[name] - seen:
            seen.add(other)
            reach(other, seen)
        return seen

    assert not [name for name in FLOOR if name in reach(name, set())]


def test_only_the_face_is_imported_from_the_top():
    """`import moresjax` loads everything lazily; what lies below must not come back through it."""
    for path in FILES:
        if name_of(path) not in FACE:
            assert "__init__" not in set(imports_of(path)) - {""}, path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_small(path: Path):
    source = path.read_text()
    assert source.count("\n") <= MAX_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            statements = sum(isinstance(n, ast.stmt) for n in ast.walk(node)) - 1
            assert statements <= MAX_STATEMENTS, f"{node.name}: {statements} statements"
