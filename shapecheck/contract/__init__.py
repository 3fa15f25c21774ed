"""The facts about a UNet, as frozen records. Standard library only: works where torch is not installed."""

from shapecheck.contract.config import Config
from shapecheck.contract.contract import Contract, ContractError
from shapecheck.contract.dims import Dim, Shape, show
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.records import AddSite, ControlNetInfo, Header, Input, Mismatch, Role, Slot

__all__ = [
    "AddSite", "Config", "Contract", "ContractError", "ControlNetInfo", "Dim", "Geometry", "Header", "Input", "Mismatch",
    "Role", "Shape", "ShapecheckError", "Slot", "show",
]  # fmt: skip
