"""What a candidate's numbers say where no guess fits: how much of each part is in them, by least squares.

out, exp(lse) and gradients are linear in how often pairs of query and key count, in the weights that merge parts, and
in the terms of dS. What fits is told by the fewest properties that single out where it is wrong, and is believed as
guesses are: if it makes the numbers that the candidate gave.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .causes import UNKNOWN, Guess, factor, in_only, off, rules_of
from .scene import Scene, rows

MOST = 2**15  # pairs of query and key; beyond, a smaller case has to say it
MOST_KEYS = 16  # of a query, that are looked for where there are more keys than equations
FEW = 3  # factors, more of which are no simple mistake
SOME = "some, as query"  # no simple rule says which
OFTEN = {0.0: "pairs are left out", 2.0: "pairs count twice", 0.5: "pairs count half"}


class Fit(NamedTuple):
    """A tensor y, b h r e, that is Σ c · x over the columns of x, b h r c e, where each pair b h r c counts c times."""

    y: Tensor
    x: Tensor
    keys: bool = False  # rows are keys, columns queries
    scaled: bool = True  # it tells c, not only its ratios
    fold: Callable = torch.as_tensor  # of query heads to those of keys


def readings(s: Scene, about: list[str], whole: dict[str, Tensor], fine: list[str]) -> Iterator[Guess]:
    """What the wrong tensors `about` say, the simplest first; those that are `fine` are right."""
    if s.i.numel() > MOST or about == ["dsink"]:
        return
    if about[0] in ("out", "lse"):
        yield from counts(s, forward_fits(s, about, whole, fine), "{}")
        yield from weights(s, about, whole) if about == ["out"] else ()
    else:
        yield from counts(s, [("{}", gradient_fit(s, about, whole), lambda c: s.backward(times=c))], in_only(about))
        yield from terms(s, about, whole)
        yield from shares(s, [n for n in about if n in ("dk", "dv")], whole) if s.e > 1 else ()
        yield from weights(s, about, whole) if about[0] == "dq" else ()
        for m in (1, 2) if s.even else ():
            yield from homes(s, [n for n in ("dk", "dv") if n in about], whole, m)


def all_pairs(s: Scene) -> tuple[Tensor, Tensor | float]:
    """Scores and slopes, as if no pair were hidden."""
    return s.scores(SimpleNamespace(**(vars(s) | {"times": torch.ones_like(s.times)})))


# ------------------------------------------------------------------------- how often a pair counts


def forward_fits(s: Scene, about: list[str], whole: dict[str, Tensor], fine: list[str]) -> Iterator[tuple]:
    """(words, fit, what such counts give) of out and lse together, or of one alone."""
    S, _ = all_pairs(s)
    L = S.logsumexp(-1)
    P, V = (S - L[..., None]).exp(), s.V.transpose(1, 2)[:, :, None]
    sink = L[..., None] * 0 if s.sink is None else (s.sink[:, None] - L).exp()[..., None]
    total, right = P[..., None], (s.L - L).exp()[..., None]
    given = (whole["lse"] - L).exp()[..., None] - sink if "lse" in whole else None
    if about == ["lse"]:
        yield "in lse only: {}", Fit(given, total), lambda c: {"lse": ((c * P).sum(-1) + sink[..., 0]).log() + L}
        return
    out = whole["out"].transpose(1, 2)
    if not fine:
        both = [(out * sink, total * (V - out[:, :, :, None]))] + [(given, total)] * (given is not None)
        y, x = (torch.cat(z, -1) for z in zip(*both, strict=True))
        yield "{}", Fit(y, x, scaled=given is not None or s.sink is not None), lambda c: s.forward(times=c)
    share = lambda c: {"out": torch.einsum("bhqk,bkhd->bqhd", (c * P / right).nan_to_num(0, 0, 0), s.V)}
    yield "in the numerator of out only: {}", Fit(out * right, total * V), share
    sums = right / ((out * s.O.transpose(1, 2)).sum(-1, True) / s.O.square().sum(-1).transpose(1, 2)[..., None])
    shrunk = lambda c: {"out": s.O * rows(right[..., 0] / ((c * P).sum(-1) + sink[..., 0]))}
    yield "in the sum that out is divided by: {}", Fit(sums - sink, total), shrunk


def gradient_fit(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Fit:
    """Of the first gradient that is wrong."""
    P, dP, unit = softmax(s)
    dS, name = P * (dP - s.D + s.dlse[..., None]) * unit, next(n for n in ("dq", "dv", "dk") if n in about)
    y, (pairs, other) = whole[name].transpose(1, 2), {"dq": (dS, s.K), "dk": (dS.mT, s.q), "dv": (P.mT, s.do)}[name]
    return Fit(y, pairs[..., None] * other.transpose(1, 2)[:, :, None], name != "dq", True, folds(s, name))


def folds(s: Scene, name: str) -> Callable:
    return torch.as_tensor if name == "dq" else lambda x: x.unflatten(1, (s.case.g, s.e)).sum(2)


def softmax(s: Scene) -> tuple[Tensor, Tensor, Tensor | float]:
    """P and dP of all pairs, and what dS is multiplied by."""
    S, slope = all_pairs(s)
    P = (S - s.L.masked_fill(s.L == -math.inf, math.inf)[..., None]).exp()
    return P, torch.einsum("bqhd,bkhd->bhqk", s.do, s.V), slope * s.scale


def groups(s: Scene, tiles: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries, and keys, that may count alike: those of a rank, of half a rank, of a tile of 16 or 24."""
    yield s.owner[0], s.owner[1]
    size = max(map(len, s.case.shards))
    for x in [size // 2] * s.even + [16, 24] * tiles:
        if 0 < x < size:
            yield tuple(who * size + at // x for who, at in zip(s.owner, s.loc, strict=True))


def solved(fit: Fit, now: Tensor, base: Tensor, row: Tensor, col: Tensor, alone: bool) -> Tensor:
    """How often each pair b h r c counts: `now`, and the least change of `base` that fits, the same for pairs whose
    labels are alike, in all sequences, and in all heads unless each is `alone`.
    """
    x = fit.fold(fit.x * base[..., None])
    by = x.new_zeros(*x.shape[:3], int(col.max()) + 1, x.shape[-1]).index_add(3, col, x)
    rest = fit.y - fit.fold(fit.x * now[..., None]).sum(3)
    by, rest = by.transpose(0, 1).mT.nan_to_num(0, 0, 0), rest.transpose(0, 1)[..., None].nan_to_num(0, 0, 0)
    more = by.new_zeros(len(by) if alone else 1, int(row.max()) + 1, by.shape[-1])
    for r in row.unique():
        a, y = (z[:, :, row == r].flatten(1, 3) for z in (by, rest))  # h, equations, columns
        a, y = (a, y) if alone else (z.flatten(0, 1)[None] for z in (a, y))
        few = a.shape[1] < a.shape[2]  # more unknowns than equations
        more[:, r] = pursued(a, y[..., 0]) if few else (torch.linalg.pinv(a, rtol=1e-5) @ y)[..., 0]
    return now + base * more[:, row][:, :, col].repeat_interleave(now.shape[1] // len(more), 0)


def least_change(parts: Tensor, got: Tensor, usual: Tensor) -> Tensor:
    """The x nearest to the usual one for which parts x = got, whole numbers where it is near to them."""
    return whole_where_near(usual + torch.linalg.pinv(parts, rtol=1e-5) @ (got - parts @ usual))


def whole_where_near(x: Tensor) -> Tensor:
    return torch.where((x - x.round()).abs() < 0.05, x.round(), x)


def pursued(a: Tensor, y: Tensor) -> Tensor:
    """The few x that make a x = y, found one after the other (orthogonal matching pursuit)."""
    x = a.new_zeros(a.shape[0], a.shape[2])
    for one, want, found in zip(a, y, x, strict=True):
        at, rest, size = [], want, one.norm(dim=0) + 1e-12
        while len(at) < MOST_KEYS and rest.norm() > 1e-4 * want.norm():
            at.append(int((one.T @ rest / size).abs().argmax()))
            found[at] = torch.linalg.lstsq(one[:, at], want[:, None]).solution[:, 0]
            rest = want - one @ found
    return x


def counts(s: Scene, fits: Iterator[tuple], words: str) -> Iterator[Guess]:
    """How often pairs of query and key count, by blocks or one by one."""
    single = torch.arange(s.case.m), torch.arange(s.case.n)
    levels = [(s.times, label, False) for label in groups(s, True)]
    levels += [(torch.ones_like(s.times), single, alone) for alone in (False, True)]
    levels += [(rules_of(s)[0]["mask_mod"](s.i, s.j).double(), single, False)] if s.case.mask else []
    for text, fit, made in fits:
        turn = (lambda x: x.mT) if fit.keys else torch.as_tensor
        left = lambda c, fit=fit, turn=turn: (fit.y - fit.fold(fit.x * turn(c)[..., None]).sum(3)).nan_to_num().norm()
        for base, label, alone in levels:
            c = turn(solved(fit, turn(s.times), turn(base), *(label[::-1] if fit.keys else label), alone))
            if not fit.scaled:  # most of what counts counts once
                ratio = (c / s.times).where(s.times > 0, 0.0)
                usual = ratio.where(ratio > 0.1 * ratio.amax(-1, True), math.nan).nanmedian(-1, True)[0]
                c = c / usual.nan_to_num(1.0)
            c = whole_where_near(c)
            if left(c) < 0.1 * left(s.times) and (told := differs(s, c)):
                told = words.format(text.format(told))
                yield f"{UNKNOWN}: {told}" if SOME in told else told, partial(made, c)
                break


def differs(s: Scene, c: Tensor, what: str = "") -> str | None:
    """Which pairs count otherwise than they should, and how often, in words; nothing if it is not simple."""
    seen = s.times > 0
    ratio, extra = torch.where(seen, c / s.times, 1.0), ~seen & (c > 0.05)
    factors = ratio[(ratio - 1).abs() > 0.015].mul(100).round().unique() / 100
    if len(factors) + bool(extra.any()) not in range(1, FEW + 1):
        return None
    told = [f"pairs are seen that should be hidden: {where(s, extra, ~seen)}"] if extra.any() else []
    for m in factors:
        chosen = seen & ((ratio - m).abs() <= 0.0051)
        text = off(what or "what pairs add", ratio[chosen].mean().item(), s)
        text = text if s.p > 2 else text.replace("1/p", "1/2").replace("factor p", "factor 2")
        told.append(f"{text if what else OFTEN.get(m.item(), text)}: {where(s, chosen, seen)}")
    return "; ".join(told)


# ------------------------------------------------------------------------------ which pairs, in words


def where(s: Scene, chosen: Tensor, among: Tensor) -> str:
    """The fewest properties that only the `chosen` of `among` pairs b h q k have."""
    shape, facts, late = s.times.shape, s.places(True), s.case.n // s.p
    for who, at in {"queries": s.here, "keys": s.there}.items() if s.even and late > 1 else ():
        facts |= {f"the early half of the {who}": 2 * at < late, f"the late half of the {who}": 2 * at >= late}
        edges = {"first": 0, "last": late // 2 - 1} if s.halved else {}
        facts |= {f"the {end} of the {who} of a chunk": at % (late // 2) == x for end, x in edges.items()}
    for name, rule in rules_of(s)[0].items():
        shown = torch.as_tensor(rule(s.i, s.j)) > 0
        each = {name: shown} if shown.ndim < 5 else {f"{name} of branch {m}": x for m, x in enumerate(shown)}
        for text, pairs in each.items() if shown.ndim else ():
            facts |= {f"what the {text} hides": ~pairs, f"what the {text} shows": pairs}
    head, batch = torch.arange(s.case.h)[:, None, None], torch.arange(s.case.b)[:, None, None, None]
    numbers = {"hop": s.hop, "the query's rank": s.mine, "the key's rank": s.theirs, "head": head, "sequence": batch}
    local = {"the query's row in its shard": s.here, "the key's row in its shard": s.there}
    local |= {"the key's row less the query's": s.there - s.here, "query": s.i, "key": s.j}

    def fewest(chosen: Tensor, numbers: dict[str, Tensor], most: int) -> str | None:
        chosen, rest = chosen.expand(shape), (among & ~chosen).expand(shape)
        held = dict(facts)
        for name, x in numbers.items():
            low, high = x.expand(shape)[chosen].aminmax()
            ends = {f"{name} ≥ {low}": x >= low, f"{name} ≤ {high}": x <= high}
            held |= {f"{name} {low}": x == low} if low == high else ends
        held = {text: pairs.expand(shape) for text, pairs in held.items()}
        held = {text: x[rest] for text, x in held.items() if x[chosen].all() and not x[rest].all()}
        if not rest.any() or not held:
            return None if rest.any() else "everywhere"
        kinds = torch.stack([*held.values()]).unique(dim=1).int().tolist()  # of other pairs, by what they have
        bits = {text: int("".join(map(str, kind)), 2) for text, kind in zip(held, kinds, strict=True)}
        some = itertools.chain(*(itertools.combinations(bits, k + 1) for k in range(most)))
        return next((", ".join(texts) for texts in some if not reduce(int.__and__, map(bits.get, texts))), None)

    for sizes in ((numbers | {"j − i": s.j - s.i}, 2), (numbers | {"j − i": s.j - s.i} | local, 4)):
        if told := fewest(chosen, *sizes):
            return told
        if told := fewest(among & ~chosen, *sizes):
            return f"all but {told}"
    i, j = chosen.expand(shape).nonzero()[0, 2:].tolist()
    return f"{SOME} {i} (rank {s.owner[0][i]}) and key {j} (rank {s.owner[1][j]})"


# ------------------------------------------------------------------- weights of parts, terms of dS


def weights(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """An out, or dq, that is made of the right ones of its parts with wrong weights in each row, which are told for the
    order of merging in which they are a formula.
    """
    orders = {"hop": s.hop, "step": -s.hop % s.p, "rank": s.owner[1].expand_as(s.hop)}
    told, name = [], about[0]
    for step, (what, parts) in zip((*orders, "branch"), s.parts(*orders.values()), strict=False):
        outs, lses, tops = s.forward(times=parts, sink=None).values()
        if len(parts) > whole[name].shape[-1] - 2:
            return  # any out would be a sum of so many
        right, seen = (lses - s.L).exp().nan_to_num(), lses.isfinite()
        if name == "dq":  # the forward is right: what P is multiplied by
            outs, right = torch.stack([s.backward(times=x)["dq"] for x in parts]), seen.double()
        found = torch.linalg.pinv(outs.movedim(0, -1), rtol=1e-5) @ whole[name].nan_to_num(0, 0, 0)[..., None]
        a = found[..., 0].movedim(-1, 0).transpose(2, 3)
        out = (outs * rows(a)).sum(0)
        if (whole[name] - out).norm() > 0.1 * (whole[name] - (outs * rows(right)).sum(0)).norm():
            continue
        wrong = seen & ((a - right).abs() > 1e-3)
        wrong = seen if wrong.sum() > 0.9 * seen.sum() else wrong
        total, one = a.sum(0), right.sum(0)
        at = wrong.any(0)[..., None]
        if what == "blocks":
            at = sum(wrong[t][..., None] & (orders[step] == t) for t in range(s.p)).bool() & (s.times > 0)
        simple = formula(s, step, a, wrong, seen, lses, tops)
        text, made = f"the outputs of {what} are right, the weights that merge them are wrong", partial(dict, out=out)
        if name == "dq":
            text = in_only(about).format(f"rows of P of {what} are off by factors")
            made = partial(s.backward, times=parts, L=(s.L - a.clamp(min=1e-30).log())[..., None], D=s.D)
        text += f": {simple}" * bool(simple)
        if name == "out" and len(sign := (total - one)[(total - one).abs() > 1e-3].sign().unique()):
            text += f" (they add up to {'more or less' if len(sign) > 1 else 'more' if sign > 0 else 'less'} than 1)"
        text = text if simple else f"{UNKNOWN}: {text}"
        told.append((not simple, f"{text}: {where(s, at, s.times > 0)}", made))
    if told:
        yield min(told, key=lambda guess: guess[0])[1:]


def formula(s: Scene, step: str, a: Tensor, wrong: Tensor, seen: Tensor, lses: Tensor, tops: Tensor) -> str | None:
    """What wrong weights are, as exp of a sum of what a merge has at hand, if they are that."""
    low, ok = lses.masked_fill(~seen, -1e30), wrong & (a > 1e-3)
    if ok.sum() < 16 or (wrong & ~ok & (low > s.L - 5)).any():
        return None
    run, top = low.logcumsumexp(0), tops.masked_fill(~seen, -1e30).cummax(0)[0]
    known = {"lse": low, "merged lse": s.L, "largest lse": low.amax(0), "own maximum": tops, "maximum": s.top}
    known["running lse"] = run
    for t in range(len(low)):
        known |= {f"lse of {step} {t}": low[t], f"lse up to {step} {t}": run[t], f"maximum up to {step} {t}": top[t]}
    known, w = {text: x.expand_as(low)[ok] for text, x in known.items()}, a[ok]
    for text, usual in ("", "merged lse"), (" when they are merged", "running lse"), (" times the right ones", "lse"):
        y = w.log() - known[usual] + known["merged lse"]  # what later steps make of it is right
        for names in itertools.chain(*(itertools.combinations(known, k) for k in (0, 1, 2))):
            x = torch.stack([*map(known.get, names), torch.ones_like(y)], -1)
            m = torch.linalg.lstsq(x * w[:, None], (y * w)[:, None]).solution[:, 0]
            if ((x @ m - y) * w).abs().max() < 1e-3 * w.max():  # small weights are not known as well
                each = zip(m[:-1].tolist(), names, strict=True)
                told = [f"{'−' if c < 0 else '+'} {factor_of(abs(c))}{name}" for c, name in each]
                told += [f"+ {m[-1]:.3g}"] * bool(abs(m[-1]) > 1e-3)
                return f"they are exp({' '.join(told).removeprefix('+ ') or 0}){text}"
    told, alone, a = [], ok.all(0), a.clamp(min=1e-9)

    def slope(y: Tensor, x: Tensor, w: Tensor) -> float:
        y, x, w = (z[..., alone] for z in (y, x, w))
        m = factor([(y * w, x * w)]) if y.numel() > 8 else 0.0
        return m if y.numel() > 8 and ((m * x - y) * w).abs().max() < 1e-3 * w.max() else math.nan

    m = slope(*(z - z.mean(0) for z in (a.log(), low)), a)
    if not math.isnan(m):
        wrong_sum = "they have the right proportions, and are divided by a wrong sum"
        return wrong_sum if abs(m - 1) < 1e-3 else f"they are in proportion to exp({factor_of(m)}lse)"
    for t in range(1, len(low)):  # step by step
        m = slope(a[t].log() - a[:t].sum(0).log(), low[t] - run[t - 1], torch.minimum(a[t], a[:t].sum(0)))
        if math.isnan(m):
            return None
        at = f"the last {step}" if t == len(low) - 1 else f"{step} {t}"
        told += [f"{factor_of(m)}lse at {at}"] if abs(m - 1) > 1e-3 else []
    return f"running and new output have those of {', of '.join(told)}" if told else None


def factor_of(c: float) -> str:
    """A factor in a sum, by its name."""
    known = {"": 1.0, "−": -1.0, "ln 2 · ": math.log(2), "log2 e · ": math.log2(math.e)}
    return next((text for text, x in known.items() if abs(c / x - 1) < 1e-3), f"{c:.3g} · ")


def terms(s: Scene, about: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """A backward in which terms of dS = P ∘ (dP − D + dlse) are wrong, everywhere or on some blocks."""
    name = next((n for n in ("dq", "dk") if n in about), None)
    if not name:
        return
    P, dP, unit = softmax(s)
    each = {"dP = dO·Vᵀ": dP, "the row sum D": -s.D, "the gradient of lse": s.dlse[..., None]}
    each = {text: P * x * unit for text, x in each.items() if x.any()}
    turn, other = (torch.as_tensor, s.K) if name == "dq" else ((lambda x: x.mT), s.q)
    x = torch.cat([turn(x)[..., None] * other.transpose(1, 2)[:, :, None] for x in each.values()], 3)
    fit, now = Fit(whole[name].transpose(1, 2), x, fold=folds(s, name)), torch.cat([turn(s.times)] * len(each), 3)
    for label in groups(s):
        row, col = label if name == "dq" else label[::-1]
        cols = torch.cat([col + t * (int(col.max()) + 1) for t in range(len(each))])
        found = solved(fit, now, now, row, cols, False).tensor_split(len(each), 3)
        found = {text: turn(c) for text, c in zip(each, found, strict=True)}
        told = [differs(s, c, text) for text, c in found.items()]
        a, b, *c = ((c / s.times).nan_to_num(1.0, 1.0, 1.0) for c in found.values())
        a = torch.where(a.abs() < 1e-9, 1e-9, a)
        D = (b * s.D - (c[0] if c else 1) * s.dlse[..., None]) / a + s.dlse[..., None]
        if any(told):
            text = in_only(about).format("; ".join(filter(None, told)))
            yield text, partial(s.backward, slope=unit / s.scale * a, D=D)


def shares(s: Scene, names: list[str], whole: dict[str, Tensor]) -> Iterator[Guess]:
    """dk and dv to which query heads add more or less than their share, or that of another key/value head."""
    each, told = s.backward(gather=lambda x: x.flatten(2, 3)), []  # by query head, b n h d
    right = torch.eye(s.case.g).double().repeat_interleave(s.e, 0)
    for name in names:
        parts, got = (x.transpose(2, 3).flatten(0, 2) for x in (each[name], whole[name]))
        told.append(least_change(parts, got, right))
    if not names or any((x - told[0]).abs().max() > 0.05 for x in told[1:]):
        return
    share, wrong = told[0], []
    for text, heads in {
        "query heads {} add nothing": (share.abs() < 0.05).all(1),
        "query heads {} add to another key/value head": ((share > 0.05) & (right == 0)).any(1),
        "query heads {} add a part of theirs": ((share * right).sum(1) - 1).abs().gt(0.05)
        & (share.abs() > 0.05).any(1),
    }.items():
        wrong += [text.format(", ".join(map(str, heads.nonzero().flatten().tolist())))] if heads.any() else []
    if wrong:
        made = lambda: {n: torch.einsum("bnhd,hg->bngd", each[n], share) for n in names}
        yield in_only(names).format("; ".join(wrong)), made


def homes(s: Scene, names: list[str], whole: dict[str, Tensor], m: int) -> Iterator[Guess]:
    """dk and dv that end in the place of another rank's, in parts of an m-th of a shard."""
    size, each = s.case.n // s.p, [s.backward(times=s.times * (s.mine == r)) for r in range(s.p)]
    if not names or size % m:
        return
    cut = lambda y: y.unflatten(2, (m, -1)).flatten(1, 2)
    lay = lambda x: cut(x[:, torch.stack(s.case.shards)]).movedim(1, -1).flatten(0, -2)
    parts = torch.cat([lay(x[names[0]]) for x in each], 1)  # columns are whose queries gave it, for which keys
    home = torch.eye(m * s.p).double().repeat(s.p, 1)
    to = least_change(parts, lay(whole[names[0]]), home).view(s.p, m * s.p, -1)
    half, seen, told = m * s.there // size, s.times > 0, []
    count = lambda k, f: to[s.mine, m * s.theirs + half, m * ((s.theirs + k) % s.p) + (half + f) % m]
    for k, f in itertools.product(range(s.p), range(m)):
        away, by = seen & (count(k, f).abs() > 0.05), (k + s.p // 2) % s.p - s.p // 2
        place = " in ".join(["the other half of a shard"] * f + [f"rank r{by:+d}"] * bool(k))
        told += [f"pairs are added to {place}: {where(s, away, seen)}"] if place and away.any() else []
    move = lambda r, y: torch.einsum("bulgd,ut->btlgd", cut(y), to[r]).unflatten(1, (-1, m)).flatten(2, 3)
    if told:
        text = in_only(names).format("; ".join(filter(None, (differs(s, s.times * count(0, 0)), *told))))
        yield text, lambda: {n: sum(s.moved(x[n], partial(move, r)) for r, x in enumerate(each)) for n in names}
