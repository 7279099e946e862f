"""The byte-level model: positions are global, pieces sum to the whole, seeds mean what they say."""

import functools

import pytest
import torch
import torch.nn.functional as F

from ringref import simulate
from ringref.lab.model import ByteLM, loss, rotate_by_position, sum_gradients, text


def plain(q, k, v):
    """Causal attention by torch alone, so that this file needs no method of the package."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def test_the_text_is_real_and_the_same_each_time(tmp_path):
    first = text()
    assert first.dtype == torch.uint8 and len(first) > 300_000
    assert "statement" in bytes(first[:20_000].tolist()).decode()
    assert torch.equal(first, text())
    (tmp_path / "mine").write_bytes(b"\x00\xffmine")
    assert text(tmp_path / "mine").tolist() == list(b"\x00\xffmine")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="path: .* empty"):
        text(tmp_path / "empty")


def test_rope_makes_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        turned = (rotate_by_position(x, torch.tensor([at])) for x, at in ((q, i), (k, j)))
        return torch.mul(*turned).sum()

    assert torch.allclose(score(7, 3), score(1_000_007, 1_000_003), rtol=1e-8)
    assert not torch.allclose(score(7, 3), score(7, 4), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shapes_dtypes_and_seed(dtype):
    state = torch.get_rng_state()
    model = ByteLM(layers=1, width=32, heads=4, kv_heads=2, seed=3, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)
    tokens, positions = text()[None, :10], torch.arange(10)
    q, k, v = model.qkv(tokens, positions)
    assert [x.shape for x in (q, k, v)] == [(1, 10, 4, 8), (1, 10, 2, 8), (1, 10, 2, 8)]
    assert {x.dtype for x in (q, k, v, model(tokens, positions, plain))} == {dtype}
    again, other = (ByteLM(1, 32, 4, 2, seed, dtype) for seed in (3, 4))
    assert torch.equal(again.to_logits.weight, model.to_logits.weight)
    assert not torch.equal(other.to_logits.weight, model.to_logits.weight)


def test_losses_and_gradients_of_pieces_sum_to_the_whole():
    tokens, positions = text()[None, :13], torch.arange(12)
    build = functools.partial(ByteLM, layers=1, width=16, heads=2, dtype=torch.float64)

    def by_itself(q, k, v):  # each token sees itself only, so that a rank needs no other's keys
        return v

    whole = build()
    expected = loss(whole(tokens[:, :-1], positions, by_itself), tokens[:, 1:], 12)
    expected.backward()

    def fn(ring):
        mine = positions[ring.rank :: ring.size]
        model = build()
        part = loss(model(tokens[:, mine], mine, by_itself), tokens[:, mine + 1], 12)
        part.backward()
        sum_gradients(model, ring)
        return part.detach(), model

    ranks = simulate(fn, 3)
    assert torch.allclose(sum(part for part, _ in ranks), expected, rtol=1e-12)
    for _, model in ranks:
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_it_learns():
    torch.manual_seed(0)
    model, data = ByteLM(), text()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(30):
        tokens = data[step * 257 : (step + 1) * 257][None]
        optimiser.zero_grad()
        value = loss(model(tokens[:, :-1], torch.arange(256), plain), tokens[:, 1:], 256)
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="width: expected a multiple of 2·heads = 8, got 20"):
        ByteLM(width=20, heads=4)
    with pytest.raises(ValueError, match="kv_heads: expected a divisor of heads = 4, got 3"):
        ByteLM(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="x: RoPE turns pairs"):
        rotate_by_position(torch.zeros(1, 1, 1, 3), torch.arange(1))
