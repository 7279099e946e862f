"""Who holds which positions: shards, layouts, dilations, and the table that all ranks know.

`b` batch · `n` tokens in the whole sequence · `s` tokens on this rank · `h` query heads · `g`
key/value heads · `d` head dim · `p` ranks · `w` segment length · `r` dilation rate · `c` query
chunk. Tensors are `b s h d`. Everything is decided from global positions, so layouts need no special cases.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .comm.ring import Elsewhere, Ring
from .comm.simulate import ThreadRing, _World

LAYOUTS = ("contiguous", "zigzag", "striped")
EVERYTHING = 2**62  # a segment length that no sequence reaches


def eagerly(method: Callable) -> Callable:
    """`method` as torch.compile is to take it: a clean break of the graph, for it communicates and looks at values.

    The decorator of `torch.compiler` would make everybody wait for Dynamo's import, compiling or not.
    """

    outside: list[Callable] = []

    @wraps(method)
    def run(*args, **kwargs):
        if not torch.compiler.is_compiling():
            return method(*args, **kwargs)
        if not outside:
            outside.append(torch.compiler.disable(method))
        return outside[0](*args, **kwargs)

    return run


def unseen(planning: Callable) -> Callable:
    """`planning` hidden from dispatch modes: a first call plans and a second knows, and to a mode that counts, traces
    or replays what is computed (selective activation checkpointing) they must look alike.
    """

    @wraps(planning)
    def run(*args, **kwargs):
        if not torch._C._len_torch_dispatch_stack():
            return planning(*args, **kwargs)
        with _disable_current_modes():
            return planning(*args, **kwargs)

    return run


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


class _Once(torch.autograd.Function):
    """These gradients, of which there is no further gradient; `known` is all that they depend on."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "this gradient cannot be differentiated again; to differentiate twice, use dense_attention on one rank"
        )


def once(backward: Callable) -> Callable:
    """A Function's `backward` that raises when it is differentiated again.

    torch's `once_differentiable` cuts the gradients off from the inputs, so `grad` with `inputs=` passes by its error.
    """

    @wraps(backward)
    def run(ctx, *grads):
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        known = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        whole = found if isinstance(found, tuple) else (found,)
        some = [x for x in whole if x is not None]
        linked = iter(_Once.apply(len(some), *some, *known) if some and known else some)
        return tuple(None if x is None else next(linked) for x in whole)

    return run


class Positions:
    """An immutable 1-D int64 tensor of global positions that hashes by content, so that plans can
    be cached.
    """

    def __init__(self, index: Tensor):
        self.index = index
        self.digest = int.from_bytes(hashlib.blake2b(index.contiguous().numpy(), digest_size=7).digest(), "big")

    def __len__(self):
        return len(self.index)

    def __hash__(self):
        return self.digest

    def __eq__(self, other):
        return self.digest == other.digest and len(self) == len(other)

    def __getitem__(self, rows: Tensor) -> Positions:
        return Positions(self.index[rows])

    @cached_property
    def runs(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """Rows that follow each other at positions a step apart, in order of position: the step, which is the smallest
        distance; of each run its first row, that row's position, and how many there are. A layout has one or two.
        """
        at, order, apart = self.index, None, self.index.diff()
        step = int(apart.min()) if len(apart) else 1
        if step < 0:
            at, order = at.sort(stable=True)
            apart = at.diff()
            step = int(apart.min())
        step = max(1, step)
        breaks = torch.ones(len(at) + 1, dtype=torch.bool, device="cpu")
        breaks[1:-1] = apart != step if order is None else (apart != step) | (order.diff() != 1)
        edges = breaks.nonzero()[:, 0]
        begin = edges[:-1]
        return step, begin if order is None else order[begin], at[begin], edges.diff()


@lru_cache(maxsize=16)
def counted(n: int) -> Positions:
    """0 … n−1."""
    return Positions(torch.arange(n, device="cpu"))


def _positions(name: str, index: Any) -> Positions:
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype != torch.int64 or not index.is_cpu:
        got = f"{tuple(index.shape)} {index.dtype} {index.device}" if isinstance(index, Tensor) else repr(index)
        raise TypeError(f"{name} must be a 1-D int64 CPU tensor of global positions, got {got}")
    if len(index) and int(index.min()) < 0:
        raise ValueError(f"{name}: positions count from 0, got {int(index.min())}")
    if len(index) and int(index.max()) >= EVERYTHING:
        raise ValueError(f"{name}: positions must be below 2**62, got {int(index.max())}")
    return Positions(index.detach().clone(memory_format=torch.contiguous_format))


def _a_ring(ring: Any) -> Ring:
    if not isinstance(ring, Ring):
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

    Rotary embedding needs no special case, for a rank knows the positions of its rows, in every layout:

    >>> import torch
    >>> from ringref import Attended, Shard, merge, partition, ring_attention, simulate
    >>> def rotated(x, positions, base=10_000.0):
    ...     rates = base ** -torch.linspace(0, 1, x.shape[3] // 2 + 1)[:-1]
    ...     angles = (positions[:, None] * rates)[:, None].to(x)  # s 1 d/2
    ...     a, b = x.chunk(2, 3)
    ...     return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], 3)
    >>> def layer(ring, q, k, v, layout):
    ...     shard = partition(q.shape[1], ring, layout)
    ...     q, k, v = (shard.take(x) for x in (q, k, v))
    ...     q, k = rotated(q, shard.positions), rotated(k, shard.kv_positions)
    ...     return shard.gather(ring_attention(q, k, v, causal=True, shard=shard).out)

    Decoding: one new query, whose rank has one row where the others have none, and the keys where they are. With more
    new tokens than one this is chunked prefill: the ranks share the chunk's queries, and each adds the keys of its
    part to those it holds already. Positions stay global, so `causal` and `window` mean what they always mean:

    >>> def decode(ring, q, k, v):  # q: b 1 h d, of the last token; k, v: all n, of which each rank holds a run
    ...     n = k.shape[1]
    ...     held, last = torch.arange(n).tensor_split(ring.size)[ring.rank], ring.rank == ring.size - 1
    ...     shard = Shard(torch.arange(n - 1, n if last else n - 1), ring, kv_positions=held)
    ...     return ring_attention(q if last else q[:, :0], k[:, held], v[:, held], causal=True, shard=shard).out
    >>> def prefill(ring, q, k, v):  # q: b c h d, the last c of n tokens
    ...     n, c = k.shape[1], q.shape[1]
    ...     cached, chunk = (x.tensor_split(ring.size)[ring.rank] for x in torch.arange(n).split([n - c, c]))
    ...     shard = Shard(chunk, ring, kv_positions=torch.cat([cached, chunk]))
    ...     k, v = (x[:, shard.kv_positions] for x in (k, v))
    ...     return ring_attention(q[:, chunk - (n - c)], k, v, causal=True, shard=shard).out

    Where every rank has the query, two ranks would hold one position, which is an error: the gradient of a key would
    count each of them. Let one rank ask, as above; or, where nothing is masked, each attends to its own keys alone, and
    the results, which are all that travels, merge:

    >>> def replicated(ring, q, k, v):
    ...     mine = torch.arange(k.shape[1]).tensor_split(ring.size)[ring.rank]
    ...     alone = Shard(torch.arange(q.shape[1]), None, kv_positions=torch.arange(len(mine)))
    ...     part = ring_attention(q, k[:, mine], v[:, mine], shard=alone)
    ...     whole, *others = map(Attended, *map(ring.gather, part))
    ...     for other in others:
    ...         whole = merge(whole, other)
    ...     return whole.out

    >>> q, k, v = torch.randn(3, 1, 12, 2, 8, dtype=torch.float64)
    >>> whole = ring_attention(rotated(q, torch.arange(12)), rotated(k, torch.arange(12)), v, causal=True).out
    >>> for layout in ("contiguous", "zigzag", "striped"):
    ...     assert all(x.allclose(whole) for x in simulate(lambda ring: layer(ring, q, k, v, layout), 3))
    >>> whole = ring_attention(q, k, v, causal=True).out
    >>> assert torch.cat(simulate(lambda ring: decode(ring, q[:, -1:], k, v), 3), 1).allclose(whole[:, -1:])
    >>> assert torch.cat(simulate(lambda ring: prefill(ring, q[:, -5:], k, v), 3), 1).allclose(whole[:, -5:])
    >>> assert all(x.allclose(whole[:, -1:]) for x in simulate(lambda ring: replicated(ring, q[:, -1:], k, v), 3))
    """

    def __init__(self, positions: Tensor, ring: Ring | None, kv_positions: Tensor | None = None):
        self.ring = alone() if ring is None else _a_ring(ring)
        self.queries = _positions("positions", positions)
        self.keys = self.queries if kv_positions is None else _positions("kv_positions", kv_positions)

    @property
    def positions(self) -> Tensor:
        """Those of my queries; a copy, for what the ranks have agreed upon does not change."""
        return self.queries.index.clone()

    @property
    def kv_positions(self) -> Tensor:
        """Those of my keys; a copy."""
        return self.keys.index.clone()

    def __reduce__(self):
        ring = None if self.ring is alone() else self.ring
        return Shard, (self.positions, ring, None if self.keys is self.queries else self.kv_positions)

    def __repr__(self):
        return f"Shard(rank {self.ring.rank} of {self.ring.size}, {len(self.queries)} queries, {len(self.keys)} keys)"

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """My rows of a whole tensor: `b n …` → `b s …` along `dim`."""
        _check_dim(x, dim)
        index = self.queries.index
        if len(index) and int(index.max()) >= x.shape[dim]:
            raise ValueError(f"x has {x.shape[dim]} rows along dim {dim}; my last position is {index.max()}")
        return x.index_select(dim, index.to(x.device))

    @eagerly
    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Every rank's rows in global order, `b s …` → `b n …`; the gradient is summed over ranks
        and cut again.
        """

        def say():
            _check_dim(x, dim)
            if x.shape[dim] != len(self.queries):
                held = len(self.queries)
                raise ValueError(f"x has {x.shape[dim]} rows along dim {dim}; this shard has {held} positions")
            others = tuple(size for i, size in enumerate(x.shape) if i != dim % x.dim())
            words = ["gather", str(x.dtype), x.device.type, dim % x.dim(), others]
            return [*words, torch.is_grad_enabled()], torch.is_grad_enabled() and x.requires_grad

        names = ("method", "dtype of x", "device of x", "dim", "shape of x", "grad mode")
        needs, table, number = meet(self, names, say).agreed()
        anchor = torch.zeros((), requires_grad=True, device="cpu") if needs else None
        return _Rejoin.apply(x, anchor, self.ring, number, table.queries, dim % x.dim())


def _check_dim(x: Any, dim: Any) -> None:
    got = x.layout if isinstance(x, Tensor) else type(x).__name__
    if got != torch.strided:
        raise TypeError(f"x must be a tensor, a dense one, got {got}")
    if not isinstance(dim, int) or isinstance(dim, bool) or not -x.dim() <= dim < x.dim():
        raise TypeError(f"x must be a tensor that has dim {dim!r}, got {tuple(x.shape)}")


class _Rejoin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, ring, number, positions, dim):
        ctx.ring, ctx.number, ctx.positions, ctx.dim = ring, number, positions, dim
        x = x.movedim(dim, 0).contiguous()
        every = ring.numbered(2 * number).gather(x, [(len(one), *x.shape[1:]) for one in positions])
        order = torch.cat([one.index for one in positions]).argsort().to(x.device)
        return torch.cat([part.movedim(0, dim) for part in every], dim).index_select(dim, order)

    @staticmethod
    @once
    def backward(ctx, grad):
        place = torch.cat([one.index for one in ctx.positions]).argsort().argsort().to(grad.device)
        parts = grad.movedim(ctx.dim, 0)[place].split([len(one) for one in ctx.positions])
        (mine,) = ctx.ring.numbered(2 * ctx.number + 1).reduce([(part.clone(),) for part in parts])
        return mine.movedim(0, ctx.dim), None, None, None, None, None


def _runs(n: int, m: int) -> list[Tensor]:
    """0 … n−1 in m runs whose lengths differ by at most one, the longer first."""
    return [_run(n, m, i) for i in range(m)]


def _run(n: int, m: int, i: int) -> Tensor:
    """Run i of them, without the others."""
    start = i * (n // m) + min(i, n % m)
    return torch.arange(start, start + n // m + (i < n % m), device="cpu")


def partition(n: int, ring: Ring, layout: str = "contiguous") -> Shard:
    """Who holds which of n tokens: rank i gets run i of p (contiguous), chunks i and 2p−1−i of 2p
    (zigzag, also called head-tail: 2p equal slices of causal work), or positions i::p (striped,
    2311.09431). n need not divide by anything.
    """
    if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < EVERYTHING:
        raise ValueError(f"n must be a number of tokens, at least 0 and below 2**62, got {n!r}")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    i, p = _a_ring(ring).rank, ring.size
    if layout == "contiguous":
        return Shard(_run(n, p, i), ring)
    if layout == "zigzag":
        return Shard(torch.cat([_run(n, 2 * p, j) for j in (i, 2 * p - 1 - i)]), ring)
    return Shard(torch.arange(i, max(n, i), p, device="cpu"), ring)


class Table(NamedTuple):
    """The positions of every rank's queries and keys, in rank order."""

    queries: tuple[Positions, ...]
    keys: tuple[Positions, ...]

    @property
    def n(self) -> int:
        return sum(map(len, self.keys))


_tables: WeakKeyDictionary = WeakKeyDictionary()  # ring -> the tables that it knows
_agreements: WeakKeyDictionary = WeakKeyDictionary()  # ring -> what was agreed on when this rank said that
_lock = threading.Lock()  # one ring of one serves all of a program's threads
_KNOWN = 4
_calls = 0  # the number of the last call that this process took part in
_FOR_GRADIENTS = ("grad mode", "inference tensors")  # words that must be alike only if any rank needs a gradient


class Agreed(NamedTuple):
    """What a call begins with: whether any rank needs a gradient, the positions, and the call's number."""

    needs: bool
    table: Table
    number: int


class Otherwise(Exception):
    """The ranks have agreed on something else than the last time that this one said the same."""


class Header:
    """What all ranks say as a call begins, on its way. `likely` is what they agreed on when this rank last said the
    same, None if it never did; `agreed()` waits for what they agree on.
    """

    def __init__(self, likely: Agreed | None, hear: Callable[[], Agreed]):
        self.likely, self._hear, self._agreed = likely, hear, None

    @property
    def heard(self) -> bool:
        """Whether the others have been waited for, be it that one of them disagrees."""
        return self._hear is None

    def agreed(self) -> Agreed:
        """Nothing is only likely from here on."""
        self.likely = None
        if self._hear is not None:
            hear, self._hear = self._hear, None
            self._agreed = hear()
        return self._agreed

    def number(self) -> int:
        """The call's number; raises `Otherwise` where what was likely has not come true."""
        likely, agreed = self.likely, self.agreed()
        if likely is not None and likely[:2] != agreed[:2]:
            raise Otherwise
        return agreed.number


@unseen
def meet(shard: Shard, names: Sequence[str], say: Callable[[], tuple[list, bool]]) -> Header:
    """Post one fixed-size header to every rank; words follow only where they differ, and positions when new.

    Args:
        names: of the words that must be alike on all ranks, in the words' order.
        say: checks this rank's arguments, and returns the words and whether this rank needs a
            gradient.

    A mistake of one rank is an error on all of them, in the words of the rank that made it. Whether positions are
    exchanged is decided from what all ranks said they know, so that no rank waits alone.
    """
    try:
        (words, needs), mistake, told = say(), None, b""
    except Exception as error:  # score_mod is tried out as well, and may raise anything
        words, needs, mistake = [0] * len(names), False, error
        told = f"{type(error).__name__}: {error}".encode()[:4096] or b"?"
    ring = shard.ring
    mine = int(needs), len(words), _digest(*words), *(len(side) for side in (shard.queries, shard.keys))
    mine += shard.queries.digest, shard.keys.digest
    with _lock:
        known = dict(_tables.get(ring, {}))
    known_names = list(known)[-_KNOWN:]
    posted = ring.announcing([len(told), _calls + 1, *mine, *known_names, *[0] * (_KNOWN - len(known_names))])

    @unseen
    def hear() -> Agreed:
        global _calls
        rows = posted.wait()
        if any(said[0] for said in rows):
            texts = ring.share(torch.tensor(list(told), dtype=torch.int64, device="cpu"), [said[0] for said in rows])
            if mistake is not None:
                raise mistake
            rank, text = next((r, bytes(x.tolist())) for r, x in enumerate(texts) if len(x))
            raise Elsewhere(rank, f"rank {rank} rejected its own arguments: {text.decode(errors='replace')}")
        # higher than any call's before on any of these ranks, so no two that share a rank have the same
        number = max(said[1] for said in rows)
        needs = any(said[2] for said in rows)
        if len({said[4] for said in rows}) > 1:
            numbers = torch.tensor([_number(word) for word in words], dtype=torch.int64, device="cpu")
            every = [x.tolist() for x in ring.share(numbers, [said[3] for said in rows])]
            for name, word, *column in zip(names, words, *every, strict=False):
                if (name not in _FOR_GRADIENTS or needs) and len(set(column)) > 1:
                    alike = [r for r, x in enumerate(column) if x == column[ring.rank]]
                    shown = column if all(abs(x) < 2**31 for x in column) else f"{word!r} only on ranks {alike}"
                    raise ValueError(f"{name} differs between ranks: {shown}")
        sizes = [said[5:] for said in rows]
        name = hash(tuple(tuple(s[:4]) for s in sizes)) & (2**62 - 1)
        if not all(name in s[4:] for s in sizes):
            every = ring.share(torch.cat([shard.queries.index, shard.keys.index]), [s[0] + s[1] for s in sizes])
            cut = [x.split([s[0], s[1]]) for x, s in zip(every, sizes, strict=True)]
            known[name] = Table(*(tuple(Positions(x.clone()) for x in side) for side in zip(*cut, strict=True)))
            _check_cover(known[name])
        agreed = Agreed(needs, known[name], number)
        with _lock:
            _calls = max(_calls, number)
            _keep_last(_tables, ring, name, agreed.table)
            _keep_last(_agreements, ring, mine, agreed)
        return agreed

    likely = None if mistake or posted.arrived else _agreements.get(ring, {}).get(mine)
    return Header(likely, hear)


def _keep_last(those: WeakKeyDictionary, ring: Ring, name: Any, value: Any) -> None:
    """Remember the last few of this ring."""
    kept = those.setdefault(ring, {})
    kept.pop(name, None)
    kept[name] = value
    for old in list(kept)[:-_KNOWN]:
        del kept[old]


def _number(word: Any) -> int:
    """An integer that stands for a word: itself if it is one, else a digest."""
    return int(word) if isinstance(word, int) else 2**40 + _digest(word)


def _digest(*words: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=6).digest(), "big")


def _check_cover(table: Table) -> None:
    def described(wrong: Tensor) -> str:
        return f"{wrong[:5].tolist()}{' …' if len(wrong) > 5 else ''}"

    for name, every in (("positions", table.queries), ("kv_positions", table.keys)):
        index = torch.cat([one.index for one in every])
        marks = torch.zeros(len(index), dtype=torch.bool, device="cpu")
        marks[index[index < len(index)]] = True
        if bool(marks.all()):  # 0 … n−1, each once; to sort them takes forty times as long
            continue
        index, times = index.unique(return_counts=True)
        if bool((times > 1).any()):
            twice = described(index[times > 1])
            advice = "; let one rank ask (see Shard on replicated queries)" if every is table.queries else ""
            raise ValueError(f"{name} overlap between or within ranks: {twice} are held twice{advice}")
        if every is table.keys and len(index) and int(index[-1]) != len(index) - 1:
            # where the first gaps must be, however far off the last position is
            early = torch.arange(len(index) + 6, device="cpu")
            gaps = early[~torch.isin(early, index) & (early < index[-1])]
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
        if not isinstance(self.heads, str) or self.heads not in ("all", "grouped"):
            raise ValueError(f'heads must be "all" or "grouped", got {self.heads!r}')
