"""Collective attention, zigzag layout: all-gather K and V, one softmax, reduce-scatter back."""

import torch
import torch.distributed as dist


class AllGather(torch.autograd.Function):
    """p ranks' x, stacked in rank order; its gradient is summed over the ranks and scattered."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.size = group, dist.get_world_size(group)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(ctx.size)]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        mine = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter(mine, list(grad.contiguous()), group=ctx.group)
        return mine, None


def zigzag_positions(rank, size, tokens):
    """The chunks rank and 2p-1-rank of 2p; one rank holds everything in order."""
    if size == 1:
        return torch.arange(tokens)
    chunk = tokens // 2
    head = torch.arange(rank * chunk, (rank + 1) * chunk)
    tail = torch.arange((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk)
    return torch.cat((head, tail))


def attention(q, k, v, *, causal, group, mask_mod=None):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    b, s, h, d = q.shape
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = zigzag_positions(rank, size, s).to(q.device)
    cols = torch.cat([zigzag_positions(i, size, s) for i in range(size)]).to(q.device)

    # gather in the wide dtype, so that the sum over ranks in backward is wide as well
    keys = AllGather.apply(k.to(compute), group).transpose(0, 1).flatten(1, 2)
    values = AllGather.apply(v.to(compute), group).transpose(0, 1).flatten(1, 2)
    keys = keys.repeat_interleave(h // k.shape[2], dim=2)
    values = values.repeat_interleave(h // v.shape[2], dim=2)

    keep = torch.ones(s, size * s, dtype=torch.bool, device=q.device)[None, None]
    if causal:
        keep = keep & (cols[None, :] <= rows[:, None])
    if mask_mod is not None:
        index_b = torch.arange(b, device=q.device).reshape(b, 1, 1, 1)
        index_h = torch.arange(h, device=q.device).reshape(1, h, 1, 1)
        allowed = mask_mod(index_b, index_h, rows.reshape(1, 1, -1, 1), cols.reshape(1, 1, 1, -1))
        keep = keep & allowed
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(compute), keys) * d**-0.5
    # a finite floor keeps the gradient of a row that sees nothing at zero instead of NaN
    logits = logits.masked_fill(~keep, torch.finfo(compute).min)
    seen = keep.any(-1, keepdim=True)
    weight = torch.softmax(logits, dim=-1) * seen
    out = torch.einsum("bhqk,bkhd->bqhd", weight, values)
    return out.to(q.dtype)
