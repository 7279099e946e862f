"""Attention on one block of keys, its backward, and the merge: the one idea of the package,
readable.

Attention over a union of key sets is the merge of the attention over each set. For two results over
disjoint keys, with `lse = log Σ exp(score)`: the merged `lse` is `logaddexp(lse_a, lse_b)` and the
merged `out` is the mean of the two weighted by `exp(lse_a − lse)` and `exp(lse_b − lse)` (online
softmax, 1805.02867; FlashAttention-2, 2307.08691).

And given the *merged* `out` and `lse` of a query, each block's gradient is exact on its own:
`P = exp(S − lse)`, `D = rowsum(dO∘O) − dlse`, `dV = Pᵀ dO`, `dS = P∘(dO Vᵀ − D)`, `dQ = scale·dS
K`, `dK = scale·dSᵀ Q`.

A block is m segments at once: q, out `b m c h d` · k, v `b m k g d` · lse `b m c h` · g divides h.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from .shard import Attended, wide


def merge(a: Attended, b: Attended) -> Attended:
    """The attention over the union of two disjoint key sets.

    Args:
        a, b: results for the same queries, `out` b s h d and `lse` b h s (natural log, −inf where
            no key was seen).

    Returns:
        `out` and `lse`, both in float32 or wider so that chains of merges do not lose bits;
        differentiable.
    """
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        shapes = [tuple(x.shape) for x in (*a, *b)]
        raise ValueError(f"a and b must be results for the same queries, got shapes {shapes}")
    dtype = wide(torch.promote_types(a.out.dtype, b.out.dtype))
    # a row that saw nothing on either side has no gradient: keep −inf − −inf out of the graph
    blind = (a.lse == -math.inf) & (b.lse == -math.inf)
    lses = [x.lse.to(dtype).masked_fill(blind, 0.0) for x in (a, b)]
    lse = torch.logaddexp(*lses)
    first, second = (rearrange(torch.exp(x - lse), "b h s -> b s h 1") for x in lses)
    return Attended(first * a.out + second * b.out, lse.masked_fill(blind, -math.inf))


def _by_group(x: Tensor, g: int) -> Tensor:
    """Rows of the query heads that share a key/value head, together: so products need no copy of
    the scores.
    """
    return rearrange(x, "b m c (g e) d -> b m g (e c) d", g=g)


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """Back to `b m c (g e) d`, as many rows and heads as `like`."""
    return rearrange(x, "b m g (e c) d -> b m c (g e) d", c=like.shape[2], e=like.shape[3] // x.shape[2])


def _scores(q: Tensor, k: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    """Scaled scores `b m g (e c) k` of query heads (g e), −inf where not kept."""
    g = k.shape[3]
    scores = _by_group(q, g) @ rearrange(k, "b m k g d -> b m g d k")
    scores *= scale
    if keep is not None:
        scores.unflatten(3, (q.shape[3] // g, q.shape[2])).masked_fill_(~keep, -math.inf)
    return scores


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None = None) -> Attended:
    """Attend to one block; `keep` (True: seen) broadcasts to b m g e c k. Works in float32 or
    wider, in one score matrix.
    """
    dtype = wide(q.dtype)
    scores = _scores(q.to(dtype), k.to(dtype), scale, keep)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill_(top == -math.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = weights @ rearrange(v.to(dtype), "b m k g d -> b m g k d")
    out /= total.masked_fill(total == 0, 1.0)
    return Attended(_by_head(out, q), _by_head(top + total.log(), q)[..., 0])


def backward(dout, dlse, q, k, v, out, lse, scale: float, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one block, from the merged `out` and `lse` (+inf for a query that saw no key at
    all); `dlse` may be None.

    Works in two score matrices.
    """
    dtype, g = wide(q.dtype), k.shape[3]
    dout, q, k, v = (x.to(dtype) for x in (dout, q, k, v))
    delta = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse  # D
    weights = _scores(q, k, scale, keep).sub_(_by_group(lse[..., None], g)).exp_()  # P
    dout = _by_group(dout, g)
    dv = weights.mT @ dout
    ds = dout @ rearrange(v, "b m k g d -> b m g d k")
    ds.sub_(_by_group(delta[..., None], g)).mul_(weights).mul_(scale)
    dq = _by_head(ds @ rearrange(k, "b m k g d -> b m g k d"), q)
    dk = ds.mT @ _by_group(q, g)
    return dq, *(rearrange(x, "b m g k d -> b m k g d") for x in (dk, dv))
