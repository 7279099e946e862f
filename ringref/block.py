"""Attention on one block of keys, its backward, and the merge: the one idea of the package, readable.

Attention over a union of key sets is the merge of the attention over each set. For two results over disjoint keys, with
`lse = log Σ exp(score)`: the merged `lse` is `logaddexp(lse_a, lse_b)` and the merged `out` is the mean of the two weighted by
`exp(lse_a − lse)` and `exp(lse_b − lse)` (online softmax, 1805.02867; FlashAttention-2, 2307.08691).

And given the *merged* `out` and `lse` of a query, each block's gradient is exact on its own:
`P = exp(S − lse)`, `D = rowsum(dO∘O) − dlse`, `dV = Pᵀ dO`, `dS = P∘(dO Vᵀ − D)`, `dQ = scale·dS K`, `dK = scale·dSᵀ Q`.

A block is m segments at once: q, out `b m c h d` · k, v `b m k g d` · lse `b m c h` · g divides h.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from .layout import Attended, wide


def weigh(lse: Tensor, other: Tensor) -> Tensor:
    """The share of `other` in the merge, exp(other − merged) (0 where neither saw a key); `lse` becomes the merged one."""
    share = torch.sigmoid(other - lse).nan_to_num_(0.0)
    torch.logaddexp(lse, other, out=lse)
    return share


def blend(out: Tensor, other: Tensor, share: Tensor, into: Tensor | None = None) -> Tensor:
    """(1 − share)·out + share·other, computed in the share's dtype."""
    kept = 1 - share
    return torch.addcmul(out.mul_(kept) if out is into else out * kept, other, share, out=into)


def merge(a: Attended, b: Attended) -> Attended:
    """The attention over the union of two disjoint key sets.

    Args:
        a, b: results for the same queries, `out` b s h d and `lse` b h s (natural log, −inf where no key was seen).

    Returns:
        `out` and `lse`, both in float32 or wider so that chains of merges do not lose bits; differentiable.
    """
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        shapes = [tuple(x.shape) for x in (*a, *b)]
        raise ValueError(f"a and b must be results for the same queries, got shapes {shapes}")
    dtype = wide(torch.promote_types(a.out.dtype, b.out.dtype))
    # a row that saw nothing on either side has no gradient: keep −inf − −inf out of the graph
    blind = (a.lse == -math.inf) & (b.lse == -math.inf)
    first, second = (x.lse.to(dtype).masked_fill(blind, 0.0) for x in (a, b))
    share = rearrange(torch.sigmoid(second - first), "b h s -> b s h 1")
    lse = torch.logaddexp(first, second).masked_fill(blind, -math.inf)
    return Attended(blend(a.out.to(dtype), b.out.to(dtype), share), lse)


def _scores(q: Tensor, k: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    """Scaled scores `b m g e c k` of query heads (g e), −inf where not kept."""
    scores = torch.einsum("bmcged,bmkgd->bmgeck", rearrange(q, "b m c (g e) d -> b m c g e d", g=k.shape[3]), k)
    scores *= scale
    return scores if keep is None else scores.masked_fill_(~keep, -math.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None = None) -> Attended:
    """Attend to one block; `keep` (True: seen) broadcasts to b m g e c k. Works in float32 or wider, in one score matrix."""
    dtype = wide(q.dtype)
    scores = _scores(q.to(dtype), k.to(dtype), scale, keep)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill_(top == -math.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bmgeck,bmkgd->bmcged", weights, v.to(dtype))
    out /= rearrange(total.masked_fill(total == 0, 1.0), "b m g e c 1 -> b m c g e 1")
    return Attended(
        rearrange(out, "b m c g e d -> b m c (g e) d"), rearrange(top + total.log(), "b m g e c 1 -> b m c (g e)")
    )


def backward(dout, dlse, q, k, v, out, lse, scale: float, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one block, from the merged `out` and `lse` (+inf for a query that saw no key at all); `dlse` may be None.

    Works in two score matrices.
    """
    dtype, g = wide(q.dtype), k.shape[3]
    dout, q, k, v = (x.to(dtype) for x in (dout, q, k, v))
    delta = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse  # D
    heads = "b m c (g e) -> b m g e c 1"
    weights = _scores(q, k, scale, keep).sub_(rearrange(lse, heads, g=g)).exp_()  # P
    grouped = rearrange(dout, "b m c (g e) d -> b m c g e d", g=g)
    dv = torch.einsum("bmgeck,bmcged->bmkgd", weights, grouped)
    ds = torch.einsum("bmcged,bmkgd->bmgeck", grouped, v)
    ds.sub_(rearrange(delta, heads, g=g)).mul_(weights).mul_(scale)
    dq = rearrange(torch.einsum("bmgeck,bmkgd->bmcged", ds, k), "b m c g e d -> b m c (g e) d")
    dk = torch.einsum("bmgeck,bmcged->bmkgd", ds, rearrange(q, "b m c (g e) d -> b m c g e d", g=g))
    return dq, dk, dv
