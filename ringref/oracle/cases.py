"""The cases of a sweep: small problems, cut across ranks by a layout, that together leave no place to hide.

They are chosen as an experiment is: `FACTORS` are what may differ between two inputs, each with its levels, and the
sweep meets every pair of levels of two factors in some case, by a seed; a quick one meets every level. What other
features there are changes no case that has none of them; each meets every plan, dtype and stride.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..comm.launch import MOST
from ..comm.ring import Unheard
from ..dense import dense_attention
from ..shard import LAYOUTS, Dilation, Shard, partition

FEATURES = (
    *("causal", "gqa", "mask", "window", "dilation", "uneven", "empty", "lse", "subgroup"),
    *("scale", "score_mod", "sink", "cu_seqlens", "kv", "value_dim", "deterministic"),
)
PLANS = {  # the inputs of each step, and which pass runs on which: forward, backward, inference
    "train": (("first",), "f0 b0"),
    "stacked": (("first", "second"), "f0 f1 b1 b0"),
    "properties": (("first", "batch", "constant", "future"), "i0 i1 i2 i3"),
    "steps": (("first", "second", "again"), "f0 b0 f1 b1 f2 b2"),
    "twice": (("first", "again"), "f0 b0 f1 b1"),
    "inference": (("first",), "i0"),
    "growth": (("first",), "f0 b0"),
}
PASSES = {"f": "forward", "b": "backward", "i": "inference"}


@dataclass(frozen=True, repr=False)
class Case:
    """One problem: shapes, masks and how it is cut. `check(fn, only=[Case(...)])` judges it alone.

    Args:
        name: how the report calls it.
        p: ranks that share the sequence.
        n, b, h, g, d: tokens, batch, query heads, key/value heads, head dim.
        plan: "train" (forward, backward), "steps" (three training steps, the third like the first), "twice" (two that
            must agree to the bit), "stacked" (two forwards before their backwards), "properties" (forwards on altered
            inputs), "inference" (a forward), "growth" (bytes only).
        layout: "contiguous", "zigzag", "striped", or a function (n, p, rank) -> positions, −1 where a row is padding.
        heads: "all", or "grouped" for the convention of dilated attention that `ringref.Dilation` names so.
        cu_seqlens: where packed documents begin, and n.
        score_mod: "softcap", "alibi" or "bias".
        sink: every query head has an attention sink, whose logit is a leaf too.
        scale: told to the candidate; None leaves it to the default, 1/√d.
        value_dim: head dim of v and out, where it is not d.
        queries: tokens that ask, the last of n; None is all of them.
        replicated: every rank has all the queries.
        shift: added to every score (through one more direction of q and k): exp must not overflow or vanish.
        spread: the same for every third row, and taken away from every other third.
        sharp: factor on q and k: softmax close to one-hot.
        lead: taken from the scores of all keys but the first rank's: what each other block adds to a running sum is
            little, and together it is not.
        zeros: some rows of q are zero, so that lse is 0 where such a query sees one key, and scores tie.
        offset: added to v and dO of the first half of the ranks, taken from the others', and a common part to q and k:
            a running out, dq, dk or dv grows, then cancels, and what it lost by rounding shows.
        views: how q, k and v lie in memory: "", "packed" (views of one tensor) or "heads first".
        dout: how dO lies: "", "heads first" or "expanded" (that of `out.sum()`).
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
    layout: str | Callable = "contiguous"
    plan: str = "train"
    mask: str | None = None
    window: tuple[int, int] | None = None
    dilation: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    heads: str = "all"
    cu_seqlens: tuple[int, ...] | None = None
    score_mod: str | None = None
    sink: bool = False
    scale: float | None = None
    value_dim: int | None = None
    queries: int | None = None
    replicated: bool = False
    lengths: tuple[int, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    positions: bool = False
    dlse: bool = False
    shift: float = 0.0
    spread: float = 0.0
    lead: float = 0.0
    sharp: float = 1.0
    zeros: bool = False
    offset: float = 0.0
    views: str = ""
    dout: str = ""
    seed: int = 0

    def __repr__(self) -> str:
        told = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        told = [(x, value.__name__ if callable(value) else repr(value)) for x, value, usual in told if value != usual]
        return f"Case({', '.join(f'{x}={value}' for x, value in told)})"

    def __str__(self) -> str:
        return f"{self.name}-p{self.p}"

    @property
    def teams(self) -> list[list[int]]:
        """The process groups, as ranks of the world."""
        return [list(team) for team in self.groups or [range(self.p)]]

    @property
    def world(self) -> int:
        return max(map(max, self.teams)) + 1

    @property
    def m(self) -> int:
        """How many tokens ask."""
        return self.n if self.queries is None else self.queries

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return self.d**-0.5 if self.scale is None else self.scale

    def _cut(self, n: int) -> list[Tensor]:
        if self.lengths is not None:
            return list(torch.arange(n).split(list(self.lengths)))
        if callable(self.layout):
            return [torch.as_tensor(self.layout(n, self.p, rank), dtype=torch.int64) for rank in range(self.p)]
        return [partition(n, Unheard(i, self.p), self.layout).positions for i in range(self.p)]

    @functools.cached_property
    def slots(self) -> list[Tensor]:
        """The token in each of a rank's rows of keys, −1 where the layout pads."""
        return self._cut(self.n)

    @functools.cached_property
    def shards(self) -> list[Tensor]:
        """Every rank's keys, as global positions."""
        return [mine[mine >= 0] for mine in self.slots]

    @property
    def padding(self) -> int:
        """How many rows of the layout hold no token."""
        return sum(int((rows < 0).sum()) for rows in self.slots)

    @functools.cached_property
    def asks(self) -> list[Tensor]:
        """Every rank's queries, as indices of the m; position n − m + i is that of the i-th."""
        if self.queries is None:
            return self.shards
        return [torch.arange(self.m)] * self.p if self.replicated else [x[x >= 0] for x in self._cut(self.m)]

    def told(self, rank: int) -> dict[str, Tensor]:
        """The keywords of a call that differ between the ranks."""
        if self.queries is None:
            return {"positions": self.slots[rank].clone()} if self.positions else {}
        return {"positions": self.asks[rank] + self.n - self.m, "kv_positions": self.slots[rank].clone()}

    def call(self) -> dict[str, Any]:
        """The keywords of the call that all ranks share, less `group`."""
        dilation = Dilation(*self.dilation, heads=self.heads) if self.dilation else None
        starts = None if self.cu_seqlens is None else torch.tensor(self.cu_seqlens, dtype=torch.int32)
        added = {"mask_mod": make_mask(self.mask, self.n) if self.mask else None, "dilation": dilation}
        added |= {"score_mod": SCORE_MODS.get(self.score_mod), "cu_seqlens": starts}
        added |= {"window": self.window, "scale": self.scale}
        return {"causal": self.causal} | {name: value for name, value in added.items() if value is not None}

    def dense(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The definition, on the whole problem: `dense_attention`, and the sink."""
        shard = Shard(torch.arange(self.n - self.m, self.n), None, torch.arange(self.n))
        return sunk(*dense_attention(q, k, v, shard=shard, **self.call()), sink)

    @functools.cached_property
    def times(self) -> Tensor:
        """How often each query sees each key, b h m n, asked of the judge: zero scores, and v the identity."""
        q = torch.zeros(self.b, self.m, self.h, 1, dtype=torch.float64)
        k = torch.zeros(self.b, self.n, self.g, 1, dtype=torch.float64)
        v = torch.eye(self.n, dtype=torch.float64)[None, :, None, :].expand(self.b, -1, self.g, -1)
        out, lse = replace(self, score_mod=None).dense(q, k, v)
        return (out.transpose(1, 2) * lse.exp()[..., None]).round()

    def reference(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv (and dsink) of the whole problem in float64."""
        names = ["q", "k", "v"] + ["sink"] * self.sink
        leaves = [data[name].double().requires_grad_() for name in names]
        out, lse = self.dense(*leaves)
        dlse = torch.where(lse.isfinite(), data["dlse"].double(), 0.0)
        torch.autograd.backward([out, lse], [data["do"].double(), dlse])
        grads = {f"d{name}": x.grad for name, x in zip(names, leaves, strict=True)}
        return {"out": out.detach(), "lse": lse.detach()} | grads

    def data(self, team: int = 0, step: int = 0) -> dict[str, Tensor]:
        """The whole problem's q, k, v, dO, dlse and sink in the case's dtype, by the seed."""
        # a sum of bytes, because hash() of a string changes from run to run
        gen = torch.Generator().manual_seed(sum(self.name.encode()) * 1009 + self.seed * 101 + team * 11 + step)
        b, m, n, h, g, d, e = self.b, self.m, self.n, self.h, self.g, self.d, self.value_dim or self.d
        normal = functools.partial(torch.randn, generator=gen, dtype=torch.float64)
        q, k, v, do = (normal(b, *x) for x in ((m, h, d), (n, g, d), (n, g, e), (m, h, e)))
        q, k = q * self.sharp, k * self.sharp
        if self.offset:
            for x, common, none in ((k, 1, 2), (q, 2, 1)):
                x[..., common], x[..., none] = self.offset, 0.0
            for rank, (mine, keys) in enumerate(zip(self.asks, self.shards, strict=True)):
                sign = self.offset if rank < self.p / 2 else -self.offset
                v[:, keys], do[:, mine] = v[:, keys] + sign, do[:, mine] + sign
        if abs(self.shift) > 1000:  # on a grid where every order of adding a score gives the same float32
            q, k = (x.mul(4).round() / 4 for x in (q, k))
        if self.shift or self.spread:
            # all in q: a large common part of k would magnify the rounding of correct code in dq, where it cancels
            by_row = self.shift + self.spread * (torch.arange(m) % 3 - 1)[:, None]
            q[..., 0], k[..., 0] = by_row / self.factor, 1.0
        if self.lead:
            q[..., 0], k[..., 0], k[:, self.shards[0], :, 0] = -self.lead / self.factor, 1.0, 0.0
        if self.zeros:
            q[:, :: max(1, n // 3)] = 0.0
        if self.dout == "expanded":
            do = torch.ones_like(do)
        dtype = getattr(torch, self.dtype)
        data = {name: x.to(dtype) for name, x in zip(("q", "k", "v", "do"), (q, k, v, do), strict=True)}
        more = {"dlse": normal(b, h, m)} | ({"sink": normal(h)} if self.sink else {})
        return data | {name: x.to(torch.promote_types(dtype, torch.float32)) for name, x in more.items()}

    def mine(self, data: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        """One rank's share of the inputs; what stands in a padding row is anything, and its dO is zero."""
        slots = self.slots[rank]
        asks = self.asks[rank] if self.queries is not None else slots
        part = {name: x[:, asks if name in ("q", "do") else slots] for name, x in data.items() if x.ndim == 4}
        part["do"] = part["do"].masked_fill((asks < 0)[:, None, None], 0.0)
        return part | {name: x[..., asks] if x.ndim == 3 else x for name, x in data.items() if x.ndim != 4}

    def steps(self, team: int = 0) -> list[tuple[str, dict[str, Tensor]]]:
        """The named inputs that the plan runs on; after the first, what differs must not matter to all or a part."""
        first, other = self.data(team), self.data(team, 1)
        inputs = {"first": first, "second": other, "again": first}
        inputs["constant"] = first | {"v": torch.full_like(first["v"], 0.75)}
        rows, late = torch.arange(self.b) > 0, torch.arange(self.n) >= self.n // 2
        for name, theirs in (("batch", rows[:, None, None, None]), ("future", late[:, None, None])):
            inputs[name] = first | {
                x: torch.where(theirs[-first[x].shape[1] :] if name == "future" else theirs, 3 * other[x], first[x])
                for x in "qkv"
            }
        return [(name, inputs[name]) for name in PLANS[self.plan][0]]

    @property
    def program(self) -> list[tuple[str, int]]:
        """Which passes over which step, in order."""
        return [(PASSES[word[0]], int(word[1])) for word in PLANS[self.plan][1].split()]

    def without(self, names: list[str]) -> Case:
        """This case with these fields as a plain one has them, and a name that says no more of them."""
        plain = Case("")
        kept = {"plan"} if self.replicated else set()  # nobody has agreed on the gradients of replicated queries
        less = {x: getattr(plain, x) for x in names if x not in kept and getattr(self, x) != getattr(plain, x)}
        if not less:
            return self
        case = replace(self, **less)
        levels = ((text, changes) for levels in FACTORS.values() for _, text, changes in levels if changes)
        stays = lambda x: getattr(case, x, None) != getattr(plain, x, None)
        gone = {text for text, changes in levels if changes.keys() & less.keys() and not any(map(stays, changes))}
        words = [word for word in self.name.split(" + ") if word not in gone]
        words = ["full"] * (words[:1] not in (["full"], ["causal"])) + words
        return replace(case, name=" + ".join(words))

    def shorter(self, per: int = 24) -> Case:
        """This case with fewer tokens a rank, where it has many."""
        if self.n <= per * self.p or self.queries is not None:
            return self
        lengths = self.lengths and tuple(-(-x * per * self.p // self.n) for x in self.lengths)
        n = sum(lengths) if lengths else per * self.p
        starts = self.cu_seqlens and tuple(x * n // self.n for x in self.cu_seqlens)
        name = re.sub("[0-9]+ tokens a rank", f"{per} tokens a rank", self.name)
        return replace(self, name=name, n=n, b=2, lengths=lengths, cu_seqlens=starts)

    def filled(self) -> Case:
        """This case with tokens on every rank."""
        if all(map(len, self.slots)):
            return self
        lengths = self.lengths and LENGTHS["uneven"][: self.p]
        n = sum(lengths or [4] * self.p)
        name, starts = re.sub("(first )?empty", "uneven", self.name), self.cu_seqlens and (*self.cu_seqlens[:-1], n)
        return replace(self, name=name, n=n, lengths=lengths, cu_seqlens=starts)


def index(case: Case) -> tuple[Tensor, ...]:
    """Batch, head and global positions of queries and keys, as FlexAttention's functions take them."""
    queries = torch.arange(case.n - case.m, case.n)
    four = torch.arange(case.b), torch.arange(case.h), queries, torch.arange(case.n)
    return tuple(x.view([-1 if a == b else 1 for b in range(4)]) for a, x in enumerate(four))


def together_in(starts: tuple[int, ...], i: Tensor, j: Tensor) -> Tensor:
    """Whether two positions are of one document."""
    i, j = ((x[..., None] >= torch.tensor(starts)).sum(-1) for x in (i, j))
    return i == j


def sunk(out: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """A key that everybody sees, with a head's logit for a score and the value 0."""
    if sink is None:
        return out, lse
    new = torch.logaddexp(lse, sink[:, None])
    return out * (lse - new).exp().transpose(-1, -2)[..., None], new


SCORE_MODS: dict[str | None, Callable] = {
    "softcap": lambda score, b, h, q, k: 1.5 * (score / 1.5).tanh(),
    "alibi": lambda score, b, h, q, k: score - 0.1 * (h + 1) * (q - k).abs(),
    "bias": lambda score, b, h, q, k: score + 0.3 * ((b + 2 * h + q + 3 * k) % 7),
}


def modified(mod: Callable | None, scores: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | float]:
    """What a score_mod makes of scores, and its derivative."""
    if mod is None:
        return scores, 1.0
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        new = mod(leaf, *at)
        return new.detach(), torch.autograd.grad(new.sum(), leaf)[0]


def make_mask(kind: str, n: int) -> Callable:
    """The masks that the `mask` feature judges: documents, a pattern that differs by head and batch, blind queries,
    and one that keeps what it has computed, as a user's cache would (it is not the candidate's to write).
    """
    document = sum(torch.arange(n) >= start for start in (n // 5, n // 2, n - 2))
    stored: dict = {}

    def remembered(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        key = (tuple(q.flatten().tolist()), tuple(k.flatten().tolist()))
        if key not in stored:
            seen = (q + k + (q * k) // 3) % 4 != 0
            stored[key] = seen, seen.clone()
        return stored[key][0]

    masks = {
        "documents": lambda b, h, q, k: document.to(q.device)[q] == document.to(k.device)[k],
        "heads": lambda b, h, q, k: (q + 2 * k + 3 * h + b) % 4 != 0,
        "blind": lambda b, h, q, k: (q % 5 != 2) & ((q - k) % 3 != 1),
        "stored": remembered,
    }
    if kind not in masks:
        raise ValueError(f"mask must be one of {', '.join(masks)}, got {kind!r}")
    return masks[kind]


AWKWARD = (((4, 8, 64), (1, 2, 4)), ((5, 7), (2, 3)), ((6,), (3,)), ((3, 12), (1, 5)), ((4, 12), (4, 2)))
LENGTHS = {"uneven": (3, 7, 1, 5), "shorter later": (8, 6, 3, 4), "empty": (5, 0, 4, 0), "first empty": (0, 4, 0, 5)}
USUAL = "", "", {}
FEW = {"least": 1, "lengths": None}  # so few tokens meet neither a dtype nor lengths that want more
# What may differ between two inputs: a level is what a candidate must be able to do, how the name says it, and what
# differs from a plain case. Two levels that set the same thing do not meet. `per` are tokens a rank, of which a coarse
# dtype needs at `least` some for its errors to be typical; `ps` are the most ranks.
FACTORS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "causal": (USUAL, ("causal", "causal", {"causal": True})),
    "ranks": tuple(("", "", {"p": p}) for p in (2, 1, 3, 4)),
    "heads": (USUAL, ("", "odd heads", {"h": 3, "g": 3}), ("gqa", "grouped heads", {"g": "p"}),
              ("gqa", "one key head", {"g": 1}), ("gqa", "uneven groups", {"h": 6, "g": 3})),
    "width": (USUAL, *(("", f"d {d}", {"d": d}) for d in (12, 5, 32))),
    "tokens": (USUAL, *(("", text, {"per": x, **FEW}) for text, x in (("one token a rank", 1), ("short shards", 3))),
               *(("", f"{x} tokens a rank", {"per": x, "b": 1, "ps": ps}) for x, ps in ((33, 3), (70, 2), (130, 1)))),
    "views": (USUAL, *(("", f"{x} qkv", {"views": x}) for x in ("packed", "heads first"))),
    "dout": (USUAL, *(("", f"{x} dO", {"dout": x}) for x in ("heads first", "expanded"))),
    "scores": (USUAL, *(("", f"scores {x:+.0f}", {"shift": x}) for x in (120.0, -120.0)),
               ("", "scores -12000", {"shift": -12000.0, "d": 16, "dtype": "float32"}), ("", "sharp", {"sharp": 2.0}),
               ("", "rows far apart", {"spread": 100.0}), ("", "ties and lse 0", {"zeros": True})),
    "dtype": (USUAL, ("", "float64", {"dtype": "float64"}),
              *(("", x, {"dtype": x, "least": 16, "sharp": 0.3}) for x in ("bfloat16", "float16"))),
    "plan": (USUAL, ("", "two graphs", {"plan": "stacked"}), ("", "properties", {"plan": "properties"}),
             ("", "training", {"plan": "steps"}), ("deterministic", "two backwards", {"plan": "twice"})),
    # beside a dilation nobody has agreed what windows and documents count
    "seen": (USUAL, *(("mask", f"mask {x}", {"mask": x}) for x in ("documents", "heads", "blind", "stored")),
             *(("dilation", f"dilation {x}", {"dilation": x, "window": None, "cu_seqlens": None}) for x in AWKWARD)),
    "window": (USUAL, *(("window", f"window {x}", {"window": x}) for x in ((3, 2), (8, 0), (0, 7), (1, 1)))),
    "documents": (USUAL, *(("cu_seqlens", f"documents {x}", {"cu_seqlens": x})
                           for x in ((0.3, 0.7), (0.5, 0.5), (0.1, 0.15, 0.9)))),
    "scale": (USUAL, *(("scale", f"scale {x}", {"scale": x}) for x in (0.2, 1.0))),
    "score_mod": (USUAL, *(("score_mod", x, {"score_mod": x}) for x in SCORE_MODS)),
    "sink": (USUAL, ("sink", "sink", {"sink": True})),
    "value_dim": (USUAL, *(("value_dim", f"d of v {x}", {"value_dim": x}) for x in (4, 24))),
    "cut": (
        USUAL,
        *((x.split()[-1] if x != "shorter later" else "uneven", x, {"lengths": x}) for x in LENGTHS),
        ("kv", "cross", {"queries": "cross", "causal": False}), ("kv", "prefill", {"queries": "prefill"}),
        ("kv", "decode", {"queries": "decode", "plan": "inference"}),
    ),
}  # fmt: skip
SIMPLER = [  # fields that go together, in the order in which a failing case is freed of them
    names.split()
    for names in "mask window dilation cu_seqlens, score_mod, sink, scale, value_dim, dout, views, plan, "
    "zeros shift spread sharp, d value_dim, dtype sharp, causal".split(", ")
]
LOW = {"dtype": "bfloat16", "per": 16, "sharp": 0.3}
GROWTH = {"plan": "growth", "b": 1, "d": 32, "h": 8, "g": 8}
ONCE = (  # what a candidate must be able to do, name, the p it runs at, what differs; causal if the candidate can
    ("", "bfloat16", (8,), LOW),
    ("", "bfloat16 sums", (8,), LOW | {"causal": False, "offset": 4.0}),
    ("", "bfloat16 weights", (8,), LOW | {"causal": False, "lead": 6.25}),
    ("causal", "eight ranks", (8,), {}),
    ("uneven", "shorter later", (4,), {"lengths": "shorter later"}),
    # one after the other: what is kept of the one under the number of documents is wrong for the other
    ("cu_seqlens", "three documents", (2,), {"cu_seqlens": (0.3, 0.6)}),
    ("cu_seqlens", "three others", (2,), {"cu_seqlens": (0.2, 0.8)}),
    ("subgroup", "subgroup", (2,), {"groups": ((0, 2), (1, 3))}),
    ("subgroup", "subgroup", (2,), {"groups": ((1, 2),)}),
    ("subgroup", "subgroup", (3,), {"groups": ((1, 2, 4),)}),
    ("ring", "growth", (2, 4, 8), GROWTH | {"per": 32}),
    ("ring", "growth", (4,), GROWTH | {"per": 64}),
)


def covering(levels: list[int], fits: Callable, pairs: bool, seed: int, before: Iterable = ()) -> Iterator[tuple]:
    """Rows of an experiment: every level of every factor, or every pair of levels of two, that `fits` allows and that
    no row `before` has.
    """
    chance, size = random.Random(seed), 2 if pairs else 1

    def parts(row: dict[int, int]) -> set[tuple]:
        return set(itertools.combinations(sorted(row.items()), size))

    every = itertools.combinations(range(len(levels)), size)
    missing = {c for some in every for c in itertools.product(*([(f, x) for x in range(levels[f])] for f in some))}
    missing = {c for c in missing if fits(dict(c))}.difference(*(parts(dict(enumerate(row))) for row in before))
    while missing:
        tried = []
        for start in chance.sample(sorted(missing), min(3, len(missing))):
            row = dict(start)
            for f in chance.sample(range(len(levels)), len(levels)):
                choices = [x for x in range(levels[f]) if f not in row and fits(row | {f: x})]
                if choices:  # the level that meets most of what is missing; by chance among equals
                    gain = {x: len(parts(row | {f: x}) & missing) for x in choices}
                    row[f] = max(choices, key=lambda x: (gain[x], chance.random()))
            tried.append(row)
        row = max(tried, key=lambda row: len(parts(row) & missing))
        missing -= parts(row)
        yield tuple(row.get(f, 0) for f in range(len(levels)))


def _fits(changes: list[dict[str, Any]], most: int) -> bool:
    """Whether levels can meet: nothing set twice; few enough ranks."""
    told = [name for one in changes for name in one]
    both = {name: value for one in changes for name, value in one.items()}
    needs_two = both.get("lengths") or both.get("queries") == "decode"
    few, enough = both.get("p", 1) <= min(most, both.get("ps", most)), not (needs_two and both.get("p") == 1)
    return len(told) == len(set(told)) and few and enough


def apart(features: set[str]) -> list[str]:
    """Pairs of features that no case has both of."""
    of = {name: [(f, one[2]) for f, levels in FACTORS.items() for one in levels if one[0] == name] for name in features}
    pairs = {(a, b): [*itertools.product(of[a], of[b])] for a, b in itertools.combinations(sorted(features), 2)}
    differ = {both: some for both, some in pairs.items() if any(x.keys() != y.keys() for (_, x), (_, y) in some)}
    meet = lambda f, x, g, y: f != g and _fits([x, y], 4)
    return [f"{a} beside {b}" for (a, b), some in differ.items() if not any(meet(*x, *y) for x, y in some)]


def _names(features: Any) -> set[str]:
    """{"causal", "gqa"}, or "causal,gqa" as the command line has it."""
    if not isinstance(features, (str, list, tuple, set, frozenset)):
        raise ValueError(f"features: expected names, got {features!r}")
    return set(re.findall(r"[^\s,]+", features) if isinstance(features, str) else map(str, features))


def _made(name: str, layout: str | Callable, **told: Any) -> Case | None:
    """A case from what its levels say; None where a layout of the caller's own has no such n."""
    p, told = told.get("p", 2), {name: x for name, x in told.items() if name != "ps"}
    per, kind, cut = max(told.pop("per", 6), told.pop("least", 1)), told.pop("queries", None), told.get("lengths")
    # head counts are multiples of p, so that all-to-all over heads can be judged too
    told["h"] = told.get("h", max(4, 2 * p))
    told["g"] = {"p": max(2, p)}.get(told.get("g"), told.get("g", told["h"]))
    # s ≠ h: an lse b s h is known by its shape; two equal chunks a rank
    per += (per % 2 if layout == "zigzag" else 0) + 2 * (per == told["h"])
    n = p * per
    if cut:
        lengths = tuple(x * -(-per // 8) for x in LENGTHS[cut][:p])
        n = sum(lengths) if layout == "contiguous" or all(lengths) else p - 1
        told["lengths"] = lengths if layout == "contiguous" else None
    if kind:
        told |= {"queries": 1 if kind == "decode" else p * max(1, per // 4 * 2), "replicated": kind == "decode"}
    if told.get("cu_seqlens"):  # an end that is given twice is an empty document
        told["cu_seqlens"] = (0, *(int(x * n) for x in told["cu_seqlens"]), n)
    case = Case(name, n=n, layout=layout, **told)
    if callable(layout):
        try:
            every = torch.cat([*case.shards, *(case.asks if kind else ())]).sort()[0]
        except (ValueError, NotImplementedError):
            return None
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"layout: at n = {n}, p = {p} the function gives {told}") from error
        if not kind and not torch.equal(every, torch.arange(n)):
            raise ValueError(f"layout: the ranks' positions at n = {n}, p = {p} are not 0 … n−1, each once")
    return case


def cases(*, features=(), layout="contiguous", ranks=4, quick=False, claims=None, seed=0) -> list[Case]:
    """The cases of a sweep, smallest first.

    Args:
        features: what the candidate can do, a subset of `FEATURES`; the rest is reported as not judged.
        layout: "contiguous", "zigzag" or "striped": how the sequence is cut; or a function (n, p, rank) -> the rank's
            positions, −1 for a row of padding, which may raise ValueError for an n that it cannot cut.
        ranks: every p up to this is tried; with the default of 4 also p = 5 and p = 8.
        quick: every level of every factor once instead of every pair.
        claims: "ring" asserts that a rank never holds the keys of all; bytes per rank are measured as p doubles.
        seed: another seed, other pairs and numbers; the same seed, the same run.

    Raises:
        ValueError: an unknown feature, layout or claim, or no ranks.
    """
    can = _names(features)
    claimed = [] if claims is None else [claims]
    known = {"features": (sorted(can), FEATURES), "layout": ([layout], LAYOUTS), "claims": (claimed, ("ring",))}
    for name, (given, choices) in known.items():
        if unknown := [str(x) for x in given if not callable(x) and x not in list(choices)]:
            raise ValueError(f"{name}: {', '.join(unknown)} unknown; choose from {', '.join(choices)}")
    if not isinstance(seed, int):
        raise ValueError(f"seed: expected a whole number, got {seed!r}")
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= MOST:
        raise ValueError(f"ranks: expected a whole number of at least 1, at most {MOST}, got {ranks!r}")
    common = {"layout": layout, "dlse": "lse" in can, "positions": bool(can & {"uneven", "empty"}), "seed": seed}
    made = []
    for causal, p in itertools.product((False, True)[: 1 + ("causal" in can)], range(1, max(5, ranks) + 1)):
        made.append(_made("causal" if causal else "full", p=p, causal=causal, **common))
    # a cut by the caller's own function has no other lengths
    able = can - ({"uneven", "empty"} if callable(layout) else set())
    factors = [[level for level in levels if not level[0] or level[0] in able] for levels in FACTORS.values()]

    def fits(row: dict[int, int]) -> bool:
        changes = [factors[f][x][2] for f, x in row.items()]
        # a rank is empty where another layout has fewer tokens than ranks
        sparse = layout != "contiguous" and any(0 in LENGTHS.get(one.get("lengths"), ()) for one in changes)
        return _fits(changes, ranks) and not (sparse and any(one.keys() & {"per", "least"} for one in changes))

    rows = []
    for more in range(1 + quick):
        plain = [sum(level[0] in ("", "causal", "gqa") for level in levels) for levels in factors]
        some = [*covering(plain, fits, not quick, seed + more)]
        rows += some + [*covering([*map(len, factors)], fits, not quick, seed + more, some)]
    for row in rows:
        levels = [factors[f][x] for f, x in enumerate(row)]
        changes = {name: x for _, _, changes in levels for name, x in changes.items()}
        words = ["causal" if changes.get("causal") else "full", *(text for _, text, _ in levels[1:] if text)]
        made.append(_made(" + ".join(words), **common | changes))
    for needs, name, ps, changes in ONCE:
        if not needs or needs in can | {claims}:
            made += [_made(name, **common | {"causal": "causal" in can, "p": p} | changes) for p in ps]
    made = [case for case in made if case and case.world <= (8 if ranks == 4 else ranks)]
    if not made:
        raise ValueError("layout: it cuts none of the lengths that are tried, multiples of p from p to 130 p")
    # the plain cases first, then the small ones, but last where a rank has one token or none: so they say best what is
    # wrong; one rank, for which its own block is the whole, comes after two
    plain, late = ("full", "causal"), {1: 2.5}

    def turn(x: Case) -> tuple:
        few = any(text in x.name for text in ("one token", "empty"))
        return x.name not in plain, few, x.p if x.name in plain else late.get(x.p, x.p), x.world, x.n

    return sorted(made, key=turn)
