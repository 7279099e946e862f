"""Who holds which positions: shards, dilated index sets, and which pairs of rows meet.

`b` batch · `n` tokens in the whole sequence · `s` tokens on this rank · `h` query heads · `g`
key/value heads · `d` head dim · `p` ranks · `w` segment length · `r` dilation rate · `c` query
chunk. Tensors are `b s h d`.

A *strand* `(w, r, offset, heads)` is a set of heads that keep the positions with `(pos % w) % r ==
offset` and attend within the segment `pos // w`. Dense attention is one strand; LongNet
(2307.02486, eq. 8–10) is a strand per branch and offset. A *visit* is a strand on one block of
keys, cut so that each piece is full, causal or masked. Everything is decided from global positions,
so layouts need no special cases.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .comm import Elsewhere, Ring, ThreadRing, _World

LAYOUTS = ("contiguous", "zigzag", "striped")
BACKENDS = ("auto", "math", "torch", "xformers")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = 2**62  # a segment length that no sequence reaches


class Attended(NamedTuple):
    """What every method returns: `out` b s h d in the inputs' dtype, `lse` b h s (natural log;
    float32, or float64).
    """

    out: Tensor
    lse: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results are merged and gradients accumulate: float32, or float64 for
    float64.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def exactly(step: Callable) -> Callable:
    """`step` without autocast: mixed precision is the caller's choice of q, k and v, not of what is
    computed with them.
    """

    @wraps(step)
    def run(*args):
        device = next((x.device.type for x in args if isinstance(x, Tensor)), None)
        if device is None or not torch.amp.is_autocast_available(device):
            return step(*args)
        with torch.autocast(device, enabled=False):
            return step(*args)

    return run


# ---------------------------------------------------------------------------------------- positions


class Positions:
    """An immutable 1-D int64 tensor of global positions that hashes by content, so that plans can
    be cached.
    """

    def __init__(self, index: Tensor):
        self.index = index
        self.digest = int.from_bytes(hashlib.blake2b(index.numpy().tobytes(), digest_size=7).digest(), "big")

    def __len__(self):
        return len(self.index)

    def __hash__(self):
        return self.digest

    def __eq__(self, other):
        return self.digest == other.digest and len(self) == len(other)

    def __getitem__(self, rows: Tensor) -> Positions:
        return Positions(self.index[rows])


@lru_cache(maxsize=16)
def counted(n: int) -> Positions:
    """0 … n−1."""
    return Positions(torch.arange(n))


def _positions(name: str, index: Any) -> Positions:
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype != torch.int64 or not index.is_cpu:
        got = f"{tuple(index.shape)} {index.dtype} {index.device}" if isinstance(index, Tensor) else repr(index)
        raise TypeError(f"{name} must be a 1-D int64 CPU tensor of global positions, got {got}")
    if len(index) and int(index.min()) < 0:
        raise ValueError(f"{name}: positions count from 0, got {int(index.min())}")
    return Positions(index.detach().clone(memory_format=torch.contiguous_format))


def _a_ring(ring: Any) -> Ring:
    if not all(hasattr(ring, a) for a in ("rank", "size", "exchange")):
        raise TypeError(f"ring must be a ring (simulate's, launch's or a ProcessRing), got {ring!r}")
    return ring


@lru_cache(maxsize=1)
def alone() -> Ring:
    """A ring of one."""
    return ThreadRing(0, _World(1, adversarial=False))


class Shard:
    """My tokens' global positions and the ranks I talk to. Building one does not communicate.

    Args:
        positions: 1-D int64 CPU tensor, the global position of each of my `s` tokens, in the order
            of the tensors' rows.
        ring: the ranks that hold the rest (`None`: there is no rest).
        kv_positions: those of my keys and values where they differ from my queries'.

    Keys must cover 0 … n−1 over all ranks without overlap; queries must only not overlap. Both are
    checked at the first call that communicates, on every rank.
    """

    def __init__(self, positions: Tensor, ring: Ring | None, kv_positions: Tensor | None = None):
        self.ring = alone() if ring is None else _a_ring(ring)
        self.queries = _positions("positions", positions)
        self.keys = self.queries if kv_positions is None else _positions("kv_positions", kv_positions)
        self.positions, self.kv_positions = self.queries.index, self.keys.index

    def __repr__(self):
        return f"Shard(rank {self.ring.rank} of {self.ring.size}, {len(self.queries)} queries, {len(self.keys)} keys)"

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """My rows of a whole tensor: `b n …` → `b s …` along `dim`."""
        if len(self.queries) and int(self.positions.max()) >= x.shape[dim]:
            raise ValueError(f"x has {x.shape[dim]} rows along dim {dim}; my last position is {self.positions.max()}")
        return x.index_select(dim, self.positions.to(x.device))

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Every rank's rows in global order, `b s …` → `b n …`; the gradient is summed over ranks
        and cut again.
        """

        def say():
            if not isinstance(x, Tensor) or not -x.dim() <= dim < x.dim():
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"x must be a tensor that has dim {dim}, got {got}")
            if x.shape[dim] != len(self.queries):
                held = len(self.queries)
                raise ValueError(f"x has {x.shape[dim]} rows along dim {dim}; this shard has {held} positions")
            others = tuple(size for i, size in enumerate(x.shape) if i != dim % x.dim())
            words = ["gather", str(x.dtype), x.device.type, dim % x.dim(), others, torch.is_grad_enabled()]
            return words, torch.is_grad_enabled() and x.requires_grad

        names = ("method", "dtype of x", "device of x", "dim", "shape of x", "grad mode")
        needs, table = meet(self, names, say)
        anchor = torch.zeros((), requires_grad=True) if needs else None
        dim = dim % x.dim()
        return _Rejoin.apply(x, anchor, self.ring, table.queries, dim)


class _Rejoin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, ring, positions, dim):
        ctx.ring, ctx.positions, ctx.dim = ring, positions, dim
        x = x.movedim(dim, 0).contiguous()
        every = torch.cat(ring.gather(x, [(len(one), *x.shape[1:]) for one in positions]))
        order = torch.cat([one.index for one in positions]).argsort().to(x.device)
        return every[order].movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        place = torch.cat([one.index for one in ctx.positions]).argsort().argsort().to(grad.device)
        parts = grad.movedim(ctx.dim, 0)[place].split([len(one) for one in ctx.positions])
        (mine,) = ctx.ring.reduce([(part.clone(),) for part in parts])
        return mine.movedim(0, ctx.dim), None, None, None, None


def _runs(n: int, m: int) -> list[Tensor]:
    """0 … n−1 in m runs whose lengths differ by at most one, the longer first."""
    return list(torch.arange(n).tensor_split(m))


def partition(n: int, ring: Ring, layout: str = "contiguous") -> Shard:
    """Who holds which of n tokens: rank i gets run i of p (contiguous), chunks i and 2p−1−i of 2p
    (zigzag, also called head-tail: 2p equal slices of causal work), or positions i::p (striped,
    2311.09431). n need not divide by anything.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f"n must be a number of tokens, got {n!r}")
    i, p = _a_ring(ring).rank, ring.size
    if layout == "contiguous":
        return Shard(_runs(n, p)[i], ring)
    if layout == "zigzag":
        chunks = _runs(n, 2 * p)
        return Shard(torch.cat([chunks[i], chunks[2 * p - 1 - i]]), ring)
    if layout == "striped":
        return Shard(torch.arange(i, max(n, i), p), ring)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


# ------------------------------------------------------------------------ what all ranks agree upon


class Table(NamedTuple):
    """The positions of every rank's queries and keys, in rank order."""

    queries: tuple[Positions, ...]
    keys: tuple[Positions, ...]

    @property
    def n(self) -> int:
        return sum(map(len, self.keys))


_tables: WeakKeyDictionary = WeakKeyDictionary()  # ring -> the tables that it knows
_KNOWN = 4


def meet(shard: Shard, names: Sequence[str], say: Callable[[], tuple[list, bool]]) -> tuple[bool, Table]:
    """One fixed-size header from every rank, and its positions only when new: what a call begins
    with.

    Args:
        names: of the words that must be alike on all ranks, in the words' order.
        say: checks this rank's arguments, and returns the words and whether this rank needs a
            gradient.

    Returns:
        Whether any rank needs a gradient, and the table of positions. A mistake of one rank is an
        error on all of them.

    Whether positions are exchanged is decided from what all ranks said they know, so that no rank
    waits alone.
    """
    try:
        (words, needs), mistake = say(), None
    except (TypeError, ValueError, NotImplementedError) as error:
        words, needs, mistake = [0] * len(names), False, error
    ring, known = shard.ring, _tables.setdefault(shard.ring, {})
    row = [int(mistake is None), int(needs), *map(_number, words)]
    known_names = list(known)[-_KNOWN:]
    digests = [len(shard.queries), len(shard.keys), shard.queries.digest, shard.keys.digest]
    rows = ring.announce([*row, *digests, *known_names, *[0] * (_KNOWN - len(known_names))])
    if mistake is not None:
        raise mistake
    wrong = [r for r, said in enumerate(rows) if not said[0]]
    if wrong:
        raise Elsewhere(f"rank {wrong[0]} rejected its own arguments (its error says which); no rank goes on")
    needs = any(said[1] for said in rows)
    for name, word, *column in zip(names, words, *(said[2:] for said in rows), strict=False):
        if (name != "grad mode" or needs) and len(set(column)) > 1:
            alike = [r for r, x in enumerate(column) if x == column[ring.rank]]
            shown = column if all(abs(x) < 2**31 for x in column) else f"{word!r} only on ranks {alike}"
            raise ValueError(f"{name} differs between ranks: {shown}")
    sizes = [r[len(row) :] for r in rows]
    name = hash(tuple(tuple(s[:4]) for s in sizes)) & (2**62 - 1)
    if not all(name in s[4:] for s in sizes):
        every = ring.share(torch.cat([shard.positions, shard.kv_positions]), [s[0] + s[1] for s in sizes])
        cut = [x.split([s[0], s[1]]) for x, s in zip(every, sizes, strict=True)]
        table = Table(*(tuple(Positions(x.clone()) for x in side) for side in zip(*cut, strict=True)))
        _check_cover(table)
        known[name] = table
    table = known[name] = known.pop(name)
    for old in list(known)[:-_KNOWN]:
        del known[old]
    return needs, table


def _check_cover(table: Table) -> None:
    def described(wrong: Tensor) -> str:
        return f"{wrong[:5].tolist()}{' …' if len(wrong) > 5 else ''}"

    for name, every in (("positions", table.queries), ("kv_positions", table.keys)):
        index, times = torch.cat([one.index for one in every]).unique(return_counts=True)
        if bool((times > 1).any()):
            raise ValueError(f"{name} overlap between or within ranks: {described(index[times > 1])} are held twice")
        if every is table.keys and len(index) and int(index[-1]) != len(index) - 1:
            gaps = torch.ones(int(index[-1]) + 1, dtype=torch.bool).index_fill_(0, index, False).nonzero()[:, 0]
            raise ValueError(f"{name} leave gaps: no rank holds the keys {described(gaps)}; they must cover 0 … n−1")


def _whole(x: Any) -> int:
    """x as an integer; 0, which is none of ours, if it is not one."""
    try:
        return 0 if isinstance(x, bool) else operator.index(x)
    except TypeError:
        return 0


@dataclass(frozen=True)
class Dilation:
    """LongNet's dilated attention (2307.02486): branch i cuts the sequence into segments of
    `segment_lengths[i]` and keeps every `dilation_rates[i]`-th position of each, `(pos % w) % r ==
    offset`; the branches' results merge by their softmax denominators (eq. 9, 10).

    `heads="all"`: every branch serves all heads, head j with offset `j % r`. `heads="grouped"`:
    branch i serves one contiguous group of heads (sizes differ by at most one, the larger first),
    with offset `i % r`.
    """

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    heads: str = "all"

    def __post_init__(self):
        for name in ("segment_lengths", "dilation_rates"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"{name} must be a non-empty list of positive integers, got {values!r}")
            whole = tuple(map(_whole, values))
            if not all(0 < x < EVERYTHING for x in whole):
                raise ValueError(f"{name} must be positive integers below 2**62, got {list(values)}")
            object.__setattr__(self, name, whole)
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                f"segment_lengths and dilation_rates must have the same length, "
                f"got {len(self.segment_lengths)} "
                f"and {len(self.dilation_rates)}"
            )
        for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True):
            if r > w:
                raise ValueError(f"dilation_rates: r = {r} is larger than its segment length w = {w}")
        if self.heads not in ("all", "grouped"):
            raise ValueError(f'heads must be "all" or "grouped", got {self.heads!r}')


class Call(NamedTuple):
    """One attention call as all ranks agreed upon it."""

    causal: bool
    dilation: Dilation | None
    mask_mod: Callable | None
    scale: float
    q_chunk: int | None
    backend: str
    ring: Ring
    table: Table
    anchor: Tensor | None  # makes autograd visit this rank's backward when only its neighbours need a gradient

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """What `mask_mod` says of these indices: booleans of four dimensions that broadcast to b h
        q k.
        """
        keep = torch.as_tensor(self.mask_mod(b, h, q_idx, kv_idx), device=q_idx.device)
        if keep.dtype != torch.bool:
            raise TypeError(f"mask_mod must return booleans (True: the key is seen), got {keep.dtype}")
        full = (len(b), h.shape[1], q_idx.shape[2], kv_idx.shape[3])
        if keep.dim() > 4 or any(x not in (1, y) for x, y in zip(keep.shape[::-1], full[::-1], strict=False)):
            raise ValueError(f"mask_mod must return what broadcasts to b h q k = {full}, got shape {tuple(keep.shape)}")
        return keep[(None,) * (4 - keep.dim())]


_WORDS = ("method", "batch (dim 0 of q)", "heads (dim 2 of q)", "key/value heads (dim 2 of k)", "head dim", "dtype")
_WORDS += ("device", "causal", "scale", "dilation", "mask_mod", "backend", "grad mode")


def agree(method: str, q, k, v, *, able, causal, dilation, mask_mod, scale, shard, q_chunk, backend) -> Call:
    """Check the arguments here and against every other rank's; any rank's mistake is an error on
    all of them.

    `able(q, backend, masked, scale)` raises where the backend cannot do it.
    """
    if shard is not None and not isinstance(shard, Shard):
        raise TypeError(f"shard must be a Shard (see partition) or None, got {type(shard).__name__}")

    def factor() -> float:
        return q.shape[-1] ** -0.5 if scale is None else float(scale)

    def say():
        _check(q, k, v, causal, dilation, mask_mod, scale, shard, q_chunk, backend)
        able(q, backend, mask_mod is not None, factor())
        shape = q.shape[0], q.shape[2], k.shape[2], q.shape[3]
        words = [method, *shape, str(q.dtype), q.device.type, causal, factor(), dilation, mask_mod is not None, backend]
        grad = torch.is_grad_enabled()
        return [*words, grad], grad and any(x.requires_grad for x in (q, k, v))

    if shard is None:
        _, needs = say()
        ring, table = alone(), Table((counted(q.shape[1]),), (counted(k.shape[1]),))
    else:
        needs, table = meet(shard, _WORDS, say)
        ring = shard.ring
    anchor = torch.zeros((), requires_grad=True) if needs and ring.size > 1 else None
    return Call(causal, dilation, mask_mod, factor(), q_chunk, backend, ring, table, anchor)


def _number(word: Any) -> int:
    """An integer that stands for a word of the header: itself if it is one, else a digest."""
    if isinstance(word, int):
        return int(word)
    return 2**40 + int.from_bytes(hashlib.blake2b(repr(word).encode(), digest_size=6).digest(), "big")


def _check(q, k, v, causal, dilation, mask_mod, scale, shard, q_chunk, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor b s h d, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have the four dimensions b s h d, got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}; they must be alike")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    (b, s, h, d), (kb, ks, g, kd) = q.shape, k.shape
    if b != kb or d != kd:
        raise ValueError(f"k: batch and head dim must be q's, {b} and {d}, got {kb} and {kd}")
    if not (h and g and d) or h % g:
        raise ValueError(
            f"k has {g} heads and q {h}: the key/value heads must divide the query heads, and d = {d} be ≥ 1"
        )
    if shard is not None and (s, ks) != (len(shard.queries), len(shard.keys)):
        held = f"{len(shard.queries)} query and {len(shard.keys)} key positions"
        raise ValueError(f"shard has {held}, but q has {s} rows and k has {ks}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if dilation is not None and not isinstance(dilation, Dilation):
        raise TypeError(f"dilation must be a Dilation or None, got {type(dilation).__name__}")
    if mask_mod is not None and not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function (b, h, q_idx, kv_idx) -> keep, got {type(mask_mod).__name__}")
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale)
    ):
        raise ValueError(f"scale must be a finite number or None (1/√d), got {scale!r}")
    if q_chunk is not None and (isinstance(q_chunk, bool) or not isinstance(q_chunk, int) or q_chunk < 1):
        raise ValueError(f"q_chunk must be a positive number of query rows or None, got {q_chunk!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


# --------------------------------------------------------------------------------- strands and rows


class Strand(NamedTuple):
    """Heads that keep the positions with `(pos % w) % r == offset` and attend within the segment
    `pos // w`.
    """

    w: int
    r: int
    offset: int
    heads: range

    def rows(self, positions: Positions) -> Tensor:
        """Which rows this strand keeps, in order of position."""
        return _kept(positions, self.w, self.r, self.offset)


@lru_cache(maxsize=256)  # of n rows each; what is kept for long is plans, which are small
def _kept(positions: Positions, w: int, r: int, offset: int) -> Tensor:
    index = positions.index
    order = index.argsort(stable=True) if len(index) > 1 and bool((index.diff() < 0).any()) else None
    rows = ((index if order is None else index[order]) % w % r == offset).nonzero()[:, 0]
    return rows if order is None else order[rows]


def strands(dilation: Dilation | None, h: int) -> list[Strand]:
    """The strands of a call: each (head, branch) pair is in exactly one (`heads="grouped"`: each
    head).
    """
    if dilation is None:
        return [Strand(EVERYTHING, 1, 0, range(h))]
    branches = list(zip(dilation.segment_lengths, dilation.dilation_rates, strict=True))
    if dilation.heads == "grouped":
        groups = [range(x[0], x[-1] + 1) if len(x := part.tolist()) else range(0) for part in _runs(h, len(branches))]
        found = [Strand(w, r, i % r, heads) for i, ((w, r), heads) in enumerate(zip(branches, groups, strict=True))]
    else:
        found = [Strand(w, r, offset, range(offset, h, r)) for w, r in branches for offset in range(min(r, h))]
    return [strand for strand in found if strand.heads]


def serving(heads: range, group: int) -> range:
    """The key/value heads of evenly spaced query heads: j // group, which must be evenly spaced
    too.
    """
    used = sorted({j // group for j in heads})
    return range(used[0], used[-1] + 1, used[1] - used[0] if len(used) > 1 else 1)


def regular(heads: range, group: int) -> list[range]:
    """Query heads in sets whose key/value heads (j // group) are evenly spaced and serve equally
    many heads each.
    """
    used = [j // group for j in heads]
    distinct = sorted(set(used))
    even = used == [x for x in distinct for _ in range(len(used) // len(distinct))]
    if even and len({b - a for a, b in zip(distinct, distinct[1:], strict=False)}) < 2:
        return [heads]
    step = math.lcm(heads.step, group)
    return [range(j, heads.stop, step) for j in heads[: step // heads.step]]


class Rows:
    """m segments of c rows of some heads of a tensor `b s h …`, seen as `b m c h …`: a strided view
    where the indices allow it, else a copy. `slant`: how many rows further each next head starts.
    """

    def __init__(self, index: Tensor):
        (self.m, self.c), self.slant, some = index.shape, 0, index.numel() > 0
        self.start = int(index[0, 0]) if some else 0
        self.step = int(index[0, 1] - index[0, 0]) if some and self.c > 1 else 1
        self.hop = int(index[1, 0] - index[0, 0]) if some and self.m > 1 else self.c * self.step
        self.strided = self.step > 0 and self.hop > 0 and torch.equal(self._even(), index)
        self._uneven = None if self.strided else index  # plans live long: a view needs no indices
        self._on: dict = {}

    def _even(self) -> Tensor:
        segments, rows = torch.arange(self.m)[:, None], torch.arange(self.c)
        return self.start + self.hop * segments + self.step * rows

    @property
    def index(self) -> Tensor:
        """The rows of the first head, m c."""
        return self._even() if self._uneven is None else self._uneven

    def slanted(self) -> Rows:
        """The same, but each next head starts one row further."""
        other = copy(self)
        other.slant = 1
        return other

    def follows(self, other: Rows) -> bool:
        """Whether these are the other's rows, each one further, and both are views."""
        mine, its = ((x.step, x.hop, x.m, x.c) for x in (self, other))
        return self.strided and other.strided and self.start == other.start + 1 and mine == its

    def all_of(self, s: int) -> bool:
        """Whether these are rows 0 … s−1 in order."""
        whole = self.start == 0 and self.step == 1 and self.hop == self.c and self.m * self.c == s
        return whole and self.strided and not self.slant

    def of(self, x: Tensor, heads: slice) -> Tensor:
        if not self.strided:
            return x[:, :, heads].index_select(1, self.flat(x.device)).unflatten(1, (self.m, self.c))
        (b, row, head, *rest), shape = x.stride(), x.shape
        first, stop, every = heads.indices(shape[2])
        return x.as_strided(
            (shape[0], self.m, self.c, len(range(first, stop, every)), *shape[3:]),
            (b, self.hop * row, self.step * row, every * head + self.slant * row, *rest),
            x.storage_offset() + self.start * row + first * head,
        )

    def flat(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self.index.flatten().to(device)
        return self._on[device]

    def change(self, x: Tensor, heads: slice, write: Callable[[Tensor], Any]) -> Any:
        """Let `write` write to `of(x, heads)`; what it wrote is in x afterwards."""
        part = self.of(x, heads)
        result = write(part)
        if not self.strided:
            x[:, :, heads].index_copy_(1, self.flat(x.device), part.flatten(1, 2))
        return result


# ------------------------------------------------------------------------------------------- visits


class Visit(NamedTuple):
    """Queries that meet keys: `m` segments at once, alike in shape and kind.

    kind "full": each query sees each key; "causal": square, query i sees keys 0 … i; "mask":
    decided by positions.
    """

    queries: Rows
    keys: Rows
    kind: str
    at: tuple[Positions, Positions]  # of all rows of queries and keys

    @property
    def q_positions(self) -> Tensor:
        """m c"""
        return self.at[0].index[self.queries.index]

    @property
    def k_positions(self) -> Tensor:
        """m k"""
        return self.at[1].index[self.keys.index]


_PIECES = 8  # a staircase of more pieces than this is masked rather than cut


def staircase(q_positions: Tensor, k_positions: Tensor) -> list[tuple[slice, slice, str]]:
    """Cut what sorted queries see of sorted keys under a causal mask into full rectangles and
    triangles.

    First the keys that nobody sees are dropped and the queries that see nobody, so a zigzag ring's
    off-diagonal hops are full rectangles. Returns [] when nothing is left.
    """
    seen = torch.searchsorted(k_positions, q_positions, right=True)
    blind, most = int((seen == 0).sum()), int(seen[-1]) if len(seen) else 0
    seen = seen[blind:]
    if not len(seen):
        return []
    if int(seen[0]) == most:
        return [(slice(blind, blind + len(seen)), slice(0, most), "full")]
    rise = seen.diff()
    cuts = [0, *((rise[1:] != rise[:-1]).nonzero()[:, 0] + 1).tolist()] if len(rise) else [0]
    pieces, a = [], 0
    while a < len(seen) and len(pieces) <= _PIECES:
        # a run of rows that each see as many keys as the last one, or one more
        b, run = a + 1, int(rise[a]) if a < len(rise) else 0
        if run in (0, 1):
            b = min((x for x in cuts if x > a), default=len(rise)) + 1
        rows, first = slice(blind + a, blind + b), int(seen[a])
        if run != 1 or b - a == 1:
            pieces.append((rows, slice(0, first), "full"))
        else:
            if first > 1:
                pieces.append((rows, slice(0, first - 1), "full"))
            pieces.append((rows, slice(first - 1, int(seen[b - 1])), "causal"))
        a = b
    if len(pieces) > _PIECES:
        return [(slice(blind, blind + len(seen)), slice(0, most), "mask")]
    return pieces


def visits(strand: Strand, *meeting) -> list[Visit]:
    """Where a strand's queries meet a block of keys; `meeting` is queries, keys, causal, masked and
    q_chunk.
    """
    return _visits(strand._replace(heads=range(0)), *meeting)


@lru_cache(maxsize=2048)
def _visits(strand: Strand, queries: Positions, keys: Positions, causal: bool, masked: bool, q_chunk: int | None):
    found: list[Visit] = []
    q_rows, k_rows = strand.rows(queries), strand.rows(keys)
    q_at, k_at = queries.index[q_rows], keys.index[k_rows]
    q_segment, q_count = (q_at // strand.w).unique_consecutive(return_counts=True)
    k_segment, k_count = (k_at // strand.w).unique_consecutive(return_counts=True)
    q_start, k_start = q_count.cumsum(0) - q_count, k_count.cumsum(0) - k_count
    q_shared, k_shared = torch.isin(q_segment, k_segment), torch.isin(k_segment, q_segment)
    shape = torch.stack([q_count[q_shared], k_count[k_shared]], 1)
    start = torch.stack([q_start[q_shared], k_start[k_shared]], 1)
    for c, kc in shape.unique(dim=0).tolist() if len(shape) else ():
        # segments of one shape, then of one pattern of positions: all but a tail are usually alike
        firsts = start[(shape == torch.tensor([c, kc])).all(1)]
        q_index, k_index = firsts[:, :1] + torch.arange(c), firsts[:, 1:] + torch.arange(kc)
        while len(q_index):
            origin = q_at[q_index[:, :1]]
            pattern = torch.cat([q_at[q_index] - origin, k_at[k_index] - origin], 1)
            alike = (pattern == pattern[0]).all(1)
            pieces = _alike(q_at, k_at, q_index[alike], k_index[alike], causal, q_chunk)
            found += (
                Visit(Rows(q_rows[x]), Rows(k_rows[y]), "mask" if masked else kind, (queries, keys))
                for x, y, kind in pieces
            )
            q_index, k_index = q_index[~alike], k_index[~alike]
    return found


def _alike(
    q_at: Tensor, k_at: Tensor, q_index: Tensor, k_index: Tensor, causal: bool, q_chunk: int | None
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Segments that are alike, `q_chunk` query rows at a time, whole segments if they fit, else
    parts: which of the queries at `q_at` meet which of the keys at `k_at`, and the kind.
    """
    c = q_index.shape[1]
    some = max(1, (q_chunk or q_index.numel()) // c)
    for i in range(0, len(q_index), some):
        for j in range(0, c, q_chunk or c):
            qi, ki = q_index[i : i + some, j : j + (q_chunk or c)], k_index[i : i + some]
            pieces = [(slice(None), slice(None), "full")]
            if causal:
                pieces = staircase(q_at[qi[0]], k_at[ki[0]])
            yield from ((qi[:, a], ki[:, b], kind) for a, b, kind in pieces)


class Load:
    """Some rows of a rank's keys, which travel together: where they lie in its tensors, and their
    positions.
    """

    def __init__(self, keys: Positions, rows: Tensor):
        self.rows = Rows(rows[None])
        self.positions = keys if len(rows) == len(keys) else keys[rows]

    def __len__(self):
        return len(self.positions)


class Route(NamedTuple):
    """How a strand's keys can travel: the ranks that share a segment, and what each needs of each.

    `members`: in rank order, me among them. `load[j]`: of rank j, what any other member needs.
    `wanted[i][j]`: of rank j, what rank i needs; one of the two is me.
    """

    members: tuple[int, ...]
    load: dict[int, Load]
    wanted: dict[int, dict[int, Load]]


@lru_cache(maxsize=8)  # asked for twice in a row
def _shared(strand: Strand, table: Table) -> tuple[list[Tensor], list[Tensor], dict[tuple[int, int], Tensor]]:
    """Of every rank: the positions of its queries and the rows of its keys in a strand; of every
    two, which of the rows of the second lie in a segment of the first.
    """
    ranks = range(len(table.keys))
    q_at = [one.index[strand.rows(one)] for one in table.queries]
    # rows in the order of the tensor, so that all of them are the tensor itself
    k_rows = [strand.rows(one).sort().values for one in table.keys]
    k_segment = [one.index[rows] // strand.w for one, rows in zip(table.keys, k_rows, strict=True)]
    q_segment = [(at // strand.w).unique_consecutive() for at in q_at]
    meets = {(i, j): torch.isin(k_segment[j], q_segment[i]) for i in ranks for j in ranks if i != j}
    return q_at, k_rows, {pair: rows for pair, rows in meets.items() if bool(rows.any())}


def travels(strand: Strand, table: Table) -> bool:
    """Whether any rank needs another's keys."""
    return bool(_shared(strand._replace(heads=range(0)), table)[2])


def route(strand: Strand, table: Table, rank: int, causal: bool) -> Route:
    """The route of one strand as one rank sees it; every member computes the same."""
    return _route(strand._replace(heads=range(0)), table, rank, causal)


@lru_cache(maxsize=64)
def _route(strand: Strand, table: Table, rank: int, causal: bool) -> Route:
    q_at, k_rows, meets = _shared(strand, table)
    members, fresh = {rank}, [rank]
    while fresh:
        i = fresh.pop()
        new = {j for pair in meets if i in pair for j in pair} - members
        members |= new
        fresh += new
    load, wanted = {}, {i: {} for i in members}
    for j in members:
        needed = torch.zeros(len(k_rows[j]), dtype=torch.bool)
        for i in members - {j}:
            seen = meets.get((i, j), torch.zeros_like(needed))
            needed |= seen
            if rank in (i, j):
                if causal and len(q_at[i]):
                    seen = seen & (table.keys[j].index[k_rows[j]] <= q_at[i][-1])
                wanted[i][j] = Load(table.keys[j], k_rows[j][seen])
        load[j] = Load(table.keys[j], k_rows[j][needed])
    return Route(tuple(sorted(members)), load, wanted)
