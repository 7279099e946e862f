"""A ring whose blocks are worked in tiles, as a kernel does it: padded head dim, workspaces, cached masks."""

import functools
import math

import torch
import torch.distributed as dist

TILE = 32


@functools.lru_cache(maxsize=64)
def triangle(rows, cols, shift):
    """Whether column j of a tile may be seen from row i, `shift` rows further down."""
    return torch.arange(cols)[None, :] <= torch.arange(rows)[:, None] + shift


def tiles(length):
    return [(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def pad_dim(x):
    """Heads first, the head dim filled up to a multiple of 8."""
    x = x.transpose(1, 2)
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))


def wide_heads(x, heads):
    return x.repeat_interleave(heads // x.shape[1], dim=1)


class Hop:
    """K and V on their way to the next rank while those in hand are used."""

    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.last = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def post(self, x):
        x = x.contiguous()
        arriving = torch.empty_like(x)
        ops = [
            dist.P2POp(dist.isend, x, self.next, self.group),
            dist.P2POp(dist.irecv, arriving, self.last, self.group),
        ]
        return arriving, dist.batch_isend_irecv(ops)


def forward_block(q, k, v, out, total, top, first_row, first_col, causal, scale):
    """Adds one block of keys to the running out, sum and maximum of every row, tile by tile."""
    for a, b in tiles(q.shape[2]):
        for c, e in tiles(k.shape[2]):
            shift = (first_row + a) - (first_col + c)
            if causal and shift + (b - a) <= 0:
                continue
            s = q[:, :, a:b] @ k[:, :, c:e].transpose(-1, -2) * scale
            if causal:
                s = s.masked_fill(~triangle(b - a, e - c, shift), -math.inf)
            new = torch.maximum(top[:, :, a:b], s.amax(-1))
            level = new.masked_fill(new == -math.inf, 0.0)
            weight = (s - level[..., None]).exp()
            fade = (top[:, :, a:b] - level).exp()
            total[:, :, a:b] = total[:, :, a:b] * fade + weight.sum(-1)
            out[:, :, a:b] = out[:, :, a:b] * fade[..., None] + weight @ v[:, :, c:e]
            top[:, :, a:b] = new


def backward_block(q, k, v, do, delta, lse, dq, first_row, first_col, causal, scale):
    """Adds to dq in place; returns dk and dv of the query heads."""
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for a, b in tiles(q.shape[2]):
        for c, e in tiles(k.shape[2]):
            shift = (first_row + a) - (first_col + c)
            if causal and shift + (b - a) <= 0:
                continue
            s = q[:, :, a:b] @ k[:, :, c:e].transpose(-1, -2) * scale
            if causal:
                s = s.masked_fill(~triangle(b - a, e - c, shift), -math.inf)
            p = (s - lse[:, :, a:b, None]).exp()
            dv[:, :, c:e] += p.transpose(-1, -2) @ do[:, :, a:b]
            ds = p * (do[:, :, a:b] @ v[:, :, c:e].transpose(-1, -2) - delta[:, :, a:b, None]) * scale
            dq[:, :, a:b] += ds @ k[:, :, c:e]
            dk[:, :, c:e] += ds.transpose(-1, -2) @ q[:, :, a:b]
    return dk, dv


def folded(x, kv_heads):
    b, h, s, d = x.shape
    return x.view(b, kv_heads, h // kv_heads, s, d).sum(2)


class TiledRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale, group):
        hop = Hop(group)
        b, s, h, d = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = d**-0.5 if scale is None else scale
        queries = pad_dim(q.to(wide))
        out = torch.empty(b, h, s, -(-v.shape[-1] // 8) * 8, dtype=wide)
        total, top = torch.empty(b, h, s, dtype=wide), torch.empty(b, h, s, dtype=wide)
        out.zero_()
        total.zero_()
        top.fill_(-math.inf)
        keys, values = k, v
        for t in range(hop.size):
            source = (hop.rank - t) % hop.size
            if t < hop.size - 1:
                next_keys, first_works = hop.post(keys)
                next_values, second_works = hop.post(values)
            if not causal or source <= hop.rank:
                block = [wide_heads(pad_dim(x.to(wide)), h) for x in (keys, values)]
                forward_block(queries, *block, out, total, top, hop.rank * s, source * s, causal, scale)
            if t < hop.size - 1:
                for work in [*first_works, *second_works]:
                    work.wait()
                keys, values = next_keys, next_values
        lse = top + total.log()
        out = (out / total[..., None])[..., : v.shape[-1]].transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.hop, ctx.causal, ctx.scale = hop, causal, scale
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        hop, (b, s, h, d) = ctx.hop, q.shape
        g, wide = k.shape[2], out.dtype
        do = do.to(wide)
        delta = (do * out).sum(-1).transpose(1, 2) - dlse
        queries, do = pad_dim(q.to(wide)), pad_dim(do)
        dq = torch.zeros_like(queries)
        keys, values, homeward = k, v, None
        for t in range(hop.size):
            source = (hop.rank - t) % hop.size
            if t < hop.size - 1:
                next_keys, first_works = hop.post(keys)
                next_values, second_works = hop.post(values)
            dk = torch.zeros(b, g, s, -(-d // 8) * 8, dtype=wide)
            dv = torch.zeros(b, g, s, -(-v.shape[-1] // 8) * 8, dtype=wide)
            if not ctx.causal or source <= hop.rank:
                block = [wide_heads(pad_dim(x.to(wide)), h) for x in (keys, values)]
                found = backward_block(
                    queries, *block, do, delta, lse, dq, hop.rank * s, source * s, ctx.causal, ctx.scale
                )
                dk, dv = (folded(x, g) for x in found)
            if homeward:
                for (arrived, works), mine in zip(homeward, (dk, dv)):
                    for work in works:
                        work.wait()
                    mine += arrived
            if hop.size > 1:
                homeward = [hop.post(dk), hop.post(dv)]
            if t < hop.size - 1:
                for work in [*first_works, *second_works]:
                    work.wait()
                keys, values = next_keys, next_values
        if homeward:
            for _, works in homeward:
                for work in works:
                    work.wait()
            dk, dv = (arrived for arrived, _ in homeward)
        dq, dk = (x[..., :d].transpose(1, 2) for x in (dq, dk))
        return dq.to(q.dtype), dk.to(k.dtype), dv[..., : v.shape[-1]].transpose(1, 2).to(v.dtype), None, None, None


def attention(q, k, v, *, causal, group, scale=None):
    return TiledRing.apply(q, k, v, causal, scale, group)
