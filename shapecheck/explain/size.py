"""The size that a user says a text or a table is about."""

from __future__ import annotations

from dataclasses import dataclass

from shapecheck.contract import Contract, Geometry


@dataclass(frozen=True, slots=True)
class Size:
    """What is left open is None: then every size that can have led to it is looked at."""

    latent: tuple[int, int] | None = None
    """Height and width in cells."""
    batch: int | None = None

    def usual(self, contract: Contract) -> Geometry:
        """This; the model's own size where it is left open."""
        return Geometry(self.batch or 1, *(self.latent or contract.header.usual))
