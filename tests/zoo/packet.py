"""A ring in which one flat packet travels: K and V, and in the backward dK and dV with them."""

import math

import torch
import torch.distributed as dist


def pass_on(packet, group):
    """Send a flat tensor to the next rank, return what the previous one sent."""
    p = dist.get_world_size(group)
    if p == 1:
        return packet
    me = dist.get_rank(group)
    to, fro = (dist.get_global_rank(group, (me + x) % p) for x in (1, -1))
    packet, came = packet.contiguous(), torch.empty_like(packet)
    ops = [dist.P2POp(dist.isend, packet, to, group), dist.P2POp(dist.irecv, came, fro, group)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return came


def unpack(packet, shapes):
    sizes = [math.prod(shape) for shape in shapes]
    return [x.view(shape) for x, shape in zip(packet.split(sizes), shapes)]


def pack(*tensors):
    return torch.cat([x.reshape(-1) for x in tensors])


def seen(i, j, opts):
    """Which of the keys at j the queries at i see; None for all."""
    causal, window, starts = opts
    i, j = i[:, None], j[None, :]
    keep = (i >= 0) & (j >= 0)
    if causal:
        keep = keep & (j <= i)
    if window is not None:
        keep = keep & (j >= i - window[0]) & (j <= i + window[1])
    if starts is not None:
        document = [torch.searchsorted(starts, x.contiguous(), right=True) for x in (i, j)]
        keep = keep & (document[0] == document[1])
    return keep


def nothing_to_see(i, j, opts):
    causal, window, _ = opts
    if causal and j[0] > i[-1]:
        return True
    return window is not None and bool(i[0] - j[-1] > window[0] or j[0] - i[-1] > window[1])


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink, opts, scale, group):
        me, p = dist.get_rank(group), dist.get_world_size(group)
        b, s, h, d = q.shape
        g, e = k.shape[2], v.shape[3]
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = d**-0.5 if scale is None else scale
        rows = torch.arange(me * s, (me + 1) * s)
        queries = q.to(wide).reshape(b, s, g, h // g, d)
        top = torch.full((b, g, h // g, s), -math.inf, dtype=wide)
        total = torch.zeros((b, g, h // g, s), dtype=wide)
        acc = torch.zeros((b, g, h // g, s, e), dtype=wide)
        packet = pack(k, v)
        for hop in range(p):
            source = (me - hop) % p
            cols = torch.arange(source * s, (source + 1) * s)
            if not nothing_to_see(rows, cols, opts):
                keys, values = (x.to(wide) for x in unpack(packet, (k.shape, v.shape)))
                scores = torch.einsum("bsgmd,btgd->bgmst", queries, keys) * scale
                scores = scores.masked_fill(~seen(rows, cols, opts), -math.inf)
                new = torch.maximum(top, scores.amax(-1))
                shift = new.clamp_min(torch.finfo(wide).min)
                fade = torch.exp(top - shift)
                weight = torch.exp(scores - shift[..., None])
                total = total * fade + weight.sum(-1)
                acc = acc * fade[..., None] + torch.einsum("bgmst,btge->bgmse", weight, values)
                top = new
            if hop < p - 1:
                packet = pass_on(packet, group)
        lse = top + total.log()
        out = acc / total.clamp_min(1e-37)[..., None]
        if sink is not None:
            with_sink = torch.logaddexp(lse, sink.to(wide).view(1, g, h // g, 1))
            out, lse = out * torch.exp(lse - with_sink)[..., None], with_sink
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.told = opts, scale, group
        return out.permute(0, 3, 1, 2, 4).reshape(b, s, h, e).to(q.dtype), lse.reshape(b, h, s)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink, out, lse = ctx.saved_tensors
        opts, scale, group = ctx.told
        me, p = dist.get_rank(group), dist.get_world_size(group)
        b, s, h, d = q.shape
        g, wide = k.shape[2], out.dtype
        rows = torch.arange(me * s, (me + 1) * s)
        queries = q.to(wide).reshape(b, s, g, h // g, d)
        dout = dout.to(wide).reshape(b, s, g, h // g, -1).permute(0, 2, 3, 1, 4)
        delta = (dout * out).sum(-1) - dlse.to(wide).reshape(lse.shape)
        dq = torch.zeros_like(queries)
        safe = lse.masked_fill(lse == -math.inf, math.inf)
        shapes = (k.shape, v.shape) * 2
        packet = pack(k.to(wide), v.to(wide), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide))
        for hop in range(p):
            source = (me - hop) % p
            cols = torch.arange(source * s, (source + 1) * s)
            keys, values, dk, dv = unpack(packet, shapes)
            if not nothing_to_see(rows, cols, opts):
                scores = torch.einsum("bsgmd,btgd->bgmst", queries, keys) * scale
                prob = torch.exp(scores.masked_fill(~seen(rows, cols, opts), -math.inf) - safe[..., None])
                dprob = torch.einsum("bgmse,btge->bgmst", dout, values)
                dscore = prob * (dprob - delta[..., None]) * scale
                dq = dq + torch.einsum("bgmst,btgd->bsgmd", dscore, keys)
                dk = dk + torch.einsum("bgmst,bsgmd->btgd", dscore, queries)
                dv = dv + torch.einsum("bgmst,bgmse->btge", prob, dout)
            packet = pass_on(pack(keys, values, dk, dv), group)
        _, _, dk, dv = unpack(packet, shapes)
        dsink = None
        if sink is not None:
            share = torch.exp(sink.to(wide).view(1, g, h // g, 1) - safe)
            dsink = -(share * delta).sum((0, 3)).reshape(h).to(sink.dtype)
        return dq.reshape(q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None, None, None


def attention(q, k, v, *, causal, group, window=None, cu_seqlens=None, sink=None, scale=None):
    starts = None if cu_seqlens is None else cu_seqlens.long()
    return Attention.apply(q, k, v, sink, (causal, window, starts), scale, group)
