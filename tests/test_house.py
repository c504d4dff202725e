"""The order of the house: who imports whom, how long a command is, what the README lists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "eqx_gpt": {"eqx_gpt"},
    "train": {"eqx_gpt", "train"},
    "weights": {"eqx_gpt", "weights"},
    "scripts": {"eqx_gpt", "train", "weights", "scripts"},
}
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path):
    """The first names of every import of a file, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT).parts[0]
    assert {name for name in imported(path) if name in ROOMS} <= ROOMS[room]


def test_configs_need_no_jax():
    for name in ("eqx_gpt/config.py", "eqx_gpt/zoo.py", "train/config.py", "train/presets.py"):
        assert not {"jax", "equinox", "optax"} & set(imported(ROOT / name)), name


def test_commands_are_thin():
    for path in (ROOT / "scripts").glob("*.py"):
        if path.name != "bench.py":
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path.name


def test_the_readme_has_a_line_for_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), ROOT / "noxfile.py"]
    listed = set(re.findall(r"^\| `([^`]+)` \|", readme, flags=re.MULTILINE))
    expected = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert expected - listed == set()
    assert {name for name in listed if name.endswith(".py") and not (ROOT / name).exists()} == set()


def test_the_readme_is_finished():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z]+@", readme)
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link
