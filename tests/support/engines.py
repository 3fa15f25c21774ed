"""Engines for tests: small real UNets as ONNX files that hold their contract, to be built by TensorRT for RTX without a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_files
from torch import nn

from shapecheck import Contract, Geometry
from shapecheck.contract.engine import BuildOptions
from shapecheck.contract.metadata import CONTRACT
from shapecheck.contract.profiles import Range

RTX = BuildOptions("rtx", compute_capabilities=("8.9",))
SIZES = Range(Geometry(1, 8, 9), Geometry(2, 17, 25), Geometry(3, 33, 41))


def exported(path: Path, config: dict, *, latent: tuple[int, int] = (17, 25)) -> tuple[Path, Contract]:
    """A small real UNet as one ONNX file with its weights and contract inside; in a second, where `export` takes ten."""
    path, contract = onnx_files.exported(path, config, latent=latent)
    return sealed(path, contract), contract


def exported_quickly(unet: nn.Module, path: Path, *, weights: str, progress: object) -> None:
    """Stands in for `export` of a UNet at 9×13 cells, which takes a minute: torch's older exporter, an empty file of data."""
    assert weights == "copy"
    _, contract = onnx_files.written(path, unet, latent=(9, 13))
    sealed(path, contract)
    path.with_name(f"{path.name}.data").touch()


def sealed(path: Path, contract: Contract) -> Path:
    """Write the contract into an ONNX file."""
    model = onnx.load(path)
    model.metadata_props.add(key=CONTRACT, value=contract.to_json())
    onnx.save(model, path)
    return path
