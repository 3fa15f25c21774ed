"""`explain --mapping`: tables as people write them are read as they are meant, or refused with what is expected."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shapecheck import Geometry, ShapecheckError, presets
from shapecheck.cli import main
from shapecheck.contract.naming import SCHEMES
from shapecheck.explain.judge_mapping import judge_claim
from shapecheck.explain.mapping_parser import FORMS, read_claim
from shapecheck.explain.mapping_report import list_judgement
from shapecheck.explain.mapping_values import side
from shapecheck.explain.residual_table import Table
from shapecheck.explain.size import Size
from shapecheck.report.document import Document

SD15 = presets.contract("sd15")
AT = Geometry(2, 64, 96)


def shapecheck(*arguments: str, **options):
    return CliRunner().invoke(main, ["explain", *arguments], **options)


def judgement(text, at=AT, *, batch=None):
    """A table held against SD1.5, at latents of 64×96."""
    return judge_claim(read_claim(str(text), at), ("sd15",), SD15, Size((at.height, at.width), batch))


def refusal(text):
    try:
        read_claim(str(text), AT)
    except ShapecheckError as error:
        return str(error)
    raise AssertionError(f"read as a table: {str(text)[:80]!r}")


def refused_otherwise(cases):
    """Those of (text, message) pairs whose refusal does not say the message, with what it says instead."""
    told = [(message, refusal(text)) for text, message in cases]
    return [pair for pair in told if pair[0] not in pair[1]]


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
PYTHON = """
height, width = 64, 64
def shapes(batch_size, latent_height, latent_width):
    inputs = {"input_control_00": (2 * batch_size, 320, latent_height, latent_width)}
    inputs["input_control_01"] = (2 * batch_size, 320, latent_height, latent_width)
    inputs["input_control_middle"] = (2 * batch_size, 1280, latent_height // 8, latent_width // 8)
    return inputs
__import__("os").abort()
"""
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
        found = judgement(text, Geometry(2, 64, 64))
        assert found.is_right is (kind is None), form
        if kind:
            assert found.matches[0].differs == 0, form
            assert kind in {fault.kind for match in found.matches for fault in match.faults}, form


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
ROWS = [{"channels": shape[1], "stride": 64 // shape[2]} for shape in SD15_FLAT[:-1]]
FILES = {
    "names.json": (json.dumps(BY_NAME), None),
    "nested.json": (json.dumps({"a": [{"profile": {"down_block_residual_00": {"min": 1, "opt": [2, 640, 64, 64]}}}]}), "other"),
    "sides.json": (json.dumps({"down": SD15_FLAT[:-1], "mid": [2, 640, 8, 8]}), "width"),
    "rows.json": (json.dumps({"down": ROWS}), "mid"),
    "contract.json": (presets.contract("sdxl").to_json(), "family"),
    "table.toml": ("[mapping]\ndown = []\nmid = [1280, 8, 8]\n", "empty"),
    "gap.json": (json.dumps(GAP), "drop"),
}


def test_tables_are_read_from_files(file):
    for name, (text, kind) in FILES.items():
        found = judgement(file(name, text), Geometry(2, 64, 64))
        assert found.is_right is (kind is None), name
        if kind not in (None, "other"):
            assert found.matches[0].fault.kind == kind, name
        if name == "gap.json":
            assert [mismatch.where for mismatch in found.mismatches] == ["down_block_residual_03"]


def test_python_files_are_read_and_never_run(file):
    mapping = str(file("models.py", PYTHON))
    result = shapecheck("--model", "sd15", "--mapping", mapping, "--latent", "64x96", "--batch", "2", "--format", "json")
    given = json.loads(result.stdout)["mapping"]["given"]
    assert given == {"down": [[4, 320, 64, 96]] * 2, "mid": [4, 1280, 8, 12]}


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
    ("320,x", "'x' is no channels@size"),
    ("nowhere.json", "there is no file nowhere.json"),
    ("[[1, 2]]", "expected (channels, height, width)"),
    ("[[0, 2, 3]]", "sizes go from 1 to 1048576, got [0, 2, 3]"),
    (f"{10**8}@64", "sizes go from 1 to 1048576, got 100000000@64"),
    ("[" * 5000, "is no list of shapes"),
    ("{}", "no residuals in it"),
    (",".join(["320@64"] * 600), "which no UNet takes"),
)


def test_what_is_no_table_is_refused():
    assert not refused_otherwise(NO_TABLES)
    text, message = NO_TABLES[0]
    result = shapecheck("--mapping", text)
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")


# Python files: which of their values is the table


FLAT = [tuple(shape) for shape in SD15.shapes(AT).values()]
DOWNS, RIGHT_MID, WRONG_MID = FLAT[:-1], FLAT[-1], (2, 640, 8, 12)
NAMES = SCHEMES[1].names(12)


def named(shapes=FLAT, names=NAMES, *, sign=": ", quote='"'):
    return ", ".join(f"{quote}{name}{quote}{sign}{shape}" for name, shape in zip(names, shapes, strict=True))


SIDES = {
    "two variables": "DOWNS = {downs}\nMID = {mid}",
    "the mid first": "mid_shape = {mid}\ndown_shapes = {downs}",
    "as diffusers calls them": "down_block_res_samples = {downs}\nmid_block_res_sample = {mid}",
    "as the UNet calls them": "down_block_additional_residuals = {downs}\nmid_block_additional_residual = {mid}",
    "a list of any name": "SHAPES = {downs}\nMid = {mid}",
    "at once": "downs, mid = {downs}, {mid}",
    "in a dict": 'x = {{"down": {downs}, "mid": {mid}}}',
    "a dict of variables": 'D = {downs}\nM = {mid}\nx = {{"down": D, "mid": M}}\nrun(x)',
    "by keyword": "check(dict(down={downs}, mid={mid}))",
    "by subscript": 'x = {{}}\nx["down"] = {downs}\nx["mid"] = {mid}',
    "as one list": "MID = {mid}\nSHAPES = [*{downs}, MID]",
    "annotated": "from x import y\ndowns: list[tuple[int, ...]] = {downs}\nmid: tuple[int, ...] = {mid}",
    "returned": "def shapes():\n    return {downs}, {mid}",
    "beside other numbers": "block_out_channels = (320, 640)\nx = (2, 320, 64, 64)\nsize = 9, 9\ndowns = {downs}\nmid = {mid}",
}


def test_both_sides_are_found_in_python(file):
    for form, code in SIDES.items():
        for mid in (RIGHT_MID, WRONG_MID):
            found = judgement(file("x.py", code.format(downs=DOWNS, mid=mid)))
            assert (list(found.given.downs), found.given.mid) == (DOWNS, mid), form
            assert found.tells_mid, form
        assert [mismatch.where for mismatch in found.mismatches] == ["mid_block_residual"], form


NAMED_PYTHON = {
    "a dict": f"x = {{{named()}}}",
    "an annotated dict": f"x: dict[str, tuple[int, ...]] = {{{named()}}}",
    "dict()": f"x = dict({named(sign='=', quote='')})",
    "update": f"x.update({named(sign='=', quote='')})",
    "variables": "\n".join(f"{name} = {shape}" for name, shape in zip(NAMES, FLAT, strict=True)),
    "annotated variables": "\n".join(f"{name}: Shape = {shape}" for name, shape in zip(NAMES, FLAT, strict=True)),
    "subscripts": "\n".join(f"x['{name}'] = {shape}" for name, shape in zip(NAMES, FLAT, strict=True)),
    "torch's own": "import torch\nx = {" + named([f"torch.Size({list(shape)})" for shape in FLAT]) + "}",
    "a mid of the sides": f"x = {{{named(DOWNS, NAMES[:-1])}}}\nMID = {RIGHT_MID}",
    "free axes": "x = {" + named([(-1, shape[1], None, "width") for shape in FLAT]) + "}",
    "with other inputs": f'x = {{"sample": (2, 4, 64, 96), {named()}}}\ndynamic = {{"{NAMES[0]}": {{0: "B"}}}}',
}


def test_names_are_found_in_python(file):
    for form, code in NAMED_PYTHON.items():
        found = judgement(file("x.py", code), batch=2)
        assert found.is_right, (form, found.mismatches)
        assert found.tells_mid, form


LISTS = (
    "SHAPES = {flat}",
    "SHAPES: list = {flat}",
    "SHAPES = tuple({flat})",
    "import torch\nSHAPES = [{sizes}]",
    "SHAPES = [(2, 320, 64, 96)] * 3 + {rest}",
    "OTHER = [(2, 9, 9), (3, 9, 9)]\ndown_and_mid_residuals = {flat}",
)


def test_a_list_of_shapes_is_the_table(file):
    sizes = ", ".join(f"torch.Size({list(shape)})" for shape in FLAT)
    for text in LISTS:
        found = judgement(file("x.py", text.format(flat=FLAT, sizes=sizes, rest=FLAT[3:])))
        note = f"SHAPES (line {1 + text.count('import')}) of the file is read as the table"
        assert found.is_right, text
        assert found.notes == (() if "residuals" in text else (note,)), text
        assert ("note: SHAPES" in Document("", [*list_judgement(found)]).render("human")) is bool(found.notes), text


REFUSED_PYTHON = {
    "widths of another thing": (
        "block_out_channels = (320, 640, 1280, 1280)",
        "block_out_channels (line 1) is named after no residuals",
    ),
    "one shape": ("\nx = (2, 320, 64, 64)", "x (line 2) reads as one shape"),
    "one shape as a side": ("down_shape = (2, 320, 64, 64)", "reads as the shape of one residual"),
    "a size": ("size = (512, 512)", "no table of residuals is written out"),
    "two lists": (f"A = {DOWNS}\nB = {FLAT}", "can be A (line 1) or B (line 2); keep one in the file, or name the lists"),
    "a list and widths": (
        f"A = {DOWNS}\nslot_channels = [320, 320, 640, 640, 640]",
        "can be A (line 1) or slot_channels (line 2)",
    ),
    "two of a side": (f"downs = {DOWNS}\ndef f():\n    downs = {DOWNS[1:]}", "can be downs (line 1) or downs (line 3)"),
    "two mids": (f"downs = {DOWNS}\nmid = {RIGHT_MID}\nmid_shape = {WRONG_MID}", "can be mid (line 2) or mid_shape (line 3)"),
    "names and a list": (f"x = {{{named()}}}\ndowns = {DOWNS[1:]}", "can be input_control_00 (line 1) or downs (line 2)"),
    "two tables": (
        f"x = {{{named()}}}\ny = {{{named(FLAT[::-1])}}}",
        "input_control_00 can be input_control_00 (line 1) or input_control_00",
    ),
    "an f-string": (
        "x = {f'input_control_{i:02d}': (2, 320, 64, 64) for i in range(3)}",
        "line 1: the name f'input_control_{i:02d}' is comp",
    ),
    "an f-string in a dict": (
        "i = 0\nx = {f'input_control_{i}': (2, 320, 64, 64)}",
        "line 2: the name f'input_control_{i}' is computed",
    ),
    "a subscript": (
        "for i in y:\n    x[f'down_{i}'] = (2, 320, 64, 64)",
        "line 2: the name f'down_{i}' is computed; a file is read, never run",
    ),
    "a format": ("x['input_control_%02d' % i] = (2, 320, 64, 64)", "is computed"),
    "a name for a name": ("for n in names:\n    x[n] = (2, 320, 64, 64)", "line 2: the name n is computed"),
    "a computed list": (
        f"down_shapes = [(2, c, 64, 64) for c in x]\nmid = {RIGHT_MID}",
        "line 1: down_shapes is computed there",
    ),
    "a list that grows": (
        f"downs = []\nfor c in x:\n    downs.append((2, c, 64, 64))\nmid = {RIGHT_MID}",
        "line 3: downs is computed there",
    ),
    "a computed mid": (f"downs = {DOWNS}\nmid = downs[-1]", "line 2: mid is computed there"),
    "a computed shape": (f"x = {{{named()}, 'down_block_3': shape_of(3)}}", "line 1: down_block_3 is computed there"),
    "mid alone": (f"MID = {RIGHT_MID}", "MID (line 1) is the mid residual, and no down residuals are written out"),
    "two names": (
        f"x = {{{named()}, 'down_block_residual_00': (2, 320, 64, 96)}}",
        "input_control_00 and down_block_residual_00 both name",
    ),
    "a slice": (f"x = {FLAT}[1:]", "no table of residuals is written out"),
    "loops": ("downs = mid\nmid = downs", "line 1: downs is computed there"),
    "no Python": ("def", "is no Python"),
}


def test_python_files_that_could_mean_something_else_are_refused(file):
    assert not refused_otherwise((file("x.py", text), message) for text, message in REFUSED_PYTHON.values())


def doubled(times):
    """Python that would be nine shapes doubled so many times."""
    return "a0 = [(2, 320, 64, 64)] * 9\n" + "\n".join(f"a{i} = a{i - 1} + a{i - 1}" for i in range(1, times))


def nested(depth):
    """Python that would be a list of three to the power of this many shapes."""
    return "a0 = (2, 320, 64, 64)\n" + "\n".join(f"a{i} = [a{i - 1}, a{i - 1}, a{i - 1}]" for i in range(1, depth))


def numbered(count):
    """Python that names so many residuals."""
    return f"x = {{{', '.join(f'{chr(34)}down_{i}{chr(34)}: (2, 320, 64, 64)' for i in range(count))}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (doubled(40), "too much to be read"),
        pytest.param(nested(30), "too much to be read", marks=pytest.mark.full),
        ("x = " + "-" * 3000 + "1", "x.py"),
        ("x = " + "+".join(["1"] * 3000), "x.py"),
        ("downs = [(2, 320, 64, 64)] * 99999999999", "line 1: downs is computed there"),
        (numbered(600), "600 residuals, which no UNet takes"),
        pytest.param(numbered(9000), "residuals, which no UNet takes", marks=pytest.mark.full),
    ],
    ids=["doubled", "nested", "signs", "sums", "repeated", "many names", "more names"],
)
def test_hostile_python_is_refused(file, text, message):
    """Without its bounds it would be read for hours, or until memory runs out."""
    assert message in refusal(file("x.py", text))


# one shape is no list of widths


def test_one_shape_is_refused(file):
    shapes = (
        "[2, 320, 64, 64]", "(2,320,64,64)", "2,320,64,64", "2 320 64 64", "[320, 64, 64]", "320,64,96", "[-1, 320, -1, -1]",
        '["batch", 320, "height", "width"]', '{"down": [2, 320, 64, 64]}', "torch.Size([2, 320, 64, 64])",
    )  # fmt: skip
    message = "reads as the shape of one residual; a list of shapes is expected"
    assert not refused_otherwise((form, message) for text in shapes for form in (text, file("x.txt", text)))


def test_widths_are_widths():
    for text in ("[320, 640, 1280, 1280]", "320,640,1280,1280", "(320, 640, 1280)", "[1280, 640, 320]"):
        entries = read_claim(text, AT).entries
        assert [entry.channels for _, entry in entries] == [int(width) for width in re.findall(r"\d+", text)], text


# compact


SIZED = (
    ("320,640,mid:1280@8", [(2, 320, 64, 96), (2, 640, 64, 96)], (2, 1280, 8, 8)),
    ("mid:1280,320,640@32", [(2, 320, 32, 32), (2, 640, 32, 32)], RIGHT_MID),
    ("320,640@32,mid:1280", [(2, 320, 32, 32), (2, 640, 32, 32)], RIGHT_MID),
    ("320,mid:1280@8,640@16", [(2, 320, 16, 16), (2, 640, 16, 16)], (2, 1280, 8, 8)),
    ("320@64x96+1280@8x12", [(2, 320, 64, 96)], RIGHT_MID),
    ("320,320@64x96,320", [(2, 320, 64, 96)] * 3, None),
    ("2x320x64x96,1x640X9×7", [(2, 320, 64, 96), (1, 640, 9, 7)], None),
    ("320x64x96 mid:2x1280x8x12", [(2, 320, 64, 96)], RIGHT_MID),
    ("-1x320x?xW;Bx320x9x-1", [(2, 320, 64, 96), (2, 320, 9, 96)], None),
)


def test_sizes_belong_to_what_they_are_written_after():
    for text, downs, mid in SIZED:
        found = next(iter(read_claim(text, AT).tables(Table.of(SD15, AT))))
        assert (list(found.downs), found.mid) == (downs, mid or RIGHT_MID), text


def test_what_was_written_is_shown():
    ends = {
        "320@0": "got 320@0",
        "640,320@0x4": "got 320@0x4",
        "[[0, 320, 4, 4], [1, 320, 4, 4]]": "got [0, 320, 4, 4]",
        "[-7, 320, 640, 640, 640]": "got -7",
        '{"down": [{"channels": 320, "stride": 0}]}': "got {'channels': 320, 'stride': 0}",
        "2x0x3x4": "got [2, 0, 3, 4]",
    }
    told = {text: refusal(text) for text in ends}
    assert not {text: said for text, said in told.items() if not said.endswith(ends[text])}


def test_the_forms_say_which_side_is_the_height():
    assert "320@64x96 is height 64, width 96" in FORMS
    assert len(FORMS) < 400


# names


def test_names_may_count_from_one():
    names = [*(f"down_{number}" for number in range(1, 13)), "mid"]
    found = judgement(json.dumps(dict(zip(names, FLAT, strict=True))))
    assert found.is_right
    assert found.notes == ("the names count from one: number 1 is taken for slot 0, number 12 for slot 11",)
    assert "note: the names count from one" in Document("", [*list_judgement(found)]).render("human")
    assert "- the names count from one" in Document("", [*list_judgement(found)]).render("markdown")


def test_names_that_leave_out_the_first_slot_do_not_count_from_one():
    names = [*(f"down_{number}" for number in range(1, 12)), "mid"]
    found = judgement(json.dumps(dict(zip(names, FLAT[1:], strict=True))))
    assert found.matches[0].fault.told == "slot 0 is left out under its name, the others are in place"
    assert [(each.kind, each.where) for each in found.mismatches] == [("missing", "down_block_residual_00")]
    assert (found.notes, found.matches[0].differs, len(found.matches)) == ((), 0, 1)


def test_a_mid_left_out_among_names_is_told_as_that():
    found = judgement(json.dumps(dict(zip(NAMES[:-1], DOWNS, strict=True))))
    assert (found.matches[0].fault.kind, found.matches[0].fault.slots) == ("drop", ("mid_block_residual",))
    assert found.matches[0].fault.told == "mid is left out under its name, the others are in place"
    assert [each.where for each in found.mismatches] == ["mid_block_residual"]
    null = judgement(json.dumps(dict(zip(NAMES, [*DOWNS, None], strict=True))))
    assert null.matches == found.matches
    rest = {name: shape for name, shape in zip(NAMES, FLAT, strict=True) if name not in (NAMES[2], NAMES[5], NAMES[-1])}
    assert judgement(json.dumps(rest)).matches[0].fault.told.startswith("slots 2, 5 and mid are left out under their names")


def test_beside_what_is_left_out_under_its_name_other_faults_are_told():
    rest = dict(zip(NAMES, FLAT, strict=True)) | {NAMES[7]: (2, 640, 16, 24)}
    del rest[NAMES[3]]
    found = judgement(json.dumps(rest))
    told = [match.fault.told for match in found.matches]
    assert told[0].startswith("slot 3 is left out")
    assert "the residual of slot 7 has 640 channels, not 1280" in told
    assert [each.where for each in found.mismatches] == ["down_block_residual_03", "down_block_residual_07"]


TWO_NAMES = (
    (
        '{"input_control_00": [2, 320, 64, 96], "down_block_residual_00": [2, 640, 64, 96]}',
        "input_control_00 and down_block_residual_00 both name",
    ),
    ("input_control_middle:2x1280x8x12,mid:2x1280x8x12,down_0:2x320x64x96", "input_control_middle and mid both name"),
    ("down_0:320,down_0:640", "down_0 and down_0 both name"),
    ('{"down": [[2, 320, 64, 96]], "down_shapes": [[2, 320, 64, 96]]}', "down and down_shapes both name"),
    (
        '[{"name": "down_0", "shape": [2, 320, 9, 9]}, {"name": "input_control_00", "shape": [2, 320, 9, 9]}]',
        "down_0 and input_control_00 both name",
    ),
)
OTHER_TABLES = (
    ('{"down_0": [2, 320, 9, 9], "down_0": [2, 640, 9, 9]}', "'down_0' stands twice in one table"),
    ('{"a": {"down_0": [2, 320, 9, 9]}, "b": [{"down_0": [2, 640, 9, 9]}]}', "several tables in it, under a and b.0"),
    ("mid:1280@8,mid:640@8,320@64", "two residuals for mid"),
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
    assert {name: side(name) for name in (*downs, *mids, *others)} == (
        dict.fromkeys(downs, "down") | dict.fromkeys(mids, "mid") | dict.fromkeys(others)
    )


# more forms


OPTIONS = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in zip(NAMES, FLAT, strict=True))
FREE = [[-1, shape[1], None, "width"] for shape in FLAT]
MORE = {
    "trtexec": OPTIONS,
    "optShapes": f"--optShapes=sample:2x4x64x96,timestep:1,{OPTIONS}",
    "shapes": f"--shapes={OPTIONS}",
    "a whole command": f"trtexec --onnx=a/b.onnx --minShapes=down_0:1x1x1x1 --optShapes={OPTIONS} --maxShapes=down_0:9x9x9x9",
    "words": " ".join("x".join(map(str, shape)) for shape in FLAT),
    "free": json.dumps(FREE),
    "free names": json.dumps([["batch", shape[1], "H", "latent_width"] for shape in FLAT]),
    "free words": ",".join(f"-1x{shape[1]}x?xW" for shape in FLAT),
    "words in JSON": json.dumps({name: "x".join(map(str, shape)) for name, shape in zip(NAMES, FLAT, strict=True)}),
    "rows with names": json.dumps(
        [{"name": "sample", "shape": [1, 4, 9, 9]}, *({"name": n, "shape": s} for n, s in zip(NAMES, FLAT, strict=True))]
    ),
    "a list and a mid": json.dumps({"shapes": DOWNS, "mid_shape": RIGHT_MID}),
    "polygraphy": " ".join(
        f"{name}:{json.dumps(shape, separators=(',', ':'))}" for name, shape in zip(NAMES, FLAT, strict=True)
    ),
    "printed": "\n".join(f"{name}: torch.Size({list(shape)})" for name, shape in zip(NAMES, FLAT, strict=True)),
    "lines": "\n".join(f"torch.Size({list(shape)})" for shape in FLAT),
}


def test_more_forms(file):
    for form, text in MORE.items():
        found = judgement(text, batch=2)
        assert found.is_right, (form, found.mismatches)


def test_every_form_is_read_from_a_file_of_text_too(file):
    for name, end in (("x.txt", "\n"), ("x.log", "")):
        for form, text in MORE.items():
            assert read_claim(str(file(name, text + end)), AT).entries == read_claim(text, AT).entries, (form, name)


def test_a_half_free_size_is_held_to_what_it_says():
    shapes = [list(shape) for shape in FREE]
    shapes[4][2:] = [31, -1]
    (wrong,) = judgement(json.dumps(shapes), batch=2).mismatches
    assert (wrong.where, wrong.observed) == ("down_block_residual_04", (2, 640, 31, 48))


def test_a_byte_order_mark_is_no_part_of_the_text(file):
    for name, text in {
        "x.json": json.dumps(FLAT),
        "x.txt": "2x320x64x96",
        "x.toml": f"down = {json.dumps(DOWNS)}",
        "x.py": f"S = {FLAT}",
    }.items():
        assert judgement(file(name, text, encoding="utf-8-sig")).given.downs[0] == FLAT[0]


def test_what_looks_like_a_file_is_looked_for():
    names = ("nowhere.yaml", "a/b", "shapes.txt", "C:\\x\\shapes.json", "./320,640", "unet.safetensors")
    assert not refused_otherwise((name, f"there is no file {name}") for name in names)


def test_other_files_are_refused_with_what_to_do(file):
    assert "YAML is not read; save the same as .json" in refusal(file("x.yaml", f"down: {DOWNS}"))
    assert "YAML is not read" in refusal(file("x.YML", ""))
    assert "'INFO' is no channels@size" in refusal(file("x.log", "INFO loading\n"))
    assert "is no JSON" in refusal(file("x.json", "320,640@64"))
    assert "cannot read" in refusal(file("x.bin", "é", encoding="latin-1"))


def test_hostile_text_is_refused():
    """A search that goes back and forth would not end."""
    lines = "\n" * 10**6
    for text in (f"]{lines}", "/" * 10**5 + "\n", f"[[2, 320, 64, 64]]{lines}x", "--shapes=" * 10**5):
        assert refusal(text)


# round trips


def joined(flat, names, sign, mark="{}"):
    return [f"{mark.format(name)}{sign}{shape}" for name, shape in zip(names, flat, strict=True)]


def crossed(shape):
    return "x".join(map(str, shape))


TEXTS = {
    "list": json.dumps,
    "tuples": str,
    "pair": lambda flat: str((flat[:-1], flat[-1])),
    "words": lambda flat: " ".join(map(crossed, flat[:-1])) + f" mid:{crossed(flat[-1])}",
    "compact": lambda flat: ",".join(f"{'mid:' * (at == 12)}{s[1]}@{s[2]}x{s[3]}" for at, s in enumerate(flat)),
    "trtexec": lambda flat: f"--optShapes={','.join(joined(map(crossed, flat), NAMES, ':'))}",
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
    ".toml": lambda flat: "\n".join(joined(map(json.dumps, flat), NAMES, " = ")),
    "-sides.toml": lambda flat: f"down = {json.dumps(flat[:-1])}\nmid = {json.dumps(flat[-1])}",
    ".txt": lambda flat: "\n".join(map(str, flat)),
    "-dict.py": lambda flat: f"x = {{{', '.join(joined(flat, NAMES, ': ', '{!r}'))}}}",
    "-keywords.py": lambda flat: f"x = dict({', '.join(joined(flat, NAMES, '='))})",
    "-variables.py": lambda flat: "\n".join(joined(flat, NAMES, " = ")),
    "-sides.py": lambda flat: f"DOWN_SHAPES = {flat[:-1]}\nMID_SHAPE = {flat[-1]}",
    "-list.py": lambda flat: f"SHAPES = {flat}",
}


def check_it_reads_back(folder, form, at, slot, axis, size):
    """Write SD1.5's right table and one with another size of one axis, and read both."""
    flat = [tuple(shape) for shape in SD15.shapes(at).values()]
    assert judgement(written(folder, form, flat), at, batch=at.batch).is_right, form
    assert size != flat[slot][axis]
    flat[slot] = (*flat[slot][:axis], size, *flat[slot][axis + 1 :])
    found = judgement(written(folder, form, flat), at, batch=at.batch)
    assert [*found.given.downs, found.given.mid] == flat, form
    assert [mismatch.where for mismatch in found.mismatches] == [SD15.slots[slot].name], form


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
