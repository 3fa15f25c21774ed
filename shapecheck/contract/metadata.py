"""Keys under which an exported ONNX file holds what it is, in its metadata_props."""

from __future__ import annotations

CONTRACT = "shapecheck.contract"
DIGEST = "shapecheck.digest"
NAMING = "shapecheck.naming"
SIZES = "shapecheck.sizes"
WEIGHTS = "shapecheck.weights"
"""`sha256:…` over the checkpoint that it was exported from; empty where it has no weights."""
VERSIONS = "shapecheck.versions"
