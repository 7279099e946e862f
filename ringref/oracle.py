"""Judge anybody's ring, collective or dilated attention: what is wrong, where, and most likely why.

```python from ringref.oracle import check report = check(my_attention, layout="zigzag", ranks=4,
features={"causal", "gqa"}) ```

The candidate is `fn(q, k, v, *, causal, group) -> out | (out, lse)` on local shards `b s h d`. It
runs on real processes with whatever communication it uses itself; nothing of it is trusted. A case
is a small problem, cut across p ranks by `layout`; the judge is `dense_attention` on the whole
problem in float64. A feature may add a keyword to the call:

| feature | adds | meaning | |---|---|---| | causal | | a query sees its own position and those
before; `causal=False` is judged always | | gqa | | fewer key/value heads than query heads: head j
uses j // (h/g) | | mask | `mask_mod` | FlexAttention's signature, over global indices | | window |
`window` | `(left, right)`: key − query between −left and right | | dilation | `dilation` | a
`ringref.Dilation` | | uneven, empty | `positions` | this rank's global positions; lengths differ,
or are zero | | lse | | the second result is a differentiable lse; its gradient is judged too | |
subgroup | | `group` is not the world |

**Budget.** A tensor's error is ‖candidate − float64‖ / ‖float64‖ on its rank. It may be `MULTIPLE`
times the error that plain PyTorch attention makes in the same dtype on the same inputs on that rank
(float64 is granted float32's error: many accumulate in float32 on purpose), and never less than
`FLOOR` machine epsilons are granted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import html
import importlib
import io
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from . import diagnose
from .comm import Ring
from .dense import dense_attention
from .layout import Dilation, partition
from .sanitizer import Pool, Ranks, where

FEATURES = ("causal", "gqa", "mask", "window", "dilation", "uneven", "empty", "lse", "subgroup")
TENSORS = ("out", "lse", "dq", "dk", "dv")
MULTIPLE = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 2.0}
FLOOR = {torch.float64: 8.0, torch.float32: 8.0, torch.bfloat16: 0.2}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


# -------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One problem: shapes, masks and how it is cut. `Case(...).check(fn)` runs it alone and raises
    if `fn` is wrong.

    Args:
        name: how the report calls it.
        p: ranks that share the sequence.
        n, b, h, g, d: tokens, batch, query heads, key/value heads, head dim.
        plan: "train" (forward, backward), "steps" (three training steps, the third like the first),
            "stacked" (two forwards before their backwards), "properties" (forwards on altered
            inputs), "growth" (bytes only).
        shift: added to every score (through one more direction of q and k): exp must not overflow
            or vanish.
        sharp: factor on q and k: softmax close to one-hot.
        offset: added to v and dO of the first half of the ranks, taken from the others': a running
            sum grows, then cancels, and what it lost by rounding shows.
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
        told = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        words = (f"{name}={value!r}" for name, value, default in told if value != default)
        return f"Case({', '.join(words)})"

    def check(self, fn: Callable, **options: Any) -> Report:
        """Judge `fn` on this case alone; the report, or AssertionError with the report as its text.
        For pytest:

        ```python @pytest.mark.parametrize("case", cases(features={"causal"}), ids=str) def
        test_attention(case):
            case.check(my_attention)
        ```
        """
        report = _sweep(fn, [self], pool=options.pop("pool", None) or _shared_pool(), **options)
        if not report:
            raise AssertionError(f"\n{report}")
        return report

    def __str__(self) -> str:
        return f"{self.name}-p{self.p}"

    @property
    def teams(self) -> list[list[int]]:
        """The process groups, as ranks of the world."""
        return [list(team) for team in self.groups] if self.groups else [list(range(self.p))]

    @property
    def world(self) -> int:
        return max(map(max, self.teams)) + 1

    @functools.cached_property
    def shards(self) -> list[Tensor]:
        """Every rank's global positions."""
        if self.lengths is not None:
            return list(torch.arange(self.n).split(list(self.lengths)))
        return [partition(self.n, _Seat(i, self.p), self.layout).positions for i in range(self.p)]

    def mask_mod(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Everything but causality and dilation that decides who sees whom."""
        keep = torch.ones((), dtype=torch.bool)
        if self.mask:
            keep = keep & make_mask(self.mask, self.n)(batch, head, query, key)
        if self.window:
            left, right = self.window
            keep = keep & (query - key <= left) & (key - query <= right)
        return keep

    def reference(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv of the whole problem, float64; `dlse` counts if `data` has one."""
        q, k, v = (data[name].double().requires_grad_() for name in "qkv")
        dilation = Dilation(*self.dilation) if self.dilation else None
        mask = self.mask_mod if self.mask or self.window else None
        out, lse = dense_attention(q, k, v, causal=self.causal, dilation=dilation, mask_mod=mask)
        finite = lse.isfinite()
        dlse = torch.where(finite, data["dlse"].double(), 0.0)
        torch.autograd.backward([out, lse], [data["do"].double(), dlse])
        return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}

    @functools.cached_property
    def times(self) -> Tensor:
        """How often each query sees each key, b h n n, asked of the judge: zero scores, and v the
        identity.
        """
        q = torch.zeros(self.b, self.n, self.h, self.n, dtype=torch.float64)
        v = torch.eye(self.n, dtype=torch.float64)[None, :, None, :].expand(self.b, -1, self.h, -1)
        dilation = Dilation(*self.dilation) if self.dilation else None
        out, lse = dense_attention(q, q, v, causal=self.causal, dilation=dilation, mask_mod=self.mask_mod)
        return (out.transpose(1, 2) * lse.exp()[..., None]).round()

    def data(self, team: int = 0, step: int = 0) -> dict[str, Tensor]:
        """The whole problem's q, k, v, dO and dlse in the case's dtype, by the seed."""
        # a bytes sum, because hash() of a string changes from run to run
        gen = torch.Generator().manual_seed(sum(self.name.encode()) * 1009 + self.seed * 101 + team * 11 + step)
        b, n, h, g, d = self.b, self.n, self.h, self.g, self.d

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen, dtype=torch.float64)

        q, k, v, do = normal(b, n, h, d), normal(b, n, g, d), normal(b, n, g, d), normal(b, n, h, d)
        q, k = q * self.sharp, k * self.sharp
        for rank, mine in enumerate(self.shards if self.offset else ()):
            sign = self.offset if rank < self.p / 2 else -self.offset
            v[:, mine], do[:, mine] = v[:, mine] + sign, do[:, mine] + sign
        if self.shift:
            # all in q: a large common part of k would magnify the rounding of correct code in dq,
            # where it cancels
            q[..., 0], k[..., 0] = self.shift * math.sqrt(d), 1.0
        if self.plan == "stacked":
            q[:, :: max(1, n // 3)] = 0.0  # lse is 0 exactly where such a query sees one key
        dtype = DTYPES[self.dtype]
        data = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "do": do.to(dtype)}
        return data | {"dlse": normal(b, h, n).to(torch.float64 if dtype == torch.float64 else torch.float32)}

    def steps(self, team: int = 0) -> list[tuple[str, dict[str, Tensor]]]:
        """The named inputs that the plan runs on."""
        first = self.data(team)
        if self.plan == "steps":
            return [("first", first), ("second", self.data(team, 1)), ("again", first)]
        if self.plan == "stacked":
            return [("first", first), ("second", self.data(team, 1))]
        if self.plan == "properties":
            return [("first", first), *_altered(self, first, self.data(team, 1))]
        return [("first", first)]

    @property
    def program(self) -> list[tuple[str, int]]:
        """Which passes over which step, in order."""
        if self.plan == "stacked":
            return [("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0)]
        if self.plan == "properties":
            return [("inference", i) for i in range(4 if self.causal else 3)]
        count = 3 if self.plan == "steps" else 1
        return [(what, i) for i in range(count) for what in ("forward", "backward")]

    def call(self) -> dict[str, Any]:
        """The keywords of the call, less `group` and `positions`."""
        added: dict[str, Any] = {"causal": self.causal}
        if self.mask:
            added["mask_mod"] = make_mask(self.mask, self.n)
        if self.window:
            added["window"] = self.window
        if self.dilation:
            added["dilation"] = Dilation(*self.dilation)
        return added


class _Seat(Ring):
    """A place in a ring that nobody talks over."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


def make_mask(kind: str, n: int) -> Callable:
    """The masks that the `mask` feature judges: documents, a pattern that differs by head and
    batch, blind queries.
    """
    if kind == "documents":
        starts = torch.zeros(n, dtype=torch.int64)
        starts[[n // 5, n // 2, n - 2]] = 1
        document = starts.cumsum(0)
        return lambda b, h, q, k: document.to(q.device)[q] == document.to(k.device)[k]
    if kind == "heads":
        return lambda b, h, q, k: (q + 2 * k + 3 * h + b) % 4 != 0
    if kind == "blind":
        return lambda b, h, q, k: (q % 5 != 2) & ((q - k) % 3 != 1)
    if kind == "stored":
        return functools.partial(_remembered, {})
    raise ValueError(f"mask must be 'documents', 'heads', 'blind' or 'stored', got {kind!r}")


def _remembered(stored: dict, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask that keeps what it has computed, as a user's cache would: what it returns is not the
    candidate's to write.
    """
    key = (tuple(q.flatten().tolist()), tuple(k.flatten().tolist()))
    if key not in stored:
        stored[key] = (q + k + (q * k) // 3) % 4 != 0
    return stored[key]


def _altered(case: Case, first: dict, other: dict) -> Iterator[tuple[str, dict]]:
    """Inputs that differ from the first in what must not matter."""
    noisy = {name: first[name].clone() for name in "qkv"}
    for name in "qkv":
        noisy[name][1:] = 3 * other[name][1:]
    yield "batch", first | noisy
    yield "constant", first | {"v": torch.full_like(first["v"], 0.75)}
    if case.causal:
        late = {name: first[name].clone() for name in "qkv"}
        for name in "qkv":
            late[name][:, case.n // 2 :] = 8 * other[name][:, case.n // 2 :]
        yield "future", first | late


def cases(
    *,
    features: Iterable[str] = (),
    layout: str = "contiguous",
    ranks: int = 4,
    quick: bool = False,
    claims: str | None = None,
    seed: int = 0,
) -> list[Case]:
    """The cases of a sweep, smallest first; see `check` for the arguments."""
    features = set(features)
    if unknown := features - set(FEATURES):
        raise ValueError(f"features: {', '.join(sorted(unknown))} unknown; choose from {', '.join(FEATURES)}")
    if claims not in (None, "ring"):
        raise ValueError(f"claims must be None or 'ring', got {claims!r}")
    made: list[tuple[Case, bool]] = []
    causal, lse = "causal" in features, "lse" in features
    both = (False, True) if causal else (False,)

    def add(name: str, p: int, *, fast: bool = False, per: int = 6, **told: Any) -> None:
        # head counts are multiples of p, so that all-to-all over heads can be judged too
        heads = {"h": 2 * p if p > 1 else 4, "g": p if p > 1 else 2}
        if "gqa" not in features or told.pop("mha", False):
            heads["g"] = heads["h"]
        told = heads | {"n": per * p, "layout": layout, "dlse": lse, "seed": seed} | told
        made.append((Case(name, p, **told), fast))

    for c in both:
        word = "causal" if c else "full"
        for p in (1, 2, 3, 4):
            add(word, p, causal=c, fast=True)
        if "gqa" in features:
            add(f"{word} every head its own keys", 2, causal=c, mha=True)
        add(f"{word} two graphs", 2, causal=c, plan="stacked", fast=c or not causal)
        add(f"{word} properties", 2, causal=c, plan="properties", fast=True)
        add(f"{word} properties", 3, causal=c, plan="properties")
        add(f"{word} training", 3, causal=c, plan="steps")
        add(f"{word} two graphs", 3, causal=c, plan="stacked")
        for shift in (120.0, -120.0):
            add(f"{word} scores {shift:+.0f}", 2, causal=c, shift=shift)
            add(f"{word} scores {shift:+.0f}", 3, causal=c, shift=shift)
        add(f"{word} sharp", 4, causal=c, sharp=2.0)
        add(f"{word} short shards", 4, causal=c, per=2)
        add(f"{word} packed qkv", 2, causal=c, packed=True)
        for p in (2, 4):
            add(f"{word} odd heads", p, causal=c, h=3, g=3, fast=p == 2)
        add(f"{word} longer", 2, causal=c, per=40)
        add(f"{word} longer", 4, causal=c, per=20)
        add(f"{word} five ranks", 5, causal=c, fast=True)
    add("float64", 2, dtype="float64", causal=causal)
    add("bfloat16", 8, dtype="bfloat16", per=16, sharp=0.3)
    add("bfloat16 sums", 8, dtype="bfloat16", per=16, sharp=0.3, offset=4.0, fast=True)
    add("bfloat16", 4, dtype="bfloat16", per=16, sharp=0.3, causal=causal)
    if causal:
        add("eight ranks", 8, causal=True)
    last = causal and True
    if "mask" in features:
        for kind, c, p in itertools.product(("documents", "heads", "blind", "stored"), both, (1, 2, 3)):
            plan = "steps" if kind == "stored" else "train"
            add(f"mask {kind}{' causal' if c else ''}", p, mask=kind, causal=c, fast=p == 2, plan=plan)
    if "window" in features:
        for (left, right), c, p in itertools.product(((3, 2), (8, 0), (0, 7), (1, 1)), both, (1, 2, 3, 4)):
            if p < 4 or left == 3:
                add(f"window {left},{right}{' causal' if c else ''}", p, window=(left, right), causal=c, fast=p == 2)
    if "dilation" in features:
        awkward = (((4, 8, 64), (1, 2, 4)), ((5, 7), (2, 3)), ((6,), (3,)), ((3, 12), (1, 5)))
        for (w, r), c, p in itertools.product(awkward, both, (1, 2, 3)):
            told = {"n": 7 * p, "h": 5, "g": 5} if "uneven" in features else {"n": 8 * p, "h": 5, "g": 5}
            if "gqa" in features and p != 2:
                told |= {"h": 6, "g": 2}
            add(f"dilation {w} {r}{' causal' if c else ''}", p, dilation=(w, r), causal=c, fast=p == 2, **told)
    for feature, sizes in (("uneven", ((3, 6), (7, 2, 5), (1, 6, 3, 4))), ("empty", ((5, 0), (0, 4, 6), (3, 0, 0, 5)))):
        for lengths, c in itertools.product(sizes if feature in features else (), both):
            p = len(lengths)
            cut = {"lengths": lengths, "n": sum(lengths)} if layout == "contiguous" else {"n": 4 * p + 1}
            if feature == "empty" and layout != "contiguous":
                cut = {"n": p - 1}
            add(f"{feature}{' causal' if c else ''}", p, causal=c, positions=True, fast=p == 3, **cut)
    if "subgroup" in features:
        add("subgroup", 2, causal=last, groups=((0, 2), (1, 3)), fast=True)
        add("subgroup", 2, causal=last, groups=((1, 2),))
        add("subgroup", 3, causal=last, groups=((1, 2, 4),))
    if claims:
        for p, per in ((2, 32), (4, 32), (4, 64), (8, 32)):
            told = {"b": 1, "d": 32, "h": 8, "g": 8, "per": per}
            add(f"growth n={p * per}", p, causal=causal, plan="growth", fast=True, **told)
    if "uneven" in features or "empty" in features:
        made = [(dataclasses.replace(case, positions=True), fast) for case, fast in made]
    widest = {4: 8}.get(ranks, ranks)
    chosen = [case for case, fast in made if (fast or not quick) and case.world <= max(widest, ranks)]
    # among equals the plain case first: it says best what is wrong
    odd = ("train", "stacked", "properties", "steps", "growth")

    def rank(c: Case) -> tuple:
        uneven = c.positions and c.lengths is not None
        plain = c.p, c.world, c.plan == "growth", uneven
        return *plain, c.n, c.packed, bool(c.shift), odd.index(c.plan)

    return sorted(chosen, key=rank)


# ------------------------------------------------------------------------------------------- report


@dataclass
class Finding:
    """Something wrong. `kind` is value, property, message, hang, crash or growth; `snippet` runs
    the case alone.
    """

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


@dataclass
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
        known = [cause for cause in votes if not cause.startswith(diagnose.VAGUE)]
        return max(known or votes, key=votes.__getitem__) if votes else None

    def agree(self) -> None:
        """Where several causes explain a finding equally well, tell the one that explains the
        others too.
        """
        if (common := self.diagnosis) is not None:
            for f in self.findings:
                if f.kind == "value" and common in f.causes:
                    f.diagnosis = common

    def to_json(self) -> str:
        """Everything in the report, for machines."""
        return json.dumps({"ok": bool(self), "diagnosis": self.diagnosis} | dataclasses.asdict(self), indent=1)

    def __rich_console__(self, console: Console, _: Any) -> Iterator[Any]:
        failed = len({(f.case, f.p) for f in self.findings})
        verdict = "passes" if self else "is wrong" if self.findings else "was not judged"
        total = len(self.passed) + failed
        cases = f"{len(self.passed)} of {total} cases pass"
        yield f"{self.candidate} {verdict}: {cases}, {self.seconds:.0f} s"
        if self.findings:
            yield f"most likely: {self.diagnosis}"
            table = Table(expand=False, show_lines=False, pad_edge=False)
            for head, style in (("case", {}), ("p", {}), ("where", {}), ("error/budget", {}), ("finding", {})):
                table.add_column(head, overflow="fold", **style)
            shown = self.findings[:12]
            for f in shown:
                place = f"{f.tensor or ''}{f' rank {f.rank}' if f.rank is not None else ''}".strip() or "-"
                size = "-" if f.error is None else f"{f.error:.1e}/{f.budget:.1e}"
                table.add_row(f.case, str(f.p), place, size, f.diagnosis + (f" at {f.where}" if f.where else ""))
            yield table
            if len(self.findings) > len(shown):
                yield f"and {len(self.findings) - len(shown)} more in report.findings"
            yield "smallest failing case:"
            yield self.findings[0].snippet
        elif self.margin:
            used = ", ".join(f"{name} {share:.0%}" for name, share in self.margin.items())
            yield f"most of its error budget that any case used: {used}"
        for line in self.conventions:
            yield f"convention: {line}"
        for name, value in self.growth.items():
            yield f"growth: {name} {value:.3g}"
        if self.not_judged:
            yield "not judged: " + "; ".join(self.not_judged)

    def __str__(self) -> str:
        console = Console(width=80, file=io.StringIO(), highlight=False, markup=False, force_jupyter=False)
        console.print(self)
        return console.file.getvalue()

    def _repr_html_(self) -> str:
        return f"<pre style='line-height:1.2'>{html.escape(str(self))}</pre>"


# ------------------------------------------------------------------------------------------ judging


def check(
    fn: Callable,
    *,
    layout: str = "contiguous",
    ranks: int = 4,
    features: Iterable[str] = (),
    claims: str | None = None,
    quick: bool = False,
    backend: str = "gloo",
    seed: int = 0,
    deadline: float = 30.0,
    stop_after: int = 8,
    progress: bool | None = None,
    pool: Any = None,
) -> Report:
    """Judge an attention over ranks; see the module's text for the call and the features.

    Args:
        fn: the candidate, `fn(q, k, v, *, causal, group, ...)`; a notebook's function, a lambda or
            a closure will do.
        layout: "contiguous", "zigzag" or "striped": how the sequence is cut.
        ranks: every p up to this is tried; with the default of 4 also one case each of p = 5 and p
            = 8.
        features: what the candidate can do, a subset of `FEATURES`; the rest is reported as not
            judged.
        claims: "ring" asserts that a rank never holds the keys of all; bytes per rank are measured
            as p doubles.
        quick: a third of the cases.
        backend: "gloo" on the CPU; "nccl" for values, hangs and growth on GPUs (there messages are
            not watched).
        seed: another seed, other numbers; the same seed, the same run.
        deadline: seconds that a case may take before it counts as hung; a deadlock is known after
            about one.
        stop_after: failing cases after which the rest is left.
        progress: a progress bar; None shows one on a terminal.
        pool: workers to use, for many sweeps in a row.

    Raises:
        ValueError: an unknown feature, layout or claim.
    """
    todo = cases(features=features, layout=layout, ranks=ranks, quick=quick, claims=claims, seed=seed)
    missing = [name for name in FEATURES if name not in set(features)]
    unwatched = ["messages, which NCCL carries itself (run on gloo to watch them)"] if backend == "nccl" else []
    with _workers(pool, todo, backend) as workers:
        # torchrun's processes have one world size for life; the pool has processes for each
        fits = [c for c in todo if (c.world == workers.size if isinstance(workers, Ranks) else c.world <= workers.size)]
        report = _sweep(fn, fits, pool=workers, deadline=deadline, stop_after=stop_after, progress=progress)
    report.layout = layout
    report.not_judged = [f"feature {name}" for name in missing] + unwatched + report.not_judged
    if len(fits) < len(todo):
        report.not_judged.append(f"{len(todo) - len(fits)} cases for other world sizes than can be had here")
    return report


@functools.cache
def _shared_pool() -> Pool:
    return Pool(8)


class _Borrowed:
    def __init__(self, pool: Any):
        self.pool = pool

    def __enter__(self) -> Any:
        return self.pool

    def __exit__(self, *_: Any) -> None:
        pass


def _workers(pool: Any, todo: list[Case], backend: str) -> Any:
    if pool is not None:
        return _Borrowed(pool)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return Ranks(backend)
    size = torch.cuda.device_count() if backend == "nccl" else 8
    return Pool(min(size, max(case.world for case in todo)), backend)


def _sweep(
    fn: Callable,
    todo: list[Case],
    *,
    pool: Any,
    deadline: float = 30.0,
    stop_after: int = 8,
    progress: bool | None = None,
) -> Report:
    report = Report(getattr(fn, "__qualname__", type(fn).__name__))
    judge = Judge(fn, pool, report, deadline)
    began, failing, hangs = time.monotonic(), 0, 0
    failed: set[str] = set()
    shown = progress if progress is not None else sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bar:
        task = bar.add_task(report.candidate, total=len(todo))
        for i, case in enumerate(todo):
            bar.update(task, advance=1, description=f"{case}")
            before = len(report.findings)
            judge.judge(case)
            failing += len(report.findings) > before
            failed |= {f.case for f in report.findings[before:]}
            hangs += any(f.kind == "hang" for f in report.findings[before:])
            if (failing >= stop_after or hangs >= 3) and i + 1 < len(todo):
                # two ranks leave many causes alike, three tell them apart
                wider = [] if hangs or case.p > 2 else [c for c in todo[i + 1 :] if c.p == 3 and c.name in failed][:2]
                for extra in wider:
                    judge.judge(extra)
                left = len(todo) - i - 1 - len(wider)
                report.not_judged.append(f"{left} further cases, after {failing} that failed")
                break
    judge.growth()
    for why, names in judge.refused.items():
        report.not_judged.append(f"{names[0] if len(names) == 1 else f'{len(names)} cases'}, refused: {why}")
    report.agree()
    report.seconds = time.monotonic() - began
    return report


class Judge:
    """Runs cases and writes what it finds into a report."""

    def __init__(self, fn: Callable, pool: Any, report: Report, deadline: float):
        self.fn, self.pool, self.report, self.deadline = fn, pool, report, deadline
        self.pickled = cloudpickle.dumps(fn)
        self.found: list[Finding] = []
        self.bases: Counter = Counter()
        self.bytes: dict[tuple[int, int], tuple[float, float, float]] = {}
        self.refused: dict[str, list[str]] = {}

    def judge(self, case: Case) -> None:
        """Run one case; append its findings, or its name to what passed."""
        results = self.run(case)
        found = self.messages(case, results)
        broken = any(r["error"] or "hang" in r or "crash" in r for r in results.values())
        # any exception may refuse heads that p does not divide (as an all-to-all over heads does),
        # and float64
        lenient = "odd heads" in case.name and not any("odd heads" in name for name in self.report.passed)
        strict = not lenient and case.dtype != "float64"
        refused = [r["error"]["refused"] or not strict for r in results.values() if r["error"]]
        if refused and all(refused) and len(refused) == case.p * len(case.teams):
            text = next(r["error"]["text"] for r in results.values() if r["error"])
            self.refused.setdefault((text.splitlines() or ["NotImplementedError"])[0][:70], []).append(str(case))
            return
        if not broken and all(f.causes[0] in diagnose.HARMLESS for f in found):
            for team, members in enumerate(case.teams):
                found += self.values(case, team, [results[rank] for rank in members])
        for finding in found:
            finding.snippet = _snippet(self.fn, case)
        # one cause shows on many ranks and tensors; the first of each kind and diagnosis is enough
        seen = {(f.kind, f.diagnosis): f for f in reversed(found)}
        self.report.findings += list(reversed(seen.values()))
        if not found:
            self.report.passed.append(str(case))

    def run(self, case: Case, poison: float = math.nan) -> dict[int, dict]:
        """Every rank's results."""
        jobs = {}
        call = cloudpickle.dumps(case.call())
        for rank in range(case.world):
            jobs[rank] = {"world": case.world, "groups": case.teams, "steps": [], "program": [], "call": call}
            jobs[rank] |= {"measure": case.plan == "growth", "poison": poison, "packed": case.packed}
        for team, members in enumerate(case.teams):
            for rank, mine in zip(members, case.shards, strict=True):
                jobs[rank]["program"] = case.program
                jobs[rank]["positions"] = mine.clone() if case.positions else None
                for _, data in case.steps(team):
                    local = {name: data[name][:, mine] for name in ("q", "k", "v", "do")}
                    local |= {"dlse": data["dlse"][:, :, mine], "use_dlse": True}
                    jobs[rank]["steps"].append(local)
        return self.pool.run(self.pickled, jobs, self.deadline)

    # ------------------------------------------------------------------------------------- messages

    def messages(self, case: Case, results: dict[int, dict]) -> list[Finding]:
        """What the sanitizer saw, hangs, crashes and exceptions: the first cause, not what follows
        from it.
        """
        found: list[Finding] = []

        def tell(kind: str, cause: str, detail: str, rank: int | None, line: Any = None) -> None:
            text = f"{cause}: {detail}" if detail else cause
            at = where(line) if line else None
            found.append(Finding(kind, text, case.name, case.p, rank, where=at, causes=[cause]))

        raised = any(r["error"] for r in results.values())
        for rank, r in results.items():
            for f in r.get("findings", ()):
                if raised and f["kind"] == "unfinished":
                    continue
                if case.groups and f["kind"] == "self-send":
                    tell("message", diagnose.GROUP, f"{f['text']} ({f['phase']}, hop {f['hop']})", rank, f["line"])
                    continue
                tell(
                    "message",
                    diagnose.MESSAGES[f["kind"]],
                    f"{f['text']} ({f['phase']}, hop {f['hop']})",
                    rank,
                    f["line"],
                )
        for cause, detail, rank, line in diagnose.mismatched(results):
            tell("message", cause, detail, rank, line)
        if found:
            order = list(diagnose.MESSAGES.values())
            found.sort(key=lambda f: order.index(f.causes[0]) if f.causes[0] in order else 0)
            return found[:1]
        errors = {rank: r["error"] for rank, r in results.items() if r["error"]}
        # an exception on one rank makes its neighbours lose their connection or wait: the first
        # cause is the story
        own = {r: e for r, e in errors.items() if "onnection" not in e["text"]} or errors
        for rank, e in list(own.items())[:1]:
            cause, text = diagnose.crash(e)
            mistyped = e["type"] in ("NameError", "ImportError", "ModuleNotFoundError")
            grouped = case.groups and not mistyped
            tell("crash", diagnose.GROUP if grouped else cause, text, rank, e["line"])
        for rank, r in results.items():
            if "crash" in r and not own:
                tell("crash", "the process died", "a fault in native code, or os._exit", rank)
        if not errors and any("hang" in r for r in results.values()):
            tell("hang", *diagnose.hang(case, results))
        for rank, r in results.items():
            if r["written"] and not found:
                tell("property", "an input was written to", ", ".join(r["written"]), rank)
        return found

    # --------------------------------------------------------------------------------------- values

    def values(self, case: Case, team: int, results: list[dict]) -> list[Finding]:
        """Compare every tensor of every step on every rank, and the properties that need no
        reference.
        """
        if case.plan == "growth":
            held = max(r["peak"] for r in results)
            self.bytes[case.p, case.n] = held, max(r["sent"] for r in results), case.n / case.p
            return []
        found: list[Finding] = []
        steps = case.steps(team)
        truths = []
        shown = []
        for i, (_, data) in enumerate(steps):
            mine = [r["steps"][i] for r in results]
            used = data if any(m.get("dlse_used") for m in mine) else data | {"dlse": torch.zeros_like(data["dlse"])}
            truth = Truth(case, used)
            if self.base_two(truth, mine):
                truth = Truth(case, used | {"dlse": used["dlse"] * math.log2(math.e)})
                mine = [m | {"lse": m["lse"] * math.log(2)} for m in mine]
            truths.append(truth)
            shown.append(mine)
        for i, mine in enumerate(shown):
            found = found or self.step(case, truths[i], mine, truths, i)
        if case.plan != "train" and not found:
            found += self.properties(case, results, truths)
        return found

    def step(self, case: Case, truth: Truth, mine: list[dict], truths: list[Truth], index: int) -> list[Finding]:
        """The first wrong tensor of one step, in the order in which errors spread, with a
        diagnosis.
        """
        wrong: dict[str, tuple[float, float, int]] = {}
        got: dict[str, list[Tensor]] = {}
        for name in TENSORS:
            if name not in mine[0] or (name == "lse" and mine[0]["lse"] is None and not case.dlse):
                continue
            pieces, worst = [], (0.0, 1.0, 0, "")
            for rank, m in enumerate(mine):
                piece, why = self.shaped(case, name, m[name], truth.part(name, rank))
                error, budget = (math.inf, 0.0) if why else truth.error(name, rank, piece)
                pieces.append(piece)
                share = error / budget if budget else (math.inf if error else 0.0)
                self.report.margin[name] = max(self.report.margin.get(name, 0.0), share if share <= 1 else 0.0)
                if share > 1 and share >= worst[0]:
                    worst = (share, error, rank, why) if share > worst[0] else worst
                    budgets = budget
            got[name] = pieces
            if worst[0] > 1:
                if worst[3]:
                    told = Finding("value", worst[3], case.name, case.p, worst[2], name, math.inf, 0.0)
                    return [dataclasses.replace(told, causes=[worst[3]])]
                wrong[name] = (worst[1], budgets, worst[2])
        if not wrong:
            return []
        first = next(name for name in TENSORS if name in wrong)
        causes = self.why(case, truth, got, list(wrong), truths, index)
        error, budget, rank = wrong[first]
        return [Finding("value", causes[0], case.name, case.p, rank, first, error, budget, causes=causes)]

    def why(self, case: Case, truth: Truth, got: dict, wrong: list[str], truths: list, index: int) -> list[str]:
        """Causes that explain it, the best first; NaN is first asked whether it changes with what
        the oracle planted.
        """
        lost = [(x, truth.part(name, r)) for name in wrong for r, x in enumerate(got[name])]
        if wrong[0] == "lse" and any((x[want == -math.inf].abs() < 1e4).any() for x, want in lost[: case.p]):
            return [diagnose.BLIND]
        if any((x.isnan() & ~want.isnan()).any() for x, want in lost):
            calm = [r["steps"][index] for r in self.run(case, poison=0.0).values() if r["steps"]]
            now = [step.get(name) for step in calm for name in wrong]
            if case.world > 1 and all(x is not None and not x.isnan().any() for x in now):
                return [diagnose.EARLY]
            return [diagnose.not_finite(case)]
        causes = diagnose.name(case, truth, got, wrong, [t for i, t in enumerate(truths) if i != index])
        if causes[0].startswith(diagnose.UNKNOWN) and any((x.isinf() & ~want.isinf()).any() for x, want in lost):
            causes = [diagnose.not_finite(case)]
        vague = causes[0].startswith(diagnose.VAGUE) or causes[0] == "out is zero"
        unnamed = any(f.causes[0].startswith(diagnose.UNKNOWN) for f in self.report.findings)
        if case.shift and vague and not unnamed:
            return [diagnose.LARGE]
        # the same case in the whole world passed before this one came
        plain = {str(dataclasses.replace(case, groups=None, name=word)) for word in ("causal", "full")}
        return [diagnose.GROUP] if case.groups and plain & set(self.report.passed) else causes

    def shaped(self, case: Case, name: str, x: Tensor | None, truth: Tensor) -> tuple[Any, str]:
        """The tensor as the reference has it, or why that is impossible."""
        if x is None and not truth.numel():
            return torch.zeros_like(truth), ""
        if x is None:
            return None, f"{name} is None" + (": no gradient reaches it" if name[0] == "d" else "")
        x = x.double()
        if name == "lse":
            b, h, s = truth.shape
            if x.shape == (b, h, s, 1):
                x = x[..., 0]
            if x.shape == (b, s, h) and (s != h):
                x = x.transpose(1, 2)
                self.convention("lse is b s h")
        if x.shape != truth.shape:
            return None, f"{name} has shape {tuple(x.shape)}, not {tuple(truth.shape)}"
        return x, ""

    def base_two(self, truth: Truth, mine: list[dict]) -> bool:
        """Whether every rank's lse is log2 of the sum; one candidate must not use both bases."""
        votes = set()
        for rank, m in enumerate(mine):
            want = truth.part("lse", rank)
            if m["lse"] is None or want.numel() == 0:
                continue
            x = (
                m["lse"].double().reshape(-1)
                if m["lse"].shape == want.shape
                else m["lse"].double().transpose(1, -1).reshape(-1)
            )
            want = want.reshape(-1)
            if x.shape == want.shape and (seen := want.isfinite() & x.isfinite()).any():
                natural, two = (x - want)[seen].norm(), (x * math.log(2) - want)[seen].norm()
                votes.add(bool(two < 1e-4 * (1 + want[seen].norm()) and natural > 1e3 * two))
        if votes == {True}:
            self.convention("lse is in base 2")
        return votes == {True}

    def convention(self, text: str) -> None:
        if text not in self.report.conventions:
            self.report.conventions.append(text)

    # ----------------------------------------------------------------------------------- properties

    def properties(self, case: Case, results: list[dict], truths: list[Truth]) -> list[Finding]:
        """What must hold whatever the reference says."""
        found = []
        names = [name for name, _ in case.steps()]
        outs = {name: [r["steps"][i]["out"].double() for r in results] for i, name in enumerate(names)}
        allowed = 2 * max(truths[0].error("out", r, x)[1] for r, x in enumerate(outs["first"]))

        def same(a: Tensor, b: Tensor, text: str, rank: int) -> None:
            error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item() if b.numel() else 0.0
            if error > allowed or math.isnan(error):
                found.append(Finding("property", text, case.name, case.p, rank, "out", error, allowed, causes=[text]))

        for rank, mine in enumerate(case.shards):
            if "again" in outs:
                same(outs["again"][rank], outs["first"][rank], "two runs on the same inputs differ", rank)
            if "batch" in outs:
                same(outs["batch"][rank][:1], outs["first"][rank][:1], "another sequence of the batch matters", rank)
                sees = torch.full_like(outs["constant"][rank], 0.75)
                same(
                    outs["constant"][rank], sees, "constant v does not give constant out: weights do not sum to 1", rank
                )
            if "future" in outs:
                early = mine < case.n // 2
                text = "a later token changes an earlier result"
                same(outs["future"][rank][:, early], outs["first"][rank][:, early], text, rank)
        return found

    def growth(self) -> None:
        """Fit bytes per rank as n and p double; with the same shard, a ring's peak does not depend
        on p.
        """
        if not {(4, 128), (8, 256), (4, 256)} <= set(self.bytes):
            return
        (peak, sent, _), (peak_p, sent_p, _), (peak_n, sent_n, _) = (
            self.bytes[key] for key in ((4, 128), (8, 256), (4, 256))
        )
        facts = {
            "peak bytes per rank, p = 4, n = 128": peak,
            "exponent of the peak in n (p fixed)": math.log2(peak_n / peak),
            "exponent of the peak in p (n/p fixed)": math.log2(peak_p / peak),
            "exponent of bytes sent in n (p fixed)": math.log2(max(sent_n, 1) / max(sent, 1)),
            "exponent of bytes sent in p (n/p fixed)": math.log2(max(sent_p, 1) / max(sent, 1)),
        }
        self.report.growth = facts
        slope = facts["exponent of the peak in p (n/p fixed)"]
        if slope > 0.4:
            text = f"claims a ring, holds O(n): with n/p fixed the peak grows as p^{slope:.2f}"
            self.report.findings.append(Finding("growth", text, "growth", 8, None, "bytes", slope, 0.4, causes=[text]))


def _snippet(fn: Callable, case: Case) -> str:
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    known = module not in (None, "__main__") and name.isidentifier()
    source = f"from {module} import {name} as candidate" if known else f"candidate = {name or '...'}  # yours"
    return f"from ringref.oracle import Case\n{source}\n{case!r}.check(candidate)"


class Truth:
    """The float64 answer to one step of a case, and what plain attention in the candidate's dtype
    makes of it.
    """

    def __init__(self, case: Case, data: dict[str, Tensor]):
        self.case, self.data = case, data
        self.whole = case.reference(data)
        self.dtype = DTYPES[case.dtype]
        self.yard = torch.float32 if self.dtype == torch.float64 else self.dtype
        self.plain = plain(case, {name: x.to(self.yard) for name, x in data.items()})

    def part(self, name: str, rank: int, whole: dict | None = None) -> Tensor:
        """One rank's share of a tensor."""
        mine = self.case.shards[rank]
        tensor = (whole or self.whole)[name]
        return tensor[:, :, mine] if name == "lse" else tensor[:, mine]

    def error(self, name: str, rank: int, got: Tensor) -> tuple[float, float]:
        """The candidate's error on one rank, and its budget."""
        want, roughs = (self.part(name, rank), [self.part(name, rank, whole).double() for whole in self.plain])
        if not want.numel():
            return 0.0, 1.0
        if name == "lse":
            blind = want == -math.inf
            # nobody agrees on a query that sees nothing: ±inf or a very negative number all say so
            if not (got[blind].abs() > 1e4).all():
                return math.inf, 1.0
            want, got, *roughs = (x.masked_fill(blind, 0.0) for x in (want, got, *roughs))
        # a rank whose own share is zero by structure is measured against the others' typical norm
        typical = self.whole[name].masked_fill(self.whole[name] == -math.inf, 0.0).norm() / math.sqrt(self.case.p)
        norm = max(want.norm().item(), 0.05 * typical.item(), 1e-30)
        error = (got - want).norm().item() / norm
        rough = max((rough - want).norm().item() / norm for rough in roughs)
        budget = MULTIPLE[self.dtype] * max(rough, FLOOR[self.dtype] * torch.finfo(self.yard).eps)
        return (error if not math.isnan(error) else math.inf), budget


def plain(case: Case, data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Plain PyTorch attention, softmax(q kᵀ/√d) v, in the dtype of `data`: the yardsticks of error.

    Once with autograd's backward, once in parts: see `_in_parts`.
    """
    q, k, v = (data[name].detach().clone().requires_grad_() for name in "qkv")
    wide_k, wide_v = (x.repeat_interleave(case.h // case.g, 2) for x in (k, v))
    times = case.times.to(q.dtype)
    blind = times.sum(-1, keepdim=True) == 0
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) * case.d**-0.5 + times.log()
    scores = scores.masked_fill(blind, 0.0)
    weights = scores.softmax(-1).masked_fill(blind, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, wide_v)
    lse = scores.to(data["dlse"].dtype).logsumexp(-1)
    dlse = data["dlse"].masked_fill(blind[..., 0], 0.0)
    torch.autograd.backward([out, lse], [data["do"], dlse])
    found = [{"out": out, "lse": lse.masked_fill(blind[..., 0], -math.inf), "dq": q.grad, "dk": k.grad, "dv": v.grad}]
    found.append(found[0] | _in_parts(case, data))
    return [{name: x.detach() for name, x in one.items()} for one in found]


@torch.no_grad()
def _in_parts(case: Case, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the backward that recomputes exp(score − lse) in float32, each rank's part
    rounded to the dtype once.

    Every fused or distributed attention must do both; what they cost, with large scores or large
    parts that cancel, is nobody's mistake. Adding the parts in the dtype costs more, and is one.
    """
    dtype = data["q"].dtype
    q, k, v, do = (data[name].float() for name in ("q", "k", "v", "do"))
    wide_k, wide_v = (x.repeat_interleave(case.h // case.g, 2) for x in (k, v))
    times = case.times.float()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) * case.d**-0.5 + times.log()
    lse = scores.logsumexp(-1, keepdim=True).nan_to_num(neginf=math.inf)
    P = (scores - lse).exp()
    out = torch.einsum("bhqk,bkhd->bqhd", P, wide_v)
    D = (do * out).sum(-1).transpose(1, 2) - data["dlse"].float().masked_fill(lse[..., 0] == math.inf, 0.0)
    dS = P * (torch.einsum("bqhd,bkhd->bhqk", do, wide_v) - D[..., None]) * case.d**-0.5

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    parts = {name: torch.zeros_like(x) for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))}
    for mine in case.shards:
        weight = P[..., mine].sum(-1).transpose(1, 2)[..., None]
        part = torch.einsum("bhqk,bkhd->bqhd", P[..., mine], wide_v[:, mine]) / weight.clamp_min(1e-30)
        parts["out"] += weight * rounded(part)
        parts["dq"] += rounded(torch.einsum("bhqk,bkhd->bqhd", dS[..., mine], wide_k[:, mine]))
        for name, pairs, x in (("dk", dS, q), ("dv", P, do)):
            part = torch.einsum("bhqk,bqhd->bkhd", pairs[:, :, mine], x[:, mine])
            parts[name] += rounded(part.unflatten(2, (case.g, -1)).sum(3))
    return {name: rounded(x) for name, x in parts.items()}


# ---------------------------------------------------------------------------------------- the shell


def main(argv: list[str] | None = None) -> int:
    """`python -m ringref check mypkg.module:function`: 0 if it passes, 1 if not. Under torchrun its
    ranks are used.
    """
    parser = argparse.ArgumentParser("ringref check", description="Judge an attention over ranks.")
    parser.add_argument("candidate", help="mypkg.module:function, or path/to/file.py:function")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layout", default="contiguous", choices=("contiguous", "zigzag", "striped"))
    parser.add_argument("--features", default="", help=f"comma-separated, of {', '.join(FEATURES)}")
    parser.add_argument("--claims", choices=("ring",))
    parser.add_argument("--backend", default="gloo", choices=("gloo", "nccl"))
    parser.add_argument("--adapt", help="an adapter of ringref.adapt, as bhsd")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=30.0)
    parser.add_argument("--json", action="store_true", help="print the report for machines")
    told = parser.parse_args(argv)
    sys.path.insert(0, os.getcwd())
    fn = find(told.candidate)
    if told.adapt:
        fn = getattr(importlib.import_module("ringref.adapt"), told.adapt)(fn)
    features = [name for name in told.features.split(",") if name]
    size = int(os.environ.get("WORLD_SIZE", "0")) if "RANK" in os.environ else 0
    pool = Ranks(told.backend) if size else None
    if pool is not None and pool.rank:
        pool.follow()
        return 0
    try:
        ranks = min(told.ranks, size or told.ranks)
        report = check(fn, layout=told.layout, ranks=ranks, features=features,
                       claims=told.claims, quick=told.quick, backend=told.backend, seed=told.seed,
                       deadline=told.deadline, pool=pool)  # fmt: skip
    finally:
        if pool is not None:
            pool.close()
    print(report.to_json() if told.json else report)
    return 0 if report else 1


def find(spec: str) -> Callable:
    """The function that `module:name` or `file.py:name` names.

    Raises:
        ValueError: there is no such module, file or function.
    """
    place, _, name = spec.rpartition(":")
    if not place:
        raise ValueError(f"candidate must be module:function, got {spec!r}")
    if place.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(place)))
        place = os.path.basename(place)[:-3]
    try:
        found: Any = importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"candidate {spec!r}: {error}") from error
    return found
