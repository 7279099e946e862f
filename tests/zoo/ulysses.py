"""Ulysses: all-to-all turns some tokens of all heads into all tokens of some heads."""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def exchange(blocks, group):
    """Block i of dim 0 goes to rank i; block j of the result came from rank j."""
    blocks = blocks.contiguous()
    if dist.get_world_size(group) == 1:
        return blocks
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=group)
    return received


def to_heads(x, group):
    p = dist.get_world_size(group)
    b, s, h, d = x.shape
    blocks = x.reshape(b, s, p, h // p, d).permute(2, 0, 1, 3, 4)
    return exchange(blocks, group).transpose(0, 1).reshape(b, p * s, h // p, d)


def to_tokens(x, group):
    p = dist.get_world_size(group)
    b, n, h, d = x.shape
    blocks = x.reshape(b, p, n // p, h, d).transpose(0, 1)
    return exchange(blocks, group).permute(1, 2, 0, 3, 4).reshape(b, n // p, p * h, d)


class ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return to_heads(x, group)

    @staticmethod
    def backward(ctx, grad):
        return to_tokens(grad, ctx.group), None


class ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return to_tokens(x, group)

    @staticmethod
    def backward(ctx, grad):
        return to_heads(grad, ctx.group), None


def local_attention(q, k, v, causal, window):
    """Plain softmax over all tokens; the lse rides along as one more column of the output."""
    n, d = q.shape[1], q.shape[-1]
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * d**-0.5
    i = torch.arange(n, device=q.device)[:, None]
    j = torch.arange(n, device=q.device)[None, :]
    hidden = torch.zeros(n, n, dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (j > i)
    if window is not None:
        left, right = window
        if left >= 0:
            hidden = hidden | (j < i - left)
        if right >= 0:
            hidden = hidden | (j > i + right)
    logits = logits.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weight = torch.exp(logits - lse[..., None])
    out = torch.einsum("bhij,bjhd->bihd", weight, v)
    return torch.cat((out, lse.transpose(1, 2)[..., None]), dim=-1)


def attention(q, k, v, *, causal, group, window=None):
    p = dist.get_world_size(group)
    h, g = q.shape[2], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    padding = -h % p
    heads = [q.to(wide)]
    for x in (k, v):
        heads.append(x.to(wide).repeat_interleave(h // g, dim=2))
    # heads that do not divide by p are filled up with zero heads and dropped again
    heads = [F.pad(x, (0, 0, 0, padding)) for x in heads]
    q_all, k_all, v_all = (ToHeads.apply(x, group) for x in heads)
    result = ToTokens.apply(local_attention(q_all, k_all, v_all, causal, window), group)
    result = result[:, :, :h]
    return result[..., :-1].to(q.dtype), result[..., -1].transpose(1, 2)
