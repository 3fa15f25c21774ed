"""Parity checks and probes as test items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shapecheck.pytest_plugin.options import get_run, option

if TYPE_CHECKING:
    from shapecheck.parity.results import Check

_STUCK = pytest.StashKey[dict[str, str]]()
"""Backends of which nothing can be computed, each with the reason."""


class CheckError(Exception):
    """A parity check or a probe failed, for the reason in its text."""


class ParityChecks(pytest.Collector):
    """The parity checks of the model and files that the options name."""

    def collect(self) -> list[pytest.Item]:
        return [CheckItem.from_parent(self, name=str(check), check=check) for check in get_run(self.config).checks]


class ReasonItem(pytest.Item):
    """An item that fails with its reason alone: a traceback through our code helps nobody."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.add_marker("shapecheck")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from shapecheck.contract import ShapecheckError

        if isinstance(excinfo.value, (CheckError, ShapecheckError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


class CheckItem(ReasonItem):
    """One parity check."""

    def __init__(self, *, check: Check, **rest: Any) -> None:
        super().__init__(**rest)
        self.check = check

    def runtest(self) -> None:
        """Fail or skip with the reason. If nothing can be computed, the first check of the backend fails for all."""
        from shapecheck import ShapecheckError
        from shapecheck.parity.report import render_failure

        study, stuck, backend = get_run(self.config), self.config.stash.setdefault(_STUCK, {}), self.check.backend
        if backend in stuck:
            pytest.skip(f"nothing of {backend} can be computed: {stuck[backend]}")
        try:
            result, side = study.result(self.check), study.side(backend)
        except ShapecheckError as error:
            stuck[backend] = str(error)
            raise
        ran = f"{backend}: {side.ran or 'did not run'}; reference {study.reference}"
        self.user_properties.append(("shapecheck_ran", ran))
        if result.status == "not run":
            pytest.skip(result.reason)
        if result.status == "failed":
            raise CheckError(render_failure(result, side))

    def reportinfo(self) -> tuple[Path, None, str]:
        return Path("shapecheck"), None, str(self.check)


class ProbeFile(pytest.File):
    """One probe file."""

    def collect(self) -> list[pytest.Item]:
        return [ProbeItem.from_parent(self, name="probe")]


class ProbeItem(ReasonItem):
    """A probe that is run."""

    def runtest(self) -> None:
        """Fail if its result is not what the file expects, or its report is not the one that is kept."""
        from shapecheck.explain import report as explain_report
        from shapecheck.explain.diagnosis import Diagnosis
        from shapecheck.explain.judge_mapping import judge_mapping
        from shapecheck.observe import report
        from shapecheck.observe import request as requests
        from shapecheck.progress import silent

        request = requests.read_request(self.path)
        if request.mapping is not None:
            judgement = judge_mapping(request)
            mismatches, verdict = judgement.mismatches, "mismatch" if judgement.mismatches else "agree"
            text = explain_report.render_text(Diagnosis((), judgement.models), judgement, form="markdown")
        else:
            finding = requests.run_probe(request, progress=silent)
            mismatches, verdict = finding.mismatches, report.judge_probe(finding.contract, finding.mismatches)
            text = report.render_text(finding.contract, finding.mismatches, finding.geometry, form="markdown", lines=False)
        if surprises := requests.list_surprises(request, mismatches, verdict):
            raise CheckError("; ".join(surprises))
        if folder := option(self.config, "reports"):
            page, text = self.config.rootpath / folder / f"{self.path.stem}.md", f"> {request.story}\n\n{text}"
            if option(self.config, "update"):
                page.write_text(text, encoding="utf-8")
            elif not page.is_file() or page.read_text(encoding="utf-8") != text:
                raise CheckError(f"{page} is not what is said today; accept it with --shapecheck-update")

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"probe {self.path.stem}"
