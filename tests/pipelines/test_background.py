"""Engines that are built while a pipeline runs: what is started, what becomes of its failure, and what is left of it."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import engines
import pytest
import small
import torch

import shapecheck
from shapecheck import Geometry, Range, ShapecheckError
from shapecheck.models.computation import Computation
from shapecheck.onnx import export as exporter
from shapecheck.pipelines import background, candidates, choose
from shapecheck.pipelines.accelerate import Accelerated
from shapecheck.pipelines.measured_record import MeasuredRecord, Measurement, read_record

KEY = {"device": "a GPU"}
WAITING = MeasuredRecord(tuple(KEY.items()), 120.0, (Measurement("torch", 30.0), Measurement("trt", waiting=True)))
SIZES = Range(Geometry(1, 9, 13), Geometry(2, 9, 13), Geometry(2, 9, 13))


@pytest.fixture
def unet():
    return small.unet(**small.TINY)


@pytest.fixture
def maker(tmp_path, caplog):
    caplog.set_level(logging.INFO, "shapecheck")
    return candidates.CandidateMaker(tmp_path, (SIZES,), {}, lambda *_: None, contracts={}, strict=False)


class Process:
    """In place of the building process: it notes its job, and says what it is told to."""

    jobs: ClassVar = []
    words = ""
    status = 0
    options: ClassVar = {}

    def __init__(self, *_, **options):
        self.options.update(options)
        self.stdout = io.StringIO(self.words)
        self.stdin = SimpleNamespace(write=self.jobs.append, flush=lambda: None, close=lambda: None)

    def wait(self):
        return self.status


def test_what_is_not_exported_is_saved_and_handed_over_with_its_profiles(unet, maker, monkeypatch, caplog):
    controlnet = small.controlnet(unet)
    monkeypatch.setattr(background.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "words", 'a library prints\n{"failure": ""}\n')
    monkeypatch.setattr(Process, "jobs", [])
    monkeypatch.setattr(exporter, "export", engines.exported_quickly)
    exported = maker.find_cache(unet).export_onnx()
    failures = []
    background.BackgroundBuild(maker, (unet, controlnet), failures.append).wait()
    first, second = json.loads(Process.jobs[0])["models"]
    assert Process.options["start_new_session"], "Ctrl-C in the user's terminal is not for it"
    assert (first["onnx"], first["folder"]) == (str(exported), "")
    assert {path.name for path in (maker.folder / second["folder"] / "controlnet").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    assert not failures
    assert caplog.messages[-1] == "trt has been built in the background: the next start measures it"


def test_one_with_settings_beside_its_config_is_not_built_from_its_config(unet, maker):
    unet.mid_block.resnets[0].output_scale_factor = 2.0
    with pytest.raises(ShapecheckError, match="settings that its config does not hold, such as attention processors"):
        background.BackgroundBuild(maker, (small.controlnet(unet), unet), print)
    assert not list(maker.folder.glob("*.saved")), "what was saved of the other model"


def test_a_full_disk_is_told_and_leaves_nothing(unet, maker, monkeypatch, caplog):
    def save(folder, **_):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unet, "save_pretrained", save, raising=False)
    monkeypatch.setattr(background, "describe_computation", lambda _: Computation("", "", ()))
    assert choose.build_in_background(maker, (unet,), WAITING) is None
    assert "No space left on device" in caplog.messages[-1]
    assert not [path for path in maker.folder.iterdir() if not path.name.startswith("contract-")]


def test_two_processes_save_into_two_folders_and_what_a_killed_one_left_is_removed(unet, maker, monkeypatch):
    monkeypatch.setattr(background.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "jobs", [])
    others = [maker.find_cache(unet).path.with_suffix(f".{number}.saved") for number in (1, 2)]
    for other in others:
        other.mkdir()
    os.utime(others[0], (0, 0))
    background.BackgroundBuild(maker, (unet,), lambda _: None).wait()
    (entry,) = json.loads(Process.jobs[0])["models"]
    assert {path.name for path in maker.folder.glob("*.saved")} == {Path(entry["folder"]).name, others[1].name}


def test_one_that_is_stopped_with_the_program_is_no_failure(unet, maker, monkeypatch, caplog):
    monkeypatch.setattr(background.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "status", -signal.SIGTERM)
    choose.build_in_background(maker, (unet,), WAITING).wait()
    assert "was stopped: the next start goes on" in caplog.text
    assert read_record(maker.folder, KEY) is None


@pytest.mark.parametrize("words", ['{"failure": "no TensorRT"}\n', ""])
def test_a_failure_is_kept_so_that_no_later_start_begins_it_again(unet, maker, monkeypatch, caplog, words):
    monkeypatch.setattr(background.subprocess, "Popen", Process)
    monkeypatch.setattr(Process, "words", words)
    build = choose.build_in_background(maker, (unet,), WAITING)
    build.wait()
    assert not build.is_running
    kept = read_record(maker.folder, KEY)
    refusal = "no TensorRT" if words else "the building process ended without a word (exit status 0)"
    assert kept.measurements[1] == Measurement("trt", refusal=refusal)
    assert f"trt cannot be built in the background: {refusal}" in caplog.messages
    assert choose.build_in_background(maker, (unet,), kept) is None


def test_nothing_is_started_where_nothing_waits_or_all_is_there(unet, maker, monkeypatch):
    waiting = MeasuredRecord((), 120.0, (Measurement("torch-compile", waiting=True),))
    assert choose.build_in_background(maker, (unet,), waiting) is None
    monkeypatch.setattr(candidates.CandidateMaker, "is_made", lambda *_: True)
    assert choose.build_in_background(maker, (unet,), MeasuredRecord((), 120.0, (Measurement("trt", waiting=True),))) is None


def test_what_is_under_way_is_told(unet, maker):
    choice = choose.Choice(candidates.keep_in_torch(unet, ()), background=SimpleNamespace(is_running=True))
    done = Accelerated(None, maker, choice)
    assert done.pending == ("trt",)
    assert str(done).splitlines()[-1] == "trt is built in the background, for the next start"
    choice.background.is_running = False
    assert done.pending == ()


@pytest.mark.full
def test_a_real_process_exports_and_says_why_no_engine_is_built_here(maker):
    if torch.cuda.is_available():
        pytest.skip("TensorRT may run here")
    unet, failures = small.unet(**small.TINY | {"up_block_types": ("UpBlock2D",)}), []
    background.BackgroundBuild(maker, (unet,), failures.append).wait()
    (failure,) = failures
    assert "cannot build with --target trt" in failure
    cache = maker.find_cache(unet)
    assert cache.is_exported
    assert shapecheck.read_contract(cache.path) == maker.find_contract(unet)
    assert {path.name for path in maker.folder.iterdir()} >= {cache.path.name, f"{cache.path.name}.data"}
    assert not list(maker.folder.glob("*.saved")) + list(maker.folder.glob(".shapecheck.*.partial"))


@pytest.mark.full
def test_a_real_process_ends_with_the_one_that_asked_and_leaves_nothing_half_written(maker):
    unet, failures = small.unet(), []
    build = background.BackgroundBuild(maker, (unet,), failures.append)
    build.end()
    build.wait()
    assert not failures
    assert not list(maker.folder.glob("*.saved")) + list(maker.folder.glob("*.partial")) + list(maker.folder.glob("*.onnx"))
