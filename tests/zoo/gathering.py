"""Gathering ring: one all-gather of K and V, a walk over the blocks, one reduce in backward."""

import math

import torch
import torch.distributed as dist


def gather_padded(x, longest, group):
    """All ranks' x, each padded at the end of dim 1 to the longest; p b s ..."""
    size = dist.get_world_size(group)
    padding = x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])
    padded = torch.cat((x, padding), dim=1)
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return parts


def shard_lengths(tokens, device, group):
    mine = torch.tensor(tokens, device=device)
    lengths = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, mine, group=group)
    return [int(length) for length in lengths]


def make_mask(q_pos, k_pos, batch, heads, causal, window, mask_mod):
    distance = q_pos[:, None] - k_pos[None, :]
    keep = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        keep &= distance >= 0
    if window is not None and window[0] >= 0:
        keep &= distance <= window[0]
    if window is not None and window[1] >= 0:
        keep &= distance >= -window[1]
    keep = keep[None, None]
    if mask_mod is not None:
        device = q_pos.device
        index_b = torch.arange(batch, device=device)[:, None, None, None]
        index_h = torch.arange(heads, device=device)[None, :, None, None]
        index_q, index_k = q_pos[None, None, :, None], k_pos[None, None, None, :]
        keep = mask_mod(index_b, index_h, index_q, index_k) & keep
    return keep


def logits_of(q, k, keep, scale):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bshd,bthd->bhst", q * scale, k).masked_fill(~keep, -math.inf)


class GatheringRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, positions, causal, window, mask_mod, group):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        batch, s, heads, dim = q.shape
        full = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = 1 / math.sqrt(dim)
        lengths = shard_lengths(s, q.device, group)
        if positions is None:
            start = sum(lengths[:rank])
            positions = torch.arange(start, start + s)
        positions = positions.to(q.device)
        longest = max(lengths)
        all_k = gather_padded(k, longest, group)
        all_v = gather_padded(v, longest, group)
        all_pos = gather_padded(positions[None], longest, group)
        all_pos = [pos[0, :length] for pos, length in zip(all_pos, lengths)]

        acc = q.new_zeros(batch, heads, s, dim, dtype=full)
        norm = q.new_zeros(batch, heads, s, 1, dtype=full)
        peak = q.new_full((batch, heads, s, 1), -math.inf, dtype=full)
        for step in range(size):
            source = (rank + step) % size
            length = lengths[source]
            if length == 0:
                continue
            block_k = all_k[source][:, :length].to(full)
            block_v = all_v[source][:, :length].to(full)
            keep = make_mask(positions, all_pos[source], batch, heads, causal, window, mask_mod)
            logits = logits_of(q.to(full), block_k, keep, scale)
            new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True))
            # a row that has seen nothing yet keeps a peak of -inf: subtract 0 instead
            level = torch.where(new_peak == -math.inf, 0.0, new_peak)
            weight = torch.exp(logits - level)
            fade = torch.exp(peak - level)
            block_v = block_v.repeat_interleave(heads // block_v.shape[2], dim=2)
            acc = acc * fade + torch.einsum("bhst,bthd->bhsd", weight, block_v)
            norm = norm * fade + weight.sum(-1, keepdim=True)
            peak = new_peak
        lse = (peak + torch.log(norm.clamp_min(1e-30))).squeeze(-1)
        out = (acc / norm.clamp_min(1e-30)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse, positions)
        ctx.lengths, ctx.all_pos, ctx.group, ctx.scale = lengths, all_pos, group, scale
        ctx.causal, ctx.window, ctx.mask_mod = causal, window, mask_mod
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, positions = ctx.saved_tensors
        rank, size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        batch, s, heads, dim = q.shape
        kv_heads, full = k.shape[2], out.dtype
        longest = max(ctx.lengths)
        all_k = gather_padded(k, longest, ctx.group)
        all_v = gather_padded(v, longest, ctx.group)
        dout = dout.to(full)
        delta = (dout * out).sum(-1).transpose(1, 2) - dlse
        lse = torch.where(lse == -math.inf, math.inf, lse)
        dq = torch.zeros_like(out)
        dk = q.new_zeros(size, batch, longest, kv_heads, dim, dtype=full)
        dv = q.new_zeros(size, batch, longest, kv_heads, dim, dtype=full)
        for source in range(size):
            length = ctx.lengths[source]
            if length == 0 or s == 0:
                continue
            block_k = all_k[source][:, :length].to(full)
            block_v = all_v[source][:, :length].to(full)
            keep = make_mask(positions, ctx.all_pos[source], batch, heads, ctx.causal, ctx.window, ctx.mask_mod)
            logits = logits_of(q.to(full), block_k, keep, ctx.scale)
            p = torch.exp(logits - lse[..., None])
            wide_k = block_k.repeat_interleave(heads // kv_heads, dim=2)
            wide_v = block_v.repeat_interleave(heads // kv_heads, dim=2)
            dp = torch.einsum("bshd,bthd->bhst", dout, wide_v)
            ds = p * (dp - delta[..., None])
            dq += torch.einsum("bhst,bthd->bshd", ds, wide_k) * ctx.scale
            wide_dk = torch.einsum("bhst,bshd->bthd", ds, q.to(full)) * ctx.scale
            wide_dv = torch.einsum("bhst,bshd->bthd", p, dout)
            shape = (batch, length, kv_heads, heads // kv_heads, dim)
            dk[source, :, :length] = wide_dk.reshape(shape).sum(3)
            dv[source, :, :length] = wide_dv.reshape(shape).sum(3)
        # every rank holds a part of everybody's dK and dV
        dist.all_reduce(dk, group=ctx.group)
        dist.all_reduce(dv, group=ctx.group)
        dk, dv = dk[rank, :, :s], dv[rank, :, :s]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def attention(q, k, v, *, causal, group, positions=None, window=None, mask_mod=None):
    return GatheringRing.apply(q, k, v, positions, causal, window, mask_mod, group)
