"""SD1.5 and SDXL at their real sizes: memory of an export, bytes written, numbers beside PyTorch's; SD1.5 as an engine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import full_size
import pytest
from peak import peak_of

from shapecheck import Geometry, read_contract
from shapecheck.contract.engine_files import read_engine
from shapecheck.contract.exported import Exported
from shapecheck.verify import agreement

pytestmark = pytest.mark.full

CASES = {
    "sd15": ("100GB", 700e6, 10e6, [Geometry(1, 64, 64), Geometry(3, 33, 41, 11), Geometry(2, 65, 97)]),
    "sdxl": ("5GB", 1.0e9, 25e6, [Geometry(2, 17, 25, 11)]),
}


def run(*arguments: str) -> int:
    """Run shapecheck; peak resident bytes of the process."""
    return peak_of("-m", "shapecheck", *arguments)[1]


def test_a_peak_is_that_of_the_command_and_not_of_the_tests():
    held = b"1" * 2**28  # which a process started from here would inherit
    assert peak_of("-c", "print('done')")[0] == "done\n"
    assert peak_of("-c", "pass")[1] < len(held) / 4
    assert peak_of("-c", "b'1' * 2**28")[1] > len(held)


def digests(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").digest()
    return found


@pytest.mark.parametrize("preset", sorted(CASES))
def test_a_linked_file_is_small_made_in_little_memory_and_right(preset, tmp_path):
    shards, memory, size, geometries = CASES[preset]
    process = [sys.executable, str(Path(full_size.__file__)), preset, str(tmp_path), shards]
    subprocess.run(process, check=True, capture_output=True)  # the weights must not stay in this process
    before = digests(tmp_path / "unet")
    assert len(before) == {"sd15": 1, "sdxl": 3}[preset]
    output = tmp_path / "unet.onnx"
    export = ("export", str(tmp_path), "-o", str(output), "--weights", "link")
    peak = run(*export)
    print(f"{preset}: peak {peak / 2**20:.0f} MiB, {output.stat().st_size / 1e6:.2f} MB written")
    assert peak <= memory
    assert output.stat().st_size <= size
    assert sorted(each.name for each in tmp_path.iterdir()) == ["unet", "unet.onnx"]
    exported = Exported(output, read_contract(output), "link", "", (output,), "float32", 20, "shapecheck")
    found = agreement.verify(exported, str(tmp_path), geometries=geometries)
    print(*(f"{each.geometry}: {each.difference:.2e}" for each in found), sep="\n")
    assert [each.geometry for each in found] == geometries
    assert all(each.agrees for each in found)  # 7e-7 to 3e-6, as the processor has it
    assert digests(tmp_path / "unet") == before
    if preset == "sd15":
        is_built(output)


def is_built(file: Path) -> None:
    """By TensorRT for RTX, for a range of sizes, from weights that are linked."""
    sizes = ("--sizes", "512x512:512x512:904x768", "--batch", "1:2:2")
    plan = file.with_suffix(".plan")
    peak = run("build", str(file), "-o", str(plan), *sizes, "--target", "rtx", "--compute-capability", "8.9")
    print(f"engine: peak {peak / 2**20:.0f} MiB, {plan.stat().st_size / 1e6:.0f} MB")
    assert plan.stat().st_size > 1e9
    run("check", str(plan), "--controlnet", "sd15", "--size", "904x768", "--weights", str(file))
    assert read_engine(plan).request.weights == read_engine(plan).request.checkpoint
