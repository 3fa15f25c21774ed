"""From a text to symptoms: what PyTorch, ONNX Runtime, TensorRT, Polygraphy and diffusers print when residuals do not fit.

Every pattern is looked for around fixed words and no further, so that megabytes of anything are read in well under a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from shapecheck.explain import patterns_pytorch, patterns_runtimes, raise_site
from shapecheck.explain.pattern import Pattern
from shapecheck.explain.symptom import Symptom

_LONGEST = 2**19
"""Characters that are looked at: so many from the start and as many from the end."""


_MOST = 64
"""Symptoms of one sort that are looked at: a log may repeat one thousands of times."""


_PLACES, _DIFFERENT = 4, 24
"""Times that one symptom is placed, and different symptoms that are told."""


_OF_PYTHON = ("PyTorch", "diffusers")
"""Whose texts are raised where residuals are added: a runtime's come from its own call, whatever the graph is."""


_AROUND = 4_500
"""Characters around the words that give a symptom away."""


_NOISE = re.compile(r"\x1b\[[0-9;]{0,20}[A-Za-z]|^[EWI][0-9]{4} [0-9:.]{5,20} +[0-9]+ [^\]\n]{1,200}\] ?", re.MULTILINE)


_SPACES = re.compile(r"\s+")


def symptoms(text: str) -> tuple[Symptom, ...]:
    """Everything the text says that this tool knows the meaning of, in the order of the text, each once."""
    return symptoms_in(flattened(text))


def symptoms_in(flat: str) -> tuple[Symptom, ...]:
    """The same of a text that is flattened already."""
    found = [
        (match.start(), match.end(), pattern.build(match))
        for pattern in (*patterns_pytorch.PATTERNS, *patterns_runtimes.PATTERNS)
        for match in _matches(pattern, flat)
    ]
    told: dict[Symptom, list[tuple[int, int, Symptom]]] = {}
    for start, end, symptom in sorted(found, key=lambda each: each[0]):
        told.setdefault(replace(symptom, line=""), []).append((start, end, symptom))
    return tuple(_placed(each[:_PLACES], flat) for each in list(told.values())[:_DIFFERENT])


def _placed(told: list[tuple[int, int, Symptom]], text: str) -> Symptom:
    """One symptom, which a log may tell several times: at its place in the UNet, if one of them shows it."""
    symptom = told[0][2]
    if symptom.source not in _OF_PYTHON:
        return symptom
    places = [raise_site.place(text, start, end, symptom.kind) for start, end, _ in told]
    best = max(places, key=lambda each: (each.stage is not None, bool(each.elsewhere)))
    return replace(symptom, stage=best.stage, elsewhere=best.elsewhere)


def _matches(pattern: Pattern, text: str) -> Iterator[re.Match[str]]:
    """The pattern around each occurrence of its marker; every search begins and ends near it."""
    at = done = 0
    for _ in range(_MOST):
        at = text.find(pattern.marker, at)
        if at < 0:
            return
        match = pattern.regex.search(text, max(done, at - _AROUND), at + _AROUND)
        if match and match.end() > at:
            yield match
            done = match.end()
        at = max(done, at + len(pattern.marker))


def flattened(text: str) -> str:
    """On one line, without colours and log prefixes, the middle of what is absurdly long left out."""
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]} … {text[-_LONGEST:]}"
    return _SPACES.sub(" ", _NOISE.sub("", text))
