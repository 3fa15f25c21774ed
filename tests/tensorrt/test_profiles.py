"""Profiles: every triple monotone, reachable and the image of one geometry; faults found and named; all written forms alike."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shapecheck import BuildOptions, Contract, ContractError, Geometry, ShapecheckError, presets
from shapecheck.contract import Config, Dim, Input, Slot
from shapecheck.contract.dims import BATCH, HEIGHT, TOKENS, WIDTH, constant
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import (
    Bounds,
    Profile,
    Range,
    choose_profile,
    explain_refusal,
    find_profile_mismatches,
    profile_of,
    range_of,
    verify_profiles,
)
from shapecheck.tensorrt.size_ranges import parse_ranges

SD15, SDXL = presets.contract("sd15"), presets.contract("sdxl")
SIZES = Range(Geometry(1, 17, 24), Geometry(2, 40, 56), Geometry(3, 65, 97))
MADE = profile_of(SDXL, SIZES)


def halved(size: int, roundings: str) -> int:
    """The oracle: one halving a letter, c for ceil and f for floor."""
    for rounding in roundings:
        size = -(-size // 2) if rounding == "c" else size // 2
    return size


@st.composite
def tables(draw):
    """A contract as a plain list of slots: name, channels, roundings of its halvings, whether it is pooled; and its inputs."""
    levels = draw(st.lists(st.sampled_from("cf"), max_size=4))
    depths = sorted(draw(st.lists(st.integers(0, len(levels)), min_size=1, max_size=9)))
    slots = [
        (f"down_block_residual_{at:02}", draw(st.integers(1, 2000)), "".join(levels[:depth]), draw(st.booleans()))
        for at, depth in enumerate(depths)
    ]
    return slots, draw(st.booleans())


def contract_of(table) -> Contract:
    slots, with_time = table
    names = {"c": "ceil", "f": "floor"}
    inputs = [
        Input("sample", (BATCH, constant(4), HEIGHT, WIDTH), "float32", "sample"),
        Input("timestep", (BATCH,), "float32", "timestep"),
        Input("encoder_hidden_states", (BATCH, TOKENS, constant(12)), "float32", "encoder_hidden_states"),
    ]
    if with_time:
        inputs.append(Input("time_ids", (BATCH, constant(6)), "float32", "added_cond_kwargs.time_ids"))
    made = tuple(
        Slot(
            name,
            (BATCH, constant(channels), *(Dim(side, 1, tuple(names[each] for each in chain)) for side in "hw")),
            "pooled" if pooled else "full",
            f"down_blocks.{at}",
            "",
            (),
        )
        for at, (name, channels, chain, pooled) in enumerate(slots)
    )
    return Contract("UNet", tuple(inputs), made, Config())


@st.composite
def ranges(draw):
    """Three geometries that ascend on every side."""
    sides = [sorted(draw(st.lists(st.integers(16, 300), min_size=3, max_size=3))) for _ in range(4)]
    return Range(*(Geometry(*each) for each in zip(*sides, strict=True)))


@given(tables(), ranges())
def test_every_triple_is_the_image_of_one_range(table, sizes):
    contract = contract_of(table)
    profile = profile_of(contract, sizes)
    bounds = {each.name: each for each in profile.inputs}
    assert list(bounds) == [*(each.name for each in contract.inputs), *(slot[0] for slot in table[0])]
    for name, channels, chain, pooled in table[0]:
        for shape, at in zip(bounds[name].shapes, sizes.geometries, strict=True):
            area = (1, 1) if pooled else (halved(at.height, chain), halved(at.width, chain))
            assert shape == (at.batch, channels, *area)
    for shape, at in zip(bounds["encoder_hidden_states"].shapes, sizes.geometries, strict=True):
        assert shape == (at.batch, at.tokens, 12)
    for each in profile.inputs:
        assert all(a <= b <= c for a, b, c in zip(*each.shapes, strict=True))
    assert range_of(contract, profile) == sizes
    assert find_profile_mismatches(contract, profile) == ()


@given(tables(), st.lists(ranges(), min_size=1, max_size=3))
def test_every_written_form_says_the_same(table, several):
    contract = contract_of(table)
    profiles = [profile_of(contract, each) for each in several]
    expected = [{(each.name, bound): getattr(each, bound) for each in one.inputs for bound in ("min", "opt", "max")}
                for one in profiles]  # fmt: skip
    assert profile_formats.loads(profile_formats.dumps(profiles, contract.digest)) == (tuple(profiles), contract.digest)
    assert read_polygraphy(profile_formats.list_arguments(profiles, "polygraphy")) == expected
    assert read_trtexec(profile_formats.list_arguments(profiles, "trtexec")) == expected
    assert read_ort(dict(profile_formats.make_provider_options(profiles)), len(profiles)) == expected
    pairs = [each.partition("=") for each in profile_formats.list_arguments(profiles, "ort")]
    assert {key: value for key, _, value in pairs} == dict(profile_formats.make_provider_options(profiles))


@pytest.mark.parametrize(
    ("dtype", "option"), [("float16", "trt_fp16_enable"), ("bfloat16", "trt_bf16_enable"), ("float32", None)]
)
def test_onnx_runtimes_tensorrt_is_told_the_precision(dtype, option):
    """Else it takes a float16 graph for one in float32."""
    profile = replace(MADE, inputs=tuple(replace(each, dtype=dtype) for each in MADE.inputs))
    options = profile_formats.make_provider_options([profile])
    assert [key for key in options if "shapes" not in key] == ([option] if option else [])
    assert options.get(option) == ("True" if option else None)


def read_polygraphy(words: list[str]) -> list[dict]:
    """As Polygraphy's command line has it: an option once more begins the next profile."""
    found, bound = [], ""
    for word in words:
        if option := re.fullmatch("--trt-(min|opt|max)-shapes", word):
            bound = option[1]
            found += [{}] if bound == "min" else []
        else:
            name, sizes = re.fullmatch(r"(\w+):\[([\d,]+)\]", word).groups()
            found[-1][name, bound] = tuple(map(int, sizes.split(",")))
    return found


def read_trtexec(words: list[str]) -> list[dict]:
    found = [] if words[0].startswith("--profile=") else [{}]
    for word in words:
        if word == f"--profile={len(found)}":
            found.append({})
            continue
        bound, text = re.fullmatch(r"--(min|opt|max)Shapes=(.+)", word).groups()
        for name, sizes in re.findall(r"(\w+):([\dx]+)", text):
            found[-1][name, bound] = tuple(map(int, sizes.split("x")))
    return found


def read_ort(options: dict[str, str], count: int) -> list[dict]:
    found: list[dict] = [{} for _ in range(count)]
    for bound in ("min", "opt", "max"):
        for name, sizes in re.findall(r"(\w+):([\dx]+)", options[f"trt_profile_{bound}_shapes"]):
            free = next(each for each in found if (name, bound) not in each)
            free[name, bound] = tuple(map(int, sizes.split("x")))
    return found


@given(ranges(), st.data())
def test_a_profile_takes_the_sizes_of_its_range_and_no_other(sizes, data):
    contract = contract_of(([("down_block_residual_00", 8, "", False), ("down_block_residual_01", 8, "cfc", False)], True))
    profile = profile_of(contract, sizes)
    inside = Geometry(*(data.draw(st.integers(low, high)) for low, high in sides(sizes)))
    assert choose_profile([profile], contract.input_shapes(inside)) == 0
    assert sizes.outside(inside) == () == explain_refusal([profile], contract.input_shapes(inside))
    assert sizes.nearest(inside) == inside
    field = data.draw(st.sampled_from(("batch", "height", "width", "tokens")))
    outside = replace(inside, **{field: getattr(sizes.max, field) + data.draw(st.integers(1, 9))})
    shapes = contract.input_shapes(outside)
    assert choose_profile([profile], shapes) is None
    assert any(text.startswith(field) for text in sizes.outside(outside))
    assert any("allows up to" in text or "accepts" in text for text in explain_refusal([profile], shapes))
    assert sizes.outside(sizes.nearest(outside)) == () == sizes.with_(outside).outside(outside)


def sides(sizes: Range) -> list[tuple[int, int]]:
    return [(getattr(sizes.min, field), getattr(sizes.max, field)) for field in ("batch", "height", "width", "tokens")]


def test_a_controlnet_s_own_profile_leaves_out_what_never_varies():
    inputs = (*SD15.inputs, Input("controlnet_cond", (BATCH, constant(3), Dim("h", 8), Dim("w", 8)), "float32", ""),
              Input("conditioning_scale", (constant(1),), "float32", ""))  # fmt: skip
    profile = profile_of(replace(SD15, inputs=inputs, role="controlnet"), SIZES)
    assert [each.name for each in profile.inputs] == ["sample", "timestep", "encoder_hidden_states", "controlnet_cond"]
    assert profile.bounds("controlnet_cond").max == (3, 3, 520, 776)


def changed(name: str, **changes) -> Profile:
    return Profile(tuple(replace(each, **changes) if each.name == name else each for each in MADE.inputs))


FAULTS = {
    "a slot missing": (
        Profile(tuple(each for each in MADE.inputs if each.name != "down_block_residual_05")),
        ("down_block_residual_05", "missing", "not in the profile"),
    ),
    "mid's max disagrees": (
        changed("mid_block_residual", max=(3, 1280, 33, 25)),
        ("mid_block_residual", "size", "max 3×1280×33×25"),
    ),
    "min above opt": (
        changed("down_block_residual_04", min=(1, 640, 29, 12)),
        ("down_block_residual_04", "range", "1×640×29×12 … 2×640×20×28 … 3×640×33×49"),
    ),
    "wrong channels": (
        changed("down_block_residual_04", min=(1, 320, 9, 12), opt=(2, 320, 20, 28), max=(3, 320, 33, 49)),
        ("down_block_residual_04", "channels", "max 3×320×33×49"),
    ),
    "wrong stride": (
        changed("down_block_residual_03", min=(1, 320, 5, 6), opt=(2, 320, 10, 14), max=(3, 320, 17, 25)),
        ("down_block_residual_03", "size", "max 3×320×17×25"),
    ),
    "floor for ceil": (
        changed("mid_block_residual", max=(3, 1280, 16, 24)),
        ("mid_block_residual", "rounding", "max 3×1280×16×24"),
    ),
    "half precision": (changed("time_ids", dtype="float16"), ("time_ids", "dtype", "float16")),
    "one axis fewer": (changed("text_embeds", min=(1,), opt=(2,), max=(3,)), ("text_embeds", "rank", "max 3")),
    "another batch": (changed("text_embeds", max=(4, 1280)), ("text_embeds", "batch", "max 4×1280")),
    "no such slot": (
        Profile((*MADE.inputs, replace(MADE.inputs[-1], name="down_block_residual_09"))),
        ("down_block_residual_09", "surplus", "in the profile"),
    ),
    "twice": (Profile((*MADE.inputs, MADE.inputs[-1])), ("mid_block_residual", "surplus", "2 times in the profile")),
}


def test_every_entry_of_an_input_that_is_given_twice_is_compared():
    first = replace(MADE.inputs[-1], dtype="float16")
    found = find_profile_mismatches(SDXL, Profile((*MADE.inputs[:-1], first, MADE.inputs[-1])))
    assert [(each.kind, each.observed) for each in found] == [("dtype", "float16"), ("surplus", "2 times in the profile")]
    unknown = replace(MADE.inputs[-1], name="down_block_residual_09")
    assert len(find_profile_mismatches(SDXL, Profile((*MADE.inputs, unknown, unknown)))) == 1


@pytest.mark.parametrize("bound", ["min", "opt", "max"])
def test_a_bound_with_fewer_axes_than_the_others_is_told(bound):
    found = find_profile_mismatches(SDXL, changed("sample", **{bound: (2, 4, 40)}))
    assert {(each.where, each.kind) for each in found} == {("sample", "rank")}


def test_the_axes_of_a_base_input_are_not_told_as_a_cause():
    (found,) = find_profile_mismatches(SDXL, changed("text_embeds", max=(4, 1280)))
    assert found.cause == ""
    (found,) = find_profile_mismatches(SDXL, changed("mid_block_residual", max=(3, 1280, 16, 24)))
    assert found.cause.startswith("off by one")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named_alone(fault):
    profile, expected = FAULTS[fault]
    assert expected in [(each.where, each.kind, each.observed) for each in find_profile_mismatches(SDXL, profile)]
    assert {each.where for each in find_profile_mismatches(SDXL, profile)} == {expected[0]}
    with pytest.raises(ContractError, match=expected[0]):
        verify_profiles(SDXL, [MADE, profile])


def test_nothing_is_not_a_profile():
    with pytest.raises(ShapecheckError, match="no profile was given"):
        verify_profiles(SDXL, [])
    assert [each.kind for each in find_profile_mismatches(SDXL, Profile(()))] == ["missing"] * 15 + ["sizes"]


def test_a_range_the_model_refuses_names_the_size():
    refused = Range(Geometry(1, 48, 48), Geometry(1, 64, 64), Geometry(1, 96, 113))
    with pytest.raises(ShapecheckError, match=r"max, 904x768 pixels: this UNet refuses latents of 96×113: .*multiples of 8"):
        profile_of(presets.contract("kandinsky-2.2"), refused)
    found = find_profile_mismatches(replace(SDXL, divisor=8), MADE)
    assert "refuses latents of 17×24" in str(found[-1])


def test_a_size_that_leaves_a_slot_without_cells_is_refused():
    floors = contract_of(([("down_block_residual_00", 8, "fff", False)], False))
    with pytest.raises(ShapecheckError, match=r"min, 56x72 pixels: down_block_residual_00 would be 1×8×1×0: too small"):
        profile_of(floors, Range(Geometry(1, 9, 7), Geometry(1, 16, 16), Geometry(1, 16, 16)))


def test_of_several_profiles_the_one_tuned_nearest_is_chosen():
    small = profile_of(SD15, Range(Geometry(1, 32, 32), Geometry(1, 48, 48), Geometry(2, 96, 96)))
    large = profile_of(SD15, Range(Geometry(1, 48, 48), Geometry(2, 96, 96), Geometry(2, 128, 128)))
    chosen = [
        choose_profile([small, large], SD15.input_shapes(at))
        for at in (Geometry(1, 50, 49), Geometry(2, 95, 96), Geometry(2, 97, 96))
    ]
    assert chosen == [0, 1, 1]
    told = explain_refusal([small, large], SD15.input_shapes(Geometry(2, 129, 96)))
    assert told[0] == "sample: got 2×4×129×96, profile 1 allows up to 2×4×128×128"
    assert "down_block_residual_07: got 2×1280×33×24, profile 1 allows up to 2×1280×32×32" in told
    assert explain_refusal([small], SD15.input_shapes(Geometry(2, 32, 31)))[0] == (
        "sample: got 2×4×32×31, profile 0 needs at least 1×4×32×32"
    )
    assert explain_refusal([], {}) == ("there is no profile",)
    static = Profile((Bounds("sample", "float32", (1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 8)),))
    assert explain_refusal([static], {"sample": (1, 4, 8, 9)}) == ("sample: got 1×4×8×9, profile 0 accepts 1×4×8×8",)


def test_ranges_are_read_as_users_write_them():
    (sizes,) = parse_ranges(["384x512:512x512:904x768"], ["1:2:4"])
    assert sizes == Range(Geometry(1, 64, 48), Geometry(2, 64, 64), Geometry(4, 96, 113))
    fixed, other = parse_ranges(["512x768", "1024x1024"], ["2", "1:1:2"], "154")
    assert fixed.is_static and fixed.opt == Geometry(2, 96, 64, 154)
    assert other == Range(Geometry(1, 128, 128, 154), Geometry(1, 128, 128, 154), Geometry(2, 128, 128, 154))


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ([], ["1"], "no size was given; give --sizes"),
        (["512x512:768x768"], ["1"], r"--sizes '512x512:768x768': expected MIN:OPT:MAX"),
        (["512"], ["1"], "'512' is not a size; expected WxH in pixels"),
        (["512x500"], ["1"], "height 500 is not a multiple of 8"),
        (["512x512"], ["0"], "--batch: '0' is not a whole number"),
        (["512x512"], ["1:two:3"], "--batch: 'two' is not a whole number"),
        (["512x512"], ["1", "2"], "2 batches for 1 sizes"),
    ],
)
def test_what_is_no_range_is_refused_with_its_text(sizes, batch, message):
    with pytest.raises(ShapecheckError, match=message):
        parse_ranges(sizes, batch)


def test_a_range_that_does_not_ascend_is_refused():
    with pytest.raises(ShapecheckError, match="--sizes '512x384:384x512:768x768' is not a range: give the smallest"):
        parse_ranges(["512x384:384x512:768x768"])
    with pytest.raises(ShapecheckError, match="--batch '2:1:4' is not a range"):
        parse_ranges(["512x512"], ["2:1:4"])
    with pytest.raises(ShapecheckError, match="not a range: the width is 64, 48, 96; give the smallest size"):
        profile_of(SD15, Range(Geometry(1, 48, 64), Geometry(1, 64, 48), Geometry(1, 96, 96)))


def test_lists_serve_as_shapes_and_one_profile_as_several():
    listed = Profile(tuple(replace(each, min=list(each.min), max=list(each.max)) for each in MADE.inputs))
    assert find_profile_mismatches(SDXL, listed) == ()
    assert dict(profile_formats.make_provider_options(())) == {}
    assert BuildOptions("rtx", compute_capabilities=["8.9", "8.6", "8.9"]).compute_capabilities == ("8.6", "8.9")


GOOD = json.loads(profile_formats.dumps([MADE], SDXL.digest))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a file of profiles: not JSON"),
        ("[]", "no key 'shapecheck_profiles'"),
        (json.dumps(GOOD | {"shapecheck_profiles": 2}), "a file of profiles of schema 2; this release reads schema 1"),
        (json.dumps(GOOD | {"profiles": []}), "profiles: expected 1 to 64, got 0"),
        (json.dumps(GOOD | {"profiles": [[{"name": "sample"}]]}), r"damaged profiles: profiles\[0\]\[0\]: no key 'dtype'"),
        (
            json.dumps(GOOD).replace("[1, 4, 17, 24]", "[1, -4, 17, 24]"),
            r"\[0\].min\[1\]: expected a whole number from 1 to .*, got -4",
        ),
        (json.dumps(GOOD).replace("[1, 4, 17, 24]", '"17"'), r"profiles\[0\]\[0\].min: expected a list, got '17'"),
        (json.dumps(GOOD).replace('"sample"', '"sam\\u001bple"'), "cannot be printed"),
        ("[" * 100_000, "not a file of profiles: not JSON"),
    ],
)
def test_a_damaged_file_of_profiles_is_refused(text, message):
    with pytest.raises(ShapecheckError, match=message):
        profile_formats.loads(text)


def test_an_empty_dtype_in_a_profile_is_a_wrong_one():
    profile = Profile(tuple(replace(bounds, dtype="") for bounds in MADE.inputs))
    found = find_profile_mismatches(SDXL, profile)
    assert [(each.where, each.kind) for each in found] == [(bounds.name, "dtype") for bounds in MADE.inputs]
