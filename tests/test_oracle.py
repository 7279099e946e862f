"""The oracle passes correct attention and names what is wrong with a dozen mistakes of our own."""

import functools
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zoo
from test_zoo import SAYS

import ringref
from ringref.oracle import FEATURES, Case, Pool, Report, adapt, cases, check, diagnose
from ringref.oracle.cases import apart
from ringref.oracle.causes import rules_of
from ringref.oracle.cli import main
from ringref.oracle.scene import Scene, rows
from ringref.oracle.truth import Truth

# ------------------------------------------------------------- two correct candidates, as somebody
# would write them


def keys_of(rank, p, s, layout):
    """Global positions of a rank's s tokens."""
    if layout == "contiguous":
        return torch.arange(rank * s, (rank + 1) * s)
    if layout == "striped":
        return torch.arange(rank, p * s, p)
    half = s // 2
    return torch.cat(
        [torch.arange(rank * half, (rank + 1) * half), torch.arange((2 * p - 1 - rank) * half, (2 * p - rank) * half)]
    )


def scores_of(q, k, qpos, kpos, causal):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(
        q.shape[-1]
    )
    return scores.masked_fill(kpos > qpos[:, None], -math.inf) if causal else scores


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad):
        size = grad.shape[1] // dist.get_world_size(ctx.group)
        total = grad.float().contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.narrow(1, size * dist.get_rank(ctx.group), size).to(grad.dtype), None


def gathering(q, k, v, *, causal, group, layout="contiguous", wrap=Gather):
    """Gather keys and values; autograd does the rest."""
    rank, p, s = dist.get_rank(group), dist.get_world_size(group), q.shape[1]
    k, v = wrap.apply(k, group), wrap.apply(v, group)
    kpos = torch.cat([keys_of(r, p, s, layout) for r in range(p)])
    scores = scores_of(q, k, keys_of(rank, p, s, layout), kpos, causal)
    out = torch.einsum(
        "bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(q.shape[2] // v.shape[2], 2).to(scores.dtype)
    )
    return out.to(q.dtype), scores.logsumexp(-1)


def turn(tensors, group, bug=""):
    """Send to the next rank, receive from the one before."""
    rank, p = dist.get_rank(group), dist.get_world_size(group)
    to, source = (dist.get_global_rank(group, (rank + step) % p) for step in (1, -1))
    if bug == "global rank":
        to, source = (rank + 1) % p, (rank - 1) % p
    got = [torch.empty_like(x) for x in tensors]
    if bug == "one buffer" and len(got) == 2:
        got[1] = got[0]
    if bug == "in place":
        got = list(tensors)
    work = []
    for x, y in zip(tensors, got, strict=True):
        work += [dist.isend(x, to, group=group), dist.irecv(y, source, group=group)]
    if bug == "no wait":
        copies = [y.clone() for y in got]
        [w.wait() for w in work]
        return copies
    if bug == "never waits for sends":
        work = work[1::2]
    for w in work:
        w.wait()
    return got


class Ring(torch.autograd.Function):
    """Keys and values travel; dk and dv travel with them and come home. `bug` names what to get
    wrong.
    """

    @staticmethod
    def forward(ctx, q, k, v, causal, group, layout, bug):
        rank, p, s = dist.get_rank(group), dist.get_world_size(group), q.shape[1]
        ctx.facts = (rank, p, causal, group, layout, bug)
        out = lse = None
        block = (k.contiguous(), v.contiguous())
        for t in range(p):
            source = (rank + t) % p if bug == "wrong source" else (rank - t) % p
            qpos, kpos = keys_of(rank, p, s, layout), keys_of(source, p, s, layout)
            if bug == "local causal":
                qpos = kpos = torch.arange(s)
            scores = scores_of(q, block[0], qpos, kpos, causal)
            part_lse = scores.logsumexp(-1)
            weights = (scores - part_lse.masked_fill(part_lse == -math.inf, 0)[..., None]).exp()
            wide_v = block[1].repeat_interleave(q.shape[2] // k.shape[2], 2).to(weights.dtype)
            part = torch.einsum("bhqk,bkhd->bqhd", weights, wide_v)
            if out is None:
                out, lse = part, part_lse
            else:
                new = torch.logaddexp(lse, part_lse)
                safe = new.masked_fill(new == -math.inf, 0)
                a, b = ((x - safe).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))
                out, lse = (out + part, new) if bug == "added" else (a * out + b * part, new)
                if bug == "bf16":
                    out = out.to(q.dtype).float()
            if t + 1 < p:
                block = turn(block, group, bug)
            if bug == "early stop" and rank == 0 and t == 0 and p > 2:
                break
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        rank, p, causal, group, layout, bug = ctx.facts
        s, g, wide = q.shape[1], k.shape[2], out.dtype
        do = do.to(wide)
        D = (do * out).sum(-1).transpose(1, 2) - dlse
        dq, block = torch.zeros_like(q, dtype=wide), (k.contiguous(), v.contiguous())
        grads = tuple(torch.zeros(x.shape, dtype=wide) for x in (k, v))  # contiguous, whatever k and v are
        for t in range(p):
            scores = scores_of(q, block[0], keys_of(rank, p, s, layout), keys_of((rank - t) % p, p, s, layout), causal)
            mine = scores.logsumexp(-1) if bug == "block lse" else lse
            P = (scores - mine.masked_fill(mine == -math.inf, math.inf)[..., None]).exp()
            wide_k, wide_v = (x.repeat_interleave(q.shape[2] // g, 2).to(wide) for x in block)
            dS = P * (torch.einsum("bqhd,bkhd->bhqk", do, wide_v) - D[..., None]) / math.sqrt(q.shape[-1])
            dq = dq + torch.einsum("bhqk,bkhd->bqhd", dS, wide_k)
            dk = torch.einsum("bhqk,bqhd->bkhd", dS, q.to(wide)).unflatten(2, (g, -1)).sum(3)
            dv = torch.einsum("bhqk,bqhd->bkhd", P, do).unflatten(2, (g, -1)).sum(3)
            grads = (grads[0] + dk, grads[1] + dv)
            if t + 1 < p:
                block = turn(block, group)
            if (t + 1 < p or bug != "not home") and p > 1:
                grads = turn(grads, group)
        return dq.to(q.dtype), grads[0].to(k.dtype), grads[1].to(v.dtype), None, None, None, None


def ring(q, k, v, *, causal, group, layout="contiguous", bug=""):
    """A rotating ring."""
    return Ring.apply(q, k, v, causal, group, layout, bug)


class Sliced(Gather):
    """An all-gather whose backward slices instead of reducing."""

    @staticmethod
    def backward(ctx, grad):
        size = grad.shape[1] // dist.get_world_size(ctx.group)
        return grad.narrow(1, size * dist.get_rank(ctx.group), size), None


# --------------------------------------------------------------------------------------------------
# - no false alarms

DECLARED = {"causal", "gqa", "lse", "subgroup"}


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("zigzag", marks=pytest.mark.slow), "striped"])
@pytest.mark.parametrize("fn", [gathering, ring])
def test_correct_code_passes(fn, layout, pool):
    report = check(functools.partial(fn, layout=layout), layout=layout, features=DECLARED, quick=True, pool=pool)
    assert report, str(report)
    assert len(report.passed) > 8


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("fn", [gathering, ring])
def test_correct_code_passes_every_case(fn, layout, pool):
    report = check(functools.partial(fn, layout=layout), layout=layout, features=DECLARED, pool=pool)
    assert report, str(report)
    assert report.seconds < 120


NATIVE = set(inspect.signature(ringref.ring_attention).parameters)
OURS = set(FEATURES) - {"score_mod", "value_dim", "sink"}  # the window and the documents are masks like any other
OURS |= {"score_mod", "value_dim"} if "score_mod" in NATIVE else set()
OURS |= {"sink"} if hasattr(ringref, "sink") else set()


def ours(
    q, k, v, *, causal, group, method, layout, backend,
    window=None, cu_seqlens=None, mask_mod=None, sink=None, positions=None, kv_positions=None, **told,
):  # fmt: skip
    """One of our methods as the oracle calls a candidate, with every feature that it has."""
    place = ringref.ProcessRing(group)
    shard = ringref.Shard(positions, place, kv_positions) if positions is not None else None
    if shard is None:
        shard = ringref.partition(q.shape[1] * place.size, place, layout)
    if kv_positions is not None and q.shape[1] == 1 and place.size > 1 and len({*all_of(positions, place)}) == 1:
        raise NotImplementedError("a query has one rank")
    told |= {name: x for name, x in (("window", window), ("cu_seqlens", cu_seqlens)) if x is not None}
    if "window" not in NATIVE:
        window, starts = told.pop("window", (math.inf, math.inf)), told.pop("cu_seqlens", torch.zeros(1))
        mask = mask_mod or (lambda b, h, q, k: True)
        document = lambda x: (x[..., None] >= starts).sum(-1)
        near = lambda q, k: (q - k <= window[0]) & (k - q <= window[1]) & (document(q) == document(k))
        mask_mod = lambda b, h, q, k: mask(b, h, q, k) & near(q, k)
    attention = getattr(ringref, f"{method}_attention")
    found = attention(q, k, v, causal=causal, mask_mod=mask_mod, shard=shard, backend=backend, **told)
    return found if sink is None else ringref.sink(found, sink)


def all_of(positions, place):
    return torch.cat(place.gather(positions, [positions.shape] * place.size)).tolist()


BACKENDS = [(m, b) for m in ("dense", "dilated", "collective", "ring") for b in ("auto", "math", "torch")]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("method", "backend"), [x for x in BACKENDS if x != ("dense", "torch")])
def test_our_methods_pass_with_every_feature_on_every_layout_and_backend(method, backend, layout, pool):
    # a fused kernel that is asked for by name takes no mask
    features = OURS - ({"mask", "window", "cu_seqlens", "score_mod"} if backend == "torch" else set())
    fn = functools.partial(ours, method=method, layout=layout, backend=backend)
    report = check(fn, layout=layout, features=features, quick=backend != "auto", pool=pool)
    assert report, str(report)


@pytest.mark.parametrize("method", ["dense", "dilated", "collective", "ring"])
def test_our_methods_pass(method, pool):
    fn = functools.partial(ours, method=method, layout="zigzag", backend="auto")
    assert (report := check(fn, layout="zigzag", features={"causal", "gqa", "lse"}, quick=True, pool=pool)), str(report)


@pytest.mark.parametrize("case", cases(features={"causal"}, ranks=2, quick=True)[::9], ids=str)
def test_one_line_makes_a_pytest_test(case):
    assert check(ring, only=[case])


# --------------------------------------------------------------------------------------------------
# mistakes and causes

MISTAKES = {
    "local causal": "causal mask in local coordinates at every hop",
    "wrong source": "wrong source rank",
    "added": "are added",
    "block lse": "lse of blocks for the merged lse",
    "not home": "end on the wrong rank",
    "one buffer": "two receives into one buffer",
    "in place": "receiving into the buffer being sent",
    "no wait": "read before its wait",
    "never waits for sends": "unfinished work",
    "early stop": "unequal hop counts",
    "global rank": "group rank",
    "bf16": "low precision",
}


@pytest.mark.parametrize("bug", MISTAKES)
def test_mistakes_are_named(bug, pool):
    features = {"causal", "subgroup"} if bug == "global rank" else {"causal"}
    report = check(functools.partial(ring, bug=bug), features=features, quick=True, pool=pool, stop_after=4)
    assert not report
    assert MISTAKES[bug] in report.diagnosis, str(report)
    assert max(map(len, str(report).splitlines())) <= 80
    json.loads(report.to_json())


def own_sum(s):
    outs, lses, _ = s.forward(times=next(s.parts(s.hop))[1]).values()
    return {"out": (outs * rows((lses - lses[0]).exp())).sum(0), "lse": lses[0]}


def own_maximum(s):
    return {"lse": s.L - s.top + s.forward(times=s.times * (s.hop == 0))["top"]}


def seen(s, pairs):
    return {name: x for name, x in s.forward(times=s.times.clamp(max=0) + pairs).items() if name != "top"}


def seen_with(s, **changed):
    return {name: x for name, x in s.forward(**changed).items() if name != "top"}


def later_block(s):  # the first rank's block sees what a later rank's sees, the late half of the queries all of it
    late = 2 * s.here >= s.case.n // s.p
    return seen(s, torch.where((s.theirs == 0) & (s.mine > 0), late, s.j <= s.i))


def numerator(s):  # of a running softmax over tiles of 24 keys, whose sum alone follows the maximum
    S = torch.einsum("bqhd,bkhd->bhqk", s.q, s.K) * s.scale
    tops = [S[..., : a + 24].amax(-1, keepdim=True) for a in range(0, s.case.n, 24)]
    P = torch.cat([(x - top).exp() for x, top in zip(S.split(24, -1), tops, strict=True)], -1)
    return {"out": torch.einsum("bhqk,bkhd->bqhd", P, s.V) / rows((S - tops[-1]).exp().sum(-1))}


def before_last(s):  # of the blocks that a rank meets, the lse
    early = s.forward(times=s.times * (s.hop < s.p - 1))["lse"]
    return {n: x for n, x in s.backward(L=early[..., None]).items() if n in ("dq", "dk", "dv")}


def strided_heads(s):
    of = torch.tensor([0, 3, 0, 3, 0, 3])
    mine = {"K": s.K[:, :, of], "V": s.V[:, :, of], "gather": lambda x: x.flatten(2, 3).unflatten(2, (3, 2)).sum(2)}
    return s.backward(**mine)


def past_the_mod(s):
    slope = s.scores(s)[1]
    return gradients(s, "dq", "dk", D=(s.D - s.dlse[..., None]) / slope + s.dlse[..., None])


def by_its_own_maximum(s):  # a running softmax over the blocks, in order of hop
    S, top, total, out = s.scores(s)[0], torch.tensor(-math.inf), torch.zeros(()), 0.0
    for t in range(s.p):
        block = S.masked_fill(s.hop != t, -math.inf)
        own = block.amax(-1)
        faded, top = (top - own).exp(), torch.maximum(own, top)
        P = (block - top[..., None]).exp()
        total = total * faded + P.sum(-1)
        out = out * rows(faded) + torch.einsum("bhqk,bkhd->bqhd", P, s.V)
    return {"out": out / rows(total)}


def reverse(s):
    outs, lses, _ = s.forward(times=dict(s.parts(s.hop))["branches"]).values()
    return (outs * rows(lses.softmax(0).flip(0))).sum(0)


def permuted(s):
    at = torch.cat(s.case.shards)
    return {n: x[:, at[at]] for n, x in s.backward().items() if n in ("dk", "dv")}


def swapped_at_hops(s):  # dk and dv, once for each hop that is left
    parts = [s.backward(times=s.times * (s.hop == t)) for t in range(s.p)]
    names = ("dk", "dv")
    return {n: sum(x[names[(i + s.p - t) % 2]] for t, x in enumerate(parts)) for i, n in enumerate(names)}


def stays(s):  # the q, or dO, of the rank that has the keys, for every query of a block; by block, without indices
    found = {"dq": 0, "dk": 0}
    for mine, theirs in itertools.product(range(s.p), range(s.p)):
        block = s.times * ((s.mine == mine) & (s.theirs == theirs))
        do = s.do.clone()
        do[:, s.case.asks[mine]] = s.do[:, s.case.asks[theirs]]
        part = s.backward(times=block, do=do, D=s.D)
        found = {n: x + part[n] for n, x in found.items()} | {"dv": found.get("dv", 0) + part["dv"]}
    return found


def halves_swapped(s, x):  # positions in a zigzag layout of two ranks, 16 tokens in quarters 0 3 | 1 2
    return torch.tensor([12, 8, 4, 0])[x // 4] + x % 4


def partly_causal(s):  # branches of a causal one alone see no less; the second has forgotten it
    one, two = (replace(s.case, causal=c, dilation=((w,), (r,))).times for w, r, c in ((4, 1, True), (24, 2, False)))
    return one + two


def shifted_heads(s):  # out of the next head, and nothing for the last
    return {"out": torch.cat([s.O[:, :, 1:], s.O[:, :, :1] * 0], 2)}


def by_block(s):  # out and lse of every hop's block alone
    return [seen(s, s.hop == t).values() for t in range(s.p)]


def largest(s):
    top = torch.stack([lse for _, lse in by_block(s)]).amax(0)
    return {"out": sum(out * rows((lse - top).exp()) for out, lse in by_block(s)), "lse": top}


def uncapped(s):  # what is masked has the score of the cap
    S = torch.einsum("bqhd,bkhd->bhqk", s.q, s.K) * s.scale
    P = torch.where(s.j <= s.i, 1.5 * (S / 1.5).tanh(), -1.5)
    return {"out": torch.einsum("bhqk,bkhd->bqhd", P.softmax(-1), s.V), "lse": P.logsumexp(-1)}


def earlier(x):  # positions in the same layout, the late quarter of each rank taken for the one before it
    return x - 4 * (x >= 8)


def other_half(s):  # has the lse that the backward uses on blocks of later ranks
    lse = s.L[..., halves_swapped(s, torch.arange(16))][..., None]
    return s.backward(L=torch.where(s.theirs > s.mine, lse, s.L[..., None]))


def packed(s):  # two heads' rows of twelve, in a matrix that is read two heads a row
    return torch.arange(12).repeat_interleave(2).view(2, 12, 1).repeat(2, 1, 1)


NEAR, SUNK = Case("near", p=4, n=32, window=(3, 2)), Case("sink", p=2, n=12, sink=True)
FULL, CAUSAL = Case("full", p=3, n=18), Case("causal", p=3, n=18, causal=True)
BRANCHES = Case("dilation", p=2, n=24, dilation=((4, 24), (1, 2)))
QUARTERS = Case("causal", p=2, n=16, causal=True, layout="zigzag")
ALTERED = {  # numbers that a mistake would give, and what they are called
    "the sink is missing in lse, but not in out": (SUNK, lambda s: {"lse": s.forward(sink=None)["lse"]}),
    "the sink is missing in out, but not in lse": (SUNK, lambda s: {"out": s.forward(sink=None)["out"]}),
    "divided by the sum of the first of blocks alone": (Case("full", p=3, n=18), own_sum),
    "the maximum of the first of blocks alone": (Case("full", p=3, n=18), own_maximum),
    "window (left) ignored for the first token": (
        NEAR, lambda s: seen(s, ((s.i - s.j <= 3) | (s.j == 0)) & (s.j - s.i <= 2))
    ),
    "ignored, but for blocks of which nothing is seen": (
        NEAR, lambda s: seen(s, (s.mine - s.theirs).abs() <= 1)
    ),
    "as for a later block, on the first rank's block": (
        Case("causal", p=3, n=24, causal=True, layout="zigzag"), later_block
    ),
    "kept by its shape": (
        Case("causal", p=2, n=12, causal=True), lambda s: seen(s, (s.here >= s.there) & (s.mine >= s.theirs))
    ),
    "score_mod of heads counted from 0 on every rank": (
        Case("bias", p=2, n=12, score_mod="bias"),
        lambda s: {n: x for n, x in s.forward(at=(s.at[0], s.at[1] % 2, *s.at[2:])).items() if n != "top"},
    ),
    "causal mask aligned bottom-right on every rank, keys only": (CAUSAL, lambda s: seen(s, s.there + 12 <= s.i)),
    "numerator is not rescaled when the maximum grows (tiles of 24 keys)": (
        Case("full", p=2, n=72, sharp=2.0), numerator
    ),
    "the lse from before the last of the blocks": (FULL, before_last),
    "rows of K, V lie in the order of an inverse permutation": (
        Case("full", p=3, n=24, layout="zigzag"), permuted
    ),
    "score_mod in local coordinates at every hop": (
        Case("bias", p=2, n=12, score_mod="bias"),
        lambda s: {n: x for n, x in s.forward(at=(*s.at[:2], s.here, s.there)).items() if n != "top"},
    ),
    "blocks are skipped of which the window (left) hides the first key from the first query": (
        NEAR, lambda s: seen(s, (s.i - s.j <= 3) & (s.j - s.i <= 2) & (s.mine * 8 - s.theirs * 8 <= 3))
    ),
    "in the backward only: causal mask with the halves of a shard swapped": (
        QUARTERS,
        lambda s: s.backward(times=s.times * 0 + (halves_swapped(s, s.j) <= halves_swapped(s, s.i))),
    ),
    "causal mask: ignored where the rate is more than 1": (
        Case("dilation", p=1, n=24, causal=True, dilation=((4, 24), (1, 2))),
        lambda s: seen(s, partly_causal(s)),
    ),
    "causal mask ignored, on the sequences after the first only": (
        CAUSAL, lambda s: seen(s, (torch.arange(2)[:, None, None, None] > 0) | (s.j <= s.i))
    ),
    "with the keys' positions taken for the queries'": (
        Case("causal", p=2, n=12, causal=True, queries=4), lambda s: seen(s, s.j <= s.mine * 6 + s.here)
    ),
    "causal mask with 2p − 2 − rank for the late half": (
        QUARTERS, lambda s: seen(s, earlier(s.j) <= earlier(s.i))
    ),
    "causal mask with p + rank for the late half, queries only": (
        QUARTERS, lambda s: seen(s, s.j <= s.i + (2 * s.mine + 1 - s.p) * (len(s.case.shards[0]) // 2) * late(s))
    ),
    "dilation offsets: j · r div h for j mod r": (
        Case("dilation", p=1, n=24, h=6, g=6, dilation=((8,), (2,))),
        lambda s: seen(s, (s.i // 8 == s.j // 8) & (s.i % 2 == s.at[1] // 3) & (s.j % 2 == s.at[1] // 3)),
    ),
    "a tail that fills no segment is dropped, be it the whole sequence": (
        Case("dilation", p=1, n=10, dilation=((4, 16), (1, 2))), lambda s: seen(s, (s.i // 4 == s.j // 4) & (s.j < 8))
    ),
    "the gradient of lse, b h s, is read as if it were b s h": (
        Case("full", p=1, n=12), lambda s: s.backward(dlse=s.dlse.reshape(len(s.dlse), 12, -1).mT)
    ),
    "dk is wrong by a factor 1/(scale·√d)": (
        Case("scale", p=1, n=12, scale=0.9), lambda s: {"dk": s.backward()["dk"] * s.case.d**-0.5 / 0.9}
    ),
    "rows of dk are right ones of another token, or zero": (
        Case("full", p=1, n=12),
        lambda s: {"dk": s.backward()["dk"].roll(-3, 1) * (torch.arange(12) < 9)[:, None, None]},
    ),
    "the lse is that of the other half of a shard, on blocks of later ranks only": (QUARTERS, other_half),
    "causal mask with rows packed head by head taken for query by query": (
        Case("causal", p=2, n=12, g=2, causal=True), lambda s: seen(s, s.j <= packed(s))
    ),
    "window (left) with the last query's position for every query's": (
        NEAR, lambda s: seen(s, (31 - s.j <= 3) & (s.j - s.i <= 2))
    ),
    "of which the window hides the first key from the first query": (
        NEAR, lambda s: seen(s, s.times * (s.mine == s.theirs))
    ),
    "a rank's rows after the last whole tile of 16, and keys after it do not count": (
        Case("full", p=2, n=40), lambda s: seen(s, (s.here < 16) & (s.there < 16))
    ),
    "a segment's rows beyond w div r are dropped": (
        Case("dilation", p=1, n=15, dilation=((5,), (2,))), lambda s: seen(s, s.times * (s.i % 5 < 4) * (s.j % 5 < 4))
    ),
    "the log of how often a key counts is base 2": (
        BRANCHES, lambda s: seen(s, torch.where(s.times == 2, math.e, s.times))
    ),
    "lse is the maximum plus log2 of the sum": (
        FULL, lambda s: {"lse": s.top + (s.L - s.top).exp().log2()}
    ),
    "only the first of blocks is in the numerator": (
        FULL, lambda s: {"out": seen(s, s.hop == 0)["out"] * rows((seen(s, s.hop == 0)["lse"] - s.L).exp())}
    ),
    "blocks are merged by the largest lse": (FULL, largest),
    "segments: of w · r tokens": (
        Case("dilation", p=1, n=24, dilation=((4,), (2,))),
        lambda s: seen(s, (s.i // 8 == s.j // 8) & ((s.i % 2 == s.at[1] % 2) & (s.j % 2 == s.at[1] % 2))),
    ),
    "mask_mod and the other masks are joined by or": (
        Case("mask", p=2, n=12, causal=True, mask="heads"),
        lambda s: seen(s, (s.j <= s.i) | ((s.i + 2 * s.j + 3 * s.at[1] + s.at[0]) % 4 != 0)),
    ),
    "score_mod comes after the mask": (Case("softcap", p=2, n=12, causal=True, score_mod="softcap"), uncapped),
    "dk and dv are swapped at every hop": (FULL, swapped_at_hops),
    "rows of dO stay while queries travel": (FULL, stays),
    "rows of out have heads padded at the end, cut in front": (Case("full", p=3, n=18, h=5, g=5), shifted_heads),
    "lse is that of the largest of the branches": (
        BRANCHES, lambda s: {"lse": torch.maximum(*s.forward(times=dict(s.parts(s.hop))["branches"])["lse"])}
    ),
    "branches have each other's weights": (BRANCHES, lambda s: {"out": reverse(s)}),
    "in dq, dk only: the row sum D is that of the keys' rank, on hop 1 only": (
        FULL, lambda s: gradients(s, "dq", "dk", D=torch.where(s.hop == 1, of_the_keys_rank(s), s.D))
    ),
    "in dq, dk only: the gradient of lse has query heads interleaved": (
        Case("grouped", p=2, n=12, h=6, g=2, dlse=True),
        lambda s: gradients(s, "dq", "dk", dlse=s.dlse[:, [0, 3, 1, 4, 2, 5]]),
    ),
    "in the backward only: query head j is worked with key/value head j mod g, and adds to it": (
        Case("grouped", p=2, n=12, h=6, g=2), strided_heads
    ),
    "K and V are those of the other half of a shard, on received blocks only": (
        QUARTERS, lambda s: seen(s, torch.where(s.theirs < s.mine, 2 * s.there >= s.case.n // s.p, s.j <= s.i))
    ),
    "in dq, dk only: the row sum D is that of the first 16 queries, for every 16 of them": (
        Case("full", p=2, n=40), lambda s: gradients(s, "dq", "dk", D=s.D[:, :, torch.arange(40) % 16])
    ),
    "in dq, dk only: the row sum D misses the derivative of score_mod": (
        Case("softcap", p=2, n=12, causal=True, score_mod="softcap"), past_the_mod
    ),
    "in dsink only: the sink's gradient is of the first rank's rows alone": (
        Case("sink", p=3, n=12, sink=True),
        lambda s: gradients(s, "dsink", over=lambda x: (x * (s.owner[0] == 0)).sum((0, 2))),
    ),
    "what runs is rescaled by exp(old − own maximum)": (FULL, by_its_own_maximum),
    "rows of K, V are the last rank's on every rank": (
        FULL, lambda s: seen_with(s, **{x: s.moved(getattr(s, x), lambda y: y[:, -1:].expand_as(y)) for x in "KV"})
    ),
    "rows of out are zero for the heads that are left over": (
        Case("full", p=2, n=12, h=5, g=5), lambda s: {"out": s.O * (torch.arange(5) < 4)[:, None]}
    ),
    "key/value heads counted from a rank's first query head (K and V)": (
        Case("full", p=2, n=12, h=6, g=3),
        lambda s: seen_with(s, **{x: getattr(s, x)[:, :, [0, 0, 2, 2, 2, 4]] for x in "KV"}),
    ),
    "in dk, dv only: without what was added before a hop that is skipped": (
        CAUSAL, lambda s: gradients(s, "dk", "dv", times=s.times * (s.theirs == 0))
    ),
    "rows of out are right ones of another rank and head": (
        FULL, lambda s: {"out": s.moved(s.O, lambda y: y.roll((1, 1), (1, 3)))}
    ),
}  # fmt: skip


def of_the_keys_rank(s):
    return s.D[..., 0][..., torch.stack(s.case.asks)[s.theirs, s.here]]


def past_the_mod(s):
    slope = s.scores(s)[1]
    D = (s.D - s.dlse[..., None]) / slope + s.dlse[..., None]
    return gradients(s, "dq", "dk", D=D)


def by_its_own_maximum(s):  # a running softmax over the blocks, in order of hop
    S = s.scores(s)[0]
    top, total, out = -math.inf, 0.0, 0.0
    for t in range(s.p):
        block = S.masked_fill(s.hop != t, -math.inf)
        own = block.amax(-1)
        new = torch.maximum(own, torch.as_tensor(top))
        faded, P = (top - own).exp() if t else 0.0, (block - new[..., None]).exp()
        total = total * faded + P.sum(-1)
        out = out * (rows(faded) if t else 0.0) + torch.einsum("bhqk,bkhd->bqhd", P, s.V)
        top = new
    return {"out": out / rows(total)}


def late(s):
    return s.here >= len(s.case.shards[0]) // 2


def causes_of(case, change):
    truth = Truth(case, case.data())
    wrong = change(Scene(truth))
    got = {name: [truth.part(name, r, truth.whole | wrong) for r in range(case.p)] for name in truth.whole}
    return diagnose.name(truth, got, list(wrong), [], [])


@pytest.mark.parametrize("says", ALTERED)
def test_numbers_are_named(says):
    assert says in causes_of(*ALTERED[says])[0]


def left_out(s, pairs):
    return seen(s, s.times * ~pairs)


def weighted(s, weights):  # blocks in order of hop; weights by their lse and the merged one
    lses = torch.stack([lse for _, lse in by_block(s)])
    return {"out": sum(out * rows(w) for (out, _), w in zip(by_block(s), weights(lses, s.L)))}


def not_rescaled(x, L):  # the running output at the last hop
    return torch.cat([(x[:2] - x[:2].logsumexp(0)).exp(), (x[2:] - L).exp()])


def swapped_at_last(x, L):
    run = x[:2].logsumexp(0)
    return torch.cat([(x[:2] - run + x[2] - L).exp(), (run - L).exp()[None]])


def base_two(x, L):  # what comes, at every hop
    run = x.logcumsumexp(0)
    return torch.cat([(x[:1] - L).exp(), (x[1:] - run[1:]).exp2() * (run[1:] - L).exp()])


def gradients(s, *names, **changed):
    return {n: x for n, x in s.backward(**changed).items() if n in names}


def added(s, pairs, by):  # dk and dv of some pairs, to another rank's
    part, rest = (gradients(s, "dk", "dv", times=s.times * some) for some in (pairs, ~pairs))
    return {n: rest[n] + s.moved(part[n], lambda y: y.roll(by, 1)) for n in part}


def running(s):  # the lse of a hop and those before it, for each pair
    run = torch.stack([lse for _, lse in by_block(s)]).logcumsumexp(0)
    return sum(torch.where(s.hop == t, x[..., None], 0.0) for t, x in enumerate(run))


def stray(s):
    return {"out": s.O + torch.randn(s.O.shape, generator=torch.Generator().manual_seed(0))}


LONG = Case("full", p=2, n=80)
READ = {  # what no guess says, and the numbers do
    "pairs are left out: hop 1, head 2": (FULL, lambda s: left_out(s, (s.at[1] == 2) & (s.hop == 1))),
    "pairs count half: hop 1": (FULL, lambda s: seen(s, s.times * (1 - 0.5 * (s.hop == 1)))),
    "pairs are left out: received blocks, the query's row in its shard 0": (
        FULL, lambda s: left_out(s, (s.here == 0) & (s.hop > 0))
    ),
    "pairs are seen that should be hidden: what the window (left) hides, j − i ≥ -6": (
        NEAR, lambda s: seen(s, (s.i - s.j <= 6) & (s.j - s.i <= 2))
    ),
    "pairs are left out: received blocks, the query's row in its shard ≥ 32, the key's row in its shard ≤ 2": (
        LONG, lambda s: left_out(s, (s.here >= 32) & (s.there < 3) & (s.hop > 0))
    ),
    "pairs are seen that should be hidden: what the mask_mod shows, j − i ≤ 2": (
        Case("mask", p=2, n=12, causal=True, mask="heads"),
        lambda s: seen(s, (s.j <= s.i + 2) & ((s.i + 2 * s.j + 3 * s.at[1] + s.at[0]) % 4 != 0)),
    ),
    "in lse only: pairs are left out: blocks of later ranks": (
        QUARTERS, lambda s: {"lse": left_out(s, s.theirs > s.mine)["lse"]}
    ),
    "in the numerator of out only: pairs count twice: hop 1": (
        FULL, lambda s: weighted(s, lambda x, L: (x - L).exp() * torch.tensor([1, 2, 1])[:, None, None, None])
    ),
    "in the sum that out is divided by: pairs count half: the key's rank 0": (
        FULL, lambda s: {"out": s.O * rows((s.L - seen(s, 1 - 0.5 * (s.theirs == 0))["lse"]).exp())}
    ),
    "they are exp(lse − lse up to hop 1) (they add up to more than 1): hop ≤ 1": (
        FULL, lambda s: weighted(s, not_rescaled)
    ),
    "running and new output have those of −lse at the last hop": (FULL, lambda s: weighted(s, swapped_at_last)),
    "they are exp(ln 2 · lse − ln 2 · running lse) when they are merged": (FULL, lambda s: weighted(s, base_two)),
    "in dq, dk only: the row sum D is wrong by a factor 1/2: received blocks": (
        FULL, lambda s: gradients(s, "dq", "dk", D=s.D * torch.where(s.hop > 0, 0.5, 1.0))
    ),
    "in dk, dv only: pairs count twice: the query's rank 1": (
        FULL, lambda s: gradients(s, "dk", "dv", times=s.times * (1 + (s.mine == 1).double()))
    ),
    "in dk, dv only: query heads 0, 3 add nothing": (
        Case("grouped", p=2, n=12, h=4, g=2),
        lambda s: gradients(s, "dk", "dv", gather=lambda x: torch.stack([x[:, :, 0, 1], x[:, :, 1, 0]], 2)),
    ),
    "in dk, dv only: pairs are left out: the last hop; pairs are added to rank r-1: the last hop": (
        FULL, lambda s: added(s, s.hop == 2, 2)
    ),
    "in the backward only: pairs are left out: hop 1, the query's row in its shard 0": (
        FULL, lambda s: s.backward(times=s.times * ~((s.here == 0) & (s.hop == 1)))
    ),
    "in the backward only: rows of P of blocks are off by factors: they are exp(merged lse − running lse): hop ≤ 1": (
        FULL, lambda s: s.backward(L=running(s))
    ),
    "q is that of the other half of a shard, on blocks of later ranks only": (
        QUARTERS, lambda s: seen_with(s, q_of=torch.where(s.theirs > s.mine, halves_swapped(s, s.i), s.i))
    ),
    "unknown signature: out is wrong on ranks 0, 1, 2, every head, every position": (FULL, stray),
}  # fmt: skip


@pytest.mark.parametrize("says", READ)
def test_numbers_that_nobody_guessed_are_read(says):
    told, *_ = causes_of(*READ[says])
    assert told.endswith(says) or f"{says}: everywhere" in told or f"{says} (they add" in told, told


@pytest.mark.parametrize("what, names", [("lse", ("L",)), ("row sum D", ("D",)), ("K and V", ("K", "V"))])
def test_what_the_next_call_overwrites_is_named(what, names):
    truth, other = (Truth(case, case.data()) for case in (FULL, replace(FULL, seed=1)))
    kept = {
        name: getattr(other.scene, name)[..., None] if name == "L" else getattr(other.scene, name) for name in names
    }
    wrong = Scene(truth).backward(**kept)
    got = {name: [truth.part(name, r, truth.whole | wrong) for r in range(FULL.p)] for name in truth.whole}
    told = diagnose.name(truth, got, list(wrong), [other], [])
    assert told[0] == f"{diagnose.CALLS} the {what} that one saved is overwritten by the next", told


def test_an_out_that_comes_without_its_lse_is_read():
    truth = Truth(CAUSAL, CAUSAL.data())
    wrong = left_out(truth.scene, (truth.scene.here >= 3) & (truth.scene.j == truth.scene.i - 1))
    got = {"out": [truth.part("out", r, wrong) for r in range(3)]}
    says = "pairs are left out: the late half of the queries, j − i -1"
    assert says in diagnose.name(truth, got, ["out"], [], [])


def halved(q, k, v, **told):
    return gathering(q, k, v, **told)[0] / 2


def test_a_long_case_that_fails_is_told_by_a_shorter_one(pool):
    case = Case("full + 70 tokens a rank + uneven", p=2, n=135, b=1, lengths=(80, 55), cu_seqlens=(0, 60, 135))
    shorter = Case("full + 24 tokens a rank + uneven", p=2, n=49, lengths=(29, 20), cu_seqlens=(0, 21, 49))
    assert case.shorter() == shorter and shorter.filled().shorter() == shorter
    report = check(halved, only=[Case("full + 70 tokens a rank", p=1, n=70, b=1)], pool=pool)
    assert report.findings[0].case == "full + 24 tokens a rank", str(report)


def test_what_is_wrong_in_the_world_is_not_blamed_on_the_group(pool):
    some = [Case("full"), Case("subgroup", causal=True, groups=((0, 2), (1, 3)))]
    report = check(functools.partial(ring, bug="local causal"), only=some, pool=pool)
    assert report.findings and not any(diagnose.GROUP in f.causes for f in report.findings), str(report)


def test_what_two_ranks_cannot_tell_from_much_else_is_believed_last():
    case = Case("near", p=2, n=6, window=(1, 1), cu_seqlens=(0, 1, 5, 6))
    assert "ranks counted from the end" in causes_of(case, lambda s: seen(s, s.times * (s.mine == s.theirs)))[-1]


@pytest.mark.parametrize(
    "name, features",
    [
        ("rotating_equal_shards_for_positions", {"causal", "uneven"}),
        ("rotating_sends_before_wait", {"causal"}),
        ("serving_score_mod_not_differentiated", {"causal", "score_mod"}),
    ],
)
def test_a_quick_sweep_names_them_too(name, features, pool):
    report = check(zoo.build(name), features=features, quick=True, pool=pool)
    assert SAYS[zoo.info(name).slug] in (report.diagnosis or ""), str(report)


def test_a_simpler_case_is_one_that_was_asked(pool):
    decode = {"queries": 1, "replicated": True, "plan": "inference"}
    case = Case("causal + d 12 + decode", p=2, n=12, d=12, causal=True, **decode)
    assert case.without(["plan", "causal"]) == Case("full + d 12 + decode", p=2, n=12, d=12, **decode)
    assert case.without(["d"]).name == "causal + decode"
    report = check(zoo.build("serving_kv_positions_ignored"), only=[case], pool=pool)
    assert "positions of queries taken for those of keys" in report.diagnosis, str(report)


@pytest.mark.parametrize(
    "name, kind, says",
    [
        ("rotating_one_shift_for_all", "crash", "a rank without tokens makes it raise: it raises RuntimeError"),
        ("rotating_equal_shards_assumed", "message", "message of the wrong size"),
    ],
)
def test_an_empty_rank_is_told_from_what_it_hides(name, kind, says, pool):
    case = Case("full + empty", p=2, n=4, lengths=(0, 4), positions=True)
    report = check(zoo.build(name), only=[case], pool=pool)
    assert says in report.diagnosis or says in report.findings[0].diagnosis, str(report)
    assert [f.kind for f in report.findings] == [kind]


@pytest.mark.parametrize("fn, holds", [(ring, True), (gathering, False)])
def test_only_a_ring_holds_what_a_ring_holds(fn, holds, pool):
    report = check(fn, features={"causal"}, claims="ring", quick=True, pool=pool)
    assert bool(report) == holds, str(report)
    assert report.growth


def test_a_gather_that_slices_is_named(pool):
    report = check(functools.partial(gathering, wrap=Sliced), features={"causal"}, quick=True, pool=pool, stop_after=2)
    assert "zero but for the own block" in report.diagnosis, str(report)


# --------------------------------------------------------------------------------------------------
# - holes that there were: each of these passed, as all inputs were alike


class Handed(torch.autograd.Function):
    """out as it is; its gradient as somebody would misread it."""

    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, do):
        if 0 in do.stride() and do.numel() > 1:  # out.sum() expands one number
            return torch.cat([do.flatten()[:1], do.new_zeros(do.numel() - 1)]).view(do.shape)
        return do.as_strided(do.shape, torch.empty(do.shape, device="meta").stride())


def strided(q, k, v, **told):
    out, lse = gathering(q, k, v, **told)
    return Handed.apply(out), lse


def by_tiles(q, k, v, *, causal, group):
    """One rank's causal mask counts from a tile of 32: right until there is a second."""
    if dist.get_world_size(group) > 1:
        return gathering(q, k, v, causal=causal, group=group)
    i = torch.arange(q.shape[1])
    scores = scores_of(q, k, i % 32, i % 32, causal) if causal else scores_of(q, k, i, i, False)
    weights = scores.masked_fill(causal & (i // 32 > i[:, None] // 32), -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v.repeat_interleave(q.shape[2] // v.shape[2], 2))


def padded(q, k, v, **told):
    """The head dim is padded to a multiple of 8, and the scale taken after."""
    q, k = (torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k))
    return gathering(q, k, v, **told)


def unscaled(q, k, v, *, scale=None, **told):
    return gathering(q, k, v, **told)


def remembering(q, k, v, *, causal, group):
    """What is kept between calls has too small a key."""
    kept = vars(remembering).setdefault("kept", {})
    causal = kept.setdefault((q.shape[1], dist.get_world_size(group)), causal)
    return gathering(q, k, v, causal=causal, group=group)


class Reused(torch.autograd.Function):
    """What the backward needs is kept in a buffer of its shape, which the next forward fills again."""

    buffers = {}

    @staticmethod
    def forward(ctx, q, k):
        ctx.kept = [Reused.buffers.setdefault((i, x.shape, x.dtype), torch.empty_like(x)) for i, x in enumerate((q, k))]
        for buffer, x in zip(ctx.kept, (q, k)):
            buffer.copy_(x)
        return torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5

    @staticmethod
    def backward(ctx, dS):
        q, k = ctx.kept
        dS = dS * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bkhd->bqhd", dS, k), torch.einsum("bhqk,bqhd->bkhd", dS, q)


def reusing(q, k, v, *, causal, group):
    if dist.get_world_size(group) > 1 or k.shape != q.shape:
        return gathering(q, k, v, causal=causal, group=group)
    scores = Reused.apply(q, k)
    i = torch.arange(q.shape[1])
    scores = scores.masked_fill(i > i[:, None], -math.inf) if causal else scores
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def one_maximum(q, k, v, *, causal, group):
    """All rows are shifted by one maximum."""
    if dist.get_world_size(group) > 1:
        return gathering(q, k, v, causal=causal, group=group)
    i = torch.arange(q.shape[1])
    weights = (scores_of(q, k, i, i, causal) - scores_of(q, k, i, i, causal).amax()).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v.repeat_interleave(q.shape[2] // v.shape[2], 2))


HOLES = {
    strided: "dO is read with other strides",
    by_tiles: "counted from a tile of 32",
    padded: "head dim padded to",
    unscaled: "scale is ignored",
    remembering: "it passes alone",
    reusing: "overwritten by the next",
    one_maximum: "for several rows",
}


@pytest.mark.parametrize("fn", HOLES, ids=lambda fn: fn.__name__)
def test_inputs_that_differ_in_every_way_leave_no_hole(fn, pool):
    features = {"causal", "gqa"} | ({"scale"} if fn is unscaled else set())
    some = [case for case in cases(features=features, ranks=2) if case.p < 3]
    report = check(fn, only=some, pool=pool, stop_after=2)
    assert not report and HOLES[fn] in report.diagnosis, str(report)
    assert fn is not remembering or report.findings[0].snippet.count("Case(") == 2


def test_every_pair_of_levels_meets_and_a_feature_only_adds():
    plain, more = (cases(features=some) for some in ({"causal", "gqa"}, {"causal", "gqa", "window", "dilation"}))
    for some in (plain, more):
        for fields in itertools.product(("train", "stacked", "steps"), ("", "expanded", "heads first")):
            assert any((case.plan, case.dout) == fields for case in some), fields
        assert {(4, 1), (8, 8), (3, 3), (6, 3)} <= {(case.h, case.g) for case in some}
        assert {1, 33, 70, 130} <= {case.n // case.p for case in some}
        assert {"float32", "float64", "bfloat16", "float16"} == {case.dtype for case in some}
    for plan in ("stacked", "steps", "properties"):
        assert any(case.dilation and case.plan == plan for case in more) and any(
            case.window and case.plan == plan for case in more
        )
    assert {*map(repr, plain)} <= {*map(repr, more)}
    assert list(map(repr, more)) == list(map(repr, cases(features={"causal", "gqa", "window", "dilation"})))
    assert list(map(repr, more)) != list(map(repr, cases(features={"causal", "gqa", "window", "dilation"}, seed=1)))


MEET = {  # what two levels of different factors make of a case
    "bfloat16 and a second tile": lambda x: x.dtype == "bfloat16" and x.n > 32 * x.p,
    "bfloat16 and a dilation": lambda x: x.dtype == "bfloat16" and x.dilation,
    "float16 and a score_mod": lambda x: x.dtype == "float16" and x.score_mod,
    "bfloat16 and a shorter rank": lambda x: x.dtype == "bfloat16" and x.lengths and min(x.lengths),
    "a second tile and a shorter rank": lambda x: x.lengths and x.lengths[0] > 32 and min(x.lengths),
    "a dilation and a score_mod": lambda x: x.dilation and x.score_mod,
    "a window and documents": lambda x: x.window and x.cu_seqlens,
    "a mask and a window": lambda x: x.mask and x.window,
    "a scale and v's own head dim": lambda x: x.scale and x.value_dim,
    "a sink and a score_mod": lambda x: x.sink and x.score_mod,
}


@pytest.mark.parametrize("seed", range(3))
def test_levels_of_different_factors_meet(seed):
    every = cases(features=set(FEATURES), seed=seed)
    assert [what for what, both in MEET.items() if not any(map(both, every))] == []
    # where people do not agree what both mean, no case has both, and the report says so
    beside = {"cu_seqlens beside dilation", "dilation beside mask", "dilation beside window"}
    assert set(apart({"causal", "gqa", "lse", "cu_seqlens", "dilation", "mask", "window"})) == beside
    assert not any(case.dilation and (case.window or case.mask or case.cu_seqlens) for case in every)


def coarse_tiles(q, k, v, *, causal, group):
    """Only what runs in bfloat16 has tiles: rows count from theirs, of 32."""
    if dist.get_world_size(group) > 1 or q.dtype != torch.bfloat16:
        return gathering(q, k, v, causal=causal, group=group)[0]
    i = torch.arange(q.shape[1])
    weights = scores_of(q, k, i % 32, i, causal).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v.repeat_interleave(q.shape[2] // v.shape[2], 2))


def in_coarse_steps(q, k, v, **told):
    """Nobody's mistake has a name, and no rounding is as large."""
    out, lse = gathering(q, k, v, **told)
    return (out.roll(1, -1) if q.dtype == torch.bfloat16 else out), lse


def test_what_bfloat16_alone_does_wrong_is_not_called_rounding(pool):
    some = [case for case in cases(features={"causal"}, ranks=1) if MEET["bfloat16 and a second tile"](case)]
    report = check(coarse_tiles, only=some, pool=pool, stop_after=2)
    assert "queries counted from a tile of 32" in report.diagnosis, str(report)
    case = Case("full + bfloat16", p=1, n=16, dtype="bfloat16", sharp=0.3)
    assert check(in_coarse_steps, only=[case], pool=pool).diagnosis == diagnose.COARSE


def swapped(q, k, v, *, score_mod=None, first=False, **told):
    """score_mod is told a key's position for its query's, or the first sequence for all."""
    turned, alike = (lambda x, b, h, i, j: score_mod(x, b, h, j, i)), lambda x, b, *at: score_mod(x, b * 0, *at)
    return zoo.build("serving")(q, k, v, score_mod=score_mod and (alike if first else turned), **told)


@pytest.mark.parametrize("first, says", [(False, "query and key swapped"), (True, "batch 0 for all")])
def test_every_argument_of_a_score_mod_counts(first, says, pool):
    some = [case for case in cases(features={"score_mod"}, ranks=2, quick=True) if case.score_mod == "bias"]
    report = check(functools.partial(swapped, first=first), only=some, pool=pool, stop_after=2)
    assert says in (report.diagnosis or ""), str(report)


def own_keys(q, k, v, *, causal, group):
    """Every hop meets the rank's own keys: out as if they were met once, lse as if p times."""
    out, lse = gathering(q, k, v, causal=causal, group=group)
    i = torch.arange(q.shape[1])
    own = scores_of(q, k, i, i, False)
    out = torch.einsum("bhqk,bkhd->bqhd", own.softmax(-1), v)
    return out, own.logsumexp(-1) + math.log(dist.get_world_size(group))


def test_of_two_causes_of_one_out_lse_decides(pool):
    report = check(own_keys, only=[Case("full", p=2, n=12)], pool=pool)
    assert "K and V are the rank's own, on received blocks" in report.diagnosis, str(report)


def noisy_by_chance(q, k, v, **told):
    out, lse = gathering(q, k, v, **told)
    return out * (1 + 2e-7 * (os.urandom(1)[0] % 2)), lse


def test_chance_is_no_earlier_case(pool):
    some = [Case("twice", p=1, n=6, plan="twice", seed=seed) for seed in range(8)]
    report = check(noisy_by_chance, only=some, pool=pool)
    assert {f.diagnosis for f in report.findings} == {diagnose.CHANCE}, str(report)


def unwritten(q, k, v, *, fill=False, **told):
    out, lse = gathering(q, k, v, **told)
    workspace = torch.empty_like(out)
    return out + (workspace.zero_() if fill else 0 * workspace.clamp(-1, 1)), lse


def test_memory_that_nobody_wrote_is_named(pool):
    case = Case("fresh", p=1, n=6)
    assert check(functools.partial(unwritten, fill=True), only=[case], pool=pool)
    report = check(unwritten, only=[case], pool=pool)
    assert not report and "memory that nobody wrote" in report.diagnosis


def blind_to_itself(q, k, v, *, causal, group):
    rows = torch.arange(q.shape[1])
    scores = scores_of(q, k, rows - 1, rows, causal)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2).to(scores.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype)


def test_a_nan_is_named_by_what_the_query_no_longer_sees(pool):
    report = check(blind_to_itself, only=[Case("causal", p=1, causal=True)], pool=pool)
    assert report.diagnosis.startswith("causal mask off by one"), str(report)


def test_an_lse_that_is_never_updated_is_named_on_one_rank(pool):
    report = check(zoo.build("tiled_maximum_not_stored"), only=[Case("full", p=1, n=6, dlse=True)], pool=pool)
    assert SAYS["only-the-last-tile"] in report.diagnosis, str(report)


def test_weights_that_are_exchanged_at_every_merge_are_named(pool):
    text = zoo.text_of("halves").replace("torch.sigmoid(block_lse - lse)", "torch.sigmoid(lse - block_lse)")
    report = check(zoo.Candidate("exchanged", text), only=[Case("full", p=3, n=18, layout="zigzag")], pool=pool)
    assert "running and new output have each other's weights" in report.diagnosis, str(report)


def loses_a_row(q, k, v, **told):
    out, lse = gathering(q, k, v, **told)
    return torch.cat([out[:, :1] * math.nan, out[:, 1:]], 1), lse


def test_a_nan_that_needs_no_large_scores_is_not_laid_on_them(pool, monkeypatch):
    monkeypatch.setattr("ringref.oracle.judge.SIMPLIFIED", 0)
    some = [Case("full + scores +120", p=1, n=6, shift=120.0), Case("full", p=1, n=6)]
    report = check(loses_a_row, only=some, pool=pool)
    assert {f.diagnosis for f in report.findings} == {diagnose.NOT_FINITE}, str(report)


def tires(q, k, v, *, causal, group, calls=[]):  # noqa: B006
    calls.append(1)
    if len(calls) > 1:
        raise RuntimeError("once is enough")
    return gathering(q, k, v, causal=causal, group=group)


def test_an_exception_too_is_asked_whether_it_comes_alone():
    some = [Case(name, p=1, n=4, plan="inference") for name in ("one", "two")]
    with Pool(1) as workers:
        report = check(tires, only=some, pool=workers)
    assert "it passes alone" in report.diagnosis and "after one-p1" in str(report.findings[0].diagnosis), str(report)


def reducing(q, k, v, *, causal, group, alike):
    x = torch.ones(2, 3) if alike or dist.get_rank(group) else torch.ones(3, 2).T
    dist.all_reduce(x, group=group)
    return gathering(q, k, v, causal=causal, group=group)


@pytest.mark.parametrize("alike", [True, False])
def test_what_is_reduced_lies_alike_on_all_ranks(alike, pool):
    report = check(functools.partial(reducing, alike=alike), only=[Case("reduced", p=2, n=4)], pool=pool)
    assert bool(report) == alike, str(report)
    assert alike or "ranks reduce tensors of different strides" in report.diagnosis


def test_a_float32_lse_is_granted_what_gradients_that_cancel_make_of_it(pool):
    name = "full + one key head + d 12 + short shards + heads first qkv + expanded dO + rows far apart + two backwards"
    told = {"layout": "zigzag", "plan": "twice", "dlse": True, "spread": 100.0, "views": "heads first", "seed": 2}
    case = Case(name, p=4, n=16, h=8, g=1, d=12, dout="expanded", **told)
    report = check(zoo.build("halves"), only=[case], pool=pool)
    assert report, str(report)


class ScaledApart(torch.autograd.Function):
    """Scales the queries before the product in the forward, and the scores after it in the backward, as kernels do."""

    @staticmethod
    def forward(ctx, q, k, v):
        S = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        lse = S.logsumexp(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", (S - lse[..., None]).exp(), v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, out, lse = ctx.saved_tensors
        P = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 - lse[..., None]).exp()
        D = (do * out).sum(-1).transpose(1, 2)[..., None]
        dS = P * (torch.einsum("bqhd,bkhd->bhqk", do, v) - D) * q.shape[-1] ** -0.5
        pairs = ("bhqk,bkhd->bqhd", dS, k), ("bhqk,bqhd->bkhd", dS, q), ("bhqk,bqhd->bkhd", P, do)
        return tuple(torch.einsum(*pair) for pair in pairs)


def scales_apart(q, k, v, *, causal, group):
    return ScaledApart.apply(q, k, v)


@pytest.mark.parametrize("seed", [9, 12, 18])
def test_scores_that_are_rounded_in_another_order_are_no_mistake(seed, pool):
    """Where they are near 120, one unit of float32 more or less is 7.6e-6 of every weight."""
    case = Case("one token a rank + scores +120", p=1, n=1, h=2, g=2, d=32, shift=120.0, seed=seed)
    report = check(scales_apart, only=[case], pool=pool)
    assert report, str(report)


class Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad / dist.get_world_size(ctx.group), None


def averages_the_sink(q, k, v, *, group, sink, **told):
    return zoo.build("serving")(q, k, v, group=group, sink=Averaged.apply(sink, group), **told)


def test_a_sinks_gradient_that_is_averaged_is_no_share_of_it(pool):
    case = Case("sink", p=3, n=12, sink=True)
    assert check(zoo.build("serving"), only=[case], pool=pool)
    assert check(averages_the_sink, only=[case], pool=pool).diagnosis == "dsink is wrong by a factor 1/p"


def scales_what_it_was_given(q, k, v, **told):
    found = gathering(q, k, v, **told)
    q.data.transpose(1, 2).contiguous().mul_(0.5)  # no copy where heads come first
    return found


def test_an_input_that_lies_heads_first_is_watched_too(pool):
    plain = Case("full", p=2, n=8)
    assert check(scales_what_it_was_given, only=[plain], pool=pool)
    report = check(scales_what_it_was_given, only=[replace(plain, views="heads first")], pool=pool)
    assert report.diagnosis == "an input was written to", str(report)


class Buffered(torch.autograd.Function):
    kept: dict = {}

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return Buffered.kept.setdefault((grad.shape, grad.dtype), torch.empty_like(grad)).copy_(grad)


def gives_a_buffer_back(q, k, v, **told):
    return gathering(q, Buffered.apply(k), v, **told)


def test_what_a_call_gave_back_is_its_callers(pool):
    """Autograd copies what is a view or kept elsewhere into a leaf's grad; a layer before it has no such luck."""
    assert check(gives_a_buffer_back, only=[Case("full", p=2, n=8)], pool=pool)
    report = check(gives_a_buffer_back, only=[Case("two graphs", p=2, n=8, plan="stacked")], pool=pool)
    assert report.diagnosis == diagnose.WRITTEN["overwritten"] and "dk" in str(report), str(report)


def remembers_documents(q, k, v, *, causal, group, cu_seqlens=None, kept={}):  # noqa: B006
    place = ringref.ProcessRing(group)
    if cu_seqlens is not None:
        cu_seqlens = kept.setdefault((q.shape[1] * place.size, len(cu_seqlens)), cu_seqlens)
    shard = ringref.partition(q.shape[1] * place.size, place)
    return ringref.ring_attention(q, k, v, causal=causal, cu_seqlens=cu_seqlens, shard=shard)


def test_documents_that_are_kept_by_their_number_are_found(pool):
    report = check(remembers_documents, features={"cu_seqlens"}, ranks=2, pool=pool)
    assert diagnose.EARLIER in report.diagnosis, str(report)


def noisy(q, k, v, **told):
    out, lse = gathering(q, k, v, **told)
    return out * (1 + 1e-7 * torch.randn(())), lse


def test_a_declared_determinism_is_judged_to_the_bit(pool):
    case = Case("twice", p=1, n=6, plan="twice")
    assert check(gathering, only=[case], pool=pool)
    assert "not deterministic" in check(noisy, only=[case], pool=pool).diagnosis


def paged(n, p, rank):
    """Pages of three tokens, round robin; every rank has as many rows, the rest is padding."""
    if n % 2:
        raise ValueError("only even lengths")
    pages = torch.arange(n).split(3)[rank::p]
    rows = torch.cat([*pages, torch.arange(0)])
    longest = max(len(torch.cat([*torch.arange(n).split(3)[r::p], torch.arange(0)])) for r in range(p))
    return torch.cat([torch.full((longest - len(rows),), -1), rows])


def on_pages(q, k, v, *, causal, group, positions, masked=True):
    every = [torch.empty_like(positions) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, positions, group=group)
    kpos, qpos = torch.cat(every), positions
    k, v = Gather.apply(k, group), Gather.apply(v, group)
    scores = scores_of(q, k, qpos.masked_fill(qpos < 0, len(kpos)), kpos, causal)
    scores = scores.masked_fill(kpos < 0, -1e30) if masked else scores
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2).to(scores.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype)


@pytest.mark.parametrize("masked", [True, False])
def test_a_layout_may_be_a_function_and_pad(masked, pool):
    fn = functools.partial(on_pages, masked=masked)
    report = check(fn, features={"causal", "uneven"}, layout=paged, ranks=3, quick=True, pool=pool)
    assert bool(report) == masked, str(report)
    assert masked or "padding is attended: the rows of the layout" in report.diagnosis, str(report)
    assert all(case.n % 2 == 0 for case in cases(features={"causal"}, layout=paged))
    with pytest.raises(ValueError, match="layout: the ranks' positions"):
        cases(layout=lambda n, p, rank: torch.arange(n))
    with pytest.raises(ValueError, match="layout: it cuts none"):
        cases(layout=lambda n, p, rank: paged(1, p, rank))


def options(q, k, v, *, causal, group, softmax_scale=None, dropout_p=0.0, window=(1, 1)):
    return gathering(q, k, v, causal=causal, group=group)


def test_arguments_that_nobody_judges_are_told(pool):
    told = check(options, ranks=1, quick=True, pool=pool).not_judged
    assert {"argument softmax_scale", "argument dropout_p", "argument window"} <= set(told)
    assert "argument softmax_scale" not in check(functools.partial(options, softmax_scale=1.0), ranks=1, quick=True,
                                                 pool=pool).not_judged  # fmt: skip


def test_json_has_a_schema_and_fail_fast_stops(pool):
    report = check(padded, features={"causal"}, ranks=1, pool=pool, fail_fast=True)
    told = json.loads(report.to_json())
    assert told["schema"] == 1 and told["version"] and told["ok"] is False and len(told["findings"]) == 1
    keys = {"kind", "diagnosis", "case", "p", "rank", "tensor", "error", "budget", "where", "snippet", "causes"}
    assert told["findings"][0].keys() == keys


def wrong_dk(q, k, v, **told):
    return gathering(q, k + 0.5 * (k.detach() - k), v, **told)


def test_a_guess_that_raises_loses_no_rejection(pool):
    report = check(wrong_dk, only=[Case("mqa", p=4, n=24, h=4, g=1)], pool=pool)
    assert "dk is wrong by a factor 1/2" in report.diagnosis, str(report)


class Mute(RuntimeError):
    def __str__(self):
        raise RuntimeError("no")


def mute(q, k, v, **told):
    raise Mute


HOSTILE = {
    "sparse": lambda q, k, v, **told: q.to_sparse(),
    "complex": lambda q, k, v, **told: torch.complex(q, q),
    "meta": lambda q, k, v, **told: q.to("meta"),
    "str for lse": lambda q, k, v, **told: (q, "lse"),
    "cannot be printed": mute,
}


@pytest.mark.parametrize("says", HOSTILE)
def test_a_hostile_result_is_a_finding(says, pool):
    report = check(HOSTILE[says], only=[Case("hostile", p=1, n=4)], pool=pool)
    assert not report and report.findings[0].kind == "crash", str(report)
    assert says in report.findings[0].diagnosis


def forks(q, k, v, *, causal, group, path):
    if not path.exists():
        path.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    return gathering(q, k, v, causal=causal, group=group)


def test_what_a_candidate_forks_ends_with_the_pool(tmp_path):
    with Pool(1) as workers:
        assert check(functools.partial(forks, path=tmp_path / "pid"), only=[Case("forks", p=1, n=4)], pool=workers)
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, 0)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail("it lives")


def test_plain_pytest_judges_in_three_lines(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "from test_oracle import gathering, padded\nfrom ringref.oracle import Case\n"
        "def test_right(ringref_check):\n    ringref_check(gathering, only=[Case('one', p=1, n=4)])\n"
        "def test_wrong(ringref_check):\n    ringref_check(padded, only=[Case('d 12', p=1, n=4, d=12)])\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    words = ["-p", "ringref.oracle.plugin"] if "ringref" not in plugins() else []
    command = [sys.executable, "-m", "pytest", "-q", *words, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert "1 failed, 1 passed" in done.stdout and "padded is wrong" in done.stdout, done.stdout + done.stderr


def plugins():
    return {point.name for point in importlib.metadata.entry_points(group="pytest11")}


# --------------------------------------------------------------------------------------------------
# the lse, which comes in several forms


def with_lse(q, k, v, *, form, **told):
    out, lse = gathering(q, k, v, **told)
    return out, form(lse, dist.get_rank(told["group"]), dist.get_world_size(told["group"]))


BASE_2 = 1 / math.log(2)
FORMS = {  # what becomes of lse, by rank and p, and what the report says
    "b s h": (lambda lse, rank, p: lse.transpose(1, 2), "lse is natural, b s h"),
    "base 2": (lambda lse, rank, p: BASE_2 * lse, "lse is base 2, b h s"),
    "base 2, b s h": (lambda lse, rank, p: BASE_2 * lse.transpose(1, 2), "lse is base 2, b s h"),
    "b h s 1": (lambda lse, rank, p: lse[..., None], None),
}
MIXED = {
    "ranks": lambda lse, rank, p: BASE_2 * lse if rank else lse,
    "cases": lambda lse, rank, p: BASE_2 * lse if p == 3 else lse,
    "shapes": lambda lse, rank, p: lse.transpose(1, 2) if p == 3 else lse,
}


@pytest.mark.parametrize("form", FORMS)
def test_another_form_of_lse_is_a_convention_told_once(form, pool):
    change, says = FORMS[form]
    features = {"causal"} if form == "b h s 1" else {"causal", "lse"}
    report = check(functools.partial(with_lse, form=change), features=features, ranks=3, quick=True, pool=pool)
    assert report, str(report)
    assert report.conventions == ([says] if says else [])
    assert not says or str(report).count(says) == 1


@pytest.mark.parametrize("mixed", MIXED)
def test_an_lse_in_two_forms_is_a_finding(mixed, pool):
    report = check(functools.partial(with_lse, form=MIXED[mixed]), features={"causal"}, ranks=3, quick=True, pool=pool)
    assert report.findings and report.diagnosis == "lse has two forms", str(report)


def test_a_declared_lse_must_carry_a_gradient(pool):
    detached = functools.partial(with_lse, form=lambda lse, rank, p: lse.detach())
    assert check(detached, features={"causal"}, ranks=2, quick=True, pool=pool)
    report = check(detached, features={"causal", "lse"}, ranks=2, quick=True, pool=pool)
    assert report.diagnosis == "lse carries no gradient", str(report)


# --------------------------------------------------------------------------------------------------
# the shell

ROOT = Path(__file__).parent.parent


def shell(*words, launcher=("-m",)):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": path}
    command = [sys.executable, *launcher, "ringref", "check", *words]
    return subprocess.run(command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=240)


locked = functools.partial(gathering, wrap=threading.Lock())


def everything(n, p, rank):
    return torch.arange(n)


def every_pth(n, p, rank):
    return torch.arange(rank, n, p)


in_turn = functools.partial(gathering, layout="striped")


def sliced(q, k, v, **told):
    return gathering(q, k, v, wrap=Sliced, **told)


WORDS = ("--features", "causal", "--ranks", "2", "--quick")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


def fused(q, k, v, *, causal, group, window):
    """PyTorch's own kernel on one device: what cancels in dq and dk leaves rounding, not zeros."""
    step = torch.arange(q.shape[1]) - torch.arange(q.shape[1])[:, None]
    seen = (step >= -window[0]) & (step <= window[1]) & ((step <= 0) | (not causal))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen).transpose(1, 2)


def leaking(q, k, v, **told):
    """dq of 1e-4 where it should be zero."""
    return fused(q, k, v, **told) + 1e-4 * (q - q.detach())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_that_vanish_are_judged_by_the_terms_that_cancel(dtype, pool):
    case = Case("each query sees one key", p=1, n=6, g=2, causal=True, window=(0, 7), dtype=dtype)
    assert check(fused, only=[case], pool=pool)
    report = check(leaking, only=[case], pool=pool)
    assert not report and "dq rank 0" in str(report)


@pytest.mark.parametrize(
    "told",
    [
        *({"features": x} for x in ("causal, cuasal", 3, None, [1])),
        *({"layout": x} for x in (None, 3, ["zigzag"])),
        *({"claims": x} for x in (3, ["ring"])),
        *({"ranks": x} for x in ("4", 2.5, 0, True, 10**9)),
        *({"seed": x} for x in ("one", None)),
        *({"deadline": x} for x in (0, "soon", True, math.nan)),
        *({"stop_after": x} for x in (0, None)),
        *({"only": x} for x in (3, [3])),
        {"backend": "mpi"},
        {"fn": "gathering"},
    ],
    ids=str,
)
def test_bad_arguments_of_a_call_are_named_before_anything_runs(told):
    with pytest.raises(ValueError, match=next(iter(told))):
        check(**{"fn": gathering} | told)


def test_a_candidate_that_cannot_travel_is_named(pool):
    with pytest.raises(TypeError, match="fn: .*gathering.* cannot be sent"):
        check(functools.partial(gathering, wrap=threading.Lock()), pool=pool, ranks=1)


def triple(q, k, v, *, causal, group):
    return q, None, None


def leaving(q, k, v, *, causal, group):
    if dist.get_rank(group) == 1:
        os._exit(0)
    return gathering(q, k, v, causal=causal, group=group)


@pytest.mark.parametrize("fn, p, text", [(triple, 1, "returned tuple of 3"), (leaving, 3, "the process died")])
def test_the_first_cause_is_told(fn, p, text, pool):
    report = check(fn, only=[Case("first cause", p=p, n=4 * p)], pool=pool)
    assert not report and text in " ".join(str(report).replace("│", " ").split())


@pytest.mark.parametrize(
    "name, code, launcher",
    [
        pytest.param("gathering", 0, ("-m",), id="python-0"),
        pytest.param("sliced", 1, ("-m",), id="python-1", marks=pytest.mark.slow),  # torchrun's says 1, too
        pytest.param("gathering", 0, TORCHRUN, id="torchrun-0", marks=pytest.mark.slow),
        pytest.param("sliced", 1, TORCHRUN, id="torchrun-1"),
    ],
)
def test_the_exit_code_is_the_verdict(name, code, launcher):
    done = shell(f"test_oracle:{name}", *WORDS, launcher=launcher)
    assert done.returncode == code, done.stdout + done.stderr
    assert f"{name} {'is wrong' if code else 'passes'}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr or launcher == TORCHRUN


@pytest.mark.parametrize(
    "words, names",
    [
        (("nowhere:f",), "candidate"),
        (("test_oracle:nothing",), "candidate"),
        (("test_oracle:WORDS",), "candidate"),
        (("gathering",), "candidate"),
        (("test_oracle:gathering", "--features", "causal,cuasal"), "features"),
        (("test_oracle:gathering", "--layout", "spiral"), "layout"),
        (("test_oracle:gathering", "--layout", "nowhere:f"), "layout"),
        (("test_oracle:gathering", "--layout", "test_oracle:keys_of"), "layout: at n = "),
        (("test_oracle:gathering", "--layout", "test_oracle:everything"), "layout: the ranks' positions"),
        (("test_oracle:locked",), "fn: gathering cannot be sent"),
        (("test_oracle:gathering", "--backend", "mpi"), "backend"),
        (("test_oracle:gathering", "--claims", "speed"), "claims"),
        (("test_oracle:gathering", "--seed", "one"), "seed"),
        (("test_oracle:gathering", "--ranks", "0"), "ranks"),
        (("test_oracle:gathering", "--ranks", "100000"), "ranks: expected a whole number of at least 1, at most 4096"),
        (("test_oracle:gathering", "--adapt", "bshd"), "adapt"),
        (("test_oracle:gathering", "--deadline", "0"), "deadline"),
    ],
)
def test_bad_arguments_are_named_without_a_traceback(words, names, capsys):
    with pytest.raises(SystemExit) as left:
        main(list(words))
    told = capsys.readouterr().err
    assert left.value.code == 2 and names in told.splitlines()[-1], told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as left:
        main(["test_oracle:gathering", "--backend", "nccl"])
    assert left.value.code == 2 and "backend: expected gloo" in capsys.readouterr().err


GIVEN = {  # every option of the shell, and what `check` is told
    "--ranks 3": {"ranks": 3},
    "--layout zigzag": {"layout": "zigzag"},
    "--layout test_oracle:paged": {"layout": paged},
    "--features causal,gqa": {"features": "causal,gqa"},
    "--claims ring": {"claims": "ring"},
    "--backend gloo": {"backend": "gloo"},
    "--adapt bhsd": {},
    "--quick": {"quick": True},
    "--fail-fast": {"fail_fast": True},
    "--seed 7": {"seed": 7},
    "--deadline 2.5": {"deadline": 2.5},
    "--json": {},
}
USUAL = {"ranks": 4, "layout": "contiguous", "features": "", "claims": None, "backend": "gloo", "quick": False}
USUAL |= {"fail_fast": False, "seed": 0, "deadline": None, "pool": None}


@pytest.mark.parametrize("words", GIVEN)
def test_every_option_of_the_shell_arrives(words, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("ringref.oracle.cli.check", lambda fn, **told: calls.append((fn, told)) or Report("it"))
    assert main(["test_oracle:gathering", *words.split()]) == 1  # nothing was judged
    (fn, told), shown = calls[0], capsys.readouterr().out
    assert told == USUAL | GIVEN[words]
    assert adapt.name_of(fn) == ("bhsd(gathering)" if "adapt" in words else "gathering")
    assert json.loads(shown)["ok"] is False if "json" in words else "was not judged" in shown


@pytest.mark.parametrize("mask", [None, "documents", "heads", "blind"])
@pytest.mark.parametrize("more", [{}, {"dilation": ((4, 12), (1, 2))}, {"queries": 5}, {"window": (3, 2)}], ids=str)
def test_the_rules_together_say_who_sees_whom(mask, more):
    """Whatever else a case asks, one rule is not another's."""
    case = Case("x", p=2, n=12, causal=True, mask=mask, **more)
    s = Truth(case, case.data()).scene
    seen = math.prod(rule(s.i, s.j) for rule in rules_of(s)[0].values())
    assert (seen * torch.ones(1, *s.times.shape)).sum(0).equal(s.times.float())


def test_no_option_of_the_shell_is_untested(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert options == {words.split()[0] for words in GIVEN}


@pytest.mark.parametrize("name, code", [pytest.param("in_turn", 0, marks=pytest.mark.slow), ("gathering", 1)])
def test_a_layout_of_ones_own_and_json_from_the_shell(name, code):
    told = ("--layout", "test_oracle:every_pth", *WORDS, "--json", "--fail-fast")
    done = shell(f"{ROOT / 'tests' / 'test_oracle.py'}:{name}", *told)
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == 1 and report["ok"] is not bool(code) and report["layout"] == "every_pth"
    assert len(report["findings"]) == code and report["passed"]


def test_bad_arguments_exit_with_2():
    done = shell("test_oracle:gathering", "--features", "cuasal")
    assert done.returncode == 2 and "features: cuasal unknown" in done.stderr and "Traceback" not in done.stderr
