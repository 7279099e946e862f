"""LongNet's dilated attention over gathered keys, as one softmax with log multiplicity added."""

import torch
import torch.distributed as dist


class GatherTokens(torch.autograd.Function):
    """All ranks' tokens in order along dim 1; backward reduces the gradient to its owner."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.tokens = group, x.shape[1]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.tokens
        return grad[:, start : start + ctx.tokens], None


def multiplicity(dilation, rows, cols, heads):
    """How many branches show key j to query i of each head; h q k."""
    count = torch.zeros(heads, len(rows), len(cols), device=rows.device)
    head = torch.arange(heads, device=rows.device)
    branches = len(dilation.segment_lengths)
    for branch in range(branches):
        w, r = dilation.segment_lengths[branch], dilation.dilation_rates[branch]
        offset, served = head % r, torch.ones_like(head, dtype=torch.bool)
        if dilation.heads == "grouped":
            sizes = [heads // branches + (i < heads % branches) for i in range(branches)]
            first = sum(sizes[:branch])
            offset = torch.full_like(head, branch % r)
            served = (head >= first) & (head < first + sizes[branch])
        row_kept = (rows % w % r)[None, :] == offset[:, None]
        col_kept = (cols % w % r)[None, :] == offset[:, None]
        together = (rows // w)[:, None] == (cols // w)[None, :]
        kept = row_kept[:, :, None] & col_kept[:, None, :] & together
        count += kept & served[:, None, None]
    return count


def attention(q, k, v, *, causal, group, dilation=None):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    b, s, h, d = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = h // k.shape[2]
    keys = GatherTokens.apply(k.to(wide).contiguous(), group).repeat_interleave(repeat, dim=2)
    values = GatherTokens.apply(v.to(wide).contiguous(), group).repeat_interleave(repeat, dim=2)
    rows = torch.arange(rank * s, (rank + 1) * s, device=q.device)
    cols = torch.arange(size * s, device=q.device)
    if dilation is None:
        count = torch.ones(h, s, size * s, device=q.device)
    else:
        count = multiplicity(dilation, rows, cols, h)
    if causal:
        count = count * (cols[None, :] <= rows[:, None])
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(wide) * d**-0.5, keys)
    logits = logits + torch.log(count.clamp_min(1).to(wide))
    logits = logits.masked_fill(count == 0, float("-inf"))
    blind = (count == 0).all(-1)
    # rows without keys: any finite logits will do, their weights are zeroed below
    logits = logits.masked_fill(blind[..., None], 0.0)
    lse = torch.logsumexp(logits, dim=-1)
    weight = torch.exp(logits - lse[..., None]).masked_fill(blind[..., None], 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weight, values)
    return out.to(q.dtype), lse.masked_fill(blind, float("-inf"))
