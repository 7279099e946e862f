"""A small byte-level language model that takes its attention as an argument.

The main job borrows q, k, v from its first layer; the training test and notebook train it. Nothing
in here knows how many ranks there are: a token is known by its global position.

b batch, s tokens here, h query heads, g key/value heads, d head dim, m model width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn

VOCABULARY = 256  # a token is a byte


def text(path=None):
    """A real text as a uint8 tensor of shape (bytes,): a file, or Python's own help topics.

    The help topics are about 470 kB of English. They differ a little between Python versions.
    """
    if path is not None:
        data = Path(path).read_bytes()
    else:
        from pydoc_data.topics import topics  # half a megabyte, so only when it is asked for

        data = "\n".join(topics[name] for name in sorted(topics)).encode()
    if not data:
        raise ValueError(f"path: expected a file with at least one byte, {path} is empty")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def rotate_by_position(x, positions, base=10_000.0):
    """RoPE (arXiv 2104.09864, eq. 34): turn pair i of a head by positions · base^(-2i/d).

    x: (b s h d) with d even; positions: (s,) int64, *global*, so shards need no special case.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x: RoPE turns pairs, expected an even head dim, got {x.shape[-1]}")
    pairs = torch.arange(x.shape[-1] // 2, dtype=torch.float64, device=x.device)
    speed = base ** (-2 * pairs / x.shape[-1])
    # angles reach 10⁶ at long context, where float32 has lost the fraction
    angle = einsum(positions.to(x.device, torch.float64), speed, "s, i -> s i")[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


class Layer(nn.Module):
    """Pre-norm attention and a two-layer perceptron, each added to what came in."""

    def __init__(self, width, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.to_qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def qkv(self, x, positions):
        """x (b s m) -> q (b s h d), k (b s g d), v (b s g d), q and k turned by RoPE."""
        together = rearrange(self.to_qkv(self.before_attention(x)), "b s (head d) -> b s head d", d=self.head_dim)
        q, k, v = together.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        return rotate_by_position(q, positions), rotate_by_position(k, positions), v

    def forward(self, x, positions, attention):
        out = attention(*self.qkv(x, positions))
        out = out[0] if isinstance(out, tuple) else out
        x = x + self.from_heads(rearrange(out, "b s h d -> b s (h d)"))
        return x + self.mlp(self.before_mlp(x))


class ByteLM(nn.Module):
    """A decoder over bytes. `forward(tokens, positions, attention)` -> logits (b s 256).

    layers, width, heads: width is a multiple of heads, with an even head dim. kv_heads: divides
    heads; None is as many. seed: the weights are the same for every dtype, up to rounding, and the
    global random state stays as it was.
    """

    def __init__(self, layers=2, width=64, heads=4, kv_heads=None, seed=0, dtype=torch.float32):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if width % (2 * heads):
            raise ValueError(f"width: expected a multiple of 2·heads = {2 * heads}, got {width}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads = {heads}, got {kv_heads}")
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.layers = nn.ModuleList(Layer(width, heads, kv_heads) for _ in range(layers))
            self.norm, self.to_logits = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        self.to(dtype)
        for weight in (p for p in self.parameters() if p.dim() == 2):
            # variance 1/fan-in keeps q, k and the residual stream of order one; an embedding has no
            # fan-in
            scale = 1.0 if weight is self.embedding.weight else weight.shape[1] ** -0.5
            draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data.copy_(scale * draw)

    def forward(self, tokens, positions, attention):
        """tokens (b s) of 0…255; positions (s,) their global positions, a Shard's `positions`.

        attention(q, k, v) -> `Attended`, or the output tensor alone: it sees q (b s h d) and k, v
        (b s g d) of this rank, for example functools.partial(ring_attention, causal=True,
        shard=shard).
        """
        x = self.embedding(tokens.long())
        for layer in self.layers:
            x = layer(x, positions, attention)
        return self.to_logits(self.norm(x))

    @torch.no_grad()
    def qkv(self, tokens, positions):
        """The first layer's q (b s h d), k and v (b s g d) for tokens (b s): real inputs to try."""
        return self.layers[0].qkv(self.embedding(tokens.long()), positions)


def loss(logits, targets, count):
    """Summed negative log-likelihood (nats) of targets (b s) under logits (b s 256), over `count`.

    `count` is the number of targets on *all* ranks: the ranks' losses, and their gradients, then
    sum to those of the whole sequence. At least float32, whatever the logits are.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), reduction="sum")
    return total / count


@torch.no_grad()
def sum_gradients(model, ring):
    """Replace each parameter's gradient by its sum over the ring, in the same order on every rank.

    One gathered message: for small models. The order keeps replicas equal to the last bit.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mine = torch.cat([g.flatten() for g in grads])
    total = torch.stack(ring.gather(mine, [mine.shape] * ring.size)).sum(0)
    for p, summed in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad = summed.view_as(p)
