"""Name the cause: compute in float64 what each famous mistake would give, and see which one the
candidate gave.

A hypothesis is a sentence and a prediction for some tensors. It is believed when it explains the
error, that is when ‖candidate − prediction‖ is a small part of ‖candidate − truth‖. The best one
wins; when none is good, the diagnosis says where the error lives instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .layout import LAYOUTS

UNKNOWN = "unknown signature"
EARLY = "a receive buffer is read before its wait(): the numbers are right once the oracle leaves the buffer alone"
ENOUGH = 0.05  # a hypothesis may leave this share of the error unexplained
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

Guess = tuple[str, dict[str, Tensor]]


# -------------------------------------------------------------------------------------------------
# messages and hangs


def mismatched(results: dict[int, dict]) -> list[tuple[str, str, int, Any]]:
    """Messages whose two ends disagree about size or dtype, and collectives whose ranks do: (cause,
    text, rank, line).
    """
    ends, found = {}, []
    for rank, r in results.items():
        for op in r.get("ops", ()):
            if op["peer"] is None:
                key = (op["group"], tuple(op["members"]), op["seq"])
                first = ends.setdefault(key, (rank, op))
                if first[1]["kind"] != op["kind"]:
                    text = f"rank {first[0]} is in {first[1]['kind']}, rank {rank} in {op['kind']}"
                    found.append(("collectives differ", text, rank, op["line"]))
                continue
            pair = (rank, op["peer"]) if op["kind"] == "send" else (op["peer"], rank)
            key = (op["group"], *pair, op["tag"], op["seq"])
            if key not in ends:
                ends[key] = (rank, op)
                continue
            other = ends[key][1]
            if (op["sizes"], op["dtypes"]) != (other["sizes"], other["dtypes"]):
                sent, got = (op, other) if op["kind"] == "send" else (other, op)
                text = (
                    f"rank {pair[0]} sends {sent['sizes'][0]} {sent['dtypes'][0]}, "
                    f"rank {pair[1]} receives {got['sizes'][0]} {got['dtypes'][0]} "
                    f"({got['phase']}, hop {got['hop']})"
                )
                counts = {len([o for o in r.get("ops", ()) if o["kind"] == "recv"]) for r in results.values()}
                cause = "message of the wrong size" if len(counts) == 1 else "unequal hop counts"
                found.append((cause, text, rank, op["line"]))
    return found[:1]


def crash(error: dict) -> tuple[str, str]:
    """What an exception says: (cause where it is known, text)."""
    text = error["text"].splitlines()[0] if error["text"] else ""
    told = f"{error['type']}: {text}"[:200]
    if "not part of group" in text or "is not in group" in text:
        return GROUP, told
    if "which is this rank" in text or "same as the rank of the current process" in text:
        return "self-send", told
    if "does not require grad" in text:
        return "no gradient reaches the inputs", told
    return f"it raises {error['type']}", text[:200]


def hang(case: Any, results: dict[int, dict]) -> tuple[str, str, int, Any]:
    """Who waits for what: (cause, text, rank, line)."""
    stuck = {rank: r for rank, r in results.items() if "hang" in r}
    waits = {rank: r["waiting"] for rank, r in stuck.items() if r["waiting"]}
    if not waits:
        rank, r = next(iter(stuck.items()))
        return ("no answer", f"after {r['hang']:.0f} s, and not waiting for a message", rank, r["line"])
    rank, op = next(iter(waits.items()))
    line, at = op["line"] or stuck[rank]["line"], f"{op['phase']}, hop {op['hop']}"
    used = {tuple(op["members"]) for r in results.values() for op in r.get("ops", ())}
    text = (
        f"rank {rank} waits in {op['kind']}" + ("" if op["peer"] is None else f" with rank {op['peer']}") + f" ({at})"
    )
    if case.groups and any(list(m) not in case.teams for m in used):
        return GROUP, text, rank, line
    posts = {
        r: tuple(sum(o["kind"] == kind for o in f.get("ops", ())) for kind in ("send", "recv"))
        for r, f in results.items()
    }
    if op["peer"] is None and len(set(posts.values())) == 1:
        inside = [r for r, w in waits.items() if w["peer"] is None]
        return (
            "deadlock",
            f"ranks {_list(inside)} wait in {op['kind']} ({at}), which the others never enter",
            rank,
            line,
        )
    if len(waits) > 1 and all(w["kind"] == "send" for w in waits.values()):
        return "deadlock: every rank sends before it receives", text, rank, line
    if len(set(posts.values())) > 1 or any(a != b for a, b in posts.values()):
        told = ", ".join(f"rank {r} {a}/{b}" for r, (a, b) in posts.items())
        return "unequal hop counts", f"{text}; posted sends/receives: {told}", rank, line
    return "deadlock", text, rank, line


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
    """One step of a case in float64, ready to be got wrong."""

    def __init__(self, case: Any, truth: Any):
        self.case, self.p, data = case, case.p, truth.data
        self.q, self.k, self.v, self.do = (data[name].double() for name in ("q", "k", "v", "do"))
        self.e = case.h // case.g
        self.K, self.V = (x.repeat_interleave(self.e, 2) for x in (self.k, self.v))
        self.times, self.scale = case.times, case.d**-0.5
        self.unmasked = replace(case, causal=False).times if case.causal else case.times
        self.S = self.scores(self.K)
        self.owner, self.loc = (torch.zeros(case.n, dtype=torch.int64), torch.zeros(case.n, dtype=torch.int64))
        for rank, mine in enumerate(case.shards):
            self.owner[mine], self.loc[mine] = rank, torch.arange(len(mine))
        self.lengths = [len(s) for s in case.shards]
        self.even = len(set(self.lengths)) == 1
        self.hop = (self.owner[:, None] - self.owner[None, :]) % self.p
        self.same = self.hop == 0
        self.P, self.O, self.L = attend(self.S, self.times, self.V)
        self.dlse = torch.where(self.L.isfinite(), data["dlse"].double(), 0.0)

    def scores(self, K: Tensor) -> Tensor:
        return torch.einsum("bqhd,bkhd->bhqk", self.q, K) * self.scale

    def hops(self) -> list[Tensor]:
        """The key sets of each hop, as seen by each query."""
        return [self.hop == t for t in range(self.p)]

    def branches(self) -> list[Tensor]:
        """The key sets of each branch of a dilation."""
        w, r = self.case.dilation
        return [replace(self.case, dilation=((wi,), (ri,))).times for wi, ri in zip(w, r, strict=True)]

    def rolled(self, x: Tensor, by: int) -> Tensor:
        """A rank's rows of `x` replaced by those of the rank `by` further on."""
        out = x.clone()
        for rank, mine in enumerate(self.case.shards):
            out[:, mine] = x[:, self.case.shards[(rank + by) % self.p]]
        return out

    def at(self, owner: Tensor) -> Tensor:
        """The global position of each key, were its block that of rank `owner[i, j]`."""
        table = torch.stack(self.case.shards)
        return table[owner % self.p, self.loc[None, :].expand_as(owner)]

    def heads(self, x: Tensor) -> Tensor:
        """Sum the gradient of the repeated key/value heads."""
        return x.unflatten(2, (self.case.g, self.e)).sum(3)


def attend(S: Tensor, times: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, out and lse of scores S where each key counts `times`."""
    logits = S + times.double().log()
    L = logits.logsumexp(-1)
    P = torch.where(L[..., None] == -math.inf, 0.0, (logits - L.masked_fill(L == -math.inf, 0.0)[..., None]).exp())
    return P, torch.einsum("bhqk,bkhd->bqhd", P, V), L


# ---------------------------------------------------------------------------------- forward guesses


def masks(s: Scene) -> Iterator[tuple[str, Tensor]]:
    """Who sees whom, got wrong: (sentence, times)."""
    case, n = s.case, s.case.n
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    square = torch.ones(n, n, dtype=torch.int64)
    causal = (j <= i) if case.causal else square.bool()
    kinds = [("mask_mod", case.mask), ("window", case.window), ("dilation", case.dilation)]
    what = " and ".join(name for name, there in kinds if there)
    maps: list[tuple[str, Tensor, Tensor]] = [
        ("in local coordinates at every hop", s.loc[:, None] * square, s.loc[None] * square),
        ("with the queries in local coordinates", s.loc[:, None] * square, j * square),
        ("with the keys in local coordinates", i * square, s.loc[None] * square),
    ]
    if s.even and s.p > 1:
        me, src = s.owner[:, None] * square, s.owner[None] * square
        for text, owner in (
            ("with the wrong source rank for a hop (rank + hop for rank − hop)", 2 * me - src),
            ("with the wrong source rank for a hop (one too far)", src - 1),
            ("with the wrong source rank for a hop (one too near)", src + 1),
            ("with the hop number taken for the source rank", me - src),
        ):
            maps.append((text, i * square, s.at(owner)))
    for layout in LAYOUTS:
        if case.lengths is None and layout != case.layout:
            assumed = torch.zeros(n, dtype=torch.int64)
            for mine, theirs in zip(case.shards, replace(case, layout=layout).shards, strict=True):
                assumed[mine] = theirs
            maps.append((f"for a {layout} layout", assumed[:, None] * square, assumed[None] * square))
            maps.append((f"with keys as in a {layout} layout", i * square, assumed[None] * square))
            maps.append((f"with queries as in a {layout} layout", assumed[:, None] * square, j * square))
    for text, qi, kj in maps:
        moved = s.unmasked[:, :, qi, kj] if what else s.unmasked
        if case.causal:
            yield f"causal mask {text}", s.unmasked * (kj <= qi)
        if what:
            yield f"{what} {text}", moved * causal
            if case.causal:
                yield f"causal mask and {what} {text}", moved * (kj <= qi)
    if case.causal:
        mine, theirs = s.owner[:, None], s.owner[None]
        for text, rule in (
            ("no causal mask", square.bool()),
            ("causal mask is strict: a query does not see itself", j < i),
            ("causal mask is one too wide: a query sees the next token", j <= i + 1),
            ("causal mask is reversed", j >= i),
            ("causal mask only between blocks, none on the diagonal block", theirs <= mine),
            ("causal mask only on the own block; later blocks are seen", ~s.same | (j <= i)),
            ("blocks of later ranks are skipped whole, earlier ones seen whole",
             (theirs < mine) | (s.same & (j <= i))),
            ("blocks of later ranks are skipped, earlier ones masked locally",
             (theirs < mine) & (s.loc[None] <= s.loc[:, None]) | (s.same & (j <= i))),
            ("the diagonal block is strict, the others are right", (j <= i) & (~s.same | (j < i))),
            ("keys of the own block only under causal", s.same & (j <= i)),
        ):  # fmt: skip
            yield text, s.unmasked * rule
    if case.causal and case.layout == "zigzag" and s.even:
        half = case.n // s.p // 2
        early, late = (s.loc[None] < half) & square.bool(), (s.loc[:, None] >= half) & square.bool()
        right, mine, theirs = j <= i, s.owner[:, None], s.owner[None]
        for text, where_, rule in (
            ("blocks of earlier ranks are masked like those of later ones", theirs < mine, late),
            ("blocks of later ranks are masked like those of earlier ones", theirs > mine, early),
            (
                "blocks of earlier ranks are masked like those of later ones, after hop 1",
                (theirs < mine) & (s.hop > 1),
                late,
            ),
            (
                "blocks of later ranks are masked like those of earlier ones, after hop 1",
                (theirs > mine) & (s.hop > 1),
                early,
            ),
        ):
            yield f"causal mask: {text}", s.unmasked * torch.where(where_, rule, right)
    if what:
        bare = replace(case, mask=None, window=None, dilation=None)
        yield f"{what} is ignored", bare.times
        if case.causal:
            yield f"{what} replaces the causal mask", s.unmasked
        yield f"{what} only on the own block", torch.where(s.same, s.times, bare.times)
        yield f"{what} at (kv, q) for (q, kv)", s.unmasked.transpose(2, 3) * causal
    if case.mask:
        yield "mask_mod inverted", (1 - s.unmasked).clamp(0) * causal
        yield "mask_mod of head 0 for every head", s.unmasked[:, :1].expand_as(s.times) * causal
        yield "mask_mod of batch 0 for the whole batch", s.unmasked[:1].expand_as(s.times) * causal
    if case.window:
        left, right = case.window
        far, near = s.loc[:, None] - s.loc[None] <= left, s.loc[None] - s.loc[:, None] <= right
        yield ("window per block: its left edge in local coordinates", replace(case, window=(n, right)).times * far)
        yield ("window per block: its right edge in local coordinates", replace(case, window=(left, n)).times * near)
        for text, window in (
            ("window one too narrow on the left", (left - 1, right)),
            ("window one too wide on the left", (left + 1, right)),
            ("window one too narrow on the right", (left, right - 1)),
            ("window one too wide on the right", (left, right + 1)),
            ("window's right side ignored", (left, n)),
            ("window's left side ignored", (n, right)),
            ("window's sides swapped", (right, left)),
            ("window taken as symmetric", (left, left)),
            ("window's right side taken as 0", (left, 0)),
        ):
            yield text, replace(case, window=window).times
    if case.dilation:
        yield from dilations(s, causal)
    for t in range(1, s.p):
        for name in (f"hop {t}", "the last hop")[: 1 + (t == s.p - 1)]:
            yield f"{name} is missing", s.times * (s.hop != t)
        yield f"the keys of hop {t} count twice", s.times * (1 + (s.hop == t).double())
    if s.p > 1:
        yield "only the own block of keys is seen", s.times * s.same
        yield "the own block is missing", s.times * ~s.same
        yield "the own block counts twice", s.times * (1 + s.same.double())
        last = torch.zeros(n, dtype=torch.bool)
        for mine in case.shards:
            last[mine[-1:]] = True
        yield "the last key of every shard is dropped", s.times * ~last
        for rank in range(s.p):
            yield f"the keys of rank {rank} are dropped", s.times * (s.owner != rank)
    yield "the last key is dropped", s.times * (j != n - 1)
    yield "the first key is dropped", s.times * (j != 0)
    if s.times.max() > 1:
        yield "a key seen through several branches counts once", s.times.clamp(max=1)


def dilations(s: Scene, causal: Tensor) -> Iterator[tuple[str, Tensor]]:
    """LongNet's index sets, got wrong."""
    case, h, n = s.case, s.case.h, s.case.n
    position, head = torch.arange(n), torch.arange(h)
    branches = list(zip(*case.dilation, strict=True))

    def seen(sel: Tensor, seg: Tensor, offset: Callable, only: Any = None, tail: bool = True, q: Any = None) -> Tensor:
        """Multiplicities from coordinates that select and that cut segments; `q` are those of the
        queries, if others.
        """
        q_sel, q_seg = q or (sel, seg)
        total = torch.zeros(h, n, n, dtype=torch.float64)
        for m, (w, r) in enumerate(branches):
            kept, kept_q = (x[None] % w % r == offset(m, r)[:, None] for x in (sel, q_sel))
            if not tail:
                kept = kept & (seg[None] < n // w * w)
            total += (kept_q[:, :, None] & kept[:, None, :] & (q_seg[:, None] // w == seg[None] // w)) * (
                only in (None, m)
            )
        return (total * causal).expand(case.b, -1, -1, -1)

    def usual(m: int, r: int) -> Tensor:
        return head % r

    for m, (w, r) in enumerate(branches):
        if len(branches) > 1:
            yield (f"branch {m} (w = {w}, r = {r}) is dropped", s.times - seen(position, position, usual, m))
            yield f"only branch {m} (w = {w}, r = {r}) is used", seen(position, position, usual, m)
    yield ("dilation offsets are counted from the shard, not the segment", seen(s.loc, position, usual))
    yield ("dilation offsets are counted from the sequence, not the segment", _global_offsets(s, causal))
    yield "segments are counted from the shard", seen(position, s.loc, usual) * s.same
    yield (
        "segments and offsets are counted from the shard, which sees only itself",
        seen(s.loc, s.loc, usual) * s.same,
    )
    yield "segments are cut at the shard's edges", s.times * s.same
    mine = [(s.loc, position), (position, s.loc), (s.loc, s.loc)]
    for text, q in zip(("offsets", "segments", "segments and offsets"), mine, strict=True):
        yield (f"dilation {text} of the queries are counted from the shard", seen(position, position, usual, q=q))
    for text, offset in (
        ("every head has dilation offset 0", lambda m, r: head * 0),
        ("dilation offsets go by blocks of heads, not j mod r", lambda m, r: head * r // h),
        ("dilation offset (j div r) mod r for j mod r", lambda m, r: head // r % r),
        ("dilation offsets are off by one head", lambda m, r: (head + 1) % r),
        ("dilation offsets run backwards", lambda m, r: (-head) % r),
        ("dilation offset taken from the branch, not the head", lambda m, r: head * 0 + m % r),
    ):
        yield text, seen(position, position, offset)
    yield ("the tail of the sequence that fills no segment is dropped", seen(position, position, usual, tail=False))
    few, more = divmod(h, len(branches))
    edges = [m * few + min(m, more) for m in range(len(branches) + 1)]
    grouped = torch.zeros_like(s.times)
    left = torch.zeros_like(s.times)
    for m, (_, r) in enumerate(branches):
        part = seen(position, position, lambda m, r: head * 0 + m % r, m)
        mine = ((head >= edges[m]) & (head < edges[m + 1]))[None, :, None, None]
        grouped = grouped + part * mine
        left = left + part * ((head >= m * few) & (head < (m + 1) * few))[None, :, None, None]
    yield "a convention: heads are partitioned among the branches (heads='grouped')", grouped
    yield "heads are left unassigned when h is not a multiple of the branches", left
    some = [
        seen(position, position, usual, m) * (head < h // r * r)[None, :, None, None]
        for m, (_, r) in enumerate(branches)
    ]
    yield "heads are left unassigned when h is not a multiple of the rate", sum(some)


def _global_offsets(s: Scene, causal: Tensor) -> Tensor:
    head, at = torch.arange(s.case.h), torch.arange(s.case.n)
    total = 0.0
    for w, r in zip(*s.case.dilation, strict=True):
        kept = at[None] % r == (head % r)[:, None]
        total = total + (kept[:, :, None] & kept[:, None, :] & (at[:, None] // w == at[None] // w)).double()
    return (total * causal).expand_as(s.times)


def forwards(s: Scene) -> Iterator[Guess]:
    """Every wrong forward that has a name."""
    case = s.case

    def told(text: str, S: Tensor = s.S, times: Tensor = s.times, V: Tensor = s.V) -> Guess:
        _, out, lse = attend(S, times, V)
        return text, {"out": out, "lse": lse}

    for text, times in masks(s):
        yield told(text, times=times)
    for text, factor in (
        ("scores are not scaled", 1 / s.scale),
        ("scores are scaled twice", s.scale),
        ("scores are scaled by 1/√(h·d)", case.h**-0.5),
        ("scores are multiplied by √d", case.d),
        ("scores are taken as base 2 (log2 e missing or doubled)", math.log2(math.e)),
        ("scores are taken as base 2 (ln 2)", math.log(2)),
    ):
        yield told(text, S=s.S * factor)
        for only, where_ in ((s.same, "on the own block"), (~s.same, "on received blocks")):
            yield told(f"{text} ({where_})", S=torch.where(only, s.S * factor, s.S))
    if s.e > 1:
        turned = [x.repeat(1, 1, s.e, 1) for x in (s.k, s.v)]
        yield told("GQA heads interleaved: query head j uses kv head j mod g", S=s.scores(turned[0]), V=turned[1])
        first = [x[:, :, :1].expand(-1, -1, case.h, -1) for x in (s.k, s.v)]
        yield told("every query head uses kv head 0", S=s.scores(first[0]), V=first[1])
        yield told("GQA values interleaved, keys not", V=turned[1])
        yield told("GQA keys interleaved, values not", S=s.scores(turned[0]))
    if case.p > 1:
        yield told("K and V received into one buffer: values are used as keys", S=_remote(s, s.scores(s.V), s.S))
        yield ("K and V received into one buffer: keys are used as values",
               {"out": torch.einsum("bhqk,bkhd->bqhd", s.P * s.same, s.V)
                + torch.einsum("bhqk,bkhd->bqhd", s.P * ~s.same, s.K)})  # fmt: skip
    if s.even and case.p > 1:
        for by in {1, -1}:
            K, V = s.rolled(s.K, by), s.rolled(s.V, by)
            yield told("keys and values are one hop out of step: V of another rank", V=V)
            yield told("keys and values are one hop out of step: K of another rank", S=s.scores(K))
            yield told("blocks are attributed to the wrong rank: K and V one hop off", S=s.scores(K), V=V)
    if case.p > 1 and s.even:
        whole = torch.stack([s.O[:, m] for m in s.case.shards])  # rank, batch, token
        order = torch.cat(s.case.shards).argsort()
        for text, mixed in (
            ("the batch is taken for the ranks", whole.transpose(0, 1).reshape(whole.shape)),
            ("the ranks are taken for the batch", whole.reshape(case.b, s.p, *whole.shape[2:]).transpose(0, 1)),
        ):
            yield (f"sequences of the batch are mixed: {text}", {"out": torch.cat(list(mixed), 1)[:, order]})
        q, K, V = (
            torch.stack([x[:, m] for m in s.case.shards]).reshape(case.b, case.n, *x.shape[2:])[:, order]
            for x in (s.q, s.K, s.V)
        )
        yield told("sequences of the batch are mixed: the ranks are taken for the batch", V=V,
                   S=torch.einsum("bqhd,bkhd->bhqk", q, K) * s.scale)  # fmt: skip
    padding = -case.h % case.p
    if padding:
        pushed = {"out": torch.cat([s.O[:, :, :padding] * 0, s.O[:, :, :-padding]], 2)}
        yield "heads are shifted by their padding: added in front, dropped at the end", pushed
    heads = torch.einsum("bqhd,bqkd->bqhk", s.q, s.K) * s.scale
    yield (
        "attention over the head axis: a transpose is missing",
        {"out": torch.einsum("bqhk,bqkd->bqhd", heads.softmax(-1), s.V)},
    )
    yield from merges(s, s.hops(), "blocks")
    if case.p > 1:
        yield from rescaling(s)
    if case.dilation and len(case.dilation[0]) > 1:
        yield from merges(s, s.branches(), "branches")
    if case.p > 1:
        yield from misplaced(s, {"out": s.O, "lse": s.L})
        shuffled = dict(misplaced(s, {"k": s.K, "v": s.V}, heads_only=True))
        for text, kv in shuffled.items():
            yield told(f"keys and values: {text}", S=s.scores(kv["k"]), V=kv["v"])
    top = (s.S + s.times.log()).amax(-1)
    for text, norm in (("exp(lse − max)", (s.L - top).exp()), ("exp(lse)", s.L.exp())):
        yield (f"out is divided by lse instead of {text}", {"out": s.O * (norm / s.L).transpose(1, 2)[..., None]})
    for count in sorted({1, case.n // case.p, 2 * case.p, case.p * max(s.lengths) - case.n} - {0}):
        share = (s.L.exp() / (s.L.exp() + count)).transpose(1, 2)[..., None]
        text = (
            "a zero key is attended: the running sum starts at 1, or padding" if count == 1 else "padding is attended"
        )
        yield (text, {"out": s.O * share.nan_to_num(), "lse": torch.logaddexp(s.L, torch.tensor(math.log(count)))})
    yield "out is not normalised", {"out": s.O * s.L.exp().transpose(1, 2)[..., None]}
    yield "out is zero", {"out": s.O * 0}


def misplaced(s: Scene, tensors: dict[str, Tensor], heads_only: bool = False) -> Iterator[Guess]:
    """Right numbers in the wrong place: what an all-to-all over heads gets wrong."""

    def each(change: Callable) -> dict[str, Tensor]:
        turned = {n: x.transpose(1, 2) if n == "lse" else x for n, x in tensors.items()}
        turned = {n: change(x) for n, x in turned.items()}
        return {n: x.transpose(1, 2) if n == "lse" else x for n, x in turned.items()}

    for first, text in (
        (s.p, "heads come back interleaved by rank"),
        (-1, "heads come back in rank order for interleaved"),
    ):
        if all(x.shape[1 if n == "lse" else 2] % s.p == 0 for n, x in tensors.items()):
            yield (
                text,
                each(lambda x, f=first: x.unflatten(2, (f, s.p) if f < 0 else (f, -1)).transpose(2, 3).flatten(2, 3)),
            )
    yield "heads come back rolled by one", each(lambda x: x.roll(1, 2))
    yield "heads come back reversed", each(lambda x: x.flip(2))
    if s.even and not heads_only:
        for by in (by for by in range(1 - s.p, s.p) if by):
            yield (
                f"results end on the wrong rank: rank r has that of rank r{by:+d}",
                each(lambda x, by=by: s.rolled(x, by)),
            )
        backward_ = torch.cat(s.case.shards).flip(0)
        order = torch.cat(s.case.shards).argsort()
        yield "tokens come back in reverse", each(lambda x: x[:, backward_[order]])
        table = torch.stack(s.case.shards)
        for text, swap in (
            ("interleaved", table.T.reshape(-1)),
            ("block by block", table.reshape(-1, s.p).T.reshape(-1)),
        ):
            yield (f"tokens of different ranks come back {text}", each(lambda x, w=swap: x[:, w[order]]))
    if not heads_only:
        yield (
            "heads and tokens are reshaped where they should be transposed",
            each(
                lambda x: torch.cat([x[:, m].transpose(1, 2).reshape(x[:, m].shape) for m in s.case.shards], 1)[
                    :, torch.cat(s.case.shards).argsort()
                ]
            ),
        )


def _remote(s: Scene, remote: Tensor, own: Tensor) -> Tensor:
    return torch.where(s.same, own, remote)


def merges(s: Scene, parts: list[Tensor], what: str) -> Iterator[Guess]:
    """Right parts, merged wrongly. `parts` are key sets, in the order in which they are merged."""
    done = [attend(s.S, s.times * part if what == "blocks" else part, s.V) for part in parts]
    outs, lses = torch.stack([d[1] for d in done]), torch.stack([d[2] for d in done])
    there = lses.isfinite()
    rows = lses.masked_fill(~there, -1e30)

    def mix(weights: Tensor) -> Tensor:
        return (outs * weights.nan_to_num().transpose(2, 3)[..., None]).sum(0)

    count = there.sum(0).clamp(min=1)
    yield f"the outputs of {what} are averaged", {"out": mix(there / count)}
    yield (
        f"the outputs of {what} are averaged over all, empty ones too",
        {"out": mix(torch.ones_like(rows) / len(parts))},
    )
    yield f"the outputs of {what} are added", {"out": mix(there.double())}
    finite = lses.masked_fill(~there, 0.0)
    yield f"{what} are weighted by lse instead of exp(lse)", {"out": mix(finite / finite.sum(0))}
    for text, base in (
        ("natural lse merged as base 2", math.log(2)),
        ("base-2 lse merged as natural", 1 / math.log(2)),
    ):
        yield f"{text} ({what})", {"out": mix((rows * base).softmax(0))}
    yield (
        f"{what} are weighted with the sign of lse reversed",
        {"out": mix((-finite).masked_fill(~there, -1e30).softmax(0))},
    )
    winner = torch.nn.functional.one_hot(rows.argmax(0), len(parts)).movedim(-1, 0).double()
    yield f"the largest of {what} wins instead of merging", {"out": mix(winner)}
    sums = (s.S.masked_fill(s.times == 0, -math.inf)).unsqueeze(0).expand(len(parts), *s.S.shape)
    kept = torch.stack([(part > 0).expand_as(s.S) for part in parts])
    top = sums.masked_fill(~kept, -math.inf).amax(-1)
    unshifted = (rows - top.masked_fill(~top.isfinite(), 0.0)).exp() * there
    yield (f"{what} are merged without rescaling to a common maximum", {"out": mix(unshifted / unshifted.sum(0))})

    nobody = (~there).sum(0)
    share = torch.where(s.L.isfinite(), s.L.exp() / (s.L.exp() + nobody), 0.0)
    yield (
        f"{what} that a query does not see have lse 0 and take weight",
        {"out": s.O * share.transpose(1, 2)[..., None]},
    )

    def fold(step: Callable, zero: bool = False) -> dict[str, Tensor]:
        out, lse = (outs[0] * 0, rows[0] * 0 - 1e30) if zero else (outs[0], rows[0])
        for o, b in zip(outs[not zero :], rows[not zero :], strict=True):
            wide_a, wide_b = lse.transpose(1, 2)[..., None], b.transpose(1, 2)[..., None]
            new = torch.logaddexp(lse, b)
            out, lse = step(out, o, wide_a, wide_b, new.transpose(1, 2)[..., None], lse, b, new)
        return {"out": out.nan_to_num(), "lse": lse}

    steps = {
        "the running output is not rescaled": lambda x, o, a, b, n, la, lb, ln: (
            x + (b - n).exp() * o, ln),
        "the new output is not rescaled": lambda x, o, a, b, n, la, lb, ln: (
            (a - n).exp() * x + o, ln),
        "the two weights are swapped": lambda x, o, a, b, n, la, lb, ln: (
            (b - n).exp() * x + (a - n).exp() * o, ln),
        "the running lse is not updated": lambda x, o, a, b, n, la, lb, ln: (
            (a - n).exp() * x + (b - n).exp() * o, la),
        "the running lse becomes the block's": lambda x, o, a, b, n, la, lb, ln: (
            (a - n).exp() * x + (b - n).exp() * o, lb),
        "the running lse becomes the larger": lambda x, o, a, b, n, la, lb, ln: (
            (a - n).exp() * x + (b - n).exp() * o, torch.maximum(la, lb)),
        "running and new output are averaged": lambda x, o, a, b, n, la, lb, ln: ((x + o) / 2, ln),
        "only the last of them is kept": lambda x, o, a, b, n, la, lb, ln: (o, lb),
        "only the first of them is kept": lambda x, o, a, b, n, la, lb, ln: (x, la),
        "the weights are exp2 of natural differences": lambda x, o, a, b, n, la, lb, ln: (
            (a - n).exp2() * x + (b - n).exp2() * o, ln),
        "lse = 0 is taken for masked": lambda x, o, a, b, n, la, lb, ln: (
            torch.where(a == 0, o, torch.where(b == 0, x, (a - n).exp() * x + (b - n).exp() * o)),
            torch.where(la == 0, lb, torch.where(lb == 0, la, ln))),
    }  # fmt: skip
    for text, step in steps.items():
        for zero in (False, True):
            yield f"merging {what}: {text}" + " (from zero)" * zero, fold(step, zero)
    yield f"the lse of {what} is added instead of merged", {"lse": finite.sum(0)}
    for t, name in ((0, "first"), (len(parts) - 1, "last")):
        yield f"lse is that of the {name} of the {what}", {"lse": lses[t]}
    yield f"lse is averaged over {what}", {"lse": finite.sum(0) / count}


def rescaling(s: Scene) -> Iterator[Guess]:
    """Blocks with a running maximum, where one of the two sums misses its rescaling."""
    logits = s.S + s.times.log()
    for order in (s.hop, -s.hop % s.p, s.owner[None].expand_as(s.hop)):
        blocks = [order == t for t in range(s.p)]
        done = [attend(s.S, s.times * block, s.V) for block in blocks]
        top = torch.stack([logits.masked_fill(~block, -math.inf).amax(-1) for block in blocks]).cummax(0)[0]
        top = top.masked_fill(top == -math.inf, 0.0)
        outs, weight = torch.stack([d[1] for d in done]), torch.stack([d[2] for d in done])
        right, late = (weight - top[-1]).exp(), (weight - top).exp()
        for text, w, norm in (("denominator", right, late), ("numerator", late, right)):
            out = (outs * (w / norm.sum(0)).nan_to_num().transpose(2, 3)[..., None]).sum(0)
            yield f"the running {text} is not rescaled when the maximum grows", {"out": out}


def only_lse(s: Scene, got: list[Tensor], truth: Any) -> Iterator[Guess]:
    """Guesses about lse when out is right: a constant, a factor, or another quantity."""
    seen = s.L.isfinite()
    mine = _joined(s, got, "lse")
    gap = (mine - s.L)[seen]
    if gap.numel() and gap.isfinite().all():
        constant = gap.mean().item()
        known = {"log 2": math.log(2), "log p": math.log(s.p), "log n": math.log(s.case.n), "log d": math.log(s.case.d)}
        known |= {f"−{name}": -value for name, value in known.items()}
        label = next((f" ({name})" for name, value in known.items() if abs(value - constant) < 1e-4), "")
        yield f"lse is off by a constant {constant:.3f}{label}", {"lse": s.L + constant}
        factor = ((mine * s.L)[seen].sum() / (s.L[seen] ** 2).sum()).item()
        label = " (base 2 for natural)" if abs(factor - math.log2(math.e)) < 1e-3 else ""
        yield f"lse is {factor:.3f} times what it should be{label}", {"lse": s.L * factor}
    logits = s.S + s.times.log()
    yield "lse is the maximum, not the log of the sum", {"lse": logits.amax(-1)}
    yield "lse is the sum, its log is missing", {"lse": s.L.exp()}
    yield "lse lacks its maximum", {"lse": s.L - logits.amax(-1)}
    turned = s.L.transpose(1, 2).reshape(s.L.shape)
    yield "lse is reshaped where it should be transposed", {"lse": turned}


# --------------------------------------------------------------------------------- backward guesses


def backward(
    s: Scene, P: Tensor, Pv: Tensor, dS: Tensor, K: Tensor | None = None, keep: Any = 1, dkeep: Any = 1
) -> dict:
    """dq, dk, dv from weights and dS; `keep` says which pairs count in dk and dv, `dkeep` in dq."""
    dq = torch.einsum("bhqk,bkhd->bqhd", dS * dkeep, s.K if K is None else K) * s.scale
    dk = torch.einsum("bhqk,bqhd->bkhd", dS * keep, s.q) * s.scale
    dv = torch.einsum("bhqk,bqhd->bkhd", Pv * keep, s.do)
    return {"dq": dq, "dk": s.heads(dk), "dv": s.heads(dv)}


def backwards(s: Scene, got: dict, truth: Any) -> Iterator[Guess]:
    """Every wrong backward of a right forward that has a name."""
    case, p = s.case, s.p
    dP = torch.einsum("bqhd,bkhd->bhqk", s.do, s.V)
    D = (s.do * s.O).sum(-1).transpose(1, 2)[..., None]
    dlse = s.dlse[..., None]
    dS = s.P * (dP - D + dlse)

    def told(text: str, P: Tensor = s.P, dS: Tensor = dS, Pv: Tensor | None = None, **how: Any) -> Guess:
        return text, backward(s, P, P if Pv is None else Pv, dS, **how)

    true = backward(s, s.P, s.P, dS)
    if s.dlse.any():
        yield told("the gradient of lse is ignored", dS=s.P * (dP - D))
        yield told("the gradient of lse has the wrong sign", dS=s.P * (dP - D - dlse))
    base = (s.S - s.L.masked_fill(~s.L.isfinite(), math.inf)[..., None] * math.log2(math.e)).exp() * s.times
    yield told("a base-2 lse is taken for a natural one in the backward", P=base, dS=base * (dP - D + dlse))
    for other in (dlse * math.log2(math.e), dlse * math.log(2)):
        yield told(
            "a base-2 lse is taken for a natural one in the backward (dlse too)", P=base, dS=base * (dP - D + other)
        )
    yield told("softmax's backward lacks the row sum D = Σ dO·O", dS=s.P * (dP + dlse))
    yield told("D = Σ dO·O has the wrong sign", dS=s.P * (dP + D + dlse))
    if p > 1:
        yield told("dk, dv are zero but for the own block: they never come home", keep=s.same)
        yield told("dq counts the own block only", dkeep=s.same)
        yield told("dq, dk, dv count the own block only", keep=s.same, dkeep=s.same)
        yield told("dk, dv lack the own block", keep=~s.same)
        yield told("dq lacks the own block", dkeep=~s.same)
        yield told("dk, dv count the own block twice", keep=1 + s.same.double())
        for t in range(1, p):
            for name in (f"hop {t}", "the last hop")[: 1 + (t == p - 1)]:
                yield told(f"dk, dv lack {name}", keep=s.hop != t)
                yield told(f"dq lacks {name}", dkeep=s.hop != t)
                yield told(f"dq, dk, dv lack {name}", keep=s.hop != t, dkeep=s.hop != t)
                yield told(f"dq holds {name} only: overwritten, not added", dkeep=s.hop == t)
                yield told(f"dk, dv hold {name} only: overwritten, not added", keep=s.hop == t)
                yield told(f"dk, dv count {name} twice", keep=1 + (s.hop == t).double())
                yield told(f"dq counts {name} twice", dkeep=1 + (s.hop == t).double())
            if p > 2:
                for ahead in (1, 2):
                    near = (s.hop == 0) | (s.hop == t) if ahead == 1 else (s.hop <= t)
                    yield told(f"dk, dv count hops {'0 and ' if ahead == 1 else '0 to '}{t} only", keep=near)
        yield from local_softmax(s, s.hops(), dP, D, dlse, told, "blocks", "")
    if case.dilation and len(case.dilation[0]) > 1:
        yield from local_softmax(s, s.branches(), dP, D, dlse, told, "branches", "mixing ")
    for text, times in masks(s):
        P = (s.S - s.L.masked_fill(~s.L.isfinite(), math.inf)[..., None]).exp() * times
        yield told(f"in the backward only: {text}", P=P, dS=P * (dP - D + dlse))
    if s.even and p > 1:
        for by in (by for by in range(1 - p, p) if by):
            moved = {name: s.rolled(true[name], by) for name in ("dk", "dv")}
            way = f"rank r has that of rank r{by:+d}"
            yield f"dk, dv end on the wrong rank: {way}", true | moved
            yield (f"dk, dv are added to those of another rank: {way}", true | {n: true[n] + moved[n] for n in moved})
            yield f"dk ends on the wrong rank: {way}", true | {"dk": moved["dk"]}
            yield f"dv ends on the wrong rank: {way}", true | {"dv": moved["dv"]}
            yield told(f"dq uses the keys of another rank ({way})", K=s.rolled(s.K, by))
            V = s.rolled(s.V, by)
            wrong = torch.einsum("bqhd,bkhd->bhqk", s.do, V)
            yield told(f"the backward uses the values of another rank ({way})", dS=s.P * (wrong - D + dlse))
            do = s.rolled(s.do, by)
            yield (f"the backward uses dO of another rank ({way})", backward(_with(s, do=do), s.P, s.P, dS))
        for rest in (1, 2):
            total = {n: sum(s.rolled(true[n], by) for by in range(p)) / (1 if rest == 1 else p) for n in ("dk", "dv")}
            yield "dk, dv are summed over ranks that hold different keys", true | total
    if p > 1:
        for names in (("dq",), ("dk", "dv"), ("dq", "dk", "dv")):
            for text, guess in misplaced(s, {n: true[n] for n in names}):
                yield f"{', '.join(names)}: {text}", true | guess
    if p > 1:
        parts = [backward(s, s.P, s.P, dS, keep=pick) for pick in (s.hop < p - 1, s.hop == p - 1)]
        for one, other in (("dk", "dv"), ("dv", "dk")):
            mixed = parts[0][one] + parts[1][other]
            yield f"{one} is sent in the place of {other} while they travel", true | {other: mixed}
    yield "dk equals dk + dv of this shard", true | {"dk": true["dk"] + true["dv"]}
    yield "dv equals dk + dv of this shard", true | {"dv": true["dk"] + true["dv"]}
    yield "dk and dv are swapped", true | {"dk": true["dv"], "dv": true["dk"]}
    yield "dk is dv", true | {"dk": true["dv"]}
    yield "dv is dk", true | {"dv": true["dk"]}
    if s.e > 1:
        for text, take in (
            ("only the first query head of each group reaches dk, dv", lambda x: x[:, :, :, 0]),
            ("only the last query head of each group reaches dk, dv", lambda x: x[:, :, :, -1]),
            ("the query heads of a group are averaged in dk, dv, not added", lambda x: x.mean(3)),
        ):
            wide = {"dk": torch.einsum("bhqk,bqhd->bkhd", dS, s.q) * s.scale,
                    "dv": torch.einsum("bhqk,bqhd->bkhd", s.P, s.do)}  # fmt: skip
            yield text, true | {n: take(x.unflatten(2, (case.g, s.e))) for n, x in wide.items()}
        yield ("GQA gradients interleaved: query head j adds to kv head j mod g",
               true | {n: x.unflatten(2, (s.e, case.g)).sum(2) for n, x in wide.items()},
        )  # fmt: skip
    factor = {}
    for n in ("dq", "dk", "dv"):
        factor[n] = ((_joined(s, got[n], n) * true[n]).sum() / (true[n] ** 2).sum().clamp_min(1e-300)).item()
    for names in (("dq",), ("dk",), ("dv",), ("dk", "dv"), ("dq", "dk"), ("dq", "dk", "dv")):
        verb = "is" if len(names) == 1 else "are"
        if len({_ratio(factor[n], s) for n in names}) == 1:
            yield (f"{', '.join(names)} {verb} wrong by a factor {_ratio(factor[names[0]], s)}",
                   true | {n: true[n] * factor[n] for n in names})  # fmt: skip
    each = ", ".join(f"{n} by {_ratio(f, s)}" for n, f in factor.items() if abs(f - 1) > 1e-3)
    yield (f"gradients are wrong by a factor: {each}", true | {n: true[n] * f for n, f in factor.items()})
    for names in (("dq",), ("dk",), ("dv",), ("dk", "dv"), ("dq", "dk"), ("dq", "dk", "dv")):
        yield (f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} zero", true | {n: true[n] * 0 for n in names})


def right_backward(s: Scene, keep: Any = 1) -> dict[str, Tensor]:
    """The true dq, dk, dv of a scene, or what some pairs add to dk and dv."""
    dP = torch.einsum("bqhd,bkhd->bhqk", s.do, s.V)
    D = (s.do * s.O).sum(-1).transpose(1, 2) - s.dlse
    return backward(s, s.P, s.P, s.P * (dP - D[..., None]), keep=keep)


def _with(s: Scene, **changed: Any) -> Any:
    return SimpleNamespace(**(vars(s) | {"heads": s.heads} | changed))


def _ratio(factor: float, s: Scene) -> str:
    """A factor by its name, if it has one."""
    known = {
        "1/p": 1 / s.p, "1/p²": s.p**-2, "p": s.p, "1/√d": s.scale, "√d": 1 / s.scale,
        "1/d": s.scale**2, "h/g": s.e, "g/h": 1 / s.e, "ln 2": math.log(2),
        "log2 e": 1 / math.log(2), "2": 2.0, "1/2": 0.5, "−1": -1.0,
    }  # fmt: skip
    found = (name for name, value in known.items() if value != 1 and abs(factor / value - 1) < 1e-3)
    return next(found, f"{factor:.3g}")


def local_softmax(
    s: Scene, parts: list, dP: Tensor, D: Tensor, dlse: Tensor, told: Callable, what: str, kind: str
) -> Iterator[Guess]:
    """Block lse for merged lse, block out for merged out: what a backward written per block gets
    wrong.
    """
    blocks = [part if what == "branches" else s.times * part for part in parts]
    done = [attend(s.S, block, s.V) for block in blocks]
    Ps = [d[0] for d in done]
    share = [torch.where(s.L.isfinite(), (d[2] - s.L).exp(), 0.0)[..., None] for d in done]
    Ds = [(s.do * d[1]).sum(-1).transpose(1, 2)[..., None] for d in done]
    local = sum(Ps)
    merged = [P * w for P, w in zip(Ps, share, strict=True)]
    detached = sum(P * (dP - d) for P, d in zip(merged, Ds, strict=True))
    if what == "blocks":
        yield told("the merge's weights are detached: out of the block for merged out in D", dS=detached)
        yield told(
            "the merge's weights are detached: out of the block for merged out in D (dlse kept)",
            dS=detached + s.P * dlse,
        )
    else:
        yield told("the mixing weights of the branches are detached", dS=detached)
        yield told("the mixing weights of the branches are detached (dlse kept)", dS=detached + s.P * dlse)
    alone = sum(P * (dP - w * d) for P, w, d in zip(merged, share, Ds, strict=True))
    for text, dS in (("", alone), (" (dlse kept)", alone + s.P * dlse)):
        yield told(f"D = Σ P·dP is summed over one of the {what} alone{text}", dS=dS)
    both = sum(P * (dP - d) for P, d in zip(Ps, Ds, strict=True))
    yield told(f"the backward uses the lse of {what} for the merged lse", P=local, dS=local * (dP - D + dlse))
    yield told(f"the backward uses lse and out of {what} for the merged ones", P=local, dS=both)
    yield told(
        f"the backward uses lse and out of {what} for the merged ones (dlse kept)", P=local, dS=both + local * dlse
    )
    last = done[-1][2]
    P = sum((s.S - last.masked_fill(~last.isfinite(), math.inf)[..., None]).exp() * b for b in blocks)
    yield told(f"the backward uses the lse of the last of the {what}", P=P, dS=P * (dP - D + dlse))
    first = done[0][2]
    P = sum((s.S - first.masked_fill(~first.isfinite(), math.inf)[..., None]).exp() * b for b in blocks)
    yield told(f"the backward uses the lse of the first of the {what}", P=P, dS=P * (dP - D + dlse))


# ---------------------------------------------------------------------------------------- the judge


def _joined(s: Any, pieces: list[Tensor], name: str) -> Tensor:
    """Ranks' pieces in global order."""
    dim = 2 if name == "lse" else 1
    order = torch.cat(s.case.shards).argsort()
    return torch.cat([x.double() for x in pieces], dim).index_select(dim, order)


def name(case: Any, truth: Any, got: dict[str, list[Tensor]], wrong: list[str], others: list) -> list[str]:
    """What explains the wrong tensors, the best first; where the error lives, when nothing does."""
    s = Scene(case, truth)
    whole = {n: _joined(s, got[n], n) for n in got}
    if "out" in wrong:
        guesses, about = forwards(s), ["out"]
    elif "lse" in wrong:
        guesses, about = (
            itertools.chain(only_lse(s, got["lse"], truth), merges(s, s.hops(), "blocks"), forwards(s)),
            ["lse"],
        )
    else:
        guesses, about = backwards(s, got, truth), [n for n in wrong if n in ("dq", "dk", "dv")]
    calls = "a call's result depends on another call: "
    for other in others:
        saved = Scene(case, other)
        saved.do, saved.dlse = s.do, s.dlse
        foreign = right_backward(saved)
        if all(n in foreign and _left(whole[n], foreign[n], truth.whole[n]) < ENOUGH for n in about):
            return [calls + "what one forward saved is overwritten by the next"]
        if all(_left(whole[n], other.whole[n], truth.whole[n]) < ENOUGH for n in about):
            return [calls + "it is the other's"]
        if "lse" in about:
            continue
        saved = Scene(case, other)
        left_behind = [other.whole, right_backward(saved, keep=saved.same)]
        left_behind += [{n: s.rolled(other.whole[n], by) for n in about} for by in range(s.p) if s.even]
        for old in left_behind:
            if all(n in old and _left(whole[n], truth.whole[n] + old[n], truth.whole[n]) < ENOUGH for n in about):
                return [calls + "a buffer is not cleared, results add up"]
    left = {}
    for told, guess in guesses:
        if all(n in guess for n in about):
            share = max(_left(whole[n], guess[n], truth.whole[n]) for n in about)
            left[told] = min(share, left.get(told, math.inf))
    best = min(left.values(), default=math.inf)
    if best >= ENOUGH and (small := precision(whole, truth, about)):
        return [small]
    if best >= ENOUGH:
        return [f"{UNKNOWN}: {place(s, whole, truth, about[0])}"]
    return [told for told, share in left.items() if share <= best + 0.01]


def precision(whole: dict[str, Tensor], truth: Any, about: list[str]) -> str | None:
    """A small error everywhere, not a wrong term: bits were lost on the way."""
    share = []
    for n in about:
        seen = truth.whole[n].isfinite()
        share.append(((whole[n] - truth.whole[n])[seen].norm() / truth.whole[n][seen].norm()).item())
    # sums that cancel show what they lost many times over
    if max(share) > (0.3 if truth.case.offset else 0.02):
        return None
    size = "1e-3 or more" if max(share) > 1e-3 else "less than 1e-3"
    return f"accumulates in low precision (a relative error of {size})"


def _left(got: Tensor, guess: Tensor, truth: Tensor) -> float:
    """The share of the error that a guess leaves; a number that is not finite has to be guessed
    exactly.
    """
    if got.shape != guess.shape:
        return math.inf
    lost = ~got.isfinite()
    if not torch.equal(got[lost], guess[lost]):
        return math.inf
    seen = truth.isfinite() & guess.isfinite() & ~lost
    error = (got - truth)[seen].norm().item()
    if not error:
        return 0.0 if lost.any() else math.inf
    return (got - guess)[seen].norm().item() / error


def place(s: Scene, whole: dict[str, Tensor], truth: Any, name: str) -> str:
    """Ranks, heads and positions that are wrong, in words."""
    gap = (whole[name] - truth.whole[name]).nan_to_num(0.0, 0.0, 0.0)
    gap = gap.transpose(1, 2) if name == "lse" else gap.norm(dim=-1)
    size = gap.abs()
    bad = size > 0.05 * size.max()
    rows, heads = bad.any(2).any(0), bad.any(1).any(0)
    ranks = sorted({int(r) for r in s.owner[rows]})
    where_ = "every head" if heads.all() else f"heads {_list(heads.nonzero().flatten().tolist())}"
    local = sorted({int(x) for x in s.loc[rows]})
    at = "every position" if rows.all() else f"local positions {_list(local)}"
    return f"{name} is wrong on ranks {_list(ranks)}, {where_}, {at}"


def _list(items: Any) -> str:
    items = list(items)
    return ", ".join(map(str, items[:8])) + (", …" if len(items) > 8 else "")
