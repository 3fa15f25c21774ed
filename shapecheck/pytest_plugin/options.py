"""The options, and what they request: the parity request, its backends and its run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from shapecheck.doctor.environment import Backend
    from shapecheck.parity.request import ParityRequest
    from shapecheck.parity.run import ParityRun

STUDY = pytest.StashKey["ParityRun"]()
_BACKENDS = pytest.StashKey["Sequence[Backend]"]()
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("model", {"metavar": "MODEL", "help": "the UNet or ControlNet: a diffusers folder or hub id with weights"}),
    ("onnx", {"metavar": "FILE", "help": "the ONNX file made of it"}),
    ("engine", {"metavar": "PLAN", "help": "the engine made of it, its record beside it"}),
    (
        "backends",
        {
            "metavar": "NAMES",
            "help": "what must run: torch,torch-cuda,torch-compile,ort,ort-cuda,ort-trt,trt,rtx [what the files need]",
        },
    ),
    ("controlnet", {"metavar": "NAME", "help": "a ControlNet with weights whose residuals are used [random ones]"}),
    ("sizes", {"action": "append", "metavar": "MIN:OPT:MAX", "help": "WxH in pixels; repeatable [what the files take]"}),
    ("batch", {"action": "append", "metavar": "MIN:OPT:MAX", "help": "batch [what the files take]"}),
    ("tokens", {"metavar": "MIN:OPT:MAX", "help": "text tokens [what the files take]"}),
    ("multiple-of", {"type": int, "metavar": "PIXELS", "help": "only image sides that are multiples of this [any]"}),
    ("seed", {"type": int, "default": 0, "metavar": "N", "help": "of the random inputs [0]"}),
    ("times-own", {"type": float, "default": 4.0, "metavar": "N", "help": "how many times PyTorch's own error may be [4]"}),
    (
        "reference",
        {
            "choices": ("auto", "float64", "float32"),
            "default": "auto",
            "help": "PyTorch's precision [float64 if it fits, float32 for half precision]",
        },
    ),
    ("fp8", {"metavar": "FILE", "help": "the calibration by which layers of the files are in fp8 [none are]"}),
    ("variant", {"metavar": "NAME", "help": "which of a checkpoint's files, such as fp16"}),
    ("offline", {"action": "store_true", "help": "never ask the hub"}),
    ("report", {"metavar": "FOLDER", "help": "write parity.html, parity.md and parity.json there"}),
    ("probes", {"metavar": "FOLDER", "help": "collect the .toml files there, and hold each to what it expects"}),
    ("reports", {"metavar": "FOLDER", "help": "hold what is said of every probe to the .md file there"}),
    ("update", {"action": "store_true", "help": "write those .md files instead"}),
)


def option(config: pytest.Config, name: str) -> Any:
    """Return the value of one of our options."""
    return config.getoption(f"--shapecheck-{name}")


def list_backends(config: pytest.Config) -> tuple[str, ...]:
    """Return the backends that are requested by name."""
    return tuple(name.strip() for name in (option(config, "backends") or "").split(",") if name.strip())


def build_request(config: pytest.Config, model: str | None = None) -> ParityRequest:
    """Return the request of the options, for that model or for the one that they name."""
    from shapecheck.parity.request import ParityRequest

    fields = ("onnx", "engine", "controlnet", "tokens", "seed", "reference", "fp8", "variant", "offline")
    return ParityRequest(
        model or option(config, "model") or "",
        backends=list_backends(config),
        sizes=tuple(option(config, "sizes") or ()),
        batch=tuple(option(config, "batch") or ()),
        multiple_of=option(config, "multiple-of"),
        times_own=option(config, "times-own"),
        folder=Path(folder) if (folder := option(config, "report")) else None,
        **{name: option(config, name) for name in fields},
    )


def try_backends(config: pytest.Config) -> Sequence[Backend]:
    """Return the requested backends, or those that the files need, each tried once a session."""
    if _BACKENDS not in config.stash:
        from shapecheck import doctor

        with _usage_errors():
            names = build_request(config).what_runs if option(config, "model") else list_backends(config)
        config.stash[_BACKENDS] = [doctor.backend(name) for name in names]
    return config.stash[_BACKENDS]


def get_run(config: pytest.Config) -> ParityRun:
    """Return the run of this session, made once."""
    if STUDY not in config.stash:
        from shapecheck.parity.request import create_run

        with _usage_errors():
            config.stash[STUDY] = create_run(build_request(config))
    return config.stash[STUDY]


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Raise errors of the user as pytest's, with options as they are called here."""
    from shapecheck import ShapecheckError, extras

    try:
        yield
    except (ModuleNotFoundError, ShapecheckError) as error:
        problem = extras.explain_missing(error, "parity") if isinstance(error, ModuleNotFoundError) else error
        names = "|".join(name for name, _ in OPTIONS)
        message = re.sub(rf"(?<![\w-])--(?=({names})\b)", "--shapecheck-", str(problem))
        raise pytest.UsageError(message) from None
