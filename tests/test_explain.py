"""What `explain` says is what then happens: which kernels run, and whether keys travel."""

import re
import threading

import pytest
import torch

import ringref
from ringref import Dilation, Shard, backends, partition, simulate

N, H, D = 64, 4, 8
DILATIONS = {
    "dense": None,
    "inside": Dilation([8, 16], [1, 2]),
    "across": Dilation([8, 32], [1, 2]),
    "grouped": Dilation([8, 32], [1, 3], heads="grouped"),
}


def shard_of(layout, ring):
    if layout == "random":
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        return Shard(order.tensor_split(ring.size)[ring.rank], ring)
    return partition(N, ring, layout)


@pytest.fixture
def ran(monkeypatch):
    """thread -> (kind, kernel) of each block that it computed."""
    seen, kernel_of = {}, backends._kernel

    def spy(q, k, what, *rest):
        kernel = kernel_of(q, k, what, *rest)
        seen.setdefault(threading.get_ident(), set()).add((what.kind, kernel.name if kernel else "math"))
        return kernel

    monkeypatch.setattr(backends, "_kernel", spy)
    return seen


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "random"])
@pytest.mark.parametrize("dilation", DILATIONS.values(), ids=DILATIONS)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_explain_says_what_happens(p, dilation, layout, ran):
    masked = {"mask_mod": lambda b, h, i, j: i >= j - 3}
    calls = {"causal": {"causal": True}, "full": {}, "mask": masked, "a scale of -1": {"causal": True, "scale": -1.0}}
    if layout != "random":  # whose blocks are masked, by math
        calls["torch"] = {"causal": True, "backend": "torch"}

    def on(ring, how):
        shard = shard_of(layout, ring)
        q, k, v = torch.randn(3, 1, len(shard.positions), H, D)
        said = backends.explain(q, shard=shard, dilation=dilation, **how)
        ringref.ring_attention(q, k, v, shard=shard, dilation=dilation, **how)
        return said, ran.pop(threading.get_ident()), ring.traffic.received

    for name, how in calls.items():
        for said, kernels, received in simulate(lambda ring, how=how: on(ring, how), p):
            assert set(re.findall(r"^(\w+) blocks.*: (\w+)$", said, re.M)) == kernels, (name, said)
            assert ("keys travel" in said) == (received > 0), (name, said)


def test_explain_gives_reasons():
    q = torch.zeros(1, 8, 4, 16)
    said = backends.explain(q, causal=True)
    assert said.startswith("causal blocks: cpu_flash\n  not cudnn: runs on cuda, not on cpu")
    assert said.endswith("all keys: keys stay; 1 visits (causal) of strided views")
    assert "not cpu_flash: backend='math' excludes it" in backends.explain(q, backend="math")
    assert "not cpu_flash: needs a scale above 0" in backends.explain(q, scale=0.0)
    assert "not cpu_flash: takes full and causal blocks, not a mask" in backends.explain(q, mask_mod=lambda *_: True)
    nothing = simulate(lambda ring: backends.explain(q[:, : 8 * (not ring.rank)], shard=one_sided(ring)), 2)[1]
    assert nothing == "all keys: keys stay; none are seen here"


def one_sided(ring):
    """All tokens on the first rank."""
    return Shard(torch.arange(8 * (not ring.rank)), ring)
