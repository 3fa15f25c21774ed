"""Weights are found, checked, linked, copied and told apart without being loaded; the files they lie in are never changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from small import unet

from shapecheck import ShapecheckError
from shapecheck.models.safetensors import DTYPES, TensorLocation, checkpoint_files, read_table
from shapecheck.models.weights import (
    Embedded,
    copy_tensors,
    digest,
    digest_live,
    find_differing,
    format_location,
    is_equal,
    match_tensors,
    require_linkable,
)

torch.set_num_threads(1)

NAME = "diffusion_pytorch_model"
FLOATING = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
OTHER = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "complex64")
few = settings(max_examples=50, deadline=None)


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bit pattern, NaNs and infinities too."""
    kind = getattr(torch, dtype)
    count = int(np.prod(shape, dtype=int)) * kind.itemsize
    data = torch.from_numpy(np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, count, dtype=np.uint8))
    return data.view(kind).reshape(shape) if count else torch.zeros(shape, dtype=kind)


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensors = st.builds(random_tensor, st.sampled_from(FLOATING + OTHER), shapes, st.integers(0, 99))
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
checkpoints = st.dictionaries(names, tensors, max_size=6)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def held(stored: TensorLocation) -> bytes:
    return stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]


def quiet(done: int, total: int) -> None:
    pass


# finding the files


@pytest.mark.parametrize(("variant", "size"), [(None, "10GB"), (None, "100KB"), ("non_ema", "10GB"), ("a.b", "100KB")])
def test_what_diffusers_saved_is_found(tmp_path, variant, size):
    model = unet()
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    files = checkpoint_files(tmp_path, variant=variant)
    assert sorted(files) == sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) == (size == "100KB")
    table = read_table(files)
    state = model.state_dict()
    found = match_tensors(table, {name: tuple(each.shape) for name, each in state.items()})
    assert list(found) == list(state)
    assert {name: held(each) for name, each in found.items()} == {name: raw(each) for name, each in state.items()}


def test_the_index_of_a_variant_in_its_old_spelling(tmp_path):
    shard = f"{NAME}-00001-of-00001.fp16.safetensors"
    save_file({"a": torch.ones(2)}, tmp_path / shard)
    index = {"metadata": {}, "weight_map": {"a": shard}}
    (tmp_path / f"{NAME}.safetensors.fp16.index.json").write_text(json.dumps(index))
    assert checkpoint_files(tmp_path, variant="fp16") == (tmp_path / shard,)
    with pytest.raises(ShapecheckError, match=r"choose one that is there: `--variant fp16`$"):
        checkpoint_files(tmp_path)


def test_an_index_goes_before_a_single_file_as_in_diffusers(tmp_path):
    unet().save_pretrained(tmp_path, max_shard_size="100KB")
    save_file({"a": torch.ones(2)}, tmp_path / f"{NAME}.safetensors")
    assert len(checkpoint_files(tmp_path)) > 3
    for shard in tmp_path.glob(f"{NAME}-*"):
        shard.unlink()
    with pytest.raises(
        ShapecheckError, match=rf"files, of which \d+ are not there: .*or delete the index if {NAME}.safetensors is newer"
    ):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    ("present", "variant", "told"),
    [
        ([], None, "it holds nothing; give the folder in which save_pretrained"),
        (["config.json", "pytorch_lora_weights.safetensors"], None, "it holds config.json, pytorch_lora_weights.safetensors;"),
        ([f"{NAME}.fp16.safetensors"], None, "choose one that is there: `--variant fp16`"),
        ([f"{NAME}.fp16.safetensors", f"{NAME}.non_ema.safetensors"], None, "`--variant fp16`, `--variant non_ema`"),
        ([f"{NAME}.safetensors.index.ema.json", f"{NAME}.ema-00001-of-00002.safetensors"], None, "there: `--variant ema`$"),
        ([f"{NAME}.safetensors"], "fp16", "choose one that is there: no `--variant` for the plain one$"),
        ([f"{NAME}.safetensors.index.json"], "fp16", "choose one that is there: no `--variant` for the plain one$"),
        ([f"{NAME}.bin"], None, "pickled, which shapecheck never opens: .*If you trust"),
        ([f"{NAME}-00001-of-00002.bin", f"{NAME}.bin.index.json"], None, r"use_safetensors=False\).save"),
        ([f"{NAME}.fp16.bin"], None, "variant='?.*fp16.*torch_dtype=torch.float16"),
        ([f"{NAME}.ckpt"], None, f"it holds {NAME}.ckpt;"),
    ],
)
def test_a_folder_without_the_weights(tmp_path, present, variant, told):
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(ShapecheckError, match=f"^{re.escape(str(tmp_path))} holds no {NAME}.*{told}"):
        checkpoint_files(tmp_path, variant=variant)


def test_no_folder(tmp_path):
    with pytest.raises(ShapecheckError, match=r"cannot read the folder .*absent: No such file"):
        checkpoint_files(tmp_path / "absent")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.skipif(os.name == "nt", reason="the command is quoted for another shell")
def test_the_command_that_converts_pickled_weights(tmp_path, monkeypatch, variant):
    model = unet().half() if variant else unet()
    place = tmp_path / "it's $HOME; a folder"
    model.save_pretrained(place, safe_serialization=False, variant=variant)
    with pytest.raises(ShapecheckError) as refusal:
        checkpoint_files(place)
    program, option, code, argument = shlex.split(str(refusal.value).partition("convert them: ")[2])
    assert (program, option, argument) == ("python", "-c", str(place))
    monkeypatch.setattr(sys, "argv", ["-c", argument])
    exec(code, {})
    table = read_table(checkpoint_files(place, variant=variant))
    assert find_differing(table, model.state_dict()) == ()


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "b/a.safetensors", "b\\a", "C:a", "..", ".", "", "\\\\h\\s"]
)
def test_an_index_that_leads_out_of_the_folder(tmp_path, name):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    index = tmp_path / f"{NAME}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": name}}))
    with pytest.raises(ShapecheckError, match=f"^{re.escape(str(index))} lists .* escapes the folder"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "does not start with an object"),
        ("{", "is not an index of shards: Expecting"),
        ("{}", "weight_map does not name"),
        ('{"weight_map": {}}', "weight_map does not name"),
        ('{"weight_map": {"a": 3}}', "weight_map does not name"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "a is given twice"),
        ('{"weight_map": {"a": "\\ud800"}}', r"lists 1 files, of which 1 are not there: \\ud800"),
        ('{"a":' * 10**5, "nested too deeply"),
        ("{" + " " * 2**24, "too large"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, told):
    (tmp_path / f"{NAME}.safetensors.index.json").write_text(text)
    with pytest.raises(ShapecheckError, match=told):
        checkpoint_files(tmp_path)


# reading where the tensors lie


@few
@given(checkpoints, st.none() | st.dictionaries(names, names, min_size=1, max_size=2))
def test_a_table_is_what_safetensors_reads(folder, expected, metadata):
    file = folder / "any.safetensors"
    save_file(expected, file, metadata=metadata)
    table = read_table([file])
    with safe_open(file, "pt") as opened:
        filled = [name for name, each in table.items() if each.nbytes]  # the others share an offset
        assert filled == [name for name in opened.offset_keys() if table[name].nbytes]
        assert table.keys() == set(opened.offset_keys())
        for name, stored in table.items():
            assert (stored.dtype, stored.shape) == (
                str(opened.get_tensor(name).dtype)[6:],
                tuple(opened.get_slice(name).get_shape()),
            )
    assert {name: held(each) for name, each in table.items()} == {name: raw(each) for name, each in expected.items()}


def test_a_tensor_in_two_files(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ShapecheckError, match=r"two: tensor a is in .*one too"):
        read_table([tmp_path / "one", tmp_path / "two"])


VALID = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "empty": {"dtype": "I64", "shape": [0, 2], "data_offsets": [34, 34]},
    "__metadata__": {"format": "pt"},
}
DATA = bytes(range(34))


def write(file: Path, header: object, data: bytes = DATA, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def changed(name: str, **fields) -> dict:
    return VALID | {name: VALID[name] | fields}


def test_the_file_whose_faults_follow_is_valid(tmp_path):
    table = read_table([write(tmp_path / "x", json.dumps(VALID).encode() + b"  ")])
    assert [(each.dtype, each.shape, each.nbytes) for each in table.values()] == [
        ("float32", (2, 3), 24),
        ("bfloat16", (5,), 10),
        ("int64", (0, 2), 0),
    ]
    assert held(table["b"]) == DATA[24:]


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (0, "0 bytes with a header of 0, expected"),
        (7, "7 bytes with a header of [1-9]"),
        (8, "8 bytes with a header of [1-9]"),
        (100, "100 bytes with a header of [1-9]"),
        (-35, r"\d+ bytes with a header of [1-9]"),
        (-34, "tensor a ends at byte"),
        (-11, "tensor a ends at byte"),
        (-1, "tensor b ends at byte"),
    ],
)
def test_a_file_cut_short(tmp_path, keep, told):
    file = write(tmp_path / "x", VALID)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ShapecheckError, match=f"^{re.escape(str(file))} is not a valid .*: {told}.*is the download cut short"):
        read_table([file])


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**31, 2**62, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be(tmp_path, length):
    file = write(tmp_path / "x", VALID, length=length)
    with pytest.raises(ShapecheckError, match=f"^{re.escape(str(file))} is not a valid .* with a header of {length}"):
        read_table([file])


def test_a_header_that_is_too_long_but_there(tmp_path):
    file = write(tmp_path / "x", VALID, length=10**8 + 1)
    os.truncate(file, 10**8 + 100)
    with pytest.raises(ShapecheckError, match="expected a header of 2 to 100000000"):
        read_table([file])


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"[]", "does not start with an object"),
        (b"  {}", "does not start with an object"),
        (b"\xef\xbb\xbf{}", "does not start with an object"),
        (b'"text"', "does not start with an object"),
        (b"{]", "Expecting"),
        (b'{"a": NaN}', "NaN is not a whole number"),
        (b'{"a": 1e400}', "1e400 is not a whole number"),
        (b'{"a": -Infinity}', "-Infinity is not a whole number"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"a":[' + b"[]," * 3_000_000, "too large to be a table"),
        (b'{"a": ' + b"9" * 10_000_000 + b"}", "9+… is larger than any file"),
        (json.dumps(VALID).encode() + b"\0", "Extra data"),
        (json.dumps(VALID).encode() + b"{}", "Extra data"),
        (b'{"a": {}, "a": {}}', "a is given twice"),
        (b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 4]}}', "shape is given twice"),
        (b'{"\\ud800": {"dtype": "I8", "shape": [34], "data_offsets": [0, 34]}}', r"tensor \\ud800: .*surrogates not allowed"),
        ({}, "34 bytes follow the header"),
        (VALID | {"a": 3}, "tensor a: expected an object"),
        (VALID | {"a": {"dtype": "F32", "shape": [2, 3]}}, "tensor a: expected an object with dtype, shape and data_offsets"),
        (VALID | {"x\n\x1b[2J" + "y" * 999: None}, r"tensor x\\n\\x1b\[2Jy{100,120}…: expected"),
        (VALID | {"__metadata__": {"format": 3}}, "__metadata__ is not an object of texts"),
        (VALID | {"__metadata__": ["pt"]}, "__metadata__ is not an object of texts"),
        (changed("a", dtype="F31"), "tensor a: dtype F31 is not known; known are BOOL, U8"),
        (changed("a", dtype="F4"), "tensor a: dtype F4 is not known"),
        (changed("a", dtype=["F32"]), "tensor a: dtype .* is not known"),
        (changed("a", dtype="F16"), "tensor a: data_offsets span 24 bytes, which is not the size of float16 2×3"),
        (changed("a", shape=[2, 4]), "tensor a: data_offsets span 24 bytes, which is not the size of float32 2×4"),
        (changed("a", shape=[]), "tensor a: data_offsets span 24 bytes, which is not the size of float32 scalar"),
        (changed("a", shape=6), "tensor a: shape is not a list"),
        (changed("a", shape=[1] * 65), "tensor a: shape is not a list of at most 64"),
        (changed("a", shape=[-2, -3]), "tensor a: shape holds a value that is not a size"),
        (changed("a", shape=[True, 6]), "tensor a: shape holds a value that is not a size"),
        (changed("a", shape=["6"]), "tensor a: shape holds a value that is not a size"),
        (changed("a", shape=[2**63]), "tensor a: shape holds a value that is not a size"),
        (changed("a", shape=[2**62] * 64), "tensor a: data_offsets span 24"),
        (changed("a", shape=[2**32, 2**32, 6]), "tensor a: data_offsets span 24"),
        (changed("a", data_offsets=[24, 0]), "tensor a: data_offsets are .24, 0., expected a begin and an end"),
        (changed("a", data_offsets=[0, 24, 24]), "tensor a: data_offsets are"),
        (changed("a", data_offsets=[-24, 0]), "tensor a: data_offsets holds a value that is not a size"),
        (changed("b", data_offsets=[2**62, 2**62 + 10]), "tensor b ends at byte 46116860184.*, the file at"),
        (changed("b", data_offsets=[25, 35]), "tensor b ends at byte"),
        (changed("b", data_offsets=[0, 10]), "tensor a at byte .* overlaps tensor b"),
        (changed("b", data_offsets=[22, 32]), "tensor b at byte .* overlaps tensor a"),
        (changed("b", shape=[4], data_offsets=[26, 34]), "tensor b at byte .* leaves a hole behind tensor a"),
        (changed("b", shape=[4], data_offsets=[24, 32]), "tensor empty at byte .* leaves a hole behind tensor b"),
        (changed("empty", data_offsets=[3, 3]), "tensor empty at byte .*|tensor a .* overlaps"),
        ({"b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]}}, "tensor b at byte .* a hole behind the header"),
        ({"a": VALID["a"]}, "10 bytes follow tensor a"),
    ],
)
def test_a_hostile_header(tmp_path, header, told):
    file = write(tmp_path / "x", header)
    with pytest.raises(ShapecheckError, match=f"^{re.escape(str(file))} is not a valid .safetensors file: .*({told})"):
        read_table([file])


def test_what_is_no_file_of_tensors(tmp_path):
    pointer = tmp_path / "pointer"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ShapecheckError, match=r"pointer is a Git LFS pointer, .*git lfs pull"):
        read_table([pointer])
    with pytest.raises(ShapecheckError, match="is not a regular file"):
        read_table([tmp_path])
    with pytest.raises(ShapecheckError, match=r"cannot read .*absent: No such file"):
        read_table([tmp_path / "absent"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ShapecheckError, match="pipe is not a regular file"):
        read_table([tmp_path / "pipe"])


values = st.sampled_from([0, 1, 2, 3, 4, 10, 24, 34, -1, 2**62, 2**64, 1.0, True, None, "F32", "BF16", "I8", "", [], [0, 24]])
paths = st.sampled_from(
    [(name, *rest) for name in "ab" for rest in ((), ("dtype",), ("shape", 0), ("data_offsets", 0), ("data_offsets", 1))]
)
damage = st.tuples(st.integers(0, 250), st.integers(0, 255))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(paths, values), max_size=3), st.lists(damage, max_size=2))
def test_what_is_accepted_is_what_the_library_accepts(folder, edits, damages):
    header = json.loads(json.dumps(VALID))
    for (*way, last), value in edits:
        place = header
        for step in way:
            place = place[step] if isinstance(place, dict) and step in place else {}
        if isinstance(place, dict) or (isinstance(place, list) and isinstance(last, int) and last < len(place)):
            place[last] = value
    file = write(folder / "mutated.safetensors", header)
    data = bytearray(file.read_bytes())
    for position, byte in damages:
        data[position % len(data)] = byte
    file.write_bytes(data)
    try:
        with safe_open(file, "np") as opened:
            expected = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.offset_keys()}
    except SafetensorError:
        expected = None
    try:
        found = {name: stored.shape for name, stored in read_table([file]).items()}
    except ShapecheckError as error:
        found = None
        if (
            expected is not None
        ):  # only where the library keeps the last of two keys, reads a dtype PyTorch lacks, or a bare list
            assert re.search("given twice|is not known|expected an object", str(error))
    assert found is None or found == expected


def test_every_dtype_is_one_of_pytorch_and_of_the_library():
    for code, (name, itemsize) in DTYPES.items():
        assert getattr(torch, name).itemsize == itemsize, code


# fitting them to a model


TABLE = {name: TensorLocation(Path("m.safetensors"), 0, 24, "float32", (2, 3)) for name in "abc"}
WANTED = dict.fromkeys("abc", (2, 3))


def test_what_fits_comes_in_the_order_it_was_asked_for():
    assert list(match_tensors(TABLE, dict(reversed(WANTED.items())))) == ["c", "b", "a"]
    assert match_tensors(TABLE, {"b": (2, 3)}, ignore=["a", "c", "d"]) == {"b": TABLE["b"]}


def test_all_that_does_not_fit_is_told_at_once():
    with pytest.raises(ShapecheckError) as error:
        match_tensors(TABLE, {"a": (3, 2), "c": (2, 3, 1), "x": (1,), "y": ()})
    assert str(error.value).splitlines() == [
        "the weights in m.safetensors do not fit the model:",
        "  2 missing: x, y",
        "  1 not in the model: b",
        "  2 of another shape: a is 2×3, expected 3×2, c is 2×3, expected 2×3×1",
        "  are config.json and weights of the same model, and is nothing of the checkpoint missing?",
    ]


def test_ten_of_many_are_told():
    with pytest.raises(ShapecheckError, match=r"  14 missing: n0, n1, .*, n9, and 4 more\n") as error:
        match_tensors({}, {f"n{number}": () for number in range(14)})
    assert "n10" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("unet.down_blocks.0.lora_A.weight", "this is a LoRA"),
        ("lora_unet_down_blocks_0.alpha", "this is a LoRA"),
        ("model.diffusion_model.out.0.bias", "from_single_file"),
        ("control_model.input_hint_block.0.bias", "from_single_file"),
        ("mid_block.attentions.0.proj_attn.weight", "names of old diffusers versions"),
        ("\x1b[2J", r"1 not in the model: \\x1b"),
    ],
)
def test_the_advice_follows_the_names(name, told):
    with pytest.raises(ShapecheckError, match=told):
        match_tensors({**TABLE, name: TABLE["a"]}, WANTED)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_a_fault_planted_in_a_real_unet(tmp_path, fault):
    model = unet()
    model.save_pretrained(tmp_path)
    wanted = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    if fault == "missing":
        wanted["mid_block.another.weight"] = (4,)
    elif fault == "extra":
        del wanted["conv_in.bias"]
    else:
        wanted["conv_in.weight"] = (8, 4, 3, 5)
    told = {"missing": "mid_block.another.weight", "extra": "conv_in.bias", "shape": "conv_in.weight is 8×4×3×3, .* 8×4×3×5"}
    with pytest.raises(ShapecheckError, match=f"1 .*: {told[fault]}"):
        match_tensors(read_table(checkpoint_files(tmp_path)), wanted)


# linking


def runs(model: Path, stored: TensorLocation, place: str) -> bool:
    """Whether onnx.checker and ONNX Runtime take an ONNX file with these weights, and read the right values."""
    weight = onnx.TensorProto(name="w", data_type=1, dims=stored.shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", str(stored.offset)), ("length", str(stored.nbytes))):
        weight.external_data.add(key=key, value=value)
    x, y = (onnx.helper.make_tensor_value_info(name, 1, stored.shape) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    (got,) = session.run(None, {"x": np.zeros(stored.shape, np.float32)})
    return got.tobytes() == held(stored)


@pytest.fixture
def layout(tmp_path):
    """`root` for the ONNX file, `root/below` and `elsewhere` with weights, and every kind of link between them."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for place in (root / "below", elsewhere):
        place.mkdir(parents=True)
        value = 5.0 if place == elsewhere else 6.0
        save_file({"pad": torch.ones(3), "w": torch.tensor([[1.0, 2.0], [3.0, value]])}, place / "m.safetensors")
    shutil.copy(elsewhere / "m.safetensors", root / "m.safetensors")
    shutil.copy(elsewhere / "m.safetensors", root / "single.safetensors")
    os.link(root / "single.safetensors", root / "hard.safetensors")
    (root / "out.safetensors").symlink_to(elsewhere / "m.safetensors")
    (root / "in.safetensors").symlink_to("m.safetensors")
    (root / "blob.safetensors").symlink_to("below/m.safetensors")
    (root / "dir").symlink_to(elsewhere)
    (tmp_path / "alias").symlink_to(root)
    return tmp_path


LINKS = pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")


@LINKS
@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("root/m.safetensors", None),
        ("root/below/m.safetensors", None),
        ("alias/below/m.safetensors", None),
        ("elsewhere/../root/m.safetensors", None),
        ("elsewhere/m.safetensors", "is not in or below .*root, .* an output that works is .*elsewhere/model.onnx"),
        ("root/dir/m.safetensors", "dir is a symbolic link.*"),
        ("root/out.safetensors", "out.safetensors is a symbolic link, .* --local-dir"),
        ("root/in.safetensors", "in.safetensors is a symbolic link"),
        ("root/blob.safetensors", "blob.safetensors is a symbolic link"),
        ("root/hard.safetensors", "hard.safetensors has 2 names"),
    ],
)
def test_linkable_is_what_checker_and_runtime_take(layout, monkeypatch, file, told):
    stored = read_table([layout / file])["w"]
    root = layout / "root"
    if told is None:
        require_linkable([stored], root)
        place = format_location(stored, root)
        assert place == ("below/m.safetensors" if "below" in file else "m.safetensors")
        assert runs(root / "model.onnx", stored, place)
        monkeypatch.chdir(root)
        require_linkable([stored], Path())
        assert format_location(stored, Path()) == place
        return
    with pytest.raises(ShapecheckError, match=told):
        require_linkable([stored], root)
    place = os.path.relpath(stored.file, root).replace(os.sep, "/")
    assert not runs(root / "model.onnx", stored, place)


@LINKS
def test_a_way_back_is_not_part_of_the_location(layout):
    stored = read_table([layout / "root/below/../m.safetensors"])["w"]
    require_linkable([stored], layout)
    assert format_location(stored, layout) == "root/m.safetensors"


@LINKS
@pytest.mark.parametrize("file", ["elsewhere/m.safetensors", "root/dir/m.safetensors"])
def test_the_output_that_is_offered_works(layout, file):
    stored = read_table([layout / file])["w"]
    (layout / "onnx").mkdir()
    for folder in (layout / "onnx", layout / "root"):
        with pytest.raises(ShapecheckError) as error:
            require_linkable([stored], folder)
        offered = Path(str(error.value).rpartition(" ")[2])
        require_linkable([stored], offered.parent)
        assert runs(offered, stored, format_location(stored, offered.parent))


@LINKS
def test_no_output_is_offered_where_none_works(layout):
    (layout / "other").mkdir()
    (layout / "other/m.safetensors").symlink_to(layout / "elsewhere/m.safetensors")
    stored = read_table([layout / "other/m.safetensors"])["w"]
    with pytest.raises(ShapecheckError, match=r"name the model by its real folder, .*elsewhere, and write there$"):
        require_linkable([stored], layout / "root")


def test_location_says_where_it_is_not(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / "a").mkdir()
    with pytest.raises(ShapecheckError, match=r"m.safetensors is not in or below .*a, "):
        format_location(read_table([tmp_path / "m.safetensors"])["w"], tmp_path / "a")
    with pytest.raises(ShapecheckError, match=r"cannot read .*absent: No such file"):
        require_linkable(read_table([tmp_path / "m.safetensors"]).values(), tmp_path / "absent")


# copying


@few
@given(checkpoints, st.sampled_from([None, "float32", "float16", "bfloat16"]), st.booleans())
def test_a_copy_is_what_pytorch_converts(folder, expected, dtype, live):
    file, target = folder / "source.safetensors", folder / "copied.data"
    save_file(expected, file)
    before = file.read_bytes()
    seen = []
    placed = copy_tensors(expected if live else read_table([file]), dtype, target, lambda *each: seen.append(each))
    assert file.read_bytes() == before
    assert placed.keys() == expected.keys()
    end = 0
    for name, stored in placed.items():
        own = expected[name]
        wanted = own.to(getattr(torch, dtype)) if dtype and own.is_floating_point() else own
        assert (stored.file, stored.dtype, stored.shape) == (target, str(wanted.dtype)[6:], tuple(own.shape))
        assert held(stored) == raw(wanted)
        assert stored.offset % 64 == 0
        assert end <= stored.offset < end + 64
        end = stored.offset + stored.nbytes
    assert target.stat().st_size == end or not placed[name].nbytes
    total = sum(stored.nbytes for stored in placed.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def larger_than_a_chunk() -> torch.Tensor:
    """Eight MiB are held at a time; this one ends in the middle of the third."""
    return torch.randn(5, 2**20 + 11)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("live", [True, False])
def test_a_tensor_larger_than_a_chunk_is_copied_whole(tmp_path, dtype, live):
    expected = {"large": larger_than_a_chunk(), "small": torch.randn(3)}
    save_file(expected, tmp_path / "m.safetensors")
    seen = []
    source = expected if live else read_table([tmp_path / "m.safetensors"])
    placed = copy_tensors(source, dtype, tmp_path / "w.data", lambda *each: seen.append(each))
    assert {name: held(each) for name, each in placed.items()} == {
        name: raw(each.to(torch.bfloat16) if dtype else each) for name, each in expected.items()
    }
    assert len(seen) == len({done for done, _ in seen}) == 5


def test_live_tensors_in_any_layout_are_copied(tmp_path):
    base = torch.randn(4, 6, 3, 5)
    live = {
        "channels last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 2),
        "sliced": base[1:3, ::2],
        "expanded": base[:1].expand(7, 6, 3, 5),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    placed = copy_tensors(live, None, tmp_path / "w.data", quiet)
    assert find_differing(placed, live) == ()
    assert digest(placed) == digest(live) == digest({name: each.detach().contiguous() for name, each in live.items()})


@pytest.fixture
def source(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    save_file({f"t{number}": torch.randn(100, 100) for number in range(5)}, tmp_path / "model/m.safetensors")
    return read_table([tmp_path / "model/m.safetensors"])


@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_full_disk_leaves_nothing(tmp_path, source, before):
    target = tmp_path / "out/w.data"
    if before:
        target.write_bytes(before)

    def fill_the_disk(done, total):
        if done > 40_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ShapecheckError, match=r"cannot write .*w.data: No space left on device; it needs 0.00 GB"):
        copy_tensors(source, "float16", target, fill_the_disk)
    assert [each.read_bytes() for each in (tmp_path / "out").iterdir()] == [before] * bool(before)


def test_a_file_the_system_will_not_let_grow_leaves_nothing(tmp_path, source):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ShapecheckError, match=r"cannot write .*w.data: File too large"):
            copy_tensors(source, None, tmp_path / "out/w.data", quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [0, 80_000, 200_000])
def test_an_interruption_leaves_nothing(tmp_path, source, kind, at):
    def interrupt(done, total):
        if done == at:
            assert list((tmp_path / "out").iterdir()), "it is written where it will be, to be renamed"
            assert not (tmp_path / "out/w.data").exists()
            raise kind

    with pytest.raises(kind):
        copy_tensors(source, None, tmp_path / "out/w.data", interrupt)
    assert not list((tmp_path / "out").iterdir())


def test_a_source_cut_short_meanwhile_leaves_nothing(tmp_path, source):
    os.truncate(tmp_path / "model/m.safetensors", 150_000)
    with pytest.raises(ShapecheckError, match=r"m.safetensors was cut short after its header was read"):
        copy_tensors(source, None, tmp_path / "out/w.data", quiet)
    (tmp_path / "model/m.safetensors").unlink()
    with pytest.raises(ShapecheckError, match=r"cannot read .*m.safetensors: No such file"):
        copy_tensors(source, None, tmp_path / "out/w.data", quiet)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("target", "dtype", "told"),
    [
        ("absent/w.data", None, "no folder .*absent"),
        ("out", None, "it is a folder"),
        ("model/m.safetensors", None, "it is the checkpoint itself"),
        ("model/link", "float16", "it is the checkpoint itself"),
        ("out/w.data", "int8", "int8 is not a floating dtype"),
        ("out/w.data", "float31", "float31 is not a dtype of this PyTorch"),
        ("out/w.data", "nn", "nn is not a dtype"),
    ],
)
def test_a_copy_that_cannot_be(tmp_path, source, target, dtype, told):
    os.link(tmp_path / "model/m.safetensors", tmp_path / "model/link")
    before = (tmp_path / "model/m.safetensors").read_bytes()
    with pytest.raises(ShapecheckError, match=told):
        copy_tensors(source, dtype, tmp_path / target, quiet)
    assert (tmp_path / "model/m.safetensors").read_bytes() == before
    assert sorted(each.name for each in (tmp_path / "model").iterdir()) == ["link", "m.safetensors"]
    assert not list((tmp_path / "out").iterdir())


def test_tensors_without_values_are_refused(tmp_path):
    with pytest.raises(ShapecheckError, match="meta device"):
        copy_tensors({"a": torch.empty(2, device="meta")}, None, tmp_path / "w.data", quiet)
    assert not list(tmp_path.iterdir())


# telling weights apart


@few
@given(checkpoints)
def test_the_digest_follows_content_alone(folder, expected):
    one, other = folder / "one.safetensors", folder / "other.data"
    save_file(expected, one)
    table = read_table([one])
    oracle = hashlib.sha256()
    for name, tensor in sorted(expected.items()):
        oracle.update(json.dumps([name, str(tensor.dtype)[6:], list(tensor.shape)]).encode() + b"\n" + raw(tensor))
    reordered = dict(sorted(expected.items(), reverse=True))
    found = {digest(table), digest(expected), digest(reordered), digest(copy_tensors(reordered, None, other, quiet))}
    assert found == {f"sha256:{oracle.hexdigest()}"}


def test_shards_have_the_digest_of_the_single_file(tmp_path):
    for size in ("10GB", "100KB"):
        unet().save_pretrained(tmp_path / size, max_shard_size=size)
    assert len({digest(read_table(checkpoint_files(tmp_path / size))) for size in ("10GB", "100KB")}) == 1


BASE = {"a": torch.tensor([[1.0, float("nan")], [0.0, -2.0]]), "b": torch.arange(3), "c": torch.zeros(0, 2)}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ()),
        ({"a": BASE["a"].clone()}, ()),
        ({"a": torch.nn.Parameter(BASE["a"].t().contiguous().t())}, ()),
        ({"a": torch.tensor([[1.0, float("nan")], [-0.0, -2.0]])}, ("a",)),
        ({"a": torch.nextafter(BASE["a"], torch.tensor(9.0))}, ("a",)),
        ({"a": BASE["a"].t()}, ("a",)),
        ({"a": BASE["a"].reshape(4)}, ("a",)),
        ({"a": BASE["a"].double()}, ("a",)),
        ({"a": BASE["a"].view(torch.int32)}, ("a",)),
        ({"b": BASE["b"].int()}, ("b",)),
        ({"b": BASE["b"] + 1, "a": -BASE["a"]}, ("a", "b")),
        ({"c": torch.zeros(0, 3)}, ("c",)),
        ({"new": torch.ones(1)}, ("new",)),
    ],
)
def test_what_differs_from_the_file_is_named(tmp_path, change, names):
    save_file(BASE, tmp_path / "m.safetensors")
    table = read_table([tmp_path / "m.safetensors"])
    live = BASE | change
    assert find_differing(table, live) == names
    assert (digest(table) == digest(live)) == (not names)
    assert find_differing(table, {name: each for name, each in live.items() if name != "b"})[-1] == "b"
    assert (digest_live(BASE) == digest_live(live)) == (not names)


def test_threads_give_weights_in_memory_one_identity_whatever_their_layout_and_order():
    live = {f"layer{number}": torch.randn(3, 4, 5, 6) for number in range(20)}
    told = []
    found = digest_live(live, lambda done, total: told.append((done, total)))
    assert told[-1] == (20 * 360 * 4, 20 * 360 * 4) and len(told) == 20
    laid_out = {name: value.to(memory_format=torch.channels_last) for name, value in reversed(live.items())}
    assert digest_live(laid_out) == found
    swapped = live | {"layer3": live["layer4"], "layer4": live["layer3"]}
    assert digest_live(swapped) != found != digest_live({f"net.{name}": value for name, value in live.items()})
    live["layer7"][2, 3, 4, 5] *= -1
    assert digest_live(live) != found


@pytest.mark.gpu
def test_weights_on_a_gpu_have_the_identity_that_they_have_on_the_cpu():
    shapes = [(3, 4, 5, 6), (0, 2), (), (2**22 + 3,), (64, 32, 3, 3)]
    live = {f"layer{number}": torch.randn(shape).half() for number, shape in enumerate(shapes)}
    live["layer4"] = live["layer4"].to(memory_format=torch.channels_last)
    assert digest_live({name: value.cuda() for name, value in live.items()}) == digest_live(live)


def test_one_bit_in_the_last_chunk_is_seen(tmp_path):
    tensor = larger_than_a_chunk()
    save_file({"a": tensor}, tmp_path / "m.safetensors")
    table = read_table([tmp_path / "m.safetensors"])
    assert find_differing(table, {"a": tensor}) == ()
    tensor.view(torch.int32)[-1, -1] ^= 1
    assert find_differing(table, {"a": tensor}) == ("a",)


def test_a_live_module_against_its_checkpoint(tmp_path):
    model = unet()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = checkpoint_files(tmp_path)
    before = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    table = read_table(files)
    assert find_differing(table, model.state_dict()) == ()
    with torch.no_grad():
        model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight += 1e-3  # as a fused LoRA does
    assert find_differing(table, model.state_dict()) == ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",)
    copy_tensors(table, "float16", tmp_path / "w.data", quiet)
    assert [hashlib.sha256(file.read_bytes()).digest() for file in files] == before
    assert load_file(files[0]).keys() <= table.keys()


def test_embedded_weights_are_equal_by_value_and_those_in_files_bit_by_bit(tmp_path):
    zero, live = torch.zeros(3), -torch.zeros(3)
    data = zero.numpy().tobytes()
    (tmp_path / "w").write_bytes(data)
    assert is_equal(Embedded(data, "float32", (3,)), live)
    assert not is_equal(Embedded(data, "float32", (3,)), live + 1)
    assert not is_equal(TensorLocation(tmp_path / "w", 0, 12, "float32", (3,)), live)
