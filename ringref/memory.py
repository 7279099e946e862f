"""Bytes per rank: predicted by formula, and measured as they happen.

b batch, n tokens in the whole sequence, p ranks, s = ⌈n/p⌉ tokens on a rank, h query heads, g
key/value heads, d head dim, c query chunk, w segment length, r dilation rate.

`table` is the textbook, per head and in elements. `predicted` is this package, in bytes above the inputs, at the
fullest of a few moments. `measured` watches tensors.
"""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .attend import part_count

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

    Measured within 10 % for ring and collective with a fused kernel and g = h, in chunks 20 %. Not counted: masks and
    index tensors, what NCCL allocates. Counted too fully: heads that share keys (0.75 of it and more was measured),
    and a dilation whose strands travel, as if all ended together.
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
    parts = part_count(out, g, min(p, ceil(max(lengths) / s)), dilation is not None, not backward)
    group, kv_heads, even = h // g, ceil(g / parts), 1
    if parts > 1:  # the first is the largest, but the fullest moments are in the second, or from it to the third
        later_heads = (g - kv_heads) / (parts - 1)
        kv_heads, even = ceil(later_heads), later_heads / ceil(later_heads)
    q, kv = b * s * kv_heads * group * d, 2 * b * s * kv_heads * d  # numbers in a part
    made = wide if kernel == "math" else size  # bytes of a number as a block's result comes
    widened = wide if made < wide else 0  # a sum of more than two is kept in these: a copy
    copied = wide if size < made else 0  # the einsum block works on wide copies
    fullest = always
    for i, (r, w) in enumerate(sorted(zip(rates, lengths, strict=True))):
        # a strand: the heads of one offset, on the ranks that share a segment
        others, heads = min(p, ceil(w / s)) - 1, ceil(kv_heads * group / min(r, h))
        rows = min(c or s, ceil(s / r))
        segment = ceil(min(w, s) / r)
        block, keys = b * heads * rows * d, 2 * b * min(kv_heads, heads) * ceil(s / r) * d
        met = min(keys, keys * ceil(rows / segment) * segment // ceil(s / r))  # by a chunk: its segments' keys
        pieces = rows < s or i > 0
        several, many = others > 0 or pieces, others > 1 or pieces  # results to be added up; more than two
        sends = others > 0 and (parts > 1 or r > 1)  # my own rows are copied to be sent
        # blocks of K and V: while my own are in work, while others' are, and while gradients come home
        first, later, last = {
            "ring": (min(2, others + sends), min(2, max(min(1, others), others - 1)), 0),
            "collective": [others + sends] * 3,
            "dilated": (others * (1 + sends), others, others),
        }[method]
        # bytes per number of dK and dV: while the last K and V are in work, while they come home, and once they came
        summed = wide if others > 1 else size  # a sum over ranks is wide, one rank's share is not
        flying, home, came = {
            "ring": (2 * size * (others > 1), 2 * summed, summed),
            "collective": (max(0, others - 1) * size, (others + 1) * size + summed, summed),
            "dilated": (max(0, others - 1) * size, 2 * others * size, others * size),
        }[method]
        scores = (1 + backward) * b * heads * rows * segment * wide if kernel == "math" else 0
        repeated = met * group if kernel == "cpu_flash" and group > 1 else 0
        grouped = block * wide if kernel == "math" and group > 1 else 0  # heads that share keys, side by side
        # moments: (out and whole gradients, sums of a part, blocks of K and V, of dK and dV, in work)
        if backward:
            scratch = {"math": (2 * block + met) * copied, "cpu_flash": repeated * size, "cudnn": block * 4}[kernel]
            work = (block + (repeated or met)) * made + scratch + 2 * grouped
            dq, dkv = q * (wide if many else made), kv * (wide if pieces else made)
            flying += 2 * wide * (c is not None and others > 0)  # sums over the chunks
            # a second result waits, to be added as dQ is written; with a third both are added up, in a wide copy
            waiting, sums = block * made * (several and made < wide), (dq + dkv) * several
            third = (q * widened * (rows == s) + waiting) * many
            third += met * made * (rows < s and made < wide and not causal and not others)  # of dK, dV
            moments = [(out + gradients * (parts > 1), sums + third, later, flying, 1)]
            if method == "ring" and others > 2:  # sums over ranks travel, and dQ is wide already
                moments.append((out + gradients * (parts > 1), sums, min(2, others - 2), 2 * wide, 1))
            if others:  # a part's gradients come home under the first block of the next
                next_part = int(parts > 1)
                both = sums + waiting * (not many) + (dq + dkv) * (next_part and c is not None)
                coming = both, last + first * next_part, home, next_part
                # then what was sent is let go of, and the sums but for dV's
                there = kv // 2 * made, first * next_part, came, next_part
                moments.append((out + gradients * (parts > 2), *(x * even for x in coming)))
                moments.append((out + gradients * next_part, *(x * even for x in there)))
        else:
            work = block * made + met // 2 * copied + repeated * size + grouped * (copied > 0)
            moments = [(out * (parts > 1), q * made * several, first, 0, 1)]
            if many:  # those before are added up, the last one waits; of chunks already in the first hop
                here = min(2, others) if c and method == "ring" else later
                moments.append((out * (parts > 1), q * (2 * made + widened), here, 0, 1))
            if several:  # the last two are added, over the first where out has its type
                moments.append((out * (parts > 1 or copied > 0), q * (2 * made + widened), 0, 0, 0))
        for mine, sums, keys_here, gradients_here, working in moments:
            held = {
                "out, dQ, dK, dV": mine,
                "sums of a part": sums,
                "K, V of others": keys_here * keys * size,
                "dK, dV of others": gradients_here * keys,
                "block in work": work * working,
                "scores": scores * working,
            }
            held = {**always, **{what: ceil(x) for what, x in held.items()}}
            fullest = max(fullest, held, key=lambda x: sum(x.values()))
    return fullest


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
