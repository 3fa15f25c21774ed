"""The search for the first value inside a file that is not PyTorch's, once an image is not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shapecheck.contract import ShapecheckError
from shapecheck.observe.subject import TorchModel
from shapecheck.onnx.intermediate_values import Inner
from shapecheck.parity.artefacts import ParityFile
from shapecheck.parity.cases import ForwardCase, InputGenerator
from shapecheck.parity.divergence import RunMarked, Source, compute_inner, find_divergence
from shapecheck.parity.metrics import reference_device
from shapecheck.parity.reference import ASSUMED_ERROR
from shapecheck.parity.results import Divergence
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.onnx_session import PROVIDERS
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Range

_QUICK = 500_000_000
"""An engine of more bytes takes minutes to build: SD1.5's, of 1.7 GB, four on an H200."""


def search_file(
    model: TorchModel,
    file: ParityFile,
    generate: InputGenerator,
    case: ForwardCase,
    backend: str,
    precision: str,
    *,
    tolerance_factor: float,
    folder: Path | None,
) -> tuple[Divergence | None, tuple[str, ...]]:
    """Return the first value that differs from PyTorch's in a call, and notes on whatever else the search shows.

    An engine shows no values inside. It is built again from its ONNX file with those values as outputs; if that cannot be done
    or would take minutes, the ONNX file is searched in ONNX Runtime in its place. A note says either. `precision` is the
    reference's; what Polygraphy needs to show the same is written to `folder`.
    """
    contract, graph = file.contract, file.graph
    assert graph is not None
    inputs = generate(case, expanded=False)
    if precision == contract.dtype and model.calibration is None:
        tolerance_factor *= ASSUMED_ERROR / torch.finfo(torch.float32).eps

    def load_source(dtype: str, *, rounds: bool) -> Source:
        def compute(values: Sequence[Inner]) -> Mapping[str, Tensor]:
            module = model.load(dtype).to(reference_device())
            if rounds:
                model.round(module, contract)
            return compute_inner(module, contract, inputs, values)

        return compute

    # Each way to search, best first: the provider, what runs, and what to say of a find and of none.
    fused = "every value inside agrees when it is an output too: what is computed differently then is at fault"
    ways: list[tuple[str, RunMarked | None, str, str]] = [(backend, None, "", f"{fused}, such as a fusion")]
    if backend not in PROVIDERS:
        source = f"{graph}, which the engine was built from"
        same, local = f"every value inside agrees in {source}", "in ONNX Runtime on the CPU"
        fused = f"{same}, when it is built with its values as outputs: a fusion may be at fault"
        ways = [
            ("ort", partial(_run_rebuilt, file, case), f"found in {source}, built again with marked outputs", fused),
            ("ort", None, f"found in {source}, {local}", f"{same}, {local}: the engine itself differs"),
        ]
    failures: list[str] = []
    if file.record is not None and file.record.size > _QUICK:
        failures.append("the engine is not built again with its values as outputs: that takes minutes at its size")
        del ways[0]
    for provider, run, note, agreeing in ways:
        try:
            divergence = find_divergence(
                graph,
                contract,
                file.names_in_graph,
                file.give(generate, case),
                load_source(precision, rounds=False),
                load_source(contract.dtype, rounds=True),
                tolerance_factor=tolerance_factor,
                dtype=getattr(torch, contract.dtype),
                backend=provider,
                run=run,
                folder=folder,
            )
        except (ShapecheckError, OSError) as error:
            failures.append(f"where it differs could not be found: {error}")
            continue
        return (replace(divergence, note=note), tuple(failures)) if divergence else (None, (*failures, agreeing))
    return None, tuple(failures)


def _run_rebuilt(file: ParityFile, case: ForwardCase, marked: bytes, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Run an engine built from marked bytes for the size of the call."""
    assert file.record is not None
    assert file.graph is not None
    path = file.graph.path
    source = path.with_name(f".shapecheck.{os.getpid()}.marked.onnx")  # beside the ONNX file, where external weights are found
    with tempfile.TemporaryDirectory(prefix=".shapecheck-", dir=path.parent) as folder:
        try:
            source.write_bytes(marked)
            sizes, plan = Range(case.geometry, case.geometry, case.geometry), Path(folder) / "marked.plan"
            options = file.record.request.options
            built = build_engine(source, plan, profiles=sizes, contract=file.contract, options=options)
        finally:
            source.unlink(missing_ok=True)
        with EngineSession.open(built.path) as session:
            outputs = session({name: value.cuda() for name, value in inputs.items()})
            return {name: value.cpu() for name, value in outputs.items()}
