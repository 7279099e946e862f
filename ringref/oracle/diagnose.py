"""Name the cause: compute in float64 what each famous mistake would give, and see which one the
candidate gave.

A mistake is a small change of one ingredient: which keys count for whom (`sights`), what is scaled,
sent or gathered (`ingredients`), how parts are merged (`merges`), which lse and D the backward uses
(`pieces`), which rank a gradient ends on (`homes`), where rows and heads stand (`places`). A guess is
a sentence and the tensors that the change predicts; the forward and the backward try the same ones.
It is believed when ‖candidate − prediction‖ is a small part of ‖candidate − truth‖. The best wins,
among equals the one listed first; when none is good, the diagnosis says where the error lives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..shard import LAYOUTS

UNKNOWN = "unknown signature"
EARLY = "a receive buffer is read before its wait(): the numbers are right once the oracle leaves the buffer alone"
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
LARGE = "large scores overflow or underflow: exp without the maximum, or a maximum that starts at 0"
BLIND = "the lse of a query that sees nothing is a finite number: a maximum or sum that starts at 0"
VAGUE = (UNKNOWN, "NaN or inf", "it raises")  # what a finding says when it has nothing better
HARMLESS = ("unfinished work", "an input was written to")  # values are worth a look all the same
GRADS = ["dq", "dk", "dv"]

Guess = tuple[str, dict[str, Tensor]]


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
        if op["peer"] is not None and (op["sizes"], op["dtypes"]) != (other["sizes"], other["dtypes"]):
            sent, got = (op, other) if op["kind"] == "send" else (other, op)
            sends, receipt = (f"{end['sizes'][0]} {end['dtypes'][0]}" for end in (sent, got))
            text = f"rank {pair[0]} sends {sends}, rank {pair[1]} receives {receipt} ({got['phase']}, hop {got['hop']})"
            cause = "message of the wrong size" if len(receives) == 1 else "unequal hop counts"
            return [(cause, text, rank, op["line"])]
    return []


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


def not_finite(case: Any) -> str:
    """NaN or inf that the oracle did not plant."""
    if case.shift:
        return LARGE
    if case.mask == "blind" or case.window or case.dilation:
        return "NaN where a query sees no key of a block, or none at all"
    if case.causal and case.p > 1:
        return "NaN where a block of keys is entirely masked"
    return "NaN or inf"


# -------------------------------------------------------------------------------------- the problem


class Scene:
    """One step of a case in float64. Its attributes are the ingredients; `forward` and `backward`
    take others by name.
    """

    def __init__(self, case: Any, truth: Any):
        self.case, self.p, self.times, self.scale = case, case.p, case.times, case.d**-0.5
        data, self.e = (truth.data[n].double() for n in ("q", "k", "v", "do")), case.h // case.g
        self.q, self.K, self.V, self.do = (x.repeat_interleave(case.h // x.shape[2], 2) for x in data)
        self.gather = lambda x: x.sum(3)  # of the query heads of a key/value head, b n g e d
        self.owner, self.loc = torch.zeros(2, case.n, dtype=torch.int64)
        for rank, mine in enumerate(case.shards):
            self.owner[mine], self.loc[mine] = rank, torch.arange(len(mine))
        self.order = torch.cat(case.shards).argsort()
        self.even = len({len(mine) for mine in case.shards}) == 1 and case.p > 1
        self.hop = (self.owner[:, None] - self.owner) % self.p  # at which a query's rank sees a key
        self.O, self.L, self.top = self.forward().values()
        self.dlse = torch.where(self.L.isfinite(), truth.data["dlse"].double(), 0.0)

    def forward(self, **changed: Any) -> dict[str, Tensor]:
        """out, lse and the largest score where some ingredients are changed."""
        x = SimpleNamespace(**(vars(self) | changed))
        S = logits(x)
        lse = S.logsumexp(-1)
        P = (S - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
        return {"out": torch.einsum("...bhqk,bkhd->...bqhd", P, x.V), "lse": lse, "top": S.amax(-1)}

    def backward(self, **changed: Any) -> dict[str, Tensor]:
        """dq, dk, dv of the right forward where some ingredients, or the row sums `D`, are changed;
        summed over parts where `times`, `L` and `D` have them.
        """
        x = SimpleNamespace(**(vars(self) | changed))
        P = (logits(x) - x.L.masked_fill(x.L == -math.inf, math.inf)[..., None]).exp()
        D = changed.get("D", row_sums(x.do, x.O)) - x.dlse
        dS = P * (torch.einsum("bqhd,bkhd->bhqk", x.do, x.V) - D[..., None]) * x.scale
        P, dS = (y.reshape(-1, *y.shape[-4:]).sum(0) for y in (P, dS))
        wide = torch.einsum("bhqk,bqhd->bkhd", dS, x.q), torch.einsum("bhqk,bqhd->bkhd", P, x.do)
        dk, dv = (x.gather(y.unflatten(2, (self.case.g, self.e))) for y in wide)
        return {"dq": torch.einsum("bhqk,bkhd->bqhd", dS, x.K), "dk": dk, "dv": dv}

    def parts(self, *orders: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is merged, as multiplicities in the order of merging: blocks, a dilation's branches."""
        for order in orders:
            yield "blocks", torch.stack([self.times * (order == t) for t in range(self.p)])
        if self.case.dilation and len(self.case.dilation[0]) > 1:
            each = zip(*self.case.dilation, strict=True)
            yield "branches", torch.stack([replace(self.case, dilation=((w,), (r,))).times for w, r in each])

    def moved(self, x: Tensor, change: Callable) -> Tensor:
        """A tensor b n h d, changed in the shape b p s h d in which the ranks hold it."""
        return change(x[:, torch.stack(self.case.shards)]).flatten(1, 2)[:, self.order]


def logits(x: Any) -> Tensor:
    """Scores plus the log of how often each pair counts."""
    return torch.einsum("bqhd,bkhd->bhqk", x.q, x.K) * x.scale + x.times.log()


def row_sums(do: Tensor, out: Tensor) -> Tensor:
    return (do * out).sum(-1).transpose(-1, -2)


def rows(x: Tensor) -> Tensor:
    """b h q as a factor of b q h d."""
    return x.transpose(-1, -2)[..., None]


# ----------------------------------------------------------------------------------- who sees whom


def sights(s: Scene) -> Iterator[tuple[str, Tensor]]:
    """Who sees whom, got wrong: (sentence, multiplicities). Right is the product of a few rules about
    a query's and a key's position (m b h q k, m branches), summed over the branches. A rule is
    ignored, or replaced, or asked in a wrong view of the positions, everywhere or on some blocks.
    """
    case, n, p = s.case, s.case.n, s.p
    i, j = torch.arange(n)[:, None].expand(n, n), torch.arange(n).expand(n, n)
    mine, theirs, here, there = s.owner[i], s.owner[j], s.loc[i], s.loc[j]
    rules: dict[str, Callable] = {}
    instead: dict[str, dict[str, Tensor]] = {}  # what stands in for a rule
    if case.causal:
        rules["causal mask"] = lambda i, j: j <= i
    if case.window:
        left, right = case.window
        rules["window (left)"], rules["window (right)"] = lambda i, j: i - j <= left, lambda i, j: j - i <= right
        instead["window (right)"] = {"taken as left": j - i <= left, "taken as 0": j <= i}
    if case.mask:
        seen = replace(case, causal=False, window=None).times
        rules["mask_mod"] = lambda i, j: seen[..., i.clamp(0, n - 1), j.clamp(0, n - 1)]
        instead["mask_mod"] = {"inverted": 1 - seen, "of head 0 for all": seen[:, :1], "of batch 0 for all": seen[:1]}
    if case.dilation:
        (w, r), h = (torch.tensor(x)[:, None, None, None, None] for x in case.dilation), case.h
        branch, head = torch.arange(len(w))[:, None, None, None, None], torch.arange(h)[:, None, None]
        few, many = h // len(w) or 1, torch.arange(h).tensor_split(len(w))
        own = torch.stack([torch.isin(head, x) for x in many])[:, None]
        usual = (branch % r, own) if case.heads == "grouped" else (head % r, True)
        kept = lambda i, j, w=w, at=usual: (i % w % r == at[0]) & (j % w % r == at[0]) & at[1]
        rules["dilation offsets"], rules["segments"] = kept, lambda i, j: i // w == j // w
        instead["dilation offsets"] = {
            "counted from the sequence, not the segment": kept(i, j, w=n),
            "0 for every head": kept(i, j, at=(0, True)),
            "(j div r) mod r for j mod r": kept(i, j, at=(head // r % r, True)),
            "by the branch, not the head": kept(i, j, at=(branch % r, True)),
            "a convention, heads='grouped'": kept(i, j, at=(branch % r, own)),
            "heads unassigned, h no multiple of the branches": kept(i, j, at=(branch % r, head // few == branch)),
            "heads unassigned, h no multiple of the rate": kept(i, j) & (head < h // r * r),
            "the tail that fills no segment is dropped": kept(i, j) & ((j < n // w * w) | (n < w)),
            **{f"branch {m} is dropped": kept(i, j) & (branch != m) for m in range(len(w))},
            **{f"only branch {m} counts": kept(i, j) & (branch == m) for m in range(len(w))},
        }
        yield "a key seen through several branches counts once", s.times.clamp(max=1)
    if not case.causal:
        yield "a causal mask though causal is False", s.times * (j <= i)

    views = [("with query and key swapped", j, i), ("by rank instead of position", mine, theirs)]
    views += [(f"off by one (key j taken for j {by:+d})", i, j + by) for by in (1, -1)]
    frames = [("in local coordinates at every hop", s.loc)]
    for layout in LAYOUTS if case.lengths is None else ():
        frames += [(f"as in a {layout} layout", torch.cat(replace(case, layout=layout).shards)[s.order])]
    for text, at in frames:
        views += [(text, at[i], at[j]), (f"{text}, queries only", at[i], j), (f"{text}, keys only", i, at[j])]
    if s.even:
        at = torch.stack(case.shards)
        for text, a, b in (("as for an earlier block", 1, 0), ("as for a later block", 0, 1)):
            views += [(text, at[a][here], at[b][there])]
        for text, x in {"rank + hop for rank − hop": 2 * mine - theirs, "+1": theirs + 1, "−1": theirs - 1}.items():
            views += [(f"with the wrong source rank for a hop ({text})", i, at[x % p, there])]
    blocks = [("the own block", s.hop == 0), ("received blocks", s.hop > 0), ("hops after 1", s.hop > 1)]
    blocks += [("blocks of earlier ranks", theirs < mine), ("blocks of later ranks", theirs > mine)]

    def together(names: Iterable[str], *view: Tensor) -> Tensor:
        return math.prod((rules[name](*view) for name in names), start=torch.ones(1, *s.times.shape).double())

    for name, choices in instead.items():
        rest = together(rules.keys() - {name}, i, j)
        yield from ((f"{name}: {text}", (rest * rule).sum(0)) for text, rule in choices.items())
    for names in itertools.chain(*(itertools.combinations(rules, m + 1) for m in range(len(rules)))):
        what, rest = " and ".join(names), together(rules.keys() - names, i, j)
        for text, *view in [("ignored",), *views]:
            wrong = (rest * together(names, *view) if view else rest).sum(0)
            yield f"{what} {text}", wrong
            for where, pairs in blocks if names == ("causal mask",) or not view else ():
                yield f"{what} {text}, on {where} only", torch.where(pairs, wrong, s.times)

    sets = blocks + [("the last key", j == n - 1)] + [("the last hop", s.hop == t) for t in (p - 1, 1)]
    sets += [(f"hop {t}", s.hop == t) for t in range(1, p)] + [(f"hops 0 to {t}", s.hop <= t) for t in range(1, p - 1)]
    sets += [(f"the block of rank {rank}", theirs == rank) for rank in range(p)]
    for what, pairs in sets:
        hint = "the rest never arrives" if what == "the own block" else "overwritten, not added"
        yield f"without {what}", s.times * ~pairs
        yield f"zero but for {what}: {hint}", s.times * pairs
        yield f"with {what} counted twice", s.times * (1 + pairs.double())


# --------------------------------------------------------------------------------- other ingredients


def ingredients(s: Scene) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a forward or a backward may take for what it should: (sentence, changed ingredients)."""
    for text, times in sights(s):
        if times.any() and not torch.equal(times, s.times):
            yield text, {"times": times}
    yield "scores are not scaled", {"scale": 1.0}
    yield "scores are scaled twice", {"scale": s.scale**2}
    for text, factor in (("log2 e missing or doubled", math.log2(math.e)), ("ln 2", math.log(2))):
        yield f"scores are taken as base 2 ({text})", {"scale": s.scale * factor}
    pairs = (("K", "V"), ("K",), ("V",))
    if s.e > 1:
        g, head = s.case.g, torch.arange(s.case.h)
        for names, (text, of) in itertools.product(pairs, {"interleaved": head % g, "all 0": head * 0}.items()):
            text = f"key/value heads {text} ({' and '.join(names)})"
            yield text, {n: getattr(s, n)[:, :, :: s.e][:, :, of] for n in names}
        yield "only the first query head of a group counts", {"gather": lambda x: x[:, :, :, 0]}
        yield "the query heads of a group are averaged, not added", {"gather": lambda x: x.mean(3)}
        yield "query head j adds to j mod g", {"gather": lambda x: x.flatten(2, 3).unflatten(2, (s.e, g)).sum(2)}
    for names in (*pairs, ("q",), ("do",), ("q", "K", "V")):
        for text, change in places(s):
            yield f"rows of {', '.join(names)} {text}", {n: s.moved(getattr(s, n), change) for n in names}


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
        "have tokens interleaved by rank": lambda y: y.transpose(1, 2).reshape(y.shape),
        "have tokens in rank order": lambda y: y.reshape(len(y), -1, s.p, *y.shape[3:]).transpose(1, 2),
        "have the batch taken for the ranks": lambda y: y.reshape(s.p, -1, *y.shape[2:]).transpose(0, 1),
        "have the ranks taken for the batch": lambda y: y.transpose(0, 1).reshape(y.shape),
    }.items()


def regroup(y: Tensor, heads: tuple[int, int]) -> Tensor:
    """Heads in two groups, exchanged; as they are where the groups do not come out even."""
    return y if y.shape[3] % max(heads) else y.unflatten(3, heads).transpose(3, 4).flatten(3, 4)


# -------------------------------------------------------------------------------------- the forward


def forwards(s: Scene) -> Iterator[Guess]:
    """Every wrong forward that has a name."""
    for text, change in places(s):
        yield f"rows of out {text}", {"out": s.moved(s.O, change)}
    for text, changed in ingredients(s):
        yield text, s.forward(**changed)
    yield from merges(s)
    own = s.hop == 0
    split = {"times": torch.cat([s.times * own, s.times * ~own], -1)}  # keys as they are, and as they are received
    for text, (K, V) in {
        "K is taken for V": (s.K, s.K),
        "V is taken for K": (s.V, s.V),
        "K and V swap": (s.V, s.K),
    }.items():
        yield f"{text}, everywhere", s.forward(K=K, V=V)
        received = {"K": torch.cat([s.K, K], 1), "V": torch.cat([s.V, V], 1)}
        yield f"{text}, in received blocks", s.forward(**split, **received)
    yield "out is divided by lse instead of exp(lse − max)", {"out": s.O * rows((s.L - s.top).exp() / s.L)}
    yield "out is divided by lse instead of exp(lse)", {"out": s.O * rows(s.L.exp() / s.L)}
    yield "out is not normalised", {"out": s.O * rows(s.L.exp())}
    for count in sorted({1, s.case.n // s.p, 2 * s.p, s.p * max(map(len, s.case.shards)) - s.case.n} - {0}):
        lse = torch.logaddexp(s.L, torch.tensor(math.log(count)))
        text = "a zero key is attended: a sum that starts at 1, or padding" if count == 1 else "padding is attended"
        yield text, {"out": s.O * rows((s.L - lse).exp()), "lse": lse}
    P = (torch.einsum("bqhd,bqkd->bqhk", s.q, s.K) * s.scale).softmax(-1)
    yield "attention over the head axis: a transpose is missing", {"out": torch.einsum("bqhk,bqkd->bqhd", P, s.V)}
    yield "lse is the maximum, not the log of the sum", {"lse": s.top}
    yield "lse is the sum, its log is missing", {"lse": s.L.exp()}
    yield "lse lacks its maximum", {"lse": s.L - s.top}
    yield "lse is reshaped where it should be transposed", {"lse": s.L.transpose(1, 2).reshape(s.L.shape)}


# What a running out and lse (a) and those of the next part (b) are multiplied by, and the new lse;
# n is the right one.
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
    for what, parts in s.parts(s.hop, -s.hop % s.p, s.owner.expand_as(s.hop)):
        outs, lses, top = s.forward(times=parts).values()
        there = lses.isfinite()
        finite = lses.masked_fill(~there, 0.0)
        low, top = (x.masked_fill(~there, -1e30) for x in (lses, top))
        running = top.cummax(0)[0]
        alone, late, right = ((low - x).exp() for x in (top, running, running[-1]))
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
            f"the running numerator is not rescaled when the maximum grows ({what})": late / right.sum(0),
        }.items():
            yield text, {"out": (outs * rows(weights.nan_to_num())).sum(0)}
        yield f"lse is that of the last of the {what}", {"lse": lses[-1]}
        yield f"the lse of {what} is added instead of merged", {"lse": finite.sum(0)}
        for (text, step), zero in itertools.product(STEPS.items(), (False, True)):
            out, lse = (outs[0] * 0, low[0] * 0 - 1e30) if zero else (outs[0], low[0])
            for o, b in zip(outs[not zero :], low[not zero :], strict=True):
                x, y, lse = step(lse, b, torch.logaddexp(lse, b))
                out = rows(x) * out + rows(y) * o
            yield f"merging {what}: {text}{' (from zero)' * zero}", {"out": out.nan_to_num(), "lse": lse}


# ------------------------------------------------------------------------------------- the backward


def backwards(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """Every wrong backward of a right forward that has a name; `about` are the wrong tensors."""
    right, who = s.backward(), ", ".join(about)
    yield from pieces(s, about, whole)
    for text, changed in ingredients(s):
        yield f"in {'the backward' if about == GRADS else who} only: {text}", s.backward(**changed)
    yield from homes(s, who) if s.even else ()
    swap, both = {"dk": "dv", "dv": "dk"}, right["dk"] + right["dv"]
    for text, change in places(s):
        yield f"{'rows of ' * (len(about) == 1)}{who} {text}", {n: s.moved(x, change) for n, x in right.items()}
        yield f"dk is dk + dv of this shard, dv too, but its rows {text}", {"dk": both, "dv": s.moved(both, change)}
    yield f"{who}: dk + dv of this shard", dict.fromkeys(swap, both)
    yield "dk and dv are swapped, or one is taken for both", {n: right[swap[n]] for n in swap}
    last = s.backward(times=s.times * (s.hop == s.p - 1))
    yield "dk travels in the place of dv, or dv of dk", {n: right[m] - last[m] + last[n] for n, m in swap.items()}


def pieces(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """A backward with another lse or other row sums D = Σ dO·O than the merged ones, as one written
    per block or per branch may have. Gradients are linear in dlse: its factor is read off.
    """
    for what, parts in s.parts(s.hop):
        outs, lses, _ = s.forward(times=parts).values()
        sums, merged = row_sums(s.do, outs), s.L.expand_as(lses)
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
        }
        for (a, L), (b, D) in itertools.product(Ls.items(), Ds.items()):
            bare, full = (s.backward(times=parts, L=L, D=D, dlse=m * s.dlse) for m in (0, 1))
            pull = {n: full[n] - bare[n] for n in full}
            m = _factor([(whole[n] - bare[n], pull[n]) for n in about]) if s.dlse.any() and about != ["dv"] else 1.0
            c = "" if abs(m - 1) < 1e-3 else _off("the gradient of lse", m, s)
            yield "; ".join(x for x in (a, b, c) if x), {n: bare[n] + m * pull[n] for n in pull}


def homes(s: Scene, who: str) -> Iterator[Guess]:
    """dk and dv of a block, which rank r computes at hop t, end elsewhere than on the block's own
    rank, r − t.
    """
    parts = [s.backward(times=s.times * (s.hop == t)) for t in range(s.p)]

    def home(way: int, hops: Iterable[int]) -> dict[str, Tensor]:
        return {n: sum(s.moved(parts[t][n], lambda y, t=t: y.roll(way * t, 1)) for t in hops) for n in ("dk", "dv")}

    yield f"{who} of all hops are summed on the rank that computed them, never sent home", home(1, range(s.p))
    for t in (s.p - 1, 1):
        yield f"{who} of the last hop are left on the rank that computed them, not added or sent home", home(1, [t])
    yield f"{who} travel on instead of back", home(2, range(s.p))


# ---------------------------------------------------------------------------------------- the judge


def crossed(s: Scene, truth: Any, others: list) -> Iterator[Guess]:
    """What calls do to each other."""
    calls = "a call's result depends on another call:"
    for other in others:
        o = Scene(s.case, other)
        yield f"{calls} what one forward saved is overwritten by the next", o.backward(do=s.do, dlse=s.dlse)
        yield f"{calls} it is the other's", other.whole
        for old in (other.whole, o.backward(times=o.times * (o.hop == 0))):
            yield f"{calls} a buffer is not cleared, results add up", {n: truth.whole[n] + x for n, x in old.items()}


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
    yield ", ".join(_off(n, m, s) for n, m in factor.items()), {n: m * truth.whole[n] for n, m in factor.items()}
    if about == ["lse"]:
        gap = (whole["lse"] - s.L)[s.L.isfinite() & whole["lse"].isfinite()].mean()
        yield f"lse is off by a constant: {_off('its sum', gap.exp().item(), s)}", {"lse": s.L + gap}


def name(case: Any, truth: Any, got: dict[str, list[Tensor]], wrong: list[str], others: list) -> list[str]:
    """What explains the wrong tensors, the best first; where the error lives, when nothing does."""
    s = Scene(case, truth)
    whole = {n: torch.cat([x.double() for x in pieces], 1 + (n == "lse")) for n, pieces in got.items()}
    whole = {n: x.masked_fill(x < -1e30, -math.inf).index_select(1 + (n == "lse"), s.order) for n, x in whole.items()}
    about = [n for n in ("out", "lse") if n in wrong][:1] or [n for n in GRADS if n in wrong]
    fine = [n for n in ("out", "lse") if n in whole and n not in wrong]  # which a guess must leave so
    small = precision(whole, truth, about)
    if small and case.dtype == "bfloat16":  # a wrong term would have shown in a float32 case before
        return [small]
    guesses = backwards(s, about, whole) if about[0] in GRADS else forwards(s)
    left: dict[str, float] = {}
    for told, guess in itertools.chain(crossed(s, truth, others), guesses, fits(s, whole, about, truth)):
        share = {n: _left(whole[n], x, truth.whole[n]) for n, x in guess.items() if n in about + fine}
        if told and all(n in share for n in about) and all(share.get(n, 0) < 2 for n in fine):
            left[told] = min(max(share[n] for n in about), left.get(told, math.inf))
    best = min(left.values(), default=math.inf)
    if best < ENOUGH:
        return [told for told, share in left.items() if share <= best + 0.01]
    return [small or f"{UNKNOWN}: {place(s, whole, truth, about[0])}"]


def _left(got: Tensor, guess: Tensor, truth: Tensor) -> float:
    """The share of the error that a guess leaves; a number that is not finite has to be guessed
    exactly.
    """
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
    if share > (0.3 if truth.case.offset else 0.02):  # sums that cancel show what they lost many times over
        return None
    return f"accumulates in low precision (a relative error of {'1e-3 or more' if share > 1e-3 else 'less than 1e-3'})"


def place(s: Scene, whole: dict[str, Tensor], truth: Any, name: str) -> str:
    """Ranks, heads and positions that are wrong, in words."""
    gap = (whole[name] - truth.whole[name]).nan_to_num(0.0, 0.0, 0.0)
    size = gap.transpose(1, 2).abs() if name == "lse" else gap.norm(dim=-1)
    bad = size > 0.05 * size.max()
    tokens, heads = bad.any(2).any(0), bad.any(1).any(0)
    which = "every head" if heads.all() else f"heads {_list(heads.nonzero().flatten().tolist())}"
    at = "every position" if tokens.all() else f"local positions {_list(sorted({*s.loc[tokens].tolist()}))}"
    return f"{name} is wrong on ranks {_list(sorted({*s.owner[tokens].tolist()}))}, {which}, {at}"


def _list(items: list) -> str:
    return ", ".join(map(str, items[:8])) + (", …" if len(items) > 8 else "")
