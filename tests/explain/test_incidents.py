"""The catalogue: each incident is acted out with today's libraries, and that text, and the one once reported, is diagnosed."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import incidents
import pytest

from shapecheck import presets
from shapecheck.explain.explain_text import explain_text
from shapecheck.explain.judge_mapping import judge_residuals
from shapecheck.explain.residual_table import RequestedSize, ResidualShapes

FILES = sorted(incidents.FOLDER.glob("*.toml"))
ALL = [incidents.read(path) for path in FILES]
TOLD = [each for each in ALL if each.text]
ALWAYS = {
    "blocks-a-level-too-early",
    "mid-forgotten-warning",
    "half-and-float",
    "on-the-meta-device",
    "control-image-against-latents",
    "from-unet-without-mid-block",
    "wrong-lora",
}
"""One a way: an exception of the UNet, a warning, a dtype; no values; a ControlNet; the making of one; other code."""
ACTED = [
    pytest.param(incident, id=incident.name, marks=[] if incident.name in ALWAYS else pytest.mark.full)
    for incident in ALL
    if incident.setup["how"] != "not run"
]
SMALLER = [incident for incident in ALL if incident.name in ("half-in-onnxruntime", "inputs-not-given")]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


def test_the_catalogue_is_whole():
    assert len(ALL) > 30
    for each in ALL:
        assert each.story.endswith(".")
        assert each.text or each.setup["how"] != "not run", f"{each.name}: neither a text nor a set-up"
        assert set(each.expect) <= {
            "exit",
            "reason",
            "slots",
            "slot",
            "fault",
            "faults",
            "text_faults",
            "causes",
            "where",
            "silent",
        }
        assert each.expect, each.name
        if each.setup["how"] == "not run":
            assert each.setup["why"]


def test_files_say_nothing_else():
    for path in FILES:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
        assert set(record) <= {"story", "threads", "text", "model", "setup", "expect"}


@pytest.mark.parametrize("incident", TOLD, ids=lambda each: each.name)
def test_the_text_once_reported_is_diagnosed(incident):
    diagnosis = explain_text(incident.text, {incident.model: presets.contract(incident.model)}, RequestedSize())
    holds(diagnosis, incident.expect | {"faults": incident.expect.get("text_faults", incident.expect.get("faults", []))})


@pytest.mark.parametrize("incident", SMALLER, ids=lambda incident: incident.name)
def test_acted_out_with_a_smaller_graph_it_is_diagnosed(incident, folder):
    check(incident, incidents.act(replace(incident, model=incidents.DEEP), folder))


@pytest.mark.parametrize("incident", ACTED)
def test_acted_out_today_it_is_diagnosed(incident, folder):
    check(incident, incidents.act(incident, folder))


def check(incident, acted):
    """What was really said is diagnosed as the incident expects."""
    size = RequestedSize((acted.at.height, acted.at.width), acted.at.batch)
    expect = incident.expect
    if not expect.get("silent"):
        assert acted.text, "nothing was raised"
        by_text, by_traceback = (explain_text(text, {"it": acted.contract}, size) for text in (acted.text, acted.traceback))
        for diagnosis in [by_traceback] + [by_text] * (expect.get("exit", 0) == 0):  # it takes the place to rule a text out
            holds(diagnosis, {key: value for key, value in expect.items() if key != "slots"})
        if "slot" in expect:
            shown, narrowed = (
                {(one.failure.slot, one.fault.residuals) for one in candidates(diagnosis)}
                for diagnosis in (by_text, by_traceback)
            )
            assert narrowed <= shown
            assert expect["slot"] in {slot for slot, _ in narrowed}
    if acted.given is not None and "fault" in expect:
        judgement = judge_residuals(ResidualShapes(*acted.given), ("it",), acted.contract, acted.at)
        assert expect["fault"] in {fault.kind for fault in judgement.matches[0].faults}
        assert judgement.is_silent is expect.get("silent", False)


def candidates(diagnosis):
    return [each for reading in diagnosis.explanations for answer in reading.answers for each in answer.candidates]


def holds(diagnosis, expect):
    """Whether a diagnosis says what an incident expects."""
    assert bool(diagnosis.explanations) is (expect.get("exit", 0) == 0), diagnosis.reason
    assert expect.get("reason", "") in diagnosis.reason
    shown = candidates(diagnosis)
    assert {each.failure.slot for each in shown} >= set(expect.get("slots", []))
    assert {fault.kind for each in shown for fault in each.faults} >= set(expect.get("faults", []))
    causes = [cause for reading in diagnosis.explanations for cause in reading.causes]
    assert {cause.kind for cause in causes} >= set(expect.get("causes", []))
    if "where" in expect:
        assert any(expect["where"] in (cause.where, *cause.slots) for cause in causes), causes
