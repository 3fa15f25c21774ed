"""The pytest plugin: parity checks and probes as test items, and fixtures for tests of one's own.

Every pytest run of an environment imports this package: it imports nothing but pytest, and defines nothing where none of its
options is given.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from shapecheck.pytest_plugin.fixtures import shapecheck_contract, shapecheck_parity, shapecheck_require
from shapecheck.pytest_plugin.hints import explanation
from shapecheck.pytest_plugin.items import ParityChecks, ProbeFile
from shapecheck.pytest_plugin.options import OPTIONS, STUDY, examined, named, option

__all__ = ["shapecheck_contract", "shapecheck_parity", "shapecheck_require"]

_REFUSED = pytest.StashKey[str]()
_WORKER = "shapecheck_refused"
"""Under which a worker of pytest-xdist tells what cannot be made."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Our options, each prefixed `--shapecheck-`."""
    group = parser.getgroup("shapecheck", "shape contracts and parity of ControlNet-ready UNets (shapecheck)")
    for name, settings in OPTIONS:
        group.addoption(f"--shapecheck-{name}", **settings)


def pytest_configure(config: pytest.Config) -> None:
    """Our marker."""
    config.addinivalue_line("markers", "shapecheck: items that shapecheck's plugin makes")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """On what it runs: versions, and for each backend what was seen to run here."""
    if not (option(config, "model") or option(config, "backends")):
        return []
    from importlib.metadata import version

    from shapecheck.version import __version__

    told = [f"shapecheck: {__version__}, torch {version('torch')}, diffusers {version('diffusers')}"]
    told += [f"backend {each.name}: {each.detail or 'cannot run here: ' + each.reason}" for each in examined(config)]
    return told + _misled(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse what cannot be meant, before any worker is started.

    Without a model the backends asked for are all there is to prove: the run ends where one cannot run here.
    """
    config = session.config
    if _is_worker(config):
        return
    _refuse(config)
    if option(config, "model"):
        return
    for each in examined(config):
        if not each.runs:
            pytest.exit(f"{each.name} cannot run here: {each.reason}", returncode=1)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The probe files of the folder that is asked for, where the run comes by it."""
    folder = option(parent.config, "probes")
    if folder and file_path.suffix == ".toml" and file_path.parent == (parent.config.rootpath / folder).resolve():
        return ProbeFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add our items, before others choose among them."""
    if not option(config, "model"):
        return
    try:
        items.extend(ParityChecks.from_parent(session, name="shapecheck", nodeid="shapecheck").collect())
    except pytest.UsageError as error:
        if not _is_worker(config):
            raise
        config.workeroutput[_WORKER] = str(error)  # type: ignore[attr-defined]  # pytest-xdist adds it
        items.clear()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of pytest-xdist could not make: it has nobody else to tell."""
    if told := getattr(node, "workeroutput", {}).get(_WORKER):
        node.config.stash[_REFUSED] = told


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the reports, where a whole run is known: under pytest-xdist by the worker that had it."""
    if _REFUSED in session.config.stash:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
    study, folder = session.config.stash.get(STUDY, None), option(session.config, "report")
    if study is None or not folder or not study.is_complete:
        return
    from shapecheck.parity.report import write_all

    write_all(study.report(), Path(folder))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Below a failure of a UNet over its residuals: which slot, why, and what to change."""
    report = yield
    if report.failed and call.excinfo is not None and (told := explanation(call.excinfo.value)):
        report.sections.append(("shapecheck", told))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What really ran, and where the report is."""
    if told := config.stash.get(_REFUSED, None):
        terminalreporter.write_line(f"ERROR: {told}", red=True)
    ran = {
        value: None
        for reports in terminalreporter.stats.values()
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == "shapecheck_ran"
    }
    if not ran:
        return
    terminalreporter.section("shapecheck", sep="-")
    for line in ran:
        terminalreporter.write_line(line)
    page = Path(option(config, "report") or ".") / "parity.html"
    if option(config, "report") and page.is_file():
        terminalreporter.write_line(f"report: {page}")


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of the other processes of pytest-xdist."""
    return hasattr(config, "workerinput")


def _misled(config: pytest.Config) -> list[str]:
    """pytest takes `--option PATH`, of a plugin that is not loaded yet, for tests to find its settings by."""
    here, root = config.invocation_params.dir, config.rootpath
    if here == root or (config.inipath is not None and root in here.parents) or config.getoption("rootdir", None):
        return []
    return [
        f"note: pytest took {root} for its rootdir, by the paths given: write --shapecheck-model=PATH, with =, or --rootdir=."
    ]


def _refuse(config: pytest.Config) -> None:
    """Raise UsageError for what can be told without the model."""
    if (option(config, "onnx") or option(config, "engine")) and not option(config, "model"):
        raise pytest.UsageError("--shapecheck-onnx and --shapecheck-engine are compared with a model: give --shapecheck-model")
    if named(config):
        from shapecheck.contract import ShapecheckError
        from shapecheck.doctor.environment import check_known

        try:
            check_known(named(config))
        except ShapecheckError as error:
            raise pytest.UsageError(f"--shapecheck-backends: {error}") from None
    if folder := option(config, "report"):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"--shapecheck-report: cannot write into {folder}: {error.strerror or error}") from None
