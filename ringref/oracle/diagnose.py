"""Name the cause: compute in float64 what each famous mistake would give, and see which one the candidate gave.

A mistake is a small change of one ingredient, everywhere or for some pairs of query and key only: which keys count for
whom (`sights`), whose K or V, which scale, lse or row sum (`ingredients`), how parts are merged (`merges`), which rank
a gradient ends on (`homes`), where rows and heads stand (`places`). A guess is a sentence, and what computes the
tensors that the change predicts; the forward and the backward try the same ones. It is believed when ‖candidate −
prediction‖ is a small part of ‖candidate − truth‖. The best wins, among equals the one listed first; where none is
good, the diagnosis says where the error lives, which guess came nearest, and how much of the error that leaves.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..shard import LAYOUTS
from .cases import SCORE_MODS, index, modified, sunk, together_in

UNKNOWN = "unknown signature"
EARLY = "a receive buffer is read before its wait(): the numbers are right once the oracle leaves the buffer alone"
UNWRITTEN = "memory that nobody wrote is read: there is no NaN once fresh memory holds zeros"
EARLIER = "it passes alone: the cause lies in an earlier case, whose state is kept"
PRECISE = "something is kept in low precision: the same in float32 passes"
CALLS = "a call's result depends on another call:"
RACE = "it fails at some times only, not alone and after no one case: a race, or much that is kept"
ENOUGH = 0.05  # a guess may leave this share of the error unexplained
MESSAGES = {
    "two-into-one": "two receives into one buffer",
    "receive-into-send": "receiving into the buffer being sent",
    "send-overwritten": "send buffer overwritten before its wait",
    "self-send": "self-send",
    "non-contiguous": "a non-contiguous buffer is sent or received",
    "unfinished": "unfinished work",
}
GROUP = "a rank, size or group of the world is used for the group's own (group rank used as global rank?)"
LARGE = "large scores overflow or underflow: exp without the maximum, or one that starts at 0 or is for several rows"
NOT_LARGE = ("a masked score", "accumulates in low precision")  # what may show in large scores and is no overflow
SPREAD = "rows whose scores lie far apart spoil each other: one maximum for several rows"
ODD = "heads that the ranks do not divide make it raise"
BLIND = "the lse of a query that sees nothing is a finite number: a maximum or sum that starts at 0"
TAKES = {  # what a case has that fails no more without it, where no number says what is done with it
    **{("dout", x): "dO is read with other strides than it has" for x in ("heads first", "expanded")},
    **{("views", x): "q, k or v is read with other strides than it has" for x in ("packed", "heads first")},
    ("zeros", True): "a score or lse of exactly 0, or a tie, is taken for something else",
    ("plan", "stacked"): "a call's result depends on another call: a part of what one saved is overwritten by the next",
    ("plan", "steps"): "a call's result depends on another call: something is kept from step to step",
}
VAGUE = (UNKNOWN, "NaN or inf", "it raises", EARLIER, RACE)  # what a finding says when it has nothing better
HARMLESS = ("unfinished work", "an input was written to")  # values are worth a look all the same
GRADS = ["dq", "dk", "dv"]
TILES = (128, 64, 32, 16)  # rows of a kernel's tile, or of a chunk of queries
PAIRED = {"times", "scale", "K_of", "V_of"}  # ingredients that may differ from pair to pair

Guess = tuple[str, Callable[[], dict[str, Tensor]]]


# -------------------------------------------------------------------------------- messages and hangs


def mismatched(results: dict[int, dict]) -> list[tuple[str, str, int, Any]]:
    """The first message whose two ends disagree about size or dtype, or collective whose ranks do:
    (cause, text, rank, line).
    """
    ends: dict[tuple, tuple[int, dict]] = {}
    receives = {sum(op["kind"] == "recv" for op in r.get("ops", ())) for r in results.values()}
    for rank, op in ((rank, op) for rank, r in results.items() for op in r.get("ops", ())):
        pair = (rank, op["peer"]) if op["kind"] == "send" else (op["peer"], rank)
        between = tuple(op["members"]) if op["peer"] is None else (pair, op["tag"])
        first, other = ends.setdefault((op["group"], between, op["seq"]), (rank, op))
        if op["peer"] is None and other["kind"] != op["kind"]:
            text = f"rank {first} is in {other['kind']}, rank {rank} in {op['kind']}"
            return [("collectives differ", text, rank, op["line"])]
        if op["order"] != other["order"]:  # of what is reduced in place, element by element in memory
            text = f"in {op['kind']} rank {rank}'s are {op['order']}, rank {first}'s {other['order']}"
            return [("ranks reduce tensors of different strides", text, rank, op["line"])]
        if op["peer"] is not None and (op["sizes"], op["dtypes"]) != (other["sizes"], other["dtypes"]):
            sent, got = (op, other) if op["kind"] == "send" else (other, op)
            sends, receipt = (f"{end['sizes'][0]} {end['dtypes'][0]}" for end in (sent, got))
            text = f"rank {pair[0]} sends {sends}, rank {pair[1]} receives {receipt} ({got['phase']}, hop {got['hop']})"
            what = "dtype" if op["sizes"] == other["sizes"] else "size"
            cause = f"message of the wrong {what}" if len(receives) == 1 else "unequal hop counts"
            return [(cause, text, rank, op["line"])]
    return []


def direction(results: dict[int, dict]) -> int:
    """+1 if messages go to the next rank, −1 if to the one before; where that is the same, +1."""
    steps = [
        (op["peer"] - rank) % len(results) for rank, r in results.items() for op in r["ops"] if op["kind"] == "send"
    ]
    return -1 if steps and len(results) > 2 and set(steps) == {len(results) - 1} else 1


def crash(error: dict) -> tuple[str, str]:
    """What an exception says: (cause where it is known, text)."""
    text = (error["text"].splitlines() or [""])[0]
    known = {"not part of group": GROUP, "is not in group": GROUP}
    known |= dict.fromkeys(("which is this rank", "same as the rank of the current process"), MESSAGES["self-send"])
    known |= {"does not require grad": "no gradient reaches the inputs"}
    cause = next((cause for words, cause in known.items() if words in text), None)
    return (cause, f"{error['type']}: {text}"[:200]) if cause else (f"it raises {error['type']}", text[:200])


def hang(case: Any, results: dict[int, dict]) -> tuple[str, str, int, Any]:
    """Who waits for what: (cause, text, rank, line)."""
    stuck = {rank: r for rank, r in results.items() if "hang" in r}
    waits = {rank: r["waiting"] for rank, r in stuck.items() if r["waiting"]}
    if not waits:
        rank, r = next(iter(stuck.items()))
        return "no answer", f"after {r['hang']:.0f} s, and not waiting for a message", rank, r["line"]
    rank, op = next(iter(waits.items()))
    peer, at = "" if op["peer"] is None else f" with rank {op['peer']}", f"({op['phase']}, hop {op['hop']})"
    cause, text = "deadlock", f"rank {rank} waits in {op['kind']}{peer} {at}"
    ops = {r: facts.get("ops", ()) for r, facts in results.items()}
    posts = {r: tuple(sum(o["kind"] == kind for o in ops[r]) for kind in ("send", "recv")) for r in ops}
    if case.groups and any(list(o["members"]) not in case.teams for r in ops for o in ops[r]):
        cause = GROUP
    elif op["peer"] is None and len(set(posts.values())) == 1:
        inside = [r for r, w in waits.items() if w["peer"] is None]
        text = f"ranks {_list(inside)} wait in {op['kind']} {at}, which the others never enter"
    elif len(waits) > 1 and all(w["kind"] == "send" for w in waits.values()):
        cause = "deadlock: every rank sends before it receives"
    elif len(set(posts.values())) > 1 or any(a != b for a, b in posts.values()):
        told = ", ".join(f"rank {r} {a}/{b}" for r, (a, b) in posts.items())
        cause, text = "unequal hop counts", f"{text}; posted sends/receives: {told}"
    return cause, text, rank, op["line"] or stuck[rank]["line"]


def not_finite(case: Any, truth: Any, got: dict[str, list[Tensor]], wrong: list[str]) -> str:
    """NaN or inf that the oracle did not plant, by the rows where it is."""
    s, name = Scene(case, truth), wrong[0]
    blind = s.L == -math.inf
    lses = torch.cat([s.forward(times=parts)["lse"] for _, parts in s.parts(s.hop)])
    partly = (lses == -math.inf).any(0) & ~blind
    if name in ("out", "lse", "dq"):
        bad = ~assembled(s, name, got[name]).isfinite()
        bad = bad & (s.L.isfinite() if name == "lse" else torch.tensor(True))
        bad = bad if name == "lse" else bad.any(-1).transpose(1, 2)
        blind, partly = blind & bad, partly & bad
        elsewhere = (bad & ~blind & ~partly).any()
    else:
        elsewhere = not (blind.any() or partly.any())
    if case.shift or (case.spread and elsewhere):
        return LARGE if case.shift else SPREAD
    if elsewhere or not (blind.any() or partly.any()):
        return "NaN or inf"
    if not partly.any():
        return "NaN where a query sees no key at all"
    if case.causal and not (case.mask or case.window or case.dilation or case.cu_seqlens):
        return "NaN where a block of keys is entirely masked"
    return "NaN where a query sees no key of a block, or none at all"


# --------------------------------------------------------------------------------------- the problem


class Scene:
    """One step of a case in float64. Its attributes are the ingredients; `forward` and `backward` take others by name.

    Tensors of pairs are b h m n, or what broadcasts to that, with leading dimensions for parts that are merged.
    """

    def __init__(self, case: Any, truth: Any, way: int = 1):
        self.case, self.p, self.times, self.scale = case, case.p, case.times, case.factor
        data, self.e = (truth.data[n].double() for n in ("q", "k", "v", "do")), case.h // case.g
        self.q, self.K, self.V, self.do = (x.repeat_interleave(case.h // x.shape[2], 2) for x in data)
        self.sink = truth.data["sink"].double() if case.sink else None
        self.gather = lambda x: x.sum(3)  # of the query heads of a key/value head, b n g e d
        self.over = lambda x: x.sum((0, 2))  # of a sink's gradient, b h m
        self.mod = SCORE_MODS.get(case.score_mod)
        self.at = index(case)
        self.owner, self.loc = ([torch.zeros(x, dtype=torch.int64) for x in (case.m, case.n)] for _ in range(2))
        for side, cut in enumerate((case.asks, case.shards)):
            for rank, mine in enumerate(cut):
                self.owner[side][mine], self.loc[side][mine] = rank, torch.arange(len(mine))
        shape = case.m, case.n
        self.i, self.j = (
            torch.arange(case.n - case.m, case.n)[:, None].expand(shape),
            torch.arange(case.n).expand(shape),
        )
        (self.mine, self.theirs), (self.here, self.there) = (
            (x[0][:, None].expand(shape), x[1].expand(shape)) for x in (self.owner, self.loc)
        )
        self.way = way  # +1 where blocks go to the next rank, −1 where to the one before
        self.K_of = self.V_of = self.j  # the key whose K, and whose V, is used for a pair
        self.order = [torch.cat(cut).argsort() for cut in (case.asks, case.shards)]
        self.even = len({len(mine) for mine in case.shards}) == 1 and case.p > 1 and case.queries is None
        self.hop = way * (self.mine - self.theirs) % self.p  # at which a query's rank sees a key
        self.L = self.D = None
        self.O, self.L, self.top = self.forward().values()
        self.D = row_sums(self.do, self.O)[..., None]
        self.dlse = torch.where(self.L.isfinite(), truth.data["dlse"].double(), 0.0)

    def scores(self, x: Any) -> tuple[Tensor, Tensor | float]:
        """Scores plus the log of how often each pair counts, and the slope of score_mod."""
        S = torch.einsum("bqhd,bkhd->bhqk", x.q, self.bank(x.K, x.V, x.K_of))
        S = (S if x.K_of is self.j else S.gather(-1, x.K_of.expand(*S.shape[:2], *x.K_of.shape))) * x.scale
        S, slope = modified(x.mod, S, x.at)
        hidden = getattr(x, "hidden", None)
        return (S + x.times.log() if hidden is None else torch.where(x.times > 0, S + x.times.log(), hidden)), slope

    def bank(self, K: Tensor, V: Tensor, of: Tensor) -> Tensor:
        """What indices count through: K, and beyond n what travels in its place."""
        return K if of is self.j else torch.cat([K, V], 1) if K.shape == V.shape else K

    def forward(self, **changed: Any) -> dict[str, Tensor]:
        """out, lse and the largest score where some ingredients are changed."""
        x = SimpleNamespace(**(vars(self) | changed))
        S, _ = self.scores(x)
        lse = S.logsumexp(-1)
        P = (S - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
        V = self.bank(x.V, x.K, x.V_of)
        if x.V_of is not self.j:
            P = P.new_zeros(*P.shape[:-1], V.shape[1]).scatter_add(-1, x.V_of.expand(P.shape), P)
        out, lse = sunk(torch.einsum("...bhqk,bkhd->...bqhd", P, V), lse, x.sink)
        return {"out": out, "lse": lse, "top": S.amax(-1)}

    def backward(self, **changed: Any) -> dict[str, Tensor]:
        """dq, dk, dv of the right forward where some ingredients, or the row sums `D`, are changed; summed over parts
        where `times`, `L` and `D` have them.
        """
        x = SimpleNamespace(**(vars(self) | changed))
        L = self.L[..., None] if x.L is self.L else x.L
        S, slope = self.scores(x)
        P = (S - L.masked_fill(L == -math.inf, math.inf)).exp()
        V = self.bank(x.V, x.K, x.V_of)
        dP = torch.einsum("bqhd,bkhd->bhqk", x.do, V)
        dP = dP if x.V_of is self.j else dP.gather(-1, x.V_of.expand(*dP.shape[:2], *x.V_of.shape))
        D = (x.D if "D" in changed else row_sums(x.do, x.O)[..., None]) - x.dlse[..., None]
        dS = P * (dP - D) * slope * x.scale
        P, dS = (y.reshape(-1, *y.shape[-4:]).sum(0) for y in (P, dS))
        wide = torch.einsum("bhqk,bqhd->bkhd", dS, x.q), torch.einsum("bhqk,bqhd->bkhd", P, x.do)
        dk, dv = (x.gather(y.unflatten(2, (self.case.g, self.e))) for y in wide)
        if x.K_of is not self.j:
            K = self.bank(x.K, x.V, x.K_of)
            dS = dS.new_zeros(*dS.shape[:-1], K.shape[1]).scatter_add(-1, x.K_of.expand(dS.shape), dS)
        dq = torch.einsum("bhqk,bkhd->bqhd", dS, self.bank(x.K, x.V, x.K_of))
        found = {"dq": dq, "dk": dk, "dv": dv}
        if x.sink is not None:
            whole = self.L[..., None], row_sums(x.do, self.O)[..., None] - x.dlse[..., None]
            L, D = (y if y.shape == usual.shape else usual for y, usual in zip((L, D), whole, strict=True))
            found["dsink"] = -x.over((x.sink[:, None] - L[..., 0]).exp() * D[..., 0])
        return found

    def parts(self, *orders: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is merged, as multiplicities in the order of merging: blocks, a dilation's branches."""
        for order in orders:
            yield "blocks", torch.stack([self.times * (order == t) for t in range(self.p)])
        if self.case.dilation and len(self.case.dilation[0]) > 1:
            each = zip(*self.case.dilation, strict=True)
            yield "branches", torch.stack([replace(self.case, dilation=((w,), (r,))).times for w, r in each])

    def moved(self, x: Tensor, change: Callable) -> Tensor:
        """A tensor b n h d, changed in the shape b p s h d in which the ranks hold it."""
        return change(x[:, torch.stack(self.case.shards)]).flatten(1, 2)[:, self.order[1]]

    def places(self) -> dict[str, Tensor]:
        """Some of the pairs of query and key, by the words for them."""
        p, hop = self.p, self.hop
        some = {"the own block": hop == 0, "received blocks": hop > 0, "the last hop": hop == p - 1}
        some |= {"hop 1": hop == 1, "hops after 1": hop > 1} | {f"hop {t}": hop == t for t in range(2, p - 1)}
        some |= {"blocks of earlier ranks": self.theirs < self.mine, "blocks of later ranks": self.theirs > self.mine}
        return {text: pairs for text, pairs in some.items() if pairs.any() and not pairs.all()}

    def on(self, pairs: Tensor, changed: dict[str, Any]) -> dict[str, Any]:
        """Ingredients that are changed for some pairs only."""
        if changed.keys() - PAIRED:
            raise ValueError("this is no pair's own")
        each = ((name, torch.as_tensor(x), torch.as_tensor(getattr(self, name))) for name, x in changed.items())
        return {name: torch.where(pairs, x, usual) for name, x, usual in each}


def row_sums(do: Tensor, out: Tensor) -> Tensor:
    return (do * out).sum(-1).transpose(-1, -2)


def rows(x: Tensor) -> Tensor:
    """b h q as a factor of b q h d."""
    return x.transpose(-1, -2)[..., None]


def assembled(s: Scene, name: str, pieces: list[Tensor]) -> Tensor:
    """The whole tensor from those of the ranks."""
    if name == "dsink":
        return pieces[0].double()
    pieces = pieces[:1] if s.case.replicated and name in ("out", "lse", "dq") else pieces
    dim, order = 1 + (name == "lse"), s.order[name in ("dk", "dv")][: sum(x.shape[1 + (name == "lse")] for x in pieces)]
    x = torch.cat([x.double() for x in pieces], dim).index_select(dim, order)
    return x.masked_fill(x < -1e30, -math.inf)


# ----------------------------------------------------------------------------------- who sees whom


def sights(s: Scene, deep: bool = False) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Who sees whom, got wrong: (sentence, multiplicities). Right is the product of a few rules about a query's and a
    key's position (m b h q k, m branches), summed over the branches. A rule is ignored, or replaced, or asked in a
    wrong view of the positions; `deep` gives one rule at a time, for some of the pairs.
    """
    case, n, p = s.case, s.case.n, s.p
    i, j, mine, theirs, here, there = s.i, s.j, s.mine, s.theirs, s.here, s.there
    rules: dict[str, Callable] = {}
    instead: dict[str, dict[str, Any]] = {}  # what stands in for a rule
    if case.causal:
        rules["causal mask"] = lambda i, j: j <= i
        instead["causal mask"] = {
            f"counted from a tile of {x}": torch.where(there // x == here // x, there % x <= here % x, j <= i)
            for x in TILES
            if x < max(map(len, case.asks))
        } | {
            f"counted from a tile of {x} at every hop": (there // x <= here // x) & (there % x <= here % x)
            for x in TILES
            if x < max(map(len, case.asks))
        }
    if case.window:
        left, right = case.window
        rules["window (left)"], rules["window (right)"] = lambda i, j: i - j <= left, lambda i, j: j - i <= right
        instead["window (right)"] = {"taken as left": j - i <= left, "taken as 0": j <= i}
    if case.cu_seqlens:
        starts = case.cu_seqlens
        rules["documents"] = partial(together_in, starts)
        empty = next((a for a, b in itertools.pairwise(starts) if a == b), n)
        instead["documents"] = {
            f"nothing is seen {text}": together_in(starts, i, j) & (i < end)
            for text, end in {"after an empty one": empty, "in the last": starts[-2]}.items()
        }
    if case.mask:
        seen = replace(case, causal=False, window=None, queries=None).times
        rules["mask_mod"] = lambda i, j: seen[..., i.clamp(0, n - 1), j.clamp(0, n - 1)]
        wrong = {"inverted": 1 - seen, "of head 0 for all": seen[:, :1], "of batch 0 for all": seen[:1]}
        instead["mask_mod"] = {text: x[..., n - case.m :, :] for text, x in wrong.items()}
    if case.dilation:
        (w, r), h = (torch.tensor(x)[:, None, None, None, None] for x in case.dilation), case.h
        branch, head = torch.arange(len(w))[:, None, None, None, None], torch.arange(h)[:, None, None]
        few, many = h // len(w) or 1, torch.arange(h).tensor_split(len(w))
        own = torch.stack([torch.isin(head, x) for x in many])[:, None]
        usual = (branch % r, own) if case.heads == "grouped" else (head % r, True)
        kept = lambda i, j, w=w, at=usual: (i % w % r == at[0]) & (j % w % r == at[0]) & at[1]
        rules["dilation offsets"], rules["segments"] = kept, lambda i, j: i // w == j // w
        kept_j, kept_i = ((x % w % r == usual[0]) & usual[1] for x in (j, i))
        instead["dilation offsets"] = {
            "of keys only": kept_j.expand(len(w), 1, h, *i.shape),
            "of queries only": kept_i.expand(len(w), 1, h, *i.shape),
            "by the key/value head": kept(i, j, at=(head // s.e % r, True)),
            "r − 1 − j mod r": kept(i, j, at=((r - 1 - head) % r, True)),
            "none where a segment is as long as the sequence": kept(i, j) | (w >= n),
            "counted from the sequence, not the segment": kept(i, j, w=n),
            "0 for every head": kept(i, j, at=(0, True)),
            "(j div r) mod r for j mod r": kept(i, j, at=(head // r % r, True)),
            "by the branch, not the head": kept(i, j, at=(branch % r, True)),
            "a convention, heads='grouped'": kept(i, j, at=(branch % r, own)),
            "heads unassigned, h no multiple of the branches": kept(i, j, at=(branch % r, head // few == branch)),
            "heads unassigned, h no multiple of the rate": kept(i, j) & (head < h // r * r),
            "the tail that fills no segment is dropped": kept(i, j) & ((j < n // w * w) | (n < w)),
            "a branch whose segment is longer than the sequence is dropped": kept(i, j) & (w <= n),
            **{f"only branch {m} counts": kept(i, j) & (branch == m) for m in range(len(w))},
            **{f"branch {m} is dropped": kept(i, j) & (branch != m) for m in range(len(w))},
        }
        yield "a key seen through several branches counts once", lambda: s.times.clamp(max=1)
    if not case.causal:
        yield "a causal mask though causal is False", lambda: s.times * (j <= i)

    late = n - case.m  # a query's index is its position less this
    views = [("with query and key swapped", j, i), ("by rank instead of position", mine, theirs)]
    views += [(f"off by one (key j taken for j {by:+d})", i, j + by) for by in (1, -1)]
    views += [(f"a token too {text}", i + by, j + by) for text, by in (("late", -1), ("early", 1))]
    frames = [("in local coordinates at every hop", s.loc[0], s.loc[1])]
    if case.queries:
        first = torch.tensor([int(x[0]) if len(x) else 0 for x in case.asks])
        views += [("with the positions of queries taken for those of keys", i, late + first[theirs] + there)]
        views += [("with the queries' positions taken for the keys'", i, late + first[mine] + j)]
        views += [("with queries counted from 0", i - late, j)]
    for layout in LAYOUTS if case.lengths is None and not callable(case.layout) and not case.queries else ():
        at = torch.cat(replace(case, layout=layout).shards)[s.order[1]]
        frames += [(f"as in a {layout} layout", at, at)]
    for text, size in {"n div p": n // p, "the longest shard": max(map(len, case.shards))}.items():
        frames += [
            (f"with rank · {text} for its first position", *(o * size + x for o, x in zip(s.owner, s.loc, strict=True)))
        ]
    for text, a, b in frames:
        a, b = a[:, None].expand_as(i), b.expand_as(i)
        views += [(text, a, b), (f"{text}, queries only", a, j), (f"{text}, keys only", i, b)]
    asked, held = (torch.tensor([len(x) for x in cut]) for cut in (case.asks, case.shards))
    views += [("aligned bottom-right on every rank", here + n - asked[mine], j)]
    if s.even:
        at = torch.stack(case.shards)
        views += [("of the own block at every hop", at[mine, here], at[mine, there])]
        views += [("with ranks counted from the end", at[p - 1 - mine, here], at[p - 1 - theirs, there])]
        for text, a, b in (("as for an earlier block", 1, 0), ("as for a later block", 0, 1)):
            views += [(text, at[a][here], at[b][there])]
        for text, x in {"rank + hop for rank − hop": 2 * mine - theirs, "+1": theirs + 1, "−1": theirs - 1}.items():
            views += [(f"with the wrong source rank for a hop ({text})", i, at[x % p, there])]

    def together(names: Iterable[str], *view: Tensor) -> Tensor:
        return math.prod((rules[name](*view) for name in names), start=torch.ones(1, *s.times.shape).double())

    for name, choices in instead.items():
        for text, rule in choices.items():
            yield f"{name}: {text}", lambda name=name, rule=rule: (together(rules.keys() - {name}, i, j) * rule).sum(0)
    some = itertools.chain(*(itertools.combinations(rules, m + 1) for m in range(1 if deep else len(rules))))
    for names in itertools.chain(some, [("window (left)", "window (right)")] if deep and case.window else ()):
        what, rest = " and ".join(names), rules.keys() - set(names)
        yield f"{what} ignored", lambda rest=rest: together(rest, i, j).sum(0)
        for text, *view in views:
            yield (
                f"{what} {text}",
                lambda names=names, rest=rest, view=view: (together(rest, i, j) * together(names, *view)).sum(0),
            )
    sets = s.places() | {"the last key": j == n - 1} | {f"hops 0 to {t}": s.hop <= t for t in range(1, p - 1)}
    sets |= {f"the block of rank {rank}": theirs == rank for rank in range(p)}
    if p > 1:
        blocks = torch.nn.functional.one_hot(mine[:, 0], p), torch.nn.functional.one_hot(theirs[0], p)
        some = torch.einsum("bhij,ir,jt->rt", (s.times > 0).double(), *map(torch.Tensor.double, blocks))
        corner = (some / (case.b * case.h) <= 1)[mine, theirs]
        sets["blocks of which one pair is seen: a bound that is off by one skips them"] = corner
    for x in TILES:
        sets[f"the keys after the last whole tile of {x}"] = j >= n // x * x
        sets[f"a rank's keys after its last whole tile of {x}"] = there >= held[theirs] // x * x
    if not deep and case.layout == "zigzag" and s.even:
        early = [2 * x < case.n // p for x in (here, there)]
        halves = [{"": True, "the early half of": one, "the late half of": ~one} for one in early]
        for (where, pairs), (a, ours), (b, others) in itertools.product(s.places().items(), *map(dict.items, halves)):
            if a or b:
                who = " for ".join(filter(None, (f"{b} the keys" * bool(b), f"{a} the queries" * bool(a))))
                sets[f"{who} on {where}"] = pairs & ours & others
    for what, pairs in ({} if deep else sets).items():
        if not pairs.any() or pairs.all():
            continue
        hint = "the rest never arrives" if what == "the own block" else "overwritten, not added"
        yield f"without {what}", lambda pairs=pairs: s.times * ~pairs
        yield f"zero but for {what}: {hint}", lambda pairs=pairs: s.times * pairs
        yield f"with {what} counted twice", lambda pairs=pairs: s.times * (1 + pairs.double())


# --------------------------------------------------------------------------------- other ingredients


def ingredients(s: Scene, deep: bool = False) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What a forward or a backward may take for what it should: (sentence, what gives the changed ingredients)."""
    p, n = s.p, s.case.n
    if deep and s.even:
        at = torch.stack(s.case.shards)
        for who, names in {"K and V are": ("K_of", "V_of"), "K is": ("K_of",), "V is": ("V_of",)}.items():
            for text, x in {
                "the rank's own": at[s.mine, s.there],
                "stale, of the hop before": at[(s.theirs + 1) % p, s.there],
                "of the hop after": at[(s.theirs - 1) % p, s.there],
                "of the rank's counterpart from the end": at[p - 1 - s.theirs, s.there],
            }.items():
                yield f"{who} {text}", lambda names=names, x=x: dict.fromkeys(names, x)
    if s.K.shape == s.V.shape:
        for text, names in {
            "K is taken for V": ["V_of"],
            "V is taken for K": ["K_of"],
            "K and V swap": ["K_of", "V_of"],
        }.items():
            yield f"{text}{'' if deep else ', everywhere'}", lambda names=names: dict.fromkeys(names, s.j + n)
    for text, times in sights(s, deep):
        yield text, lambda times=times: {"times": times()}
    d = s.case.d
    for text, scale in {
        "scores are not scaled": 1.0,
        "scores are scaled twice": s.scale**2,
        "scale is ignored: 1/√d": d**-0.5,
        **{f"the scale is that of a head dim padded to {x}": x**-0.5 for x in (8, 16, 32, 64) if x / 2 < d < x},
        "the scale is that of v's head dim": s.V.shape[3] ** -0.5,
        "the scale is that of all heads together: 1/√(h·d)": (s.case.h * d) ** -0.5,
        "scores are taken as base 2 (log2 e missing or doubled)": s.scale * math.log2(math.e),
        "scores are taken as base 2 (ln 2)": s.scale * math.log(2),
    }.items():
        yield text, lambda scale=scale: {"scale": scale}
    if deep:
        return
    for low in (-1e4, -1e3, -100.0):
        yield f"a masked score is {low:g}, not −inf", lambda low=low: {"hidden": torch.tensor(low).double()}
    if s.mod:
        b, h, i, j = s.at
        local = [x.view(y.shape) for x, y in zip(s.loc, (i, j), strict=True)]
        yield "score_mod ignored", lambda: {"mod": None}
        for text, at in {
            "in local coordinates": (b, h, *local), "in local coordinates, queries only": (b, h, local[0], j),
            "in local coordinates, keys only": (b, h, i, local[1]), "of head 0 for all": (b, h * 0, i, j),
            "with query and key swapped": (b, h, j.mT, i.mT),
        }.items():  # fmt: skip
            yield f"score_mod {text}", lambda at=at: {"at": at}
        before = lambda x, *at: s.mod(x / s.scale, *at) * s.scale
        yield "score_mod is applied before the scale", lambda: {"mod": before}
    if s.sink is not None:
        yield "the sink is ignored", lambda: {"sink": None}
        bare = s.forward(sink=None)
        for text, changed in {
            "lse": {"L": bare["lse"][..., None]},
            "out": {"O": bare["out"]},
            "lse and out": {"L": bare["lse"][..., None], "O": bare["out"]},
        }.items():
            yield f"the sink is missing in the saved {text}", lambda changed=changed: changed
        for text, over in {
            "of batch 0 alone": lambda x: x[0].sum(-1),
            "averaged over the batch": lambda x: x.mean(0).sum(-1),
            "averaged over the queries": lambda x: x.sum(0).mean(-1),
        }.items():
            yield f"the sink's gradient is {text}", lambda over=over: {"over": over}
        for text, sink in {
            f"counted {p} times, once a rank": s.sink + math.log(p), "scaled": s.sink * s.scale, "0": s.sink * 0,
            "that of head 0 for all": s.sink[:1].expand_as(s.sink), "counted twice": s.sink + math.log(2),
            "taken by key/value head": s.sink[: s.case.g].repeat_interleave(s.e),
            "taken for heads in another order": s.sink.view(s.e, s.case.g).mT.flatten(),
        }.items():  # fmt: skip
            yield f"the sink is {text}", lambda sink=sink: {"sink": sink}
    pairs = (("K", "V"), ("K",), ("V",))
    if s.e > 1:
        g, head = s.case.g, torch.arange(s.case.h)
        for names, (text, of) in itertools.product(pairs, {"interleaved": head % g, "all 0": head * 0}.items()):
            change = lambda names=names, of=of: {x: getattr(s, x)[:, :, :: s.e][:, :, of] for x in names}
            yield f"key/value heads {text} ({' and '.join(names)})", change
        for names, shape in itertools.product((("q",), ("do",), ("q", "do")), ((s.e, g), (g, s.e))):
            of = head.view(shape).mT.flatten()
            change = lambda names=names, of=of: {x: getattr(s, x)[:, :, of] for x in names}
            yield f"query heads interleaved ({' and '.join(names)})", change
        for text, gather in {
            "only the first query head of a group counts": lambda x: x[:, :, :, 0],
            "the query heads of a group are averaged, not added": lambda x: x.mean(3),
            "query head j adds to j mod g": lambda x: x.flatten(2, 3).unflatten(2, (s.e, g)).sum(2),
        }.items():
            yield text, lambda gather=gather: {"gather": gather}
    on_ranks = s.moved if s.even else lambda x, change: change(x[:, None])[:, 0]
    for text, shape in {"with heads first": (0, 2, 1, 3), "with the head dim first": (0, 3, 1, 2)}.items():
        each = (1, 0, *(x + 1 for x in shape[1:]))  # of a rank's own b s h d
        lain = on_ranks(s.do, lambda y, each=each: y.permute(each).reshape(y.transpose(0, 1).shape).transpose(0, 1))
        yield f"dO is read with other strides than it has ({text})", lambda lain=lain: {"do": lain}
    for names in (*pairs, ("q",), ("do",), ("q", "K", "V")):
        for text, change in places(s):
            moved = lambda names=names, change=change: {x: s.moved(getattr(s, x), change) for x in names}
            yield f"rows of {', '.join(names)} {text}", moved


def places(s: Scene) -> Iterator[tuple[str, Callable]]:
    """Right rows in the wrong place: (sentence, change of a tensor b p s h d)."""
    if not s.even:
        return
    for by in (by for by in range(1 - s.p, s.p) if by):
        yield f"end on the wrong rank: rank r has that of rank r{by:+d}", lambda y, by=by: y.roll(-by, 1)
    yield from {
        "have heads interleaved by rank": lambda y: regroup(y, (s.p, -1)),
        "have heads in rank order for interleaved": lambda y: regroup(y, (-1, s.p)),
        "have heads padded in front, cut at the end": lambda y: pad(y, (0, 0, -y.shape[3] % s.p, -(-y.shape[3] % s.p))),
        "have heads and tokens reshaped, not transposed": lambda y: y.transpose(2, 3).reshape(y.shape),
        "are those of the rank's own heads, reshaped and not sent back (b h s)":
            lambda y: y.permute(0, 3, 1, 2, 4).reshape(len(y), s.p, y.shape[3], y.shape[2], -1).transpose(2, 3),
        "are those of the rank's own heads, reshaped and not sent back (b s h)":
            lambda y: y.flatten(1, 2).unflatten(2, (s.p, -1)).transpose(1, 2).reshape(y.shape),
        "have tokens interleaved by rank": lambda y: y.transpose(1, 2).reshape(y.shape),
        "have tokens in rank order": lambda y: y.reshape(len(y), -1, s.p, *y.shape[3:]).transpose(1, 2),
        "have the batch taken for the ranks": lambda y: y.reshape(s.p, -1, *y.shape[2:]).transpose(0, 1),
        "have the ranks taken for the batch": lambda y: y.transpose(0, 1).reshape(y.shape),
    }.items()  # fmt: skip


def regroup(y: Tensor, heads: tuple[int, int]) -> Tensor:
    """Heads in two groups, exchanged; as they are where the groups do not come out even."""
    return y if y.shape[3] % max(heads) else y.unflatten(3, heads).transpose(3, 4).flatten(3, 4)


def tried(s: Scene, run: Callable, words: str = "{}", places: bool = False) -> Iterator[Guess]:
    """Every ingredient changed everywhere, or in some places only."""
    for text, changed in ingredients(s, places):
        if not places:
            yield words.format(text), lambda changed=changed: run(**changed())
        for where, pairs in s.places().items() if places else ():
            only = lambda changed=changed, pairs=pairs: run(**s.on(pairs, changed()))
            yield words.format(f"{text}, on {where} only"), only


# -------------------------------------------------------------------------------------- the forward


def forwards(s: Scene) -> Iterator[Guess]:
    """Every wrong forward that has a name."""
    for text, change in places(s):
        yield f"rows of out {text}", lambda change=change: {"out": s.moved(s.O, change)}
        yield f"rows of lse {text}", lambda change=change: {"lse": s.moved(rows(s.L), change)[..., 0].transpose(1, 2)}
    yield from tried(s, s.forward)
    yield from merges(s)
    yield "out is divided by lse instead of exp(lse − max)", lambda: {"out": s.O * rows((s.L - s.top).exp() / s.L)}
    yield "out is divided by lse instead of exp(lse)", lambda: {"out": s.O * rows(s.L.exp() / s.L)}
    yield "out is not normalised", lambda: {"out": s.O * rows(s.L.exp())}
    for count in sorted({1, s.case.n // s.p, 2 * s.p, s.p * max(map(len, s.case.shards)) - s.case.n} - {0}):
        lse = torch.logaddexp(s.L, torch.tensor(math.log(count)))
        text = "a zero key is attended: a sum that starts at 1, or padding" if count == 1 else "padding is attended"
        yield text, lambda lse=lse: {"out": s.O * rows((s.L - lse).exp()), "lse": lse}

    here = s.loc[0], torch.tensor([len(x) for x in s.case.asks])[s.owner[0]]
    for x, (whose, (at, size)) in itertools.product(TILES, {"": (s.i[:, 0], s.case.n), "a rank's ": here}.items()):
        done = (at < size // x * x)[:, None, None]
        if done.any() and not done.all():
            yield f"out is zero on {whose}rows after the last whole tile of {x}", lambda done=done: {"out": s.O * done}

    def over_heads() -> dict[str, Tensor]:
        P = (torch.einsum("bqhd,bqkd->bqhk", s.q, s.K) * s.scale).softmax(-1)
        return {"out": torch.einsum("bqhk,bqkd->bqhd", P, s.V)}

    yield "attention over the head axis: a transpose is missing", over_heads
    yield "lse is the maximum, not the log of the sum", lambda: {"lse": s.top}
    yield "lse is the sum, its log is missing", lambda: {"lse": s.L.exp()}
    yield "lse lacks its maximum", lambda: {"lse": s.L - s.top}
    yield "lse is reshaped where it should be transposed", lambda: {"lse": s.L.transpose(1, 2).reshape(s.L.shape)}


# What a running out and lse (a) and those of the next part (b) are multiplied by, and the new lse; n is the right one.
STEPS: dict[str, Callable] = {
    "the running output is not rescaled": lambda a, b, n: (torch.ones_like(n), (b - n).exp(), n),
    "the new output is not rescaled": lambda a, b, n: ((a - n).exp(), torch.ones_like(n), n),
    "running and new output are averaged": lambda a, b, n: (torch.full_like(n, 0.5), torch.full_like(n, 0.5), n),
    "the weights are exp2 of natural differences": lambda a, b, n: ((a - n).exp2(), (b - n).exp2(), n),
    "the running lse is not updated": lambda a, b, n: ((a - n).exp(), (b - n).exp(), a),
    "the running lse becomes the block's": lambda a, b, n: ((a - n).exp(), (b - n).exp(), b),
}


def merges(s: Scene) -> Iterator[Guess]:
    """Right parts, merged wrongly: all at once, or one after the other."""
    for what, parts in s.parts(s.hop, -s.hop % s.p, s.owner[1].expand_as(s.hop)):
        outs, lses, top = s.forward(times=parts, sink=None).values()
        there = lses.isfinite()
        finite = lses.masked_fill(~there, 0.0)
        low, top = (x.masked_fill(~there, -1e30) for x in (lses, top))
        running = top.cummax(0)[0]
        alone, late, right, over = ((low - x).exp() for x in (top, running, running[-1], 2 * running - running[-1]))
        for text, weights in {
            f"the outputs of {what} are averaged": there / there.sum(0),
            f"the outputs of {what} are averaged, empty ones too": there / len(parts),
            f"the outputs of {what} are added": there.double(),
            f"natural lse merged as base 2 ({what})": (low * math.log(2)).softmax(0),
            f"base-2 lse merged as natural ({what})": (low / math.log(2)).softmax(0),
            f"{what} that a query does not see have lse 0 and take weight": finite.softmax(0),
            f"{what} whose lse is 0 are taken for masked": low.masked_fill(low == 0, -1e30).softmax(0),
            f"{what} are merged without rescaling to a common maximum": alone / alone.sum(0),
            f"the running denominator is not rescaled when the maximum grows ({what})": right / late.sum(0),
            f"what runs is rescaled by exp(new − old maximum), upside down ({what})": over / over.sum(0),
            f"the running numerator is not rescaled when the maximum grows ({what})": late / right.sum(0),
        }.items():
            yield text, lambda outs=outs, weights=weights: {"out": (outs * rows(weights.nan_to_num())).sum(0)}
        yield f"lse is that of the last of the {what}", lambda lses=lses: {"lse": lses[-1]}
        yield f"the lse of {what} is added instead of merged", lambda finite=finite: {"lse": finite.sum(0)}
        for (text, step), zero in itertools.product(STEPS.items(), (False, True)):
            yield f"merging {what}: {text}{' (from zero)' * zero}", partial(stepwise, outs, low, step, zero)


def stepwise(outs: Tensor, low: Tensor, step: Callable, zero: bool) -> dict[str, Tensor]:
    """Parts merged one after the other, into the first or into nothing."""
    out, lse = (outs[0] * 0, low[0] * 0 - 1e30) if zero else (outs[0], low[0])
    for o, b in zip(outs[not zero :], low[not zero :], strict=True):
        x, y, lse = step(lse, b, torch.logaddexp(lse, b))
        out = rows(x) * out + rows(y) * o
    return {"out": out.nan_to_num(), "lse": lse}


# ------------------------------------------------------------------------------------- the backward


def backwards(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """Every wrong backward of a right forward that has a name; `about` are the wrong tensors."""
    who = ", ".join(about)
    yield from pieces(s, about, whole)
    yield from tried(s, s.backward, f"in {_among(about)} only: {{}}")
    right = s.backward()
    yield from homes(s, who, right) if s.even else ()
    swap, both = {"dk": "dv", "dv": "dk"}, right["dk"] + (right["dv"] if s.K.shape == s.V.shape else 0)
    for text, change in places(s):
        moved = lambda change=change: {n: s.moved(x, change) for n, x in right.items() if x.ndim == 4}
        yield f"{'rows of ' * (len(about) == 1)}{who} {text}", moved
        sums = lambda change=change: {"dk": both, "dv": s.moved(both, change)}
        yield f"dk is dk + dv of this shard, dv too, but its rows {text}", sums
    yield f"{who}: dk + dv of this shard", lambda: dict.fromkeys(swap, both)
    yield "dk and dv are swapped, or one is taken for both", lambda: {n: right[swap[n]] for n in swap}
    last = s.backward(times=s.times * (s.hop == s.p - 1))
    travels = lambda: {n: right[m] - last[m] + last[n] for n, m in swap.items()}
    yield "dk travels in the place of dv, or dv of dk", travels


def _among(about: list[str]) -> str:
    return "the backward" if set(about) >= set(GRADS) else ", ".join(about)


def somewhere(s: Scene, about: list[str]) -> Iterator[Guess]:
    """One ingredient wrong on some blocks only, or in the forward on some ranks; the backward has lse and D besides."""
    if about[0] not in (*GRADS, "dsink"):
        yield from tried(s, s.forward, places=True)
        first = s.owner[0] == 0
        for text, changed in ingredients(s):
            wrong = functools.cache(lambda changed=changed: s.forward(**changed()))
            for where, at in {"on all ranks but the first": ~first, "on the first rank": first}.items():
                mixed = lambda wrong=wrong, at=at: {
                    "out": torch.where(at[:, None, None], wrong()["out"], s.O),
                    "lse": torch.where(at, wrong()["lse"], s.L),
                }
                yield f"{text}, {where} only", mixed
        return
    yield from tried(s, s.backward, f"in {_among(about)} only: {{}}", places=True)
    L, D = s.L[..., None], row_sums(s.do, s.O)[..., None]
    outs, lses, _ = s.forward(times=torch.stack([s.times * (s.hop == t) for t in range(s.p)])).values()
    hop = s.hop.expand(s.times.shape)
    lse, sums = (x.movedim(0, -1).gather(-1, hop) for x in (lses, row_sums(s.do, outs)))
    weighted = (row_sums(s.do, outs) * (lses - s.L).exp().nan_to_num()).movedim(0, -1).gather(-1, hop)
    for text, name, x in (
        ("the lse is base 2, taken for natural", "L", L * math.log2(math.e)),
        ("the lse is natural, taken for base 2", "L", L * math.log(2)),
        ("the lse of the block is taken for the merged one", "L", lse),
        ("the lse of the own block is taken for the merged one", "L", lses[0][..., None]),
        ("the row sum D is missing", "D", D * 0),
        ("the row sum D is missing, and the gradient of lse with it", "D", s.dlse[..., None]),
        ("the gradient of lse is missing", "D", D + s.dlse[..., None]),
        ("the row sum D has the wrong sign", "D", -D),
        ("the row sum D is that of the block's out", "D", sums),
        ("the row sum D is summed over the block alone", "D", weighted),
    ):
        for where, pairs in s.places().items():
            usual = {"L": L, "D": D}[name]
            only = lambda name=name, x=x, pairs=pairs, usual=usual: s.backward(**{name: torch.where(pairs, x, usual)})
            yield f"in {_among(about)} only: {text}, on {where} only", only


def pieces(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """A backward with another lse or other row sums D = Σ dO·O than the merged ones, as one written per block or per
    branch may have. Gradients are linear in dlse: its factor is read off.
    """
    for what, parts in s.parts(s.hop):
        outs, lses, _ = s.forward(times=parts).values()
        sums, merged, total = row_sums(s.do, outs), s.L.expand_as(lses), (s.L - s.top).exp().nan_to_num()
        Ls = {
            "": merged,
            "a base-2 lse is taken for a natural one in the backward": merged * math.log2(math.e),
            f"the backward uses the lse of {what} for the merged lse": lses,
            f"the backward uses the lse of the last of the {what}": lses[-1:].expand_as(lses),
        }
        Ds = {
            "": row_sums(s.do, s.O).expand_as(sums),
            "softmax's backward lacks the row sum D = Σ dO·O": sums * 0,
            f"the weights that mix the {what} are detached: D = Σ dO·O with the out of each": sums,
            f"D = Σ P·dP is summed over one of the {what} alone": sums * (lses - s.L).exp().nan_to_num(),
            "D = Σ dO·O with out before it is divided by the sum": (row_sums(s.do, s.O) * total).expand_as(sums),
        }
        for (a, L), (b, D) in itertools.product(Ls.items(), Ds.items()):
            if (a and torch.equal(L, merged)) or (b and torch.equal(D, Ds[""])):
                continue  # this part of the sentence would say nothing of the case
            given = {"times": parts, "L": L[..., None], "D": D[..., None]}
            bare, full = (s.backward(**given, dlse=m * s.dlse) for m in (0, 1))
            pull = {n: full[n] - bare[n] for n in full}
            m = _factor([(whole[n] - bare[n], pull[n]) for n in about]) if s.dlse.any() and about != ["dv"] else 1.0
            c = "" if abs(m - 1) < 1e-3 else _off("the gradient of lse", m, s)
            sentence = "; ".join(x for x in (a, b, c) if x)
            yield sentence, lambda bare=bare, pull=pull, m=m: {n: bare[n] + m * pull[n] for n in pull}


def homes(s: Scene, who: str, right: dict[str, Tensor]) -> Iterator[Guess]:
    """dk and dv of a block, which rank r computes at hop t, end elsewhere than on the block's own rank, r − t, or in
    another half of a zigzag shard.
    """
    parts = [s.backward(times=s.times * (s.hop == t)) for t in range(s.p)]

    def home(way: int, hops: Iterable[int]) -> dict[str, Tensor]:
        return {
            n: sum(s.moved(parts[t][n], lambda y, t=t: y.roll(way * s.way * t, 1)) for t in hops) for n in ("dk", "dv")
        }

    yield f"{who} of all hops are summed on the rank that computed them, never sent home", lambda: home(1, range(s.p))
    for t, hop in {s.p - 1: "the last hop", 1: "hop 1"}.items():
        left = f"{who} of {hop} are left on the rank that computed them, not added or sent home"
        yield left, lambda t=t: home(1, [t])
    yield f"{who} travel on instead of back", lambda: home(2, range(s.p))
    for text, by in {"a hop too far": 1, "a hop too few": -1}.items():
        late = lambda by=by: {
            n: parts[0][n] + s.moved(right[n] - parts[0][n], lambda y: y.roll(by * s.way, 1)) for n in ("dk", "dv")
        }
        yield f"{who} of received blocks travel {text}", late
    if s.case.layout == "zigzag":
        other = lambda x: s.moved(x, lambda y: y.roll(y.shape[2] // 2, 2))
        for where, pairs in s.places().items():
            part = s.backward(times=s.times * pairs)
            for names in (["dk", "dv"], ["dk"], ["dv"], ["dq"]):
                moved = lambda part=part, names=names: {
                    n: x + (other(part[n]) - part[n]) * (n in names) for n, x in right.items() if x.ndim == 4
                }
                yield f"{', '.join(names)} of {where} are added to the other half of a shard", moved


# ---------------------------------------------------------------------------------------- the judge


def crossed(s: Scene, truth: Any, others: list) -> Iterator[Guess]:
    """What calls do to each other."""
    for other in others:
        o = Scene(other.case, other)
        saved = lambda o=o: o.backward(do=s.do, dlse=s.dlse)
        yield f"{CALLS} what one forward saved is overwritten by the next", saved
        yield f"{CALLS} it is the other's", lambda other=other: other.whole
        grads = {n: x for n, x in other.whole.items() if n in GRADS}
        for old in (other.whole, grads, o.backward(times=o.times * (o.hop == 0))):
            added = lambda old=old: {n: truth.whole[n] + x for n, x in old.items()}
            yield f"{CALLS} a buffer is not cleared, results add up", added


def _factor(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The m for which got is nearest to m · unit, over pairs of the two."""
    got, unit = (torch.cat([x.flatten() for x in each]).nan_to_num(0, 0, 0) for each in zip(*pairs, strict=True))
    return ((got * unit).sum() / unit.square().sum()).item()


def _off(what: str, factor: float, s: Scene) -> str:
    """What a factor means, by its name if it has one."""
    known = {"1/p": 1 / s.p, "p": s.p, "1/√d": s.scale, "√d": 1 / s.scale, "1/d": s.scale**2, "h/g": s.e}
    known |= {"g/h": 1 / s.e, "ln 2": math.log(2), "log2 e": math.log2(math.e), "2": 2, "1/2": 0.5, "−1": -1}
    near = (text for text, x in known.items() if x != 1 and abs(factor / x - 1) < 1e-3)
    return f"{what} is wrong by a factor {next(near, f'{factor:.3g}')}" if abs(factor) > 1e-3 else f"{what} is zero"


def fits(s: Scene, whole: dict[str, Tensor], about: list[str], truth: Any) -> Iterator[Guess]:
    """A factor, or for lse a constant, that is read off the candidate."""
    factor = {n: _factor([(whole[n], truth.whole[n])]) for n in about}
    sentence = ", ".join(_off(n, m, s) for n, m in factor.items())
    yield sentence, lambda: {n: m * truth.whole[n] for n, m in factor.items()}
    if about == ["lse"]:
        gap = (whole["lse"] - s.L)[s.L.isfinite() & whole["lse"].isfinite()].mean()
        yield f"lse is off by a constant: {_off('its sum', gap.exp().item(), s)}", lambda: {"lse": s.L + gap}
    if about == ["out"]:
        share = (whole["out"] * s.O).sum(-1) / s.O.square().sum(-1)  # of a row, b q h
        for what, total in {"exp(score − max)": s.L - s.top, "exp(score)": s.L}.items():
            total = total.exp().transpose(1, 2)
            eps = ((1 / share - 1) * total).nanmedian()
            text = f"{eps.item():.1g} is added to the sum of {what}"
            yield text, lambda total=total, eps=eps: {"out": s.O * (total / (total + eps))[..., None]}


def name(
    case: Any, truth: Any, got: dict, wrong: list[str], others: list, known: list[str], way=1, deep=True, quickly=False
) -> list[str]:
    """What explains the wrong tensors, the best first; where the error lives, when nothing does. `known` are causes of
    other findings, which are asked first, and `quickly` no others; `deep` looks for what is wrong on some blocks only.
    """
    if quickly and not known:
        return []
    s = Scene(case, truth, way)
    whole = {n: assembled(s, n, pieces) for n, pieces in got.items()}
    about = [n for n in ("out", "lse") if n in wrong][:1] or [n for n in (*GRADS, "dsink") if n in wrong]
    fine = [n for n in ("out", "lse") if n in whole and n not in wrong]  # which a guess must leave so
    small = precision(whole, truth, about)
    if small and case.dtype in ("bfloat16", "float16"):  # a wrong term would have shown in a float32 case before
        return [small]
    left: dict[str, float] = {}

    def ask(guesses: Iterator[Guess], only: Iterable[str] | None = None) -> float:
        for told, guess in safely(guesses):
            if not told or (only is not None and told not in only):
                continue
            try:
                share = {n: _left(whole[n], x, truth.whole[n]) for n, x in guess().items() if n in about + fine}
            except (RuntimeError, IndexError, ValueError, TypeError, KeyError):
                continue  # a mistake that this case has no room for
            if all(n in share for n in about) and all(share.get(n, 0) < 2 for n in fine):
                left[told] = min(max(share[n] for n in about), left.get(told, math.inf))
        return min(left.values(), default=math.inf)

    def usual() -> Iterator[Guess]:
        yield from safely(crossed(s, truth, others))
        yield from safely(backwards(s, about, whole) if about[0] not in ("out", "lse") else forwards(s))
        yield from safely(fits(s, whole, about, truth))

    best = ask(itertools.chain(usual(), safely(somewhere(s, about))), set(known)) if known else math.inf
    if quickly and best > 0.01:
        return []
    if best > 0.01:
        best = ask(usual())
    if best > ENOUGH and deep and s.p > 1 and not small:
        best = ask(somewhere(s, about))
    if best < ENOUGH:
        return [told for told, share in left.items() if share <= best + 0.01]
    near = f"; nearest: {min(left, key=left.__getitem__)} (leaves {best:.0%})" if best < 0.7 else ""
    return [small or f"{UNKNOWN}: {place(s, whole, truth, about[0])}{near}"]


def safely(guesses: Iterator[Guess]) -> Iterator[Guess]:
    """Guesses up to one that cannot be made for this case: naming must never lose a rejection."""
    try:
        yield from guesses
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError):
        return


def _left(got: Tensor, guess: Tensor, truth: Tensor) -> float:
    """The share of the error that a guess leaves; a number that is not finite has to be guessed exactly."""
    got, guess, truth = (x[truth.isfinite()] for x in (got, guess, truth))
    lost = ~(got.isfinite() & guess.isfinite())
    if not torch.equal(got[lost], guess[lost]):
        return math.inf
    rest, error = ((got - x)[~lost].norm().item() for x in (guess, truth))
    return rest / error if error else math.inf if rest else 0.0


def precision(whole: dict[str, Tensor], truth: Any, about: list[str]) -> str | None:
    """A small error everywhere, not a wrong term: bits were lost on the way."""
    pairs = [(whole[n] - truth.whole[n], truth.whole[n], truth.whole[n].isfinite()) for n in about]
    share = max((error[seen].norm() / true[seen].norm()).item() for error, true, seen in pairs)
    # sums that cancel show what they lost many times over; a wrong term leaves heads alone, or has one sign everywhere
    wide = truth.case.dtype in ("float32", "float64")
    if share > (0.3 if truth.case.offset else 0.02) or (wide and any(term(*x) for x in pairs if x[0].ndim == 4)):
        return None
    return f"accumulates in low precision (a relative error of {'1e-3 or more' if share > 1e-3 else 'less than 1e-3'})"


def term(error: Tensor, true: Tensor, seen: Tensor) -> bool:
    """Whether an error b n h d is no noise."""
    error, true = error.masked_fill(~seen, 0.0), true.masked_fill(~seen, 0.0)
    heads, along = error.square().sum((0, 1, 3)), (error * true).sum(-1)
    one_sign = along.sum().abs() > 0.7 * (error.norm(dim=-1) * true.norm(dim=-1)).sum()
    return bool(heads.min() < 1e-4 * heads.max() or one_sign)


def place(s: Scene, whole: dict[str, Tensor], truth: Any, name: str) -> str:
    """Ranks, heads and positions that are wrong, in words."""
    if name == "dsink":
        return "dsink is wrong"
    gap, side = (whole[name] - truth.whole[name]).nan_to_num(0.0, 0.0, 0.0), name in ("dk", "dv")
    size = gap.transpose(1, 2).abs() if name == "lse" else gap.norm(dim=-1)
    bad = size > 0.05 * size.max()
    tokens, heads = bad.any(2).any(0), bad.any(1).any(0)
    which = "every head" if heads.all() else f"heads {_list(heads.nonzero().flatten().tolist())}"
    at = "every position" if tokens.all() else f"local positions {_list(sorted({*s.loc[side][tokens].tolist()}))}"
    return f"{name} is wrong on ranks {_list(sorted({*s.owner[side][tokens].tolist()}))}, {which}, {at}"


def _list(items: list) -> str:
    return ", ".join(map(str, items[:8])) + (", …" if len(items) > 8 else "")
