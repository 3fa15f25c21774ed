"""A request carried out: what was observed for one serves the next, and what one claims stays with it."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from shapecheck import ContractError, Geometry, Mismatch, ShapecheckError, presets
from shapecheck.observe.request import Claim, Observations, Request, carry_out
from shapecheck.progress import silent

CONTRACT = presets.contract("sd15")
AT = Geometry(1, 24, 40)
REQUEST = Request("sd15", latent=(24, 40))


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


def claim_residuals(batch: int, *changed: int) -> Claim:
    """Return SD1.5's residuals at 24×40, a channel too many in those at these places."""
    *downs, mid = [shape[1:] for shape in CONTRACT.shapes(replace(AT, batch=batch)).values()]
    return Claim(
        tuple((shape[0] + (place in changed), *shape[1:]) for place, shape in enumerate(downs)),
        mid,
    )


def places(finding) -> list[str]:
    return [mismatch.where for mismatch in finding.mismatches]


def test_requests_that_differ_in_their_claim_alone_observe_once(observed):
    observations = Observations()
    wanted = {
        "down_block_residual_03": claim_residuals(1, 3),
        "": claim_residuals(1),
        "down_block_residual_07": claim_residuals(1, 7),
    }
    for place, claim in wanted.items():
        finding = carry_out(replace(REQUEST, claim=claim), progress=silent, observations=observations)
        assert places(finding) == ([place] if place else [])
        assert (finding.contract, finding.geometry) == (CONTRACT, AT)
    plain = carry_out(REQUEST, progress=silent, observations=observations)
    assert places(plain) == []
    assert observed == [{"model": "sd15", "nets": None, "adapter": None, "geometry": AT, "offline": False}]


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
def test_what_else_differs_is_observed_anew(observed, other):
    observations = Observations()
    for request in (REQUEST, replace(REQUEST, **other), REQUEST, replace(REQUEST, **other)):
        carry_out(request, progress=silent, observations=observations)
    assert len(observed) == 2
    assert observed[0] != observed[1] or "size_px" in other  # the same cells, asked for in pixels


def test_offline_is_observed_anew(observed):
    observations = Observations()
    for offline in (False, True, True):
        carry_out(REQUEST, offline=offline, progress=silent, observations=observations)
    assert [each["offline"] for each in observed] == [False, True]


def test_without_observations_nothing_is_kept(observed):
    for _ in range(2):
        carry_out(REQUEST, progress=silent)
    carry_out(REQUEST, progress=silent, observations=Observations())
    assert len(observed) == 3


def test_a_claim_is_of_the_batch_that_is_asked_for(observed):
    finding = carry_out(replace(REQUEST, batch=2, claim=claim_residuals(2)), progress=silent)
    assert places(finding) == []
    assert finding.geometry == replace(AT, batch=2)


def test_a_mismatch_that_was_observed_is_found_again_and_a_failure_is_tried_again(monkeypatch):
    tried, observations = [], Observations()
    wrong = (Mismatch("channels", "mid_block_residual", (1, 640, 3, 5), (1, 1280, 3, 5)),)

    def probe(model, nets=None, **rest):
        tried.append(model)
        if nets is None:
            raise ShapecheckError("no such thing today")
        raise ContractError(wrong, subject="sdxl", contract=CONTRACT)

    stand_in(monkeypatch, probe)
    for _ in range(2):
        finding = carry_out(replace(REQUEST, controlnets=("sdxl",)), progress=silent, observations=observations)
        assert (finding.mismatches, finding.contract) == (wrong, CONTRACT)
    assert len(tried) == 1
    for _ in range(2):
        with pytest.raises(ShapecheckError, match="no such thing today"):
            carry_out(REQUEST, progress=silent, observations=observations)
    assert len(tried) == 3
