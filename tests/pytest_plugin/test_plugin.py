"""The pytest plugin in a user's repository: what it adds, what it says, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import engines
import onnx_files
import parity_faults
import parity_samples as samples
import pytest
from recorded_runs import RecordedStudy
from small import SHALLOW, unet

from shapecheck import Geometry, ShapecheckError, doctor, presets
from shapecheck.doctor.environment import Backend, Gap
from shapecheck.parity import request as requests
from shapecheck.parity.request import ParityRequest

SMALL = ("--shapecheck-sizes", "72x104", "--shapecheck-batch", "2")
"""One size: 13 latent cells by 9, none of which another number is."""
QUIET = tuple(
    part
    for name in ("cacheprovider", "faulthandler", "unraisableexception", "threadexception", "hypothesispytest", "anyio")
    for part in ("-p", f"no:{name}")
)
"""What a run within a run must not do twice."""
ITEMS = (
    *("provider", "contract", "weights", "precision"),
    *("input[sample]", "input[timestep]", "input[encoder_hidden_states]"),
    *("slot[down_block_residual_00]", "slot[down_block_residual_01]", "slot[down_block_residual_02]"),
    *("slot[down_block_residual_03]", "slot[mid_block_residual]", "cfg", "switch"),
)
CASES = tuple(
    f"case[batch 2, latent 13×9, {what}]"
    for what in (
        *("control off", "control on", "control on, pooled residuals"),
        *(f"varied rows {number}" for number in (1, 2, 3)),
    )
)
WRONG = {"down_block_residual_00", "down_block_residual_01", "down_block_residual_03"}


@dataclass(frozen=True)
class Made:
    model: str
    healthy: str
    faulty: str

    def beside(self, onnx: str) -> tuple[str, ...]:
        return f"--shapecheck-model={self.model}", f"--shapecheck-onnx={onnx}"


@dataclass(frozen=True)
class Run:
    status: int
    text: str

    @property
    def items(self) -> dict[str, str]:
        """What became of every item that is told of."""
        alone = re.findall(r"^([^[\s].*?) (PASSED|FAILED|SKIPPED)(?: .*)?$", self.text, re.MULTILINE)
        shared = re.findall(r"^\[gw\d\] \[ *\d+%\] (PASSED|FAILED|SKIPPED) (.*?) *$", self.text, re.MULTILINE)
        return dict(alone) | {name: said for said, name in shared}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A model, the file made of it, and one in which two equal-shaped slots are exchanged and another is too weak."""
    folder = tmp_path_factory.mktemp("made")
    unet(**SHALLOW).save_pretrained(folder / "model" / "unet")
    healthy, _ = engines.exported(folder / "healthy.onnx", SHALLOW)
    exchange = onnx_files.exchange("down_block_residual_00", "down_block_residual_01")
    faulty = onnx_files.planted(healthy, folder / "faulty.onnx", exchange, parity_faults.scaled("down_block_residual_03", 0.9))
    return Made(str(folder / "model"), str(healthy), str(faulty))


MISSING = Gap("a planted reason", "a planted cure")


@pytest.fixture(autouse=True)
def lacking(monkeypatch) -> set[str]:
    """Backends that cannot run; all others can. Nothing is tried, which would take a process for each."""
    names: set[str] = set()

    def backend(name: str) -> Backend:
        runs = name not in names
        return Backend(name, runs, f"planted for {name}" if runs else "", () if runs else (MISSING,))

    monkeypatch.setattr(doctor, "backend", backend)
    return names


@pytest.fixture
def recorded(monkeypatch):
    """Let the plugin find a run that is over, and return the requests that it was asked to carry out."""

    def record(parity, study=RecordedStudy) -> list[ParityRequest]:
        asked = []

        def create_run(request):
            asked.append(request)
            return study(parity)

        monkeypatch.setattr(requests, "create_run", create_run)
        return asked

    return record


FILE = ("--shapecheck-model=sd15", "--shapecheck-onnx=unet.onnx")
"""What a run that is over was asked for."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run pytest in a folder that holds what the test wrote, in this process: what it imports is imported."""
    monkeypatch.chdir(tmp_path)
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # in the processes of pytest-xdist

    def run(*arguments: str) -> Run:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            status = pytest.main([*QUIET, "--import-mode=importlib", *arguments])
        for name in ("test_mine", "conftest"):  # else the next run takes this one's
            sys.modules.pop(name, None)
        return Run(int(status), text.getvalue())

    return run


def refused(done: Run) -> str:
    """The one message of a run that could not be made."""
    assert done.status == 4, done.text
    assert "Traceback" not in done.text and "INTERNALERROR" not in done.text
    assert not done.items and "passed" not in done.text
    (message,) = re.findall(r"^ERROR: (.*)$", done.text, re.MULTILINE)
    return message


# What is there without being asked for


HEAVY = {"torch", "diffusers", "numpy", "onnx", "onnxruntime", "click", "jinja2"}


def imported(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_plugin_imports_nothing_heavy():
    modules = imported("import shapecheck.pytest_plugin")
    assert "pytest" in modules
    assert not modules & HEAVY
    assert "numpy" in imported("import shapecheck.pytest_plugin, numpy") & HEAVY  # the line above can fail


def test_every_option_has_the_prefix(run):
    done = run("--help")
    (ours,) = re.findall(r"\n\nshape contracts and parity[^\n]*:\n(.*?)\n\n", done.text, re.DOTALL)
    options = re.findall(r"^  (-[^\s=]*)", ours, re.MULTILINE)
    assert {"--shapecheck-model", "--shapecheck-onnx", "--shapecheck-engine", "--shapecheck-backends"} <= set(options)
    assert all(each.startswith("--shapecheck-") for each in options)
    assert set(re.findall(r"^  (--[\w-]*shapecheck[\w-]*)", done.text, re.MULTILINE)) == set(options)


def test_without_an_option_nothing_is_added(run, tmp_path):
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n", encoding="utf-8")
    (tmp_path / "probe.toml").write_text('story = "not ours"\n', encoding="utf-8")
    done = run("-v", "--strict-markers")
    assert (done.status, done.items) == (0, {"test_mine.py::test_mine": "PASSED"})
    lines = [line for line in done.text.splitlines() if "shapecheck" in line]
    assert all(line.startswith("plugins: ") for line in lines), lines


@pytest.mark.parametrize("ours", ["ort", ""])
def test_a_repository_with_its_own_backends_option_still_works(run, tmp_path, ours):
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--backends', default='none')\n", encoding="utf-8"
    )
    (tmp_path / "test_mine.py").write_text(
        f"""
def test_mine(pytestconfig):
    assert pytestconfig.getoption("--backends") == pytestconfig.option.backends == "cpu,gpu"
    assert (pytestconfig.getoption("--shapecheck-backends") or "") == {ours!r}
""",
        encoding="utf-8",
    )
    done = run("-v", "--backends", "cpu,gpu", *(("--shapecheck-backends", ours) if ours else ()))
    assert (done.status, done.items) == (0, {"test_mine.py::test_mine": "PASSED"}), done.text
    assert ("backend ort: planted for ort" in done.text) is bool(ours)


# A gate without a test written


def test_in_an_empty_folder_one_command_proves_a_healthy_file(made, run):
    done = run("-v", *made.beside(made.healthy), *SMALL)
    assert done.status == 0, done.text
    assert done.items == dict.fromkeys((f"shapecheck::ort/{each}" for each in (*ITEMS, *CASES)), "PASSED")
    assert re.search(r"^shapecheck: \S+, torch \d\S+, diffusers \d", done.text, re.MULTILINE)
    assert re.search(r"^backend ort: planted for ort$", done.text, re.MULTILINE)
    assert re.search(r"^ort: CPUExecutionProvider on cpu, float32, .*; reference PyTorch float64 on", done.text, re.MULTILINE)


def written(folder) -> tuple[str, int]:
    """The verdict and the number of checks of a report, all forms of which are whole."""
    assert {each.name for each in folder.iterdir()} >= {"parity.json", "parity.md", "parity.html"}
    read = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    assert read["verdict"].upper() in (folder / "parity.md").read_text(encoding="utf-8")
    assert (folder / "parity.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    return read["verdict"], sum(len(side["results"]) for side in read["sides"])


def test_a_faulty_file_fails_and_names_its_slots(made, run, tmp_path):
    done = run("-v", *made.beside(made.faulty), *SMALL, "--shapecheck-report", "rep")
    assert done.status == 1, done.text
    slots = {name: said for name, said in done.items.items() if "/slot[" in name}
    assert {name: said for name, said in slots.items() if said == "FAILED"} == {
        f"shapecheck::ort/slot[{each}]": "FAILED" for each in WRONG
    }
    assert set(slots.values()) == {"PASSED", "FAILED"}
    assert re.search("^down_block_residual_00 .*this is the place of down_block_residual_01", done.text, re.MULTILINE)
    assert re.search("^down_block_residual_01 acts where down_block_residual_00 belongs", done.text, re.MULTILINE)
    assert "down_block_residual_03 acts as if 0.900 of it were given" in done.text
    assert "Traceback" not in done.text and "pytest_plugin" not in done.text
    assert written(tmp_path / "rep") == ("broken", len(ITEMS) + len(CASES))
    assert "report: rep/parity.html" in done.text


def test_each_item_tells_what_its_check_came_to(recorded, run, tmp_path):
    parity = samples.broken()
    recorded(parity)
    done = run("-v", "-rs", *FILE, "--shapecheck-report", "rep")
    assert done.status == 1, done.text
    words = {"passed": "PASSED", "failed": "FAILED", "not run": "SKIPPED"}
    (side,) = parity.sides
    assert done.items == {f"shapecheck::{result.check}": words[result.status] for result in side.results}
    assert all(result.reason.splitlines()[0] in done.text for result in side.failed)
    assert "not tried: a case with control on has failed" in done.text
    told = done.text.split(f"{samples.NAN_CASE}: 96 NaN among 792 values\n")[1].split("\n\n")[0]
    assert (
        "the first value that is not PyTorch's: skip_4_sum, of down_blocks.1.attentions.0 (slot down_block_residual_04): "
        in told
    )
    assert "found on the graph without ONNX Runtime's optimizations" in told
    assert "to see it without shapecheck: polygraphy run unet.onnx" in told
    assert done.text.count("the first value that is not PyTorch's") == 1
    failures = done.text.split(" FAILURES ")[1].split(" short test summary ")[0]
    assert "Traceback" not in failures and "pytest_plugin" not in failures
    ran = "CPUExecutionProvider on x86-64 CPU, 8 threads, float32, onnxruntime 1.22.0; no TF32 on a CPU"
    assert f"\nort: {ran}; reference PyTorch float64 on cpu\n" in done.text
    assert written(tmp_path / "rep") == ("broken", len(side.results))
    assert "report: rep/parity.html" in done.text


def test_of_two_backends_the_one_that_cannot_run_fails_alone(recorded, run):
    recorded(samples.could_not_run())
    done = run("-v", *FILE)
    assert done.status == 1
    assert [name for name, said in done.items.items() if said != "PASSED"] == ["shapecheck::trt/provider"]
    assert "TensorRT cannot run here: no NVIDIA driver; install one, or leave trt out" in done.text
    assert "\ntrt: did not run; reference PyTorch float64 on cpu\n" in done.text


def test_a_report_is_written_when_all_backends_have_been_run(recorded, run, tmp_path):
    recorded(samples.two_backends())
    report = tmp_path / "rep"
    assert run(*FILE, "--shapecheck-report", "rep", "-k", "trt").status == 0
    assert list(report.iterdir()) == []
    done = run(*FILE, "--shapecheck-report", "rep", "-k", "provider")
    assert (done.status, written(report)) == (0, ("parity", 50))
    assert "report: rep/parity.html" in done.text


ALL = {str(check) for check in RecordedStudy(samples.healthy()).checks}


@pytest.mark.parametrize(
    ("chosen", "items"),
    [
        (("-k", "mid_block"), {"ort/slot[mid_block_residual]"}),
        (("-k", "slot and not mid"), {each for each in ALL if "slot[down" in each}),
        (("-m", "shapecheck", "-k", "not case"), {each for each in ALL if "case[" not in each}),
        (("-m", "not shapecheck"), set()),
    ],
)
def test_k_and_m_choose_among_the_items(recorded, run, tmp_path, chosen, items):
    recorded(samples.healthy())
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n", encoding="utf-8")
    done = run("--collect-only", "-q", *FILE, *chosen)
    found = re.findall(r"^(?:shapecheck::|test_mine.py::)(.*)$", done.text, re.MULTILINE)
    assert set(found) == items | (set() if items else {"test_mine"}), done.text


# What cannot be run


def files(made: Made, **changes: str) -> tuple[str, ...]:
    """Options for a healthy run, some of them otherwise; an empty one is left out."""
    given = {"model": made.model, "onnx": made.healthy} | changes
    return tuple(f"--shapecheck-{name.replace('_', '-')}={value}" for name, value in given.items() if value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "--shapecheck-onnx and --shapecheck-engine are compared with a model: add --shapecheck-model"),
        ({"onnx": ""}, "nothing to compare the model with: give --shapecheck-onnx FILE.onnx, --shapecheck-engine PLAN, or "),
        ({"backends": "ort,trtt"}, "--shapecheck-backends: no backend is called 'trtt'; known: "),
        ({"backends": "trt"}, "trt runs engines: give one with --shapecheck-engine"),
        ({"backends": "ort", "onnx": ""}, "ort runs ONNX files: give one with --shapecheck-onnx"),
        ({"onnx": "nowhere.onnx"}, "cannot read nowhere.onnx: No such file or directory"),
        ({"engine": "nowhere.plan"}, "nowhere.plan"),
        ({"onnx": "text.onnx"}, "text.onnx is not an ONNX model: "),
        ({"model": "sd15"}, "no weights for"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"multiple_of": "12"}, "--shapecheck-multiple-of 12 is not a multiple of 8 (pixels per latent cell)"),
        ({"times_own": "0"}, "--shapecheck-times-own must be more than 0, got 0.0"),
        ({"sizes": "70x104"}, "70x104 pixels: width 70 is not a multiple of 8"),
        ({"report": "text.onnx"}, "--shapecheck-report: cannot write into text.onnx: File exists"),
    ],
)
def test_what_cannot_be_meant_is_status_4_and_one_message(made, run, tmp_path, changes, message):
    (tmp_path / "text.onnx").write_text("not a model", encoding="utf-8")
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n", encoding="utf-8")
    assert message in refused(run("-q", *files(made, **changes), "--shapecheck-offline"))


def test_a_backend_that_cannot_run_here_is_one_failure_with_the_doctors_reason(made, run, lacking):
    lacking.add("ort-cuda")
    done = run("-v", "-rs", *made.beside(made.healthy), *SMALL, "--shapecheck-backends", "ort-cuda")
    assert done.status == 1, done.text
    assert "backend ort-cuda: cannot run here: a planted reason" in done.text
    theirs = {name: said for name, said in done.items.items() if name.startswith("shapecheck::ort-cuda/")}
    assert theirs.pop("shapecheck::ort-cuda/provider") == "FAILED"
    assert len(theirs) == len(ITEMS) - 1 + len(CASES) and set(theirs.values()) == {"SKIPPED"}
    assert "ort-cuda cannot run here: a planted reason" in done.text.split("FAILURES")[1]


def test_what_pytorch_itself_cannot_compute_fails_once(recorded, run):
    asked = []

    class NotFinite(RecordedStudy):
        def side(self, backend):
            asked.append(backend)
            raise ShapecheckError("PyTorch's own image is not finite")

    recorded(samples.healthy(), NotFinite)
    done = run("-v", "-rs", *FILE)
    assert (done.status, asked) == (1, ["ort"]), done.text
    assert sorted(done.items.values()) == ["FAILED"] + ["SKIPPED"] * 25
    assert "nothing of ort can be computed: PyTorch's own image is not finite" in done.text
    assert "Traceback" not in done.text


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ("ort,trt", 1, "trt cannot run here: a planted reason"),
        ("trtt", 4, "--shapecheck-backends: no backend is called 'trtt'; known: "),
        ("ort", 0, "backend ort: planted for ort"),
    ],
)
def test_a_run_that_asks_for_what_cannot_run_fails_whatever_it_would_run(run, tmp_path, lacking, asked, status, told):
    lacking.add("trt")
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n", encoding="utf-8")
    done = run("--shapecheck-backends", asked)
    assert done.status == status, done.text
    assert told in done.text
    assert ("1 passed" in done.text) is (status == 0)


def test_what_nobody_asked_for_is_skipped(shapecheck_require, lacking):
    lacking.add("trt")
    with pytest.raises(pytest.skip.Exception, match="trt cannot run here: a planted reason"):
        shapecheck_require("trt")
    shapecheck_require("ort")


# Fixtures

OWN = """
def test_contract(shapecheck_contract):
    assert len(shapecheck_contract.slots) == 13


def test_usual(shapecheck_parity):
    parity = shapecheck_parity()
    assert parity.passes, str(parity)


def test_other(shapecheck_parity):
    parity = shapecheck_parity("other", onnx="other.onnx", sizes=["72x104"], batch=["1"])
    assert parity.passes, str(parity)
"""


def test_fixtures_serve_tests_of_ones_own(recorded, run, tmp_path):
    asked = recorded(samples.broken())
    (tmp_path / "test_mine.py").write_text(OWN, encoding="utf-8")
    done = run("-v", "-rs", "-k", "not usual", "--shapecheck-seed", "7")
    assert done.items == {"test_mine.py::test_contract": "SKIPPED", "test_mine.py::test_other": "FAILED"}, done.text
    assert "no --shapecheck-model" in done.text
    assert "BROKEN: preset sd15" in done.text
    assert all(f"{result.check}: {result.reason}" in done.text for result in samples.broken().sides[0].failed)
    assert asked == [ParityRequest("other", onnx="other.onnx", sizes=("72x104",), batch=("1",), seed=7)]


def test_fixtures_know_the_model_of_the_command_line(recorded, run, tmp_path):
    asked = recorded(samples.healthy())
    (tmp_path / "test_mine.py").write_text(OWN, encoding="utf-8")
    done = run("-v", *FILE, *SMALL, "--shapecheck-times-own=2", "--shapecheck-report=rep", "-k", "test_mine")
    expected = {f"test_mine.py::test_{name}": "PASSED" for name in ("contract", "usual", "other")}
    assert (done.status, done.items) == (0, expected), done.text
    told = ParityRequest(
        "sd15", onnx="unet.onnx", sizes=("72x104",), batch=("2",), times_own=2.0, offline=False, folder=Path("rep")
    )
    assert asked == [told, told, replace(told, model="other", onnx="other.onnx", batch=("1",))]


def test_without_any_model_the_fixture_says_what_to_give(run, tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "def test_mine(shapecheck_parity): shapecheck_parity(onnx='unet.onnx')\n", encoding="utf-8"
    )
    done = run("-v")
    assert done.status == 1
    assert "no model: pass one, or --shapecheck-model" in done.text


# Probes

PROBE = """
story = "A small model."
model = "bk-sdm-tiny"

[expect]
verdict = "{verdict}"
"""


@pytest.fixture
def observed(monkeypatch) -> list[tuple[str, Geometry | None]]:
    """Which models are observed, and at which size; what they come to is recorded."""
    seen = []

    def probe(model, nets=None, *, geometry=None, **rest):
        seen.append((model, geometry))
        return presets.contract(model)

    monkeypatch.setattr("shapecheck.observe.probe.probe", probe)
    return seen


@pytest.fixture
def probes(tmp_path, observed):
    folder = tmp_path / "held"
    folder.mkdir()
    (tmp_path / "said").mkdir()
    (tmp_path / "other.toml").write_text(PROBE.format(verdict="elsewhere, so not collected"), encoding="utf-8")

    def write(verdict: str) -> tuple[str, ...]:
        (folder / "mine.toml").write_text(PROBE.format(verdict=verdict), encoding="utf-8")
        return ("--shapecheck-probes", "held")

    return write


def test_a_probe_is_held_to_what_it_expects(run, probes):
    done = run("-v", *probes("unet alone"))
    assert (done.status, done.items) == (0, {"held/mine.toml::probe": "PASSED"}), done.text
    done = run("-v", *probes("mismatch"))
    assert (done.status, done.items) == (1, {"held/mine.toml::probe": "FAILED"})
    assert "verdict: expected 'mismatch', got 'unet alone'" in done.text
    assert "Traceback" not in done.text


def test_a_probe_that_cannot_be_read_says_so(run, probes, tmp_path):
    (tmp_path / "held" / "mine.toml").write_text("story = ", encoding="utf-8")
    done = run("-v", "--shapecheck-probes", "held")
    assert (done.status, done.items) == (1, {"held/mine.toml::probe": "FAILED"})
    assert "mine.toml" in done.text.split("FAILURES")[1]
    assert "Traceback" not in done.text and "pytest_plugin" not in done.text


def test_what_is_said_of_a_probe_is_held_to_its_report(run, probes, tmp_path):
    asked = (*probes("unet alone"), "--shapecheck-reports", "said")
    report = tmp_path / "said" / "mine.md"
    done = run("-v", *asked)
    assert done.status == 1
    assert f"{report} is not what is said today; accept it with --shapecheck-update" in done.text
    assert not report.exists()
    assert run(*asked, "--shapecheck-update").status == 0
    assert report.read_text(encoding="utf-8").startswith("> A small model.\n\n")
    assert run(*asked).status == 0
    report.write_text(report.read_text(encoding="utf-8").replace("small", "large"), encoding="utf-8")
    assert run(*asked).status == 1


def mapping(size: str, downs, mid, *wrong: str) -> str:
    """A probe that claims these residuals of a small model, and expects these mismatches."""
    expect = f'verdict = "{"mismatch" if wrong else "agree"}"\nwrong = {list(wrong)}'
    claim = f"down = {[list(shape) for shape in downs]}\nmid = {list(mid)}"
    return f'story = "A."\nmodel = "bk-sdm-tiny"\nlatent = "{size}"\n[mapping]\n{claim}\n[expect]\n{expect}\n'


def test_a_mapping_is_held_against_the_preset_and_nothing_is_observed(run, observed, tmp_path):
    contract, folder = presets.contract("bk-sdm-tiny"), tmp_path / "held"
    folder.mkdir()

    def right(height: int, width: int) -> list[tuple[int, ...]]:
        return [shape[1:] for shape in contract.shapes(Geometry(1, height, width)).values()]

    *downs, mid = right(24, 40)
    probes = {
        "a": mapping("24x40", [(1, 1, 1), *downs[1:]], mid, "down_block_residual_00 channels"),
        "b": mapping("24x40", downs, mid),
        "c": mapping("24x40", downs, (mid[0] + 1, *mid[1:]), "mid_block_residual channels"),
        "e": mapping("9x16", right(9, 16)[:-1], right(9, 16)[-1]),
    }
    for name, text in probes.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    done = run("-v", "--shapecheck-probes", "held")
    assert (done.status, done.items) == (0, {f"held/{name}.toml::probe": "PASSED" for name in probes}), done.text
    assert observed == []
    (folder / "b.toml").write_text(probes["b"].replace("agree", "mismatch"), encoding="utf-8")
    done = run("-v", "--shapecheck-probes", "held", "-k", "b.toml")
    assert (done.status, done.items) == (1, {"held/b.toml::probe": "FAILED"}), done.text
    assert "verdict: expected 'mismatch', got 'agree'" in done.text


def test_paths_that_mislead_pytest_are_told_of(run, tmp_path):
    """pytest takes the values of options it does not know yet for tests, and looks for its settings there."""
    (tmp_path / "made").mkdir()
    onnx, model = tmp_path / "made" / "unet.onnx", tmp_path / "made" / "model"
    onnx.touch()
    model.mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "pytest.ini").write_text("[pytest]\nmarkers = mine: of the user", encoding="utf-8")
    os.chdir(tmp_path / "here")
    told = "write --shapecheck-model=PATH, with =, or --rootdir=."
    nothing = "--shapecheck-times-own=0"  # told after the header
    asked = (nothing, "--shapecheck-onnx", str(onnx), "--shapecheck-model", str(model))
    assert told in run(*asked).text
    for right in (("--rootdir=.",), ("-c", "pytest.ini")):
        assert told not in run(*asked, *right).text
    done = run(nothing, f"--shapecheck-onnx={onnx}", f"--shapecheck-model={model}")
    assert "configfile: pytest.ini" in done.text and told not in done.text
