"""Plant each fault of planted_faults.toml in a copy of the project, and run there the tests that have to see it.

    python tests/support/plant_faults.py [NAME…] [--all-tests]

Exit status 1 where a fault is not seen: each entry of its `caught_by` has to fail; with `--all-tests`, any test.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from artefacts import FOLDER
from tabulate import tabulate

PROJECT = Path(__file__).parents[2]
_FAULTS = Path(__file__).with_name("planted_faults.toml")
_SUITE = "not gpu and not nightly"


@dataclass(frozen=True, slots=True)
class Fault:
    """A mistake in one file of the package, and the tests that have to see it."""

    name: str
    file: str
    before: str
    after: str
    why: str
    caught_by: tuple[str, ...]

    def plant(self, project: Path) -> None:
        """Make the mistake in a project's own file."""
        path = project / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.before, self.after), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the tests in a project with a fault."""

    failed: tuple[str, ...]
    told: str
    """Why the tests did not run, or which of them did not fail; empty where the fault is seen."""


def read_faults() -> list[Fault]:
    """Return every fault in the order of the file."""
    records = tomllib.loads(_FAULTS.read_text(encoding="utf-8"))["fault"]
    return [Fault(**record | {"caught_by": tuple(record["caught_by"])}) for record in records]


def copy_project(folder: Path) -> None:
    """Copy what git tracks, as it is in the working tree."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (source := PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)


def try_fault(fault: Fault, all_tests: bool) -> Outcome:
    """Return what the tests come to in a copy of the project with this fault."""
    with tempfile.TemporaryDirectory(prefix="shapecheck-fault-") as name:
        folder = Path(name).resolve()
        copy_project(folder)
        fault.plant(folder)
        _require_own_package(folder)
        return _run_tests(folder, () if all_tests else fault.caught_by)


def main() -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a fault; all of them by default")
    parser.add_argument("--all-tests", action="store_true", help="run the default and the full suite, not `caught_by` alone")
    asked = parser.parse_args()
    faults = {fault.name: fault for fault in read_faults()}
    if unknown := [name for name in asked.names if name not in faults]:
        parser.error(f"no fault {', '.join(unknown)}; known: {', '.join(faults)}")
    rows = []
    for fault in (faults[name] for name in asked.names or faults):
        named = asked.all_tests or fault.caught_by
        outcome = try_fault(fault, asked.all_tests) if named else Outcome((), "no test is named in caught_by")
        seen = f"NOT SEEN: {outcome.told}" if outcome.told else "seen"
        rows.append((fault.name, fault.file, len(outcome.failed), outcome.failed[0] if outcome.failed else "", seen))
        print(f"{fault.name}: {seen}", file=sys.stderr, flush=True)
    print(tabulate(rows, ("fault", "file", "failed", "first of them", "verdict")))
    return int(any(verdict != "seen" for *_, verdict in rows))


def _run_tests(folder: Path, tests: tuple[str, ...]) -> Outcome:
    options = ["-n0", "-q", "-p", "no:cacheprovider", "-m", _SUITE, "--tb=no", "-rfE", "--color=no"]
    done = _run_python(folder, "-m", "pytest", *options, *tests)
    failed = tuple(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE))
    if done.returncode not in (0, 1):  # 1: tests ran, and some failed
        words = (done.stdout + done.stderr).strip().splitlines()[-1:]
        return Outcome(failed, f"pytest ended with status {done.returncode}: {' '.join(words)}")
    if passed := [test for test in tests if not any(name.startswith(test) for name in failed)]:
        return Outcome(failed, f"{', '.join(passed)} passed")
    return Outcome(failed, "" if failed else "every test passed")


def _require_own_package(folder: Path) -> None:
    """Raise RuntimeError unless tests in that folder import the package that lies there."""
    found = _run_python(folder, "-P", "-c", "import shapecheck; print(shapecheck.__file__)").stdout.strip()
    if not Path(found).is_relative_to(folder / "shapecheck"):
        raise RuntimeError(f"tests in {folder} would import {found or 'no shapecheck at all'}")


def _run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if key != FOLDER} | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=own, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
