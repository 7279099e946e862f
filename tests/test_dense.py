"""Dense attention, which judges the others, is itself judged: by loops, by PyTorch, by hand."""

import math

import pytest
import torch
from common import DILATIONS, Split, assert_close, both_ways, documents, error, inputs, layout, window
from torch.nn.functional import scaled_dot_product_attention

from ringref import Dilation, Shard, dense_attention


def loops(q, k, v, q_at, k_at, causal=False, dilation=None, mask_mod=None, scale=None):
    """Branch by branch, head by head, query by query, with lists of keys: out, lse."""
    (batch, m, h, d), g = q.shape, k.shape[2]
    scale = 1 / math.sqrt(d) if scale is None else scale
    branches = [(10**9, 1)]
    if dilation is not None:
        branches = list(zip(dilation.segment_lengths, dilation.dilation_rates, strict=True))
    grouped = dilation is not None and dilation.heads == "grouped"
    sizes = [h // len(branches) + (i < h % len(branches)) for i in range(len(branches))]
    groups = [i for i, size in enumerate(sizes) for _ in range(size)]  # the branch of each head
    out, lse = torch.zeros_like(q), torch.full((batch, h, m), -math.inf, dtype=q.dtype)
    for b in range(batch):
        for j in range(h):
            for i, qp in enumerate(q_at):
                scores, values = [], []
                for x, (w, r) in enumerate(branches):
                    offset = x % r if grouped else j % r
                    if (grouped and groups[j] != x) or (qp % w) % r != offset:
                        continue
                    for t, kp in enumerate(k_at):
                        index = [torch.tensor(y).view(1, 1, 1, 1) for y in (b, j, qp, kp)]
                        if (
                            kp // w == qp // w
                            and (kp % w) % r == offset
                            and not (causal and kp > qp)
                            and (mask_mod is None or bool(mask_mod(*index)))
                        ):
                            scores.append(scale * (q[b, i, j] @ k[b, t, j // (h // g)]))
                            values.append(v[b, t, j // (h // g)])
                if scores:
                    top = max(scores)
                    weights = torch.stack([(x - top).exp() for x in scores])
                    lse[b, j, i] = top + weights.sum().log()
                    out[b, i, j] = (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "heads, dilation, mask_mod, scale",
    [
        ((4, 2), "none", None, None),
        ((6, 2), "longnet", None, 0.3),
        ((4, 4), "odd", window, None),
        ((5, 1), "grouped", None, None),
        ((2, 1), "grouped", documents, None),
        ((3, 1), Dilation([4, 4, 6], [2, 2, 5]), None, -1.0),
        ((4, 2), "none", documents, 0.5),
    ],
)
def test_loops(heads, dilation, mask_mod, scale, causal):
    dilation = DILATIONS.get(dilation, dilation) if isinstance(dilation, str) else dilation
    q_at, k_at = [8, 3, 0, 12, 5, 1], [4, 0, 9, 1, 3, 2, 8, 7, 5, 6, 10]
    given = inputs(len(q_at), len(k_at), h=heads[0], g=heads[1])
    arguments = {"causal": causal, "dilation": dilation, "mask_mod": mask_mod, "scale": scale}
    true = loops(*given[:3], q_at, k_at, **arguments)
    shard = Shard(torch.tensor(q_at), None, torch.tensor(k_at))
    for q_chunk in (None, 1, 4):
        found = dense_attention(*given[:3], shard=shard, q_chunk=q_chunk, **arguments)
        assert max(map(error, found, true)) < 1e-13
    if mask_mod is not None:
        assert (true[1] == -math.inf).any()


@pytest.mark.parametrize("q_chunk", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_pytorch(causal, q_chunk):
    """Forward and backward of the plain cases."""
    given = inputs(12, h=6, g=2, d=5)
    found = both_ways(
        dense_attention, given._replace(dlse=torch.zeros_like(given.dlse)), causal=causal, q_chunk=q_chunk
    )
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
    out.backward(given.dout)
    for one, other in zip(found._replace(lse=found.out), (out, out, *(x.grad for x in leaves)), strict=True):
        assert error(one, other.detach()) < 1e-13


def test_gradient_through_lse_by_hand():
    """d lse / dS is the softmax."""
    given = inputs(7, h=2, g=2)
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    _, lse = dense_attention(*leaves)
    lse.backward(given.dlse)
    weights = (torch.einsum("bqhd,bkhd->bhqk", *given[:2]) / math.sqrt(3)).softmax(-1)
    ds = given.dlse[..., None] * weights / math.sqrt(3)
    assert error(leaves[0].grad, torch.einsum("bhqk,bkhd->bqhd", ds, given.k)) < 1e-13
    assert error(leaves[1].grad, torch.einsum("bhqk,bqhd->bkhd", ds, given.q)) < 1e-13
    assert leaves[2].grad is None or not leaves[2].grad.any()


@pytest.mark.parametrize("p", [2, 3, 5])
@pytest.mark.parametrize("q_chunk", [None, 2])
def test_under_a_shard_dense_is_dense(p, q_chunk):
    given, split = inputs(13), Split(layout("permuted", 13, p))
    arguments = {"causal": True, "mask_mod": documents}
    for rank, (one, true) in enumerate(
        zip(
            split.found(dense_attention, given, q_chunk=q_chunk, **arguments),
            split.true(given, **arguments),
            strict=True,
        )
    ):
        assert_close(one, true, f"rank {rank}")
