"""Tree attention: the queries are gathered, each rank attends over its own keys, and the ranks reduce."""

import torch
import torch.distributed as dist

LOW = -1e30


def gathered(x, group):
    """Every rank's rows of dim 1, which may be different in number."""
    size = dist.get_world_size(group)
    count = torch.tensor([x.shape[1]])
    counts = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(counts, count, group=group)
    longest = max(int(c) for c in counts)
    padded = torch.cat((x, x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])), 1)
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:, : int(c)] for part, c in zip(parts, counts)], 1), [int(c) for c in counts]


def scores_of(q, k, rows, cols, causal, scale):
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * scale
    if causal:
        scores = scores.masked_fill(cols[None, :] > rows[:, None], LOW)
    return scores


class Tree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, positions, kv_positions, causal, group):
        rank = dist.get_rank(group)
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = q.shape[-1] ** -0.5
        every, counts = gathered(q.to(wide).contiguous(), group)
        rows, _ = gathered(positions[None].contiguous(), group)
        rows = rows[0]
        if k.shape[1]:
            scores = scores_of(every, k.to(wide), rows, kv_positions, causal, scale)
            top = scores.amax(-1)
        else:
            scores = every.new_zeros(len(q), q.shape[2], len(rows), 0)
            top = scores.new_full(scores.shape[:-1], LOW)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        weight = torch.exp(scores - top[..., None])
        total = weight.sum(-1)
        dist.all_reduce(total, group=group)
        values = v.to(wide).repeat_interleave(q.shape[2] // v.shape[2], 2)
        out = torch.einsum("bhij,bjhd->bihd", weight, values)
        dist.all_reduce(out, group=group)
        out = out / total.transpose(1, 2)[..., None]
        lse = top + total.log()
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ctx.save_for_backward(every, k, v, rows, kv_positions, out[:, mine], lse)
        ctx.mine, ctx.causal, ctx.group, ctx.scale = mine, causal, group, scale
        return out[:, mine].to(q.dtype), lse[:, :, mine].clone()

    @staticmethod
    def backward(ctx, do, dlse):
        every, k, v, rows, kv_positions, out, lse = ctx.saved_tensors
        dtype, (g, h), wide = k.dtype, (k.shape[2], every.shape[2]), every.dtype
        k, v = k.to(wide), v.to(wide)
        delta = (do.to(wide) * out).sum(-1) - dlse.transpose(1, 2)
        do, _ = gathered(do.to(wide).contiguous(), ctx.group)
        delta, _ = gathered(delta.contiguous(), ctx.group)
        delta = delta.transpose(1, 2)
        scores = scores_of(every, k, rows, kv_positions, ctx.causal, ctx.scale)
        p = torch.exp(scores - lse[..., None])
        dv = torch.einsum("bhij,bihd->bjhd", p, do)
        ds = p * (torch.einsum("bihd,bjhd->bhij", do, v.repeat_interleave(h // g, 2)) - delta[..., None]) * ctx.scale
        dq = torch.einsum("bhij,bjhd->bihd", ds, k.repeat_interleave(h // g, 2))
        dk = torch.einsum("bhij,bihd->bjhd", ds, every)
        dist.all_reduce(dq, group=ctx.group)
        dk, dv = (x.reshape(*x.shape[:2], g, h // g, -1).sum(3) for x in (dk, dv))
        return dq[:, ctx.mine].to(dtype), dk.to(dtype), dv.to(dtype), None, None, None, None


def attention(q, k, v, *, causal, group, positions=None, kv_positions=None):
    if positions is None:
        positions = dist.get_rank(group) * q.shape[1] + torch.arange(q.shape[1])
    return Tree.apply(q, k, v, positions, positions if kv_positions is None else kv_positions, causal, group)
