"""That each fault of planted_faults.toml can still be planted; plant_faults.py tells whether the tests see it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from plant_faults import PROJECT, read_faults

FAULTS = read_faults()
PACKAGE = PROJECT / "shapecheck"
ROOMS = sorted(
    {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    | {path.name for path in PACKAGE.glob("[!_]*.py")} - {"version.py", "progress.py"}
)


def test_a_fault_is_one_mistake_at_one_place():
    wrong = []
    for fault in FAULTS:
        path = PROJECT / fault.file
        count = path.read_text(encoding="utf-8").count(fault.before) if path.is_file() else 0
        wrong += [f"{fault.name}: `before` stands {count} times in {fault.file}"] if count != 1 else []
        wrong += [f"{fault.name}: `after` is no change"] if fault.after == fault.before else []
        wrong += [f"{fault.name}: nobody is said to suffer"] if not fault.why else []
    assert wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_faults_and_what_they_leave_is_python(room):
    faults = [fault for fault in FAULTS if fault.file.split("/")[1] == room]
    assert faults
    for fault in faults:
        ast.parse((PROJECT / fault.file).read_text(encoding="utf-8").replace(fault.before, fault.after), fault.name)


def test_there_are_enough_and_no_two_have_one_name():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 45
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name) for name in names)


def test_what_has_to_see_a_fault_is_named_and_exists():
    unseen = [fault.name for fault in FAULTS if not fault.caught_by]
    lost = [f"{fault.name}: {test}" for fault in FAULTS for test in fault.caught_by if not _exists(test)]
    assert (unseen, lost) == ([], [])


def _exists(test: str) -> bool:
    """Whether that file has a test function of that name."""
    file, _, name = test.partition("::")
    return name.startswith("test_") and name in _functions(PROJECT / file)


@cache
def _functions(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    return frozenset(each.name for each in ast.parse(path.read_bytes()).body if isinstance(each, ast.FunctionDef))
