"""The search for the first value inside a file that is not PyTorch's, once an image is not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shapecheck.contract import ShapecheckError
from shapecheck.observe.subject import TorchModel
from shapecheck.parity.artefacts import ParityFile
from shapecheck.parity.cases import ForwardCase, InputGenerator
from shapecheck.parity.divergence import RunMarked, Source, compute_inner, find_divergence
from shapecheck.parity.reference import ASSUMED_ERROR, to_device
from shapecheck.parity.results import Divergence
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.onnx_session import PROVIDERS
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Range

_FUSED = "every value inside agrees when it is an output too: what is computed differently then is at fault, such as a fusion"


@dataclass(frozen=True, slots=True)
class Search:
    """One file beside the model."""

    model: TorchModel
    file: ParityFile
    generate: InputGenerator
    precision: str
    """Of the reference."""
    tolerance_factor: float
    folder: Path | None
    """Where to write what Polygraphy needs to show the same."""

    def find(self, case: ForwardCase, backend: str) -> tuple[Divergence | None, tuple[str, ...]]:
        """Return the first value that differs in a call, and notes on what was found out otherwise.

        An engine gives no values inside. It is built again from its ONNX file with those values as outputs; where that cannot
        be done, the ONNX file is searched in ONNX Runtime in its place. Either is said.
        """
        failures: list[str] = []
        for provider, run, note, agreeing in self._list_ways(case, backend):
            try:
                found = self._find_first(case, provider, run)
            except (ShapecheckError, OSError) as error:
                failures.append(f"where it differs could not be found: {error}")
                continue
            return (replace(found, note=note), tuple(failures)) if found else (None, (*failures, agreeing))
        return None, tuple(failures)

    def _list_ways(self, case: ForwardCase, backend: str) -> list[tuple[str, RunMarked | None, str, str]]:
        """Return what can be searched, best first: what runs, and what is said of a find and of none."""
        if backend in PROVIDERS:
            return [(backend, None, "", _FUSED)]
        graph = f"{self.file.graph}, which the engine was built from"
        same = f"every value inside agrees in {graph}"
        return [
            (
                "ort",
                partial(self._rebuild, case),
                f"found in {graph}, built again with marked outputs",
                f"{same}, when it is built with its values as outputs: a fusion may be at fault",
            ),
            (
                "ort",
                None,
                f"found in {graph}, in ONNX Runtime on the CPU",
                f"{same}, in ONNX Runtime on the CPU: the engine itself differs",
            ),
        ]

    def _rebuild(self, case: ForwardCase, model: bytes, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the engine built again from marked bytes for the size of the call, beside the ONNX file with its weights."""
        assert self.file.record is not None
        assert self.file.graph is not None
        path, options = self.file.graph.path, self.file.record.request.options
        with tempfile.TemporaryDirectory(prefix=".shapecheck-", dir=path.parent) as folder, _beside(path, model) as file:
            sizes = Range(case.geometry, case.geometry, case.geometry)
            built = build_engine(
                file, Path(folder) / "marked.plan", profiles=sizes, contract=self.file.contract, options=options
            )
            with EngineSession.open(built.path) as session:
                found = session({name: each.cuda() for name, each in inputs.items()})
                return {name: each.cpu() for name, each in found.items()}

    def _find_first(self, case: ForwardCase, backend: str, run: RunMarked | None) -> Divergence | None:
        contract, file = self.file.contract, self.file.graph
        assert file is not None
        own = contract.dtype
        values = self.generate(case, expanded=False)

        def source(precision: str) -> Source:
            return lambda inner: compute_inner(to_device(self.model.load(precision)), contract, values, inner)

        eps = torch.finfo(torch.float32).eps
        return find_divergence(
            file,
            contract,
            self.file.names_in_graph,
            self.generate(case),
            source(self.precision),
            source(own),
            tolerance_factor=self.tolerance_factor * (ASSUMED_ERROR / eps if self.precision == own else 1),
            dtype=getattr(torch, own),
            backend=backend,
            run=run,
            folder=self.folder,
        )


@contextmanager
def _beside(path: Path, model: bytes) -> Iterator[Path]:
    """A file of these bytes in the folder of another, where external weights are found; gone afterwards."""
    file = path.with_name(f".shapecheck.{os.getpid()}.marked.onnx")
    try:
        file.write_bytes(model)
        yield file
    finally:
        file.unlink(missing_ok=True)
