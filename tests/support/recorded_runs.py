"""A parity run that is over: what prints, chooses among its checks, or writes them down needs no model for it."""

from __future__ import annotations

from shapecheck import Contract
from shapecheck.parity.results import Check, Parity, Result, Side


class RecordedStudy:
    """Stands in for `shapecheck.parity.run.ParityRun`, and says what a record holds.

    Patch `shapecheck.parity.request.create_run` with a function that gives it.
    """

    def __init__(self, parity: Parity) -> None:
        self._parity = parity
        self._asked: set[str] = set()

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(result.check for side in self._parity.sides for result in side.results)

    @property
    def contract(self) -> Contract:
        return self._parity.contract

    @property
    def reference(self) -> str:
        return self._parity.reference

    @property
    def is_complete(self) -> bool:
        return self._asked == {side.backend for side in self._parity.sides}

    def result(self, check: Check) -> Result:
        return next(result for result in self.side(check.backend).results if result.check == check)

    def side(self, backend: str) -> Side:
        self._asked.add(backend)
        return next(side for side in self._parity.sides if side.backend == backend)

    def report(self) -> Parity:
        self._asked |= {side.backend for side in self._parity.sides}
        return self._parity
