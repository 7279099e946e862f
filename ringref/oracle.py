"""Judge anybody's ring, collective or dilated attention: what is wrong, where, and most likely why.

    from ringref.oracle import check
    report = check(my_attention, layout="zigzag", ranks=4, features={"causal", "gqa"})

The candidate is `fn(q, k, v, *, causal, group) -> out | (out, lse)` on local shards `b s h d`. It runs on real
processes with whatever communication it uses itself; nothing of it is trusted. A case is a small problem, cut
across p ranks by `layout`; the judge is `dense_attention` on the whole problem in float64. A feature may add a
keyword to the call:

| feature | adds | meaning |
|---|---|---|
| causal | | a query sees its own position and those before; `causal=False` is judged always |
| gqa | | fewer key/value heads than query heads: head j uses j // (h/g) |
| mask | `mask_mod` | FlexAttention's signature, over global indices |
| window | `window` | `(left, right)`: key − query between −left and right |
| dilation | `dilation` | a `ringref.Dilation` |
| uneven, empty | `positions` | this rank's global positions; lengths differ, or are zero |
| lse | | the second result is a differentiable lse; its gradient is judged too |
| subgroup | | `group` is not the world |

**Budget.** A tensor's error is ‖candidate − float64‖ / ‖float64‖ on its rank. It may be `MULTIPLE` times the error
that plain PyTorch attention makes in the same dtype on the same inputs on that rank (float64 is granted float32's
error: many accumulate in float32 on purpose), and never less than `FLOOR` machine epsilons are granted.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import io
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import cloudpickle
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from . import adapt, diagnose
from .comm import Ring
from .dense import dense_attention
from .layout import LAYOUTS, Dilation, partition
from .sanitizer import Pool, Ranks, where

FEATURES = ("causal", "gqa", "mask", "window", "dilation", "uneven", "empty", "lse", "subgroup")
TENSORS = ("out", "lse", "dq", "dk", "dv")
MULTIPLE = {"float64": 4.0, "float32": 4.0, "bfloat16": 2.0}
FLOOR = {"float64": 8.0, "float32": 8.0, "bfloat16": 0.2}
PLANS = {  # the inputs of each step, and which pass runs on which: forward, backward, inference
    "train": (("first",), "f0 b0"),
    "stacked": (("first", "second"), "f0 f1 b1 b0"),
    "properties": (("first", "batch", "constant", "future"), "i0 i1 i2 i3"),
    "steps": (("first", "second", "again"), "f0 b0 f1 b1 f2 b2"),
    "growth": (("first",), "f0 b0"),
}
PASSES = {"f": "forward", "b": "backward", "i": "inference"}
PROPERTIES = {  # what it means when the first step is right and such a step is not
    "batch": "another sequence of the batch matters",
    "constant": "constant v does not give constant out: weights do not sum to 1",
    "future": "later tokens change earlier results, or change them wrongly",
}

# -------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, repr=False)
class Case:
    """One problem: shapes, masks and how it is cut. `Case(...).check(fn)` runs it alone and raises if `fn` is wrong.

    Args:
        name: how the report calls it.
        p: ranks that share the sequence.
        n, b, h, g, d: tokens, batch, query heads, key/value heads, head dim.
        plan: "train" (forward, backward), "steps" (three training steps, the third like the first), "stacked" (two
            forwards before their backwards), "properties" (forwards on altered inputs), "growth" (bytes only).
        heads: "all", or "grouped" for the convention of dilated attention that `ringref.Dilation` names so.
        shift: added to every score (through one more direction of q and k): exp must not overflow or vanish.
        sharp: factor on q and k: softmax close to one-hot.
        offset: added to v and dO of the first half of the ranks, taken from the others': a running sum grows, then
            cancels, and what it lost by rounding shows.
        packed: q, k and v are views of one tensor, as a packed projection gives them.
        lengths: tokens of each rank, contiguous; None cuts by `layout`.
        groups: the ranks of each process group in a world; None is one group that is the world.
    """

    name: str
    p: int = 2
    n: int = 12
    causal: bool = False
    b: int = 2
    h: int = 4
    g: int = 4
    d: int = 8
    dtype: str = "float32"
    layout: str = "contiguous"
    plan: str = "train"
    mask: str | None = None
    window: tuple[int, int] | None = None
    dilation: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    heads: str = "all"
    lengths: tuple[int, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    positions: bool = False
    dlse: bool = False
    shift: float = 0.0
    sharp: float = 1.0
    offset: float = 0.0
    packed: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        told = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return f"Case({', '.join(f'{name}={value!r}' for name, value, default in told if value != default)})"

    def __str__(self) -> str:
        return f"{self.name}-p{self.p}"

    def check(self, fn: Callable, **options: Any) -> Report:
        """Judge `fn` on this case alone; the report, or AssertionError with the report as its text. For pytest:

        @pytest.mark.parametrize("case", cases(features={"causal"}), ids=str)
        def test_attention(case):
            case.check(my_attention)
        """
        report = _sweep(fn, [self], pool=options.pop("pool", None) or _shared_pool(), **options)
        if not report:
            raise AssertionError(f"\n{report}")
        return report

    @property
    def teams(self) -> list[list[int]]:
        """The process groups, as ranks of the world."""
        return [list(team) for team in self.groups or [range(self.p)]]

    @property
    def world(self) -> int:
        return max(map(max, self.teams)) + 1

    @functools.cached_property
    def shards(self) -> list[Tensor]:
        """Every rank's global positions."""
        if self.lengths is not None:
            return list(torch.arange(self.n).split(list(self.lengths)))
        return [partition(self.n, _Seat(i, self.p), self.layout).positions for i in range(self.p)]

    def call(self) -> dict[str, Any]:
        """The keywords of the call, less `group` and `positions`."""
        dilation = Dilation(*self.dilation, heads=self.heads) if self.dilation else None
        mask = make_mask(self.mask, self.n) if self.mask else None
        added = {"mask_mod": mask, "window": self.window, "dilation": dilation}
        return {"causal": self.causal} | {name: value for name, value in added.items() if value is not None}

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The definition, on the whole problem."""
        told = self.call()
        if window := told.pop("window", None):
            mask = told.get("mask_mod", lambda b, h, q, k: torch.ones((), dtype=torch.bool))
            told["mask_mod"] = lambda b, h, q, k: mask(b, h, q, k) & (q - k <= window[0]) & (k - q <= window[1])
        return dense_attention(q, k, v, **told)

    @functools.cached_property
    def times(self) -> Tensor:
        """How often each query sees each key, b h n n, asked of the judge: zero scores, and v the identity."""
        q = torch.zeros(self.b, self.n, self.h, self.n, dtype=torch.float64)
        v = torch.eye(self.n, dtype=torch.float64)[None, :, None, :].expand_as(q)
        out, lse = self.dense(q, q, v)
        return (out.transpose(1, 2) * lse.exp()[..., None]).round()

    def reference(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv of the whole problem in float64."""
        q, k, v = (data[name].double().requires_grad_() for name in "qkv")
        out, lse = self.dense(q, k, v)
        dlse = torch.where(lse.isfinite(), data["dlse"].double(), 0.0)
        torch.autograd.backward([out, lse], [data["do"].double(), dlse])
        return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}

    def data(self, team: int = 0, step: int = 0) -> dict[str, Tensor]:
        """The whole problem's q, k, v, dO and dlse in the case's dtype, by the seed."""
        # a sum of bytes, because hash() of a string changes from run to run
        gen = torch.Generator().manual_seed(sum(self.name.encode()) * 1009 + self.seed * 101 + team * 11 + step)
        b, n, h, g, d = self.b, self.n, self.h, self.g, self.d
        normal = functools.partial(torch.randn, generator=gen, dtype=torch.float64)
        q, k, v, do = (normal(b, n, heads, d) for heads in (h, g, g, h))
        q, k = q * self.sharp, k * self.sharp
        for rank, mine in enumerate(self.shards if self.offset else ()):
            sign = self.offset if rank < self.p / 2 else -self.offset
            v[:, mine], do[:, mine] = v[:, mine] + sign, do[:, mine] + sign
        if self.shift:
            # all in q: a large common part of k would magnify the rounding of correct code in dq, where it cancels
            q[..., 0], k[..., 0] = self.shift * math.sqrt(d), 1.0
        if self.plan == "stacked":
            q[:, :: max(1, n // 3)] = 0.0  # lse is 0 exactly where such a query sees one key
        dtype = getattr(torch, self.dtype)
        data = {name: x.to(dtype) for name, x in zip(("q", "k", "v", "do"), (q, k, v, do), strict=True)}
        return data | {"dlse": normal(b, h, n).to(torch.promote_types(dtype, torch.float32))}

    def steps(self, team: int = 0) -> list[tuple[str, dict[str, Tensor]]]:
        """The named inputs that the plan runs on; after the first, what differs must not matter to all or a part."""
        first, other = self.data(team), self.data(team, 1)
        inputs = {"first": first, "second": other, "again": first}
        inputs["constant"] = first | {"v": torch.full_like(first["v"], 0.75)}
        rows, late = torch.arange(self.b) > 0, torch.arange(self.n) >= self.n // 2
        for name, theirs in (("batch", rows[:, None, None, None]), ("future", late[:, None, None])):
            inputs[name] = first | {x: torch.where(theirs, 3 * other[x], first[x]) for x in "qkv"}
        return [(name, inputs[name]) for name in PLANS[self.plan][0]]

    @property
    def program(self) -> list[tuple[str, int]]:
        """Which passes over which step, in order."""
        return [(PASSES[word[0]], int(word[1])) for word in PLANS[self.plan][1].split()]


class _Seat(Ring):
    """A place in a ring that nobody talks over."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


def make_mask(kind: str, n: int) -> Callable:
    """The masks that the `mask` feature judges: documents, a pattern that differs by head and batch, blind queries,
    and one that keeps what it has computed, as a user's cache would (it is not the candidate's to write).
    """
    document = sum(torch.arange(n) >= start for start in (n // 5, n // 2, n - 2))
    stored: dict = {}

    def remembered(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        key = (tuple(q.flatten().tolist()), tuple(k.flatten().tolist()))
        if key not in stored:
            stored[key] = (q + k + (q * k) // 3) % 4 != 0
        return stored[key]

    masks = {
        "documents": lambda b, h, q, k: document.to(q.device)[q] == document.to(k.device)[k],
        "heads": lambda b, h, q, k: (q + 2 * k + 3 * h + b) % 4 != 0,
        "blind": lambda b, h, q, k: (q % 5 != 2) & ((q - k) % 3 != 1),
        "stored": remembered,
    }
    if kind not in masks:
        raise ValueError(f"mask must be one of {', '.join(masks)}, got {kind!r}")
    return masks[kind]


BF16 = {"dtype": "bfloat16", "per": 16, "sharp": 0.3}
GROWTH = {"plan": "growth", "b": 1, "d": 32, "h": 8, "g": 8}
AWKWARD = (((4, 8, 64), (1, 2, 4)), ((5, 7), (2, 3)), ((6,), (3,)), ((3, 12), (1, 5)))
# what a candidate must be able to do, name, the p it runs at, those that `quick` keeps, what differs from a plain case
EACH = (  # with and without causality
    ("", "", (1, 2, 3, 4, 5), (1, 2, 3, 4, 5), {}),
    ("gqa", "every head its own keys", (2,), (), {"g": 4}),
    ("", "two graphs", (1, 2, 3), (2,), {"plan": "stacked"}),
    ("", "properties", (1, 2, 3), (2,), {"plan": "properties"}),
    ("", "training", (3,), (), {"plan": "steps"}),
    *(("", f"scores {shift:+.0f}", (1, 2, 3), (), {"shift": shift}) for shift in (120.0, -120.0)),
    ("", "sharp", (4,), (), {"sharp": 2.0}),
    ("", "short shards", (4,), (), {"per": 2}),
    ("", "packed qkv", (2,), (), {"packed": True}),
    ("", "odd heads", (2, 4), (2,), {"h": 3, "g": 3}),
    ("", "longer", (2, 4), (), {"per": 20}),
    *(("mask", f"mask {x}", (1, 2, 3), (2,), {"mask": x}) for x in ("documents", "heads", "blind", "stored")),
    *(("window", f"window {x}", (1, 2, 3, 4), (2,), {"window": x}) for x in ((3, 2), (8, 0), (0, 7), (1, 1))),
    *(("dilation", f"dilation {x}", (2,), (2,), {"dilation": x, "h": 5, "g": 5, "per": 8}) for x in AWKWARD),
    *(("dilation", f"dilation {x}", (1, 3), (1,), {"dilation": x, "h": 10, "g": 5, "per": 8}) for x in AWKWARD),
    *(("uneven", "uneven", (len(x),), (3,), {"lengths": x}) for x in ((3, 8), (7, 2, 5), (1, 6, 3, 4))),
    *(("empty", "empty", (len(x),), (3,), {"lengths": x}) for x in ((5, 0), (0, 4, 5), (3, 0, 0, 5))),
)
ONCE = (  # causal if the candidate can
    ("", "float64", (2,), (), {"dtype": "float64"}),
    ("", "bfloat16", (4, 8), (), BF16),
    ("", "bfloat16 sums", (8,), (8,), BF16 | {"causal": False, "offset": 4.0}),
    ("causal", "eight ranks", (8,), (), {}),
    ("subgroup", "subgroup", (2,), (2,), {"groups": ((0, 2), (1, 3))}),
    ("subgroup", "subgroup", (2,), (), {"groups": ((1, 2),)}),
    ("subgroup", "subgroup", (3,), (), {"groups": ((1, 2, 4),)}),
    ("ring", "growth", (2, 4, 8), (2, 4, 8), GROWTH | {"per": 32}),
    ("ring", "growth", (4,), (4,), GROWTH | {"per": 64}),
)


def _names(features: Any) -> set[str]:
    """{"causal", "gqa"}, or "causal,gqa" as the command line has it."""
    return set(re.findall(r"[^\s,]+", features) if isinstance(features, str) else features)


def cases(*, features=(), layout="contiguous", ranks=4, quick=False, claims=None, seed=0) -> list[Case]:
    """The cases of a sweep, smallest first.

    Args:
        features: what the candidate can do, a subset of `FEATURES`; the rest is reported as not judged.
        layout: "contiguous", "zigzag" or "striped": how the sequence is cut.
        ranks: every p up to this is tried; with the default of 4 also p = 5 and p = 8.
        quick: a third of the cases.
        claims: "ring" asserts that a rank never holds the keys of all; bytes per rank are measured as p doubles.
        seed: another seed, other numbers; the same seed, the same run.

    Raises:
        ValueError: an unknown feature, layout or claim, or no ranks.
    """
    can = _names(features)
    known = {"features": (can, FEATURES), "layout": ({layout}, LAYOUTS), "claims": ({claims} - {None}, ("ring",))}
    for name, (given, choices) in known.items():
        if unknown := given - set(choices):
            raise ValueError(f"{name}: {', '.join(sorted(unknown))} unknown; choose from {', '.join(choices)}")
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks: expected a whole number of at least 1, got {ranks!r}")
    common = {"layout": layout, "dlse": "lse" in can, "positions": bool(can & {"uneven", "empty"}), "seed": seed}
    ways = [("full ", False, EACH), ("causal ", True, EACH)][: 1 + ("causal" in can)]
    made = []
    for word, causal, rows in [*ways, ("", "causal" in can, ONCE)]:
        for needs, name, ps, kept, changes in rows:
            ps = range(1, max(5, ranks) + 1) if not name else ps
            able = not needs or needs in can | {claims}
            for p in (p for p in ps if able and (p in kept or not quick)):
                # head counts are multiples of p, so that all-to-all over heads can be judged too
                told = common | {"causal": causal, "h": max(4, 2 * p), "g": max(2, p), "per": 6} | changes
                per, lengths = told.pop("per"), told.get("lengths")
                told["g"] = told["g"] if "gqa" in can else told["h"]
                told["n"] = p * (per + 2 * (per == told["h"]))  # s ≠ h: an lse b s h is known by its shape
                if lengths:
                    told["n"] = sum(lengths) if layout == "contiguous" or all(lengths) else p - 1
                    told["lengths"] = lengths if layout == "contiguous" else None
                made.append(Case((word + name).strip(), p, **told))
    made = [case for case in made if case.world <= (8 if ranks == 4 else ranks)]
    # the plain cases first, then the small ones, in the order of the table: so they say best what is wrong
    return sorted(made, key=lambda case: (case.name not in ("full", "causal"), case.p, case.world, case.n))


# ------------------------------------------------------------------------------------------- report


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
        votes = Counter(cause for f in self.findings for cause in dict.fromkeys(f.causes))
        # a NaN that no mask can explain is not a mask's
        vague = (*diagnose.VAGUE, "NaN where") if "NaN or inf" in votes else diagnose.VAGUE
        known = [cause for cause in votes if not cause.startswith(vague)]
        return max(known or votes, key=votes.__getitem__) if votes else None

    def to_json(self) -> str:
        """Everything in the report, for machines."""
        return json.dumps({"ok": bool(self), "diagnosis": self.diagnosis} | asdict(self), indent=1)

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


# ------------------------------------------------------------------------------------------ judging


def check(
    fn: Callable, *, layout="contiguous", ranks=4, features=(), claims=None, quick=False, seed=0, backend="gloo",
    deadline=30.0, stop_after=8, progress: bool | None = None, pool: Pool | None = None,
) -> Report:  # fmt: skip
    """Judge an attention over ranks; see the module's text for the call and the features.

    Args:
        fn: the candidate, `fn(q, k, v, *, causal, group, ...)`; a notebook's function, a lambda or a closure will do.
        layout, ranks, features, claims, quick, seed: which cases, see `cases`.
        backend: "gloo" on the CPU; "nccl" for values, hangs and growth on GPUs (there messages are not watched).
        deadline: seconds that a case may take before it counts as hung; a deadlock is known after about one.
        stop_after: failing cases after which the rest is left.
        progress: a progress bar; None shows one on a terminal.
        pool: workers to use, for many sweeps in a row.
    """
    for name, given, fits, wanted in (
        ("fn", fn, callable(fn), "a function"),
        ("backend", backend, backend in ("gloo", "nccl"), "gloo or nccl"),
        ("deadline", deadline, deadline > 0, "more than 0"),
        ("stop_after", stop_after, stop_after > 0, "more than 0"),
    ):
        if not fits:
            raise ValueError(f"{name}: expected {wanted}, got {given!r}")
    features = _names(features)
    todo = cases(features=features, layout=layout, ranks=ranks, quick=quick, claims=claims, seed=seed)
    size = max(case.world for case in todo)
    if pool is None:
        made = Pool(min(size, torch.cuda.device_count()) if backend == "nccl" else size, backend)
    with made if pool is None else nullcontext(pool) as workers:
        fits = [case for case in todo if case.world <= workers.size]
        report = _sweep(fn, fits, workers, deadline, stop_after, progress)
    missing = [f"feature {name}" for name in FEATURES if name not in features]
    for text, there in (
        ("messages, which NCCL carries itself (run on gloo to watch them)", backend == "nccl"),
        ("growth, which wants p = 4 and p = 8", claims and not report.growth),
        (f"{len(todo) - len(fits)} cases for more ranks than can be had here", len(fits) < len(todo)),
    ):
        missing += [text] if there else []
    report.layout, report.not_judged = layout, missing + report.not_judged
    return report


@functools.cache
def _shared_pool() -> Pool:
    return Pool(8)


def _sweep(fn: Callable, todo: list[Case], pool: Any, deadline=30.0, stop_after=8, progress=None) -> Report:
    report, began = Report(adapt.name_of(fn)), time.monotonic()
    judge, failed, hangs = Judge(fn, pool, report, deadline), 0, 0
    if (heads := getattr(fn, "convention", "all")) != "all":
        todo = [replace(case, heads=heads) if case.dilation else case for case in todo]
        report.conventions.append(f"dilation serves {heads} heads, as its adapter declares; LongNet serves all")
    shown = sys.stderr.isatty() if progress is None else progress
    bar = {"console": Console(stderr=True), "transient": True, "disable": not shown}
    for done, case in enumerate(track(todo, report.candidate, **bar), 1):
        found = judge.judge(case)
        failed, hangs = failed + bool(found), hangs + any(f.kind == "hang" for f in found)
        if (failed >= stop_after or hangs >= 3) and done < len(todo):
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
        try:
            self.pickled = cloudpickle.dumps(fn)
        except Exception as error:  # whatever holds a lock, a file, a process group
            raise TypeError(f"fn: {report.candidate} cannot be sent to other processes: {error}") from error
        self.form: tuple[str, str] | None = None  # of the lse: its base and shape, and where it was first seen
        self.bytes: dict[tuple[int, int], tuple[float, float]] = {}
        self.refusals: dict[str, list[str]] = {}

    def judge(self, case: Case) -> list[Finding]:
        """Run one case; its findings, which join the report, or its name joins what passed."""
        results = self.run(case)
        if self.refused(case, results):
            return []
        found, wrong = self.messages(case, results), []
        broken = any(r["error"] or "hang" in r or "crash" in r for r in results.values())
        if not broken and all(f.causes[0] in diagnose.HARMLESS for f in found):
            for team, members in enumerate(case.teams):
                wrong = wrong or self.values(case, team, [results[rank] for rank in members])
        module, name = getattr(self.fn, "__module__", None), adapt.name_of(self.fn)
        known = module not in (None, "__main__") and getattr(self.fn, "__qualname__", "").isidentifier()
        source = f"from {module} import {name} as candidate" if known else f"candidate = {name}  # yours"
        for finding in found + wrong:
            finding.snippet = f"from ringref.oracle import Case\n{source}\n{case!r}.check(candidate)"
        self.report.findings += found + wrong
        self.report.passed += [] if found + wrong else [str(case)]
        return found + wrong

    def run(self, case: Case, poison: float = math.nan) -> dict[int, dict]:
        """Every rank's results."""
        common = {"world": case.world, "groups": case.teams, "call": cloudpickle.dumps(case.call()), "poison": poison}
        common |= {"measure": case.plan == "growth", "packed": case.packed, "steps": [], "program": []}
        jobs = {rank: dict(common) for rank in range(case.world)}
        for team, members in enumerate(case.teams):
            inputs = [data for _, data in case.steps(team)]
            for rank, mine in zip(members, case.shards, strict=True):
                steps = [{name: _share(x, mine) for name, x in data.items()} for data in inputs]
                jobs[rank] |= {"program": case.program, "steps": steps}
                jobs[rank]["positions"] = mine.clone() if case.positions else None
        return self.pool.run(self.pickled, jobs, self.deadline)

    def refused(self, case: Case, results: dict[int, dict]) -> bool:
        """Whether every rank declined the case by NotImplementedError; any exception may decline heads that p does
        not divide (as an all-to-all over heads does), and float64.
        """
        odd = "odd heads" in case.name and not any("odd heads" in name for name in self.report.passed)
        errors = [results[rank]["error"] for team in case.teams for rank in team]
        if not all(e and (e["refused"] or odd or case.dtype == "float64") for e in errors):
            return False
        why = (errors[0]["text"].splitlines() or ["NotImplementedError"])[0][:200]
        self.refusals.setdefault(why, []).append(str(case))
        return True

    def messages(self, case: Case, results: dict[int, dict]) -> list[Finding]:
        """What the sanitizer saw, hangs, crashes and exceptions: the first cause, not what follows from it."""

        def tell(kind: str, cause: str, detail: str, rank: int, line: Any = None) -> Finding:
            return _finding(case, kind, cause, detail, rank=rank, where=where(line) if line else None)

        died = [rank for rank, r in results.items() if "crash" in r]
        errors = {rank: r["error"] for rank, r in results.items() if r["error"]}
        # nor does a rank that lost its connection to one that died have a story of its own
        errors = {rank: e for rank, e in errors.items() if not died or "onnection" not in e["text"]}
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
        written = [(rank, r["written"]) for rank, r in results.items() if r["written"]]
        return [tell("property", "an input was written to", ", ".join(what), rank) for rank, what in written[:1]]

    def values(self, case: Case, team: int, results: list[dict]) -> list[Finding]:
        """Every tensor of every step on every rank, up to the first step that is wrong."""
        if case.plan == "growth":
            self.bytes[case.p, case.n] = max(r["peak"] for r in results), max(r["sent"] for r in results)
            return []
        truths, shown = [], []
        for i, (_, data) in enumerate(case.steps(team)):
            mine = [dict(r["steps"][i]) for r in results]
            if not any(m.get("dlse_used") for m in mine):
                data = data | {"dlse": torch.zeros_like(data["dlse"])}
            truths.append(Truth(case, data))
            if found := self.natural(case, truths[-1], mine):
                return found
            if self.form and "base 2" in self.form[0]:
                truths[-1] = Truth(case, data | {"dlse": data["dlse"] * math.log2(math.e)})
            shown.append(mine)
        return next((found for i, mine in enumerate(shown) if (found := self.step(case, mine, truths, i))), [])

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
        """The first wrong tensor of one step, in the order in which errors spread, with a diagnosis."""
        truth, margin = truths[index], self.report.margin
        got: dict[str, list[Tensor]] = {}
        wrong: dict[str, dict[str, Any]] = {}
        for name in TENSORS:
            if name not in mine[0] or (name == "lse" and mine[0]["lse"] is None and not case.dlse):
                continue
            got[name], worst = [], (0.0,)
            for rank, m in enumerate(mine):
                x, want = m[name], truth.part(name, rank)
                x = torch.zeros_like(want) if x is None and not want.numel() else x
                if x is None or x.shape != want.shape:
                    what = (
                        "is None: nothing reaches it" if x is None else f"has shape {[*x.shape]}, not {[*want.shape]}"
                    )
                    why = f"{name} {what}"
                    return [_finding(case, "value", why, rank=rank, tensor=name, error=math.inf, budget=0.0)]
                got[name].append(x.double())
                error, budget = truth.error(name, rank, x.double())
                worst = max(worst, (error / budget, error, budget, rank))
            if worst[0] > 1:
                wrong[name] = dict(zip(("error", "budget", "rank"), worst[1:], strict=True)) | {"tensor": name}
            else:
                margin[name] = max(margin.get(name, 0.0), worst[0])
        if not wrong:
            return []
        first = next(iter(wrong.values()))
        if text := PROPERTIES.get(PLANS[case.plan][0][index]):
            return [_finding(case, "property", text, **first)]
        causes = self.why(case, got, list(wrong), truths, index)
        return [_finding(case, "value", causes[0], causes=causes, **first)]

    def why(self, case: Case, got: dict, wrong: list[str], truths: list[Truth], index: int) -> list[str]:
        """Causes that explain it, the best first; NaN is asked whether it changes with what the oracle planted."""
        pairs = [(x, truths[index].part(name, rank)) for name in wrong for rank, x in enumerate(got[name])]
        if wrong[0] == "lse" and any((x[want == -math.inf].abs() < 1e4).any() for x, want in pairs[: case.p]):
            return [diagnose.BLIND]
        if any((x.isnan() & ~want.isnan()).any() for x, want in pairs):
            calm = [r["steps"][index] for r in self.run(case, poison=0.0).values() if r["steps"]]
            now = [step.get(name) for step in calm for name in wrong]
            early = case.world > 1 and all(x is not None and not x.isnan().any() for x in now)
            return [diagnose.EARLY if early else diagnose.not_finite(case)]
        causes = diagnose.name(case, truths[index], got, wrong, truths[:index] + truths[index + 1 :])
        if causes[0].startswith(diagnose.UNKNOWN) and any((x.isinf() & ~want.isinf()).any() for x, want in pairs):
            causes = [diagnose.not_finite(case)]
        vague = causes[0].startswith(diagnose.VAGUE) or causes[0] == "out is zero"
        if case.shift and vague and not any(f.causes[0].startswith(diagnose.UNKNOWN) for f in self.report.findings):
            return [diagnose.LARGE]
        # the same case in the whole world passed before this one came
        plain = {f"{word}-p{case.p}" for word in ("causal", "full")}
        return [diagnose.GROUP] if case.groups and plain & set(self.report.passed) else causes

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
            told = {"tensor": "bytes", "error": slope, "budget": 0.4}
            self.report.findings.append(_finding(Case("growth", 8), "growth", text, **told))


def _share(x: Tensor, mine: Tensor) -> Tensor:
    """The positions `mine` of a tensor b s h d, or b h s."""
    return x[..., mine] if x.ndim == 3 else x[:, mine]


def _distance(got: Tensor, want: Tensor, norm: float = 1e-30) -> float:
    """‖got − want‖ relative to ‖want‖, or to `norm` where that is more; infinite if it is not a number."""
    error = ((got - want).norm() / max(want.norm().item(), norm)).item()
    return math.inf if math.isnan(error) else error


class Truth:
    """The float64 answer to one step of a case, and what plain attention in the candidate's dtype makes of it."""

    def __init__(self, case: Case, data: dict[str, Tensor]):
        self.case, self.data, self.whole = case, data, case.reference(data)
        yard = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        rough, whole = {name: x.to(yard) for name, x in data.items()}, [torch.arange(case.n)]
        self.plain = [plain(case, rough, yard, whole), plain(case, rough, torch.float32, case.shards)]
        self.eps = torch.finfo(yard).eps

    def part(self, name: str, rank: int, whole: dict | None = None) -> Tensor:
        """One rank's share of a tensor."""
        return _share((whole or self.whole)[name], self.case.shards[rank])

    def error(self, name: str, rank: int, got: Tensor) -> tuple[float, float]:
        """The candidate's error on one rank, and its budget."""
        want, *roughs = (self.part(name, rank, whole).double() for whole in (self.whole, *self.plain))
        blind = want == -math.inf
        # nobody agrees on the lse of a query that sees nothing: ±inf or a very negative number all say so
        if not (got[blind].abs() > 1e4).all():
            return math.inf, 1.0
        # a rank whose own share is zero by structure is measured against the others' typical norm
        every = self.whole[name]
        total, terms = every[every.isfinite()].norm().item(), self.whole["dv"].norm().item()
        # where each query sees one key, dq and dk cancel everywhere: what rounding leaves of terms as large as dv
        typical = max(0.05 * total if total > 1e-9 * terms else terms, 1e-30) / math.sqrt(self.case.p)
        error, *rough = (_distance(*(y.masked_fill(blind, 0.0) for y in (x, want)), typical) for x in (got, *roughs))
        return error, MULTIPLE[self.case.dtype] * max(*rough, FLOOR[self.case.dtype] * self.eps)


@torch.no_grad()
def plain(case: Case, data: dict[str, Tensor], work: torch.dtype, cut: list[Tensor]) -> dict[str, Tensor]:
    """softmax(q kᵀ/√d) v and its backward in the dtype `work`; the parts of each rank in `cut` are rounded to the dtype
    of `data` once and then added in float32.

    Every fused or distributed attention recomputes exp(score − lse) and rounds its parts; what that costs, with large
    scores or large parts that cancel, is nobody's mistake. Adding the parts in the dtype costs more, and is one.
    """
    q, k, v, do, dlse = (data[name].to(work) for name in ("q", "k", "v", "do", "dlse"))
    wide_k, wide_v = (x.repeat_interleave(case.h // case.g, 2) for x in (k, v))
    # a key that counts m times has log m added
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) * case.d**-0.5 + case.times.to(work).log()
    lse = scores.float().logsumexp(-1, keepdim=True).nan_to_num(neginf=math.inf)
    P = (scores - lse).exp().to(work)
    out = torch.einsum("bhqk,bkhd->bqhd", P, wide_v)
    D = (do.float() * out).sum(-1).transpose(1, 2) - dlse.masked_fill(lse[..., 0] == math.inf, 0.0)
    dS = (P * (torch.einsum("bqhd,bkhd->bhqk", do, wide_v) - D[..., None])).to(work) * case.d**-0.5

    def rounded(x: Tensor) -> Tensor:
        return x.to(data["q"].dtype).float()

    parts = {
        name: torch.zeros_like(x, dtype=torch.float32) for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))
    }
    for mine in cut:
        weight = P[..., mine].float().sum(-1).transpose(1, 2)[..., None].clamp_min(1e-30)
        part = torch.einsum("bhqk,bkhd->bqhd", P[..., mine], wide_v[:, mine])
        parts["out"] += weight * rounded(part / weight)
        parts["dq"] += rounded(torch.einsum("bhqk,bkhd->bqhd", dS[..., mine], wide_k[:, mine]))
        for name, pairs, x in (("dk", dS, q), ("dv", P, do)):
            part = torch.einsum("bhqk,bqhd->bkhd", pairs[:, :, mine], x[:, mine])
            parts[name] += rounded(part.unflatten(2, (case.g, -1)).sum(3))
    return {name: rounded(x) for name, x in parts.items()} | {"lse": scores.logsumexp(-1)}


# ---------------------------------------------------------------------------------------- the shell


def main(argv: list[str] | None = None) -> int:
    """`python -m ringref check mypkg.module:function`: 0 if it passes, 1 if not, 2 for arguments that make no sense.
    Under torchrun its ranks are used.
    """
    parser = argparse.ArgumentParser("ringref check", description="Judge an attention over ranks.")
    add = parser.add_argument
    add("candidate", help="mypkg.module:function, or path/to/file.py:function")
    add("--ranks", type=int, default=4, help="every p up to this is tried")
    add("--layout", default="contiguous", choices=LAYOUTS)
    add("--features", default="", help=f"comma-separated, of {', '.join(FEATURES)}")
    add("--claims", choices=("ring",))
    add("--backend", default="gloo", choices=("gloo", "nccl"))
    add("--adapt", choices=adapt.WRAPPERS, help="what stands between the oracle's call and yours: see ringref.adapt")
    add("--quick", action="store_true", help="a third of the cases")
    add("--seed", type=int, default=0)
    add("--deadline", type=float, default=30.0, help="seconds that a case may take")
    add("--json", action="store_true", help="print the report for machines")
    told = parser.parse_args(argv)
    sys.path.insert(0, os.getcwd())
    torchrun = "RANK" in os.environ
    sweep = {name: getattr(told, name) for name in ("layout", "claims", "quick", "seed")}
    sweep["ranks"] = min(told.ranks, int(os.environ["WORLD_SIZE"])) if torchrun else told.ranks
    sweep["features"] = told.features
    try:
        fn = find(told.candidate)
        fn = getattr(adapt, told.adapt)(fn) if told.adapt else fn
        cases(**sweep)
        if told.deadline <= 0:
            raise ValueError(f"--deadline: expected more than 0, got {told.deadline}")
    except ValueError as error:
        parser.error(str(error))
    with Ranks(told.backend) if torchrun else nullcontext() as pool:
        if pool and pool.rank:
            pool.follow()
            return 0
        report = check(fn, backend=told.backend, deadline=told.deadline, pool=pool, **sweep)
    print(report.to_json() if told.json else report)
    return 0 if report else 1


def find(spec: str) -> Callable:
    """The function that `module:name` or `file.py:name` names.

    Raises:
        ValueError: there is no such module, file or function, or it cannot be imported.
    """
    place, _, name = spec.rpartition(":")
    if not place:
        raise ValueError(f"candidate: expected module:function, got {spec!r}")
    if place.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(place)))
        place = os.path.basename(place)[:-3]
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(place))
    except (Exception, SystemExit) as error:  # anything may go wrong while somebody's file is imported
        raise ValueError(f"candidate: {spec!r} gives {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"candidate: {spec!r} is a {type(found).__name__}, not a function")
    return found
