"""Bytes per rank: predicted by formula, and measured as they happen.

b batch, n tokens in the whole sequence, p ranks, s = ⌈n/p⌉ tokens on a rank, h query heads, g
key/value heads, d head dim, c query chunk, w segment length, r dilation rate.

`table` is the textbook, per head and in elements. `predicted` is this package, in bytes above the inputs, at the
fullest of a few moments. `measured` watches tensors.
"""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..engine.plan import part_count

METHODS = ("dense", "dilated", "collective", "ring")
KERNELS = ("math", "cpu_flash", "cudnn")


def table(n, p, d, c):
    """What a rank holds for one head of one sequence, in elements: {method: {what: elements}}.

    "O(n/p²)" is true of the query rows in work with c = n/p², and of nothing else: a rank that owns
    its inputs and its output never holds less than O(n/p).
    """
    s = n / p
    hops = min(3, p)  # own, in hand, arriving

    def row(queries, blocks, scores, gradients, working):
        held = {"Q, out": 2 * queries * d, "K, V": 2 * blocks * d, "scores": scores}
        return {**held, "dK, dV": 2 * gradients * d, "rows in work": working}

    return {
        "replicated Q": row(n, hops * s, n * s, 2 * s, n),
        "collective": row(s, n, s * n, n, s),
        "ring": row(s, hops * s, s * s, 2 * s, s),
        "ring, Q in chunks": row(s, hops * s, c * s, 2 * s, c),
    }


def predicted(
    method, n, p, h, d, *, g=None, b=1, dtype=torch.float32, causal=False, c=None, dilation=None, kernel="math",
    backward=True,
):  # fmt: skip
    """Peak bytes that a call adds on one rank, {what: bytes}, at the moment when most is live.

    c: q_chunk, to which alone causal matters. backward: the peak of forward and backward, else of the forward alone.
    kernel: "math" keeps score matrices; "cpu_flash" repeats K and V for query heads that share them; "cudnn" stands
    for the fused CUDA kernels, which keep a float32 dQ of their own.

    Measured within 10 % for ring and collective with a fused kernel and g = h, in chunks 20 %. A dilation is
    counted as if all its strands were the widest and ended together: 0.5 to 1.1 of it was measured, in a forward alone
    0.3 to 1.15. Heads that share keys: 0.75 and more. Not counted: masks and index tensors, what NCCL allocates.
    """
    for name, given, known in (("method", method, METHODS), ("kernel", kernel, KERNELS)):
        if given not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
    size, wide, g, s = dtype.itemsize, max(4, dtype.itemsize), g or h, ceil(n / p)
    out, gradients = b * s * h * d * size, b * s * (h + 2 * g) * d * size
    always = {"one number a row": 4 * b * (n if method == "dense" else s) * h * wide}
    if method == "dense":
        # autograd keeps scores, weights, products and masks; a checkpointed chunk makes them anew beside its result
        matrices = (6 if backward else 3) + (c is not None) + (dilation is not None and not backward)
        scores = matrices * b * h * min(c or n, n) * n * wide
        gathered = b * n * (h + 2 * g) * d * size if p > 1 else 0
        whole = b * n * (h + (h + 2 * g) * backward) * d * wide
        return {**always, "out": out, "gathered": gathered, "whole out, and gradients": whole, "scores": scores}

    lengths, rates = (dilation.segment_lengths, dilation.dilation_rates) if dilation else ([n], [1])
    grouped = dilation is not None and dilation.heads == "grouped"  # then a part has one strand
    parts = part_count(out, g, min(p, ceil(max(lengths) / s)), dilation is not None, not backward)
    parts = max(parts, min(len(rates), g) if grouped else 1)
    group, kv_heads, even = h // g, ceil(g / parts), 1
    if parts > 1:  # the first is the largest, but the fullest moments are in the second, or from it to the third
        later_heads = (g - kv_heads) / (parts - 1)
        kv_heads, even = ceil(later_heads), later_heads / ceil(later_heads)
    fullest = always
    for i, (r, w) in enumerate(sorted(zip(rates, lengths, strict=True))):
        kept, offsets = ceil(s / r), 1 if grouped else min(r, h)
        heads, rows, segment = ceil(kv_heads * group / offsets), min(c or s, kept), ceil(min(w, s) / r)
        keys = 2 * b * min(kv_heads, heads) * kept * d
        others, visits = min(p, ceil(w / s)) - 1, ceil((kept if grouped else s) / rows)
        met = min(keys, keys * ceil(rows / segment) * segment // kept)  # by a chunk: its segments' keys
        if causal and segment == s > rows and not others:
            met = met * (visits - 1) // visits  # a chunk meets those before it and then its own
        strand = _Strand(
            method, kernel, causal, group, parts, even, size, wide, first=i == 0 or grouped, others=others,
            narrow=r > 1, r=1 if grouped else r, visits=visits, q=b * s * kv_heads * group * d,
            kv=2 * b * s * kv_heads * d, block=b * heads * rows * d, met=met,
        )  # fmt: skip
        work = strand.work(backward)
        scores = (1 + backward) * b * heads * rows * segment * wide if kernel == "math" else 0
        for moment in strand.backward() if backward else strand.forward():
            held = {
                "out, dQ, dK, dV": out * moment.out + gradients * moment.gradients,
                "sums of a part": moment.sums,
                "K, V of others": moment.kv * keys * size,
                "dK, dV of others": moment.dkv * keys,
                "block in work": work * moment.working,
                "scores": scores * moment.working,
            }
            held = {**always, **{what: ceil(x) for what, x in held.items()}}
            fullest = max(fullest, held, key=lambda x: sum(x.values()))
    return fullest


class _Moment(NamedTuple):
    """What is live at once: whether the whole out and gradients, bytes of a part's sums, how many blocks of K and V
    of others, how many bytes per number of their dK and dV, and whether a block is in work.
    """

    out: int
    gradients: int
    sums: float
    kv: float
    dkv: float
    working: float


@dataclass
class _Strand:
    """The heads of one offset in one part, on the ranks that share a segment, and what is live as its keys are met."""

    method: str
    kernel: str
    causal: bool
    group: int  # query heads that share a key/value head
    parts: int
    even: float  # the average part, as a share of this one
    size: int  # bytes of a number of q
    wide: int  # and of one that accumulates
    first: bool  # of the part's strands, to which the others are added
    others: int  # ranks
    narrow: bool  # it does not keep all rows
    r: int  # of strands that share the rows of a part
    visits: int  # that it takes to meet every row of q
    q: int  # numbers in a part
    kv: int
    block: int  # numbers in a visit: of q
    met: int  # of the K and V that they meet

    def __post_init__(self):
        # bytes of a number: as a block's result comes, in the copy in which more than two are added up, and in the
        # copies that the einsum block works on
        self.made = self.wide if self.kernel == "math" else self.size
        self.widened = self.wide if self.made < self.wide else 0
        self.copied = self.wide if self.size < self.made else 0
        # whether more than two results are added up, or some that are not whole; and whether one does not do
        self.many = self.others + self.narrow > 1 or self.visits > 1 or not self.first
        self.several = self.others > 0 or self.many or self.narrow
        self.chunked = self.visits > 1 and self.r == 1

    def work(self, backward):
        """Bytes of a block in work, without its scores."""
        block, met, shared = self.block, self.met, self.group > 1
        repeated = met * self.group if self.kernel == "cpu_flash" and shared else 0
        by_group = block * self.wide if self.kernel == "math" and shared else 0
        if not backward:
            copies = met // 2 * self.copied + by_group * (self.copied > 0)
            return block * self.made + repeated * self.size + copies
        copies = (2 * block + met) * self.copied + 2 * by_group
        own = {"math": copies, "cpu_flash": repeated * self.size, "cudnn": block * 4}
        return (block + (repeated or met)) * self.made + own[self.kernel]

    def travelling(self):
        """Blocks of K and V while my own are in work, while others' are, and while gradients come home; bytes of a
        number of dK and dV while the last K and V are in work, while they come home, and once they came.
        """
        others, size = self.others, self.size
        sends = others > 0 and (self.parts > 1 or self.r > 1)  # my own rows are copied to be sent
        summed = self.wide if others > 1 else size  # a sum over ranks is wide, one rank's share is not
        if self.method == "ring":
            blocks = min(2, others + sends), min(2, max(min(1, others), others - 1)), 0
            return *blocks, 2 * size * (others > 1), 2 * summed, summed
        before = max(0, others - 1) * size
        if self.method == "collective":
            return *[others + sends] * 3, before, (others + 1) * size + summed, summed
        return others * (1 + sends), others, others, before, 2 * others * size, others * size

    def forward(self):
        first, later, *_ = self.travelling()
        split, added = self.parts > 1, self.q if self.others or self.many else self.block
        both = self.q * self.made + added * (self.made + self.widened)
        yield _Moment(split, 0, self.q * self.made * self.several, first, 0, 1)
        if self.many:  # those before are added up, the last one waits; of chunks already in the first hop
            here = min(2, self.others) if self.chunked and self.method == "ring" else later
            yield _Moment(split, 0, both, here, 0, 1)
        if self.several:  # the last two are added, over the first where out has its type
            yield _Moment(split or self.copied > 0, 0, both, 0, 0, 0)

    def backward(self):
        first, later, last, flying, home, came = self.travelling()
        split = self.parts > 1
        results = (2 * self.visits - 1 if self.causal else self.visits) + (self.others > 0)  # for my keys
        dq = self.q * (self.wide if self.many else self.made)
        dkv = self.kv * (self.wide if results + self.narrow > 2 or self.r > 1 or not self.first else self.made)
        sums = (dq + dkv) * self.several
        # a second result waits, to be added as dQ is written; with a third both are added up, in a wide copy
        waits = self.several and self.widened and not (self.chunked and self.visits > 2)
        waiting = self.block * self.made if waits else 0
        third = (self.q * self.widened * (self.visits == 1) + waiting) * self.many
        # and dK and dV, where nothing travels that would be more
        if self.visits > 2 - (self.r > 1) and self.widened and not self.causal and not self.others:
            third += self.met * self.made
        if self.chunked and self.others:  # as many results for the others' keys
            flying += self.made + self.widened * (self.visits > 2)
        yield _Moment(1, split, sums + third, later, flying, 1)
        if not self.first and self.widened:  # as the last sum is widened, beside its narrow copy
            yield _Moment(1, split, sums + self.kv // 2 * self.made, later, flying, 0)
        if self.method == "ring" and self.others > 2:  # sums over ranks travel, and dQ is wide already
            yield _Moment(1, split, sums, min(2, self.others - 2), 2 * self.wide, 1)
        if self.others:  # a part's gradients come home under the first block of the next
            both = sums + waiting * (not self.many) + (dq + dkv) * (split and self.chunked)
            coming = both, last + first * split, home, split
            yield _Moment(1, self.parts > 2, *(x * self.even for x in coming))
            there = self.kv // 2 * self.made, first * split, came, split  # what was sent is gone, and sums but dV's
            yield _Moment(1, split, *(x * self.even for x in there))


@dataclass
class Usage:
    """peak: the most bytes live at one time above what was live before the block."""

    peak: int = 0


@contextmanager
def measured(device="cpu"):
    """Measure what this thread does inside: `with measured() as usage: ...`, then `usage.peak`.

    CPU: every tensor storage that an operator creates, from its creation until it is freed. Scratch
    that a kernel allocates and frees inside one operator is not seen, nor what other threads do, so
    each rank of a simulation measures itself. CUDA: the allocator's own peak, scratch included, for
    the whole device and known when the block ends; simulated ranks share it.
    """
    usage, device = Usage(), torch.device(device)
    if device.type != "cuda":
        with _LiveStorage(usage):
            yield usage
        return
    torch.cuda.synchronize(device)
    gc.collect()  # what ends inside would be taken off
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield usage
    torch.cuda.synchronize(device)
    usage.peak = torch.cuda.max_memory_allocated(device) - before


class _LiveStorage(TorchDispatchMode):
    def __init__(self, usage):
        super().__init__()
        self.usage, self.live, self.seen = usage, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in _tensors((args, kwargs)):  # what arrives without having been made here is older
            self.seen.setdefault(x.untyped_storage(), True)
        result = func(*args, **kwargs)
        for x in _tensors(result):
            storage = x.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self.usage.peak = max(self.usage.peak, self.live)
        return result

    def _free(self, nbytes):
        self.live -= nbytes


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for x in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(x)
