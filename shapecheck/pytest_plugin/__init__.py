"""The pytest plugin: parity checks and probes as test items, and fixtures for the tests of a user.

Every pytest run of an environment imports this package: it imports nothing but pytest, and does nothing unless one of its
options is given.
"""

from __future__ import annotations

import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from shapecheck.pytest_plugin.fixtures import shapecheck_contract, shapecheck_parity, shapecheck_require
from shapecheck.pytest_plugin.items import ParityChecks, ProbeFile
from shapecheck.pytest_plugin.options import OPTIONS, STUDY, list_backends, option, try_backends

__all__ = ["shapecheck_contract", "shapecheck_parity", "shapecheck_require"]
_REFUSED = pytest.StashKey[str]()
_WORKER = "shapecheck_refused"
"""The key under which a worker of pytest-xdist sends why the checks cannot be collected."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our options, each prefixed `--shapecheck-`."""
    group = parser.getgroup("shapecheck", "shape contracts and parity of ControlNet-ready UNets (shapecheck)")
    for name, settings in OPTIONS:
        group.addoption(f"--shapecheck-{name}", **settings)


def pytest_configure(config: pytest.Config) -> None:
    """Add our marker."""
    config.addinivalue_line("markers", "shapecheck: items that shapecheck's plugin makes")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Report on what it runs: versions, and for each backend what was seen to run here."""
    if not (option(config, "model") or option(config, "backends")):
        return []
    from importlib.metadata import version

    from shapecheck.version import __version__

    lines = [f"shapecheck: {__version__}, torch {version('torch')}, diffusers {version('diffusers')}"]
    backends = try_backends(config)
    lines += [f"backend {backend.name}: {backend.detail or 'cannot run here: ' + backend.reason}" for backend in backends]
    # pytest takes `--option PATH`, of a plugin that is not loaded yet, for tests to find its settings by
    here, root = config.invocation_params.dir, config.rootpath
    if not (here == root or (config.inipath is not None and root in here.parents) or config.getoption("rootdir", None)):
        advice = "write --shapecheck-model=PATH, with =, or --rootdir=."
        lines.append(f"note: pytest took {root} for its rootdir, by the paths given: {advice}")
    return lines


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse what is wrong without a look at the model, before any worker is started.

    Without a model the requested backends are all there is to prove: the run ends if one cannot run here.
    """
    config = session.config
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        return
    model = option(config, "model")
    if (option(config, "onnx") or option(config, "engine")) and not model:
        raise pytest.UsageError("--shapecheck-onnx and --shapecheck-engine are compared with a model: add --shapecheck-model")
    if names := list_backends(config):
        from shapecheck.contract import ShapecheckError
        from shapecheck.doctor.environment import check_known

        try:
            check_known(names)
        except ShapecheckError as error:
            raise pytest.UsageError(f"--shapecheck-backends: {error}") from None
    if folder := option(config, "report"):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"--shapecheck-report: cannot write into {folder}: {error.strerror or error}") from None
    for backend in () if model else try_backends(config):
        if not backend.runs:
            pytest.exit(f"{backend.name} cannot run here: {backend.reason}", returncode=1)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the probe files of the requested folder, if it is among what pytest collects."""
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
        if not hasattr(config, "workerinput"):
            raise
        config.workeroutput[_WORKER] = str(error)  # type: ignore[attr-defined]  # pytest-xdist adds it
        items.clear()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep why a worker of pytest-xdist could not collect: it cannot print."""
    if message := getattr(node, "workeroutput", {}).get(_WORKER):
        node.config.stash[_REFUSED] = message


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the reports if all checks have run: under pytest-xdist in the worker that ran them."""
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
    """Add to a failure of a UNet over its residuals which slot it is, why, and what to change."""
    report = yield
    if report.failed and call.excinfo is not None and (message := _explain_failure(call.excinfo.value)):
        report.sections.append(("shapecheck", message))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what really ran, and where the report is."""
    if message := config.stash.get(_REFUSED, None):
        terminalreporter.write_line(f"ERROR: {message}", red=True)
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    lines = dict.fromkeys(value for key, value in properties if key == "shapecheck_ran")
    if not lines:
        return
    terminalreporter.section("shapecheck", sep="-")
    for line in lines:
        terminalreporter.write_line(line)
    folder = option(config, "report")
    if folder and (page := Path(folder) / "parity.html").is_file():
        terminalreporter.write_line(f"report: {page}")


def _explain_failure(error: BaseException) -> str:
    """Return slot, cause and change if a UNet failed over its residuals or ONNX Runtime over a slot; else an empty text.

    Nothing is imported unless diffusers' UNet or ONNX Runtime is where the exception comes from.
    """
    from shapecheck.contract import ShapecheckError

    if isinstance(error, ShapecheckError):
        return ""  # its message says so already
    try:
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(code.co_name == "forward" and code.co_filename.endswith("unet_2d_condition.py") for code in codes):
            from shapecheck.explain.explained import explained_traceback

            return str(explained_traceback(error) or "")
        if not type(error).__module__.startswith("onnxruntime"):
            return ""
        from shapecheck import presets
        from shapecheck.explain.explain_text import explain_text
        from shapecheck.explain.residual_table import RequestedSize

        diagnosis = explain_text(str(error), presets.contracts(), RequestedSize())
        causes = [cause for reading in diagnosis.explanations for cause in reading.causes if cause.slots]
        return "\n".join(f"{', '.join(cause.slots[:4])}: {cause.message}\n  change: {cause.change}" for cause in causes)
    except Exception as failure:  # the report of somebody's test must not be lost over ours
        return f"no explanation: {type(failure).__name__}: {failure}"
