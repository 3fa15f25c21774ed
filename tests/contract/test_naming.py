"""Naming schemes: each reads its own names back and nothing else's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shapecheck import ShapecheckError, presets
from shapecheck.contract.naming import SCHEMES, SHAPECHECK, detect_scheme, find_declared, find_scheme, match_residuals


@pytest.mark.parametrize(
    ("key", "first", "twelfth", "mid"),
    [
        ("shapecheck", "down_block_residual_00", "down_block_residual_11", "mid_block_residual"),
        ("streamdiffusion", "input_control_00", "input_control_11", "input_control_middle"),
        ("comfyui", "output_control_0", "output_control_11", "middle_control_0"),
        (
            "optimum-neuron",
            "down_block_additional_residuals_0",
            "down_block_additional_residuals_11",
            "mid_block_additional_residual",
        ),
    ],
)
def test_the_names_are_those_found_in_the_field(key, first, twelfth, mid):
    names = find_scheme(key).names(12)
    assert (names[0], names[11], names[12]) == (first, twelfth, mid)


@settings(deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(1, 200))
def test_a_scheme_reads_its_own_names_and_is_detected_by_them(naming, downs):
    names = naming.names(downs)
    assert [naming.index(name) for name in names] == [*range(downs), -1]
    assert detect_scheme(["sample", "timestep", *names]) is naming
    for other in set(SCHEMES) - {naming}:
        assert [other.index(name) for name in names] == [None] * (downs + 1)


@pytest.mark.parametrize(
    "name", ["down_block_residual_0", "down_block_residual_000", "down_block_residual_", "mid", "Mid_block_residual"]
)
def test_near_misses_are_no_names(name):
    assert SHAPECHECK.index(name) is None


def test_names_of_no_scheme_are_of_none():
    assert detect_scheme(["sample", "timestep"]) is None
    with pytest.raises(ShapecheckError, match="no naming scheme 'webui'; known: shapecheck, streamdiffusion"):
        find_scheme("webui")


def test_contracts_use_our_names():
    for name, contract in presets.contracts().items():
        assert tuple(slot.name for slot in contract.slots) == SHAPECHECK.names(len(contract.slots) - 1), name


def test_a_controlnets_outputs_are_matched_in_any_order_and_a_strangers_are_not():
    slots = SHAPECHECK.names(2)
    theirs = ("mid_block", "down_block_01", "down_block_00")
    assert match_residuals(slots, theirs) == dict(zip(slots, theirs[::-1], strict=True))
    assert match_residuals(slots, slots) == dict(zip(slots, slots, strict=True))
    assert match_residuals(slots, (*theirs[:2], "down_block_02")) == {}


def test_base_inputs_are_found_under_another_projects_names_but_not_two_in_one():
    assert find_declared("sample", ["x", "timesteps"]) == "x"
    assert find_declared("sample", ["x", "sample"]) == "sample"
    assert find_declared("time_ids", ["x", "y"]) == "time_ids"
