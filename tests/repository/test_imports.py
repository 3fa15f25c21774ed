"""Imports point one way, are cheap, and each format has one border."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "shapecheck"
ALLOWED = {
    "contract": set(),
    "presets": {"contract"},
    "faults": {"contract", "presets"},
    "report": {"contract", "presets", "faults"},
    "observe": {"contract", "presets"},
    "build": {"contract", "observe", "doctor"},
    "run": {"contract"},
    "verify": {"contract", "presets", "faults", "observe", "build", "run", "doctor"},
    "pipelines": {"contract", "observe", "build", "run", "verify", "doctor", "presets", ""},
    "cli": {"contract", "presets", "faults", "report", "observe", "build", "verify", "pipelines", "doctor", ""},
    "pytest_plugin": {"contract", "presets", "faults", "report", "verify", "doctor", ""},
    "__main__": {"cli"},
    "": {"contract", "observe", "build", "run", "verify", "pipelines"},
    "extras": {"contract"},
    "files": {"contract"},
    "doctor": {"contract"},
    "terminal": {"contract"},
}
BORDERS = {
    "diffusers": ("observe/sources.py", "run/dropin", "pipelines/small.py", "pipelines/demo.py"),
    "transformers": "pipelines/small.py",
    "huggingface_hub": "observe/hub.py",
    "onnx": "build/",
    "onnx_ir": "build/",
    "onnxscript": "build/",
    "polygraphy": "build/",
    "jinja2": "report/html.py",
}
STANDARD = {"contract", "presets", "faults"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, lazily or for types only included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def part(path: Path) -> str:
    """The part of the package a file belongs to: its folder, or its own name; empty for the package itself."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else "" if relative.stem == "__init__" else relative.stem


def arrows(files: list[Path]) -> set[tuple[str, str]]:
    found = set()
    for path in files:
        for name in imports(path):
            if name == "shapecheck" or name.startswith("shapecheck."):
                target = name.split(".")[1] if "." in name else ""
                found.add((part(path), target if (PACKAGE / target).is_dir() or target == "cli" else ""))
    return {(source, target) for source, target in found if source != target}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_arrows_point_one_way():
    seen = arrows(FILES)
    assert ("observe", "contract") in seen
    assert seen <= {(source, target) for source, targets in ALLOWED.items() for target in targets} | {
        (source, "")
        for source in (
            "report",
            "faults",
            "observe",
            "presets",
            "build",
            "run",
            "verify",
            "pipelines",
            "terminal",
            "cli",
            "doctor",
        )
    }


def test_a_forbidden_arrow_would_be_seen(tmp_path, monkeypatch):
    bad = PACKAGE / "contract" / "bad.py"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "from shapecheck.observe import probe")
    assert ("contract", "observe") in arrows([bad])


@pytest.mark.parametrize("library", sorted(BORDERS))
def test_each_format_has_one_border(library):
    users = {str(path.relative_to(PACKAGE)) for path in FILES if any(name.split(".")[0] == library for name in imports(path))}
    assert users
    assert all(user.startswith(BORDERS[library]) for user in users), users


def test_contract_and_presets_need_the_standard_library_only():
    for path in FILES:
        if part(path) in STANDARD:
            assert {name.split(".")[0] for name in imports(path)} <= sys.stdlib_module_names | {"shapecheck"}, path


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "huggingface_hub",
    "click",
    "tabulate",
}


def test_importing_shapecheck_imports_nothing_heavy():
    assert not modules_after("import shapecheck") & HEAVY


def test_using_it_does_so_that_the_test_above_can_fail():
    assert {"torch", "diffusers"} <= modules_after("import shapecheck; shapecheck.probe")


def test_listing_presets_needs_no_torch():
    assert not modules_after("from shapecheck.report import presets; presets.told('human')") & (HEAVY - {"tabulate"})


def test_an_unknown_name_is_an_attribute_error():
    import shapecheck

    with pytest.raises(AttributeError, match=re.escape("module 'shapecheck' has no attribute 'prob'")):
        shapecheck.prob  # noqa: B018
    assert set(shapecheck.__all__) <= set(dir(shapecheck)) | set(shapecheck._LAZY)
