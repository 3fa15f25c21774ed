"""Texts that have nothing to do with residuals, and what they are about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

from shapecheck.explain.simulate import FailureKind
from shapecheck.explain.symptom import Symptom

_LORA = r"\blora[_.\w]*|\bLoRA\b"
_IMAGE = r"sample = sample \+ controlnet_cond"
_NO_MEMORY = (
    r"out of memory|OutOfMemory|Failed to allocate memory|\bOOM\b|bad_alloc|"
    r"DefaultCPUAllocator: (?:can't allocate|not enough memory)"
)
_NO_FILE = (
    r"No such file or directory|FileNotFoundError|does not appear to have a file named|Error no file named|File doesn't exist"
)
_DEVICES = (
    r"Expected all tensors to be on the same device|"
    r"Input type \((?:torch\.cuda\.|MPS)\w+\) and weight type \(torch\.(?!cuda)|"
    r"Input type \(torch\.(?!cuda)\w+\) and weight type \((?:torch\.cuda|MPS)"
)
_SUBJECTS: tuple[tuple[str, str], ...] = (
    (_NO_MEMORY, "memory ran out"),
    (_NO_FILE, "a file is missing"),
    (r"size mismatch for |(?:Missing|Unexpected) key\(s\) in state_dict", "weights of another model are loaded"),
    (_LORA, "a LoRA does not fit the layer it is put on"),
    (r"No module named|ModuleNotFoundError|cannot import name", "a package is missing"),
    (
        r"ConnectionError|Max retries exceeded|HTTPError|RepositoryNotFound|GatedRepo|LocalEntryNotFound",
        "something could not be downloaded",
    ),
    (_IMAGE, "the ControlNet's image is not of the latents' size: give it one of the size that is drawn"),
    (_DEVICES, "models or inputs lie on different devices: move them to one"),
    (r"CUDA error|CUDA driver|cuDNN|CUBLAS", "the GPU or its driver failed"),
    (r"PermissionError|Permission denied", "a file may not be read or written"),
)
"""The first that matches counts."""
_OF_SIZES = {*get_args(FailureKind), "text width"} - {"keyword"}
"""Symptoms of two sizes, which may come from any code."""


def find_other_subject(text: str, symptoms: Sequence[Symptom]) -> str:
    """Return what a text on one line is about if that is not residuals; empty if it may be.

    It is unrelated if all its symptoms were raised in other code than that which adds residuals.
    """
    subject = next((subject for pattern, subject in _SUBJECTS if re.search(pattern, text)), "")
    if not symptoms:
        return subject or "this text says nothing of residuals, or in words that are not known here"
    if any(symptom.stage for symptom in symptoms):
        return ""
    if re.search(_IMAGE, text) or (re.search(_LORA, text) and all(symptom.kind in _OF_SIZES for symptom in symptoms)):
        return subject
    if all(symptom.elsewhere for symptom in symptoms):
        return f"it was raised in {symptoms[0].elsewhere}, where no residual is added"
    return ""
