"""What `explain` says is what then happens: which kernels run, and whether keys travel."""

import re
import threading

import pytest
import torch
from common import DILATIONS, LAYOUTS, Split, layout, window

import ringref
from ringref import Dilation, explain, simulate
from ringref.engine import kernels

N, H, D = 64, 4, 8


@pytest.fixture
def ran(monkeypatch):
    """thread -> (kind, kernel) of each block that it computed."""
    seen, kernel_of = {}, kernels._kernel

    def spy(q, v, what, *rest):
        kernel = kernel_of(q, v, what, *rest)
        seen.setdefault(threading.get_ident(), set()).add((what.kind, kernel.name if kernel else "math"))
        return kernel

    monkeypatch.setattr(kernels, "_kernel", spy)
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dilation", [*DILATIONS.values(), Dilation([8, 16], [1, 2])], ids=[*DILATIONS, "inside"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_explain_says_what_happens(p, dilation, name, ran):
    split = Split(layout(name, N, p))
    calls = {"causal": {"causal": True}, "full": {}, "mask": {"mask_mod": window}}
    calls |= {"a scale of -1": {"causal": True, "scale": -1.0}, "torch": {"causal": True, "backend": "torch"}}

    def on(ring, how):
        shard = split.shard(ring)
        q, k, v = (torch.randn(1, len(x), H, D) for x in (shard.positions, shard.kv_positions, shard.kv_positions))
        said = explain(q, k, shard=shard, dilation=dilation, **how)
        ringref.ring_attention(q, k, v, shard=shard, dilation=dilation, **how)
        moved = ring.traffic.received + ring.traffic.sent * (name == "decoding")  # where some ranks have nothing to ask
        return said, ran.pop(threading.get_ident(), set()), moved

    for what, how in calls.items():
        for said, taken, moved in simulate(lambda ring, how=how: on(ring, how), p):
            assert set(re.findall(r"^(\w+) blocks.*: (\w+)$", said, re.M)) == taken, (what, said)
            assert ("keys travel" in said) == (moved > 0), (what, said)


def test_explain_gives_reasons():
    q = torch.zeros(1, 8, 4, 16)
    said = explain(q, causal=True)
    assert said.startswith("causal blocks: cpu_flash\n  not cudnn: runs on cuda, not on cpu")
    assert said.endswith("all keys: keys stay; 1 visits (causal) of strided views")
    assert "not cpu_flash: backend='math' excludes it" in explain(q, backend="math")
    assert "not cpu_flash: needs a scale above 0" in explain(q, scale=0.0)
    assert "not cpu_flash: takes full and causal blocks, not a mask" in explain(q, mask_mod=lambda *_: True)
    split = Split(layout("uneven", 8, 4))  # whose last shard is empty
    nothing = lambda ring: explain(q[:, : len(split.shard(ring).positions)], shard=split.shard(ring))
    assert simulate(nothing, 4)[3] == "all keys: keys stay; none are seen here"
