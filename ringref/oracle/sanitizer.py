"""Watch the messages of somebody else's attention while it runs on real processes.

All that the oracle needs of `torch.distributed` is here, in this order:

- `Ledger`: one rank's record of every operation: who, how much, at which hop, from which line of the candidate.
- `Watched`: a process group that carries every message and collective over gloo and stands between the candidate and
  it. What a correct program cannot notice changes, so that what an incorrect program gets away with becomes visible: a
  receive buffer is filled with NaN when its receive is posted and only gets its content in `wait()`; a send buffer is
  read as late as is allowed, when its rank next blocks (later would hang correct code), never when it is posted.
- `run`: one case on one rank.

A hop is a round of point-to-point posts: it counts up when a rank posts again after it has waited.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ..lab.memory import measured

FOREVER = timedelta(hours=1)  # the pool's own deadline is shorter and says more than gloo's
NAN_INT = -77  # what an integer receive buffer holds until its message arrives
DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)
SKIPPED = (  # where the files lie whose lines are not the candidate's
    *(os.path.dirname(package.__file__) for package in (torch, multiprocessing)),
    *(threading.__file__, "<frozen", "<string>", os.path.dirname(__file__)),
)


def candidate_line(steps: Iterable[tuple[FrameType, int]]) -> tuple[str, int, str] | None:
    """The first of `traceback.walk_…`'s steps that is neither torch's nor the oracle's: (file, line, function)."""
    lines = ((frame.f_code.co_filename, number, frame.f_code.co_name) for frame, number in steps)
    return next((line for line in lines if not line[0].startswith(SKIPPED)), None)


def where(line: Any) -> str:
    """`file.py:12` for a recorded line."""
    return f"{os.path.basename(line[0])}:{line[1]}" if line else "no line of the candidate (torch itself)"


class Ledger:
    """Every operation of this rank in one case, and what was wrong with it.

    `poison` is what a receive buffer holds until its message arrives.
    """

    def __init__(self, poison: float = torch.nan) -> None:
        self.poison = poison
        self.ops: list[dict[str, Any]] = []
        self.in_flight: list[Post] = []
        self.unlaunched: list[Post] = []
        self.leaving: list[dist.Work] = []  # gloo must be given the time to send what it was given
        self.findings: list[dict[str, Any]] = []
        self.waiting: dict[str, Any] | None = None
        self.ticks = 0
        self.enter("forward")

    def enter(self, phase: str) -> None:
        """Hops are counted from 0 in each forward and each backward."""
        self.phase, self.hop, self.has_waited = phase, 0, False

    def next_hop(self) -> int:
        """The hop of a message that is posted now."""
        self.hop, self.has_waited = self.hop + self.has_waited, False
        return self.hop

    def note(self, kind: str, text: str, op: dict[str, Any]) -> None:
        """Record something wrong with an operation; once per line is enough."""
        if not any(f["kind"] == kind and f["line"] == op["line"] for f in self.findings):
            self.findings.append({"kind": kind, "text": text} | {name: op[name] for name in ("line", "phase", "hop")})

    def post(self, op: Post) -> Post:
        """A new operation: compare its buffers with those still in use, queue it."""
        for other in self.in_flight:
            self.compare(op, other)
        self.in_flight.append(op)
        self.unlaunched.append(op)
        self.ops.append(op.facts)
        return op

    def compare(self, op: Post, other: Post) -> None:
        """Two operations in flight may read one buffer together; nothing else."""
        for (start, end, i_write), (its_start, its_end, it_writes) in itertools.product(op.spans, other.spans):
            if start < its_end and its_start < end and (i_write or it_writes):
                if i_write and it_writes:
                    kind, text = "two-into-one", f"{op.kind} writes into the buffer of an unfinished {other.kind}"
                elif it_writes and other.kind == "recv":
                    kind, text = "sent-unreceived", f"{op.kind} reads what an unfinished {other.kind} has yet to fill"
                else:
                    kind, text = "receive-into-send", f"{op.kind} and an unfinished {other.kind} share a buffer"
                self.note(kind, f"{text} (posted at {where(other.facts['line'])})", op.facts)

    def flush(self) -> None:
        """Let everything posted so far leave. A rank does this whenever it blocks, so deferring cannot cause a hang."""
        queue, self.unlaunched = self.unlaunched, []
        for op in queue:
            op.launch()

    def finish(self) -> None:
        """The case is over: let late sends leave, name what was never waited for."""
        self.flush()
        for op in self.in_flight:
            if op.explicit:
                self.note("unfinished", f"{op.kind} was never waited for", op.facts)

    def dump(self) -> dict[str, Any]:
        """Everything known, as plain data; asked from another thread, also where in the candidate the main one is."""
        stack = traceback.walk_stack(sys._current_frames()[threading.main_thread().ident])
        return {
            "ops": list(self.ops),
            "findings": list(self.findings),
            "waiting": self.waiting,
            "ticks": self.ticks,
            "cpu": time.process_time(),
            "line": candidate_line(stack),
            "sent": sum(op["sent"] for op in list(self.ops)),
        }


LEDGER = Ledger()  # of the case that runs


@contextmanager
def unseen() -> Iterator[None]:
    """What happens in here is no part of the candidate's graph, nor of its memory."""
    with torch.no_grad(), _disable_current_modes():
        yield


def as_bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def poison(x: Tensor) -> None:
    """Fill with what nobody can mistake for data."""
    if x.is_floating_point() or x.is_complex():
        x.detach().fill_(LEDGER.poison)
    elif x.dtype not in (torch.bool, torch.uint8):
        x.detach().fill_(NAN_INT)


class Post(dist.Work):
    """One operation between its post and its wait: the work object that the candidate holds.

    A message names its `peer`, as the group counts; a collective has none. `sent` are the bytes that must leave.
    """

    def __init__(self, group: Watched, kind: str, reads: list, writes: list, sent: float, peer: Any = None, tag=0):
        super().__init__()
        self.group, self.kind, self.reads, self.writes, self.peer = group, kind, reads, writes, peer
        self.spans = [_span(x, False) for x in reads if x.numel()] + [_span(x, True) for x in writes if x.numel()]
        # no frame is kept: its locals are the candidate's tensors, and their bytes are measured
        names = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe()))
        # a functional collective is waited for by torch, so only what the candidate holds itself can be forgotten
        self.explicit = next(name for name in names if name != __file__).endswith("distributed_c10d.py")
        self.facts = {
            "kind": kind,
            "group": group.label,
            "members": group.members,
            "peer": None if peer is None else group.members[peer],
            "tag": tag,
            "seq": next(group.counts["collective" if peer is None else kind, peer, tag]),
            "sizes": [x.numel() for x in reads or writes],
            "dtypes": [str(x.dtype).removeprefix("torch.") for x in reads or writes],
            "order": next((_order(x) for x in writes if kind in IN_PLACE and not x.is_contiguous()), "contiguous"),
            "sent": int(sent),
            "line": candidate_line(traceback.walk_stack(sys._getframe())),
            "phase": LEDGER.phase,
            "hop": LEDGER.hop if peer is None else LEDGER.next_hop(),
            "waited": False,
        }

    def launch(self) -> None:
        """Hand the operation to the real group, reading what is sent now."""

    def block(self) -> None:
        """Wait until the real group has done it."""
        self.real.wait()

    def settle(self) -> None:
        """Give the candidate what arrived, or check that it kept its side."""

    def wait(self, timeout: Any = None) -> bool:
        if not self.facts["waited"]:
            with unseen():
                LEDGER.flush()
                LEDGER.waiting = self.facts
                self.block()
                LEDGER.waiting = None
                LEDGER.ticks += 1
                self.settle()
            LEDGER.has_waited = self.facts["waited"] = True
            LEDGER.in_flight.remove(self)
        return True

    # gloo's own messages are never complete before somebody waits, so that polling is waiting here
    is_completed = synchronize = wait

    def result(self) -> list[Tensor]:
        return self.writes

    def get_future(self) -> torch.futures.Future:
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self.writes)
        return future


def _span(x: Tensor, written: bool) -> tuple[int, int, bool]:
    """Where a tensor begins and ends in memory, and whether the operation writes there."""
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size(), written


def _order(x: Tensor) -> tuple[int, ...]:
    """The strides that matter, those of dimensions longer than 1."""
    return tuple(step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1)


class Message(Post):
    """Point to point: a header (size and dtype) leaves at once, so that each end knows of the other; then the content.

    Sizes or dtypes that differ are named by the parent, which sees both ends; here they must do no harm.
    """

    def __init__(self, group: Watched, kind: str, x: Tensor, peer: int, tag: int):
        reads, writes, sent = ([x], [], x.nbytes) if kind == "send" else ([], [x], 0)
        super().__init__(group, kind, reads, writes, sent, peer, tag)
        for wrong, name, text in (
            (peer == group.rank(), "self-send", f"{kind} with rank {peer}, which is this rank"),
            (not x.is_contiguous(), "non-contiguous", f"{kind} of a tensor with strides {tuple(x.stride())}"),
        ):
            if wrong:
                LEDGER.note(name, text, self.facts)
                raise RuntimeError(f"{text}: gloo and NCCL refuse it")
        # each message has tags of its own on the wire, so that a late one never meets another's buffer
        self.wire = 2 * ((tag % 1000) * 1_000_000 + self.facts["seq"])
        self.header = torch.tensor([x.numel(), DTYPES.index(x.dtype)])
        self.real = getattr(group.real, kind)([self.header], peer, self.wire)


class Send(Message):
    """Its content leaves when this rank next blocks."""

    def __init__(self, group: Watched, x: Tensor, peer: int, tag: int):
        super().__init__(group, "send", x, peer, tag)
        self.before = as_bytes(x).clone()

    def launch(self) -> None:
        content = self.reads[0].detach().clone()
        if content.numel():
            LEDGER.leaving.append(self.group.real.send([content], self.peer, self.wire + 1))

    def settle(self) -> None:
        if not torch.equal(as_bytes(self.reads[0]), self.before):
            LEDGER.note("send-overwritten", "the buffer was written between isend and its wait", self.facts)


class Recv(Message):
    """Receives into a buffer of its own; the candidate's holds NaN until `wait`."""

    def __init__(self, group: Watched, x: Tensor, peer: int, tag: int):
        super().__init__(group, "recv", x, peer, tag)
        poison(x)

    def block(self) -> None:
        self.real.wait()
        numel, dtype = self.header.tolist()
        self.content = torch.empty(numel, dtype=DTYPES[dtype])
        if numel:
            self.group.real.recv([self.content], self.peer, self.wire + 1).wait()

    def settle(self) -> None:
        into = self.writes[0].detach()
        if (into.numel(), into.dtype) == (self.content.numel(), self.content.dtype):
            into.copy_(self.content.view(into.shape))


IN_PLACE = {"allreduce", "allreduce_coalesced", "barrier", "broadcast", "reduce"}
# What share of its input a rank of p must send, by how torch's names for a collective begin, underscores aside.
SHARES: dict[str, Callable[[int], float]] = {
    "allgather": lambda p: p - 1,
    "allreduce": lambda p: 2 * (p - 1) / p,
    "broadcast": lambda p: 1,
    **dict.fromkeys(("alltoall", "barrier", "gather", "reduce", "scatter"), lambda p: (p - 1) / p),
}


class Collective(Post):
    """Any collective: inputs are read when this rank blocks, outputs hold NaN until `wait`."""

    def __init__(self, group: Watched, kind: str, args: tuple, options: dict):
        outs, ins = _tensors(args[:1]), _tensors(args[1:2])
        share = next(share for start, share in SHARES.items() if kind.replace("_", "").startswith(start))
        sent = share(group.size()) * sum(x.nbytes for x in (outs if kind in IN_PLACE else ins))
        super().__init__(group, kind, [] if kind in IN_PLACE else ins, outs, sent)
        self.call, self.given = (args, options), {}
        if kind.startswith("allreduce"):  # every rank's input and output in one: read it before it is NaN
            self.given = {id(x): x.detach().clone() for x in outs}
        for x in outs if self.given or kind not in IN_PLACE else ():
            poison(x)

    def launch(self) -> None:
        args, options = self.call
        copies = {id(x): x.detach().clone() for x in self.reads + self.writes} | self.given
        self.results = [copies[id(x)] for x in self.writes]
        self.real = getattr(self.group.real, self.kind)(*tree_map(lambda x: copies.get(id(x), x), args), **options)

    def settle(self) -> None:
        for mine, theirs in zip(self.results, self.writes, strict=True):
            theirs.detach().copy_(mine)


def _tensors(nested: Any) -> list[Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


class Watched(dist.ProcessGroup):
    """A process group that records, defers and poisons; `real` carries the messages."""

    def __init__(self, options: Any, _: Any = None):
        place = options.store, options.group_rank, options.group_size
        super().__init__(*place[1:])
        self.label, self.counts = options.group_id, defaultdict(itertools.count)  # both ends count alike
        self.members = list(options.global_ranks_in_group) or list(range(options.group_size))
        self.real = dist.ProcessGroup(*place)
        self.real._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        gloo = dist.ProcessGroupGloo(*place, timeout=FOREVER)
        self.real._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> Post:
        with unseen():
            return LEDGER.post(Send(self, tensors[0], to, tag))

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Post:
        with unseen():
            return LEDGER.post(Recv(self, tensors[0], source, tag))

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Post:
        raise NotImplementedError("ringref's sanitizer cannot watch a receive from any source: name the source")

    def collective(self, kind: str, *args: Any, **options: Any) -> Post:
        with unseen():
            return LEDGER.post(Collective(self, kind, args, options))

    def _get_backend(self, _: torch.device) -> Watched:
        """It answers for itself: what torch asks of a backend is asked of it, and nothing goes past it to gloo."""
        return self

    get_backend = _get_backend
    supports_coalescing = supports_splitting = supports_time_estimate = False  # so torch posts one by one

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]


for _kind in dir(dist.ProcessGroup):
    if _kind.replace("_", "").startswith(tuple(SHARES)):
        setattr(Watched, _kind, functools.partialmethod(Watched.collective, _kind))


group_ranks = dist.get_process_group_ranks  # the world's ranks that are in a group


def entered(group: Any, rotate: str, balanced: bool, n: int, device: torch.device) -> Any:
    """PyTorch's context_parallel over a group, for n tokens on this device whose shards are already cut: for causal
    attention balanced, which is zigzag.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import _attention as experimental

    experimental.set_rotate_method(rotate)
    experimental._cp_options.enable_load_balance = balanced
    mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("ring",))
    # it wants something to cut, and learns from it how the sequence is laid out
    return experimental.context_parallel(mesh, buffers=[torch.zeros(1, n, device=device)], buffer_seq_dims=[1])


def run(job: dict[str, Any], rank: int, device: str) -> dict[str, Any]:
    """Run one case on this rank; whatever happens becomes part of the result."""
    global LEDGER
    LEDGER = Ledger(job.get("poison", torch.nan))
    result: dict[str, Any] = {"steps": [{} for _ in job["steps"]], "error": None, "written": [], "overwritten": []}
    try:
        teams = [(ranks, _team(tuple(ranks))) for ranks in job["groups"]]
        group = next((team for ranks, team in teams if rank in ranks), None)
        if group is not None:
            torch.manual_seed(0)
            fn, told = _loaded(job["fn"]), pickle.loads(job["call"]) | job.get("told", {})
            with measured(device) if job.get("measure") else fresh(job.get("fresh", torch.nan), device) as usage:
                _passes(functools.partial(fn, group=group, **told), job, told.get("mask_mod"), device, result)
            result["peak"] = usage and usage.peak
    except BaseException as error:
        result["error"] = {
            "type": type(error).__name__,
            "text": _text(error)[:600],
            "line": candidate_line(reversed(list(traceback.walk_tb(error.__traceback__)))),
            "refused": isinstance(error, NotImplementedError),
        }
    LEDGER.finish()
    return result | LEDGER.dump()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # somebody's own exception may do anything
        return "its text cannot be printed"


@contextmanager
def fresh(value: float, device: str) -> Iterator[None]:
    """Memory that nobody has written holds NaN, so that reading it shows; or 0, which it may have held by luck.

    NaN comes from torch's deterministic mode, which higher-order operators and compiled code bear; on a GPU that mode
    would change the kernels.
    """
    if value == 0.0:
        with _Zeroed():
            yield
        return
    before = torch.get_deterministic_debug_mode()
    try:  # use_deterministic_algorithms would import the compiler too, a second in each process
        torch.set_deterministic_debug_mode("warn" if device == "cpu" else "default")
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


class _Zeroed(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if "empty" in func.__name__ and isinstance(result, Tensor) else result


@functools.cache
def _team(ranks: tuple[int, ...]) -> Any:
    """The group of these ranks. It is made once, and all the world asks for it."""
    return dist.group.WORLD if len(ranks) == dist.get_world_size() else dist.new_group(ranks)


@functools.lru_cache(maxsize=1)
def _loaded(fn: bytes) -> Callable:
    importlib.invalidate_caches()  # its file may be newer than this process
    return pickle.loads(fn)


def _passes(fn: Callable, job: dict, mask: Any, device: str, result: dict) -> None:
    """Forward and backward passes in the order that the case asks for; were inputs written to, or results later on?"""
    live: dict[int, tuple] = {}
    laid: dict[int, dict[str, Tensor]] = {}  # what the candidate was given
    back: list[tuple[str, Tensor, Tensor]] = []  # what it gave back, and what that was then

    def keep(name: str, x: Tensor) -> None:
        if not job.get("measure"):
            back.append((name, x.detach(), _plain(x)))

    for phase, i in job["program"]:
        given, done = job["steps"][i], result["steps"][i]
        LEDGER.enter(phase)
        if phase == "backward":
            done |= _backward(given | {"do": given["do"].to(device)}, job.get("dout", ""), *live[i])
        else:
            names = [name for name in ("q", "k", "v", "sink") if name in given]
            leaves = {name: given[name].to(device, copy=True).requires_grad_(phase == "forward") for name in names}
            with torch.set_grad_enabled(phase == "forward"):
                qkv = _laid([leaves[name] for name in "qkv"], job.get("views", ""))
                laid[i] = leaves | dict(zip("qkv", qkv, strict=True))
                for name in names if phase == "forward" else ():
                    leaves[name].register_hook(functools.partial(keep, f"d{name}"))
                returned = fn(*qkv, **{name: leaves[name] for name in names[3:]})
            live[i] = leaves, *_result(returned, device)
            keep("out", live[i][1])
            done |= {"out": _plain(live[i][1]), "lse": _plain(live[i][2])}
        for name, x in laid[i].items():
            if not torch.equal(as_bytes(x.cpu()), as_bytes(given[name])) and name not in result["written"]:
                result["written"].append(name)
    for name, x, then in back:
        if not torch.equal(as_bytes(x.cpu()), as_bytes(then)) and name not in result["overwritten"]:
            result["overwritten"].append(name)
    # what a mask keeps is an input too: it holds a copy of each tensor that it gave away
    cells = [cell.cell_contents for cell in getattr(mask, "__closure__", None) or ()]
    kept = [pair for cell in cells if isinstance(cell, dict) for pair in cell.values()]
    if not all(torch.equal(*pair) for pair in kept):
        result["written"].append("mask")


def _laid(x: list[Tensor], how: str) -> list[Tensor]:
    """b s h d tensors as they may lie in memory: views of one packed tensor, or heads before tokens."""
    if how == "packed" and len({(y.shape[1], y.shape[3]) for y in x}) == 1:
        return list(torch.cat(x, 2).split([y.shape[2] for y in x], 2))
    if how == "expanded":
        return [y.flatten()[:1].expand(y.shape) if y.numel() else y for y in x]
    return [y.transpose(1, 2).contiguous().transpose(1, 2) for y in x] if how == "heads first" else x


def _result(returned: Any, device: str) -> tuple[Tensor, Tensor | None]:
    """What a candidate may return: out, or (out, lse), as real, dense tensors with data."""
    pair = returned if isinstance(returned, (tuple, list)) else (returned, None)
    if len(pair) != 2:
        raise TypeError(f"the candidate returned {type(returned).__name__} of {len(pair)}, not a tensor or (out, lse)")
    for name, x in zip(("out", "lse"), pair, strict=True):
        if name == "lse" and x is None:
            continue
        what = type(x).__name__
        if isinstance(x, Tensor):
            plain = x.layout == torch.strided and not x.is_nested
            kind = str(x.layout).removeprefix("torch.") if not plain else "meta" if x.is_meta else str(x.dtype)[6:]
            if plain and not x.is_meta and x.is_floating_point():
                continue
            what = f"a {kind} tensor"
        raise TypeError(f"the candidate returned {what} for {name}, not a floating point tensor")
    return pair[0], pair[1]


def _backward(given: dict, how: str, leaves: dict[str, Tensor], out: Tensor, lse: Any) -> dict[str, Any]:
    """Backward through out, and through lse too where it is differentiable and its shape is known."""
    roots, grads, dlse = [out], _laid([given["do"].to(out)], how), given["dlse"]
    if isinstance(lse, Tensor) and lse.requires_grad:
        dlse = dlse if dlse.shape == lse.shape else dlse.transpose(1, 2)
        if dlse.shape == lse.shape:
            roots.append(lse)
            grads.append(dlse.to(lse))
    if out.requires_grad:
        torch.autograd.backward(roots, grads)
    found = {f"d{name}": _plain(x.grad) for name, x in leaves.items()}
    return found | {"dlse_used": len(roots) > 1}


def _plain(x: Any) -> Any:
    return x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else None
