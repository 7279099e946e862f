"""What the tests share: inputs, layouts written without ringref, and errors relative to norms.

`b` batch, `n` keys, `m` queries, `h` query heads, `g` key/value heads, `d` head dim, `p` ranks.
"""

import math
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringref import (
    Dilation,
    Shard,
    block,
    collective_attention,
    dense_attention,
    dilated_attention,
    partition,
    ring_attention,
    simulate,
)
from ringref.engine import kernels, plan
from ringref.lab.memory import measured
from ringref.shard import wide

METHODS = {
    "dense": dense_attention,
    "dilated": dilated_attention,
    "collective": collective_attention,
    "ring": ring_attention,
}
OTHERS = {name: method for name, method in METHODS.items() if name != "dense"}
TOLERANCE = 1e-10  # in float64, relative to the tensor's norm


class Results(NamedTuple):
    """What is compared: everything that goes out and everything that comes back."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Inputs(NamedTuple):
    """q, k, v, and the gradients of out and lse, of the whole sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor

    def cut(self, queries: slice | Tensor, keys: slice | Tensor) -> "Inputs":
        """The rows of one rank."""
        q, k, v, dout, dlse = self
        return Inputs(q[:, queries], k[:, keys], v[:, keys], dout[:, queries], dlse[:, :, queries])


def inputs(m, n=None, b=2, h=4, g=2, d=3, dtype=torch.float64, seed=0, size=1.0, dv=None) -> Inputs:
    """Random inputs for m queries and n keys (m, if not given), values of dv columns (d, if not given); the logits grow
    with `size`.
    """
    random, n, dv = torch.Generator().manual_seed(seed), m if n is None else n, dv or d
    shapes = ((b, m, h, d), (b, n, g, d), (b, n, g, dv), (b, m, h, dv), (b, h, m))
    q, *rest = (torch.randn(x, generator=random, dtype=torch.float64) for x in shapes)
    *most, dlse = (x.to(dtype) for x in (q * size, *rest))
    return Inputs(*most, dlse if dtype == torch.float64 else dlse.float())


def both_ways(method, given: Inputs, **arguments) -> Results:
    """Forward and backward of one rank, as leaves of their own."""
    q, k, v = (x.detach().clone().requires_grad_() for x in given[:3])
    out, lse = method(q, k, v, **arguments)
    torch.autograd.backward((out, lse), (given.dout, given.dlse))
    return Results(out.detach(), lse.detach(), q.grad, k.grad, v.grad)


def error(one: Tensor, true: Tensor) -> float:
    """‖one − true‖ / ‖true‖; infinite where shapes, dtypes, infinities or NaN differ."""
    if one is None or one.shape != true.shape or not one.isfinite().equal(true.isfinite()):
        return math.inf
    infinite = ~true.isfinite()
    if not one[infinite].equal(true[infinite]):
        return math.inf
    one, true = (x.double().masked_fill(infinite, 0.0) for x in (one, true))
    # a gradient that is zero in exact arithmetic has no norm to compare with: inputs are of order 1
    return float((one - true).norm() / max(float(true.norm()), 1e-3))


def assert_close(one: Results, true: Results, where: object = "", tolerance=TOLERANCE) -> None:
    wrong = {
        name: found for name, found in zip(true._fields, map(error, one, true), strict=True) if not found < tolerance
    }
    assert not wrong, f"{where}: relative errors {wrong}"


# ------------------------------------------------------------------------------------------ layouts


def runs(n: int, weights: list[int]) -> list[Tensor]:
    """0 … n−1 in consecutive runs, as long as the weights say."""
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + weight)
    ends = [x * n // ends[-1] for x in ends]
    return [torch.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def chunks(n: int, parts: int) -> list[Tensor]:
    """0 … n−1 in runs of sizes that differ by at most one, the longer first."""
    sizes = [n // parts + (i < n % parts) for i in range(parts)]
    return [torch.arange(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(parts)]


def layout(name: str, n: int, p: int) -> list[tuple[Tensor, Tensor]]:
    """The positions of every rank's queries and keys, written without ringref's own."""
    shuffled = torch.Generator().manual_seed(n + p)
    if name == "contiguous":
        return [(x, x) for x in chunks(n, p)]
    if name == "zigzag":
        cut = chunks(n, 2 * p)
        return [(x, x) for x in (torch.cat([cut[i], cut[2 * p - 1 - i]]) for i in range(p))]
    if name == "striped":
        return [(x, x) for x in (torch.arange(n)[i::p] for i in range(p))]
    if name == "uneven":  # from p = 4 on a shard is empty
        return [(x, x) for x in runs(n, [(3, 1, 2, 0)[i % 4] for i in range(p)])]
    if name == "permuted":  # queries and keys of one token on different ranks
        cuts = [torch.randperm(n, generator=shuffled).tensor_split(p) for _ in range(2)]
        return list(zip(*cuts, strict=True))
    if name == "decoding":  # few queries, on the last rank; the keys on all the others
        held = [*runs(n, [1 + i % 2 for i in range(p - 1)]), torch.arange(0)] if p > 1 else [None]
        queries = [torch.arange(0)] * (p - 1) + [torch.tensor([n - 3, n - 1, n, n + 4])]
        return [(q, torch.arange(n) if k is None else k) for q, k in zip(queries, held, strict=True)]
    raise ValueError(name)


LAYOUTS = ("contiguous", "zigzag", "striped", "uneven", "permuted", "decoding")


class Split(NamedTuple):
    """A layout with its positions, and where each rank's rows lie when all are laid end to end."""

    positions: list[tuple[Tensor, Tensor]]

    @property
    def rows(self) -> list[tuple[slice, slice]]:
        found, q, k = [], 0, 0
        for queries, keys in self.positions:
            found.append((slice(q, q + len(queries)), slice(k, k + len(keys))))
            q, k = q + len(queries), k + len(keys)
        return found

    @property
    def whole(self) -> Shard:
        """All rows on one rank, end to end."""
        queries, keys = (torch.cat(side) for side in zip(*self.positions, strict=True))
        return Shard(queries, None, keys)

    def shard(self, ring) -> Shard:
        return Shard(self.positions[ring.rank][0], ring, self.positions[ring.rank][1])

    def true(self, given: Inputs, **arguments) -> list[Results]:
        """What each rank must find, by dense attention on one rank."""
        whole = both_ways(dense_attention, given, shard=self.whole, **arguments)
        return [
            Results(whole.out[:, q], whole.lse[:, :, q], whole.dq[:, q], whole.dk[:, k], whole.dv[:, k])
            for q, k in self.rows
        ]

    def found(self, method, given: Inputs, adversarial=True, **arguments) -> list[Results]:
        """What each rank finds, in simulation."""

        def on(ring):
            mine = given.cut(*self.rows[ring.rank])
            return both_ways(method, mine, shard=self.shard(ring), **arguments)

        return simulate(on, len(self.positions), adversarial=adversarial)


def swap(given: Inputs, split: Split, methods=METHODS, **arguments) -> None:
    """Every method, on every rank, finds what dense attention finds on one."""
    true = split.true(given, **arguments)
    for name, method in methods.items():
        for rank, (one, other) in enumerate(zip(split.found(method, given, **arguments), true, strict=True)):
            assert_close(one, other, f"{name}, rank {rank} of {len(true)}, {arguments}")


# ------------------------------------------------------------------------------------------ kernels


LEVELS = (-300.0, -100.0, 0.0, 100.0)  # near which the scores of each head are


def sweep(kernel, dtype, d, device, queries, keys) -> tuple[int, dict]:
    """One kernel on these lengths, full and causal, against the einsum block in float64: how many calls (a head is
    one), and the errors, relative to the norm, that are too large: {(kind, queries, keys, level, tensor): error}.
    """
    wrong, calls = {}, 0
    for kind, c, n in [*product(["full"], queries, keys), *(("causal", n, n) for n in keys)]:
        if kernel.why_not(kernels.Task(device, dtype, d, kind, single=c == 1)):
            continue
        random = torch.Generator().manual_seed(0)
        q, k, v, dout = (torch.randn(1, 1, x, len(LEVELS), d, generator=random) for x in (c, n, n, c))
        level = torch.tensor(LEVELS)[:, None]
        q += (level.abs() / d**0.5).sqrt()
        k += (level.abs() / d**0.5).sqrt() * level.sign()
        q, k, v, dout = (x.to(device, dtype) for x in (q, k, v, dout))
        keep, exact = kernels._keep(q, k, kernels.Seen(kind)), [x.double() for x in (q, k, v)]
        true = block.forward(*exact, d**-0.5, keep)
        given = true.out.to(dtype), true.lse.to(wide(dtype))
        # from the same rounded out: where one key has all the weight, dQ and dK are differences of what is rounded
        true += block.backward(dout.double(), None, *exact, *(x.double() for x in given), d**-0.5, keep)
        found = kernels._forward(kernel, q, k, v, kernels.Seen(kind), d**-0.5)
        found += kernels._backward(kernel, dout, None, q, k, v, *given, kernels.Seen(kind), d**-0.5)
        calls += len(LEVELS)
        for name, x, y in zip(Results._fields, found, true, strict=True):
            x, y = (z[..., None] if name == "lse" else z for z in (x.double(), y))
            norm = partial(torch.linalg.vector_norm, dim=(0, 1, 2, 4))
            most = 1e-5 if name == "lse" else 16 * torch.finfo(dtype).eps + 1e-3
            # what is 0 but for rounding is measured by what it is a difference of, in units of float32 at the least
            parts = norm(dout) * norm(v) * (norm(k) / n if name == "dq" else norm(q) / c**0.5)
            least = max(1e-5, torch.finfo(torch.float32).eps / 2 / most) * parts if name in ("dq", "dk") else 1e-30
            for at, error in zip(LEVELS, (norm(x - y) / (norm(y) + least)).tolist(), strict=True):
                if not error <= most:
                    wrong[kind, c, n, at, name] = error
    return calls, wrong


# ------------------------------------------------------------------------------------------- memory


@contextmanager
def in_parts(count: int):
    """Every rank works in so many parts, however small it is."""
    small = 1 if count > 1 else 2**30
    plan.parts.cache_clear()
    try:
        with mock.patch.multiple(plan, _PART_BYTES=small, _PART_BYTES_OF_TWO=small, _MOST_PARTS=count):
            yield
    finally:
        plan.parts.cache_clear()


def step_peaks(ring, method, layout, dtype, s, h, d, c=None, **arguments):
    """Peak bytes of one rank: of the forward, and of forward and backward."""
    shard = partition(s * ring.size, ring, layout)
    q, k, v = (torch.randn(1, s, h, d, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.ones_like(q)
    for _ in range(2):  # the first call also plans
        q.grad = k.grad = v.grad = None
        with measured() as usage:
            out = METHODS[method](q, k, v, shard=shard, q_chunk=c, **arguments).out
            forward = usage.peak
            out.backward(dout)
        del out
    return forward, usage.peak


# -------------------------------------------------------------------------------------------- masks


def documents(b, h, q_idx, kv_idx):
    """Documents of 7 tokens; later batches and heads see less; queries 5 and 6 see nothing."""
    same = q_idx // 7 == kv_idx // 7
    return same & (kv_idx % 5 != b) & (kv_idx % 4 != h) & (q_idx != 5) & (q_idx != 6)


def window(b, h, q_idx, kv_idx):
    """A sliding window that differs between heads."""
    return (q_idx - kv_idx).abs() <= 2 + 2 * h


DILATIONS = {
    "none": None,
    "longnet": Dilation([4, 16], [1, 4]),
    "odd": Dilation([5, 40], [2, 3]),  # neither divides w, n or h; a tail; w > n
    "grouped": Dilation([6, 12, 30], [1, 2, 3], heads="grouped"),
}


class Seen(TorchDispatchMode):
    """The operators that a rank's thread runs."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **kwargs or {})


def everything(ring, device="cpu", rounds=6):
    """Every kind of exchange, uneven and empty, of changing shapes, whole and among some ranks, on any transport."""
    p, me, dice = ring.size, ring.rank, torch.Generator().manual_seed(7)  # the same on every rank
    full, empty = partial(torch.full, device=device), partial(torch.empty, device=device)

    def some(most, *shape):
        return torch.randint(0, most, shape, generator=dice).tolist()

    for _ in range(rounds):
        n, lengths, table = some(300), some(200, p), some(90, p, p)
        posted = ring.rotate((full((n,), me), full((3,), me * 0.5)), (empty(n, dtype=torch.int64), empty(3)))
        own = full((lengths[me], 3), float(me)).t()  # strided
        every = ring.gather(own, [(3, m) for m in lengths])
        assert [x.shape[1] for x in every] == lengths and all((x == r).all() for r, x in enumerate(every))
        whole, half = posted.wait()  # after another exchange was posted and done
        assert (whole == (me - 1) % p).all() and (half == (me - 1) % p * 0.5).all()
        (total,) = ring.reduce([(full((2, n), 10.0 * me + r).t(),) for r in range(p)])  # strided as well
        assert (total == sum(10.0 * r + me for r in range(p))).all()
        into = {r: (empty(table[r][me], dtype=torch.uint8),) for r in range(p)}
        ring.exchange({r: (full((table[me][r],), 16 * me + r, dtype=torch.uint8),) for r in range(p)}, into).wait()
        assert all((x == 16 * r + me).all() for r, (x,) in into.items())
        few = ring.among([p - 1, 0] if me in (0, p - 1) else list(range(1, p - 1))) if p > 2 else ring
        (came,) = few.rotate((full((n,), me),), (empty(n, dtype=torch.int64),)).wait()
        assert (came == ({0: p - 1, p - 1: 0}.get(me, 1 + (me - 2) % (p - 2)) if p > 2 else 1 - me)).all()
