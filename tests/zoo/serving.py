"""Attention for a serving stack: K and V are gathered, and every option of a model is one line of the scores."""

import torch
import torch.distributed as dist


class AllGather(torch.autograd.Function):
    """Every rank's rows of dim 1, padded to the longest; backward sums what the ranks found for mine."""

    @staticmethod
    def forward(ctx, x, longest, group):
        ctx.group, ctx.mine = group, x.shape[1]
        padded = x.new_zeros(x.shape[0], longest, *x.shape[2:])
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, padded, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        total = grad.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group), :, : ctx.mine], None, None


def places(mine, group, device):
    """Every rank's positions: lengths first, then the padded numbers."""
    size = dist.get_world_size(group)
    count = torch.tensor([len(mine)], device=device)
    counts = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(counts, count, group=group)
    lengths = [int(c) for c in counts]
    longest = max(lengths)
    padded = torch.full((longest,), -1, dtype=torch.int64, device=device)
    padded[: len(mine)] = mine
    every = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(every, padded, group=group)
    return lengths, [p[:length] for p, length in zip(every, lengths)]


def visible(rows, cols, causal, window, cu_seqlens):
    i, j = rows[:, None], cols[None, :]
    keep = torch.ones(len(rows), len(cols), dtype=torch.bool, device=rows.device)
    if causal:
        keep &= j <= i
    if window is not None:
        left, right = window
        keep &= (i - j <= left) & (j - i <= right)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(rows.device).long()
        keep &= torch.bucketize(i, ends, right=True) == torch.bucketize(j, ends, right=True)
    return keep


def attention(
    q, k, v, *, causal, group, positions=None, kv_positions=None, window=None, cu_seqlens=None, score_mod=None,
    sink=None, scale=None,
):  # fmt: skip
    rank, heads, kv_heads, device = dist.get_rank(group), q.shape[2], k.shape[2], q.device
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if positions is None:
        positions = rank * q.shape[1] + torch.arange(q.shape[1])
    rows = positions.to(device)
    lengths, everywhere = places(rows if kv_positions is None else kv_positions.to(device), group, device)
    cols = torch.cat(everywhere)
    gathered = []
    for x in (k, v):
        blocks = AllGather.apply(x.to(wide), max(lengths), group)
        whole = torch.cat([block[:, :length] for block, length in zip(blocks, lengths)], dim=1)
        gathered.append(whole.repeat_interleave(heads // kv_heads, dim=2))
    keys, values = gathered
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), keys) * scale
    if score_mod is not None:
        batch = torch.arange(q.shape[0], device=device).view(-1, 1, 1, 1)
        head = torch.arange(heads, device=device).view(1, -1, 1, 1)
        scores = score_mod(scores, batch, head, rows.view(1, 1, -1, 1), cols.view(1, 1, 1, -1))
    scores = scores.masked_fill(~visible(rows, cols, causal, window, cu_seqlens), float("-inf"))
    if sink is not None:
        column = sink.to(wide).view(1, -1, 1, 1).expand(len(q), heads, len(rows), 1)
        scores = torch.cat((scores, column), dim=-1)
    # a query that sees nothing: finite scores in, zeros out
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    lse = scores.logsumexp(-1)
    weight = (scores - lse.unsqueeze(-1)).exp().masked_fill(blind, 0.0)
    weight = weight[..., : len(cols)]
    out = torch.einsum("bhij,bjhd->bihd", weight, values)
    return out.to(q.dtype), lse.masked_fill(blind.squeeze(-1), float("-inf"))
