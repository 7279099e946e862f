"""Zigzag ring after ring-flash-attention: a kernel that knows only full and triangular blocks, and halves of shards."""

import math

import torch
import torch.distributed as dist


def kernel(q, k, v, triangle):
    """A block: b s h d in, out b s h d and lse b h s."""
    heads = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(heads, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if triangle:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("bhij,bjhd->bihd", (scores - lse[..., None]).exp(), v), lse


def kernel_backward(dout, q, k, v, out, lse, dlse, triangle):
    g, heads = k.shape[2], q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(heads, 2) for x in (k, v))
    factor = 1 / math.sqrt(q.shape[-1])
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * factor
    if triangle:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    prob = (scores - lse[..., None]).exp()
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse
    ds = prob * (torch.einsum("bihd,bjhd->bhij", dout, values) - delta[..., None]) * factor
    dk = torch.einsum("bhij,bihd->bjhd", ds, q).unflatten(2, (g, heads)).sum(3)
    dv = torch.einsum("bhij,bihd->bjhd", prob, dout).unflatten(2, (g, heads)).sum(3)
    return torch.einsum("bhij,bjhd->bihd", ds, keys), dk, dv


def combine(out, lse, block_out, block_lse):
    """flash's own formula: out − sigmoid(block_lse − lse) · (out − block_out)."""
    share = torch.sigmoid(block_lse - lse).transpose(1, 2)[..., None]
    return out - share * (out - block_out), lse - torch.nn.functional.logsigmoid(lse - block_lse)


class Ring:
    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.to = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.fro = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def start(self, *tensors):
        tensors = [x.contiguous() for x in tensors]
        came = [torch.empty_like(x) for x in tensors]
        ops = [dist.P2POp(dist.isend, x, self.to, self.group) for x in tensors]
        ops += [dist.P2POp(dist.irecv, x, self.fro, self.group) for x in came]
        return came, dist.batch_isend_irecv(ops), tensors

    @staticmethod
    def finish(started):
        for work in started[1]:
            work.wait()
        return started[0]


class Zigzag(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, group):
        ring, half = Ring(group), q.shape[1] // 2
        wide = torch.promote_types(q.dtype, torch.float32)
        kept = q, k, v
        q, k, v = (x.to(wide) for x in (q, k, v))
        out, lse = kernel(q, k, v, causal)
        for step in range(1, ring.size):
            started = ring.start(k, v)
            k, v = ring.finish(started)
            if not causal:
                out, lse = combine(out, lse, *kernel(q, k, v, False))
            elif step <= ring.rank:
                out, lse = combine(out, lse, *kernel(q, k[:, :half], v[:, :half], False))
            else:
                late_out, late_lse = combine(out[:, half:], lse[:, :, half:], *kernel(q[:, half:], k, v, False))
                out = torch.cat((out[:, :half], late_out), 1)
                lse = torch.cat((lse[:, :, :half], late_lse), 2)
        ctx.save_for_backward(*kept, out, lse)
        ctx.told = causal, group
        return out.to(kept[0].dtype), lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        causal, group = ctx.told
        kinds, wide = (q.dtype, k.dtype, v.dtype), out.dtype
        ring, half = Ring(group), q.shape[1] // 2
        q, k, v, dout = (x.to(wide) for x in (q, k, v, dout))
        dq, dk, dv = kernel_backward(dout, q, k, v, out, lse, dlse, causal)
        for step in range(1, ring.size):
            k, v = ring.finish(ring.start(k, v))
            dk, dv = ring.finish(ring.start(dk, dv))
            if not causal:
                new_q, new_k, new_v = kernel_backward(dout, q, k, v, out, lse, dlse, False)
                dq, dk, dv = dq + new_q, dk + new_k, dv + new_v
            elif step <= ring.rank:
                new_q, new_k, new_v = kernel_backward(dout, q, k[:, :half], v[:, :half], out, lse, dlse, False)
                dq = dq + new_q
                dk[:, :half] += new_k
                dv[:, :half] += new_v
            else:
                late = [x[:, half:] for x in (dout, q, out)]
                new_q, new_k, new_v = kernel_backward(
                    late[0], late[1], k, v, late[2], lse[:, :, half:], dlse[:, :, half:], False
                )
                dq[:, half:] += new_q
                dk, dv = dk + new_k, dv + new_v
        if ring.size > 1:
            dk, dv = ring.finish(ring.start(dk, dv))
        return dq.to(kinds[0]), dk.to(kinds[1]), dv.to(kinds[2]), None, None


def attention(q, k, v, *, causal, group):
    return Zigzag.apply(q, k, v, causal, group)
