"""From a text to symptoms: what PyTorch, ONNX Runtime, TensorRT, Polygraphy and diffusers print when residuals do not fit.

Every pattern is looked for around fixed words and no further, so that megabytes of anything are read in well under a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from shapecheck.explain import patterns_pytorch, patterns_runtimes
from shapecheck.explain.pattern import Pattern
from shapecheck.explain.raise_site import find_place
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


def read_symptoms(text: str) -> tuple[Symptom, ...]:
    """Return what `find_symptoms` finds in a text of any number of lines."""
    return find_symptoms(flatten_text(text))


def find_symptoms(flat: str) -> tuple[Symptom, ...]:
    """Return everything that a flattened text says and this tool knows the meaning of, in the order of the text, each once."""
    matches = [
        (match.start(), match.end(), pattern.make_symptom(match))
        for pattern in (*patterns_pytorch.PATTERNS, *patterns_runtimes.PATTERNS)
        for match in _find_matches(pattern, flat)
    ]
    groups: dict[Symptom, list[tuple[int, int, Symptom]]] = {}
    for start, end, symptom in sorted(matches, key=lambda match: match[0]):
        groups.setdefault(replace(symptom, line=""), []).append((start, end, symptom))

    found = []
    for group in list(groups.values())[:_DIFFERENT]:
        symptom = group[0][2]
        if symptom.source in _OF_PYTHON:  # a log may tell it several times: one of them may show its place in the UNet
            places = [find_place(flat, start, end, symptom.kind) for start, end, _ in group[:_PLACES]]
            best = max(places, key=lambda place: (place.stage is not None, bool(place.elsewhere)))
            symptom = replace(symptom, stage=best.stage, elsewhere=best.elsewhere)
        found.append(symptom)
    return tuple(found)


def _find_matches(pattern: Pattern, text: str) -> Iterator[re.Match[str]]:
    """Yield the pattern around each occurrence of its marker; every search begins and ends near it."""
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


def flatten_text(text: str) -> str:
    """Bring a text to one line, without colours and log prefixes, and leave out the middle of what is absurdly long."""
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]} … {text[-_LONGEST:]}"
    return _SPACES.sub(" ", _NOISE.sub("", text))
