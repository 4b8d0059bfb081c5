"""Plug-ins are loaded once, by every process, and their mistakes are told in one sentence."""

import os
import pickle
import subprocess
import sys

import pytest

from moresjax.core import plugins
from moresjax.core.errors import UserError, choice_error


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """Every test begins without plug-ins, and what it loads is forgotten."""
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(plugins, "_loaded", {})
    yield
    for name in [name for name in sys.modules if name.startswith(plugins.PARENT)]:
        del sys.modules[name]


def write(folder, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_is_run_once_at_the_first_lookup(tmp_path):
    count = tmp_path / "count"
    path = write(tmp_path, "my.py", f"open({str(count)!r}, 'a').write('run\\n')\n")
    plugins.use_plugins([path])
    assert not count.exists()
    for _ in range(2):
        plugins.load_plugins()
        plugins.use_plugins([path])
    assert count.read_text() == "run\n"
    assert plugins.active_plugins() == [path]


def test_objects_of_a_file_are_known_in_a_new_process(tmp_path):
    path = write(tmp_path, "my-own.py", "class Thing:\n    value = 7\n")
    plugins.use_plugins([path])
    plugins.load_plugins()
    thing = sys.modules[f"{plugins.PARENT}.my_own"].Thing()
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).value)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, plugins.VARIABLE: path}
    done = subprocess.run(command, input=pickle.dumps(thing), capture_output=True, env=environment)
    assert done.stdout == b"7\n", done.stderr


def test_a_plug_in_may_look_names_up_while_it_is_loaded(tmp_path):
    path = write(
        tmp_path, "my.py", "from moresjax.core.plugins import load_plugins as load\nload()"
    )
    plugins.use_plugins([path])
    plugins.load_plugins()
    assert plugins.active_plugins() == [path]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("my.py", "x = nothing", "my.py cannot be loaded: NameError: name 'nothing' is not"),
        ("my.py", "x = (", "my.py cannot be loaded: SyntaxError"),
        ("my.txt", "", "my.txt cannot be loaded: it is not a Python file"),
    ],
)
def test_a_file_that_cannot_be_loaded(name, text, sentence, tmp_path):
    plugins.use_plugins([write(tmp_path, name, text)])
    for _ in range(2):  # it stays wrong
        with pytest.raises(UserError, match=sentence):
            plugins.load_plugins()


def test_files_that_do_not_exist_or_have_one_name(tmp_path):
    with pytest.raises(UserError, match=r"plug-in nowhere.py does not exist"):
        plugins.use_plugins(["nowhere.py"])
    plugins.use_plugins([write(tmp_path / folder, "my.py", "") for folder in ("a", "b")])
    with pytest.raises(UserError, match="have the same name"):
        plugins.load_plugins()


def test_an_unknown_name_tells_which_plug_ins_are_missing(tmp_path):
    path = write(tmp_path, "my.py", "")
    plugins.use_plugins([path])

    def lookup(saved: list[str]) -> str:
        with (
            pytest.raises(UserError, match="'mine'") as raised,
            plugins.explain_missing(saved, "run"),
        ):
            raise choice_error("method", "mine", ("lora",))
        return str(raised.value)

    assert "plug-in" not in lookup(["/elsewhere/my.py"])
    assert "run was made with plug-ins that are not loaded here: /a/other.py" in lookup(
        ["/a/other.py", path]
    )


def test_a_package_that_cannot_be_loaded(tmp_path, monkeypatch):
    info = tmp_path / "broken-1.dist-info"
    write(info, "METADATA", "Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    write(info, "entry_points.txt", f"[{plugins.GROUP}]\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins._entry_points.cache_clear()
    try:
        with pytest.raises(UserError, match=r"plug-in broken cannot be loaded: ModuleNotFound"):
            plugins.load_plugins()
    finally:
        plugins._entry_points.cache_clear()
