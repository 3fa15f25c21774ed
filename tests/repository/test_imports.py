"""Imports are as imports.toml has them: they point one way, are cheap, and each format has one border.

`python tests/repository/test_imports.py` prints the rows of today, to compare with those that are written.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "shapecheck"
TABLE = Path(__file__).with_name("imports.toml")
STANDARD_LIBRARY_ONLY = {"contract", "presets"}
HEAVY = {"torch", "diffusers", "transformers", "numpy", "onnx", "onnx_ir", "onnxruntime", "tensorrt"}
IMPORTERS = {"import_module", "__import__", "find_spec"}
COMPUTED = "*"

Names = Mapping[str, set[str]]
"""From a file to the dotted names that it imports."""
Rows = dict[str, dict[str, str]]
"""From a file or a room to what it imports, with one place where it does."""


def read_imports(source: str) -> set[str]:
    """Return the dotted name of everything that a source text imports, in functions and for types included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in IMPORTERS:
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else COMPUTED
            names.add(str(name))
    return names


def name_room(file: str) -> str:
    """Return the folder of a file, or its own name if it is in none."""
    return file.partition("/")[0].removesuffix(".py")


def find_target(name: str, rooms: Iterable[str]) -> str:
    """Return the room that a dotted name of the package is in; what is in none is the package's own."""
    room = f"{name}.".split(".")[1]
    return room if room in rooms else "__init__"


def gather_files(files: Names) -> Rows:
    """Return the libraries that each file imports."""
    known = sys.stdlib_module_names | {"shapecheck", ""}
    libraries = {file: {name.partition(".")[0]: name for name in sorted(names)} for file, names in files.items()}
    return {
        file: {library: f"{file} imports {name}" for library, name in row.items() if library not in known}
        for file, row in libraries.items()
    }


def gather_rooms(files: Names, exceptions: Mapping[str, list[str]]) -> Rows:
    """Return the rooms that each room imports, without the exceptions."""
    rooms: Rows = {name_room(file): {} for file in files}
    for file, names in files.items():
        room = name_room(file)
        for name in sorted(names - set(exceptions.get(file, ()))):
            target = find_target(name, rooms)
            if name.partition(".")[0] == "shapecheck" and target != room:
                rooms[room].setdefault(target, f"{file} imports {name}")
    return rooms


def read_first_imports(source: str) -> set[str]:
    """Return the dotted name of everything that a source text imports when it is imported: not in functions, not for types."""
    names = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= read_imports(ast.unparse(node))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            typed = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            todo += node.orelse if isinstance(node, ast.If) and typed else ast.iter_child_nodes(node)
    return names


def find_heavy(files: Names, start: str, heavy: Collection[str] = HEAVY) -> str | None:
    """Return the way from a file to a heavy library, over what is imported at the top of files; None if there is none."""
    ways = {start: start}
    todo = [start]
    while todo:
        file = todo.pop()
        for name in files[file]:
            if name.partition(".")[0] in heavy:
                return f"{ways[file]} -> {name}"
            steps = name.split(".")[1:]
            places = ["/".join(steps[:end]) for end in range(1, len(steps) + 1)] if name.startswith("shapecheck.") else []
            for place in (path for each in places for path in (f"{each}.py", f"{each}/__init__.py") if path in files):
                if place not in ways:
                    ways[place] = f"{ways[file]} -> {place}"
                    todo.append(place)
    return None


def compare_rows(title: str, found: Rows, written: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield each difference between the rows of today and those under a title of the table."""
    for key in sorted(found.keys() - written.keys()):
        yield f"{key} has no row under [{title}]"
    for key in sorted(written.keys() - found.keys()):
        yield f"{key} has a row under [{title}] and is not in the package"
    for key in sorted(found.keys() & written.keys()):
        for target in sorted(found[key].keys() - set(written[key])):
            yield f"[{title}] does not let {key} import {target}: {found[key][target]}"
        for target in sorted(set(written[key]) - found[key].keys()):
            yield f"[{title}] lets {key} import {target}, which it does not"


def check_order(rooms: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield each arrow to a room that is not written above: without one there is no cycle."""
    above: set[str] = set()
    for room, targets in rooms.items():
        for target in sorted(set(targets) - above):
            yield f"[rooms] lets {room} import {target}, which is not written above it"
        above.add(room)


def check_borders(files: Mapping[str, list[str]], borders: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield each row that lets a library over its border, and each pattern of a border that no row needs."""
    rows = [(file, library) for file, libraries in files.items() for library in libraries]
    for file, library in rows:
        if not any(fnmatchcase(file, pattern) for pattern in borders.get(library, ())):
            yield f"[files] lets {file} import {library}, [borders] does not"
    for library, patterns in borders.items():
        for pattern in patterns:
            if not any(name == library and fnmatchcase(file, pattern) for file, name in rows):
                yield f"[borders] lets {pattern} import {library}, no row under [files] does"


def find_problems(files: Names, table: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """Return everything in which the imports differ from the table, and the table from its own rules."""
    exceptions = [(file, name) for file, names in table["exceptions"].items() for name in names]
    return [
        *(f"{file} imports {name}, which is relative" for file in files for name in files[file] if name.startswith(".")),
        *(
            f"[exceptions] has {name} for {file}, which no longer imports it"
            for file, name in exceptions
            if name not in files.get(file, ())
        ),
        *compare_rows("rooms", gather_rooms(files, table["exceptions"]), table["rooms"]),
        *compare_rows("files", gather_files(files), table["files"]),
        *check_order(table["rooms"]),
        *check_borders(table["files"], table["borders"]),
    ]


def render_rows(files: Names, exceptions: Mapping[str, list[str]]) -> str:
    """Return the rows of today as TOML: a room stands below those that it imports, and files are grouped by room."""
    rooms = gather_rooms(files, exceptions)
    try:
        order = list(TopologicalSorter({room: sorted(rooms[room]) for room in sorted(rooms)}).static_order())
    except CycleError:
        order = sorted(rooms)
    lines = ["[rooms]", *(render_row(room, rooms[room]) for room in order), "", "[files]"]
    rows = gather_files(files)
    for _, group in groupby(sorted(rows), key=name_room):
        lines += [*(render_row(f'"{file}"', rows[file]) for file in group), ""]
    return "\n".join(lines)


def render_row(key: str, targets: Iterable[str]) -> str:
    """Return one row as TOML."""
    return f"{key} = {json.dumps(sorted(targets))}"


def read_package() -> Names:
    """Return what each file of the package imports."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): read_imports(path.read_text(encoding="utf-8")) for path in paths}


@pytest.fixture(scope="module")
def package() -> Names:
    return read_package()


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def test_the_package_imports_what_the_table_says(package, table):
    problems = find_problems(package, table)
    assert not problems, "\n".join(problems)


def test_contract_and_presets_need_the_standard_library_only(package):
    rows = {file: row for file, row in gather_files(package).items() if name_room(file) in STANDARD_LIBRARY_ONLY}
    assert {name_room(file) for file in rows} == STANDARD_LIBRARY_ONLY
    assert not [place for row in rows.values() for place in row.values()]


@pytest.fixture(scope="module")
def first_imports():
    return {
        path.relative_to(PACKAGE).as_posix(): read_first_imports(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@pytest.mark.parametrize("file", ["pipelines/accelerate.py", "runtime/load.py"])
def test_models_that_stay_in_pytorch_wait_for_no_onnx(first_imports, file):
    """onnxscript alone takes half a second of a start that finds everything made."""
    assert find_heavy(first_imports, file, {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "polygraphy"}) is None


def test_light_files_import_nothing_heavy_by_any_way(table, first_imports):
    files = first_imports
    patterns = table["light"]["files"]
    assert [pattern for pattern in patterns if not any(fnmatchcase(file, pattern) for file in files)] == []
    light = [file for file in files if any(fnmatchcase(file, pattern) for pattern in patterns)]
    assert [way for file in light if (way := find_heavy(files, file))] == []


def test_a_way_to_a_heavy_library_is_seen():
    sources = {
        "contract/slot.py": "from shapecheck.observe import probe",
        "contract/size.py": "def load():\n    from shapecheck.observe import probe\nif TYPE_CHECKING:\n    import torch",
        "observe/__init__.py": "",
        "observe/probe.py": "try:\n    import torch.nn\nexcept ImportError:\n    pass",
    }
    files = {file: read_first_imports(source) for file, source in sources.items()}
    assert find_heavy(files, "contract/slot.py") == "contract/slot.py -> observe/probe.py -> torch.nn"
    assert find_heavy(files, "contract/size.py") is None


def test_rooms_stand_in_the_one_line(table):
    line, rooms = table["line"]["rooms"], table["rooms"]
    assert [room for room in rooms if room in line] == line
    assert {room for room in rooms if (PACKAGE / room).is_dir()} - set(line) == {"report", "doctor"}
    assert not [room for room in table["line"]["apart"] if set(rooms[room]) & set(table["line"]["apart"])]


# A package of four files, whose table is true. Each fault below is planted in one of the two.

SOURCES = {
    "__init__.py": "from shapecheck.observe import probe\n__version__ = '1'",
    "contract/slot.py": "import json",
    "observe/probe.py": "import torch\nfrom shapecheck import __version__\nfrom shapecheck.contract import slot",
    "terminal.py": "def write():\n    import click",
}
WRITTEN = """
[exceptions]
"observe/probe.py" = ["shapecheck.__version__"]

[borders]
click = ["terminal.py"]
torch = ["observe/*"]

[rooms]
contract = []
terminal = []
observe = ["contract"]
__init__ = ["observe"]

[files]
"__init__.py" = []

"contract/slot.py" = []

"observe/probe.py" = ["torch"]

"terminal.py" = ["click"]
"""


def find_planted(sources: Mapping[str, str], written: str) -> list[str]:
    """Return the problems of a package given as source texts, with its table given as text."""
    return find_problems({file: read_imports(source) for file, source in sources.items()}, tomllib.loads(written))


def test_a_true_table_has_no_problems():
    assert find_planted(SOURCES, WRITTEN) == []


def test_the_printed_rows_are_those_of_a_true_table():
    files = {file: read_imports(source) for file, source in SOURCES.items()}
    written = WRITTEN[WRITTEN.index("[rooms]") :]
    assert render_rows(files, {"observe/probe.py": ["shapecheck.__version__"]}) == written


def test_rows_with_a_cycle_are_printed_too():
    files = {"onnx/export.py": {"shapecheck.runtime.load"}, "runtime/load.py": {"shapecheck.onnx.export"}}
    assert render_rows(files, {}).startswith('[rooms]\nonnx = ["runtime"]\nruntime = ["onnx"]\n')


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from shapecheck import terminal", "shapecheck.terminal"),
        ("import shapecheck.terminal", "shapecheck.terminal"),
        ("def show():\n    from shapecheck.terminal import write", "shapecheck.terminal.write"),
        ("if TYPE_CHECKING:\n    from shapecheck.terminal import write", "shapecheck.terminal.write"),
        ("importlib.import_module('shapecheck.terminal')", "shapecheck.terminal"),
    ],
)
def test_a_forbidden_room_is_seen(statement, name):
    sources = SOURCES | {"observe/sizes.py": statement}
    written = WRITTEN.replace('"observe/probe.py" = ["torch"]', '"observe/probe.py" = ["torch"]\n"observe/sizes.py" = []')
    assert find_planted(sources, written) == [f"[rooms] does not let observe import terminal: observe/sizes.py imports {name}"]


@pytest.mark.parametrize(
    ("statement", "library", "name"),
    [
        ("import torch.nn", "torch", "torch.nn"),
        ("def load():\n    from torch import nn", "torch", "torch.nn"),
        ("if TYPE_CHECKING:\n    import torch", "torch", "torch"),
        ("import_module('tensorrt')", "tensorrt", "tensorrt"),
        ("importlib.util.find_spec('onnxruntime')", "onnxruntime", "onnxruntime"),
        ("__import__('numpy')", "numpy", "numpy"),
        ("import_module(MODULES[target])", "*", "*"),
        ("import_module(name='numpy')", "*", "*"),
    ],
)
def test_a_forbidden_library_is_seen(statement, library, name):
    assert find_planted(SOURCES | {"contract/slot.py": statement}, WRITTEN) == [
        f"[files] does not let contract/slot.py import {library}: contract/slot.py imports {name}"
    ]


@pytest.mark.parametrize("statement", ["from . import slot", "from .slot import Slot", "import_module('.slot', __package__)"])
def test_a_relative_import_is_seen(statement):
    (problem,) = find_planted(SOURCES | {"contract/slot.py": statement}, WRITTEN)
    assert re.fullmatch(r"contract/slot\.py imports \.\S+, which is relative", problem)


def test_a_file_without_a_row_and_a_row_without_a_file_are_seen():
    sources = {"contract/row.py" if file == "contract/slot.py" else file: source for file, source in SOURCES.items()}
    assert find_planted(sources, WRITTEN) == [
        "contract/row.py has no row under [files]",
        "contract/slot.py has a row under [files] and is not in the package",
    ]
    assert "files has no row under [rooms]" in find_planted(SOURCES | {"files.py": ""}, WRITTEN)


def test_an_exception_for_a_file_that_is_gone_is_seen():
    sources = {file: source for file, source in SOURCES.items() if file != "observe/probe.py"}
    problem = "[exceptions] has shapecheck.__version__ for observe/probe.py, which no longer imports it"
    assert problem in find_planted(sources, WRITTEN)


def test_what_is_allowed_and_no_longer_imported_is_seen():
    assert find_planted(SOURCES | {"observe/probe.py": ""}, WRITTEN) == [
        "[exceptions] has shapecheck.__version__ for observe/probe.py, which no longer imports it",
        "[rooms] lets observe import contract, which it does not",
        "[files] lets observe/probe.py import torch, which it does not",
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("terminal = []", 'terminal = ["observe"]', "[rooms] lets terminal import observe, which is not written above it"),
        ("__init__ = [", '__init__ = ["__init__", ', "[rooms] lets __init__ import __init__, which is not written above it"),
        (
            '"contract/slot.py" = []',
            '"contract/slot.py" = ["torch"]',
            "[files] lets contract/slot.py import torch, [borders] does not",
        ),
        ('torch = ["observe/*"]', "", "[files] lets observe/probe.py import torch, [borders] does not"),
        ('["observe/*"]', '["observe/*", "run/*"]', "[borders] lets run/* import torch, no row under [files] does"),
        (
            '"observe/probe.py" = ["shapecheck.__version__"]',
            "",
            "[rooms] does not let observe import __init__: observe/probe.py imports shapecheck.__version__",
        ),
    ],
)
def test_a_table_against_its_own_rules_is_seen(old, new, problem):
    assert old in WRITTEN
    assert problem in find_planted(SOURCES, WRITTEN.replace(old, new))


def import_afresh(statement: str) -> set[str]:
    """Return the libraries that a statement imports in a new process."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names - {"shapecheck"}


def test_importing_shapecheck_imports_the_standard_library_only():
    assert not import_afresh("import shapecheck")


def test_using_it_imports_torch_so_that_the_test_above_can_fail():
    assert "torch" in import_afresh("import shapecheck; shapecheck.combined")


def test_listing_presets_needs_no_torch():
    silenced = "from shapecheck.cli import models; models.write = lambda *_: None"
    libraries = import_afresh(f"{silenced}; models.presets.callback('human')")
    assert "tabulate" in libraries
    assert libraries <= {"click", "packaging", "tabulate", "wcwidth"}  # tabulate takes wcwidth if it is there


def test_lazy_names_are_those_that_type_checkers_see(package):
    import shapecheck

    assert {f"{module}.{name}" for name, module in shapecheck._LAZY.items()} <= package["__init__.py"]
    assert set(shapecheck.__all__) <= set(dir(shapecheck)) | set(shapecheck._LAZY)


def test_an_unknown_name_is_an_attribute_error():
    import shapecheck

    with pytest.raises(AttributeError, match=re.escape("module 'shapecheck' has no attribute 'prob'")):
        shapecheck.prob  # noqa: B018


if __name__ == "__main__":
    print(render_rows(read_package(), tomllib.loads(TABLE.read_text(encoding="utf-8"))["exceptions"]), end="")
