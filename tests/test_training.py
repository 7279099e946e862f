"""Training over a ring is training: the loss, step for step, of the same model on one rank."""

import functools

import pytest
import torch

from ringref import dense_attention, launch, partition, ring_attention, simulate
from ringref.lab.model import ByteLM, loss, sum_gradients, text

TOKENS, STEPS = 64, 30


def train(ring, attention, layout):
    """30 steps on consecutive pieces of the text; every rank returns the loss over all tokens."""
    shard = partition(TOKENS, ring, layout)
    attend = functools.partial(attention, causal=True, shard=shard)
    model = ByteLM(layers=2, width=32, heads=4, kv_heads=2, dtype=torch.float64)
    optimiser, data, losses = torch.optim.AdamW(model.parameters(), 3e-3), text(), []
    for step in range(STEPS):
        piece = data[step * TOKENS : (step + 1) * TOKENS + 1][None]
        inputs, targets = shard.take(piece[:, :-1]), shard.take(piece[:, 1:])
        optimiser.zero_grad()
        mine = loss(model(inputs, shard.positions, attend), targets, TOKENS)
        mine.backward()
        sum_gradients(model, ring)
        optimiser.step()
        losses.append(torch.stack(ring.gather(mine.detach(), [()] * ring.size)).sum().item())
    return losses


@pytest.fixture(scope="module")
def alone():
    return simulate(functools.partial(train, attention=dense_attention, layout="contiguous"), 1)[0]


def test_thirty_steps_over_four_processes_have_the_dense_loss(alone):
    fn = functools.partial(train, attention=ring_attention, layout="zigzag")
    for losses in launch(fn, 4):
        assert losses == pytest.approx(alone, rel=1e-9)
    assert alone[-1] < 0.8 * alone[0]


def test_without_the_sum_of_gradients_the_losses_part(alone, monkeypatch):
    """The comparison above can fail: ranks that keep their own gradients leave the dense curve."""
    monkeypatch.setitem(train.__globals__, "sum_gradients", lambda model, ring: None)
    fn = functools.partial(train, attention=ring_attention, layout="zigzag")
    losses = simulate(fn, 2)[0]
    assert losses[0] == pytest.approx(alone[0], rel=1e-9)
    assert abs(losses[-1] - alone[-1]) > 1e-3 * alone[-1]
