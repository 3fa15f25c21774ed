"""Engines for tests: small real UNets as ONNX files that hold their contract, to be built by TensorRT for RTX without a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_files

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


def sealed(path: Path, contract: Contract) -> Path:
    """Write the contract into an ONNX file."""
    model = onnx.load(path)
    model.metadata_props.add(key=CONTRACT, value=contract.to_json())
    onnx.save(model, path)
    return path
