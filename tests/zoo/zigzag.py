"""Zigzag ring: rank i holds the chunks i and 2p-1-i of 2p, so every hop is half a block of work."""

import torch
import torch.distributed as dist


def visit(rank, source, length, causal):
    """Which of my rows meet which of the arriving columns, and whether as a triangle."""
    half, everything = length // 2, slice(0, length)
    if not causal:
        return everything, everything, False
    if source == rank:
        return everything, everything, True
    if source < rank:
        return everything, slice(0, half), False
    return slice(half, length), everything, False


def spread(x, heads):
    """Repeat each key/value head for its group of query heads, heads first."""
    return x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2)


def fold(x, kv_heads):
    """Sum the query heads of a group; back to b s g d."""
    b, h, s, d = x.shape
    return x.reshape(b, kv_heads, h // kv_heads, s, d).sum(2).transpose(1, 2)


def block_scores(q, k, triangle, scale):
    logits = q @ k.transpose(-1, -2) * scale
    if triangle:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    return logits


def post(buffer, group):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    to = dist.get_global_rank(group, (rank + 1) % size)
    origin = dist.get_global_rank(group, (rank - 1) % size)
    incoming = torch.empty_like(buffer)
    sending = dist.isend(buffer, to, group=group)
    receiving = dist.irecv(incoming, origin, group=group)
    return incoming, (sending, receiving)


class ZigzagRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, group):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        b, s, h, d = q.shape
        if size > 1 and s % 2:
            raise ValueError(f"zigzag wants two equal chunks a rank, got {s} tokens")
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = 1.0 / d**0.5
        queries = q.transpose(1, 2).to(wide)
        top = queries.new_full((b, h, s, 1), torch.finfo(wide).min)
        total = queries.new_zeros(b, h, s, 1)
        acc = queries.new_zeros(b, h, s, d)
        kv = torch.stack((k, v))
        for hop in range(size):
            source = (rank - hop) % size
            if hop < size - 1:
                incoming, works = post(kv, group)
            rows, cols, triangle = visit(rank, source, s, causal)
            keys = spread(kv[0, :, cols].to(wide), h)
            values = spread(kv[1, :, cols].to(wide), h)
            logits = block_scores(queries[:, :, rows], keys, triangle, scale)
            higher = torch.maximum(top[:, :, rows], logits.amax(-1, keepdim=True))
            shrink = torch.exp(top[:, :, rows] - higher)
            weight = torch.exp(logits - higher)
            total[:, :, rows] = total[:, :, rows] * shrink + weight.sum(-1, keepdim=True)
            acc[:, :, rows] = acc[:, :, rows] * shrink + weight @ values
            top[:, :, rows] = higher
            if hop < size - 1:
                for work in works:
                    work.wait()
                kv = incoming
        out = acc / total
        lse = (top + total.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.group, ctx.scale = causal, group, scale
        return out.transpose(1, 2).to(q.dtype), lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        rank, size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        s, h, g = q.shape[1], q.shape[2], k.shape[2]
        wide = out.dtype
        queries, dout = q.transpose(1, 2).to(wide), dout.transpose(1, 2).to(wide)
        delta = (dout * out).sum(-1) - dlse
        dq = torch.zeros_like(queries)
        kv = torch.stack((k, v))
        travelling = torch.zeros(kv.shape, dtype=wide, device=kv.device)
        pending = []
        for hop in range(size):
            source = (rank - hop) % size
            if hop < size - 1:
                incoming, works = post(kv, ctx.group)
            rows, cols, triangle = visit(rank, source, s, ctx.causal)
            keys = spread(kv[0, :, cols].to(wide), h)
            values = spread(kv[1, :, cols].to(wide), h)
            logits = block_scores(queries[:, :, rows], keys, triangle, ctx.scale)
            prob = torch.exp(logits - lse[:, :, rows].unsqueeze(-1))
            dvalue = prob.transpose(-1, -2) @ dout[:, :, rows]
            dprob = dout[:, :, rows] @ values.transpose(-1, -2)
            dlogit = prob * (dprob - delta[:, :, rows].unsqueeze(-1))
            dq[:, :, rows] += dlogit @ keys * ctx.scale
            dkey = dlogit.transpose(-1, -2) @ queries[:, :, rows] * ctx.scale
            for work in pending:
                work.wait()
            travelling[0, :, cols] += fold(dkey, g)
            travelling[1, :, cols] += fold(dvalue, g)
            if size > 1:
                # the last of these hops brings the gradients home
                leaving = travelling
                travelling, pending = post(leaving, ctx.group)
            if hop < size - 1:
                for work in works:
                    work.wait()
                kv = incoming
        for work in pending:
            work.wait()
        dk, dv = travelling
        return dq.transpose(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def attention(q, k, v, *, causal, group):
    return ZigzagRing.apply(q, k, v, causal, group)
