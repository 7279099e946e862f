"""The cases of a sweep: small problems, cut across ranks by a layout, that together leave no place to hide."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..comm.ring import Ring
from ..dense import dense_attention
from ..shard import LAYOUTS, Dilation, partition

FEATURES = ("causal", "gqa", "mask", "window", "dilation", "uneven", "empty", "lse", "subgroup")
PLANS = {  # the inputs of each step, and which pass runs on which: forward, backward, inference
    "train": (("first",), "f0 b0"),
    "stacked": (("first", "second"), "f0 f1 b1 b0"),
    "properties": (("first", "batch", "constant", "future"), "i0 i1 i2 i3"),
    "steps": (("first", "second", "again"), "f0 b0 f1 b1 f2 b2"),
    "growth": (("first",), "f0 b0"),
}
PASSES = {"f": "forward", "b": "backward", "i": "inference"}


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
