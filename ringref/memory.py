"""Bytes per rank: predicted by formula, and measured as they happen.

b batch, n tokens in the whole sequence, p ranks, s = ⌈n/p⌉ tokens on a rank, h query heads, g
key/value heads, d head dim, c query chunk, w segment length, r dilation rate.

`table` is the textbook, per head and in elements. `predicted` is this package, in bytes above the
inputs; what was measured is 0.45 to 1.05 of it in the tests. `measured` watches tensors.
"""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

METHODS = ("dense", "dilated", "collective", "ring")


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
    method, n, p, h, d, *, g=None, b=1, dtype=torch.float32, c=None, dilation=None,
    fused=False, backward=True,
):  # fmt: skip
    """Peak bytes that a call adds on one rank, {what: bytes}; the parts are live together.

    c: q_chunk. fused: a kernel that keeps no scores; False is the einsum version. backward: the
    peak of forward and backward, else of the forward alone. Parts that peak at different times are
    added, and under a causal mask less is live; a dilation's segments are taken to lie along the
    shards, so striped ones, which cut every segment, may take a little more.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    g, s = g or h, ceil(n / p)
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    result = {
        "out, lse": b * s * h * (d * size + wide),
        "one number a row": 4 * b * (n if method == "dense" else s) * h * wide + 8 * n,
    }
    if method == "dense":
        gathered = b * n * (h + 2 * g) * d * size if p > 1 else 0
        # autograd keeps scores, weights, products and masks; a checkpointed chunk makes them anew
        matrices = (7 if backward else 4) + (2 if dilation and not backward else 0)
        scores = matrices * b * h * min(c or n, n) * n * wide
        whole = {"whole out, and gradients": b * n * (h + (h + 2 * g) * backward) * d * wide}
        return {**result, "gathered": gathered, **whole, "scores": scores}

    scores = others = arriving = piece = keys = 0
    lengths, rates = (dilation.segment_lengths, dilation.dilation_rates) if dilation else ([n], [1])
    for w, r in zip(lengths, rates, strict=True):  # the largest strand: heads of one offset
        heads, ranks = ceil(h / min(r, h)), min(p, ceil(w / s))
        rows = min(c or s, ceil(s / r))
        kept, strand_keys = ceil(min(w, s) / r), 2 * b * min(g, heads) * ceil(s / r) * d
        scores = max(scores, b * heads * rows * kept)
        piece = max(piece, b * heads * rows * d)
        keys = max(keys, strand_keys)
        others = max(others, (ranks - 1) * strand_keys)
        arriving = max(arriving, min(ranks - 1, 2) * strand_keys)
    travelling = arriving if method == "ring" else others
    repeated = 2 * b * h * s * d if g < h else 0  # for kernels that want as many K, V heads as Q's
    # my own rows, as they are sent: to each rank what it asked for, or to all the same
    sent = {"ring": 0, "collective": keys * bool(others), "dilated": others}[method] * size
    held = {
        **result,
        "K, V of others": travelling * size + sent,
        "scores": 0 if fused else (2 if backward else 1) * scores * wide,
    }
    narrow = size < wide  # then whatever is computed with is a wider copy
    if not backward:
        block = (piece + keys) * wide if not fused else (2 * piece + keys + repeated) * size
        running = b * s * h * d * wide * (p > 1 or c is not None or dilation is not None)
        return {**held, "block in work": block + narrow * piece * wide, "running out": running}
    block = (4 * piece + (1 + narrow) * keys) * wide
    if fused:
        block = (4 * piece + keys + 2 * b * h * s * d) * size
    if c is not None and c < s:  # a chunk's dK and dV, beside the sum over chunks
        block += 2 * keys * wide
    own = b * s * (h + 2 * g) * d * (wide + narrow * size)
    returning = travelling + (0 if p == 1 else keys)
    return {**held, "block in work": block, "dQ, dK, dV": own, "dK, dV of others": (returning + keys) * wide}


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
