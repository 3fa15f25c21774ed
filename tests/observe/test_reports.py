"""What reports say, and which probes there are; shapecheck's own plugin carries those out."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import artefacts
import pytest

from shapecheck import Contract, Geometry, Mismatch, presets
from shapecheck.contract.records import ControlNetInfo
from shapecheck.observe import request as requests
from shapecheck.observe.report import judge_probe, render_json, render_text

ROOT = Path(__file__).parents[2]
PROBES = sorted((ROOT / "probes").glob("*.toml"))
UNETS = [name for name in presets.names() if presets.load(name).kind == "unet"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name != "sd15")) for name in UNETS])
def test_the_contract_saved_for_a_preset_is_what_is_observed_today(name, update_reports):
    observed = artefacts.observed(name)
    if update_reports:
        (ROOT / "shapecheck/presets/contracts" / f"{name}.json").write_text(observed.to_json(), encoding="utf-8")
    saved = Contract.from_json((ROOT / "shapecheck/presets/contracts" / f"{name}.json").read_text(encoding="utf-8"))
    assert saved == observed
    assert saved.header.parameters == observed.header.parameters
    assert saved.header.vae_factor == observed.header.vae_factor


def test_every_preset_is_probed_and_every_report_has_its_probe():
    probed = {tomllib.loads(path.read_text(encoding="utf-8"))["model"] for path in PROBES}
    assert probed >= set(UNETS)
    others = {"README", "performance", "explain", "half_precision", "gpu"}
    told = {path.stem for path in (ROOT / "reports").glob("*.md")} - others
    assert told == {path.stem for path in PROBES}
    verdicts = Counter(requests.read_request(path).expect["verdict"] for path in PROBES)
    assert min(verdicts[each] for each in ("agree", "mismatch", "unet alone")) >= 3


def test_a_person_s_terminal_is_wide_enough():
    text = render_text(presets.contract("sd15"), (), Geometry(1, 64, 64))
    assert max(map(len, text.splitlines())) <= 101
    assert "added at       unet_2d_condition.py:" in text
    title, verdict_line = text.split("\n\n")[:2]
    assert title.startswith("preset sd15")
    assert verdict_line == text.splitlines()[-1]


@pytest.mark.parametrize("moved", [0, 12])
def test_sites_that_differ_slot_by_slot_have_their_column(moved):
    contract = presets.contract("sd15")
    slots = [replace(slot, adds=(replace(slot.adds[0], file="a.py", line=7),)) for slot in contract.slots]
    slots[moved] = replace(slots[moved], adds=(replace(slots[moved].adds[0], line=9),))
    text = render_text(replace(contract, slots=tuple(slots)), (), Geometry(1, 64, 64))
    assert ("added at       a.py:7 (down), :9 (mid)" in text) is (moved == 12)
    assert (" added at " in text) is (moved == 0)


def test_mismatches_name_their_controlnet_and_module_where_that_says_something():
    one = Mismatch("size", "down_block_residual_03", (1, 2, 3, 4), (1, 2, 3, 5), controlnet_module="controlnet_down_blocks.3")
    two = replace(one, controlnet="ControlNet 2", cause="because " * 20)
    contract, at = presets.contract("sd15"), Geometry(1, 64, 64)
    usual = render_text(contract, (one, one), at)
    assert "controlnet_down_blocks" not in usual
    assert "ControlNet  " not in usual
    assert "ControlNet module" in render_text(contract, (one,), at, form="markdown")
    assert "controlnet_down_blocks.3" in render_text(contract, (replace(one, where="mid_block_residual"),), at)
    several = render_text(contract, (replace(one, controlnet="ControlNet 1"), two), at)
    assert "ControlNet 1" in several
    assert max(map(len, several.splitlines())) < 160


def test_the_cause_all_share_is_told_under_the_title():
    found = [Mismatch("size", name, (1,), (2,), cause=f"made for X; {name}") for name in ("a", "b")]
    text = render_text(presets.contract("sd15"), found, Geometry(1, 64, 64))
    assert text.split("\n\n")[1] == "MISMATCH: 2 places; likely cause: made for X"


NET = ControlNetInfo("mine", "ControlNetModel", 320, 768, False)


@pytest.mark.parametrize(("nets", "expected"), [((), "unet alone"), ((NET,), "agree")])
def test_one_verdict_for_all(nets, expected):
    contract = presets.contract("koala-700m")
    contract = replace(contract, header=replace(contract.header, controlnets=nets))
    assert judge_probe(contract, ()) == expected
    report = json.loads(render_json(contract, (), Geometry(1, 64, 64)))["report"]
    assert (report["verdict"], report["claim"]) == (expected, False)
    assert expected.upper() in render_text(contract, (), Geometry(1, 64, 64))
