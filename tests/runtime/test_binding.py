"""What an engine takes and how it is bound: pure functions over records, no TensorRT and no GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shapecheck import ContractError, Geometry, ShapecheckError, presets
from shapecheck.runtime.binding import Binding, CallError
from shapecheck.tensorrt.profiles import Bounds, Profile, Range, profile_of
from shapecheck.tensorrt.record import BuildOptions, BuildRequest
from shapecheck.tensorrt.size_ranges import parse_ranges

DEVICE = "cuda:1"
SMALL = Range(Geometry(1, 8, 16), Geometry(2, 16, 24), Geometry(3, 24, 40))
LARGE = Range(Geometry(1, 32, 48), Geometry(2, 40, 56), Geometry(2, 64, 96))
LONG = Range(Geometry(1, 8, 16, 77), Geometry(2, 16, 24, 77), Geometry(2, 24, 40, 154))


def request_for(name, *ranges, names=None, outputs=("out_sample",)):
    contract = presets.contract(name) if isinstance(name, str) else name
    called = names or {each: each for each in contract.input_rules}
    return BuildRequest(
        contract, tuple(profile_of(contract, each) for each in ranges), tuple(called.items()), outputs,
        "sha256:0", "sha256:1", "", BuildOptions(), "10.16.1.11", "a GPU",
    )  # fmt: skip


def bind(request):
    return Binding(request.contract, request.names, request.outputs, DEVICE, request.profiles)


def call(contract, geometry, device=DEVICE):
    dtypes = contract.input_dtypes
    return {name: (shape, dtypes[name], device) for name, shape in contract.input_shapes(geometry).items()}


def reshaped(given, name, shape):
    return given | {name: (shape, *given[name][1:])}


def refused(binding, given):
    with pytest.raises(CallError) as caught:
        binding.serve(given)
    return caught.value


SD15 = presets.contract("sd15")
REQUEST = request_for("sd15", SMALL, LARGE)
BINDING = bind(REQUEST)
FINE = call(SD15, Geometry(2, 17, 25))


# what is served


@pytest.mark.parametrize(("name", "channels"), [("sd15", 4), ("sdxl", 4), ("kandinsky-2.2", 8)])
def test_a_call_is_served_by_the_profile_that_takes_it(name, channels):
    contract = presets.contract(name)
    binding = bind(request_for(name, SMALL, LARGE))
    for geometry, profile in ((Geometry(3, 8, 40), 0), (Geometry(2, 64, 48), 1)):
        serving = binding.serve(call(contract, geometry))
        assert (serving.geometry.height, serving.geometry.width, serving.profile) == (geometry.height, geometry.width, profile)
        assert serving.inputs == contract.input_shapes(geometry)
        assert list(serving.expected) == list(contract.input_rules)
        assert serving.outputs == {"out_sample": (geometry.batch, channels, geometry.height, geometry.width)}


def test_of_two_profiles_the_one_tuned_for_the_nearest_size_serves():
    near = Range(Geometry(1, 8, 16), Geometry(1, 17, 25), Geometry(4, 64, 96))
    serving = bind(request_for("sd15", SMALL, near)).serve(call(SD15, Geometry(1, 17, 25)))
    assert serving.profile == 1


def test_the_order_of_the_names_does_not_matter():
    assert BINDING.serve(dict(reversed(FINE.items()))) == BINDING.serve(FINE)


def test_shapes_go_to_the_engine_under_its_own_names():
    names = {each: f"their_{each}" for each in SD15.input_rules}
    serving = bind(request_for("sd15", SMALL, names=names)).serve(FINE)
    assert serving.inputs["their_down_block_residual_05"] == SD15.input_shapes(Geometry(2, 17, 25))["down_block_residual_05"]
    assert set(serving.inputs) == set(names.values())


def test_outputs_of_a_controlnet_are_its_slots():
    contract = replace(SD15, role="controlnet")
    names = [slot.name for slot in contract.slots]
    given = call(contract, Geometry(2, 17, 25))
    assert set(given) == {"sample", "timestep", "encoder_hidden_states"}
    serving = bind(request_for(contract, SMALL, outputs=tuple(reversed(names)))).serve(given)
    assert serving.outputs == contract.shapes(Geometry(2, 17, 25))
    foreign = bind(request_for(contract, SMALL, outputs=("a", "b"))).serve(given)
    assert foreign.outputs == {}


def test_outputs_that_the_contract_does_not_tell_are_left_to_the_engine():
    assert bind(request_for("sd15", SMALL, outputs=("out_sample", "more"))).serve(FINE).outputs == {}


def test_an_engine_without_control_takes_no_slots():
    contract = replace(SD15, slots=())
    binding = bind(request_for(contract, SMALL))
    assert binding.serve(call(contract, Geometry(2, 17, 25))).profile == 0
    error = refused(binding, FINE)
    assert [each.kind for each in error.mismatches] == ["surplus"] * 13
    assert "down_block_residual_00: surplus: got 2×320×17×25, expected no such input" in str(error)
    assert "the inputs are sample, timestep, encoder_hidden_states" in str(error)


sizes = st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 16), st.sampled_from([1, 77, 78, 154, 155]))
BINDINGS = {name: bind(request_for(name, SMALL, LONG)) for name in ("sd15", "sdxl", "kandinsky-2.2")}


@pytest.mark.parametrize("name", BINDINGS)
@given(sizes=sizes, odd=st.tuples(st.integers(0, 7), st.integers(0, 7)))
@settings(max_examples=60, deadline=None)
def test_any_size_within_a_range_is_served_and_any_other_is_refused_and_named(name, sizes, odd):
    contract = presets.contract(name)
    batch, height, width, tokens = sizes
    height, width = 8 * height - odd[0], 8 * width - odd[1]
    if contract.divisor > 1:
        height, width = 8 * sizes[1], 8 * sizes[2]
    geometry = Geometry(batch, height, width, tokens)
    text = any(dim.symbol == "tokens" for rule in contract.input_rules.values() for dim in rule)
    within = [
        number
        for number, (most, lengths) in enumerate(((3, range(77, 78)), (2, range(77, 155))))
        if batch <= most and 8 <= height <= 24 and 16 <= width <= 40 and (not text or tokens in lengths)
    ]
    given = call(contract, geometry)
    if within:
        assert BINDINGS[name].serve(given).profile in within
        return
    error = refused(BINDINGS[name], given)
    assert not error.mismatches
    assert error.refusals
    assert {each.split(":")[0] for each in error.refusals} <= set(given)
    wrong = next(iter(error.refusals)).split(":")[0]
    assert f"{wrong}: got {'×'.join(map(str, given[wrong][0]))}, profile " in str(error)
    assert "the nearest size that is served: batch " in str(error)


# what is refused


def test_a_size_that_no_profile_takes_is_told_slot_by_slot_with_what_to_do():
    error = refused(bind(request_for("sd15", SMALL)), call(SD15, Geometry(2, 17, 45)))
    lines = str(error).splitlines()
    assert lines[0] == "this call cannot be served: 14 reasons"
    assert lines[1] == "  sample: got 2×4×17×45, profile 0 allows up to 3×4×24×40"
    assert "  down_block_residual_07: got 2×1280×5×12, profile 0 allows up to 3×1280×6×10" in lines
    assert lines[-3:] == [
        "profile 0, in latent cells: width 45, expected 16 to 40",
        "the nearest size that is served: batch 2, latent 17×40 (320×136 pixels)",
        "or build for this one too: --sizes 128x64:192x128:360x192 --batch 1:2:3",
    ]
    assert error.exit_status == 1
    assert isinstance(error, ContractError)


@pytest.mark.parametrize("geometry", [Geometry(2, 17, 45), Geometry(5, 6, 25, 80), Geometry(1, 99, 99)])
def test_the_options_in_the_advice_give_a_range_that_takes_the_size(geometry):
    advice = str(refused(bind(request_for("sd15", SMALL)), call(SD15, geometry))).splitlines()[-1]
    words = advice.removeprefix("or build for this one too: ").split(" ")
    options = dict(zip(words[::2], words[1::2], strict=True))
    (wider,) = parse_ranges([options["--sizes"]], [options["--batch"]], options.get("--tokens", "77"))
    serving = bind(request_for("sd15", wider)).serve(call(SD15, geometry))
    assert serving.geometry == geometry
    assert wider.opt == SMALL.opt


def test_every_profile_says_what_it_takes():
    text = str(refused(BINDING, call(SD15, Geometry(4, 28, 25))))
    assert "profile 0, in latent cells: batch 4, expected 1 to 3; height 28, expected 8 to 24" in text
    assert "profile 1, in latent cells: batch 4, expected 1 to 2; height 28, expected 32 to 64; width 25" in text


def test_tokens_beyond_the_profile_are_told():
    text = str(refused(BINDING, call(SD15, Geometry(2, 17, 25, 154))))
    assert "encoder_hidden_states: got 2×154×768, profile 0 allows up to 3×77×768" in text
    assert "the nearest size that is served: batch 2, latent 17×25, 77 tokens (200×136 pixels)" in text
    assert text.endswith("--batch 1:2:3 --tokens 77:77:154")


def test_a_missing_slot_says_that_control_off_means_zeros():
    given = {name: each for name, each in FINE.items() if name != "down_block_residual_04"}
    text = str(refused(BINDING, given))
    assert text.splitlines()[0] == "this call cannot be served: 1 reason"
    missing = "missing: got nothing, expected 2×640×9×13 at batch 2, latent 17×25"
    assert f"  down_block_residual_04 (UNet down_blocks.1.attentions.0): {missing}\n" in text
    assert "without a ControlNet pass zeros for every slot: a slot that is left out is never assumed to be zero" in text


def test_a_missing_base_input_is_no_matter_of_controlnets():
    text = str(refused(BINDING, {name: each for name, each in FINE.items() if name != "timestep"}))
    assert "timestep: missing: got nothing, expected 2 at batch 2, latent 17×25" in text
    assert "zeros" not in text


def test_nothing_at_all_is_every_input_missing():
    error = refused(BINDING, {})
    assert [each.where for each in error.mismatches] == list(SD15.input_rules)
    assert "down_block_residual_03: missing: got nothing, expected batch×320×ceil(h/2)×ceil(w/2)" in str(error)


def test_without_a_sample_the_first_slot_tells_the_size():
    text = str(refused(BINDING, {name: each for name, each in FINE.items() if name != "sample"}))
    assert "1 reason\n  sample: missing: got nothing, expected 2×4×17×25 at batch 2, latent 17×25" in text


@pytest.mark.parametrize("shape", [(4, 17, 25), (17, 25), (2, 1, 4, 17, 25)])
def test_a_sample_with_other_axes_tells_no_size(shape):
    (found,) = refused(BINDING, reshaped(FINE, "sample", shape)).mismatches
    assert (found.where, found.kind, found.expected) == ("sample", "rank", (2, 4, 17, 25))


def test_everything_wrong_is_told_at_once_in_the_order_of_the_contract():
    given = reshaped(FINE, "timestep", ())
    given = reshaped(given, "down_block_residual_07", (2, 640, 5, 7))
    given = reshaped(given, "down_block_residual_08", (2, 1280, 7, 5))
    given["encoder_hidden_states"] = ((2, 77, 768), "float16", "cpu")
    given["mid_block"] = given.pop("mid_block_residual")
    error = refused(BINDING, given)
    assert [(each.where, each.kind) for each in error.mismatches] == [
        ("timestep", "rank"),
        ("encoder_hidden_states", "dtype"),
        ("encoder_hidden_states", "device"),
        ("down_block_residual_07", "channels"),
        ("down_block_residual_08", "size"),
        ("mid_block_residual", "missing"),
        ("mid_block", "surplus"),
    ]
    assert error.mismatches[4].cause == "height and width are exchanged"
    text = str(error)
    assert "timestep: rank: got scalar, expected 2 at batch 2, latent 17×25; its axes are (batch)" in text
    assert "encoder_hidden_states: dtype: got float16, expected float32" in text
    assert "encoder_hidden_states: device: got a tensor on cpu, expected one on cuda:1" in text
    assert "mid_block: surplus: got 2×1280×3×4, expected no such input; the name here is mid_block_residual" in text
    assert "pass every tensor in the dtype of the graph, with tensor.to(dtype)" in text
    assert "pass every tensor on the device of the session, with tensor.to(device)" in text


CAUSES = {
    "down_block_residual_01": ((1, 320, 17, 25), "batch", "PyTorch broadcasts a batch of 1 in silence"),
    "down_block_residual_03": ((2, 320, 8, 12), "rounding", "off by one: the sizes were halved with another rounding"),
    "down_block_residual_05": ((2, 640, 1, 1), "broadcast", "1×1 is broadcast in silence"),
    "down_block_residual_06": ((2, 320, 9, 13), "channels", "this is the shape of down_block_residual_03"),
    "mid_block_residual": ((1280, 3, 4), "rank", "3 axes where (batch, channels, height, width) are needed"),
    "sample": ((2, 9, 17, 25), "channels", "its axes are (batch, 4, h, w)"),
    "encoder_hidden_states": ((1, 77, 768), "batch", "its axes are (batch, tokens, 768)"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_wrong_shape_is_told_with_its_likely_cause(name):
    shape, kind, cause = CAUSES[name]
    (found,) = refused(BINDING, reshaped(FINE, name, shape)).mismatches
    assert (found.where, found.kind, found.observed) == (name, kind, shape)
    assert found.cause.startswith(cause)


def test_a_wrong_shape_and_a_size_beyond_the_profile_are_told_together():
    given = reshaped(call(SD15, Geometry(2, 17, 45)), "down_block_residual_02", (2, 320, 45, 17))
    error = refused(bind(request_for("sd15", SMALL)), given)
    assert [each.where for each in error.mismatches] == ["down_block_residual_02"]
    assert not any(each.startswith("down_block_residual_02:") for each in error.refusals)
    assert any(each.startswith("down_block_residual_01: got 2×320×17×45") for each in error.refusals)
    assert str(error).startswith("this call cannot be served: 14 reasons\n")


def test_a_name_of_the_engines_own_is_answered_with_the_contracts():
    names = {each: each.replace("down_block_residual", "input_control") for each in SD15.input_rules}
    binding = bind(request_for("sd15", SMALL, names=names))
    text = str(refused(binding, {names[name]: each for name, each in FINE.items()}))
    assert "input_control_11: surplus: got 2×1280×3×4, expected no such input; the name here is down_block_residual_11" in text


def test_a_size_that_the_model_refuses_is_told_with_its_divisor():
    contract = presets.contract("kandinsky-2.2")
    binding = bind(request_for("kandinsky-2.2", SMALL))
    given = reshaped(call(contract, Geometry(2, 16, 24)), "sample", (2, 4, 17, 25))
    given = reshaped(given, "timestep", ())
    text = str(refused(binding, given))
    assert "this UNet refuses latents of 17×25: both must be multiples of 8" in text
    assert "timestep: rank: got scalar, expected batch; its axes are (batch)" in text


def test_empty_tensors_are_named():
    given = {name: ((0, *shape[1:]), dtype, device) for name, (shape, dtype, device) in FINE.items()}
    error = refused(BINDING, given)
    assert error.refusals[0] == "sample: 0×4×17×25 given, which is empty"
    assert len(error.refusals) == 16


@given(
    name=st.sampled_from(list(FINE)),
    axis=st.integers(0, 4),
    size=st.integers(0, 50),
    dtype=st.sampled_from(["float32", "float16", "int64"]),
    device=st.sampled_from([DEVICE, "cuda:0", "cpu", "meta"]),
)
@example(name="sample", axis=4, size=0, dtype="float32", device="cuda:0")
@settings(max_examples=200, deadline=None)
def test_a_call_with_any_one_fault_is_refused_with_that_input_named(name, axis, size, dtype, device):
    shape = list(FINE[name][0])
    if axis < len(shape):
        shape[axis] = size
    changed = FINE | {name: (tuple(shape), dtype, device)}
    if changed == FINE:
        assert BINDING.serve(changed).profile == 0
    elif name == "encoder_hidden_states" and axis == 1:  # another number of tokens is another size of the whole call
        assert name in str(refused(BINDING, changed))
    else:
        error = refused(BINDING, changed)
        assert error.mismatches or error.refusals
        assert name in str(error)


# records and addresses


def test_a_record_that_does_not_name_every_input_once_is_refused():
    short = dict(list(REQUEST.names)[1:])
    twice = dict.fromkeys(SD15.input_rules, "x")
    for names in (short, twice):
        with pytest.raises(ShapecheckError, match="does not name each input of its contract once; build the engine again"):
            bind(request_for("sd15", SMALL, names=names))


def test_profiles_that_are_no_image_of_one_range_are_refused():
    profile = REQUEST.profiles[0]
    odd = [replace(each, max=(3, 1280, 9, 9)) if each.name == "mid_block_residual" else each for each in profile.inputs]
    with pytest.raises(ContractError, match=r"mid_block_residual .*got max 3×1280×9×9, expected max 3×1280×3×5"):
        bind(replace(REQUEST, profiles=(Profile(tuple(odd)),)))
    with pytest.raises(ContractError, match=r"mid_block_residual.*: missing: got not in the profile"):
        bind(replace(REQUEST, profiles=(Profile(profile.inputs[:-1]),)))
    surplus = Bounds("x", "float32", (1,), (1,), (1,))
    with pytest.raises(ContractError, match="x: surplus"):
        bind(replace(REQUEST, profiles=(Profile((*profile.inputs, surplus)),)))


def test_addresses_go_by_the_engines_names_in_the_order_of_the_record():
    names = {each: f"their_{each}" for each in SD15.input_rules}
    binding = bind(request_for("sd15", SMALL, names=names, outputs=("first", "second")))
    inputs = {name: 256 * place for place, name in enumerate(SD15.input_rules, start=1)}
    table = binding.addresses(inputs, {"second": 8192, "first": 9216})
    assert table == {f"their_{name}": address for name, address in inputs.items()} | {"first": 9216, "second": 8192}
    assert list(table)[-2:] == ["first", "second"]


def test_an_input_or_output_without_memory_is_named():
    inputs = dict.fromkeys(SD15.input_rules, 256)
    with pytest.raises(ShapecheckError, match="no memory was given for out_sample"):
        BINDING.addresses(inputs, {})
    with pytest.raises(ShapecheckError, match="no memory was given for timestep, mid_block_residual"):
        BINDING.addresses(inputs | {"timestep": 0, "mid_block_residual": 0}, {"out_sample": 512})


def test_it_needs_neither_torch_nor_tensorrt():
    heavy = {"torch", "tensorrt", "tensorrt_rtx", "numpy"}
    code = f"import sys; import shapecheck.runtime.binding; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
