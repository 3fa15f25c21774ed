"""What many tests read, made once a run: whichever worker of pytest-xdist asks first makes it, the others wait for it.

Nobody has to fetch a fixture for it: `onnx_files` and `engines` go through here, and a new kind of artefact should too.
A test that changes a file changes a copy of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

FOLDER = "SHAPECHECK_TEST_ARTEFACTS"
"""The environment variable that names the folder of this run; conftest.py sets it, and workers inherit it."""


def make_once(recipe: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """Return the folder that `make` fills for a recipe, the same for every worker of this run.

    The recipe is the identity of the content: everything that `make` depends on has to be in it, as JSON.
    """
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(os.environ[FOLDER]) / key
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            started = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=folder.parent))
            try:
                make(started)
                started.rename(folder)  # under its name only when it is whole: a failed attempt is made again
            finally:
                shutil.rmtree(started, ignore_errors=True)
    return folder


def identify(model: Any) -> dict[str, Any]:
    """Return what decides the numbers of a live model of diffusers, for a recipe: its class, config, weights and processors."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().float().numpy().tobytes())
    return {
        "class": type(model).__name__,
        "config": json.loads(model.to_json_string()),
        "weights": weights.hexdigest(),
        "processors": {name: type(processor).__name__ for name, processor in getattr(model, "attn_processors", {}).items()},
    }


def observed(name: str) -> Any:
    """Return the contract of a preset as it is observed today, once a run."""
    from shapecheck import Contract, probe

    folder = make_once({"observed": name}, lambda folder: _write(folder / "contract.json", probe(name).to_json()))
    return Contract.from_json((folder / "contract.json").read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
