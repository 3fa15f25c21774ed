"""Rules of tests/README.md that can be read off the files."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
ROOMS = {
    *("contract", "presets", "models", "observe", "onnx", "tensorrt", "runtime", "parity", "explain", "serving", "pipelines"),
    *("doctor", "cli", "pytest_plugin", "report", "repository"),
}
"""Those of the package as it is designed, and the repository itself."""
FILES = sorted(TESTS.rglob("test_*.py"))


def test_tests_lie_in_rooms_and_nothing_of_theirs_shadows_a_library():
    assert FILES
    assert {path.relative_to(TESTS).parts[0] for path in FILES if path.parent != TESTS} <= ROOMS
    assert SETTINGS["pythonpath"] == ["tests/support"]
    assert not list(TESTS.rglob("__init__.py"))
    installed = {"onnx", "tensorrt", "torch", "numpy", "diffusers"}
    assert not {path.stem for path in (TESTS / "support").iterdir()} & installed


def test_every_doctest_is_collected():
    written = {path.relative_to(ROOT).as_posix() for path in (ROOT / "shapecheck").rglob("*.py") if ">>> " in path.read_text()}
    assert written == {path for path in SETTINGS["testpaths"] if path.endswith(".py")}


def test_workers_are_asked_for_by_who_runs_the_tests():
    assert not {"-n", "--dist", "--numprocesses"} & set(SETTINGS["addopts"])


def find_private_names(source: str) -> set[str]:
    """Return the private names that a test takes from modules of the package."""
    tree = ast.parse(source)
    ours = set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if alias.name.startswith("shapecheck")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shapecheck"):
            ours |= {alias.asname or alias.name for alias in node.names}
            found |= {alias.name for alias in node.names if _is_private(alias.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in ours:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            of_ours = isinstance(node.args[0], ast.Name) and node.args[0].id in ours
            paths = [text for text in texts if isinstance(text, str) and text.startswith("shapecheck.")]
            names = {path.rpartition(".")[2] for path in paths} | ({str(texts[0])} if of_ours and texts else set())
            found |= {name for name in names if _is_private(name)}
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


PRIVATE = {
    "doctor/test_doctor.py": {"_TIMEOUT"},  # a minute in earnest, and nobody may change it
    "repository/test_imports.py": {"_LAZY"},  # what the package imports when it is first used
}
"""Private names that a test may take after all, each with the reason."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_tests_go_through_public_doors(path):
    assert find_private_names(path.read_text(encoding="utf-8")) == PRIVATE.get(path.relative_to(TESTS).as_posix(), set())


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from shapecheck.report import html\nhtml._shown(1)", {"_shown"}),
        ("from shapecheck.parity.page import _shown", {"_shown"}),
        ("from shapecheck import run\nrun.gate.Gate._given({})", {"_given"}),
        ("from shapecheck.models import weights\npatch.setattr(weights, '_CHUNK', 64)", {"_CHUNK"}),
        ("patch.setattr('shapecheck.models.weights._CHUNK', 64)", {"_CHUNK"}),
        ("from shapecheck.models import weights\nweights.__doc__\nself._kept\ntorch._dynamo.reset()", set()),
    ],
)
def test_a_private_name_would_be_seen(source, names):
    assert find_private_names(source) == names
