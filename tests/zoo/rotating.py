"""Ring attention: K and V go round the ring, dK and dV travel with them and come home."""

import torch
import torch.distributed as dist

INF = float("inf")


def rotate(tensors, length, group):
    """Post tensors to the next rank and receives of `length` tokens from the previous one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    following = dist.get_global_rank(group, (rank + 1) % size)
    preceding = dist.get_global_rank(group, (rank - 1) % size)
    arriving = [t.new_empty(t.shape[0], length, *t.shape[2:]) for t in tensors]
    ops = []
    for leaving, incoming in zip(tensors, arriving):
        if leaving.numel():
            ops.append(dist.P2POp(dist.isend, leaving, following, group))
        if incoming.numel():
            ops.append(dist.P2POp(dist.irecv, incoming, preceding, group))
    works = dist.batch_isend_irecv(ops) if ops else []
    return arriving, works


def wait(works):
    for work in works:
        work.wait()


def gather_positions(positions, tokens, group, device):
    """The global positions of every rank's tokens; shards may be uneven or empty."""
    size = dist.get_world_size(group)
    if positions is None:
        return [torch.arange(i * tokens, (i + 1) * tokens, device=device) for i in range(size)]
    mine = positions.to(device)
    if size == 1:
        return [mine]
    count = torch.tensor([mine.numel()], device=device)
    counts = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(counts, count, group=group)
    longest = max(int(c) for c in counts)
    padded = torch.cat((mine, mine.new_zeros(longest - mine.numel())))
    everyone = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(everyone, padded, group=group)
    return [row[: int(c)] for row, c in zip(everyone, counts)]


def visible(rows, cols, b, h, causal, window, mask_mod):
    i, j = rows.view(1, 1, -1, 1), cols.view(1, 1, 1, -1)
    keep = torch.ones(1, 1, rows.numel(), cols.numel(), dtype=torch.bool, device=rows.device)
    if causal:
        keep = keep & (j <= i)
    if window is not None:
        left, right = window
        if left >= 0:
            keep = keep & (j >= i - left)
        if right >= 0:
            keep = keep & (j <= i + right)
    if mask_mod is not None:
        batch = torch.arange(b, device=rows.device).view(-1, 1, 1, 1)
        head = torch.arange(h, device=rows.device).view(1, -1, 1, 1)
        keep = keep & mask_mod(batch, head, i, j)
    return keep


def scores(q, k, keep, scale):
    b, s, h, d = q.shape
    g = k.shape[2]
    grouped = q.reshape(b, s, g, h // g, d)
    logits = torch.einsum("bqgmd,bkgd->bgmqk", grouped, k).reshape(b, h, s, k.shape[1]) * scale
    return logits.masked_fill(~keep, -INF)


def attend(q, k, v, keep, scale):
    """One block: normalised out and natural lse; 0 and -inf for a query that sees nothing."""
    logits = scores(q, k, keep, scale)
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weight = torch.exp(logits - top)
    total = weight.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    weight = weight / total.masked_fill(total == 0, 1.0)
    b, h, s, t = weight.shape
    g = k.shape[2]
    weight = weight.reshape(b, g, h // g, s, t)
    out = torch.einsum("bgmqk,bkgd->bqgmd", weight, v).reshape(b, s, h, v.shape[-1])
    return out, lse


def per_query(x):
    return x.transpose(1, 2).unsqueeze(-1)


def merge(out, lse, block_out, block_lse):
    new = torch.logaddexp(lse, block_lse)
    shift = new.masked_fill(new == -INF, 0.0)
    out = out * per_query(torch.exp(lse - shift))
    out = out + block_out * per_query(torch.exp(block_lse - shift))
    return out, new


def block_backward(q, k, v, dout, delta, lse, keep, scale):
    b, s, h, d = q.shape
    t, g = k.shape[1:3]
    logits = scores(q, k, keep, scale)
    p = torch.exp(logits - lse.masked_fill(lse == -INF, INF).unsqueeze(-1))
    p = p.reshape(b, g, h // g, s, t)
    dout = dout.reshape(b, s, g, h // g, d)
    dv = torch.einsum("bgmqk,bqgmd->bkgd", p, dout)
    dp = torch.einsum("bqgmd,bkgd->bgmqk", dout, v)
    ds = p * (dp - delta.reshape(b, g, h // g, s, 1)) * scale
    dq = torch.einsum("bgmqk,bkgd->bqgmd", ds, k).reshape(b, s, h, d)
    dk = torch.einsum("bgmqk,bqgmd->bkgd", ds, q.reshape(b, s, g, h // g, d))
    return dq, dk, dv


class RotatingRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, where, causal, window, mask_mod, group):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        b, s, h, d = q.shape
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = d**-0.5
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.zeros(b, s, h, d, dtype=acc, device=q.device)
        lse = torch.full((b, h, s), -INF, dtype=acc, device=q.device)
        kv = [k, v]
        for hop in range(size):
            source = (rank - hop) % size
            if hop + 1 < size:
                arriving, works = rotate(kv, where[source - 1].numel(), group)
            if where[source].numel():
                keep = visible(where[rank], where[source], b, h, causal, window, mask_mod)
                block = attend(q.to(acc), kv[0].to(acc), kv[1].to(acc), keep, scale)
                out, lse = merge(out, lse, *block)
            if hop + 1 < size:
                wait(works)
                kv = arriving
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.where, ctx.causal, ctx.window, ctx.mask_mod = where, causal, window, mask_mod
        ctx.group, ctx.scale = group, scale
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        group, where = ctx.group, ctx.where
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        b, s, h, d = q.shape
        acc = out.dtype
        dout = dout.to(acc)
        delta = (dout * out).sum(-1).transpose(1, 2) - dlse
        dq = torch.zeros_like(out)
        kv, home, home_works = [k, v], [], []
        for hop in range(size):
            source = (rank - hop) % size
            if hop + 1 < size:
                arriving, works = rotate(kv, where[source - 1].numel(), group)
            dk = torch.zeros(kv[0].shape, dtype=acc, device=q.device)
            dv = torch.zeros(kv[1].shape, dtype=acc, device=q.device)
            if where[source].numel():
                keep = visible(where[rank], where[source], b, h, ctx.causal, ctx.window, ctx.mask_mod)
                block_dq, dk, dv = block_backward(
                    q.to(acc), kv[0].to(acc), kv[1].to(acc), dout, delta, lse, keep, ctx.scale
                )
                dq = dq + block_dq
            if hop > 0:
                # what the ranks before us found for this block has travelled with it
                wait(home_works)
                dk, dv = dk + home[0], dv + home[1]
            home = [dk, dv]
            if size > 1:
                leaving = [x.contiguous() for x in home]
                home, home_works = rotate(leaving, where[source - 1].numel(), group)
            if hop + 1 < size:
                wait(works)
                kv = arriving
        if size > 1:
            wait(home_works)
        dk, dv = home
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def attention(q, k, v, *, causal, group, positions=None, window=None, mask_mod=None):
    where = gather_positions(positions, q.shape[1], group, q.device)
    return RotatingRing.apply(q, k, v, where, causal, window, mask_mod, group)
