"""One step of a case in float64, as ingredients: what attention makes of them when some are changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cases import SCORE_MODS, index, modified, sunk


class Scene:
    """One step of a case in float64. Its attributes are the ingredients; `forward` and `backward` take others by name.

    Tensors of pairs are b h m n, or what broadcasts to that, with leading dimensions for parts that are merged.
    """

    def __init__(self, truth: Any, way: int = 1):
        self.case = case = truth.case
        self.p, self.times, self.scale = case.p, case.times, case.factor
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
        grid = partial(torch.meshgrid, indexing="ij")  # of pairs of a query and a key
        self.i, self.j = grid(torch.arange(case.n - case.m, case.n), torch.arange(case.n))
        (self.mine, self.theirs), (self.here, self.there) = grid(*self.owner), grid(*self.loc)
        self.way = way  # +1 where blocks go to the next rank, −1 where to the one before
        self.K_of = self.V_of = self.j  # the key whose K, and whose V, is used for a pair
        self.q_of = self.do_of = self.i - self.i[:1]  # the row whose q, and whose dO
        self.order = [torch.cat(cut).argsort() for cut in (case.asks, case.shards)]
        self.even = len({len(mine) for mine in case.shards}) == 1 and case.p > 1 and case.queries is None
        self.halved = self.even and case.layout == "zigzag"  # each rank has an early half and a late one
        self.hop = way * (self.mine - self.theirs) % self.p  # at which a query's rank sees a key
        self.O, self.L, self.top = self.forward().values()
        self.D = row_sums(self.do, self.O)[..., None]
        self.dlse = torch.where(self.L.isfinite(), truth.data["dlse"].double(), 0.0)

    def scores(self, x: Any) -> tuple[Tensor, Tensor | float]:
        """Scores plus the log of how often each pair counts, and the slope of score_mod."""
        S = torch.einsum("bqhd,bkhd->bhqk", x.q, self.bank(x.K, x.V, x.K_of))
        S = (S if x.K_of is self.j else S.gather(-1, x.K_of.expand(*S.shape[:2], *x.K_of.shape))) * x.scale
        S = S if x.q_of is self.q_of else S.gather(-2, x.q_of.expand(S.shape))
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
        slope = changed.get("slope", slope)
        P = (S - L.masked_fill(L == -math.inf, math.inf)).exp()
        V = self.bank(x.V, x.K, x.V_of)
        dP = torch.einsum("bqhd,bkhd->bhqk", x.do, V)
        dP = dP if x.V_of is self.j else dP.gather(-1, x.V_of.expand(*dP.shape[:2], *x.V_of.shape))
        dP = dP if x.do_of is self.do_of else dP.gather(-2, x.do_of.expand(dP.shape))
        D = (x.D if "D" in changed else row_sums(x.do, x.O)[..., None]) - x.dlse[..., None]
        dS = P * (dP - D) * slope * x.scale
        P, dS = (y.reshape(-1, *y.shape[-4:]).sum(0) for y in (P, dS))
        to = lambda y, of, usual: y if of is usual else torch.zeros_like(y).scatter_add(-2, of.expand(y.shape), y)
        pairs = (to(dS, x.q_of, self.q_of), x.q), (to(P, x.do_of, self.do_of), x.do)
        wide = (torch.einsum("bhqk,bqhd->bkhd", *pair) for pair in pairs)
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

    def terms(self) -> dict[str, Tensor]:
        """The size of the terms whose sums are dq and dk, each times its row's lse: where they cancel, what rounding
        the lse makes of them does not.
        """
        (S, slope), L = self.scores(self), self.L.nan_to_num(neginf=math.inf)[..., None]
        dP = torch.einsum("bqhd,bkhd->bhqk", self.do, self.V)
        weight = (S - L).exp() * (1 + L.abs()).nan_to_num(posinf=0.0)
        dS = (weight * (dP.abs() + self.D.abs()) * slope * self.scale).square()
        dq, dk = torch.einsum("bhqk,bkhd->bqhd", dS, self.K**2), torch.einsum("bhqk,bqhd->bkhd", dS, self.q**2)
        return {"dq": dq.sqrt(), "dk": self.gather(dk.unflatten(2, (self.case.g, self.e))).sqrt()}

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

    def halves_swapped(self, side: int) -> Tensor:
        """Positions of each rank's queries (0) or keys (1) in a zigzag layout, its two halves in the other order."""
        return torch.stack((self.case.asks, self.case.shards)[side]).roll(self.case.n // self.p // 2, 1)

    def places(self, whose: bool = False) -> dict[str, Tensor]:
        """Some of the pairs of query and key, by the words for them; `whose` asks of sequences and heads too."""
        p, hop = self.p, self.hop
        some = {"the own block": hop == 0, "received blocks": hop > 0, "the last hop": hop == p - 1}
        some |= {"hop 1": hop == 1, "hops after 1": hop > 1} | {f"hop {t}": hop == t for t in range(2, p - 1)}
        some |= {"blocks of earlier ranks": self.theirs < self.mine, "blocks of later ranks": self.theirs > self.mine}
        some |= {"the first rank's block elsewhere": (self.theirs == 0) & (self.mine > 0)}
        if whose:
            some["the sequences after the first"] = torch.arange(self.case.b)[:, None, None, None] > 0
            some["odd heads"] = torch.arange(self.case.h)[:, None, None] % 2 > 0
        return {text: pairs for text, pairs in some.items() if pairs.any() and not pairs.all()}

    def seen_in_block(self) -> Tensor:
        """How many pairs that are seen are in a pair's block."""
        block, seen = self.mine * self.p + self.theirs, (self.times > 0).sum((0, 1))
        return torch.zeros(self.p**2).index_add(0, block.flatten(), seen.flatten().float())[block]

    def on(self, pairs: Tensor, changed: dict[str, Any]) -> dict[str, Any]:
        """Ingredients that are changed for some pairs only."""
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
