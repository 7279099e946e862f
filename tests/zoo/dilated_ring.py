"""LongNet's dilated attention over a ring: every arriving block is met by every branch."""

import torch
import torch.distributed as dist

NEVER = float("-inf")


def head_offsets(dilation, branch, heads):
    """Offset of every head in this branch; -1 for a head that the branch does not serve."""
    j = torch.arange(heads)
    r = dilation.dilation_rates[branch]
    if dilation.heads == "all":
        return j % r
    count = len(dilation.segment_lengths)
    small, extra = divmod(heads, count)
    first = branch * small + min(branch, extra)
    mine = (j >= first) & (j < first + small + int(branch < extra))
    return torch.where(mine, torch.tensor(branch % r), torch.tensor(-1))


def branch_masks(dilation, rows, cols, heads, causal):
    """One keep mask (h, q, k) a branch, all in global positions."""
    i, j = rows[:, None], cols[None, :]
    triangle = j <= i if causal else torch.ones_like(j <= i)
    if dilation is None:
        return [triangle.expand(heads, -1, -1)]
    masks = []
    for branch, (w, r) in enumerate(zip(dilation.segment_lengths, dilation.dilation_rates)):
        offset = head_offsets(dilation, branch, heads).to(rows.device)[:, None]
        kept_rows = (rows % w) % r == offset
        kept_cols = (cols % w) % r == offset
        same_segment = i // w == j // w
        masks.append(kept_rows[:, :, None] & kept_cols[:, None, :] & same_segment & triangle)
    return masks


def expand_heads(x, heads):
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def block_attention(q, k, v, keep, scale):
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    logits = logits.masked_fill(~keep, NEVER)
    lse = torch.logsumexp(logits, dim=-1)
    safe = lse.masked_fill(lse == NEVER, 0.0)
    return torch.einsum("bhqk,bkhd->bhqd", torch.exp(logits - safe[..., None]), v), lse


def combine(out, lse, other_out, other_lse):
    """Merge two results over disjoint keys, or over two branches."""
    both = torch.logaddexp(lse, other_lse)
    safe = both.masked_fill(both == NEVER, 0.0)
    mine, theirs = torch.exp(lse - safe), torch.exp(other_lse - safe)
    return out * mine[..., None] + other_out * theirs[..., None], both


def send_recv(tensors, group):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    after = dist.get_global_rank(group, (rank + 1) % size)
    before = dist.get_global_rank(group, (rank - 1) % size)
    buffers = [torch.empty_like(x) for x in tensors]
    ops = [dist.P2POp(dist.isend, x, after, group) for x in tensors]
    ops += [dist.P2POp(dist.irecv, x, before, group) for x in buffers]
    return buffers, dist.batch_isend_irecv(ops)


class DilatedRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, dilation, group):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        b, s, h, d = q.shape
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = d**-0.5
        local = torch.arange(s, device=q.device)
        out = torch.zeros(b, h, s, d, dtype=acc, device=q.device)
        lse = torch.full((b, h, s), NEVER, dtype=acc, device=q.device)
        held = [k.contiguous(), v.contiguous()]
        for hop in range(size):
            source = (rank - hop) % size
            if hop < size - 1:
                arriving, works = send_recv(held, group)
            keys, values = (expand_heads(x.to(acc), h) for x in held)
            masks = branch_masks(dilation, rank * s + local, source * s + local, h, causal)
            for keep in masks:
                block = block_attention(q.to(acc), keys, values, keep, scale)
                out, lse = combine(out, lse, *block)
            if hop < size - 1:
                for work in works:
                    work.wait()
                held = arriving
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.dilation, ctx.group, ctx.scale = causal, dilation, group, scale
        return out.transpose(1, 2).to(q.dtype), lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        group, scale = ctx.group, ctx.scale
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        b, s, h, d = q.shape
        g, acc = k.shape[2], out.dtype
        local = torch.arange(s, device=q.device)
        dout = dout.transpose(1, 2).to(acc)
        delta = (dout * out).sum(-1) - dlse
        lse = lse.masked_fill(lse == NEVER, float("inf"))
        dq = torch.zeros(b, s, h, d, dtype=acc, device=q.device)
        dk = torch.zeros(k.shape, dtype=acc, device=q.device)
        dv = torch.zeros(v.shape, dtype=acc, device=q.device)
        held = [k.contiguous(), v.contiguous()]
        for hop in range(size):
            source = (rank - hop) % size
            keys, values = (expand_heads(x.to(acc), h) for x in held)
            masks = branch_masks(ctx.dilation, rank * s + local, source * s + local, h, ctx.causal)
            for keep in masks:
                logits = torch.einsum("bqhd,bkhd->bhqk", q.to(acc), keys) * scale
                p = torch.exp(logits.masked_fill(~keep, NEVER) - lse[..., None])
                dp = torch.einsum("bhqd,bkhd->bhqk", dout, values)
                ds = p * (dp - delta[..., None]) * scale
                dq += torch.einsum("bhqk,bkhd->bqhd", ds, keys)
                dkeys = torch.einsum("bhqk,bqhd->bkhd", ds, q.to(acc))
                dvalues = torch.einsum("bhqk,bhqd->bkhd", p, dout)
                dk += dkeys.reshape(b, s, g, h // g, d).sum(3)
                dv += dvalues.reshape(b, s, g, h // g, d).sum(3)
            if size == 1:
                continue
            # dK and dV make one hop more than K and V, the last one home
            leaving = [dk, dv] if hop == size - 1 else [dk, dv, *held]
            (dk, dv, *held), works = send_recv(leaving, group)
            for work in works:
                work.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def attention(q, k, v, *, causal, group, dilation=None):
    return DilatedRing.apply(q, k, v, causal, dilation, group)
