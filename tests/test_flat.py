"""What a ring holds does not grow with the number of ranks, and its parts keep it small."""

import pytest
import torch

import ringref
from ringref import attend
from ringref.memory import measured

S, H, D = 128, 16, 16


def peak_in_shards(ring):
    shard = ringref.partition(S * ring.size, ring, "zigzag")
    q, k, v = (torch.randn(1, S, H, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    for _ in range(2):  # the second step, when plans are known
        q.grad = k.grad = v.grad = None
        with measured() as usage:
            ringref.ring_attention(q, k, v, causal=True, shard=shard).out.backward(dout)
    return usage.peak / q.nbytes


@pytest.mark.parametrize("parts", [3, 4])
def test_peak_is_flat_in_p(parts, monkeypatch):
    for name in ("_PART_BYTES", "_PART_BYTES_OF_TWO"):
        monkeypatch.setattr(attend, name, 1)
    monkeypatch.setattr(attend, "_MOST_PARTS", parts)
    attend._plan.cache_clear()
    try:
        peaks = {p: max(ringref.simulate(peak_in_shards, p)) for p in (2, 3, 4, 8)}
    finally:
        attend._plan.cache_clear()
    # own outputs and gradients are 4; a fused backward's accumulator, 2 / parts, is not seen here
    assert max(peaks.values()) + 2 / parts < {3: 12, 4: 10.5}[parts], peaks
    assert peaks[8] < 1.02 * peaks[4] < 1.2 * peaks[3], peaks
