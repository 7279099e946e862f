"""LongNet's dilated attention on one device: sparse rows of every segment, branches merged."""

import torch


def strands(dilation, branch, heads):
    """(offset, heads) of one branch: heads share an offset where j % r agrees."""
    r = dilation.dilation_rates[branch]
    if dilation.heads == "all":
        return [(offset, list(range(offset, heads, r))) for offset in range(min(r, heads))]
    count = len(dilation.segment_lengths)
    small, extra = divmod(heads, count)
    first = branch * small + min(branch, extra)
    return [(branch % r, list(range(first, first + small + (branch < extra))))]


def sparse_attention(q, k, v, causal):
    """Rows are in the order of their positions, so the triangle is the causal mask."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if causal:
        m = logits.shape[-1]
        later = torch.ones(m, m, dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weight = torch.exp(logits - lse.unsqueeze(-1))
    return torch.einsum("bhij,bjhd->bihd", weight, v), lse


def branch_attention(q, k, v, dilation, branch, causal):
    b, n, h, d = q.shape
    w, r = dilation.segment_lengths[branch], dilation.dilation_rates[branch]
    out = torch.zeros_like(q)
    lse = torch.full((b, n, h), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    for offset, heads in strands(dilation, branch, h):
        if not heads:
            continue
        kv_heads = [j // (h // k.shape[2]) for j in heads]
        for start in range(0, n, w):
            rows = torch.arange(start, min(start + w, n), device=q.device)[offset::r]
            if rows.numel() == 0:
                continue
            part = [q[:, rows][:, :, heads]]
            part += [x[:, rows][:, :, kv_heads] for x in (k, v)]
            part_out, part_lse = sparse_attention(*part, causal)
            at = (
                torch.arange(b, device=q.device)[:, None, None],
                rows[None, :, None],
                torch.tensor(heads, device=q.device)[None, None, :],
            )
            out = out.index_put(at, part_out)
            lse = lse.index_put(at, part_lse.transpose(1, 2))
    return out, lse


def attention(q, k, v, *, causal, group=None, dilation=None):
    dtype, h = q.dtype, q.shape[2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if dilation is None:
        k, v = (x.repeat_interleave(h // x.shape[2], dim=2) for x in (k, v))
        out, lse = sparse_attention(q, k, v, causal)
        return out.to(dtype), lse
    branches = [branch_attention(q, k, v, dilation, i, causal) for i in range(len(dilation.segment_lengths))]
    outs = torch.stack([out for out, _ in branches])
    lses = torch.stack([lse for _, lse in branches])
    # a row that no branch selected has only the floor: its output and gradient are zero
    nothing = (lses == torch.finfo(wide).min).all(0)
    weight = torch.softmax(lses, dim=0).unsqueeze(-1)
    out = (weight * outs).sum(0)
    lse = torch.logsumexp(lses, dim=0).masked_fill(nothing, float("-inf"))
    return out.to(dtype), lse.transpose(1, 2)
