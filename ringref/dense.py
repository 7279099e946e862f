"""Dense attention: the definition that judges the others.

Plain einsum and autograd. It writes the masks and the multiplicity rule itself and shares no
kernel, merge, index set or backward with the other methods. A key that a query sees through m
branches of a dilation counts m times, which is one softmax with log m added to the score; no key (m
= 0) is −inf.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .engine.call import Call, agree, exactly
from .shard import Attended, Dilation, Shard, eagerly, once, wide


@eagerly
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: Tensor | None = None,
    dilation: Dilation | None = None,
    mask_mod=None,
    score_mod=None,
    scale: float | None = None,
    shard: Shard | None = None,
    q_chunk: int | None = None,
    backend: str = "auto",
) -> Attended:
    """Attention by its definition, on one rank; under a shard every rank gathers and computes the
    whole.

    Args:
        q: b s h d; k: b s' g d with g dividing h, query head j using key/value head j // (h/g); v: b s' g d_v.
        causal: a query sees the keys at its own position and before.
        window: (left, right): a query at position i sees the keys at i − left … i + right, None being no bound;
            distances are those of global positions, whatever else is asked.
        cu_seqlens: documents packed into one sequence: a 1-D integer tensor 0 = c₀ ≤ c₁ ≤ … ≤ n, on the CPU if
            nothing is to wait for a GPU, alike on all ranks and for the whole batch. A query sees its own document.
        dilation: LongNet's branches (2307.02486); None is one branch with w = n, r = 1. Segments and offsets count
            from the start of the document.
        mask_mod: `(b, h, q_idx, kv_idx) -> keep`, FlexAttention's signature, pointwise on global
            indices. The backward asks it again, so it must answer alike: that a tensor which it uses has been changed
            in place is an error, and that it has been given another, or a number, is not noticed.
        score_mod: `(score, b, h, q_idx, kv_idx) -> score`, FlexAttention's signature, pointwise: makes of scale · q·k,
            in float32 or wider, the score that is masked (softcap, ALiBi, a bias); −inf counts as masked. The
            gradient flows through it to q and k; a tensor that it captures may not require grad.
        scale: factor of the scores, 1/√d by default.
        shard: who holds what (see `partition`); None: I hold the whole sequence, counted from 0.
        q_chunk: query rows whose scores exist at one time (recomputed in the backward).
        backend: "auto" or "math", the only one that the definition has.

    Returns:
        `Attended(out, lse)`: out b s h d_v in q's dtype, lse b h s in natural log, float32 (float64
        for float64). A query that sees no key has out 0, lse −inf and zero gradients. A NaN counts where it is seen: in
        q or k it makes out and lse of the queries that see it NaN, in v its feature of their out; an infinity leaves
        there what is not finite, but for a score of −inf, which is a key not seen. What is not seen changes nothing of
        out and lse, on the CPU; on a GPU it may reach other rows of its block. In gradients a NaN is never lost: dq of
        the queries that see it is NaN, and dk of the keys that these see, and dv too if it is in q or k; but there it
        may reach any row, of other rows in each method. out and lse may be changed in place: the backward then runs
        the forward again (the other three methods keep no copy), so on all ranks or on none.

    `torch.autocast` changes nothing: the precision is that of q, k and v as they are given, and what `score_mod` and
    `mask_mod` compute is left alone too; the backward belongs outside it, as everywhere in PyTorch. `torch.compile`
    breaks its graph here, and finds the same.

    Raises:
        TypeError, ValueError: an argument is wrong, or differs between ranks; raised on every rank.
        NotImplementedError: the backend cannot do it.
    """
    call = agree(
        "dense", q, k, v, able=_only_math, causal=causal, window=window, cu_seqlens=cu_seqlens, dilation=dilation,
        mask_mod=mask_mod, score_mod=score_mod, scale=scale, shard=shard, q_chunk=q_chunk, backend=backend,
    )  # fmt: skip
    queries, keys = ([one.index for one in side] for side in call.table)
    # wide before the chunks, whose dK and dV then add up without rounding
    dtype, held = q.dtype, ((q, queries), (k, keys), (v, keys))
    if call.ring.size > 1:
        q, k, v = (_Whole.apply(x, call, index) for x, index in held)
    q, k, v = (x.to(wide(dtype)) for x in (q, k, v))
    q_idx, kv_idx = torch.cat(queries).to(q.device), torch.cat(keys).to(q.device)
    outs, lses = [], []
    for rows in range(0, q.shape[1] or 1, q_chunk or q.shape[1] or 1):
        some = slice(rows, rows + (q_chunk or q.shape[1]))
        part = (q[:, some], k, v, q_idx[some], kv_idx, call)
        out, lse = _define(*part) if q_chunk is None else checkpoint(_define, *part, use_reentrant=False)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 1).to(dtype), torch.cat(lses, 2)
    return Attended(*(_Mine.apply(out, lse, call.anchor, call, queries) if call.ring.size > 1 else (out, lse)))


def _only_math(_q: Tensor, _v: Tensor, backend: str, *_) -> None:
    if backend not in ("auto", "math"):
        raise NotImplementedError(f"backend: dense attention is the definition and has only 'math', got {backend!r}")


@exactly
def _define(q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, kv_idx: Tensor, call: Call) -> Attended:
    """softmax(scale · q kᵀ + log multiplicity) v, for these queries and all keys."""
    g = k.shape[2]
    q = rearrange(q, "b q (g e) d -> b q g e d", g=g)
    scores = torch.einsum("bqged,bkgd->bgeqk", q, k) * call.scale
    scores = rearrange(scores, "b g e q k -> b (g e) q k")
    times, indices = _times_seen(q_idx, kv_idx, scores, call)
    if call.score_mod is not None:
        # what a masked score becomes is nobody's concern: neither the value nor the derivative reaches q and k
        made = call.score(scores.masked_fill(times == 0, 0.0), *indices)
        scores = torch.where(times == 0, scores, made)
    scores = torch.where(times == 0, -math.inf, scores + times.log())  # also where a score is NaN
    seen = scores != -math.inf
    blind = ~seen.any(-1, keepdim=True)
    # before the softmax, whose gradient on a row of −inf is NaN
    scores = scores.masked_fill(blind, 0.0)
    logs = scores.log_softmax(-1)
    lse = _log_sum_exp(scores, logs).masked_fill(blind[..., 0], -math.inf)
    weights = rearrange(logs.exp(), "b (g e) q k -> b g e q k", g=g)
    if v.is_cpu and not v.sum().isfinite():  # 0 · NaN is NaN, and what is not seen must not count; what is seen is NaN
        number = v.isfinite()
        reached = rearrange(seen, "b (g e) q k -> b g e q k", g=g).to(v.dtype)
        reached = torch.einsum("bgeqk,bkgd->bqged", reached, (~number).to(v.dtype)) > 0
        out = torch.einsum("bgeqk,bkgd->bqged", weights, v.masked_fill(~number, 0.0))
        out = out * torch.where(reached, math.nan, 1.0).to(v.dtype)
    else:
        out = torch.einsum("bgeqk,bkgd->bqged", weights, v)
    out = rearrange(out, "b q g e d -> b q (g e) d")
    return Attended(out.masked_fill(blind[..., 0].transpose(1, 2)[..., None], 0.0), lse)


def _log_sum_exp(scores: Tensor, logs: Tensor) -> Tensor:
    """log Σ exp(score): any key's score less the log of its weight. `torch.logsumexp` holds a score matrix more, and so
    does the backward of `softmax` on a GPU.
    """
    if not scores.shape[3]:
        return scores.sum(-1)
    most, top = scores.max(-1)
    return most - logs.gather(-1, top[..., None])[..., 0]


def _times_seen(q_idx: Tensor, kv_idx: Tensor, scores: Tensor, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """How often each query sees each key, broadcastable to b h q k, and the indices b, h, q_idx and kv_idx."""
    device = q_idx.device
    batch, head = (torch.arange(size, device=device) for size in scores.shape[:2])
    batch, head = batch[:, None, None, None], head[None, :, None, None]
    q_idx, kv_idx = q_idx[None, None, :, None], kv_idx[None, None, None, :]
    times = torch.ones((), dtype=scores.dtype, device=device)
    q_in, kv_in = q_idx, kv_idx  # counted from the start of the document
    if call.documents is not None:
        bounds = call.documents.index.to(device)
        q_document, kv_document = ((x[..., None] >= bounds).sum(-1) - 1 for x in (q_idx, kv_idx))
        times = (q_document == kv_document).to(scores.dtype)
        q_in, kv_in = q_idx - bounds[q_document], kv_idx - bounds[kv_document]
    if call.dilation is not None:
        through = 0
        branches = list(zip(call.dilation.segment_lengths, call.dilation.dilation_rates, strict=True))
        for i, (w, r) in enumerate(branches):
            offset = head % r
            if call.dilation.heads == "grouped":
                few, more = divmod(head.shape[1], len(branches))
                first, last = i * few + min(i, more), (i + 1) * few + min(i + 1, more)
                offset = torch.where((head >= first) & (head < last), i % r, -1)
            kept_q, kept_k = q_in % w % r == offset, kv_in % w % r == offset
            through = through + (kept_q & kept_k & (q_in // w == kv_in // w)).to(scores.dtype)
        times = times * through
    left, right = call.window
    if left is not None:
        times = times * (q_idx - kv_idx <= left)
    if right is not None:
        times = times * (kv_idx - q_idx <= right)
    if call.causal:
        times = times * (kv_idx <= q_idx)
    if call.mask_mod is not None:
        times = times * call.keep(batch, head, q_idx, kv_idx)
    return times, (batch, head, q_idx, kv_idx)


class _Whole(torch.autograd.Function):
    """Every rank's rows. Every rank computes the whole gradient (see `_Mine`), so its own rows of
    it are exact.
    """

    @staticmethod
    def forward(ctx, x, call, positions):
        lengths = [len(index) for index in positions]
        ctx.start, ctx.length = sum(lengths[: call.ring.rank]), lengths[call.ring.rank]
        shapes = [(x.shape[0], length, *x.shape[2:]) for length in lengths]
        return torch.cat(call.during(backward=False).ring.gather(x.contiguous(), shapes), 1)

    @staticmethod
    @once
    def backward(ctx, grad):
        return grad.narrow(1, ctx.start, ctx.length), None, None


class _Mine(torch.autograd.Function):
    """My own rows of the whole; backward gathers the other ranks' dO and dlse."""

    @staticmethod
    def forward(ctx, out, lse, anchor, call, positions):
        ctx.call, ctx.lengths = call, [len(index) for index in positions]
        start, length = sum(ctx.lengths[: call.ring.rank]), ctx.lengths[call.ring.rank]
        return out.narrow(1, start, length).clone(), lse.narrow(2, start, length).clone()

    @staticmethod
    @once
    def backward(ctx, dout, dlse):
        whole, ring = [], ctx.call.during(backward=True).ring
        for grad, dim in ((dout, 1), (dlse, 2)):
            shapes = [(*grad.shape[:dim], length, *grad.shape[dim + 1 :]) for length in ctx.lengths]
            whole.append(torch.cat(ring.gather(grad.contiguous(), shapes), dim))
        return *whole, None, None, None
