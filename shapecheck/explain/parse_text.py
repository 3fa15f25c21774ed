"""From a text to symptoms: what PyTorch, ONNX Runtime, TensorRT, Polygraphy and diffusers print when residuals do not fit.

Every pattern is searched only around its marker, so that megabytes of any text are read in well under a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from shapecheck.explain import patterns_pytorch, patterns_runtimes
from shapecheck.explain.raise_site import find_raise_site
from shapecheck.explain.symptom import MessagePattern, Symptom

_LONGEST = 2**19
"""Characters that are read from the start of a text, and as many from its end."""
_AROUND = 4_500
"""Characters around a marker that are searched."""
_MOST_MATCHES, _MOST_SYMPTOMS, _MOST_SITES = 64, 24, 4
"""Matches of one pattern, different symptoms, and raise sites of one symptom: a log may repeat a message thousands of times."""
_NOISE = re.compile(r"\x1b\[[0-9;]{0,20}[A-Za-z]|^[EWI][0-9]{4} [0-9:.]{5,20} +[0-9]+ [^\]\n]{1,200}\] ?", re.MULTILINE)


def find_symptoms(flat: str) -> tuple[Symptom, ...]:
    """Return every known symptom of a flattened text, in the order of the text, each once."""
    matches = [
        (match.start(), match.end(), pattern.make_symptom(match))
        for pattern in (*patterns_pytorch.PATTERNS, *patterns_runtimes.PATTERNS)
        for match in _find_matches(pattern, flat)
    ]
    groups: dict[Symptom, list[tuple[int, int, Symptom]]] = {}
    for start, end, symptom in sorted(matches, key=lambda match: match[0]):
        groups.setdefault(replace(symptom, line=""), []).append((start, end, symptom))

    symptoms = []
    for group in list(groups.values())[:_MOST_SYMPTOMS]:
        symptom = group[0][2]
        # A runtime raises from its own call, whatever the graph is; of PyTorch any repetition may show the place in the UNet.
        if symptom.source in ("PyTorch", "diffusers"):
            sites = [find_raise_site(flat, start, end, symptom.kind) for start, end, _ in group[:_MOST_SITES]]
            best = max(sites, key=lambda site: (site.stage is not None, bool(site.elsewhere)))
            symptom = replace(symptom, stage=best.stage, elsewhere=best.elsewhere)
        symptoms.append(symptom)
    return tuple(symptoms)


def _find_matches(pattern: MessagePattern, text: str) -> Iterator[re.Match[str]]:
    start = done = 0
    for _ in range(_MOST_MATCHES):
        start = text.find(pattern.marker, start)
        if start < 0:
            return
        regex = re.compile(pattern.regex or re.escape(pattern.marker))
        match = regex.search(text, max(done, start - _AROUND), start + _AROUND)
        if match and match.end() > start:
            yield match
            done = match.end()
        start = max(done, start + len(pattern.marker))


def flatten_text(text: str) -> str:
    """Join a text to one line without colours and log prefixes; the middle of a very long one is left out."""
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]} … {text[-_LONGEST:]}"
    return re.sub(r"\s+", " ", _NOISE.sub("", text))
