"""Striped ring: rank i holds the tokens i::p, so every hop is nearly a full triangle."""

import torch
import torch.distributed as dist


class Neighbour:
    """Sends to the next rank of the group, receives from the previous one."""

    def __init__(self, group):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.right = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.left = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def pass_on(self, *tensors):
        received, works = [], []
        for tensor in tensors:
            tensor = tensor.contiguous()
            buffer = torch.empty_like(tensor)
            works.append(dist.isend(tensor, self.right, group=self.group))
            works.append(dist.irecv(buffer, self.left, group=self.group))
            received.append(buffer)
        for work in works:
            work.wait()
        return received


def stripe_mask(s, rank, source, causal, device):
    """Row i is token i*p + rank, column j is token j*p + source."""
    if not causal:
        return torch.ones(s, s, dtype=torch.bool, device=device)
    diagonal = 0 if source <= rank else -1
    return torch.ones(s, s, dtype=torch.bool, device=device).tril(diagonal)


def masked_logits(q, k, keep, scale):
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    return logits.masked_fill(~keep, float("-inf"))


class StripedRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, group):
        ring = Neighbour(group)
        b, s, h, d = q.shape
        repeat = h // k.shape[2]
        scale = d**-0.5
        dtype = torch.double if q.dtype == torch.double else torch.float
        query = q.to(dtype)
        outs, lses = [], []
        key, value = k.contiguous(), v.contiguous()
        for hop in range(ring.size):
            source = (ring.rank - hop) % ring.size
            keep = stripe_mask(s, ring.rank, source, causal, q.device)
            wide_key = key.to(dtype).repeat_interleave(repeat, dim=2)
            wide_value = value.to(dtype).repeat_interleave(repeat, dim=2)
            logits = masked_logits(query, wide_key, keep, scale)
            lse = torch.logsumexp(logits, dim=-1)
            # a strict triangle leaves the first row with nothing to see
            finite = lse.masked_fill(torch.isinf(lse), 0.0)
            weight = torch.exp(logits - finite.unsqueeze(-1))
            outs.append(torch.einsum("bhij,bjhd->bhid", weight, wide_value))
            lses.append(lse)
            if hop < ring.size - 1:
                key, value = ring.pass_on(key, value)
        lse = torch.logsumexp(torch.stack(lses), dim=0)
        out = torch.zeros_like(outs[0])
        for block_out, block_lse in zip(outs, lses):
            out += block_out * torch.exp(block_lse - lse).unsqueeze(-1)
        out = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.ring, ctx.scale = causal, ring, scale
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        ring, scale = ctx.ring, ctx.scale
        b, s, h, d = q.shape
        g = k.shape[2]
        repeat = h // g
        dtype = out.dtype
        query, dout = q.to(dtype), dout.to(dtype)
        delta = torch.einsum("bihd,bihd->bhi", dout, out)
        dq = torch.zeros_like(query)
        dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
        dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
        key, value = k.contiguous(), v.contiguous()
        for hop in range(ring.size):
            source = (ring.rank - hop) % ring.size
            keep = stripe_mask(s, ring.rank, source, ctx.causal, q.device)
            wide_key = key.to(dtype).repeat_interleave(repeat, dim=2)
            wide_value = value.to(dtype).repeat_interleave(repeat, dim=2)
            logits = masked_logits(query, wide_key, keep, scale)
            weight = torch.exp(logits - lse.unsqueeze(-1))
            dweight = torch.einsum("bihd,bjhd->bhij", dout, wide_value)
            dlogits = weight * (dweight - delta.unsqueeze(-1)) * scale
            dq += torch.einsum("bhij,bjhd->bihd", dlogits, wide_key)
            wide_dk = torch.einsum("bhij,bihd->bjhd", dlogits, query)
            wide_dv = torch.einsum("bhij,bihd->bjhd", weight, dout)
            dk = dk + wide_dk.view(b, s, g, repeat, d).sum(3)
            dv = dv + wide_dv.view(b, s, g, repeat, d).sum(3)
            if ring.size > 1 and hop < ring.size - 1:
                key, value, dk, dv = ring.pass_on(key, value, dk, dv)
        if ring.size > 1:
            # the gradients are one hop short of home
            dk, dv = ring.pass_on(dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def attention(q, k, v, *, causal, group):
    return StripedRing.apply(q, k, v, causal, group)
