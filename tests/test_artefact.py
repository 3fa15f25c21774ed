"""Contracts read back from what was made with them."""

from __future__ import annotations

import json
import os

import onnx
import pytest
import small

from shapecheck import ShapecheckError, presets
from shapecheck.artefact import may_hold_contract, read_contract, resolve_contract
from shapecheck.onnx.file import CONTRACT_KEY

CONTRACT = presets.contract("sd15")


@pytest.fixture
def bare(tmp_path):
    """An ONNX file of one node, without metadata."""
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
    graph.output[0].name = "y"
    onnx.save(onnx.helper.make_model(graph), tmp_path / "unet.onnx")
    return tmp_path / "unet.onnx"


def test_a_controlnet_has_a_contract_where_one_may_be_named(tmp_path):
    small.controlnet(small.unet(**small.TINY)).save_pretrained(tmp_path)
    with pytest.raises(ShapecheckError, match="ControlNet"):
        resolve_contract(str(tmp_path), progress=print)
    contract = resolve_contract(str(tmp_path), controlnet=True, progress=print)
    assert (contract.role, len(contract.slots)) == ("controlnet", 3)
    assert [base.name for base in contract.inputs][3:] == ["controlnet_cond", "conditioning_scale"]


def test_contracts_are_read_from_json(tmp_path):
    saved = tmp_path / "contract.json"
    for prefix in ("", "\ufeff", "\n\n"):
        saved.write_text(prefix + CONTRACT.to_json(), encoding="utf-8")
        assert read_contract(saved) == read_contract(str(saved)) == CONTRACT


def test_contracts_are_read_from_the_metadata_of_an_onnx_file(bare):
    model = onnx.load(bare)
    model.metadata_props.add(key=CONTRACT_KEY, value=CONTRACT.to_json())
    onnx.save(model, bare)
    assert read_contract(bare) == CONTRACT


def test_contracts_are_read_beside_an_engine(tmp_path):
    engine, beside = tmp_path / "unet.plan", tmp_path / "unet.plan.shapecheck.json"
    engine.write_bytes(b"ftrt")
    with pytest.raises(ShapecheckError, match=r"unet\.plan has no unet\.plan\.shapecheck\.json beside it"):
        read_contract(engine)
    for inner in (CONTRACT.to_json(), json.loads(CONTRACT.to_json())):
        beside.write_text(json.dumps({"contract": inner}), encoding="utf-8")
        assert read_contract(engine) == read_contract(beside) == CONTRACT


def test_a_file_without_a_contract_says_how_to_look_at_it(bare):
    with pytest.raises(ShapecheckError, match=r"unet\.onnx holds no contract .*`shapecheck check"):
        read_contract(bare)


def test_what_may_hold_a_contract_is_told_from_a_config(tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}", encoding="utf-8")
    assert not may_hold_contract(config)
    assert not may_hold_contract(tmp_path)
    config.write_text(CONTRACT.to_json(), encoding="utf-8")
    assert may_hold_contract(config)
    assert may_hold_contract(tmp_path / "missing.onnx")


BAD = {
    "empty": (b"", "is not an ONNX model"),
    "text": (b"hello, this is no model at all", "is not an ONNX model"),
    "noise": (bytes(range(256)) * 40, "is not an ONNX model"),
    "long number": (b"\xff" * 30, "is not an ONNX model"),
    "huge length": (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x3f", "is not an ONNX model"),
    "no graph": (b"\x08\x08", "is not an ONNX model"),
    "json": (b'{"a": 1}', "no key 'shapecheck_contract'"),
    "torn json": (b'{"shapecheck_contract": 1, "digest"', "is not valid JSON"),
    "deep json": (b'{"contract": ' + b"[" * 100_000, "is not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', "is not UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD)
def test_hostile_files_are_refused_with_their_name(case, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(BAD[case][0])
    with pytest.raises(ShapecheckError, match=r"bad\.onnx") as caught:
        read_contract(path)
    assert BAD[case][1] in str(caught.value)


def test_a_folder_and_nothing_at_all_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.onnx", tmp_path / "none.plan"):
        with pytest.raises(ShapecheckError, match=str(path)):
            read_contract(path)


@pytest.mark.parametrize("name", ["pipe", "pipe.onnx", "pipe.json"])
def test_nothing_waits_for_a_pipe(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ShapecheckError, match="is not a regular file"):
        resolve_contract(str(tmp_path / name), progress=str)
    with pytest.raises(ShapecheckError, match="is not a regular file"):
        read_contract(tmp_path / name)


def test_a_contract_has_its_limit_in_a_plain_file_too(tmp_path):
    record = json.loads(CONTRACT.to_json())
    record["header"]["notes"] = ["n" * 5 * 2**20]
    for name, value in (("plain.json", record), ("record.json", {"contract": record})):
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
        with pytest.raises(ShapecheckError, match="more than the 4194304 allowed"):
            read_contract(tmp_path / name)
