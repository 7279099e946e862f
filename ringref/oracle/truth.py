"""The float64 answer to a case, and the error budget that plain attention in the candidate's dtype sets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cases import SCORE_MODS, Case, index, modified
from .scene import Scene

MULTIPLE = {"float64": 4.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
FLOOR = {"float64": 8.0, "float32": 8.0, "bfloat16": 0.2, "float16": 0.2}


class Truth:
    """The float64 answer to one step of a case, and what plain attention in the candidate's dtype makes of it."""

    def __init__(self, case: Case, data: dict[str, Tensor]):
        self.case, self.data, self.whole = case, data, case.reference(data)
        yard = torch.float32 if case.dtype == "float64" else getattr(torch, case.dtype)
        rough, whole = {name: x.to(yard) for name, x in data.items()}, ([torch.arange(case.m)], [torch.arange(case.n)])
        cuts = [(yard, *whole), (torch.float32, case.asks[: 1 if case.replicated else None], case.shards)]
        self.plain = [plain(case, rough, *cut) for cut in cuts]
        self.eps = torch.finfo(yard).eps
        self.scene = Scene(self)
        self.terms = self.scene.terms()

    def part(self, name: str, rank: int, whole: dict | None = None) -> Tensor:
        """One rank's share of a tensor."""
        x = (whole or self.whole)[name]
        mine = (self.case.shards if name in ("dk", "dv") else self.case.asks)[rank]
        return x if x.ndim == 1 else x[..., mine] if x.ndim == 3 else x[:, mine]

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
        # exp(score − lse) can be no better than an lse and a score in float32, coarse where they are large, and the
        # backward may add the score up in another order
        size = self.part(name, rank, self.terms).square().sum().sqrt().item() if name in self.terms else 0.0
        largest = self.whole["lse"].nan_to_num(neginf=0.0).abs().max().item() * (name != "lse")
        coarse = torch.finfo(torch.float32).eps * max(largest, size / max(want.norm().item(), typical))
        return error, MULTIPLE[self.case.dtype] * max(*rough, FLOOR[self.case.dtype] * self.eps, coarse)


def _distance(got: Tensor, want: Tensor, norm: float) -> float:
    """‖got − want‖ relative to ‖want‖, or to `norm` where that is more; infinite if it is not a number."""
    error = ((got - want).norm() / max(want.norm().item(), norm)).item()
    return math.inf if math.isnan(error) else error


@torch.no_grad()
def plain(case: Case, data: dict[str, Tensor], work: torch.dtype, asks: list[Tensor], cut: list[Tensor]) -> dict:
    """softmax(q kᵀ/√d) v and its backward in the dtype `work`; the parts of each rank in `asks` and `cut` are rounded
    to the dtype of `data` once and then added in float32.

    Every fused or distributed attention recomputes exp(score − lse) and rounds its parts; what that costs, with large
    scores or large parts that cancel, is nobody's mistake. Adding the parts in the dtype costs more, and is one.
    """
    q, k, v, do, dlse = (data[name].to(work) for name in ("q", "k", "v", "do", "dlse"))
    wide_k, wide_v = (x.repeat_interleave(case.h // case.g, 2) for x in (k, v))
    # a key that counts m times has log m added
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) * case.factor
    scores, slope = modified(SCORE_MODS.get(case.score_mod), scores, index(case))
    scores = scores + case.times.to(work).log()
    lse = scores.float().logsumexp(-1, keepdim=True)
    if case.sink:
        lse = torch.logaddexp(lse, data["sink"].float()[:, None, None])
    bound = lse.nan_to_num(neginf=math.inf)
    P = (scores - bound).exp().to(work)
    out = torch.einsum("bhqk,bkhd->bqhd", P, wide_v)
    D = (do.float() * out).sum(-1).transpose(1, 2) - dlse.masked_fill(lse[..., 0] == -math.inf, 0.0)
    dS = (P * (torch.einsum("bqhd,bkhd->bhqk", do, wide_v) - D[..., None])).to(work) * slope * case.factor

    def rounded(x: Tensor) -> Tensor:
        return x.to(data["q"].dtype).float()

    shapes = {"out": do, "dq": q, "dk": k, "dv": v}
    parts = {name: torch.zeros_like(x, dtype=torch.float32) for name, x in shapes.items()}
    for mine in cut:
        weight = P[..., mine].float().sum(-1).transpose(1, 2)[..., None].clamp_min(1e-30)
        part = torch.einsum("bhqk,bkhd->bqhd", P[..., mine], wide_v[:, mine])
        parts["out"] += weight * rounded(part / weight)
        parts["dq"] += rounded(torch.einsum("bhqk,bkhd->bqhd", dS[..., mine], wide_k[:, mine]))
    for mine in asks:
        for name, pairs, x in (("dk", dS, q), ("dv", P, do)):
            part = torch.einsum("bhqk,bqhd->bkhd", pairs[:, :, mine], x[:, mine])
            parts[name] += rounded(part.unflatten(2, (case.g, -1)).sum(3))
    found = {name: rounded(x) for name, x in parts.items()} | {"lse": lse[..., 0]}
    if case.sink:
        found["dsink"] = -((data["sink"].float()[:, None] - lse[..., 0]).exp() * D).sum((0, 2))
    return found
