"""Large models: memory of an export, bytes written, numbers beside PyTorch's; SD1.5 and SDXL at their real sizes by night."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import exports
import full_size
import pytest
import small
from peak import peak_of

from shapecheck import Geometry, read_contract
from shapecheck.onnx.records import Exported
from shapecheck.parity.export_check import verify_export
from shapecheck.tensorrt.record import read_engine

CASES = {
    "sd15": ("100GB", 350e6, 10e6, [Geometry(1, 64, 64), Geometry(3, 33, 41, 11), Geometry(2, 65, 97)]),
    "sdxl": ("5GB", 650e6, 25e6, [Geometry(2, 17, 25, 11)]),
}
"""How weights are split; the most bytes that an export may add to its libraries in memory, and write; sizes to compare at."""
LIBRARIES = "import diffusers, onnx, onnx_ir, onnxscript, torch, shapecheck.onnx.export; diffusers.UNet2DConditionModel"
"""What an export loads before it begins: what that takes is PyTorch's affair, and a build for CUDA takes half a GB more."""
VERIFIER = "import diffusers, onnxruntime, shapecheck.parity.run; diffusers.UNet2DConditionModel"
"""Likewise what compares its numbers."""


def measure_export(folder: Path, output: Path) -> float:
    """Export a model folder with its weights linked, in a process; return the bytes its peak is above that of the libraries."""
    held = peak_of("-c", LIBRARIES)[1]
    _, peak = peak_of("-m", "shapecheck", "export", str(folder), "-o", str(output), "--weights", "link")
    print(
        f"libraries {held / 1e6:.0f} MB, export {(peak - held) / 1e6:.0f} MB more, {output.stat().st_size / 1e6:.2f} MB written"
    )
    assert held > 1e8
    return peak - held


@pytest.mark.full
def test_a_peak_is_that_of_the_command_and_not_of_the_tests():
    held = b"1" * 2**28  # which a process started from here would inherit
    assert peak_of("-c", "print('done')")[0] == "done\n"
    assert peak_of("-c", "pass")[1] < len(held) / 4
    assert peak_of("-c", "b'1' * 2**28")[1] > len(held)


def hash_weights(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").digest()
    return found


@pytest.mark.full
def test_linking_wide_layers_loads_no_weights_and_writes_none(tmp_path):
    """Few layers, as wide as SDXL's: half a GB of weights under a graph that is traced in seconds."""
    small.unet(**exports.LEAST | {"block_out_channels": (1024,)}).save_pretrained(tmp_path / "unet")
    before = hash_weights(tmp_path / "unet")
    (checkpoint,) = (tmp_path / "unet" / name for name in before)
    weights = checkpoint.stat().st_size
    assert weights > 4e8
    output = tmp_path / "unet.onnx"
    assert measure_export(tmp_path, output) <= weights / 3  # 105 MB, all of it the graph and its making
    assert output.stat().st_size <= 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet", "unet.onnx"]
    assert hash_weights(tmp_path / "unet") == before
    job = {
        "model": str(tmp_path),
        "onnx": str(output),
        "factor": 10,
        "sizes": [(1, 9, 14, 7)],
        "variant": None,
        "offline": True,
    }
    found, peak = peak_of("-m", "shapecheck.parity.export_check", json.dumps(job))
    more = peak - peak_of("-c", VERIFIER)[1]
    print(f"comparing its numbers takes {more / 1e6:.0f} MB more than its libraries")
    assert more <= 1.3 * weights  # of one side at a time
    ((name, _, difference, allowed),) = json.loads(found.rpartition("shapecheck outputs: ")[2])
    assert (name, difference <= allowed) == ("out_sample", True)


@pytest.mark.nightly
@pytest.mark.parametrize("preset", sorted(CASES))
def test_a_linked_file_is_small_made_in_little_memory_and_right(preset, tmp_path):
    shards, memory, size, geometries = CASES[preset]
    process = [sys.executable, str(Path(full_size.__file__)), preset, str(tmp_path), shards]
    subprocess.run(process, check=True, capture_output=True)  # the weights must not stay in this process
    before = hash_weights(tmp_path / "unet")
    assert len(before) == {"sd15": 1, "sdxl": 3}[preset]
    output = tmp_path / "unet.onnx"
    assert measure_export(tmp_path, output) <= memory
    assert output.stat().st_size <= size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet", "unet.onnx"]
    exported = Exported(output, read_contract(output), "link", "", (output,), "float32", 20, "shapecheck")
    found = verify_export(exported, str(tmp_path), geometries=geometries)
    print(*(f"{each.geometry}: {each.difference:.2e}" for each in found), sep="\n")
    assert [each.geometry for each in found] == geometries
    assert all(each.agrees for each in found)  # 7e-7 to 3e-6, as the processor has it
    assert hash_weights(tmp_path / "unet") == before
    if preset == "sd15":
        check_build(output)


def check_build(file: Path) -> None:
    """Build it with TensorRT for RTX, for a range of sizes, from weights that are linked."""
    sizes = ("--sizes", "512x512:512x512:904x768", "--batch", "1:2:2")
    plan = file.with_suffix(".plan")
    target = ("--target", "rtx", "--compute-capability", "8.9")
    _, peak = peak_of("-m", "shapecheck", "build", str(file), "-o", str(plan), *sizes, *target)
    print(f"engine: peak {peak / 2**20:.0f} MiB, {plan.stat().st_size / 1e6:.0f} MB")
    assert plan.stat().st_size > 1e9
    peak_of("-m", "shapecheck", "check", str(plan), "--controlnet", "sd15", "--size", "904x768", "--weights", str(file))
    assert read_engine(plan).request.weights == read_engine(plan).request.checkpoint
