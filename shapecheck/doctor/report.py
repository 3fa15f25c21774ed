"""What runs on a machine and what does not, as text or JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from shapecheck.doctor.environment import BACKENDS, Backend, Environment, Gap, Package
from shapecheck.report.tables import LINE, fact_list, table, wrapped

_GIB = 2**30


def told(environment: Environment, required: Sequence[str] = ()) -> str:
    """For a person. Where backends are required, the fixes and the verdict are about those; else about everything."""
    fixes = _fixes(environment, required)
    parts = [
        fact_list(_facts(environment), "human"),
        "Packages",
        _packages(environment.packages),
        "Backends",
        _backends(environment.backends),
        *(("To fix", "\n".join(fixes)) if fixes else ()),
        "\n".join(wrapped(line, "    ") for line in _verdict(environment, required)),
    ]
    return "\n\n".join(parts) + "\n"


def as_json(environment: Environment, required: Sequence[str] = ()) -> str:
    """The same for machines."""
    record = {
        **asdict(environment),
        "packages": [asdict(each) | {"installed": each.installed} for each in environment.packages],
        "backends": [asdict(each) | {"reason": each.reason or None} for each in environment.backends],
        "required": list(required),
        "verdict": ("cannot run" if environment.failing(required) else "ready") if required else None,
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _facts(environment: Environment) -> list[tuple[str, str]]:
    driver = environment.driver
    works = f"{driver.version or 'version unknown'}, for CUDA up to {driver.cuda}"
    gpus = [f"{each.name}, compute capability {each.capability}, {each.memory / _GIB:.1f} GiB" for each in environment.devices]
    return [
        ("python", environment.python),
        ("platform", environment.platform),
        ("driver", driver.gap.problem if driver.gap else works),
        *(("GPU", gpu) for gpu in gpus),
    ]


def _packages(packages: Sequence[Package]) -> str:
    rows = [(each.name, each.version or "-", _state(each)) for each in packages]
    return _fitted(rows, ("package", "version", "state"))


def _state(package: Package) -> str:
    if package.gap is None:
        return "ok"
    return package.gap.problem if package.installed else "not installed"


def _backends(backends: Sequence[Backend]) -> str:
    rows = [(each.name, BACKENDS[each.name], "yes" if each.runs else "no", each.detail or each.reason) for each in backends]
    return _fitted(rows, ("backend", "what it is", "runs here", "with what, or why not"))


def _fitted(rows: Sequence[tuple[str, ...]], headers: Sequence[str]) -> str:
    """A table whose last column is wrapped, so that the whole is no wider than a report."""
    taken = sum(max(map(len, column)) + 2 for column in list(zip(headers, *rows, strict=True))[:-1])
    return table([(*row[:-1], textwrap.fill(row[-1], max(LINE - taken, 30))) for row in rows], headers, "human")


def _fixes(environment: Environment, required: Sequence[str]) -> list[str]:
    """Every command once, under all that it puts right."""
    problems: dict[str, dict[str, list[str]]] = {}
    for name, gap in _gaps(environment, required):
        problems.setdefault(gap.fix, {}).setdefault(gap.problem, []).append(name)
    return [line for fix, found in problems.items() for line in (_whose(found), f"    {fix}")]


def _whose(found: dict[str, list[str]]) -> str:
    """What is wrong and for which backends; a package says that itself."""
    texts = []
    for problem, names in found.items():
        concerned = ", ".join(name for name in dict.fromkeys(names) if name)
        texts.append(f"{problem} ({concerned})" if concerned else problem)
    return wrapped(f"- {'; '.join(texts)}", "  ")


def _gaps(environment: Environment, required: Sequence[str]) -> Iterator[tuple[str, Gap]]:
    for backend in environment.backends:
        if not required or backend.name in required:
            yield from ((backend.name, gap) for gap in backend.gaps)
    if not required:
        yield from (("", package.gap) for package in environment.packages if package.gap)


def _verdict(environment: Environment, required: Sequence[str]) -> list[str]:
    if required:
        asked = [environment.backend(name) for name in dict.fromkeys(required)]
        return [
            f"READY: {each.name}: {each.detail}" if each.runs else f"CANNOT RUN: {each.name}: {each.reason}" for each in asked
        ]
    runs = [f"{each.name} (in part)" if each.gaps else each.name for each in environment.backends if each.runs]
    others = [each.name for each in environment.backends if not each.runs]
    return [f"RUNS HERE: {', '.join(runs) or 'nothing'}" + (f"; not: {', '.join(others)}" if others else "")]
