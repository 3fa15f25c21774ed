"""The search for the first value inside a file that is not PyTorch's, once an image is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shapecheck.contract import ShapecheckError
from shapecheck.contract.parity import Divergence
from shapecheck.contract.profiles import dtypes_of
from shapecheck.run.onnx_session import PROVIDERS
from shapecheck.verify.calls import Call, Draws
from shapecheck.verify.divergence import Source, first_divergence
from shapecheck.verify.files import File
from shapecheck.verify.inner import inner_of
from shapecheck.verify.reference import ASSUMED, Sides, TorchModel, placed

_FUSED = "every value inside agrees when it is an output too: what is computed differently then is at fault, such as a fusion"


@dataclass(frozen=True, slots=True)
class Search:
    """One file beside the model."""

    model: TorchModel
    file: File
    draws: Draws
    sides: Sides
    times_own: float
    folder: Path | None
    """Where to write what Polygraphy needs to show the same."""

    def at(self, call: Call, backend: str) -> tuple[Divergence | None, tuple[str, ...]]:
        """The first value that differs in a call, and notes on what was found out otherwise.

        An engine gives no values inside: the ONNX file that it was built from is searched in its place, and said so.
        """
        if backend in PROVIDERS:
            try:
                found = self._first(call, backend)
            except ShapecheckError as error:
                return None, (f"where it differs could not be found: {error}",)
            return found, () if found else (_FUSED,)
        try:
            found = self._first(call, "ort")
        except ShapecheckError as error:
            return None, (f"where {self.file.graph} differs, which the engine was built from, could not be found: {error}",)
        graph = f"{self.file.graph}, which the engine was built from, in ONNX Runtime on the CPU"
        if found is None:
            return None, (f"every value inside agrees in {graph}: the engine itself differs",)
        return replace(found, note=f"found in {graph}: an engine gives no values inside"), ()

    def _first(self, call: Call, backend: str) -> Divergence | None:
        contract, path = self.file.contract, self.file.graph
        assert path is not None
        own = dtypes_of(contract)["sample"]
        given = self.draws(call, expanded=False)

        def source(precision: str) -> Source:
            return lambda values: inner_of(placed(self.model.load(precision)), contract, given, values)

        eps = torch.finfo(torch.float32).eps
        return first_divergence(
            path,
            contract,
            self.file.names_in_graph,
            self.draws(call),
            source(self.sides.precision),
            source(own),
            times_own=self.times_own * (ASSUMED / eps if self.sides.precision == own else 1),
            dtype=getattr(torch, own),
            backend=backend,
            folder=self.folder,
        )
