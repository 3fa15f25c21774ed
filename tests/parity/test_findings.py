"""Which faults are told of the checks that failed: each once, whatever follows from it."""

from __future__ import annotations

from dataclasses import replace

import parity_samples as samples
import pytest

from shapecheck.parity.findings import list_consequences, list_findings, suggest_command
from shapecheck.parity.results import Check, Divergence, Parity, Result
from shapecheck.parity.summary import summarize

SIZE = "batch 2, latent 9×17"
CASES = {f"case[{SIZE}, control on]": "largest difference 2.0e+00", f"case[{SIZE}, pooled]": "largest difference 6.7e-01"}
SLOTS = [*(f"down_block_residual_{index:02}" for index in range(12)), "mid_block_residual"]
DEAD = "changes nothing: what the ControlNet gives there is lost"
EXCHANGED = {
    f"slot[{SLOTS[0]}]": f"{SLOTS[0]} acts where {SLOTS[1]} belongs (down_blocks.0.resnets.0) (cosine 1.000)",
    f"slot[{SLOTS[1]}]": f"{SLOTS[1]} acts where {SLOTS[0]} belongs (conv_in) (cosine 0.999)",
}
VAGUE = {
    f"input[{name}]": f"{name} acts otherwise than in PyTorch: strength 0.9{end}"
    for end, name in enumerate(["sample", "timestep"])
}


def make(failed: dict[str, str], **changes: object) -> Parity:
    """Return a run of which these checks failed with these reasons."""
    whole = samples.healthy()
    results = []
    for about, reason in failed.items():
        kind, _, where = about.removesuffix("]").partition("[")
        results.append(
            Result(Check("ort", kind, where), "failed", reason, verdict=samples.verdict(1) if kind == "case" else None)
        )
    return replace(whole, requested="./my model", sides=(replace(whole.sides[0], results=tuple(results), **changes),))


def tell(parity: Parity) -> tuple[list[str], list[str]]:
    """Return the faults, and the checks that follow from them."""
    (side,) = parity.sides
    return [finding.message for finding in list_findings(side)], [str(result.check) for result in list_consequences(side)]


def test_two_slots_exchanged_are_one_fault():
    parity = make({"contract": f"{SLOTS[0]}: order: got the place of {SLOTS[1]}"} | EXCHANGED | CASES)
    first = f"{SLOTS[0]} and {SLOTS[1]} are exchanged: {EXCHANGED[f'slot[{SLOTS[0]}]']}"
    assert tell(parity) == ([first], ["ort/contract", *(f"ort/{name}" for name in CASES)])
    assert summarize(parity) == f"ort: {first} (5 of 5 checks failed)"
    assert suggest_command(parity) == "shapecheck check models/sd15/unet.onnx --model './my model'"


def test_slots_turned_round_are_one_fault_and_another_slot_is_another():
    ring = {f"slot[{SLOTS[at]}]": f"{SLOTS[at]} acts where {SLOTS[(at + 1) % 3]} belongs (cosine 1.000)" for at in range(3)}
    messages, rest = tell(make(ring | {f"slot[{SLOTS[5]}]": f"{SLOTS[5]} {DEAD}"} | CASES))
    assert messages[0].startswith(f"{SLOTS[0]}, {SLOTS[1]} and {SLOTS[2]} are in each other's place: {SLOTS[0]} acts where ")
    assert messages[1:] == [f"{SLOTS[5]} {DEAD}"]
    assert len(rest) == len(CASES)


def test_thirteen_slots_that_change_nothing_are_one_fault():
    dead = {f"slot[{name}]": f"{name} {DEAD}" for name in SLOTS}
    messages, rest = tell(make(dead | {"cfg": "residuals given in the first half of the batch change nothing there"} | CASES))
    assert messages == [f"each of {SLOTS[0]}, {SLOTS[1]} and 11 more {DEAD}"]
    assert rest == ["ort/cfg", *(f"ort/{name}" for name in CASES)]


def test_other_weights_explain_what_acts_otherwise_and_no_slot_that_is_lost():
    weights = {"weights": "2 of 300 are not the model's: conv_in.weight, conv_in.bias"}
    messages, rest = tell(make(weights | VAGUE | CASES))
    assert messages == ["weights: 2 of 300 are not the model's: conv_in.weight, conv_in.bias"]
    assert len(rest) == 4
    messages, _ = tell(make(weights | VAGUE | {f"slot[{SLOTS[2]}]": f"{SLOTS[2]} {DEAD}"}))
    assert messages[1:] == [f"{SLOTS[2]} {DEAD}"]
    assert suggest_command(make(weights)) == "shapecheck export './my model' -o again.onnx --verify"
    assert tell(make(VAGUE))[0] == ["each of sample and timestep acts otherwise than in PyTorch: strength 0.90"]


def test_wrong_images_alone_are_one_fault_and_say_where_they_begin():
    where = Divergence("mid", "mid_block", "", samples.verdict(1), (), "polygraphy run x")
    parity = make(CASES, divergence=where)
    message = f"{SIZE}, control on: largest difference 2.0e+00; it begins in mid_block; 2 outputs are wrong"
    assert tell(parity) == ([message], [])
    assert suggest_command(parity) == "polygraphy run x"
    assert suggest_command(make(CASES)) == "shapecheck parity './my model' --onnx models/sd15/unet.onnx --report report"


def test_values_that_are_no_numbers_do_not_follow_from_a_slot():
    parity = samples.broken()
    assert "96 NaN among 792 values" in list_findings(parity.sides[0])[-1].message
    assert list_consequences(parity.sides[0]) == ()


@pytest.mark.parametrize("failed", [{"rounding": "3.2 times PyTorch's own"}, {"switch": "kept"}, {"contract": "missing"}])
def test_what_stands_alone_is_told_with_its_kind(failed):
    ((kind, reason),) = failed.items()
    assert tell(make(failed)) == ([f"{kind}: {reason}"], [])


def test_nothing_is_suggested_without_a_fault_a_file_or_a_model_that_can_be_typed():
    assert suggest_command(replace(samples.healthy(), requested="m")) == ""
    assert suggest_command(replace(make(EXCHANGED), requested="")) == ""
    assert suggest_command(samples.could_not_run()) == ""
