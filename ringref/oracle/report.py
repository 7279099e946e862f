"""What a sweep found: findings with a cause, a place and the smallest case, as text, HTML and JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from . import diagnose
from .cases import Case

SCHEMA = 1  # of the JSON report: it rises when a key changes its meaning or goes, not when one comes


@dataclass
class Finding:
    """Something wrong. `kind` is value, property, message, hang, crash or growth; `snippet` runs the case alone."""

    kind: str
    diagnosis: str
    case: str
    p: int
    rank: int | None = None
    tensor: str | None = None
    error: float | None = None
    budget: float | None = None
    where: str | None = None
    snippet: str = ""
    causes: list[str] = field(default_factory=list, repr=False)
    evidence: Any = field(default=None, repr=False)  # what it takes to name a wrong value; gone once it is named


@dataclass(repr=False)
class Report:
    """What a sweep found: true when nothing is wrong and something was judged."""

    candidate: str
    layout: str = "contiguous"
    findings: list[Finding] = field(default_factory=list)
    not_judged: list[str] = field(default_factory=list)
    conventions: list[str] = field(default_factory=list)
    growth: dict[str, float] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    margin: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return not self.findings and bool(self.passed)

    @property
    def diagnosis(self) -> str | None:
        """The cause that explains most findings, of the smallest case where several do."""
        # what raises says so itself; wrong numbers want a cause
        findings = [f for f in self.findings if f.kind != "crash"] or self.findings
        votes = Counter(cause for f in findings for cause in dict.fromkeys(f.causes))
        # a NaN that no mask can explain is not a mask's
        vague = (*diagnose.VAGUE, "NaN where") if diagnose.NOT_FINITE in votes else diagnose.VAGUE
        known = [cause for cause in votes if not cause.startswith(vague)]
        # what a case has, or its numbers are made of, says less than what is done with it
        weak = lambda cause: cause in diagnose.TAKES.values() or isinstance(cause, diagnose.Reading)
        best = max(known, key=lambda cause: (votes[cause], not weak(cause)), default=None)
        if best and ", on " in best:  # a guess about some blocks is one of many, a reading is a fact
            equals = (c for c in known if isinstance(c, diagnose.Reading) and votes[c] == votes[best])
            best = next(equals, best)
        unnamed = [f.diagnosis for f in findings if f.causes[0].startswith(vague)]
        kept = [f.diagnosis for f in findings if f.causes[0] == diagnose.EARLIER]
        if best and len(kept) > votes[best]:  # what is kept between calls can look like much
            return kept[0]
        # a cause that explains fewer than half as many findings as have none is not the cause
        return best if best and votes[best] * 2 >= len(unnamed) else max(unnamed, key=unnamed.count, default=best)

    def to_json(self) -> str:
        """Everything in the report, for machines."""
        findings = [{name: x for name, x in asdict(f).items() if name != "evidence"} for f in self.findings]
        told = {"schema": SCHEMA, "version": version("ringref"), "ok": bool(self), "diagnosis": self.diagnosis}
        return json.dumps(told | asdict(self) | {"findings": findings}, indent=1)

    def __rich_console__(self, console: Console, _: Any) -> Iterator[Any]:
        verdict = "passes" if self else "is wrong" if self.findings else "was not judged"
        total = len(self.passed) + len({(f.case, f.p) for f in self.findings})
        told = f"{self.candidate} {verdict}: {len(self.passed)} of {total} cases pass, {self.seconds:.0f} s"
        yield Text(told, style="bold green" if self else "bold red")
        if self.findings:
            yield Text(f"most likely: {self.diagnosis}", style="bold")
            heads = ("case", "p", "where", "error/budget", "finding")
            table = Table(*(Column(head, overflow="fold") for head in heads), pad_edge=False)
            for f in self.findings[:12]:
                place = [f.tensor, None if f.rank is None else f"rank {f.rank}"]
                size = "-" if f.error is None else f"{f.error:.1e}/{f.budget:.1e}"
                text = f.diagnosis + (f" at {f.where}" if f.where else "")
                table.add_row(f.case, str(f.p), " ".join(filter(None, place)) or "-", size, text)
            yield table
            if len(self.findings) > 12:
                yield f"and {len(self.findings) - 12} more in report.findings"
            yield f"smallest failing case:\n{self.findings[0].snippet}"
        elif self.margin:
            used = ", ".join(f"{name} {share:.0%}" for name, share in self.margin.items())
            yield f"most of its error budget that any case used: {used}"
        yield from (f"convention: {line}" for line in self.conventions)
        yield from (f"growth: {name} {value:.3g}" for name, value in self.growth.items())
        if self.not_judged:
            yield "not judged: " + "; ".join(self.not_judged)

    def _printed(self, **how: Any) -> Console:
        console = Console(width=80, file=io.StringIO(), highlight=False, markup=False, force_jupyter=False, **how)
        console.print(self)
        return console

    def __str__(self) -> str:
        return self._printed(color_system=None).file.getvalue()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        html = self._printed(record=True)
        return html.export_html(inline_styles=True, code_format="<pre style='line-height:1.2'>{code}</pre>")


def _finding(case: Case, kind: str, cause: str, detail: str = "", **told: Any) -> Finding:
    told = {"causes": [cause]} | told
    return Finding(kind, f"{cause}: {detail}" if detail else cause, case.name, case.p, **told)
