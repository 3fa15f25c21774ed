"""The report on a machine: what runs on it and what does not, as text or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from shapecheck.doctor.environment import BACKENDS, Environment
from shapecheck.report.document import Document, Facts, Heading, Lines, Part, Points, Table, wrap
from shapecheck.report.numbers import dump_json


def render_text(environment: Environment, required: Sequence[str] = ()) -> str:
    """Return the report for a person. If backends are required, fixes and verdict are about those; else about everything."""
    driver = environment.driver
    works = f"{driver.version or 'version unknown'}, for CUDA up to {driver.cuda}"
    facts = [("python", environment.python), ("platform", environment.platform)]
    facts += [("driver", driver.gap.problem if driver.gap else works)]
    for gpu in environment.devices:
        facts += [("GPU", f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory / 2**30:.1f} GiB")]
    packages = []
    for package in environment.packages:
        problem = package.gap.problem if package.gap else "ok"
        packages.append((package.name, package.version or "-", problem if package.installed else "not installed"))
    backends = [
        (backend.name, BACKENDS[backend.name], "yes" if backend.runs else "no", backend.detail or backend.reason)
        for backend in environment.backends
    ]
    parts: list[Part] = [
        Facts(facts),
        Heading("Packages"),
        Table(("package", "version", "state"), packages, fits=True),
        Heading("Backends"),
        Table(("backend", "what it is", "runs here", "with what, or why not"), backends, fits=True),
    ]
    if fixes := _list_fixes(environment, required):
        parts += [Heading("To fix"), Lines(fixes)]
    runs = [f"{backend.name} (in part)" if backend.gaps else backend.name for backend in environment.backends if backend.runs]
    others = ", ".join(backend.name for backend in environment.backends if not backend.runs)
    verdicts = [f"RUNS HERE: {', '.join(runs) or 'nothing'}" + (f"; not: {others}" if others else "")]
    if required:
        chosen = [environment.backend(name) for name in dict.fromkeys(required)]
        verdicts = [f"{'READY' if one.runs else 'CANNOT RUN'}: {one.name}: {one.detail or one.reason}" for one in chosen]
    return Document("", [*parts, Points(verdicts)]).render("human")


def render_json(environment: Environment, required: Sequence[str] = ()) -> str:
    """Return the report for machines."""
    record = {
        **asdict(environment),
        "packages": [asdict(package) | {"installed": package.installed} for package in environment.packages],
        "backends": [asdict(backend) | {"reason": backend.reason or None} for backend in environment.backends],
        "required": list(required),
        "verdict": ("cannot run" if environment.failing(required) else "ready") if required else None,
    }
    return dump_json(record)


def _list_fixes(environment: Environment, required: Sequence[str]) -> list[str]:
    """Return every command once, under all that it puts right and for which backends; a package says that itself."""
    concerned = [backend for backend in environment.backends if not required or backend.name in required]
    gaps = [(backend.name, gap) for backend in concerned for gap in backend.gaps]
    if not required:
        gaps += [("", package.gap) for package in environment.packages if package.gap]
    fixes: dict[str, dict[str, list[str]]] = {}
    for name, gap in gaps:
        fixes.setdefault(gap.fix, {}).setdefault(gap.problem, []).append(name)
    lines = []
    for fix, problems in fixes.items():
        texts = []
        for problem, names in problems.items():
            backends = ", ".join(name for name in dict.fromkeys(names) if name)
            texts.append(f"{problem} ({backends})" if backends else problem)
        lines += [*wrap(f"- {'; '.join(texts)}", "  ").splitlines(), f"    {fix}"]
    return lines
