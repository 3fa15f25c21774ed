"""Rows of a call that are given different things: what they cover, and how what the wrong ones share is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shapecheck import Geometry, presets
from shapecheck.contract import Input
from shapecheck.contract.dims import BATCH, constant
from shapecheck.parity.cases import BOTH, ForwardCase, InputGenerator, count_varied, list_rows
from shapecheck.parity.contrast import JudgedRow, describe_contrast
from shapecheck.parity.plan import choose_geometries, list_cases, plan_checks

CONTRACT = presets.contract("sd15")
"""Of a real model, whose inputs are only drawn."""
SIZES = choose_geometries(CONTRACT, ())
CALLS = [call for call in list_cases(plan_checks(CONTRACT, "ort", SIZES)) if not call.perturbed and not call.half]


def contrast(fails) -> str:
    """Return what is said when these rows are wrong in the calls that a run makes by itself."""
    rows = [JudgedRow(call, number, True) for call in CALLS for number in range(call.geometry.batch)]
    return describe_contrast([JudgedRow(row.case, row.number, not fails(row)) for row in rows])


@pytest.mark.parametrize("batch", range(1, 10))
def test_every_timestep_and_every_combination_of_controlnets_is_in_some_row(batch):
    size = Geometry(batch, 8, 14)
    calls = [ForwardCase(size, 0), *(ForwardCase(size, 0, varied=number) for number in range(count_varied(batch)))]
    rows = [row for call in calls for row in list_rows(call)]
    assert {0, 1, 20, 980, 999} <= {row.timestep for row in rows}
    assert any(489 < row.timestep < 501 for row in rows)
    assert {row.frames for row in rows} == {(), (0,), (1,), (0, 1)}
    assert all(any(getattr(row, name) for row in rows) for name in ("is_strong", "has_outliers", "is_noisy"))
    assert all(len(list_rows(call)) == batch for call in calls)


@pytest.mark.parametrize("batch", (1, 2, 3, 6))
def test_strengths_are_below_and_above_1_and_labels_the_last_and_many_others(batch):
    size = Geometry(batch, 8, 14)
    calls = [ForwardCase(size), *(ForwardCase(size, varied=number) for number in range(count_varied(batch)))]
    number = Input("class_labels", (BATCH,), "int64", "class_labels")
    strength = Input("conditioning_scale", (constant(1),), "float32", "conditioning_scale")
    generate = InputGenerator(replace(CONTRACT, inputs=(number, strength), slots=()), 0)
    given = [generate(call) for call in calls]
    strengths = [float(values["conditioning_scale"]) for values in given]
    assert min(strengths) < 1 < max(strengths)
    labels = {label for values in given for label in values["class_labels"].tolist()}
    assert max(labels) == 999
    assert min(labels) < 500
    assert len(labels) >= 4


def test_what_a_run_computes_by_itself_is_what_pictures_are_made_of():
    assert max(size.batch for size in SIZES) >= 4
    assert {size.tokens for size in SIZES} == {77, 154}
    assert max(size.height * size.width for size in SIZES) > 1000
    assert {size.height % 2 for size in SIZES} == {size.width % 2 for size in SIZES} == {0, 1}
    rows = [row for call in CALLS for row in list_rows(call)]
    assert {row.frames for row in rows} == {(), (0,), (1,), (0, 1)}
    assert {0, 1, 20, 500, 980, 999} <= {row.timestep for row in rows}
    # A kind of row stands in another place, and beside another timestep, in the second call.
    one, two = (list_rows(call) for call in CALLS if call.varied is not None)
    for kind in ("is_strong", "is_noisy"):
        places = [next(number for number, row in enumerate(rows) if getattr(row, kind)) for rows in (one, two)]
        assert places[0] != places[1]
        assert one[places[0]].timestep != two[places[1]].timestep


def test_what_varied_rows_are_given():
    generate, size = InputGenerator(CONTRACT, 0), Geometry(6, 8, 14)
    case = ForwardCase(size, 0, varied=0)
    given, rows = generate(case), list_rows(case)
    assert given["timestep"].tolist() == [row.timestep for row in rows]
    for number, row in enumerate(rows):
        residual = given["mid_block_residual"][number]
        text, sample = given["encoder_hidden_states"][number], given["sample"][number]
        assert bool(residual.any()) == bool(row.frames)
        assert (float((residual.abs() > 8).float().mean()) > 0.1) == row.is_strong
        assert (text.max() == 33 and text.min() == -28) == row.has_outliers
        assert (float(sample.abs().max()) > 30) == row.is_noisy
    both = generate(ForwardCase(size, BOTH))["mid_block_residual"]
    assert torch.equal(both, sum(generate(ForwardCase(size, frame))["mid_block_residual"] for frame in (0, 1)))


SAID = {
    "with 154 tokens, not with 77": lambda row: row.case.geometry.tokens > 77,
    "above 960 cells (32×40)": lambda row: row.cells > 1000,
    "in rows 3 and later of a batch": lambda row: row.number > 2,
    "in a batch of 6, not of 2": lambda row: row.case.geometry.batch > 2,
    "at timestep 980 and above, not at 648.9 and below": lambda row: row.given.timestep > 910,
    "at timestep 1 and below, not at 20 and above": lambda row: row.given.timestep < 5,
    "with strong residuals, of which many are beyond ±8": lambda row: row.given.is_strong,
    "with text that has the outliers of real encoders (to ±33)": lambda row: row.given.has_outliers,
    "with latents as wide as an Euler-type scheduler's first (to ±50)": lambda row: row.given.is_noisy,
    "where the residuals of two ControlNets are added": lambda row: len(row.given.frames) > 1,
    "where residuals are pooled": lambda row: row.case.pooled,
    "with control on": lambda row: bool(row.given.frames),
    "with control off": lambda row: not row.given.frames,
}


@pytest.mark.parametrize("words", SAID)
def test_what_wrong_rows_share_is_said_and_nothing_else(words):
    assert contrast(SAID[words]) == f"differs only {words}"


def test_what_wrong_rows_share_beside_control_is_said():
    assert contrast(lambda row: row.number > 2 and row.given.frames) == (
        "differs with control on, and only in rows 3 and later of a batch"
    )


def test_a_tolerance_may_hide_some_of_the_wrong_rows():
    assert contrast(lambda row: row.given.timestep > 910 and not row.given.is_strong) == (
        "differs only at timestep 980 and above, not at 648.9 and below"
    )


def test_nothing_is_said_where_all_rows_are_wrong_or_none_or_no_rule_fits():
    assert contrast(lambda row: True) == contrast(lambda row: False) == ""
    assert contrast(lambda row: (row.number + row.case.geometry.width) % 2) == ""
