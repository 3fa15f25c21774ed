"""A request carried out: what was asked for is observed, and a mismatch is a finding."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from shapecheck import ContractError, Geometry, Mismatch, ShapecheckError, presets
from shapecheck.observe.request import ProbeRequest, read_request, run_probe
from shapecheck.progress import silent

CONTRACT = presets.contract("sd15")
AT = Geometry(1, 24, 40)
REQUEST = ProbeRequest("sd15", latent=(24, 40))


def stand_in(monkeypatch, probe) -> None:
    """Let a function stand in for the module that observes, which imports diffusers."""
    monkeypatch.setitem(sys.modules, "shapecheck.observe.probe", SimpleNamespace(probe=probe))


@pytest.fixture
def observed(monkeypatch) -> list[dict]:
    """What is observed; SD1.5's recorded contract is what everything comes to."""
    seen = []

    def probe(model, nets=None, *, progress, **rest):
        seen.append({"model": model, "nets": nets, **rest})
        return CONTRACT

    stand_in(monkeypatch, probe)
    return seen


@pytest.mark.parametrize(
    "other",
    [
        {"model": "sd15-inpaint"},
        {"controlnets": ("controlnet-sd15",)},
        {"adapter": "t2iadapter-sd15"},
        {"latent": (40, 24)},
        {"latent": None, "size_px": (320, 192)},
        {"batch": 2},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_is_asked_for_is_observed(observed, other):
    request = replace(REQUEST, **other)
    finding = run_probe(request, offline=True, progress=silent)
    geometry = Geometry(request.batch, *(request.latent or (24, 40)))
    assert finding.geometry == geometry
    nets = list(request.controlnets) or None
    expected = {"model": request.model, "nets": nets, "adapter": request.adapter, "geometry": geometry, "offline": True}
    assert observed == [expected]


def test_a_mismatch_that_was_observed_is_a_finding_and_a_failure_is_raised(monkeypatch):
    wrong = (Mismatch("channels", "mid_block_residual", (1, 640, 3, 5), (1, 1280, 3, 5)),)

    def probe(model, nets=None, **rest):
        if nets is None:
            raise ShapecheckError("no such thing today")
        raise ContractError(wrong, subject="sdxl", contract=CONTRACT)

    stand_in(monkeypatch, probe)
    finding = run_probe(replace(REQUEST, controlnets=("sdxl",)), progress=silent)
    assert (finding.mismatches, finding.contract) == (wrong, CONTRACT)
    with pytest.raises(ShapecheckError, match="no such thing today"):
        run_probe(REQUEST, progress=silent)


@pytest.mark.parametrize("key", ["controlnet", "adapter"])
def test_a_mapping_stands_alone(key, tmp_path):
    path = tmp_path / "probe.toml"
    path.write_text(f'model = "sd15"\n{key} = "any"\nmapping = "320@64"\n', encoding="utf-8")
    with pytest.raises(ShapecheckError, match=f"drop it or `{key}`"):
        read_request(path)
