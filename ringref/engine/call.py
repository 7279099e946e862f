"""One attention call: its arguments, checked here and against every other rank's."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache, partial, reduce, wraps
from itertools import islice
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from ..comm.process import forgot, world_size
from ..comm.ring import Ring
from ..shard import EVERYTHING, Agreed, Dilation, Header, Positions, Shard, Table, alone, counted, meet, wide

BACKENDS = ("auto", "math", "torch", "xformers")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_transformed = torch._C._functorch.is_functorch_wrapped_tensor


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


def _selective(mode: Any) -> bool:
    """Whether a dispatch mode is one of selective checkpointing's two, which have no public name."""
    names = {cls.__name__ for cls in type(mode).__mro__}
    return not names.isdisjoint({"_CachingTorchDispatchMode", "_CachedTorchDispatchMode"})


def recomputed(step: Callable) -> Callable:
    """`step` hidden from selective checkpointing, which recomputes it as a whole: what it kept of it, it would give
    back as it is after a softmax in the scores' memory, or a merge in a block's.
    """

    @wraps(step)
    def run(*args):
        modes = _get_current_dispatch_mode_stack()
        others = [mode for mode in modes if not _selective(mode)]
        if len(others) == len(modes):
            return step(*args)
        with ExitStack() as stack:
            stack.enter_context(_disable_current_modes())
            for mode in others:
                stack.enter_context(mode)
            return step(*args)

    return run


class Sight(NamedTuple):
    """Which keys a query may see, as far as their positions decide: from `left` before it to `right` after it (None:
    no bound), in its own document. Hashable, so that plans can be cached by it.
    """

    left: int | None
    right: int | None  # 0 is causal
    documents: Positions | None  # where documents begin, in order, and n at the end

    def document(self, at: Tensor) -> Tensor:
        """Which document each position lies in."""
        return torch.searchsorted(self.documents.index.to(at.device), at.contiguous(), right=True)

    def keeps(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor | None:
        """Whether queries at q_idx see keys at kv_idx, which broadcast against each other; None: all do."""
        bounds = [] if self.left is None else [kv_idx >= q_idx - self.left]
        bounds += [] if self.right is None else [kv_idx <= q_idx + self.right]
        bounds += [] if self.documents is None else [self.document(q_idx) == self.document(kv_idx)]
        return reduce(operator.and_, bounds) if bounds else None


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
    window: tuple[int | None, int | None] = (None, None)
    documents: Positions | None = None  # cu_seqlens without its empty documents; None where there is only one
    score_mod: Callable | None = None
    header: Header | None = None  # which messages wait for
    captured: tuple[tuple[Tensor, int], ...] = ()  # tensors that mask_mod and score_mod use, and their versions

    @property
    def masked(self) -> bool:
        """Whether more than positions decides what a query makes of a key."""
        return self.mask_mod is not None or self.score_mod is not None

    @property
    def exact(self) -> bool:
        """Whether only rows that are seen travel: under a window or documents; otherwise segments decide."""
        return self.window != (None, None) or self.documents is not None

    @property
    def sight(self) -> Sight:
        """Of the masks, what positions decide."""
        left, right = self.window
        return Sight(left, 0 if self.causal else right, self.documents)

    def during(self, backward: bool) -> Call:
        """This call in one of its passes: its messages carry which, so ranks in different ones get an error, and wait
        for the header.
        """

        def number() -> int:
            return 2 * self.header.number() + backward

        return self._replace(ring=self.ring.numbered(number() if self.header.heard else number))

    def keep(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """What `mask_mod` says of these indices: booleans of four dimensions that broadcast to b h
        q k.
        """
        self._check_captured()
        keep = _returned("mask_mod", self.mask_mod(b, h, q_idx, kv_idx), q_idx)
        if keep.dtype != torch.bool:
            raise TypeError(f"mask_mod must return booleans (True: the key is seen), got {keep.dtype}")
        full = (len(b), h.shape[1], q_idx.shape[2], kv_idx.shape[3])
        return _of_four("mask_mod", keep, full)

    def score(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """What `score_mod` makes of these scores b h q k, in their dtype and shape."""
        self._check_captured()
        return _modified(self.score_mod, score, b, h, q_idx, kv_idx)

    def _check_captured(self) -> None:
        """The backward asks again, and must be told the same."""
        if any(x._version != version for x, version in self.captured):
            raise RuntimeError(
                "mask_mod, score_mod: a tensor that they use has been changed in place since the call began; "
                "its backward would follow another rule than its forward did"
            )

    def rules(self, b: int, heads: range, q_at: Tensor, kv_at: Tensor) -> tuple[Tensor | None, Callable | None]:
        """What holds where m segments of queries at q_at, m q, meet keys at kv_at, m k, of these query heads.

        Returns:
            keep, which is True where a key is seen and broadcasts to b m h q k (None: all are), and what becomes of
            scores b m h q k (None: nothing). A dilation is not among them: it decides which rows meet at all.
        """
        device = q_at.device
        batch = torch.arange(b, device=device)[:, None, None, None]
        head = torch.tensor(heads, device=device)[None, :, None, None]
        segments = list(zip(q_at[:, None, None, :, None], kv_at[:, None, None, None, :], strict=True))
        keep = self.sight.keeps(q_at[:, :, None], kv_at[:, None, :])
        keep = None if keep is None else keep[None, :, None]
        if self.mask_mod is not None:
            kept = torch.stack([self.keep(batch, head, *at) for at in segments], 1)
            keep = kept if keep is None else keep & kept

        def modify(scores: Tensor) -> Tensor:
            each = zip(scores.unbind(1), segments, strict=True)
            return torch.stack([self.score(x, batch, head, *at) for x, at in each], 1)

        return keep, None if self.score_mod is None else modify


def _captured(*functions: Callable | None) -> tuple[tuple[Tensor, int], ...]:
    """The tensors that these functions use, as far as Python shows them, each with its version: what is in a closure,
    a default, a global or a container, and of objects and modules the attributes that the code names.
    """
    found, seen, left = {}, {}, [(fn, (), 5) for fn in functions]  # functions of functions, to this depth
    while left:
        x, names, depth = left.pop()
        if isinstance(x, Tensor):
            found |= {} if x.is_inference() else {id(x): (x, x._version)}
            continue
        if not depth or (id(x), names) in seen or x is torch or isinstance(x, (type, int, float, str, type(None))):
            continue
        seen[id(x), names] = x  # kept, so that its number stays its own
        names = getattr(_attribute(x.func if isinstance(x, partial) else x, "__code__"), "co_names", names)
        if isinstance(x, partial):
            uses = [x.func, *x.args, *x.keywords.values()]
        elif inspect.ismethod(x):
            uses = [x.__func__, x.__self__]
        elif inspect.isfunction(x):
            uses = [cell.cell_contents for cell in x.__closure__ or () if cell != CellType()]
            uses += [*(x.__defaults__ or ()), *(x.__globals__[name] for name in names if name in x.__globals__)]
        elif isinstance(x, (dict, list, tuple, set)):
            uses = islice(x.values() if isinstance(x, dict) else x, 64)
        else:
            called = ("forward", "__call__") if callable(x) and not inspect.isroutine(x) else ()
            uses = [_attribute(x, name) for name in (*names, *called)]
        left += [(use, names, depth - 1) for use in uses]
    return tuple(found.values())


def _attribute(x: Any, name: str) -> Any:
    """The attribute, if there is one; reading it may raise anything."""
    with suppress(Exception):
        return getattr(x, name)


def _returned(name: str, x: Any, like: Tensor) -> Tensor:
    """What the caller's function has returned, as a tensor beside this one."""
    if isinstance(x, (bool, int, float)):
        x = torch.tensor(x, device=like.device)
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta != like.is_meta:
        got = f"{x.layout} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must return a tensor, dense and with data, got {got}")
    return x.to(like.device)


def _of_four(name: str, x: Tensor, full: tuple[int, ...]) -> Tensor:
    """x with four dimensions, which must broadcast to b h q k."""
    if x.dim() > 4 or any(size not in (1, most) for size, most in zip(x.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"{name} must return what broadcasts to b h q k = {full}, got shape {tuple(x.shape)}")
    return x[(None,) * (4 - x.dim())]


def _modified(score_mod: Callable, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    found = _returned("score_mod", score_mod(score, b, h, q_idx, kv_idx), score)
    if not found.dtype.is_floating_point:
        raise TypeError(f"score_mod must return scores, floating-point numbers, got {found.dtype}")
    if found.requires_grad and not score.requires_grad:
        raise ValueError(
            "score_mod uses a tensor that requires grad, which would get none: only q, k and v do; "
            "detach it, or let q, k or v carry what is to be learned"
        )
    return _of_four("score_mod", found, tuple(score.shape)).to(score.dtype).expand_as(score)


@exactly
def _try(q: Tensor, score_mod: Callable) -> None:
    """Raise where score_mod, asked about one score that needs no gradient, returns none or one that needs a gradient:
    whatever it captures, be it in a closure, a module or a global, autograd knows best.
    """
    with torch.inference_mode(False), torch.enable_grad():
        nought = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=q.device)
        _modified(score_mod, nought.to(wide(q.dtype)), *[nought] * 4)


_WORDS = ("method", "batch (dim 0 of q)", "heads (dim 2 of q)", "key/value heads (dim 2 of k)", "head dim")
_WORDS += ("value head dim (dim 3 of v)", "dtype", "device", "causal", "window", "cu_seqlens", "dilation", "mask_mod")
_WORDS += ("score_mod", "scale", "backend", "grad mode", "inference tensors")


def agree(method: str, q: Tensor, k: Tensor, v: Tensor, **arguments) -> Call:
    """Check the arguments here and against every other rank's; any rank's mistake is an error on
    all of them.
    """
    header, made = agreeing(method, q, k, v, **arguments)
    return made(header.agreed())


def agreeing(
    method: str, q, k, v, *, able, causal, dilation, mask_mod, scale, shard, q_chunk, backend,
    window=None, cu_seqlens=None, score_mod=None,
) -> tuple[Header, Callable[[Agreed], Call]]:  # fmt: skip
    """Check the arguments here and post what `agree` waits for: the header, and what the call is once that is heard.

    `able(q, v, backend, masked, scale)` raises where the backend cannot do it; masked is the name of an argument that
    makes scores more than a function of positions, or None.
    """
    if shard is not None and not isinstance(shard, Shard):
        raise TypeError(f"shard must be a Shard (see partition) or None, got {type(shard).__name__}")

    def factor() -> float:
        return q.shape[-1] ** -0.5 if scale is None else float(scale)

    def say():
        _check(q, k, v, causal, dilation, mask_mod, scale, shard, q_chunk, backend)
        sides, documents = _window(window), _documents(cu_seqlens)
        if score_mod is not None and not callable(score_mod):
            got = type(score_mod).__name__
            raise TypeError(f"score_mod must be a function (score, b, h, q_idx, kv_idx) -> score, got {got}")
        masked = "score_mod" if score_mod is not None else "mask_mod" if mask_mod is not None else None
        able(q, v, backend, masked, factor())
        if score_mod is not None and q.numel() and k.numel():
            _try(q, score_mod)
        shape = q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
        packed = documents and f"{len(documents) - 1} documents, digest {documents.digest:x}"
        words = [method, *shape, str(q.dtype), q.device.type, causal, sides, packed, dilation, mask_mod is not None]
        grad, inference = torch.is_grad_enabled(), any(x.is_inference() for x in (q, k, v))
        needs = grad and any(x.requires_grad for x in (q, k, v))
        if needs and inference:
            raise ValueError("q, k, v: one was made in inference mode, and no gradient can go through it; clone it")
        words += [score_mod is not None, factor(), backend, grad, inference]
        return words, needs

    if shard is None:
        _, needs = say()
        _warn_that_nobody_shares(world_size())
        table = Table((counted(q.shape[1]),), (counted(k.shape[1]),))
        ring, header = alone(), Header(None, lambda: Agreed(needs, table, 0))
    else:
        ring, header = shard.ring, meet(shard, _WORDS, say)

    def made(agreed: Agreed) -> Call:
        documents, table = _documents(cu_seqlens), agreed.table
        if documents is not None:
            _fit(documents, table)
        anchor = torch.zeros((), requires_grad=True, device="cpu") if agreed.needs and ring.size > 1 else None
        documents = None if documents is None or len(documents) <= 2 else documents
        arguments = causal, dilation, mask_mod, factor(), q_chunk, backend, ring, table, anchor
        sides = _reached(_window(window), table)
        return Call(*arguments, sides, documents, score_mod, header, _captured(mask_mod, score_mod))

    return header, made


def _reached(window: tuple[int | None, int | None], table: Table) -> tuple[int | None, int | None]:
    """The bounds without those that no two positions are far enough apart to meet."""
    if window == (None, None):
        return window
    farthest = max((int(one.index.max()) for side in table for one in side if len(one)), default=0)
    return tuple(None if side is None or side >= farthest else side for side in window)


@cache
def _warn_that_nobody_shares(ranks: int) -> None:
    """Once, and only where there are others to share with."""
    if ranks > 1:
        warnings.warn(
            f"shard is None on one of {ranks} ranks: each attends to its own rows only, as if they were the whole "
            "sequence. Pass shard=partition(n, ring), or shard=Shard(positions, None) if this is what you mean",
            stacklevel=5,
        )
        forgot(ranks)


def _window(window: Any) -> tuple[int | None, int | None]:
    """How far a query sees to its left and right; None is no bound."""
    if window is None:
        return None, None
    if isinstance(window, (tuple, list)) and len(window) == 2:
        try:
            if any(isinstance(side, bool) for side in window):
                raise TypeError
            left, right = (None if side is None else operator.index(side) for side in window)
        except TypeError:
            pass
        else:
            if all(side is None or 0 <= side < EVERYTHING for side in (left, right)):
                return left, right
    raise ValueError(
        f"window must be None or (left, right), integers from 0 to 2**62 − 1 or None for no bound, got {window!r}"
    )


def _documents(cu_seqlens: Any) -> Positions | None:
    """Where documents that have a token begin, and n: cu_seqlens on the CPU."""
    if cu_seqlens is None:
        return None
    wanted = "cu_seqlens must be a 1-D integer tensor of where documents begin, 0 = c₀ ≤ c₁ ≤ … ≤ n"
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{wanted}, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        raise TypeError(f"{wanted}, got {cu_seqlens.dtype}")
    if cu_seqlens.is_nested or cu_seqlens.layout != torch.strided:
        raise TypeError(f"{wanted}, got a nested or sparse one")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.is_meta:
        raise ValueError(f"{wanted}, got shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}")
    begins = cu_seqlens.detach().to("cpu", torch.int64)
    if int(begins[0]) != 0 or bool((begins.diff() < 0).any()):
        raise ValueError(f"{wanted}, got {begins[:8].tolist()}{' …' if len(begins) > 8 else ''}")
    return Positions(begins.unique_consecutive())


def _fit(documents: Positions, table: Table) -> None:
    """Raise, on every rank alike, where documents do not cover the keys, or a query lies in none."""
    if int(documents.index[-1]) != table.n:
        raise ValueError(f"cu_seqlens must end with the number of keys, {table.n}, got {int(documents.index[-1])}")
    last = max((int(one.index.max()) for one in table.queries if len(one)), default=-1)
    if last >= table.n:
        raise ValueError(f"cu_seqlens ends at {table.n}, and the query at position {last} is in none of its documents")


def _check(q, k, v, causal, dilation, mask_mod, scale, shard, q_chunk, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor b s h d, got {type(x).__name__}")
        if hasattr(x, "to_local"):
            raise TypeError(f"{name} is a {type(x).__name__}: pass this rank's rows, {name}.to_local(), and a shard")
        if x.is_nested:
            packed = f"{name}.values()[None] with cu_seqlens={name}.offsets()"
            raise TypeError(f"{name} is a nested tensor: pass its rows packed, {packed}")
        if x.layout != torch.strided or _transformed(x):
            kind = "one that vmap or another transform of torch.func wraps" if _transformed(x) else x.layout
            raise TypeError(f"{name} must be a plain dense tensor, got {kind}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have the four dimensions b s h d, got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}; they must be alike")
    if k.shape[:3] != v.shape[:3]:
        got = f"{tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"k and v must have the same shape, up to the head dim, got {got}")
    (b, s, h, d), (kb, ks, g, kd) = q.shape, k.shape
    if b != kb or d != kd:
        raise ValueError(f"k: batch and head dim must be q's, {b} and {d}, got {kb} and {kd}")
    if not (h and g and d and v.shape[3]) or h % g:
        heads = f"k has {g} heads and q {h}: the key/value heads must divide the query heads"
        raise ValueError(f"{heads}, and d = {d} and v's, {v.shape[3]}, be ≥ 1")
    if shard is not None and (s, ks) != (len(shard.queries), len(shard.keys)):
        held = f"{len(shard.queries)} query and {len(shard.keys)} key positions"
        raise ValueError(f"shard has {held}, but q has {s} rows and k has {ks}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if dilation is not None and not isinstance(dilation, Dilation):
        raise TypeError(f"dilation must be a Dilation or None, got {type(dilation).__name__}")
    if mask_mod is not None and not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function (b, h, q_idx, kv_idx) -> keep, got {type(mask_mod).__name__}")
    most = torch.finfo(wide(q.dtype)).max
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not -most <= scale <= most
    ):
        in_which = str(wide(q.dtype)).removeprefix("torch.")
        raise ValueError(f"scale must be None (1/√d) or a number that is finite in {in_which}, got {scale!r}")
    if q_chunk is not None and (isinstance(q_chunk, bool) or not isinstance(q_chunk, int) or q_chunk < 1):
        raise ValueError(f"q_chunk must be a positive number of query rows or None, got {q_chunk!r}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
