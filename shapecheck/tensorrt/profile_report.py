"""Profiles as a table, as JSON, or as the options of the tools that build engines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from shapecheck.contract import Contract, show
from shapecheck.report.document import Document, Facts, Heading, Part, Table
from shapecheck.report.numbers import dump_json, format_pixels
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Profile, Range, range_of


def render_text(contract: Contract, profiles: Sequence[Profile], names: dict[str, str]) -> str:
    """Return the profiles for a person. `names` says what they call the contract's inputs."""
    parts: list[Part] = [Facts([("contract", contract.digest), ("of", contract.header.source or contract.class_name)])]
    for number, profile in enumerate(profiles):
        sizes = range_of(contract, profile.renamed({theirs: ours for ours, theirs in names.items()}))
        rows = [(bounds.name, bounds.dtype, *map(show, bounds.shapes)) for bounds in profile.inputs]
        parts += [Heading(f"Profile {number}: {describe_range(sizes, contract.header.vae_factor)}")]
        parts += [Table(("input", "dtype", "min", "opt", "max"), rows)]
    return Document("", parts).render("human")


def render_json(contract: Contract, profiles: Sequence[Profile]) -> str:
    """Return the profiles for machines, and for `shapecheck build --profile`."""
    return profile_formats.dumps(profiles, contract.digest)


def render_options(profiles: Sequence[Profile], tool: profile_formats.Tool, form: str) -> str:
    """Return options of a tool: for a shell, or a JSON list of arguments; for ONNX Runtime key=value, or a JSON object."""
    arguments = profile_formats.list_arguments(profiles, tool)
    if form == "json":
        value = dict(profile_formats.make_provider_options(profiles)) if tool == "ort" else arguments
        return dump_json(value, ascii_only=True)
    if tool == "ort":
        return "\n".join(arguments) + "\n"
    lines: list[str] = []  # one option a line, with its values
    for word in map(shlex.quote, arguments):
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines) + "\n"


def describe_range(sizes: Range, vae_factor: int) -> str:
    """Return `512×512 … 768×768 … 1024×1024 pixels, batch 1 … 2 … 4`, and the tokens if they are not the usual 77."""
    rows = [(format_pixels(size, vae_factor), str(size.batch), str(size.tokens)) for size in sizes.geometries]
    columns = zip(*rows, strict=True)
    pixels, batch, tokens = (" … ".join(texts if len(set(texts)) > 1 else texts[:1]) for texts in columns)
    return f"{pixels} pixels, batch {batch}" + (f", {tokens} tokens" if tokens != "77" else "")
