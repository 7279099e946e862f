"""Attention on one block of keys, its backward, and the merge: the one idea of the package,
readable.

Attention over a union of key sets is the merge of the attention over each set. For two results over
disjoint keys, with `lse = log Σ exp(score)`: the merged `lse` is `logaddexp(lse_a, lse_b)` and the
merged `out` is the mean of the two weighted by `exp(lse_a − lse)` and `exp(lse_b − lse)` (online
softmax, 1805.02867; FlashAttention-2, 2307.08691).

And given the *merged* `out` and `lse` of a query, each block's gradient is exact on its own:
`P = exp(S − lse)`, `D = rowsum(dO∘O) − dlse`, `dV = Pᵀ dO`, `dS = P∘(dO Vᵀ − D)`, `dQ = scale·dS
K`, `dK = scale·dSᵀ Q`.

A block is m segments at once: q `b m c h d` · k `b m k g d` · v `b m k g d_v` · out `b m c h d_v` ·
lse `b m c h` · g divides h.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from .shard import Attended, wide

Modify = Callable[[Tensor], Tensor]  # what score_mod makes of scores b m h c k


def merge(a: Attended, b: Attended) -> Attended:
    """The attention over the union of two disjoint key sets.

    Args:
        a, b: results for the same queries, `out` b s h d and `lse` b h s (natural log, −inf where
            no key was seen).

    Returns:
        `out` and `lse`, both in float32 or wider so that chains of merges do not lose bits;
        differentiable.
    """
    a, b = _attended("a", a), _attended("b", b)
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        shapes = [tuple(x.shape) for x in (*a, *b)]
        raise ValueError(f"a and b must be results for the same queries, got shapes {shapes}")
    dtype = wide(torch.promote_types(a.out.dtype, b.out.dtype))
    # a row that saw nothing on either side has no gradient: keep −inf − −inf out of the graph
    blind = (a.lse == -math.inf) & (b.lse == -math.inf)
    lses = [x.lse.to(dtype).masked_fill(blind, 0.0) for x in (a, b)]
    lse = torch.logaddexp(*lses)
    first, second = (rearrange(torch.exp(x - lse), "b h s -> b s h 1") for x in lses)
    # not by a weight of 0, which makes NaN of NaN
    one, other = (x.out.masked_fill(rearrange(x.lse == -math.inf, "b h s -> b s h 1"), 0.0) for x in (a, b))
    return Attended(first * one + second * other, lse.masked_fill(blind, -math.inf))


def _attended(name: str, x: Attended) -> Attended:
    if isinstance(x, tuple) and len(x) == 2 and all(isinstance(y, Tensor) for y in x):
        return Attended(*x)
    raise TypeError(f"{name} must be Attended(out, lse), what a method returns, got {type(x).__name__}")


def sink(attended: Attended, logits: Tensor) -> Attended:
    """Attention sinks: one more key, which every query sees with the score `logits[head]` and whose value is 0.

    A sink adds exp(logit) to the sum that divides and nothing to what is divided, so it is the merge with a result
    whose out is 0 and whose lse is the logit. It needs nothing from the other ranks: a rank's lse counts every key
    that its queries see, wherever the key is held, and merging is associative, so the sink may come last, once, on each
    rank's own rows. On every hop it would count p times.

    Args:
        attended: what a method returned, after all merging.
        logits: h, one logit per query head, of any floating-point dtype.

    Returns:
        out b s h d in its dtype, lse b h s. A query that saw nothing has out 0 and lse = logit; where that is −inf,
        nothing changes. Differentiable in both; the logits' gradient is that of this rank's rows, to be summed over
        ranks as that of any parameter that each rank has a copy of.

    Raises:
        TypeError, ValueError: logits is not one floating-point number per head on the device of lse.
    """
    attended = out, lse = _attended("attended", attended)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.layout != torch.strided:
        got = f"{logits.dtype}, {logits.layout}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating-point tensor, one number per head, got {got}")
    if logits.shape != lse.shape[1:2] or logits.device != lse.device:
        got = f"{tuple(logits.shape)} on {logits.device}"
        raise ValueError(f"logits must be one number for each of {lse.shape[1]} heads on {lse.device}, got {got}")
    logits = rearrange(logits.to(lse.dtype), "h -> 1 h 1").expand_as(lse)
    merged = merge(attended, Attended(out.new_zeros(()).expand_as(out), logits))
    return Attended(merged.out.to(out.dtype), merged.lse.to(lse.dtype))


def _by_group(x: Tensor, g: int) -> Tensor:
    """Rows of the query heads that share a key/value head, together: so products need no copy of
    the scores.
    """
    return rearrange(x, "b m c (g e) d -> b m g (e c) d", g=g)


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """Back to `b m c (g e) d`, as many rows and heads as `like`."""
    return rearrange(x, "b m g (e c) d -> b m c (g e) d", c=like.shape[2], e=like.shape[3] // x.shape[2])


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled scores `b m g (e c) k` of query heads (g e)."""
    scores = _by_group(q, k.shape[3]) @ rearrange(k, "b m k g d -> b m g d k")
    scores *= scale
    return scores


def _modified(scores: Tensor, q: Tensor, modify: Modify, differentiably: bool) -> tuple[Tensor, Tensor]:
    """Scores as `b m h c k`, a leaf of autograd, and what `modify` makes of them."""
    e = q.shape[3] // scores.shape[2]
    leaf = scores.unflatten(3, (e, q.shape[2])).flatten(2, 3).detach().requires_grad_(differentiably)
    with torch.enable_grad():  # in the forward too, where whatever else needs a gradient shows by it
        return leaf, modify(leaf)


def _mask(scores: Tensor, q: Tensor, keep: Tensor | None, value: float) -> Tensor:
    """Write `value` where not kept."""
    if keep is not None:
        scores.unflatten(3, (-1, q.shape[2])).masked_fill_(~keep, value)
    return scores


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None = None, modify: Modify | None = None
) -> Attended:
    """Attend to one block; `keep` (True: seen) broadcasts to b m g e c k, `modify` makes scores b m h c k of scores,
    before `keep` counts. Works in float32 or wider, in one score matrix and what `modify` needs.
    """
    dtype = wide(q.dtype)
    scores = _scores(q.to(dtype), k.to(dtype), scale)
    if modify is not None:
        leaf, made = _modified(scores, q, modify, False)
        leaf.copy_(made)
        del leaf, made
    _mask(scores, q, keep, -math.inf)
    v, reached = rearrange(v.to(dtype), "b m k g d -> b m g k d"), None
    if type(v) is Tensor and v.is_cpu and not v.sum().isfinite():  # 0 · NaN is NaN, and what is masked must not count
        reached = (scores != -math.inf).to(dtype) @ (~v.isfinite()).to(dtype) > 0
        v = v.nan_to_num(0.0, 0.0, 0.0)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill_(top == -math.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = weights @ v
    out /= total.masked_fill(total == 0, 1.0)
    if reached is not None:
        out.masked_fill_(reached, math.nan)
    return Attended(_by_head(out, q), _by_head(top + total.log(), q)[..., 0])


def backward(
    dout, dlse, q, k, v, out, lse, scale: float, keep: Tensor | None = None, modify: Modify | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one block, from the merged `out` and `lse` (+inf for a query that saw no key at
    all); `dlse` may be None. The derivative of `modify` is autograd's, on the block.

    Works in two score matrices and what autograd keeps of `modify`.
    """
    dtype, g = wide(q.dtype), k.shape[3]
    dout, q, k, v = (x.to(dtype) for x in (dout, q, k, v))
    delta = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse  # D
    weights, leaf, made = _scores(q, k, scale), None, None
    if modify is not None:
        leaf, made = _modified(weights, q, modify, True)
        weights = torch.empty_like(weights).copy_(made.detach().reshape(weights.shape))
    _mask(weights, q, keep, -math.inf).sub_(_by_group(lse[..., None], g)).exp_()  # P
    dout = _by_group(dout, g)
    dv = weights.mT @ dout
    ds = dout @ rearrange(v, "b m k g d -> b m g d k")
    ds.sub_(_by_group(delta[..., None], g)).mul_(weights)
    if modify is not None:
        ds = _before(ds, leaf, made)
        _mask(ds, q, keep, 0.0)  # whatever the derivative is there
    ds.mul_(scale)
    dq = _by_head(ds @ rearrange(k, "b m k g d -> b m g k d"), q)
    dk = ds.mT @ _by_group(q, g)
    return dq, *(rearrange(x, "b m g k d -> b m k g d") for x in (dk, dv))


def _before(ds: Tensor, leaf: Tensor, made: Tensor) -> Tensor:
    """The gradient of the scores that `modify` was given, from that of those it made."""
    if not made.requires_grad:  # made of indices alone
        return ds.zero_()
    (found,) = torch.autograd.grad(made, leaf, ds.reshape(made.shape), allow_unused=True)
    return ds.zero_() if found is None else found.reshape(ds.shape).contiguous()
