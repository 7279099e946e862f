"""Bytes per rank: predicted from the code itself, and measured as they happen.

b batch, n tokens in the whole sequence, p ranks, h query heads, g key/value heads, d head dim, c query chunk.

`table` is the textbook, per head and in elements, and the independent check of the others. `predicted` is this
package, in bytes above the inputs. `measured` watches tensors.
"""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ringref

from ..comm.ring import Unheard
from ..engine import call, kernels
from ..shard import Agreed, Header, Table, partition

METHODS = ("dense", "dilated", "collective", "ring")


def table(n, p, d, c):
    """What a rank holds for one head of one sequence, in elements: {method: {what: elements}}.

    "O(n/p²)" is true of the query rows at a time with c = n/p², and of nothing else: a rank that owns
    its inputs and its output never holds less than O(n/p).
    """
    s = n / p
    hops = min(3, p)  # own, in hand, arriving

    def row(queries, blocks, scores, gradients, working):
        held = {"Q, out": 2 * queries * d, "K, V": 2 * blocks * d, "scores": scores}
        return {**held, "dK, dV": 2 * gradients * d, "rows at a time": working}

    return {
        "replicated Q": row(n, hops * s, n * s, 2 * s, n),
        "collective": row(s, n, s * n, n, s),
        "ring": row(s, hops * s, s * s, 2 * s, s),
        "ring, Q in chunks": row(s, hops * s, c * s, 2 * s, c),
    }


def predicted(
    method, n, p, h, d, *, g=None, b=1, dtype=torch.float32, layout="contiguous", c=None, kernel="math",
    backward=True, scratch=True, **arguments,
):  # fmt: skip
    """Peak bytes that a call adds on the fullest rank: the method itself, run on tensors without data.

    layout: of `partition`. c: q_chunk. backward: the peak of forward and backward, else of the forward alone.
    kernel: "math" keeps score matrices; a fused kernel does the blocks that its limits admit and leaves the others to
    those below it, as `auto` does on its device: "cpu_flash" on the CPU, "cudnn" on a GPU, from Hopper on.
    scratch: whether what a fused CUDA kernel keeps for itself in a backward counts; `measured(tensors=True)` misses it.
    arguments: any others of the call (causal, dilation, mask_mod, ...).

    Measured within 10 %. Counted are tensors and what fused CUDA kernels keep for themselves in a backward; not what
    other operators take and give back, nor what NCCL allocates. Up to nine ranks are asked, evenly spread.
    """
    known = ("math", *(x.name for x in kernels.KERNELS))
    for name, given, among in (("method", method, METHODS), ("kernel", kernel, known)):
        if given not in among:
            raise ValueError(f"{name}: expected one of {', '.join(among)}, got {given!r}")
    able = kernels.KERNELS[known.index(kernel) - 1 :] if kernel != "math" else ()
    able = [x if scratch else x._replace(scratch=None) for x in able]
    device = "cpu" if kernel == "cpu_flash" else "cuda"

    def choose(backend, task):
        return next((x for x in able if x.why_not(task._replace(device=device)) is None), None)

    shards = [partition(n, Unheard(rank, p), layout) for rank in range(p)]
    attention, most = getattr(ringref, f"{method}_attention"), 0
    for shard in {*shards[:: -(-p // 8)], shards[-1]}:
        like = {"dtype": dtype, "device": "meta", "requires_grad": backward}
        q, k, v = (torch.empty(b, len(shard.queries), x, d, **like) for x in (h, g or h, g or h))
        dout = torch.empty_like(q)
        with unheard(shards), mock.patch.object(kernels, "choose", choose), measured("meta") as usage:
            out = attention(q, k, v, shard=shard, q_chunk=c, **arguments).out  # a graph of lse would hold chunks
            if backward:
                out.backward(dout)
        most = max(most, usage.peak)
    return most


@contextmanager
def unheard(shards):
    """Inside, a call of one of these shards' ranks goes on as if all the others had said the same."""
    table = Table(tuple(x.queries for x in shards), tuple(x.keys for x in shards))

    def agreeing(shard, words, say):
        agreed = Agreed(say()[1], table, 0)
        return Header(None, lambda: agreed)

    with mock.patch.object(call, "meet", agreeing):
        yield


@dataclass
class Usage:
    """peak: the most bytes live at one time above what was live before the block."""

    peak: int = 0


@contextmanager
def measured(device="cpu", tensors=False):
    """Measure what this thread does inside: `with measured() as usage: ...`, then `usage.peak`.

    CPU, or "meta": every tensor storage there that an operator creates, from its creation until it is freed. Scratch
    that a kernel allocates and frees inside one operator is not seen, nor what other threads do, so
    each rank of a simulation measures itself. CUDA: the allocator's own peak, scratch included, for
    the whole device and known when the block ends; simulated ranks share it, unless `tensors` asks to count as on the
    CPU.
    """
    usage, device = Usage(), torch.device(device)
    if tensors or device.type != "cuda":
        with _LiveStorage(usage, device.type):
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
    def __init__(self, usage, device):
        super().__init__()
        self.usage, self.device, self.live, self.seen = usage, device, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in _tensors((args, kwargs)):  # what arrives without having been made here is older
            self._see(x.untyped_storage())
        result = _without_data(func, args, kwargs) if self.device == "meta" else func(*args, **kwargs)
        for x in _tensors(result):
            storage = x.untyped_storage()
            if x.device.type == self.device and self._see(storage, storage.nbytes()):
                self.live += storage.nbytes()
        self.usage.peak = max(self.usage.peak, self.live)
        return result

    def _see(self, storage, nbytes=0):
        """Whether it is new; from now on it is known, and its bytes are live until it is freed."""
        key = id(storage)
        if key in self.seen:
            return False

        def freed(_):
            del self.seen[key]
            self.live -= nbytes

        self.seen[key] = weakref.ref(storage, freed)
        return True


def _without_data(func, args, kwargs):
    """What an operator gives on tensors without data, asked once for each form of its arguments: torch takes long."""
    given = list(_tensors((args, kwargs)))
    if not given or any(x.device.type != "meta" for x in given) or _gives_views(func):
        return func(*args, **kwargs)
    key, into = (func, _form(args), _form(tuple(kwargs.items()))), _written(func, args, kwargs)
    if key not in _forms:
        was = _form(into), [x.untyped_storage() for x in given]  # _unsafe_view does not say that it is a view
        result = func(*args, **kwargs)
        if len(_forms) < 10_000 and isinstance(result, torch.Tensor):
            same = result is into and (_form(into), [x.untyped_storage() for x in given]) == was
            if same or (into is None and result.untyped_storage() not in was[1]):
                _forms[key] = result.shape, result.stride(), result.dtype
        return result
    shape, stride, dtype = _forms[key]
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta") if into is None else into


_forms = {}


@cache
def _gives_views(func):
    """Whether it says that it gives views of what it takes."""
    return any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)


def _written(func, args, kwargs):
    """The first argument that is written to."""
    name, at = _first_written(func)
    return kwargs[name] if name in kwargs else None if name is None else args[at]


@cache
def _first_written(func):
    every = enumerate(func._schema.arguments)
    return next(((x.name, i) for i, x in every if x.alias_info and x.alias_info.is_write), (None, 0))


def _form(x):
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_form, x)) if isinstance(x, (list, tuple)) else (type(x), x)


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for x in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(x)
