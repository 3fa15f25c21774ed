"""The pytest plugin: parity checks and probes as test items, and fixtures for tests of one's own.

Every pytest run of an environment imports this module: it imports nothing but pytest, and defines nothing where none of its
options is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from shapecheck.contract import Contract
    from shapecheck.contract.environment import Backend
    from shapecheck.contract.parity import Check, Parity, Result, Side
    from shapecheck.verify.parity import Study
    from shapecheck.verify.request import ParityRequest

_STUDY = pytest.StashKey["Study"]()
_BACKENDS = pytest.StashKey["Sequence[Backend]"]()
_STUCK = pytest.StashKey[dict[str, str]]()
"""Why nothing of a backend can be computed, told once."""
_REFUSED = pytest.StashKey[str]()
_WORKER = "shapecheck_refused"
"""Under which a worker of pytest-xdist tells what cannot be made."""
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
    told += [f"backend {each.name}: {each.detail or 'cannot run here: ' + each.reason}" for each in _examined(config)]
    return told + _misled(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse what cannot be meant, before any worker is started.

    Without a model the backends asked for are all there is to prove: the run ends where one cannot run here.
    """
    config = session.config
    if _is_worker(config):
        return
    _refuse(config)
    if _asked(config, "model"):
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
    if not _asked(config, "model"):
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
    study, folder = session.config.stash.get(_STUDY, None), _asked(session.config, "report")
    if study is None or not folder or not study.is_complete:
        return
    from shapecheck.report.parity_files import write_all

    write_all(study.report(), Path(folder))


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
        study, (result, side) = _study(self.config), self._judged()
        ran = (
            f"{side.ran.provider} on {side.ran.device}, {side.ran.precision}, {side.ran.detail}" if side.ran else "did not run"
        )
        self.user_properties.append(("shapecheck_ran", f"{side.backend}: {ran}; reference {study.reference}"))
        if result.status == "not run":
            pytest.skip(result.reason)
        if result.status == "failed":
            raise CheckError(_told(result, study))

    def _judged(self) -> tuple[Result, Side]:
        """What is known of this check; where nothing can be computed, the first check of the backend fails for all."""
        from shapecheck import ShapecheckError

        study, stuck, backend = _study(self.config), self.config.stash.setdefault(_STUCK, {}), self.check.backend
        if backend in stuck:
            pytest.skip(f"nothing of {backend} can be computed: {stuck[backend]}")
        try:
            return study.result(self.check), study.side(backend)
        except ShapecheckError as error:
            stuck[backend] = str(error)
            raise

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
    Returns a `Parity`: `assert parity.passes, str(parity)`; pytest cuts the text of what is no string.
    """

    def compare(model: str | None = None, **given: Any) -> Parity:
        from dataclasses import replace

        from shapecheck import ShapecheckError
        from shapecheck.verify.request import study_of

        if model is None and not _asked(pytestconfig, "model"):
            raise ShapecheckError("no model: give one, or --shapecheck-model")
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
    """The backends asked for, or that the files need, each tried once."""
    if _BACKENDS not in config.stash:
        from shapecheck import ShapecheckError, doctor

        try:
            names = _request(config).what_runs if _asked(config, "model") else _names(config)
        except ShapecheckError as error:
            raise _usage(error) from None
        config.stash[_BACKENDS] = [doctor.backend(name) for name in names]
    return config.stash[_BACKENDS]


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
    if (_asked(config, "onnx") or _asked(config, "engine")) and not _asked(config, "model"):
        raise pytest.UsageError("--shapecheck-onnx and --shapecheck-engine are compared with a model: give --shapecheck-model")
    if _names(config):
        from shapecheck.contract import ShapecheckError
        from shapecheck.contract.environment import check_known

        try:
            check_known(_names(config))
        except ShapecheckError as error:
            raise pytest.UsageError(f"--shapecheck-backends: {error}") from None
    if folder := _asked(config, "report"):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(f"--shapecheck-report: cannot write into {folder}: {error.strerror or error}") from None


def _usage(error: Exception) -> pytest.UsageError:
    """The same in words of ours: options are called as they are here."""
    names = "|".join(name for name, _ in _OPTIONS)
    return pytest.UsageError(re.sub(rf"(?<![\w-])--(?=({names})\b)", "--shapecheck-", str(error)))


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
        from shapecheck import ShapecheckError, extras
        from shapecheck.verify.request import study_of

        try:
            config.stash[_STUDY] = study_of(_request(config))
        except ModuleNotFoundError as error:
            raise _usage(extras.missing(error, "parity")) from None
        except ShapecheckError as error:
            raise _usage(error) from None
    return config.stash[_STUDY]


def _told(result: Result, study: Study) -> str:
    """All that a person needs: the reason, the numbers, where it diverges."""
    from shapecheck.report.parity_files import failure

    return failure(result, study.side(result.check.backend))
