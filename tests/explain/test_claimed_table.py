"""`explain --mapping`: tables as people write them are read as they are meant, or refused with what is expected."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shapecheck import Geometry, ShapecheckError, presets
from shapecheck.cli import main
from shapecheck.contract.naming import SCHEMES
from shapecheck.explain.judge_mapping import judge_claim
from shapecheck.explain.mapping_parser import FORMS, parse_mapping, side_of
from shapecheck.explain.report import list_judgement
from shapecheck.explain.residual_table import RequestedSize, ResidualTable
from shapecheck.report.document import Document

SD15 = presets.contract("sd15")
AT = Geometry(2, 64, 96)
FLAT = [tuple(shape) for shape in SD15.shapes(AT).values()]
DOWNS, RIGHT_MID = FLAT[:-1], FLAT[-1]
NAMES = SCHEMES[1].names(12)


def shapecheck(*arguments: str, **options):
    return CliRunner().invoke(main, ["explain", *arguments], **options)


def judgement(text, at=AT, *, batch=None):
    """A table held against SD1.5, at latents of 64×96."""
    return judge_claim(parse_mapping(str(text), at), ("sd15",), SD15, RequestedSize((at.height, at.width), batch))


def refusal(text):
    try:
        parse_mapping(str(text), AT)
    except ShapecheckError as error:
        return str(error)
    raise AssertionError(f"read as a table: {str(text)[:80]!r}")


def refused_otherwise(cases):
    """Those of (text, message) pairs whose refusal does not say the message, with what it says instead."""
    messages = [(message, refusal(text)) for text, message in cases]
    return [pair for pair in messages if pair[0] not in pair[1]]


@pytest.fixture
def file(tmp_path):
    """Writes a file into a folder of its own, and gives its path."""
    folders = (tmp_path / str(number) for number in itertools.count())

    def write(name, text, **options):
        path = next(folders) / name
        path.parent.mkdir()
        path.write_text(text, **{"encoding": "utf-8"} | options)
        return path

    return write


# as they always were


SD15_FLAT = [list(shape) for shape in presets.contract("sd15").shapes(Geometry(2, 64, 64)).values()]
WRITTEN = {
    "compact": ("320,640,1280,1280@64", "blocks"),
    "compact with mid": ("320,640,1280,1280@64 mid:1280@64", "blocks"),
    "sizes apart": ("320@64,640@32,1280@16,1280@8", "blocks"),
    "list": (json.dumps([*SD15_FLAT[:3], *SD15_FLAT[4:]]), "drop"),
    "tuples": (str([*(tuple(each[1:]) for each in SD15_FLAT[-2::-1]), tuple(SD15_FLAT[-1][1:])]), "reverse"),
    "pair": (json.dumps([SD15_FLAT[1:-1], SD15_FLAT[-1]]), "drop"),
    "bracketed": ("[320, 640, 1280, 1280]@64", "blocks"),
    "torch's own": (f"[{', '.join(f'torch.Size({each})' for each in [*SD15_FLAT[:3], *SD15_FLAT[4:]])}]", "drop"),
    "a ControlNet's output": (str({"down_block_res_samples": SD15_FLAT[1:-1], "mid_block_res_sample": SD15_FLAT[-1]}), "drop"),
    "right": (json.dumps(SD15_FLAT), None),
}


def test_tables_are_read_as_people_write_them():
    for form, (text, kind) in WRITTEN.items():
        result = judgement(text, Geometry(2, 64, 64))
        assert result.is_right is (kind is None), form
        if kind:
            assert result.matches[0].differs == 0, form
            assert kind in {fault.kind for match in result.matches for fault in match.faults}, form


def test_the_command_finds_the_size_of_a_table():
    result = shapecheck("--model", "sd15", "--mapping", WRITTEN["compact"][0], "--format", "json")
    assert result.exit_code == 0, result.output
    mapping = json.loads(result.stdout)["mapping"]
    assert mapping["verdict"] == "raises"
    assert (mapping["geometry"]["height"], mapping["geometry"]["width"]) == (64, 64)
    assert mapping["faults"][0]["differs"] == 0
    assert "blocks" in {fault["fault"] for fault in mapping["faults"]}


BY_NAME = dict(zip((*(f"input_control_{number:02d}" for number in range(12)), "input_control_middle"), SD15_FLAT, strict=True))
GAP = {name: shape for name, shape in BY_NAME.items() if name != "input_control_03"}
FILES = {
    "names.json": (json.dumps(BY_NAME), None),
    "nested.json": (json.dumps({"a": {"given": {"down": SD15_FLAT[:-1], "mid": [2, 640, 8, 8]}, "b": 3}}), "width"),
    "sides.json": (json.dumps({"down": SD15_FLAT[:-1], "mid": [2, 640, 8, 8]}), "width"),
    "no mid.json": (json.dumps({"down": SD15_FLAT[:-1]}), "mid"),
    "contract.json": (presets.contract("sdxl").to_json(), "family"),
    "empty.json": (json.dumps({"mapping": {"down": [], "mid": [1280, 8, 8]}}), "empty"),
    "gap.json": (json.dumps(GAP), "drop"),
}


def test_tables_are_read_from_files(file):
    for name, (text, kind) in FILES.items():
        result = judgement(file(name, text), Geometry(2, 64, 64))
        assert result.is_right is (kind is None), name
        if kind:
            assert result.matches[0].fault.kind == kind, name
        if name == "gap.json":
            assert [mismatch.where for mismatch in result.mismatches] == ["down_block_residual_03"]


def test_a_table_without_a_model_finds_its_model():
    table = json.dumps([list(shape) for shape in presets.contract("sdxl").shapes(Geometry(1, 96, 72)).values()])
    result = shapecheck("--mapping", table, "--format", "json")
    mapping = json.loads(result.stdout)["mapping"]
    assert (mapping["verdict"], mapping["geometry"]["height"], mapping["geometry"]["width"]) == ("right", 96, 72)
    assert {"sdxl", "ssd-1b"} <= set(mapping["models"])


def test_silent_faults_are_told_as_silent():
    result = shapecheck("--model", "sd15", "--mapping", json.dumps([[*SD15_FLAT[:-1], SD15_FLAT[-2]], SD15_FLAT[-1]]))
    assert result.exit_code == 0
    assert "WRONG IN SILENCE: 1 slot" in result.stdout
    assert "surplus" in result.stdout


NO_TABLES = (
    ("320,x", "'x' is not channels@size"),
    ("nowhere.json", "there is no file nowhere.json"),
    ("[[1, 2]]", "expected (channels, height, width)"),
    ("[[0, 2, 3]]", "sizes go from 1 to 1048576, got [0, 2, 3]"),
    (f"{10**8}@64", "sizes go from 1 to 1048576, got 100000000@64"),
    ("[" * 5000, "is not a list of shapes"),
    ("{}", "no residuals in it"),
    (",".join(["320@64"] * 600), "more than any UNet has"),
    ("x," * 10**5, "100000 residuals, more than any UNet has"),
    (
        f"--minShapes={NAMES[0]}:1x320x8x8,{NAMES[1]}:1x320x8x8",
        f"'--minShapes={NAMES[0]}:1x320x8x8' is not channels@size; expected {FORMS}",
    ),
)


def test_what_is_no_table_is_refused():
    assert not refused_otherwise(NO_TABLES)
    text, message = NO_TABLES[0]
    result = shapecheck("--mapping", text)
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")


# one shape is no list of widths


def test_one_shape_is_refused(file):
    shapes = (
        "[2, 320, 64, 64]", "(2,320,64,64)", "2,320,64,64", "2 320 64 64", "[320, 64, 64]", "320,64,96",
        '{"down": [2, 320, 64, 64]}', "torch.Size([2, 320, 64, 64])",
    )  # fmt: skip
    message = "reads as the shape of one residual; a list of shapes is expected"
    assert not refused_otherwise((form, message) for text in shapes for form in (text, file("x.txt", text)))


def test_widths_are_widths():
    for text in ("[320, 640, 1280, 1280]", "320,640,1280,1280", "(320, 640, 1280)", "[1280, 640, 320]"):
        entries = parse_mapping(text, AT).entries
        assert [entry.channels for entry in entries.values()] == [int(width) for width in re.findall(r"\d+", text)], text


# compact


SIZED = (
    ("320,640,mid:1280@8", [(2, 320, 64, 96), (2, 640, 64, 96)], (2, 1280, 8, 8)),
    ("mid:1280,320,640@32", [(2, 320, 32, 32), (2, 640, 32, 32)], RIGHT_MID),
    ("320,640@32,mid:1280", [(2, 320, 32, 32), (2, 640, 32, 32)], RIGHT_MID),
    ("320,mid:1280@8,640@16", [(2, 320, 16, 16), (2, 640, 16, 16)], (2, 1280, 8, 8)),
    ("(320, 640)@32", [(2, 320, 32, 32), (2, 640, 32, 32)], None),
    ("320,320@64x96,320", [(2, 320, 64, 96)] * 3, None),
    ("2x320x64x96,1x640X9×7", [(2, 320, 64, 96), (1, 640, 9, 7)], None),
    ("320@64x96+1280@8x12", [(2, 320, 64, 96)], RIGHT_MID),
    ("[320, 640]@32 + 640@8x12", [(2, 320, 32, 32), (2, 640, 32, 32)], (2, 640, 8, 12)),
    ("320x64x96 mid:2x1280x8x12", [(2, 320, 64, 96)], RIGHT_MID),
)


def test_sizes_belong_to_what_they_are_written_after():
    for text, downs, mid in SIZED:
        result = next(iter(parse_mapping(text, AT).tables(ResidualTable.of(SD15, AT))))
        assert (list(result.downs), result.mid) == (downs, mid or RIGHT_MID), text


def test_what_was_written_is_shown():
    ends = {
        "320@0": "got 320@0",
        "640,320@0x4": "got 320@0x4",
        "[[0, 320, 4, 4], [1, 320, 4, 4]]": "got [0, 320, 4, 4]",
        "[-7, 320, 640, 640, 640]": "got -7",
        "2x0x3x4": "got [2, 0, 3, 4]",
    }
    messages = {text: refusal(text) for text in ends}
    assert not {text: said for text, said in messages.items() if not said.endswith(ends[text])}


def test_the_forms_say_which_side_is_the_height():
    assert "320@64x96 is height 64, width 96" in FORMS
    assert len(FORMS) < 400


# names


def test_names_may_count_from_one():
    names = [*(f"down_{number}" for number in range(1, 13)), "mid"]
    result = judgement(json.dumps(dict(zip(names, FLAT, strict=True))))
    assert result.is_right
    assert result.notes == ("the names count from one: number 1 is taken for slot 0, number 12 for slot 11",)
    assert "note: the names count from one" in Document("", [*list_judgement(result)]).render("human")
    assert "- the names count from one" in Document("", [*list_judgement(result)]).render("markdown")


def test_names_that_leave_out_the_first_slot_do_not_count_from_one():
    names = [*(f"down_{number}" for number in range(1, 12)), "mid"]
    result = judgement(json.dumps(dict(zip(names, FLAT[1:], strict=True))))
    assert result.matches[0].fault.message == "slot 0 is left out under its name, the others are in place"
    assert [(each.kind, each.where) for each in result.mismatches] == [("missing", "down_block_residual_00")]
    assert (result.notes, result.matches[0].differs, len(result.matches)) == ((), 0, 1)


def test_a_mid_left_out_among_names_is_told_as_that():
    result = judgement(json.dumps(dict(zip(NAMES[:-1], DOWNS, strict=True))))
    assert (result.matches[0].fault.kind, result.matches[0].fault.slots) == ("drop", ("mid_block_residual",))
    assert result.matches[0].fault.message == "mid is left out under its name, the others are in place"
    assert [each.where for each in result.mismatches] == ["mid_block_residual"]
    null = judgement(json.dumps(dict(zip(NAMES, [*DOWNS, None], strict=True))))
    assert null.matches == result.matches
    rest = {name: shape for name, shape in zip(NAMES, FLAT, strict=True) if name not in (NAMES[2], NAMES[5], NAMES[-1])}
    assert judgement(json.dumps(rest)).matches[0].fault.message.startswith("slots 2, 5 and mid are left out under their names")


def test_beside_what_is_left_out_under_its_name_other_faults_are_told():
    rest = dict(zip(NAMES, FLAT, strict=True)) | {NAMES[7]: (2, 640, 16, 24)}
    del rest[NAMES[3]]
    result = judgement(json.dumps(rest))
    messages = [match.fault.message for match in result.matches]
    assert messages[0].startswith("slot 3 is left out")
    assert "the residual of slot 7 has 640 channels, not 1280" in messages
    assert [each.where for each in result.mismatches] == ["down_block_residual_03", "down_block_residual_07"]


TWO_NAMES = (
    (
        '{"input_control_00": [2, 320, 64, 96], "down_block_residual_00": [2, 640, 64, 96]}',
        "input_control_00 and down_block_residual_00 both name",
    ),
    ("input_control_middle:2x1280x8x12,mid:2x1280x8x12,down_0:2x320x64x96", "input_control_middle and mid both name"),
    ("down_0:320,down_0:640", "down_0 and down_0 both name"),
    ('{"down": [[2, 320, 64, 96]], "down_shapes": [[2, 320, 64, 96]]}', "down and down_shapes both name"),
    ('{"down": [[2, 320, 9, 9]], "mid": [1280, 9, 9], "mid_shape": [1280, 9, 9]}', "mid and mid_shape both name"),
)
OTHER_TABLES = (
    ('{"down_0": [2, 320, 9, 9], "down_0": [2, 640, 9, 9]}', "'down_0' stands twice in one table"),
    ('{"a": {"down_0": [2, 320, 9, 9]}, "b": {"c": {"down_0": [2, 640, 9, 9]}}}', "several tables in it, under a and b.c"),
    ('{"a": {"down_0": [2, 320, 9, 9]}, "b": [{"down_0": [2, 640, 9, 9]}]}', "several tables in it, under a and b.0"),
    ("mid:1280@8,mid:640@8,320@64", "two residuals for mid"),
    ("320@64+1280@8+640@8", "two residuals for mid"),
    ("down_0:320@64,640@32", "'640@32' has no name, and others have one"),
    ('{"down": 3, "mid": 1}', "`down` must be a list of shapes"),
    ("sample:2x4x64x96", "no residuals in it"),
)


def test_two_names_of_one_slot_are_refused():
    assert not refused_otherwise(TWO_NAMES)


def test_what_could_be_another_table_is_refused():
    assert not refused_otherwise(OTHER_TABLES)


def test_names_of_the_sides():
    downs = ("DOWN", "downs", "Down_Shapes", "down_block_res_samples", "down_block_additional_residuals",
             "controlnet_down_residuals")  # fmt: skip
    mids = ("mid-shape", "MID", "mid_block_res_sample", "mid_block_additional_residual")
    others = ("num_down_blocks", "down_intrablock_additional_residuals", "mid_block_type", "down_block_3", "midway")
    assert {name: side_of(name) for name in (*downs, *mids, *others)} == (
        dict.fromkeys(downs, "down") | dict.fromkeys(mids, "mid") | dict.fromkeys(others)
    )


def test_names_in_capitals_of_no_known_scheme():
    capitals = dict(zip((*(f"DOWN_{number}" for number in range(12)), "MID"), FLAT, strict=True))
    assert judgement(" ".join(f"{name}: {crossed(shape)}" for name, shape in capitals.items()), batch=2).is_right
    blocks = dict(zip((*(f"Down_Block_{number}" for number in range(12)), "Mid"), FLAT, strict=True))
    assert judgement(json.dumps(blocks)).is_right


def test_a_list_of_shapes_beside_mid_is_the_down_residuals():
    for mid in ("mid", NAMES[-1]):
        assert judgement(json.dumps({"residuals": DOWNS, mid: RIGHT_MID, "mid_block_types": ["A"]})).is_right, mid
    assert "mid: expected (channels, height, width)" in refusal(json.dumps({"mid": [RIGHT_MID]}))


def test_settings_whose_names_look_like_slots_are_no_residuals():
    named, sides = dict(zip(NAMES, FLAT, strict=True)), {"down": DOWNS, "mid": RIGHT_MID}
    settings = {"controlnet_1": 1, "control_steps_20": 20, "downsample_factor_8": None, "control_2": "a/b", "down_3": True}
    tables = (settings | named, settings | sides, settings | {"residuals": sides}, {"a": settings, "b": named})
    assert [judgement(json.dumps(table)).is_right for table in tables] == [True] * 4
    widths = parse_mapping(json.dumps({NAMES[0]: 320, NAMES[1]: None}), AT).entries
    assert [(index, entry.channels) for index, entry in widths.items()] == [(0, 320)]


# more forms


OPTIONS = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in zip(NAMES, FLAT, strict=True))
MORE = {
    "trtexec": OPTIONS,
    "words": " ".join("x".join(map(str, shape)) for shape in FLAT),
    "polygraphy": " ".join(
        f"{name}:{json.dumps(shape, separators=(',', ':'))}" for name, shape in zip(NAMES, FLAT, strict=True)
    ),
    "printed": "\n".join(f"{name}: torch.Size({list(shape)})" for name, shape in zip(NAMES, FLAT, strict=True)),
    "lines": "\n".join(f"torch.Size({list(shape)})" for shape in FLAT),
}


def test_more_forms(file):
    for form, text in MORE.items():
        result = judgement(text, batch=2)
        assert result.is_right, (form, result.mismatches)


def test_every_form_is_read_from_a_file_of_text_too(file):
    for name, end in (("x.txt", "\n"), ("x.log", "")):
        for form, text in MORE.items():
            assert parse_mapping(str(file(name, text + end)), AT).entries == parse_mapping(text, AT).entries, (form, name)


def test_a_byte_order_mark_is_no_part_of_the_text(file):
    for name, text in {
        "x.json": json.dumps(FLAT),
        "x.txt": "2x320x64x96",
    }.items():
        assert judgement(file(name, text, encoding="utf-8-sig")).received.downs[0] == FLAT[0]


def test_what_looks_like_a_file_is_looked_for():
    names = ("nowhere.yaml", "a/b", "shapes.txt", "C:\\x\\shapes.json", "./320,640", "unet.safetensors")
    assert not refused_otherwise((name, f"there is no file {name}") for name in names)


def test_other_files_are_refused_with_what_to_do(file):
    for name, kind in (("x.yaml", "YAML"), ("x.YML", "YAML"), ("x.toml", "TOML"), ("x.py", "Python")):
        said = refusal(file(name, f"down = {DOWNS}"))
        assert f"{kind} is not read; save the same as .json" in said
        assert FORMS in said
    assert "'INFO' is not channels@size" in refusal(file("x.log", "INFO loading\n"))
    assert "is not JSON" in refusal(file("x.json", "320,640@64"))
    assert "cannot read" in refusal(file("x.bin", "é", encoding="latin-1"))


def test_a_mapping_of_a_probe_needs_a_unet_with_slots(tmp_path):
    contracts = {
        "is a ControlNet; give the UNet": replace(SD15, role="controlnet"),
        "takes no residuals": replace(SD15, slots=()),
    }
    for number, (message, contract) in enumerate(contracts.items()):
        saved, request = tmp_path / f"{number}.json", tmp_path / f"{number}.toml"
        saved.write_text(contract.to_json(), encoding="utf-8")
        request.write_text(f'model = "{saved}"\nmapping = {{ down = [[320, 64, 96]] }}', encoding="utf-8")
        for arguments in (["probe", str(request)], ["explain", "--model", str(saved), "--mapping", "320@64"]):
            result = CliRunner().invoke(main, arguments)
            assert (result.exit_code, message in " ".join(result.output.split())) == (2, True), result.output


def test_hostile_text_is_refused():
    """A search that goes back and forth would not end."""
    lines = "\n" * 10**6
    for text in (f"]{lines}", "/" * 10**5 + "\n", f"[[2, 320, 64, 64]]{lines}x", "a:" * 10**5):
        assert refusal(text)


# round trips


def joined(flat, names, sign):
    return [f"{name}{sign}{shape}" for name, shape in zip(names, flat, strict=True)]


def crossed(shape):
    return "x".join(map(str, shape))


TEXTS = {
    "list": json.dumps,
    "tuples": str,
    "pair": lambda flat: str((flat[:-1], flat[-1])),
    "words": lambda flat: " ".join(map(crossed, flat[:-1])) + f" mid:{crossed(flat[-1])}",
    "compact": lambda flat: ",".join(f"{'mid:' * (at == 12)}{s[1]}@{s[2]}x{s[3]}" for at, s in enumerate(flat)),
    "trtexec": lambda flat: ",".join(joined(map(crossed, flat), NAMES, ":")),
    "torch": lambda flat: f"[{', '.join(f'torch.Size({list(shape)})' for shape in flat)}]",
    "ours": lambda flat: json.dumps(dict(zip(SCHEMES[0].names(12), flat, strict=True))),
    "StreamDiffusion": lambda flat: json.dumps(dict(zip(SCHEMES[1].names(12), flat, strict=True))),
    "ComfyUI": lambda flat: json.dumps(dict(zip(SCHEMES[2].names(12), flat, strict=True))),
    "Neuron": lambda flat: json.dumps(dict(zip(SCHEMES[3].names(12), flat, strict=True))),
    "sides": lambda flat: json.dumps({"down_block_res_samples": flat[:-1], "mid_block_res_sample": flat[-1]}),
    "from one": lambda flat: json.dumps({f"down_{at + 1}" if at < 12 else "mid": shape for at, shape in enumerate(flat)}),
}
WRITTEN_FILES = {
    ".json": json.dumps,
    "-written.json": lambda flat: json.dumps([*map(crossed, flat)]),
    "-written-pair.json": lambda flat: json.dumps([[*map(crossed, flat[:-1])], crossed(flat[-1])]),
    "-written-names.json": lambda flat: json.dumps(dict(zip(NAMES, map(crossed, flat), strict=True))),
    "-written-guesses.json": lambda flat: json.dumps(
        {f"down_{at}" if at < 12 else "mid": crossed(s) for at, s in enumerate(flat)}
    ),
    "-written-sides.json": lambda flat: json.dumps({"down": [*map(crossed, flat[:-1])], "mid": crossed(flat[-1])}),
    ".txt": lambda flat: "\n".join(map(str, flat)),
    "-names.txt": lambda flat: "\n".join(joined(flat, NAMES, ": ")),
}


def check_it_reads_back(folder, form, at, slot, axis, size):
    """Write SD1.5's right table and one with another size of one axis, and read both."""
    flat = [tuple(shape) for shape in SD15.shapes(at).values()]
    assert judgement(written(folder, form, flat), at, batch=at.batch).is_right, form
    assert size != flat[slot][axis]
    flat[slot] = (*flat[slot][:axis], size, *flat[slot][axis + 1 :])
    result = judgement(written(folder, form, flat), at, batch=at.batch)
    assert [*result.received.downs, result.received.mid] == flat, form
    assert [mismatch.where for mismatch in result.mismatches] == [SD15.slots[slot].name], form


def test_a_table_reads_back_as_it_was_written(tmp_path):
    for number, form in enumerate((*TEXTS, *WRITTEN_FILES)):
        check_it_reads_back(tmp_path, form, Geometry(3, 25, 42), slot=number % 13, axis=1 + number % 3, size=17)


@pytest.mark.full
@given(st.sampled_from([*TEXTS, *WRITTEN_FILES]), st.integers(1, 3), st.integers(9, 130), st.integers(9, 130), st.data())
@settings(max_examples=60, deadline=None)
def test_a_table_of_any_size_reads_back_as_it_was_written(tmp_path_factory, form, batch, height, width, data):
    slot, axis = data.draw(st.integers(0, 12)), data.draw(st.integers(1 if form == "compact" else 0, 3))
    size = data.draw(st.integers(1, 1500))
    at = Geometry(batch, height, width)
    assume(size != SD15.slots[slot].shape_at(at)[axis])
    check_it_reads_back(tmp_path_factory.getbasetemp(), form, at, slot, axis, size)


def written(folder, form, flat):
    if form in TEXTS:
        return TEXTS[form](flat)
    path = folder / f"table{form}"
    path.write_text(WRITTEN_FILES[form](flat), encoding="utf-8")
    return path
