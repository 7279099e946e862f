"""Run a candidate's cases and compare what every rank returns with the truth."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import methodcaller
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..comm.launch import pickled
from . import adapt, diagnose
from .cases import FEATURES, PLANS, SIMPLER, Case, _names, apart, cases
from .pool import Pool
from .report import Finding, Report, _finding
from .sanitizer import where
from .truth import Truth

TENSORS = ("out", "lse", "dq", "dk", "dv", "dsink")
SIMPLIFIED = 3  # findings after which a failing case is told as it is
LOW = ("bfloat16", "float16")
VALUES = ("value", "property")  # kinds of findings that are about numbers
DEEP = 2  # unknown findings after which mistakes on some blocks only are not looked for
PATIENCE = {True: 15.0, False: 45.0}  # seconds, quick or not, after which a wrong candidate has been seen enough
DEADLINE = {True: 10.0, False: 30.0}  # seconds for a case
PROPERTIES = {  # what it means when the first step is right and such a step is not
    "batch": "another sequence of the batch matters",
    "constant": "constant v does not give constant out: weights do not sum to 1",
    "future": "later tokens change earlier results, or change them wrongly",
}


def check(
    fn: Callable, *, layout="contiguous", ranks=4, features=(), claims=None, quick=False, seed=0,
    only: Sequence[Case] | None = None, backend="gloo",
    deadline: float | None = None, stop_after=8, fail_fast=False, progress: bool | None = None,
    pool: Pool | None = None,
) -> Report:  # fmt: skip
    """Judge an attention over ranks; see the module's text for the call and the features.

    Args:
        fn: the candidate, `fn(q, k, v, *, causal, group, ...)`; a notebook's function, a lambda or a closure will do.
        layout, ranks, features, claims, quick, seed: which cases, see `cases`.
        only: these cases instead, `check(fn, only=[Case(...)])`.
        backend: "gloo" on the CPU; "nccl" for values, hangs and growth on GPUs (there messages are not watched).
        deadline: seconds that a case may take before it counts as hung, 30 (`quick`: 10); a deadlock is known after 1.
        stop_after: failing cases after which the rest is left, as it is if one failed and another case like the last
            would end after 45 seconds (`quick`: 15).
        fail_fast: stop at the first failing case whose cause has a name.
        progress: a progress bar; None shows one on a terminal.
        pool: workers to use, for many sweeps in a row.

    Raises:
        TypeError: the candidate cannot be sent to other processes.
        ValueError: an argument is wrong, named.
    """
    usable(fn, backend, deadline, stop_after)
    deadline = DEADLINE[bool(quick)] if deadline is None else deadline
    if only is not None:
        if not isinstance(only, (list, tuple)) or not all(isinstance(case, Case) for case in only):
            raise ValueError(f"only: expected a list of cases, got {only!r}")
        return _sweep(fn, list(only), pool or _shared_pool(), deadline, stop_after, fail_fast, progress)
    features = _names(features)
    todo = cases(features=features, layout=layout, ranks=ranks, quick=quick, claims=claims, seed=seed)
    size = max(case.world for case in todo)
    size = min(size, torch.cuda.device_count()) if backend == "nccl" else size
    with nullcontext(pool) if pool else Pool(size, backend) as workers:
        fits = [case for case in todo if case.world <= workers.size]
        report = _sweep(fn, fits, workers, deadline, stop_after, fail_fast, progress, PATIENCE[bool(quick)])
    missing = [f"feature {name}" for name in FEATURES if name not in features]
    missing += apart(features) + [f"argument {name}" for name in adapt.undeclared(fn, features)]
    for text, there in (
        ("messages, which NCCL carries itself (run on gloo to watch them)", backend == "nccl"),
        ("growth, which wants p = 4 and p = 8", claims and not report.growth),
        (f"{len(todo) - len(fits)} cases for more ranks than can be had here", len(fits) < len(todo)),
    ):
        missing += [text] if there else []
    report.layout = layout if isinstance(layout, str) else adapt.name_of(layout)
    report.not_judged = missing + report.not_judged
    return report


def usable(fn: Callable, backend: str, deadline: float | None, stop_after: int = 1) -> None:
    """`check`'s errors, where the candidate cannot travel or another argument is wrong."""
    for name, given, fits, wanted in (
        ("fn", fn, callable(fn), "a function"),
        ("backend", backend, backend in ("gloo", "nccl"), "gloo or nccl"),
        ("backend", backend, backend != "nccl" or torch.cuda.is_available(), "gloo where there is no GPU"),
        ("deadline", deadline, deadline is None or _more_than_0(deadline), "more than 0"),
        ("stop_after", stop_after, _more_than_0(stop_after), "more than 0"),
    ):
        if not fits:
            raise ValueError(f"{name}: expected {wanted}, got {given!r}")
    try:
        pickled(fn)
    except Exception as error:  # whatever holds a lock, a file, a process group
        raise TypeError(f"fn: {adapt.name_of(fn)} cannot be sent to other processes: {error}") from error


def _more_than_0(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0


@functools.cache
def _shared_pool() -> Pool:
    return Pool(8)


def _sweep(
    fn: Callable, todo: list[Case], pool: Pool, deadline, stop_after, fail_fast, progress, patience=math.inf
) -> Report:
    report, began = Report(adapt.name_of(fn)), time.monotonic()
    last = began
    judge, failed, hangs = Judge(fn, pool, report, deadline), 0, 0
    if (heads := getattr(fn, "convention", "all")) != "all":
        todo = [replace(case, heads=heads) if case.dilation else case for case in todo]
        report.conventions.append(f"dilation serves {heads} heads, as its adapter declares; LongNet serves all")
    shown = sys.stderr.isatty() if progress is None else progress
    bar = {"console": Console(stderr=True), "transient": True, "disable": not shown}
    for done, case in enumerate(track(todo, report.candidate, **bar), 1):
        found = judge.judge(case)
        failed, hangs = failed + bool(found), hangs + any(f.kind == "hang" for f in found)
        now = time.monotonic()
        enough = failed >= stop_after or hangs >= 3 or (failed and 2 * now - last - began > patience)
        last = now
        named = fail_fast and found and not found[0].causes[0].startswith(diagnose.VAGUE)
        if (enough or named) and done < len(todo):
            report.not_judged.append(f"{len(todo) - done} further cases, after {failed} that failed")
            break
    judge.growth()
    for why, names in judge.refusals.items():
        report.not_judged.append(f"{names[0] if len(names) == 1 else f'{len(names)} cases'}, refused: {why}")
    # where several causes explain a finding equally well, tell the one that explains the others too
    for f in report.findings:
        f.diagnosis = report.diagnosis if f.kind == "value" and report.diagnosis in f.causes else f.diagnosis
    report.seconds = time.monotonic() - began
    return report


class Judge:
    """Runs cases and writes what it finds into a report."""

    def __init__(self, fn: Callable, pool: Any, report: Report, deadline: float):
        self.fn, self.pool, self.report, self.deadline = fn, pool, report, deadline
        self.pickled = pickled(fn)
        self.form: tuple[str, str] | None = None  # of the lse: its base and shape, and where it was first seen
        self.bytes: dict[tuple[int, int], tuple[float, float]] = {}
        self.refusals: dict[str, list[str]] = {}
        self.ran: list[Case] = []
        self.cause, self.simplified, self.simplest = diagnose.RACE, 0, None
        self.able: set[tuple[bool, bool]] = set()  # kinds of heads that p does not divide, which it has served

    def judge(self, case: Case) -> list[Finding]:
        """Run one case; its findings, which join the report, or its name joins what passed."""
        found = self.look(case)
        if found is None:
            return []
        culprit, told = None, case
        # what differs by chance may well pass alone
        once = (diagnose.SILENT, diagnose.CHANCE)
        if found and found[-1].causes[0] not in once and not self.known(case, found):
            culprit, case, found = self.alone(case, found)
        for finding in found:
            if finding.evidence:
                finding.causes = self.why(case, *finding.evidence)
                finding.diagnosis, finding.evidence = finding.causes[0], None
            elif finding.kind == "property" and case is self.simplest and (far := diagnose.far(case)):
                finding.causes, finding.diagnosis = [far], f"{far}: {finding.diagnosis}"
            if culprit:
                finding.diagnosis += f" (after {culprit})"
            finding.snippet = self.snippet([culprit, case] if culprit else [case])
        self.report.findings += found
        self.report.passed += [] if found else [str(case)]
        self.ran.append(told)
        return found

    def snippet(self, todo: list[Case]) -> str:
        """The lines that judge these cases again."""
        module, name = getattr(self.fn, "__module__", None), adapt.name_of(self.fn)
        known = module not in (None, "__main__") and getattr(self.fn, "__qualname__", "").isidentifier()
        source = f"from {module} import {name} as candidate" if known else f"candidate = {name}  # yours"
        told = ", ".join(map(repr, todo))
        return f"from ringref.oracle import Case, check\n{source}\ncheck(candidate, only=[{told}])"

    def look(self, case: Case, new=False) -> list[Finding] | None:
        """What is wrong with one case, wrong values not yet named; None if it was refused."""
        results = self.run(case, new=new)
        if self.refused(case, results):
            return None
        found, self.way = self.messages(case, results), diagnose.direction(results)
        broken = any(r["error"] or "hang" in r or "crash" in r for r in results.values())
        if not broken and all(f.causes[0] in diagnose.HARMLESS for f in found):
            for team, members in enumerate(case.teams):
                wrong = self.values(case, team, [results[rank] for rank in members])
                if wrong:
                    return found + wrong
        return found

    def alone(self, case: Case, found: list[Finding]) -> tuple[Case | None, Case, list[Finding]]:
        """A failing case in new processes: as simple as it still fails, or what came before it that it needs."""
        if not (again := self.look(case, new=True)):
            # one search is enough: what is kept between calls is kept in all cases
            before = [one for one in self.ran if one.world == case.world and self.cause == diagnose.RACE]
            while len(before) > 1:  # halves, of which one is enough
                half = before[len(before) // 2 :]
                before = half if self.after(half, case) else before[: len(before) // 2]
            culprit = before[0] if before and self.after(before, case) else None
            self.cause = diagnose.EARLIER if culprit else self.cause
            for f in found if self.cause != diagnose.RACE or found[-1].kind not in ("message", "hang") else ():
                causes = [self.cause]
                if culprit and f.evidence:  # is it that case's numbers?
                    got, wrong, truths, i = f.evidence
                    told = diagnose.name(truths[i], got, wrong, [Truth(culprit, culprit.data())], [], deep=False)
                    causes = told if told[0].startswith(diagnose.CALLS) else causes
                    self.cause = causes[0]
                f.diagnosis, f.causes, f.evidence = causes[0], causes, None
            return culprit, case, found
        if again[-1].kind == "crash":
            h = max(4, 2 * case.p)  # is it the heads, or a rank that has nothing?
            even = replace(case, h=h, g=h) if case.h % case.p or case.g % case.p else case
            for cause, other in ((diagnose.ODD, even), (diagnose.EMPTY, case.filled())):
                trial = again if other is case else self.look(other)
                if trial and trial[-1].kind != "crash":  # which says more
                    return None, other, trial
                if trial == [] and again[-1].causes[0].startswith("it raises"):
                    again[-1].causes, again[-1].diagnosis = [cause], f"{cause}: {again[-1].diagnosis}"
        self.simplified += again[-1].kind in VALUES
        if self.simplified > SIMPLIFIED or again[-1].kind not in VALUES:
            return None, case, again
        for _ in range(2):  # what could not go at first may go once other things have gone
            for simpler in (*(methodcaller("without", names) for names in SIMPLER), Case.shorter):
                less = simpler(case)
                # numbers must be wrong: a simpler case may lack an argument, and crash
                if less != case and (trial := self.look(less)) and trial[-1].kind in VALUES:
                    case, again = less, trial
        self.simplest = case
        return None, case, again

    def known(self, case: Case, found: list[Finding]) -> bool:
        """Whether causes of earlier findings explain these; if so, they are named."""
        last = found[-1]
        if last.evidence:
            last.causes = self.why(case, *last.evidence, quickly=True) or last.causes
            if last.causes[0].startswith(diagnose.UNKNOWN):
                return False
            last.diagnosis, last.evidence = last.causes[0], None
            return True
        # messages and hangs have numbers of their own; what raises is told in the same words
        told = last.kind in ("message", "hang")
        same = [f for f in self.report.findings if (f.causes == last.causes if told else last.diagnosis in f.diagnosis)]
        if same and not told:
            last.causes, last.diagnosis = same[0].causes, same[0].diagnosis
        return bool(same)

    def after(self, before: list[Case], case: Case) -> bool:
        """Whether a case fails after these, in new processes."""
        for i, one in enumerate(before):
            self.run(one, new=i == 0)
        return bool(self.look(case))

    def run(self, case: Case, poison: float = math.nan, fresh: float = math.nan, new=False) -> dict[int, dict]:
        """Every rank's results."""
        common = {"groups": case.teams, "call": pickled(case.call()), "steps": []}
        common |= {"poison": poison, "fresh": fresh, "views": case.views, "program": []}
        # a row of padding has no gradient: then dO is not one number
        common |= {"dout": "" if case.padding and case.dout == "expanded" else case.dout}
        jobs = {rank: common | {"measure": case.plan == "growth"} for rank in range(case.world)}
        for team, members in enumerate(case.teams):
            inputs = [data for _, data in case.steps(team)]
            for i, rank in enumerate(members):
                steps = [{name: x.clone() for name, x in case.mine(data, i).items()} for data in inputs]
                jobs[rank] |= {"program": case.program, "steps": steps, "told": case.told(i)}
        return self.pool.run(self.pickled, jobs, self.deadline, new=new)

    def refused(self, case: Case, results: dict[int, dict]) -> bool:
        """Whether every rank declined the case by NotImplementedError; any exception may decline heads that p does
        not divide (as an all-to-all over heads does), and a dtype that not everybody has.
        """
        odd = bool(case.h % case.p), bool(case.g % case.p)
        uneven = any(odd) and odd not in self.able
        errors = [results[rank]["error"] for team in case.teams for rank in team]
        rare = case.dtype in ("float64", "float16")
        if not all(e and (e["refused"] or uneven or rare) for e in errors):
            self.able |= set() if any(errors) else {odd}
            return False
        why = (errors[0]["text"].splitlines() or ["NotImplementedError"])[0][:200]
        self.refusals.setdefault(why, []).append(str(case))
        return True

    def messages(self, case: Case, results: dict[int, dict]) -> list[Finding]:
        """What the sanitizer saw, hangs, crashes and exceptions: the first cause, not what follows from it."""

        def tell(kind: str, cause: str, detail: str, rank: int, line: Any = None) -> Finding:
            return _finding(case, kind, cause, detail, rank=rank, where=where(line) if line else None)

        died = [rank for rank, r in results.items() if "crash" in r]
        # a rank that lost its connection to one that died has no story of its own
        told = ((rank, r["error"]) for rank, r in results.items() if r["error"])
        errors = {rank: e for rank, e in told if not died or "onnection" not in e["text"]}
        seen = [(rank, f) for rank, r in results.items() for f in r.get("findings", ())]
        seen = [(rank, f) for rank, f in seen if not ((errors or died) and f["kind"] == "unfinished")]
        if differ := diagnose.mismatched(results):
            return [tell("message", *differ[0])]
        if seen:
            rank, f = min(seen, key=lambda one: list(diagnose.MESSAGES).index(one[1]["kind"]))
            cause = diagnose.GROUP if case.groups and f["kind"] == "self-send" else diagnose.MESSAGES[f["kind"]]
            return [tell("message", cause, f"{f['text']} ({f['phase']}, hop {f['hop']})", rank, f["line"])]
        # an exception on one rank makes its neighbours lose their connection or wait: the first cause is the story
        for rank, e in sorted(errors.items(), key=lambda item: "onnection" in item[1]["text"])[:1]:
            cause, text = diagnose.crash(e)
            ours = case.groups and e["type"] not in ("NameError", "ImportError", "ModuleNotFoundError")
            return [tell("crash", diagnose.GROUP if ours else cause, text, rank, e["line"])]
        if died:
            return [tell("crash", "the process died", "a fault in native code, or os._exit", died[0])]
        if any("hang" in r for r in results.values()):
            return [tell("hang", *diagnose.hang(case, results))]
        for key, cause in diagnose.WRITTEN.items():
            for rank, r in results.items():
                if r[key]:
                    return [tell("property", cause, ", ".join(r[key]), rank)]
        return []

    def values(self, case: Case, team: int, results: list[dict]) -> list[Finding]:
        """Every tensor of every step on every rank, up to the first step that is wrong."""
        if case.plan == "growth":
            self.bytes[case.p, case.n] = max(r["peak"] for r in results), max(r["sent"] for r in results)
            return []
        truths, shown = [], []
        for i, (_, data) in enumerate(case.steps(team)):
            mine = [self.unpadded(case, rank, r["steps"][i]) for rank, r in enumerate(results)]
            if not any(m.get("dlse_used") for m in mine):
                data = data | {"dlse": torch.zeros_like(data["dlse"])}
            truths.append(Truth(case, data))
            if found := self.natural(case, truths[-1], mine):
                return found
            if self.form and "base 2" in self.form[0]:
                truths[-1] = Truth(case, data | {"dlse": data["dlse"] * math.log2(math.e)})
            shown.append(mine)
        found = next((found for i, mine in enumerate(shown) if (found := self.step(case, mine, truths, i))), [])
        if not found and case.plan == "twice":
            one, two = ([m[name] for m in mine for name in TENSORS if m.get(name) is not None] for mine in shown)
            if not all(map(torch.equal, one, two)):
                return [_finding(case, "property", diagnose.CHANCE)]
        return found

    def unpadded(self, case: Case, rank: int, step: dict[str, Any]) -> dict[str, Any]:
        """A rank's results without the rows that the layout pads."""
        found, slots = dict(step), case.slots[rank]
        for name in TENSORS if (slots < 0).any() else ():
            x, queries = found.get(name), name in ("out", "lse", "dq")
            if x is not None and name != "dsink" and not (queries and case.queries):
                dim = 1 + (name == "lse" and x.shape[-1] == len(slots))
                found[name] = x.index_select(dim, (slots >= 0).nonzero()[:, 0]) if x.shape[dim] == len(slots) else x
        return found

    def natural(self, case: Case, truth: Truth, mine: list[dict]) -> list[Finding]:
        """Put every rank's lse in natural logarithms, b h s. Another form is a convention, two forms are a finding."""
        for rank, m in enumerate(mine):
            x, want = m["lse"], truth.part("lse", rank)
            x = x if x is None or x.ndim < 4 else x[..., 0]
            if x is None or not want.numel() or x.shape not in (want.shape, want.mT.shape):
                continue
            if case.dlse and m.get("dq") is not None and not m.get("dlse_used") and m["lse"].ndim == 3:
                return [_finding(case, "value", "lse carries no gradient", rank=rank, tensor="lse")]
            x, shape = (x.double(), "b h s") if x.shape == want.shape else (x.double().mT, "b s h")
            seen = want.isfinite() & x.isfinite()
            natural, two = ((unit * x[seen] - want[seen]).norm() for unit in (1.0, math.log(2)))
            base = "natural" if natural < 0.02 * two else "base 2" if two < 0.02 * natural else None
            form, place = f"{base}, {shape}", f"rank {rank} of {case}"
            if base and not self.form:
                self.form = form, place
                self.report.conventions += [] if form == "natural, b h s" else [f"lse is {form}"]
            if base and form != self.form[0]:
                detail = f"{form} on {place}, but {self.form[0]} on {self.form[1]}"
                return [_finding(case, "value", "lse has two forms", detail, rank=rank, tensor="lse")]
            m["lse"] = x * math.log(2) if self.form and "base 2" in self.form[0] else x
        return []

    def step(self, case: Case, mine: list[dict], truths: list[Truth], index: int) -> list[Finding]:
        """The first wrong tensor of one step, in the order in which errors spread, and what it takes to name it."""
        truth, margin = truths[index], self.report.margin
        got: dict[str, list[Tensor]] = {}
        wrong: dict[str, dict[str, Any]] = {}
        for name in TENSORS:
            if name not in mine[0] or (name == "lse" and mine[0]["lse"] is None and not case.dlse):
                continue
            wanted, worst = [truth.part(name, rank) for rank in range(len(mine))], (0.0,)
            # no row, no gradient
            rows = [len(case.asks[i]) if name == "dsink" else want.numel() for i, want in enumerate(wanted)]
            given = [wanted[i] * 0 if m[name] is None and not rows[i] else m[name] for i, m in enumerate(mine)]
            whys = [_misfit(name, x, want, case) for x, want in zip(given, wanted, strict=True)]
            if any(whys) and wrong:  # it may follow from what is wrong already
                break
            for rank, why in enumerate(whys):
                if why:
                    return [_finding(case, "value", why, rank=rank, tensor=name, error=math.inf, budget=0.0)]
            got[name] = [x.double() for x in given]
            if name == "dsink":  # each of its own rows, where it is not summed already
                one, *others = got[name]
                apart = any((x - one).norm() > 1e-2 * one.norm() for x in others)
                got[name] = [sum(got[name])] * len(mine) if apart else got[name]
            for rank, x in enumerate(got[name]):
                error, budget = truth.error(name, rank, x)
                worst = max(worst, (error / budget, error, budget, rank))
            if worst[0] > 1:
                wrong[name] = dict(zip(("error", "budget", "rank"), worst[1:], strict=True)) | {"tensor": name}
            else:
                margin[name] = max(margin.get(name, 0.0), worst[0])
        if not wrong:
            return []
        first = next(iter(wrong.values()))
        text = PROPERTIES.get(PLANS[case.plan][0][index])
        if text and (first["error"] > 0.02 or case.dtype not in LOW) and first["error"] < math.inf:
            return [_finding(case, "property", text, **first)]
        return [_finding(case, "value", diagnose.UNKNOWN, evidence=(got, list(wrong), truths, index), **first)]

    def why(self, case: Case, got: dict, wrong: list[str], truths: list, index: int, quickly=False) -> list[str]:
        """Causes that explain it, the best first; NaN is asked whether it changes with what the oracle planted.
        `quickly` only asks the causes of earlier findings.
        """
        truth, found = truths[index], self.report.findings
        known = [cause for f in found for cause in f.causes if f.kind == "value"]
        pairs = [(x, truth.part(name, rank)) for name in wrong for rank, x in enumerate(got[name])]
        if wrong[0] == "lse" and any((x[want == -math.inf].abs() < 1e4).any() for x, want in pairs[: case.p]):
            return [diagnose.BLIND]
        far, moderate = diagnose.far(case), case.without(["shift", "spread"])
        forward = [name for name in wrong if name in ("out", "lse")]  # from where a gradient may have its NaN
        lost = [name for name in forward or wrong if any(x.isnan().any() for x in got[name])]
        if lost:
            where = diagnose.not_finite(truth, got, lost)
            if where == far and case is not self.simplest and self.look(moderate):
                where = diagnose.NOT_FINITE  # it is there without the large scores too
            # a NaN where the mistake leaves a query nothing to see
            none = {n: [x.nan_to_num(-math.inf if n == "lse" else 0.0) for x in each] for n, each in got.items()}
            asked, vague = (truth, none, wrong, [], known, self.way, False), (diagnose.UNKNOWN, *diagnose.NOT_LARGE)
            # where only rows without a number are wrong, they say nothing
            rest = any(((x - want).abs() > 1e-3)[x.isfinite() & want.isfinite()].any() for x, want in pairs)
            known_as = lambda x: not x.startswith(vague) and (rest or not isinstance(x, diagnose.Reading))
            unseen = lambda: [x for x in diagnose.name(*asked, quickly=quickly) if known_as(x)]
            if quickly:
                said = [cause for cause in known if cause in (diagnose.UNWRITTEN, diagnose.EARLY, where)]
                return unseen()[:1] or said[:1]
            for cause, planted in ((diagnose.UNWRITTEN, {"fresh": 0.0}), (diagnose.EARLY, {"poison": 0.0})):
                calm = self.run(case, **planted).values()
                now = [r["steps"][index].get(name) for r in calm if r["steps"] for name in lost]
                spoken = planted.get("fresh") == 0.0 or any(r["ops"] for r in calm)
                if now and spoken and all(x is not None and not x.isnan().any() for x in now):
                    return [cause]
            return (unseen() if where == diagnose.NOT_FINITE and forward else []) or [where]
        if far in known and not self.look(moderate):
            return [far]
        others = truths[:index] + truths[index + 1 :]
        unknown = sum(f.causes[0].startswith(diagnose.UNKNOWN) for f in found)
        causes = diagnose.name(truth, got, wrong, others, known, self.way, unknown < DEEP, quickly)
        if quickly and not causes:
            return []
        if causes[0].startswith(diagnose.UNKNOWN) and any((x.isinf() & ~want.isinf()).any() for x, want in pairs):
            causes = [diagnose.not_finite(truth, got, wrong)]
        none, simplest = causes[0].startswith(diagnose.UNKNOWN), case is self.simplest
        vague = causes[0].startswith(diagnose.VAGUE) or "out is zero" in causes
        refused = str(case.without(["dtype", "sharp"])) in sum(self.refusals.values(), [])
        if simplest and none and case.dtype in LOW and not refused:
            size = max(truth.error(wrong[0], rank, x)[0] for rank, x in enumerate(got[wrong[0]]))
            return [diagnose.PRECISE if size < 0.3 or case.offset else diagnose.COARSE]
        needs = next((text for (field, x), text in diagnose.TAKES.items() if getattr(case, field) == x), None)
        if none and needs in known:
            return [needs]
        # a case that fails no more without its large scores fails by them, whatever else would look the same
        if far and not causes[0].startswith(diagnose.NOT_LARGE):
            if simplest or (vague and not unknown and not self.look(moderate)):
                return [far]
        if simplest and none and "+" in case.name:
            causes = [needs or f"{causes[0]}; it takes {case.name.partition(' + ')[2]}"]
        # the same case in the whole world passed before this one came
        plain = f"{'causal' if case.causal else 'full'}-p{case.p}"
        return [diagnose.GROUP] if case.groups and plain in self.report.passed else causes

    def growth(self) -> None:
        """Fit bytes per rank as n and p double; with the same shard, a ring's peak does not depend on p."""
        start, by_n, by_p = (self.bytes.get(key) for key in ((4, 128), (4, 256), (8, 256)))
        if not (start and by_n and by_p):
            return
        facts = {"peak bytes per rank, p = 4, n = 128": start[0]}
        for i, what in enumerate(("the peak", "bytes sent")):
            for end, way in ((by_n, "n (p fixed)"), (by_p, "p (n/p fixed)")):
                facts[f"exponent of {what} in {way}"] = math.log2(max(end[i], 1) / max(start[i], 1))
        self.report.growth = facts
        slope = facts["exponent of the peak in p (n/p fixed)"]
        if slope > 0.4:
            text = f"claims a ring, holds O(n): with n/p fixed the peak grows as p^{slope:.2f}"
            told = _finding(Case("growth", 8), "growth", text, tensor="bytes", error=slope, budget=0.4)
            self.report.findings.append(told)


def _misfit(name: str, x: Tensor | None, want: Tensor, case: Case) -> str | None:
    """Why a result cannot be compared."""
    if x is None:
        return f"{name} is None: nothing reaches it"
    if x.shape != want.shape:
        return f"{name} has shape {[*x.shape]}, not {[*want.shape]}"
    dtype = str(x.dtype).removeprefix("torch.")
    return f"out is {dtype} where q, k and v are {case.dtype}" if name == "out" and dtype != case.dtype else None
