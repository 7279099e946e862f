"""The same block through fused kernels: PyTorch's own (cuDNN, FlashAttention, memory-efficient, CPU
flash) and xFormers.

A kernel is a row of `KERNELS`: a name, a family that `backend=` selects, what it cannot do and why,
a forward that returns out and natural-log lse, and a backward that takes the *merged* out and lse.
Kernels compute `D = rowsum(dO∘O)` themselves; the gradient through lse still fits, as extra columns
of the head with V = 0, O = −1, dO = dlse and Q = K = 0, which take dlse off D.

No kernel is trusted without proof. What is known to go wrong is a limit, of shapes and never of data, or is worked
around where the kernel is called; for the rest, a kernel that would be used for the first time in a process is asked
a tiny awkward problem whose answer the einsum block knows (`fault`), and passed over where it fails.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import block
from ..shard import Attended, wide
from .call import Call
from .visits import Ragged

aten = torch.ops.aten


class Seen(NamedTuple):
    """What of a block is seen: kind "full", "causal" (square, query i sees keys 0 … i), "mask" with `keep` b m h q k,
    or "ragged" (see `Ragged`); and what becomes of scores b m h q k first.
    """

    kind: str
    keep: Tensor | None = None
    modify: Callable[[Tensor], Tensor] | None = None
    ragged: Ragged | None = None


class Task(NamedTuple):
    """What a kernel must be able to do."""

    device: str
    dtype: torch.dtype
    head_dim: int
    kind: str
    lse_gradient: bool = False
    single: bool = False  # one query
    scale: float = 1.0
    backward: bool = False

    @classmethod
    def of(cls, q: Tensor, v: Tensor, kind: str, **more) -> Task:
        """That of a call with these tensors."""
        return cls(q.device.type, q.dtype, max(q.shape[-1], v.shape[-1]), kind, **more)


class Kernel(NamedTuple):
    """forward(q, k, v, causal, scale) -> out, lse; backward(dout, q, k, v, out, lse, causal, scale)
    -> dq, dk, dv; all b h s d.

    scratch: a float32 dQ that a backward keeps for itself has rows and columns in multiples of these.
    ragged: forward and backward for segments of lengths of their own, with a `Ragged` in place of `causal`.
    """

    name: str
    family: str
    why_not: Callable[[Task], str | None]
    forward: Callable
    backward: Callable
    grouped: bool = True  # takes fewer key/value heads than query heads
    granularity: int = 8  # what the head dim must be a multiple of
    scratch: tuple[int, int] | None = None
    ragged: tuple[Callable, Callable] | None = None


HALF = (torch.float16, torch.bfloat16)
_LEAST = torch.finfo(torch.float32).tiny  # kernels take the masked score −inf times the scale, in float32: 0 gives NaN


def _limit(task: Task, device: str, dtypes: tuple, most: int, granularity: int = 8, ragged=False) -> str | None:
    """Why a kernel cannot do a task, by what is known of it; `most` is its largest head dim."""
    # the lse gradient rides in extra columns of the head
    d = task.head_dim + (granularity if task.lse_gradient else 0)
    if task.device != device:
        return f"runs on {device}, not on {task.device}"
    if task.dtype not in dtypes:
        return f"has no {str(task.dtype).removeprefix('torch.')}"
    if d > most or d % granularity:
        with_columns = " with the lse gradient's columns" if task.lse_gradient else ""
        return f"wants a head dim that {granularity} divides, up to {most}; got {d}{with_columns}"
    if task.scale < _LEAST:
        return f"needs a scale of at least {_LEAST:.2g}"
    if task.kind == "ragged" and not ragged:
        return "takes no segments of lengths of their own here"
    return "takes full and causal blocks, not a mask" if task.kind == "mask" else None


# ------------------------------------------------------------------------------------------ kernels


def _cpu_flash_forward(q, k, v, causal, scale):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_flash_backward(dout, q, k, v, out, lse, causal, scale):
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    # it sums over tiles of queries in their dtype: of 512 in bfloat16, dK is off by 0.0039 of its norm, and here 0.0016
    given = [x.float() if x.dtype in HALF else x for x in (dout, q, k, v, out)]
    return tuple(x.to(q.dtype) for x in backward(*given, lse, 0.0, causal, scale=scale))


@lru_cache(maxsize=64)
def _seed(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The random state of the dropout that there is not."""
    return torch.zeros(size, dtype=dtype, device=device)


def _flash_forward(q, k, v, causal, scale):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def _flash_backward(dout, q, k, v, out, lse, causal, scale):
    seed = _seed(2, torch.uint64, q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed, scale=scale
    )


def _flash_ragged_forward(q, k, v, ragged, scale):
    (q, k, v), (b, _, s, _) = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), q.shape
    how = {"scale": scale, "window_size_left": ragged.left, "window_size_right": ragged.right}
    causal = (ragged.left, ragged.right) == (None, 0)
    # where the longest has one query, the kernel would fold heads into rows
    told = *ragged.ends(b, q.device), max(2, ragged.longest[0]), ragged.longest[1], 0.0, causal, False
    out, lse, *_ = aten._flash_attention_forward(q, k, v, *told, **how)
    return out.unflatten(0, (b, s)).transpose(1, 2), lse.unflatten(1, (b, s)).transpose(0, 1)


def _flash_ragged_backward(dout, q, k, v, out, lse, ragged, scale):
    (b, _, s, _), n, seed = q.shape, k.shape[2], _seed(2, torch.uint64, q.device)
    dout, q, k, v, out = (x.transpose(1, 2).flatten(0, 1) for x in (dout, q, k, v, out))
    how = {"scale": scale, "window_size_left": ragged.left, "window_size_right": ragged.right}
    causal, lse = (ragged.left, ragged.right) == (None, 0), lse.transpose(0, 1).flatten(1).contiguous()
    told = *ragged.ends(b, q.device), *ragged.longest, 0.0, causal, seed, seed
    grads = aten._flash_attention_backward(dout, q, k, v, out, lse, *told, **how)
    return tuple(x.unflatten(0, (b, c)).transpose(1, 2) for x, c in zip(grads, (s, n, n), strict=True))


def _cudnn_forward(q, k, v, causal, scale):
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(lse.shape[:3])


def _cudnn_backward(dout, q, k, v, out, lse, causal, scale):
    if not causal and k.shape[2] % 128 == 64:
        # keys up to the next 128 are computed and not masked: where lse < −88 they overflow, and dQ is NaN. Halves of
        # such a length are no multiple of 64, and right; a sixth slower than the whole, FlashAttention-2 nearly twice
        halves = zip(k.chunk(2, 2), v.chunk(2, 2), strict=True)
        (dq, *first), (more, *last) = (_cudnn_backward(dout, q, *half, out, lse, causal, scale) for half in halves)
        return dq.add_(more), *(torch.cat(x, 2) for x in zip(first, last, strict=True))
    seed = _seed(1, torch.int64, q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.contiguous()[..., None], seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0,
        causal, scale=scale,
    )  # fmt: skip


def _efficient_forward(q, k, v, causal, scale):
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : q.shape[2]]


def _efficient_backward(dout, q, k, v, out, lse, causal, scale):
    if q.dtype in HALF:  # it believes out to be contiguous b s h d, without looking
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    # the kernel reads whole tiles of rows
    lse = torch.nn.functional.pad(lse.contiguous(), (0, -lse.shape[2] % 32), value=math.inf)
    seed = torch.zeros((), dtype=torch.int64, device="cpu")
    return aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
    )[:3]


def _xformers_bias(causal):
    from xformers.ops.fmha.attn_bias import LowerTriangularMask

    return LowerTriangularMask() if causal else None


def _xformers_forward(q, k, v, causal, scale):
    from xformers.ops import fmha

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, _xformers_bias(causal), scale=scale)
    return out.transpose(1, 2), lse[:, :, : q.shape[1]]


def _xformers_backward(dout, q, k, v, out, lse, causal, scale):
    from xformers.ops import fmha

    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = fmha.memory_efficient_attention_backward(
        dout, out.contiguous(), lse.contiguous(), q, k, v, _xformers_bias(causal), scale=scale
    )
    return tuple(x.transpose(1, 2) for x in grads)


@lru_cache(maxsize=1)
def _xformers_missing() -> str | None:
    try:
        from xformers.ops import fmha

        if fmha.cutlass.FwOp.is_available() or fmha.flash.FwOp.is_available():
            return None
        return "reports no available operator (a CUDA 12 build needs libcudart.so.12 on LD_LIBRARY_PATH)"
    except Exception as error:  # it compiles and warns on import, beside whatever else is installed
        return f"xformers cannot be imported ({error})"


def _xformers_why_not(task: Task) -> str | None:
    return _limit(task, "cuda", HALF, 256) or _xformers_missing()


def _cudnn_why_not(task: Task) -> str | None:
    limit = _limit(task, "cuda", HALF, 128)
    if limit is None and task.single:
        return "needs more than one query: on one its backward returns NaN, where keys are a multiple of 64"
    if limit or not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0):
        return limit
    return "is only faster than FlashAttention-2 from Hopper on"


def _flash_impl() -> str | None:
    """FlashAttention-3 or -4, where the user has activated it: it then stands behind PyTorch's
    flash operators.
    """
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current else None


_ONLY_HALF = partial(_limit, device="cuda", dtypes=HALF, most=256, ragged=True)
_NOT_DOUBLE = partial(_limit, device="cuda", dtypes=(*HALF, torch.float32), most=256)
_CPU = partial(_limit, device="cpu", dtypes=(*HALF, torch.float32, torch.float64), most=2**16, granularity=1)
KERNELS = (
    Kernel("cudnn", "torch", _cudnn_why_not, _cudnn_forward, _cudnn_backward, scratch=(1, 1)),
    Kernel(
        "flash", "torch", _ONLY_HALF, _flash_forward, _flash_backward, scratch=(128, 32),
        ragged=(_flash_ragged_forward, _flash_ragged_backward),
    ),
    Kernel("xformers", "xformers", _xformers_why_not, _xformers_forward, _xformers_backward, False, scratch=(64, 64)),
    Kernel("efficient", "torch", _NOT_DOUBLE, _efficient_forward, _efficient_backward, False, scratch=(64, 64)),
    Kernel("cpu_flash", "torch", _CPU, _cpu_flash_forward, _cpu_flash_backward, False, 1),
)  # fmt: skip


# --------------------------------------------------------------------------------------- the choice


def _ranked(backend: str) -> list[Kernel]:
    """The kernels that a backend may use, the fastest first."""
    found = [kernel for kernel in KERNELS if backend in ("auto", kernel.family)]
    if _flash_impl():
        found.sort(key=lambda kernel: kernel.name != "flash")
    return found


@lru_cache(maxsize=256)
def _admitted(kernel: Kernel, task: Task) -> bool:
    return kernel.why_not(task) is None


def choose(backend: str, task: Task) -> Kernel | None:
    """The kernel for a task; None is the einsum block (`math`), which does everything."""
    able = () if backend == "math" else _ranked(backend)
    # one after the other: xFormers is imported where the faster ones cannot, and not to find that they can
    return next((kernel for kernel in able if _admitted(kernel, task) and fault(kernel, task) is None), None)


def check(q: Tensor, v: Tensor, backend: str, masked: str | None, scale: float) -> None:
    """Raise where a backend was asked for by name and cannot do what the call needs; `masked` names an argument that
    no kernel knows.
    """
    if backend in ("auto", "math"):
        return
    if scale < _LEAST:
        raise NotImplementedError(f"backend={backend!r} needs a scale of at least {_LEAST:.2g}, got {scale}")
    task = Task.of(q, v, "mask" if masked else "full")
    if choose(backend, task) is None:
        reasons = [f"{kernel.name} {kernel.why_not(task) or fault(kernel, task)}" for kernel in _ranked(backend)]
        raise NotImplementedError(f"backend={backend!r} cannot do {masked or 'this'}: {'; '.join(reasons)}")


# ---------------------------------------------------------------------------------------- the proof


def _lengths(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, device="cpu")


_PROBES = {  # queries, keys
    "full": ((37, 192, None), (1, 128, None)),
    "causal": ((192, 192, None),),
    "ragged": (
        (232, 232, Ragged(_lengths((1, 1), (130, 130), (64, 64), (37, 37)), None, 0)),
        (271, 308, Ragged(_lengths((200, 233), (1, 5), (70, 70)), 33, 7)),
        (43, 384, Ragged(_lengths((5, 64), (37, 192), (1, 128)), None, None)),
    ),
}
_faults: dict[tuple, str | None] = {}


def fault(kernel: Kernel, task: Task, ask: bool = True) -> str | None:
    """What came out wrong when this kernel was first asked in this process, for this dtype, head dim, kind and
    direction; None if nothing did, or if it was not asked and now is no time to.
    """
    asked = kernel, *task._replace(single=False, scale=1.0)
    if asked not in _faults and ask and _can_ask(task.device):
        _faults[asked] = found = _ask(kernel, task)
        if found:
            what = f"{task.dtype}, head dim {task.head_dim}, {task.kind} blocks"
            warnings.warn(f"{kernel.name} is passed over for {what}: it {found}", RuntimeWarning, stacklevel=2)
    return _faults.get(asked)


def _can_ask(device: str) -> bool:
    """Not under torch.compile, a CUDA graph's capture, or a mode that counts, traces or fakes what is computed."""
    if device not in ("cpu", "cuda") or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return device == "cpu" or not torch.cuda.is_current_stream_capturing()


def _ask(kernel: Kernel, task: Task) -> str | None:
    """Awkward lengths, one query among them if the kernel takes it, scores near −200, 0 and 200, against the einsum
    block in float64 on the CPU (a GPU would load its float64 kernels first).
    """
    scale = task.head_dim**-0.5
    for c, n, ragged in _PROBES[task.kind]:
        seen = Seen(task.kind, ragged=ragged)
        if c == 1 and kernel.why_not(task._replace(single=True)):
            continue
        q, k, v, dout, dlse = made = _awkward(c, n, task)
        there = [None if x is None else x.to(task.device) for x in made]
        keep, exact = _keep(q, k, seen), [x.double() for x in (q, k, v)]
        true = block.forward(*exact, scale, keep)
        try:
            if task.backward:
                known = true.out.to(q.dtype), true.lse.to(wide(q.dtype))
                given_back = dout.double(), None if dlse is None else dlse.double()
                true = block.backward(*given_back, *exact, *(x.double() for x in known), scale, keep)
                order = there[3:] + there[:3] + [x.to(task.device) for x in known]
                given = _backward(kernel, *order, seen, scale)
            else:
                given = _forward(kernel, *there[:3], seen, scale)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"raised {str(error)[:200]!r} on {c} queries and {n} keys"
        for name, x, y in zip(("dq", "dk", "dv") if task.backward else ("out", "lse"), given, true, strict=True):
            error = float((x.cpu().double() - y).norm() / y.norm())
            # what is broken, not what is imprecise: a score near 200 has lost some digits
            most = 1e-4 if name == "lse" else 32 * torch.finfo(q.dtype).eps + 1e-3
            if not error <= most:
                off = "is not finite" if error != error or math.isinf(error) else f"is off by {error:.2g} of its norm"
                return f"gave a {name} that {off}, on {c} queries and {n} keys with scores near -200, 0 and 200"
    return None


def _awkward(c: int, n: int, task: Task) -> tuple[Tensor, ...]:
    """q, k, v, dout and dlse (or None) on the CPU: three heads, whose scores lie near −200, 0 and 200."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, 1, *shape, generator=random, dtype=torch.float32, device="cpu")

    level, d = (200 / task.head_dim**0.5) ** 0.5, task.head_dim
    q, k = draw(c, 3, d), draw(n, 3, d)
    q += torch.tensor([level, 0.0, level], device="cpu")[:, None]
    k += torch.tensor([-level, 0.0, level], device="cpu")[:, None]
    made = [x.to(task.dtype) for x in (q, k, draw(n, 3, d), draw(c, 3, d))]
    return *made, draw(c, 3).to(wide(task.dtype)) if task.lse_gradient else None


# ---------------------------------------------------------------------------------------- the block


def forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, call: Call) -> Attended:
    """Attend to one block: q b m c h d, k and v b m k g d → out b m c h d, lse b m c h."""
    kernel = _kernel(q, v, seen, call)
    if kernel is None or _loses(kernel, q, k, *(() if seen.kind == "full" else (v,))):
        return block.forward(q, k, v, call.scale, _keep(q, k, seen), seen.modify)
    return _forward(kernel, q, k, v, seen, call.scale)


def _forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> Attended:
    d = v.shape[-1]
    run, how = (kernel.ragged[0], seen.ragged) if seen.ragged else (kernel.forward, seen.kind == "causal")
    out, lse = run(*_folded(kernel, *_alike(q, k, v)), how, scale)
    return Attended(_unfolded(out, q, d), lse.transpose(1, 2).unflatten(0, q.shape[:2]))


def backward(dout, dlse, q, k, v, out, lse, seen: Seen, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one block from the merged out and lse (+inf where nothing was seen); dlse may
    be None.
    """
    kernel = _kernel(q, v, seen, call, backward=True, lse_gradient=dlse is not None)
    if kernel is None or _loses(kernel, q, k):
        return block.backward(dout, dlse, q, k, v, out, lse, call.scale, _keep(q, k, seen), seen.modify)
    return _backward(kernel, dout, dlse, q, k, v, out, lse, seen, call.scale)


def _backward(kernel: Kernel, dout, dlse, q, k, v, out, lse, seen: Seen, scale: float) -> tuple[Tensor, ...]:
    d, d_v = q.shape[-1], v.shape[-1]
    dout, q, k, v, out = _alike(dout, q, k, v, out)
    if dlse is not None:
        dout, q, k, v, out = _with_lse_gradient(dlse, dout, q, k, v, out, kernel.granularity)
    lse = lse.flatten(0, 1).transpose(1, 2)
    folded = _folded(kernel, q, k, v)
    scratch = _scratch(kernel, *folded[:2], seen.ragged) if q.is_meta else None
    run, how = (kernel.ragged[1], seen.ragged) if seen.ragged else (kernel.backward, seen.kind == "causal")
    grads = run(_bhsd(dout), *folded, _bhsd(out), lse, how, scale)
    del scratch
    dq, dk, dv = (_unfolded(x, q, size) for x, size in zip(grads, (d, d, d_v), strict=True))
    if dk.shape[3] != k.shape[3]:
        dk, dv = (x.unflatten(3, (k.shape[3], -1)).sum(4) for x in (dk, dv))
    return dq, dk, dv


def _kernel(q: Tensor, v: Tensor, seen: Seen, call: Call, **more) -> Kernel | None:
    task = Task.of(q, v, seen.kind, single=q.shape[2] == 1, scale=call.scale, **more)
    return choose(call.backend, task) if q.numel() else None


def _loses(kernel: Kernel, *tensors: Tensor) -> bool:
    """Whether a NaN or an infinity of these would be lost or reach too far: the CPU kernel loses it where keys are few,
    and multiplies what is masked by 0.
    """
    if kernel.name != "cpu_flash" or any(type(x) is not Tensor or x.is_meta for x in tensors):
        return False
    return not all(bool(x.sum(dtype=wide(x.dtype)).isfinite()) for x in tensors)


def ragged(q: Tensor, v: Tensor, call: Call, backward: bool = False, lse_gradient: bool = False) -> bool:
    """Whether the kernel that this call would use, on tensors b s h d, takes segments of lengths of their own."""
    task = Task.of(q, v, "ragged", lse_gradient=lse_gradient, scale=call.scale, backward=backward)
    return q.numel() > 0 and choose(call.backend, task) is not None


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Head dims filled up with zeros to the largest, which changes neither a score nor what is asked of out."""
    most = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == most else torch.nn.functional.pad(x, (0, most - x.shape[-1])) for x in tensors)


def _scratch(kernel: Kernel, q: Tensor, k: Tensor, ragged: Ragged | None) -> Tensor | None:
    """What a kernel's backward would take for itself beside what it returns, where tensors have no data: a float32
    dQ and D, and dK and dV of every query head where these share key/value heads. Measured in torch 2.11; that each
    ragged segment may begin a tile of its own is from FlashAttention-2's source.
    """
    if kernel.scratch is None:
        return None
    (b, h, s, d), (rows, columns) = q.shape, kernel.scratch
    tiled = s + rows * len(ragged.lengths) if ragged else -(-s // rows) * rows
    own = 4 * b * h * (tiled * -(-d // columns) * columns + s)
    shared = 2 * b * h * k.shape[2] * d * k.element_size() if k.shape[1] < h else 0
    return q.new_empty(own + shared, dtype=torch.uint8)


def _folded(kernel: Kernel, q: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
    """Segments into the batch, b m s h d → (b m) h s d; key heads repeated for a kernel that wants
    as many as queries.
    """
    times = 1 if kernel.grouped else q.shape[3] // keys[0].shape[3]
    return _bhsd(q), *(_bhsd(x if times == 1 else x.repeat_interleave(times, 3)) for x in keys)


def _bhsd(x: Tensor) -> Tensor:
    """b m s h d → (b m) h s d. Kernels take strides, but not of 0, and believe the head dim's to be
    1 without looking.
    """
    x = x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()
    return x.flatten(0, 1).transpose(1, 2)


def _unfolded(x: Tensor, like: Tensor, d: int) -> Tensor:
    """(b m) h s … → b m s h …, with the other tensor's b and m, and d columns: one view, for the host pays for each."""
    (b, m, *_), (_, h, s, _), (segment, head, row, column) = like.shape, x.shape, x.stride()
    return x.as_strided((b, m, s, h, d), (m * segment, segment, row, head, column))


def _with_lse_gradient(dlse, dout, q, k, v, out, columns: int):
    """dO, Q, K, V and O with columns that take dlse off the kernel's D; three low-precision terms
    carry it exactly.
    """
    parts, rest = [], dlse
    for _ in range(min(3, columns)):
        parts.append(rest.to(q.dtype))
        rest = rest - parts[-1]
    extra = torch.stack(parts, -1)
    wider = [torch.nn.functional.pad(x, (0, columns)) for x in (dout, q, k, v, out)]
    wider[0][..., q.shape[-1] : q.shape[-1] + len(parts)] = extra
    wider[4][..., q.shape[-1] : q.shape[-1] + len(parts)] = -1
    return wider


def _keep(q: Tensor, k: Tensor, seen: Seen) -> Tensor | None:
    """The mask of a block for the einsum version, broadcastable to b m g e c k."""
    if seen.kind == "full" or (seen.kind == "mask" and seen.keep is None):
        return None
    if seen.kind == "ragged":
        return seen.ragged.keep().to(q.device)
    if seen.kind == "causal":
        return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    keep, g = seen.keep, k.shape[3]
    return keep[:, :, :, None] if keep.shape[2] == 1 else keep.unflatten(2, (g, -1))
