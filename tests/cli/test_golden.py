"""What is seen from outside, held to golden texts: help, keys of the JSON, names in Python, options of the pytest plugin.

A change that is meant is accepted by `pytest tests/cli/test_golden.py --shapecheck-update`, and then read in the diff.
"""

from __future__ import annotations

import dis
import inspect
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from parity_samples import SAMPLES

import shapecheck
from shapecheck import (
    BuildOptions,
    Contract,
    ContractError,
    Geometry,
    Mismatch,
    Profile,
    Range,
    diff,
    parse_ranges,
    presets,
    profile_of,
)
from shapecheck.cli import main
from shapecheck.contract import ControlNetInfo
from shapecheck.doctor import report as doctor_report
from shapecheck.doctor.environment import Backend, Device, Driver, Environment, Gap, Package
from shapecheck.observe import report as observe_report
from shapecheck.observe.record import Recorder
from shapecheck.onnx import check_report as onnx_check_report
from shapecheck.onnx import export_report
from shapecheck.onnx.records import Agreement, DeclaredInput, DeclaredSlot, Exported, FileCheck, SizeLimits
from shapecheck.parity import report as parity_report
from shapecheck.parity.results import Parity
from shapecheck.pipelines import bench_report, demo_report
from shapecheck.pipelines.accelerate import Accelerated, AccelerationError
from shapecheck.pipelines.bench_record import Bench, Frame, PicturePart, Timing
from shapecheck.pipelines.demo_record import Change, Demo, Picture
from shapecheck.runtime.binding import CallError
from shapecheck.runtime.dropin import DropIn
from shapecheck.runtime.guard import Guard, GuardError
from shapecheck.tensorrt import build_report
from shapecheck.tensorrt import check_report as tensorrt_check_report
from shapecheck.tensorrt.record import BuildRequest, Built, Engine, EngineCheck, SizeFit, WeightsCheck

GOLDEN = Path(__file__).parent / "golden"
GROUP = "shapecheck"
"""The name of the file with the help of the whole."""


def compare_with_golden(name: str, text: str, update: bool) -> None:
    """Hold a text to the golden file of that name, or write it there."""
    path = GOLDEN / name
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    golden = path.read_text(encoding="utf-8") if path.is_file() else ""
    assert text == golden, f"not what is in {path}; if the change is meant, accept it with --shapecheck-update"


def list_goldens(folder: str) -> set[str]:
    return {path.stem for path in (GOLDEN / folder).iterdir()}


# help


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, prog_name="shapecheck", terminal_width=80)
    assert result.exit_code in (0, 1), result.output
    return result.stdout


def read_help(name: str) -> str:
    return invoke("--help") if name == GROUP else invoke(name, "--help")


@pytest.mark.parametrize("name", [GROUP, *main.commands])
def test_the_help_is_the_golden_one(name, update_reports):
    compare_with_golden(f"help/{name}.txt", read_help(name), update_reports)


def test_every_golden_help_is_of_a_command():
    assert list_goldens("help") == {GROUP, *main.commands}


def test_the_help_does_not_depend_on_the_terminal(monkeypatch):
    for name, value in {"COLUMNS": "43", "LINES": "5", "FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    compare_with_golden("help/probe.txt", read_help("probe"), update=False)


def test_the_version_is_told_in_the_golden_form(update_reports):
    compare_with_golden("version.txt", invoke("--version").replace(shapecheck.__version__, "<version>"), update_reports)


# keys of the JSON

MAPS = {
    "config": "setting",
    "fixed": "symbol",
    "names": "input",
    "right": "slot",
    "shapes": "slot",
    "versions": "package",
}
"""Keys under which an object holds data by name, and what the names are of."""
TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def describe_keys(values: Sequence[Any], path: str = "") -> Iterator[str]:
    """Yield every key path of these JSON values with its types. `?` ends a key that one of them has and another lacks."""
    if path:
        yield f"{path}: {' | '.join(sorted({TYPES[type(value)] for value in values}))}"
    if items := [item for value in values if isinstance(value, list) for item in value]:
        yield from describe_keys(items, f"{path}[]")
    objects = [value for value in values if isinstance(value, dict)]
    if noun := MAPS.get(path.rpartition(".")[2]):
        objects = [{f"<{noun}>": entry} for found in objects for entry in found.values()]
    for key in sorted({key for found in objects for key in found}):
        entries = [found[key] for found in objects if key in found]
        mark = "" if len(entries) == len(objects) else "?"
        yield from describe_keys(entries, f"{path}.{key}{mark}" if path else f"{key}{mark}")


SD15 = presets.contract("sd15")
AT = Geometry(2, 9, 11)
SIZES = Range(Geometry(1, 8, 9), AT, Geometry(3, 33, 41))
MISMATCHES = (
    *SD15.mismatches({"mid_block_residual": (2, 640, 2, 2), "down_block_residual_99": (2, 640, 2, 2)}, AT),
    Mismatch("dtype", "sample", "float32", "float16"),
)
"""A wrong one, missing ones, a surplus one; shapes and words; with a geometry and without."""
FULL = replace(
    SD15,
    features=SD15.slots[:1],
    header=replace(
        SD15.header,
        native=None,
        parameters=None,
        controlnets=(ControlNetInfo("a", "ControlNetModel", 320, 768, False), ControlNetInfo("b", "Other", 320, None, True)),
        adapter="t2iadapter-sd15",
        handover=("the residuals of 2 ControlNets are summed",),
        notes=("a note",),
    ),
)
"""A contract with everything that may be left out, and without what may be null."""


def run_json(*arguments: str) -> str:
    return invoke(*arguments, "--format", "json")


def make_probes() -> list[str]:
    return [
        run_json("probe", "koala-700m"),
        observe_report.render_json(SD15, (), AT),
        observe_report.render_json(FULL, MISMATCHES, AT),
    ]


def make_explanations() -> list[str]:
    """Explain a text of every kind, with a cause or in vain, and tables: wrong in several ways, incomplete, and right."""
    broadcast = "The size of tensor a ({}) must match the size of tensor b ({}) at non-singleton dimension {}"
    line = "sample = sample + mid_block_additional_residual"
    pair = "warning control could not be applied torch.Size([8, 1280, 12, 8]) torch.Size([8, 1280, 24, 16])"
    missing = "Required inputs (['input_control_00']) are missing from input feed (['sample'])."
    slots = {name: list(shape) for name, shape in SD15.shapes(Geometry(1, 64, 64)).items()}
    first = slots["down_block_residual_00"]
    silent = slots | {"down_block_residual_01": [1, 320, 1, 1]}
    from_one = {f"down_block_residual_{number:02}": shape for number, shape in enumerate(list(slots.values())[:-1], start=1)}
    surplus = {"down_block_residual_00": first, "down_block_residual_99": first}
    return [
        run_json("explain", broadcast.format(320, 640, 1), "--model", "sd15", "--mapping", "320,640,1280,1280@64"),
        run_json("explain", f"    {line}\n{broadcast.format(1280, 640, 1)}", "--model", "sd15"),
        run_json("explain", broadcast.format("((s0 - 1)//2) + 1", "s1", 3), "--model", "sd15"),
        run_json("explain", pair, "--model", "koala-700m"),
        run_json("explain", missing, "--model", "sd15"),
        run_json("explain", "nothing that is known"),
        run_json("explain", "--mapping", "320,640,1280,1280@64"),
        *(
            run_json("explain", "--model", "sd15", "--mapping", json.dumps(table))
            for table in (slots, silent, from_one, surplus)
        ),
    ]


def make_differences() -> list[str]:
    emitting, other = replace(SD15, role="controlnet"), replace(FULL.header, vae_factor=4)
    return [
        run_json("diff", "sd15", "sdxl"),
        run_json("diff", "sd15", "sd15"),
        diff.render_json(diff.NamedContract("a", SD15), diff.NamedContract("b", emitting)),
        diff.render_json(diff.NamedContract("a", SD15), diff.NamedContract("b", replace(FULL, header=other))),
    ]


def make_exports() -> list[str]:
    done = Exported(Path("u.onnx"), SD15, "none", "", (Path("u.onnx"),), "float32", 20, "shapecheck")
    agreements = [Agreement("out_sample", AT, 1e-6, 1e-5), Agreement("out_sample", AT, math.nan, math.inf)]
    return [
        export_report.render_json(done),
        export_report.render_json(replace(done, weights="copy", reason="no checkpoint"), agreements),
    ]


def make_checks() -> list[str]:
    seen = (
        DeclaredInput("sample", "batch×4×h×w", "float32"),
        DeclaredSlot("down_block_residual_00", "", "not seen", "conv_in", ""),
    )
    limits = SizeLimits(8, {"batch": 2}, {}, {77: True, 154: False}, ((24, 40),), AT, "Concat: sizes 5 and 6 meet on axis 2")
    fine = FileCheck("u.onnx", "shapecheck", SD15, "given", "", seen[:1], seen[1:], limits, (), (), (), (), "")
    sized = replace(fine, naming="shapecheck", requested=(AT,), notes=("a note",), unchecked="too many")
    broken = onnx_check_report.render_json(replace(fine, mismatches=MISMATCHES), controlnets=["sd15"], misfits=MISMATCHES)
    return [onnx_check_report.render_json(fine), onnx_check_report.render_json(sized), broken]


def make_profiles() -> tuple[Profile, ...]:
    return tuple(profile_of(SD15, sizes) for sizes in parse_ranges(["512x512", "384x384:512x512:904x768"], ["1", "1:2:4"]))


def make_engine(of: Contract = SD15, options: BuildOptions | None = None) -> Engine:
    names = tuple((name, name) for name in of.input_shapes(AT))
    digests = ("sha256:a", "sha256:b", "")
    request = BuildRequest(
        of, make_profiles(), names, ("out_sample",), *digests, options or BuildOptions(), "10.13.3", "NVIDIA L4"
    )
    if options is not None:
        request = replace(request, graph="sha256:d", computation="sha256:e")
    return Engine(request, "sha256:c", 4096)


OPTIONS = BuildOptions("rtx", 3, 1 << 20, compute_capabilities=("8.9",))


def make_builds() -> list[str]:
    return [
        build_report.render_json(Built(Path("u.plan"), make_engine(), found=True, seconds=0.0)),
        build_report.render_json(
            Built(Path("u.plan"), make_engine(options=OPTIONS), found=False, seconds=3.5, notes=("a note",))
        ),
    ]


def make_engine_checks() -> list[str]:
    found = EngineCheck("u.plan", make_engine().interface, "engine", "", (), None, (), (), None)
    fits, misfit = SizeFit(AT, 0, (), None, None), SizeFit(AT, None, ("profile 0: width 42",), AT, SIZES)
    wrong = replace(found, read="record", unread="no GPU", mismatches=MISMATCHES, controlnets=("sd15",), misfits=MISMATCHES)
    asked = [replace(wrong, fit=misfit, weights=WeightsCheck("u.onnx", False, "other weights")), replace(found, fit=fits)]
    return [tensorrt_check_report.render_json(checked) for checked in (found, *asked)]


def make_benches() -> list[str]:
    frame = Frame(5.0, 1.25, 3.75)
    ran = Timing("torch", "torch, float32", (frame, frame), 3 << 20, seconds=2.5), Timing("ort", "ort, float32", (frame,))
    timings = (*ran, Timing("trt", "", reason="no GPU"))
    bench = Bench("u.onnx", SD15.digest, AT, 2, "cpu, 2 threads", timings, (("torch", "2.13"),))
    parts = PicturePart("VAE decode", "AutoencoderKL", 9.5, 4.5), PicturePart("text", "CLIPTextModel", 1.5)
    return [bench_report.render_json(made) for made in (bench, replace(bench, parts=parts))]


def make_demos() -> list[str]:
    made = Demo(
        "a model", "a ControlNet", True, "a red chair", (16, 8), 4, 0, "ort", "cpu", "float32", "unet.onnx", SD15.digest, 13,
        (Picture("pytorch.png", "PyTorch"),), Change(0.01, 0.001), Change(90.0, 9.0), 1.0, 0.2, 0.1, (("torch", "2.13"),),
    )  # fmt: skip
    nan = Change(math.nan, math.nan)
    return [
        demo_report.render_json(made),
        demo_report.render_json(replace(made, allowed=None, difference=nan, control=nan, backend_seconds=0.0)),
    ]


def make_parities() -> list[str]:
    samples = [make() for make in SAMPLES.values()]
    return [parity_report.render_json(sample) for sample in (*samples, replace(samples[0], contract=FULL))]


def make_environments() -> list[str]:
    gap = Gap("not installed", "pip install it")
    packages = Package("torch", "torch", "2.13", True), Package("tensorrt", "tensorrt", "", False, gap)
    backends = Backend("torch", True, "torch 2.13"), Backend("trt", False, "", (gap,))
    with_gpu = Environment(
        "3.11.7", "Linux", packages, Driver("580", "13.0"), (Device("NVIDIA L4", "8.9", 24 << 30),), backends
    )
    without = replace(with_gpu, driver=Driver("", "", gap), devices=())
    return [doctor_report.render_json(with_gpu), doctor_report.render_json(without, ["trt"])]


SERVED = ("profile", "sd15", "--sizes", "384x384:512x512:904x768")
OUTPUTS = {
    "bench": make_benches,
    "build": make_builds,
    "build-record": lambda: [make_engine().to_json(), make_engine(FULL, OPTIONS).to_json()],
    "build-refused": lambda: [build_report.render_refusal(ContractError(MISMATCHES, subject="the profiles"), "json")],
    "check": make_checks,
    "check-engine": make_engine_checks,
    "demo": make_demos,
    "diff": make_differences,
    "doctor": make_environments,
    "explain": make_explanations,
    "export": make_exports,
    "parity": make_parities,
    "presets": lambda: [run_json("presets")],
    "probe": make_probes,
    "profile": lambda: [run_json(*SERVED)],
    "profile-ort": lambda: [run_json(*SERVED, "--for", "ort")],
    "profile-polygraphy": lambda: [run_json(*SERVED, "--for", "polygraphy")],
    "profile-trtexec": lambda: [run_json(*SERVED, "--for", "trtexec")],
    "rebind": make_exports,
    "refit": make_builds,
}
"""By command, and after a dash by what of it: JSON texts that together have every key there can be."""


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_keys_of_the_json_are_the_golden_ones(name, update_reports):
    lines = describe_keys([json.loads(text) for text in OUTPUTS[name]()])
    compare_with_golden(f"json/{name}.txt", "".join(f"{line}\n" for line in lines), update_reports)


def test_every_command_that_writes_json_has_golden_keys():
    choices = {name: [param.type for param in command.params] for name, command in main.commands.items()}
    writing = {name for name, kinds in choices.items() if any("json" in getattr(kind, "choices", ()) for kind in kinds)}
    assert writing == {name.partition("-")[0] for name in OUTPUTS}
    assert list_goldens("json") == set(OUTPUTS)


def test_no_golden_key_is_data():
    """A map that is not declared would fill the golden files with names of slots, settings or packages."""
    text = "".join((GOLDEN / "json" / f"{name}.txt").read_text(encoding="utf-8") for name in OUTPUTS)
    assert all(re.fullmatch(r"[a-z_\d.\[\]<>?]+: [a-z |]+", line) for line in text.splitlines())
    assert not re.search(r"down_block_residual|block_out_channels|torch:|encoder_hidden_states", text)
    assert all(f"{key}.<{noun}>" in text for key, noun in MAPS.items())


# names in Python


def describe_signature(value: Any) -> str:
    """Return the signature, without the address of a function that is a default."""
    return re.sub(r"<function \S+ at 0x\w+>", "<function>", str(inspect.signature(value)))


def list_members(cls: type) -> set[str]:
    """Return every public attribute that our code gives a class, be it on the class or in __init__."""
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "shapecheck"]
    names = {name for base in ours for name in (*vars(base), *inspect.get_annotations(base))}
    makers = [vars(base)["__init__"] for base in ours if "__init__" in vars(base)]
    names |= {step.argval for maker in makers for step in dis.get_instructions(maker) if step.opname == "STORE_ATTR"}
    return {name for name in names if not name.startswith("_") or name in ("__init__", "__call__")}


def describe_class(cls: type) -> str:
    """Return a class with its bases, then its public attributes, those that can be called with their signatures."""
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    values = {name: getattr(cls, name, None) for name in sorted(list_members(cls))}
    members = [f"    {name}{describe_signature(value) if callable(value) else ''}" for name, value in values.items()]
    return "\n".join([f"class {cls.__name__}({bases})", *members])


def test_names_in_python_are_the_golden_ones(update_reports):
    public = {name: getattr(shapecheck, name) for name in shapecheck.__all__}
    reached = (Accelerated, AccelerationError, Built, CallError, DropIn, Exported, Guard, GuardError, Parity, Recorder)
    parts = [
        describe_class(value) if isinstance(value, type) else name + describe_signature(value) for name, value in public.items()
    ]
    parts += ["# returned or raised by these", *map(describe_class, reached)]
    compare_with_golden("api.txt", "".join(f"{part}\n" for part in parts), update_reports)


# options of the pytest plugin


def test_options_of_the_pytest_plugin_are_the_golden_ones(request, update_reports):
    plugin, parser = request.config.pluginmanager.get_plugin("shapecheck"), Mock()
    plugin.pytest_addoption(parser)
    added = [
        ", ".join([*option.args, *(f"{key}={value!r}" for key, value in sorted(option.kwargs.items()))])
        for option in parser.getgroup.return_value.addoption.call_args_list
    ]
    lines = [f"group {parser.getgroup.call_args.args}", *added, f"fixtures {plugin.__all__}"]
    compare_with_golden("pytest_options.txt", "".join(f"{line}\n" for line in lines), update_reports)


# that each of these can fail


def test_another_text_and_a_missing_file_are_refused():
    for name, text in (("version.txt", "shapecheck 1\n"), ("help/none.txt", "Usage: none\n")):
        with pytest.raises(AssertionError, match="accept it with --shapecheck-update"):
            compare_with_golden(name, text, update=False)


def test_a_renamed_a_dropped_and_a_retyped_key_are_seen():
    def described(kind: str, *cells: dict[str, Any]) -> list[str]:
        return [*describe_keys([{kind: "size", "cells": [*cells]}])]

    whole = described("kind", {"width": 1}, {"width": 2, "note": None})
    assert whole == ["cells: array", "cells[]: object", "cells[].note?: null", "cells[].width: integer", "kind: string"]
    spoilt = [
        described("sort", {"width": 1}, {"width": 2, "note": None}),
        described("kind", {"width": 1}, {"width": 2}),
        described("kind", {"width": 1}, {"note": None}),
        described("kind", {"width": 1, "note": None}, {"width": 2, "note": None}),
        described("kind", {"width": 1}, {"width": 2, "note": "a"}),
        described("kind", {"width": 1}, {"width": "2", "note": None}),
        described("kind"),
    ]
    assert whole not in spoilt


def test_a_map_is_told_by_what_its_names_are_of():
    assert [*describe_keys([{"versions": {"torch": "2", "onnx": None}}])] == [
        "versions: object",
        "versions.<package>: null | string",
    ]


def test_another_member_or_signature_is_seen(monkeypatch):
    whole = describe_class(ContractError)
    assert whole.splitlines()[0] == "class ContractError(ShapecheckError)"
    assert {line.split("(")[0].strip() for line in whole.splitlines()[1:]} == {
        "__init__", "contract", "exit_status", "mismatches", "subject"
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.delattr(ContractError, "exit_status")
        patch.delattr(ContractError.__base__, "exit_status")
        assert describe_class(ContractError) != whole
    with monkeypatch.context() as patch:
        patch.setattr(Geometry, "from_px", classmethod(lambda cls, width, height: None))
        assert "from_px(width, height)" in describe_class(Geometry)
    assert describe_class(ContractError) == whole
