"""The pytest plugin: parity checks and probes as test items, and fixtures for tests of one's own.

Every pytest run of an environment imports this module: it imports nothing but pytest, and defines nothing where none of its
options is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from shapecheck.contract import Contract
    from shapecheck.contract.environment import Backend
    from shapecheck.contract.parity import Check, Parity, Result
    from shapecheck.verify.parity import Study
    from shapecheck.verify.request import ParityRequest

_STUDY = pytest.StashKey["Study"]()
_BACKENDS = pytest.StashKey["Sequence[Backend]"]()
_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("model", {"metavar": "MODEL", "help": "the UNet: a diffusers folder or hub id with weights"}),
    ("onnx", {"metavar": "FILE", "help": "the ONNX file made of it"}),
    ("engine", {"metavar": "PLAN", "help": "the engine made of it, its record beside it"}),
    ("backends", {"metavar": "NAMES", "help": "what must run here: torch,ort,ort-cuda,ort-trt,trt,rtx [what the files need]"}),
    ("controlnet", {"metavar": "NAME", "help": "a ControlNet with weights whose residuals are used [random ones]"}),
    ("sizes", {"action": "append", "metavar": "MIN:OPT:MAX", "help": "WxH in pixels; repeatable [an engine's profiles]"}),
    ("batch", {"action": "append", "metavar": "MIN:OPT:MAX", "help": "batch, with --shapecheck-sizes"}),
    ("tokens", {"metavar": "MIN:OPT:MAX", "help": "text tokens, with --shapecheck-sizes [77]"}),
    ("seed", {"type": int, "default": 0, "metavar": "N", "help": "of the random inputs [0]"}),
    ("times-own", {"type": float, "default": 4.0, "metavar": "N", "help": "how many times PyTorch's own error may be [4]"}),
    (
        "reference",
        {"choices": ("auto", "float64", "float32"), "default": "auto", "help": "PyTorch's precision [float64 if it fits]"},
    ),
    ("variant", {"metavar": "NAME", "help": "which of a checkpoint's files, such as fp16"}),
    ("offline", {"action": "store_true", "help": "never ask the hub"}),
    ("report", {"metavar": "FOLDER", "help": "write parity.html, parity.md and parity.json there"}),
    ("probes", {"metavar": "FOLDER", "help": "collect the .toml files there, and hold each to what it expects"}),
    ("reports", {"metavar": "FOLDER", "help": "hold what is said of every probe to the .md file there"}),
    ("update", {"action": "store_true", "help": "write those .md files instead"}),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Our options, each prefixed `--shapecheck-`."""
    group = parser.getgroup("shapecheck", "shape contracts and parity of ControlNet-ready UNets (shapecheck)")
    for name, settings in _OPTIONS:
        group.addoption(f"--shapecheck-{name}", **settings)


def pytest_configure(config: pytest.Config) -> None:
    """Our marker."""
    config.addinivalue_line("markers", "shapecheck: items that shapecheck's plugin makes")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """On what it runs: versions, and for each backend what was seen to run here."""
    if not (_asked(config, "model") or _asked(config, "backends")):
        return []
    from importlib.metadata import version

    from shapecheck import __version__

    told = [f"shapecheck: {__version__}, torch {version('torch')}, diffusers {version('diffusers')}"]
    return told + [f"backend {each.name}: {each.detail or 'cannot run here: ' + each.reason}" for each in _examined(config)]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Without a model the backends asked for are all there is to prove: the run ends where one cannot run here."""
    config = session.config
    if _asked(config, "model") or _is_worker(config):
        return
    for each in _examined(config):
        if not each.runs:
            pytest.exit(f"{each.name} cannot run here: {each.reason}", returncode=1)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The probe files of the folder that is asked for, where the run comes by it."""
    folder = _asked(parent.config, "probes")
    if folder and file_path.suffix == ".toml" and file_path.parent == (parent.config.rootpath / folder).resolve():
        return ProbeFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add our items, before others choose among them."""
    if _asked(config, "model") or _asked(config, "onnx") or _asked(config, "engine"):
        items.extend(ParityChecks.from_parent(session, name="shapecheck", nodeid="shapecheck").collect())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the reports, where a whole run is known: under pytest-xdist by the worker that had it."""
    study, folder = session.config.stash.get(_STUDY, None), _asked(session.config, "report")
    if study is None or not folder or not study.is_complete:
        return
    from shapecheck.report.parity_files import write_all

    write_all(study.report(), Path(folder))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What really ran, and where the report is."""
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
    page = Path(_asked(config, "report") or ".") / "parity.html"
    if _asked(config, "report") and page.is_file():
        terminalreporter.write_line(f"report: {page}")


class CheckError(Exception):
    """A parity check failed; its text is all there is to say."""


class ParityChecks(pytest.Collector):
    """Every parity check of the model and files that the options name."""

    def collect(self) -> list[pytest.Item]:
        """One item a check."""
        study = _study(self.config)
        return [CheckItem.from_parent(self, name=str(each), check=each) for each in study.checks]


class CheckItem(pytest.Item):
    """One parity check."""

    def __init__(self, *, check: Check, **rest: Any) -> None:
        super().__init__(**rest)
        self.check = check
        self.add_marker("shapecheck")

    def runtest(self) -> None:
        """Fail with the reason, or be skipped with it."""
        study = _study(self.config)
        result, side = study.result(self.check), study.side(self.check.backend)
        ran = (
            f"{side.ran.provider} on {side.ran.device}, {side.ran.precision}, {side.ran.detail}" if side.ran else "did not run"
        )
        self.user_properties.append(("shapecheck_ran", f"{side.backend}: {ran}; reference {study.reference}"))
        if result.status == "not run":
            pytest.skip(result.reason)
        if result.status == "failed":
            raise CheckError(_told(result, study))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The reason alone: no line of ours helps anybody."""
        from shapecheck.contract import ShapecheckError

        if isinstance(excinfo.value, (CheckError, ShapecheckError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """What stands over a failure."""
        return Path("shapecheck"), None, str(self.check)


class ProbeFile(pytest.File):
    """One probe file."""

    def collect(self) -> list[pytest.Item]:
        """One item: what it comes to."""
        return [ProbeItem.from_parent(self, name="probe")]


class ProbeItem(pytest.Item):
    """A probe carried out."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.add_marker("shapecheck")

    def runtest(self) -> None:
        """Carry it out; fail where it comes to something else than it expects, or than was said of it before."""
        from shapecheck.report.contract import told, verdict
        from shapecheck.verify.probes import carried_out, surprises

        request, finding = carried_out(self.path)
        claim = request.claim is not None
        wrong = surprises(request, finding, verdict(finding.contract, finding.mismatches, claim))
        if wrong:
            raise CheckError("; ".join(wrong))
        if folder := _asked(self.config, "reports"):
            text = told(finding.contract, finding.mismatches, finding.geometry, form="markdown", lines=False, claim=claim)
            self._hold(self.config.rootpath / folder / f"{self.path.stem}.md", f"> {request.story}\n\n{text}")

    def _hold(self, path: Path, text: str) -> None:
        if self.config.getoption("--shapecheck-update"):
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise CheckError(f"{path} is not what is said today; accept it with --shapecheck-update")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The reason alone."""
        from shapecheck.contract import ShapecheckError

        if isinstance(excinfo.value, (CheckError, ShapecheckError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """What stands over a failure."""
        return self.path, None, f"probe {self.path.stem}"


@pytest.fixture(scope="session")
def shapecheck_contract(pytestconfig: pytest.Config) -> Contract:
    """The contract of `--shapecheck-model`, in the precision of the file beside it; skips where no model is given."""
    if not _asked(pytestconfig, "model"):
        pytest.skip("no --shapecheck-model")
    return _study(pytestconfig).contract


@pytest.fixture(scope="session")
def shapecheck_parity(pytestconfig: pytest.Config) -> Callable[..., Parity]:
    """A function that compares a model with files made of it: `shapecheck_parity("./sd15", onnx="unet.onnx")`.

    Keywords are the fields of `shapecheck.verify.request.ParityRequest`; those left out are taken from the command line.
    Returns a `Parity`: `assert parity.passes, parity`.
    """

    def compare(model: str | None = None, **given: Any) -> Parity:
        from dataclasses import replace

        from shapecheck.verify.request import study_of

        asked = _request(pytestconfig, model)
        changed: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        return study_of(replace(asked, **changed)).report()

    return compare


@pytest.fixture(scope="session")
def shapecheck_require() -> Callable[[str], None]:
    """A function that skips a test whose backend cannot run here, with the reason: `shapecheck_require("trt")`."""

    def require(name: str) -> None:
        from shapecheck import doctor

        known = doctor.backend(name)
        if not known.runs:
            pytest.skip(f"{name} cannot run here: {known.reason}")

    return require


def _asked(config: pytest.Config, name: str) -> Any:
    return config.getoption(f"--shapecheck-{name}")


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of the other processes of pytest-xdist."""
    return hasattr(config, "workerinput")


def _examined(config: pytest.Config) -> Sequence[Backend]:
    """The backends asked for, each tried once."""
    if _BACKENDS not in config.stash:
        from shapecheck import ShapecheckError, doctor

        try:
            config.stash[_BACKENDS] = [doctor.backend(name) for name in _names(config)]
        except ShapecheckError as error:
            raise pytest.UsageError(f"--shapecheck-backends: {error}") from None
    return config.stash[_BACKENDS]


def _names(config: pytest.Config) -> tuple[str, ...]:
    return tuple(each.strip() for each in (_asked(config, "backends") or "").split(",") if each.strip())


def _request(config: pytest.Config, model: str | None = None) -> ParityRequest:
    from shapecheck.verify.request import ParityRequest

    fields = ("onnx", "engine", "controlnet", "tokens", "seed", "reference", "variant", "offline")
    return ParityRequest(
        model or _asked(config, "model") or "",
        backends=_names(config),
        sizes=tuple(_asked(config, "sizes") or ()),
        batch=tuple(_asked(config, "batch") or ()),
        times_own=_asked(config, "times-own"),
        folder=Path(folder) if (folder := _asked(config, "report")) else None,
        **{name: _asked(config, name) for name in fields},
    )


def _study(config: pytest.Config) -> Study:
    """The run of this session, made once."""
    if _STUDY not in config.stash:
        from shapecheck import ShapecheckError
        from shapecheck.verify.request import study_of

        if not _asked(config, "model"):
            raise pytest.UsageError(
                "--shapecheck-onnx and --shapecheck-engine are compared with a model: give --shapecheck-model"
            )
        try:
            config.stash[_STUDY] = study_of(_request(config))
        except (ShapecheckError, ModuleNotFoundError) as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[_STUDY]


def _told(result: Result, study: Study) -> str:
    """All that a person needs: the reason, the numbers, where it diverges."""
    from shapecheck.report.parity_files import failure

    return failure(result, study.side(result.check.backend))
