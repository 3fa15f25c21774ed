"""What a run's images prove: the backend is a few sums in place of a UNet, so that a fault is numbers and takes no time."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from shapecheck import Geometry, Mismatch, presets
from shapecheck.contract.dims import constant
from shapecheck.parity.artefacts import ParityFile, evaluate_file
from shapecheck.parity.cases import ForwardCase, InputGenerator
from shapecheck.parity.evaluate import Evaluator
from shapecheck.parity.metrics import find_room
from shapecheck.parity.plan import FILE_KINDS, PlannedCheck, list_cases, plan_checks
from shapecheck.parity.reference import ReferenceOutputs
from shapecheck.parity.results import Check, Ran

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = Geometry(2, 9, 14, 7)
SQUARE = replace(SIZE, width=9)
WHOLE = presets.contract("sd15")
CONTRACT = replace(
    WHOLE,
    inputs=tuple(
        replace(each, shape=(*each.shape[:2], constant(4))) if each.name == "encoder_hidden_states" else each
        for each in WHOLE.inputs
    ),
    slots=tuple(
        replace(slot, skip=(slot.skip[0], constant(4), *slot.skip[2:])) for slot in (*WHOLE.slots[:5], WHOLE.slots[-1])
    ),
)
"""SD1.5's, four channels wide, with the slots of two levels and the mid slot."""
NAMES = [slot.name for slot in CONTRACT.slots]
GENERATE = InputGenerator(CONTRACT, 0)
PLANS = [plan for plan in plan_checks(CONTRACT, "ort", [SIZE]) if plan.check.kind not in FILE_KINDS]
SWITCH = next(plan for plan in PLANS if plan.check.kind == "switch")
ON, OFF = f"case[{SIZE}, control on]", f"case[{SIZE}, control off]"


class Sums:
    """Stands in for a UNet: every slot and every input changes the image in a way of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(NAMES), 4, 4, generator=generator, dtype=torch.float64)
        self._mixes = torch.eye(4, dtype=torch.float64) + 0.5 * noise  # alike, so that no slot's effect is at right angles

    def __call__(self, given, dtype=torch.float32):
        given = {name: value.to(dtype) for name, value in given.items()}
        image = given["sample"].tanh()
        image = image + 0.3 * (given["timestep"] / 150).sin().reshape(-1, 1, 1, 1) * given["sample"].roll(1, -1)
        image = image + given["encoder_hidden_states"].mean(1)[..., None, None]
        for name, mix in zip(NAMES, self._mixes.to(dtype), strict=True):
            grown = torch.nn.functional.interpolate(given[name], size=image.shape[-2:])
            image = image + 0.3 * torch.einsum("oc,bchw->bohw", mix, grown).tanh()
        return image.double()


SUMS = Sums()


@functools.cache
def known_sides() -> ReferenceOutputs:
    """Return PyTorch's side of every call, in float64 and in float32."""
    calls = [*list_cases(PLANS), ForwardCase(SQUARE, 0)]
    reference = {call: SUMS(GENERATE(call), torch.float64) for call in calls}
    images = {call: SUMS(GENERATE(call)) for call in calls}
    shares = {call: float((images[call] - reference[call]).abs().max() / reference[call].abs().max()) for call in calls}
    return ReferenceOutputs("float64", reference, images, shares, 6e-8)


def judge(
    fault=lambda given: given, *, spoil=lambda call, image: image, switched=None, sides=None, has=(), in_fp8=False, room=1.0
):
    """Return every result by its check, for a backend with a fault in what it makes of its inputs, or in its images."""
    sides = sides or known_sides()
    found = {call: spoil(call, SUMS(fault(GENERATE(call)))) for call in sides.reference}
    steps = [found[call] for call in SWITCH.cases] if switched is None else switched
    judging = Evaluator(CONTRACT, GENERATE, sides, 4.0, SUMS, found, steps, in_fp8=in_fp8, room=room)
    names = set(has) or {each.name for each in (*CONTRACT.inputs, *CONTRACT.slots)}
    results = [judging.evaluate(plan, names) for plan in PLANS]
    return {str(result.check).removeprefix("ort/"): result for result in results}


def failed(results) -> dict[str, str]:
    return {name: result.reason for name, result in results.items() if result.status == "failed"}


def kinds(results) -> Counter:
    return Counter(result.check.kind for result in results.values() if result.status == "failed")


def of_slots(results, status: str) -> set[str]:
    return {each.check.where for each in results.values() if (each.check.kind, each.status) == ("slot", status)}


def exchanged(one: str, other: str):
    return lambda given: given | {one: given[other], other: given[one]}


def scaled(factor: float, *names: str):
    return lambda given: given | {name: factor * given[name] for name in names}


def turned(given):
    """Height and width of every residual exchanged, and its shape kept."""
    return given | {name: torch.einsum("bchw->bcwh", given[name]).contiguous().view(given[name].shape) for name in NAMES}


def halves_exchanged(*names: str):
    return lambda given: given | {name: torch.cat([given[name][1:], given[name][:1]]) for name in names}


def test_a_healthy_backend_passes_in_all():
    results = judge()
    assert {result.status for result in results.values()} == {"passed"}, failed(results)
    assert {result.check.kind for result in results.values()} == {"input", "slot", "cfg", "switch", "case"}
    acting = [result.effect for result in results.values() if result.effect]
    assert len(acting) == 3 + 6
    assert all(abs(effect.strength - 1) < 1e-4 and effect.cosine > 0.9999 for effect in acting)
    verdicts = [result.verdict for result in results.values()]
    assert all(verdict.own > 0 and verdict.absolute.difference <= verdict.allowed for verdict in verdicts)


def test_two_slots_of_one_shape_exchanged():
    results = judge(exchanged(NAMES[1], NAMES[2]))
    wrong = failed(results)
    assert f"{NAMES[1]} acts where {NAMES[2]} belongs ({CONTRACT.slots[2].producer})" in wrong[f"slot[{NAMES[1]}]"]
    assert f"{NAMES[2]} acts where {NAMES[1]} belongs ({CONTRACT.slots[1].producer})" in wrong[f"slot[{NAMES[2]}]"]
    assert kinds(results) == {"slot": 2, "case": 5}


@pytest.mark.parametrize("name", [NAMES[4], "mid_block_residual"])
def test_a_slot_without_effect(name):
    results = judge(scaled(0, name))
    assert failed(results)[f"slot[{name}]"] == f"{name} changes nothing: what the ControlNet gives there is lost"
    assert kinds(results) == {"slot": 1, "case": 5}
    assert results[f"slot[{name}]"].effect.strength == 0


def test_a_slot_of_part_of_its_strength():
    results = judge(scaled(0.9, NAMES[4]))
    assert failed(results)[f"slot[{NAMES[4]}]"] == f"{NAMES[4]} acts as if 0.900 of it were given"
    assert kinds(results) == {"slot": 1, "case": 5}


def test_the_strength_of_an_effect_may_be_as_far_from_1_as_pytorch_s_own_rounding_makes_it():
    name = NAMES[4]
    faint, coarse = scaled(0.9, name), replace(known_sides(), shares=dict.fromkeys(known_sides().shares, 0.006))
    assert judge(faint, sides=coarse)[f"slot[{name}]"].status == "failed"
    alone = next(call for call in coarse.rounded if call.perturbed == name)
    rounded = coarse.rounded[ForwardCase(SIZE)] + 0.98 * (coarse.rounded[alone] - coarse.rounded[ForwardCase(SIZE)])
    rough = replace(coarse, rounded={**coarse.rounded, alone: rounded})
    assert judge(faint, sides=rough)[f"slot[{name}]"].status == "passed"
    assert judge(scaled(0.99, name), sides=replace(coarse, rounded={}))[f"slot[{name}]"].status == "passed"
    assert judge(faint, sides=replace(coarse, rounded={}))[f"slot[{name}]"].status == "failed"


def test_a_slot_that_acts_as_no_share_of_it_would():
    results = judge(lambda given: given | {NAMES[4]: given[NAMES[4]] + 0.2 * given[NAMES[4]].roll(1, -1)})
    told = failed(results)[f"slot[{NAMES[4]}]"]
    assert told.startswith(f"{NAMES[4]} acts otherwise than in PyTorch: strength 0.9")
    reversed_sign = judge(scaled(-1, NAMES[4]))[f"slot[{NAMES[4]}]"].reason
    assert reversed_sign.startswith(f"{NAMES[4]} acts with its sign reversed")


def test_no_residual_has_any_effect():
    results = judge(scaled(0, *NAMES))
    assert of_slots(results, "failed") == set(NAMES)
    assert failed(results)[ON].startswith("the residuals have no effect; largest difference ")
    assert failed(results)["cfg"] == "residuals given in the first half of the batch change nothing there"
    assert results[OFF].status == "passed"


def test_height_and_width_exchanged_in_a_buffer():
    results = judge(turned)
    assert of_slots(results, "failed") == set(NAMES)
    acting = [name for name in NAMES if abs(results[f"slot[{name}]"].effect.strength) > 0.02]  # the others' are at right angles
    assert len(acting) > 3
    for name in acting:
        assert f"{name} acts with height and width exchanged (cosine 1.000)" in failed(results)[f"slot[{name}]"]
    assert failed(results)[ON].startswith("height and width of the residuals are exchanged; largest difference ")
    assert kinds(results)["input"] == 0


@pytest.mark.parametrize("fault", [turned, lambda given: given], ids=["exchanged", "healthy"])
def test_height_and_width_exchanged_so_that_only_squares_run(fault):
    def spoil(call, image):
        return image if call.geometry == SQUARE or call.frame is None else "cannot run this call"

    results = judge(fault, spoil=spoil)
    told = "height and width of the residuals are exchanged, as a square size shows; " if fault is turned else ""
    assert failed(results)[ON] == f"{told}cannot run this call"
    assert results["switch"].status == results["cfg"].status == "not run"
    assert results["switch"].reason == results["cfg"].reason == "not judged: calls of this size cannot be run"
    assert results[OFF].status == "passed"
    results = judge(fault, spoil=lambda call, image: "cannot run this call")
    assert {result.status for result in results.values() if result.check.kind != "case"} == {"not run"}
    assert results["input[sample]"].reason == "not judged: calls of this size cannot be run"


def test_the_halves_of_the_batch_exchanged():
    results = judge(halves_exchanged(*NAMES))
    told = failed(results)["cfg"]
    assert told == "residuals given in the first half of the batch act in the second: the halves are exchanged"
    assert failed(results)[ON].startswith("the halves of the residuals are exchanged; ")
    assert kinds(results)["slot"] == kinds(results)["input"] == 0
    assert failed(judge(halves_exchanged("sample")))[OFF].startswith("the halves of sample are exchanged; ")


def test_residuals_that_act_in_both_halves():
    results = judge(lambda given: given | {name: given[name] + given[name].roll(1, 0) for name in NAMES})
    assert failed(results)["cfg"].startswith("residuals given in the first half of the batch change the second: largest ")


def test_an_input_that_is_baked():
    results = judge(lambda given: given | {"timestep": torch.full((2,), 500.0)})
    assert failed(results)["input[timestep]"] == "timestep changes nothing: it is baked into the file"
    assert kinds(results)["input"] == 1
    assert kinds(results)["slot"] == 0
    results = judge(scaled(0, "encoder_hidden_states"))
    told = "encoder_hidden_states changes nothing: it is baked into the file as zeros"
    assert failed(results)["input[encoder_hidden_states]"] == told
    assert failed(results)[OFF].startswith("encoder_hidden_states is taken as zeros; ")


def test_an_input_that_the_file_does_not_have():
    given = {"sample", "encoder_hidden_states", *NAMES[1:]}
    wrong = failed(judge(has=given))
    assert wrong == {
        "input[timestep]": "the file has no input for timestep: it is baked into it, or left out",
        f"slot[{NAMES[0]}]": f"the file has no input for {NAMES[0]}: it is baked into it, or left out",
    }


@pytest.mark.parametrize(("number", "told"), [(math.nan, "{} NaN and 0 Inf"), (-math.inf, "0 NaN and {} Inf")])
def test_a_channel_of_no_numbers(number, told):
    def spoil(call, image):
        return image.index_fill(1, torch.tensor([2]), number)

    results = judge(spoil=spoil)
    cells = SIZE.batch * SIZE.height * SIZE.width
    for where in (OFF, ON):
        assert failed(results)[where] == f"{told.format(cells)} among {4 * cells} values, in channel 2"
    assert set(kinds(results)) == {"case"}
    assert results["switch"].reason == results["cfg"].reason == "not judged: the image is not finite"
    told = "not judged: the image is not finite before timestep is perturbed"
    assert (results["input[timestep]"].status, results["input[timestep]"].reason) == ("not run", told)


def test_what_is_no_number_only_when_perturbed_and_an_image_of_another_shape():
    def spoil(call, image):
        if call.perturbed == NAMES[0]:
            return image.index_fill(1, torch.tensor([0, 3]), math.nan)
        return image[..., 1:] if call.perturbed == NAMES[1] else "cannot run" if call.perturbed == NAMES[2] else image

    wrong = failed(judge(spoil=spoil))
    assert wrong == {
        f"slot[{NAMES[0]}]": "504 NaN and 0 Inf among 1008 values, in 2 of 4 channels",
        f"slot[{NAMES[1]}]": "its shape is 2×4×9×13, PyTorch's 2×4×9×14",
        f"slot[{NAMES[2]}]": "cannot run",
    }


def test_an_image_that_is_wrong_anyway_is_no_fault_of_any_slot_and_one_that_is_exchanged_is_still_told():
    def heavier(call, image):
        return image * 1.001

    results = judge(spoil=heavier)
    assert of_slots(results, "not run") == set(NAMES)
    told = "not judged: the image is wrong even without it; its effect has strength 1.001, cosine 1.0000"
    assert {results[f"slot[{name}]"].reason for name in NAMES} == {told}
    assert failed(results)[OFF].startswith("largest difference ")
    results = judge(exchanged(NAMES[1], NAMES[2]), spoil=heavier)
    assert of_slots(results, "failed") == {NAMES[1], NAMES[2]}
    assert f"{NAMES[1]} acts where {NAMES[2]} belongs" in failed(results)[f"slot[{NAMES[1]}]"]


def kept(*, always: bool):
    """The images of a session that keeps residuals: those of the call before, or of the last call that had any."""
    images, held = [], None
    for call in SWITCH.cases:
        own = {name: GENERATE(call)[name] for name in NAMES}
        on = call.frame is not None
        given = own if held is None or (on and not always) else held
        held = own if on or always else held
        images.append(SUMS(GENERATE(call) | given))
    return images


@pytest.mark.parametrize("always", [False, True])
def test_residuals_of_an_earlier_call_kept(always):
    told = "step 2, control off: the image is that of step 1, control on with frame 0: residuals of an earlier call are kept"
    assert failed(judge(switched=kept(always=always))) == {"switch": told}


def test_a_call_in_between_that_is_kept():
    *images, last = [SUMS(GENERATE(call)) for call in SWITCH.cases]
    told = "the image is not that of step 1, which was given the same: a call in between is kept"
    assert failed(judge(switched=[*images, last + 0.01])) == {"switch": f"step 6, control on with frame 0: {told}"}


def rounded_by(share: float) -> ReferenceOutputs:
    """PyTorch whose rounding is half the image in the worst value, and a share of each effect in all values together.

    It is at right angles to the effect, whose strength it happens to leave as it is.
    """
    sides = known_sides()
    generator, rounded = torch.Generator().manual_seed(3), dict(sides.reference)
    for call in [call for call in rounded if call.perturbed]:
        effect = sides.effect(call)
        noise = torch.randn(effect.shape, generator=generator, dtype=torch.float64)
        noise -= (noise * effect).sum() / (effect * effect).sum() * effect
        rounded[call] = rounded[call] + share * effect.norm() * noise / noise.norm()
    return replace(sides, rounded=rounded, shares=dict.fromkeys(sides.shares, 0.5))


def test_an_effect_that_drowns_in_the_worst_value_s_rounding_shows_in_all_values_together():
    results = judge(scaled(0, NAMES[0]), sides=rounded_by(0.2))
    assert failed(results) == {f"slot[{NAMES[0]}]": f"{NAMES[0]} changes nothing: what the ControlNet gives there is lost"}
    assert of_slots(results, "passed") == set(NAMES[1:])
    half = judge(scaled(0.5, NAMES[0]), sides=rounded_by(0.2))
    assert of_slots(half, "failed") == {NAMES[0]}
    assert {each.status for each in judge(sides=rounded_by(0.2)).values() if each.effect} == {"passed"}


@pytest.mark.parametrize("share", [2.0, math.nan])
def test_what_is_too_small_beside_the_tolerance_is_not_judged(share):
    results = judge(scaled(0, NAMES[0]), sides=rounded_by(share))
    assert {result.status for result in results.values()} == {"passed", "not run"}
    small = "not judged: the effect of the residuals in PyTorch is too small beside the tolerance"
    assert results["cfg"].reason == results["switch"].reason == small
    reason = results[f"slot[{NAMES[0]}]"].reason
    assert reason.startswith(f"not judged: the effect of {NAMES[0]} in PyTorch (")
    assert reason.endswith("of the image) is too small beside the tolerance")


def without_effect(name: str, factor: float) -> ReferenceOutputs:
    """PyTorch in which a slot has a part of its effect, in the precision of the file alone."""
    calls = known_sides().reference
    reference = {call: SUMS(scaled(factor, name)(GENERATE(call)), torch.float64) for call in calls}
    return ReferenceOutputs("float32", reference, {}, {}, 1e-6)


@pytest.mark.parametrize(("factor", "status"), [(1, "passed"), (1e-4, "passed"), (1e-6, "not run"), (0, "not run")])
def test_where_pytorchs_rounding_is_not_known_an_effect_is_judged_by_its_size(factor, status):
    results = judge(scaled(factor, NAMES[0]), sides=without_effect(NAMES[0], factor))
    assert {name: each.status for name, each in results.items() if each.status != "passed"} == (
        {f"slot[{NAMES[0]}]": "not run"} if status == "not run" else {}
    )
    assert failed(judge(scaled(0.9, NAMES[1]), sides=without_effect(NAMES[0], factor))).keys() >= {f"slot[{NAMES[1]}]"}


def test_a_slot_that_acts_where_pytorch_ignores_it_is_named():
    results = judge(sides=without_effect(NAMES[0], 0))
    assert of_slots(results, "failed") == {NAMES[0]}
    told = f"{NAMES[0]} changes the image, which it does not in PyTorch"
    assert results[f"slot[{NAMES[0]}]"].reason.startswith(told)


def test_without_two_halves_there_is_no_guidance_to_judge():
    alone = plan_checks(CONTRACT, "ort", [replace(SIZE, batch=1)])
    assert {plan.check.kind for plan in PLANS} - {plan.check.kind for plan in alone} == {"cfg"}


def test_what_is_allowed_in_a_call_is_not_set_by_a_louder_one():
    """A perturbation in half precision is loud, and so is its rounding: the images without it are held to their own."""
    quiet, louder, loud = ForwardCase(SIZE), ForwardCase(SIZE, 0), ForwardCase(SIZE, 0, perturbed="sample")
    reference = {call: torch.full((2,), 2.0, dtype=torch.float64) for call in (quiet, louder, loud)}
    sides = ReferenceOutputs("float64", reference, reference, {quiet: 0.01, louder: 0.02, loud: 0.5}, 0.001)
    assert [sides.torch_error(call) for call in (quiet, louder, loud)] == [0.04, 0.04, 1.0]
    assert replace(sides, shares={}).torch_error(loud) == 0.002
    assert math.isnan(replace(sides, shares=sides.shares | {loud: math.nan}).torch_error(loud))


# What is told by reading a file, and by what really ran it

RAN = Ran("ort", "CPUExecutionProvider", "cpu", "float32", "")
HEALTHY = {"find_mismatches": tuple, "find_narrower": tuple}


def read(kind: str, weights: str | None = "", ran: Ran = RAN, **file) -> tuple[str, str]:
    """Return status and reason of a check of a file."""
    result = evaluate_file(Check(ran.backend, kind, ""), SimpleNamespace(**HEALTHY | file), ran, weights)
    return result.status, result.reason


CALLS = tuple(dict.fromkeys(call for plan in PLANS if plan.check.kind == "case" for call in plan.cases))


@pytest.mark.parametrize(("times", "room", "fails"), [(8, 1.0, True), (8, 3.0, False), (13, 3.0, True)])
def test_a_backend_with_room_may_be_further_off(times, room, fails):
    """As TensorRT, which sums in float16, may be."""
    sides = known_sides()

    def spoil(call, _image):
        expected = sides.reference[call]
        errors = torch.tensor([sides.row_error(call, row) for row in range(len(expected))], dtype=torch.float64)
        return expected + times * errors.clamp_max(sides.torch_error(call)).reshape(-1, 1, 1, 1) * torch.sign(expected)

    assert ("case" in kinds(judge(spoil=spoil, room=room))) == fails


def test_room_hides_no_weaker_slot():
    name = NAMES[1]
    assert of_slots(judge(scaled(0.9, name), room=3.0), "failed") == {name}


@pytest.mark.parametrize(
    ("backend", "dtype", "room"),
    [
        ("trt", "float16", 3.0),
        ("ort-trt", "float16", 3.0),
        ("trt", "bfloat16", 1.0),
        ("trt", "float32", 1.0),
        ("ort-cuda", "float16", 1.0),
    ],
)
def test_only_tensorrt_in_float16_has_room(backend, dtype, room):
    assert find_room(backend, dtype) == room


def judge_rounding(spoil):
    """Return whether the worst values pass, and the result for all values together; `spoil` is given PyTorch's own error."""
    sides = known_sides()
    found = {call: sides.reference[call] + spoil(sides.rounded[call] - sides.reference[call]) for call in CALLS}
    judging = Evaluator(CONTRACT, GENERATE, sides, 4.0, None, found)
    cases = [judging.evaluate(plan, ()) for plan in PLANS if plan.check.kind == "case"]
    result = judging.evaluate(PlannedCheck(Check("ort", "rounding", ""), CALLS), ())
    return {case.status for case in cases}, result


@pytest.mark.parametrize("times", [0.4, 1.0, 1.5, 1.7])
def test_rounding_of_a_healthy_backend(times):
    cases, result = judge_rounding(lambda own: times * own.flip(-1))
    assert (cases, result.status, result.reason) == ({"passed"}, "passed", "")
    assert result.rounding.times_own == pytest.approx(times, rel=1e-6)


def test_twice_as_inexact_shows_in_all_values_together():
    cases, result = judge_rounding(lambda own: 2 * own.flip(-1))
    assert (cases, result.status) == ({"passed"}, "failed")
    assert result.reason.startswith("the errors of all images together are 2.0 times PyTorch's own in float32 ")
    cases, result = judge_rounding(lambda own: own + 3 * own.square().mean().sqrt())  # the same everywhere: a shade
    assert (cases, result.status) == ({"passed"}, "failed")


def test_rounding_is_not_judged_of_what_is_wrong():
    cases, result = judge_rounding(lambda own: 9 * own)
    assert (cases, result.status) == ({"failed"}, "not run")
    assert result.rounding.times_own == pytest.approx(9)
    assert judge_rounding(lambda own: own / 0)[1].status == "not run"


def test_rounding_is_judged_in_a_half_precision_alone():
    half = presets.contract("sd15")
    half = replace(half, inputs=tuple(replace(each, dtype=each.dtype.replace("float32", "float16")) for each in half.inputs))
    *_, last = plan_checks(half, "ort", [SIZE])
    assert (last.check.kind, half.dtype) == ("rounding", "float16")
    assert last.cases == tuple(call for call in CALLS if call.varied is None)
    assert "rounding" not in {plan.check.kind for plan in plan_checks(CONTRACT, "ort", [SIZE])}


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_healthy_file_passes_before_it_is_run(kind):
    assert read(kind) == ("passed", "")


def test_another_provider_than_was_asked_for():
    told = "CPUExecutionProvider runs, where ort-cuda is CUDAExecutionProvider"
    assert read("provider", ran=replace(RAN, backend="ort-cuda")) == ("failed", told)
    assert read("provider", ran=replace(RAN, backend="ort-cuda", provider="CUDAExecutionProvider")) == ("passed", "")
    assert read("provider", ran=replace(RAN, backend="torch", provider="eager")) == ("passed", "")


def test_a_file_of_another_contract_other_weights_or_a_lower_precision():
    wrong = (Mismatch("missing", NAMES[0], "nothing", "a residual"), Mismatch("name", "sample", "x", "sample"))
    assert read("contract", find_mismatches=lambda: wrong) == ("failed", "; ".join(map(str, wrong)))
    assert read("weights", "2 of 9 tensors are not the model's: a, b") == ("failed", "2 of 9 tensors are not the model's: a, b")
    casts = tuple(f"cast to float16 at {number}" for number in range(5))
    told = "5 in less than float32: cast to float16 at 0, cast to float16 at 1, cast to float16 at 2 and 2 more"
    assert read("precision", find_narrower=lambda: casts) == ("failed", told)


def test_what_a_file_does_not_tell_is_not_run():
    told = "no tensor of the file has a name that tells which of the model's it is"
    assert read("weights", None) == ("not run", told)


def test_what_an_engine_cannot_show_is_not_asked():
    contract = {name: name for name in CONTRACT.input_rules}
    assert ParityFile(CONTRACT, contract, {}).unshown == ()
    engine = ParityFile(CONTRACT, contract, {}, find_narrower=None, compare_weights=None)
    assert engine.unshown == ("weights", "precision")


@pytest.mark.parametrize(("share", "decibels"), [(0.01, 40), (0.05, 26)])
def test_what_fp8_costs_is_held_to_a_psnr_whatever_its_own_error_is(share, decibels):
    sides = replace(known_sides(), shares=dict.fromkeys(known_sides().reference, 0.2))

    def spoil(call, image):
        return image + share * sides.reference[call].abs().max()  # 20 log10 of the share, below the largest value

    found = judge(spoil=spoil, sides=sides, in_fp8=True)
    cases = {name: result for name, result in found.items() if name.startswith("case") and "varied" not in name}
    assert all(result.verdict.psnr == pytest.approx(decibels, abs=0.1) for result in cases.values())
    assert {result.status for result in cases.values()} == {"passed" if decibels > 30 else "failed"}
    if decibels < 30:
        assert cases[ON].reason == "fp8 costs too much: the image has 26.0 dB PSNR, 30 are needed"
    assert judge(spoil=spoil, sides=sides)[ON].status == "passed"
