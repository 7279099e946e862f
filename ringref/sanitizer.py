"""Watch the messages of somebody else's attention while it runs on real processes.

Three things live here, all that the oracle needs of `torch.distributed`:

- `Watched`, a process group that carries every message and collective over gloo and stands between
the candidate and
  it. What a correct program cannot notice changes, so that what an incorrect program gets away with
  becomes visible: a receive buffer is filled with NaN when its receive is posted and only gets its
  content in `wait()`; a send buffer is read as late as is allowed, when its rank next blocks (later
  would hang correct code), never when it is posted.
- `Ledger`, one rank's record of every operation: who, how much, at which hop, from which line of
the candidate. - `Pool`, worker processes that run a candidate, and `Ranks`, the same for ranks that
`torchrun` started.

A hop is a round of point-to-point posts: it counts up when a rank posts again after it has waited.
"""

from __future__ import annotations

import atexit
import importlib
import math
import os
import pickle
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from datetime import timedelta
from multiprocessing import connection
from types import FrameType
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

NAN_INT = -77  # what an integer receive buffer holds until its message arrives
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
FOREVER = timedelta(hours=1)  # the pool's own deadline is shorter and says more than gloo's
HERE = os.path.dirname(os.path.abspath(__file__))
SKIPPED = (os.path.dirname(torch.__file__), os.path.join(HERE, "sanitizer.py"), os.path.join(HERE, "oracle.py"))


def candidate_line(frame: FrameType | None) -> tuple[str, int, str] | None:
    """The innermost frame of neither torch nor the oracle: (file, line, function)."""
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        inside = name.startswith(SKIPPED) or name.startswith("<frozen") or "/multiprocessing/" in name
        if not inside and name != "<string>" and "/threading.py" not in name:
            return name, frame.f_lineno, code.co_name
        frame = frame.f_back
    return None


# --------------------------------------------------------------------------------------- the record


class Ledger:
    """Every operation of this rank since `reset()`, and what was wrong with it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, poison: float = math.nan) -> None:
        """Forget everything: the next case starts. `poison` is what a buffer holds until its
        message arrives.
        """
        self.poison = poison
        self.posts: list[Post] = []
        self.unlaunched: list[Post] = []
        self.findings: list[dict[str, Any]] = []
        self.waiting: Post | None = None
        self.phase, self.hop, self.has_waited, self.ticks = "forward", 0, False, 0

    def enter(self, phase: str) -> None:
        """Hops are counted from 0 in each forward and each backward."""
        self.phase, self.hop, self.has_waited = phase, 0, False

    def note(self, kind: str, text: str, post: Post, line: Any = None) -> None:
        """Record something wrong, at the line of `post` unless another is given; once per line is
        enough.
        """
        line = line or post.line
        if not any(f["kind"] == kind and f["line"] == line for f in self.findings):
            self.findings.append({"kind": kind, "text": text, "line": line, "phase": post.phase, "hop": post.hop})

    def post(self, op: Post) -> Post:
        """A new operation: name its hop, compare its buffers with those still in use, queue it."""
        if op.is_message:
            if self.has_waited:
                self.hop, self.has_waited = self.hop + 1, False
        op.phase, op.hop = self.phase, self.hop
        for other in self.posts:
            if not other.waited:
                self.compare(op, other)
        self.posts.append(op)
        self.unlaunched.append(op)
        return op

    def compare(self, op: Post, other: Post) -> None:
        """Two operations in flight may read one buffer together; nothing else."""
        for mine, i_write in op.spans:
            for theirs, it_writes in other.spans:
                if mine[0] < theirs[1] and theirs[0] < mine[1] and (i_write or it_writes):
                    if i_write and it_writes:
                        kind, text = ("two-into-one", f"{op.kind} writes into the buffer of an unfinished {other.kind}")
                    else:
                        kind, text = ("receive-into-send", f"{op.kind} and an unfinished {other.kind} share a buffer")
                    self.note(kind, f"{text} (posted at {where(other.line)})", op)

    def flush(self) -> None:
        """Let everything posted so far leave. A rank does this whenever it blocks, so deferring
        cannot cause a hang.
        """
        queue, self.unlaunched = self.unlaunched, []
        for op in queue:
            op.launch()

    def finish(self) -> bool:
        """The case is over: let late sends leave, name what was never waited for. True if the group
        is still clean.
        """
        self.flush()
        clean = True
        for op in self.posts:
            if not op.waited and op.explicit:
                self.note("unfinished", f"{op.kind} was never waited for", op)
            clean = clean and op.waited
        return clean

    def bytes_sent(self) -> int:
        """Bytes that left this rank: messages, and what a collective cannot do without."""
        return sum(op.sent for op in self.posts)

    def dump(self, thread: int | None = None) -> dict[str, Any]:
        """Everything known, as plain data; with a thread's id also the candidate's line where that
        thread stands.
        """
        frame = sys._current_frames().get(thread) if thread else None
        return {
            "ops": [op.facts() for op in list(self.posts)],
            "findings": list(self.findings),
            "waiting": self.waiting.facts() if self.waiting else None,
            "ticks": self.ticks,
            "line": candidate_line(frame),
            "phase": self.phase,
            "sent": self.bytes_sent(),
        }


LEDGER = Ledger()


def where(line: Any) -> str:
    """`file.py:12` for a recorded line."""
    return f"{os.path.basename(line[0])}:{line[1]}" if line else "no line of the candidate (torch itself)"


def as_bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def poison(x: Tensor) -> None:
    """Fill with what nobody can mistake for data."""
    with torch.no_grad(), _disable_current_modes():
        if x.is_floating_point() or x.is_complex():
            x.detach().fill_(LEDGER.poison)
        elif x.dtype not in (torch.bool, torch.uint8):
            x.detach().fill_(NAN_INT)


# ----------------------------------------------------------------------------------- the operations


class Post(dist.Work):
    """One operation between its post and its wait: the work object that the candidate holds."""

    is_message = False

    def __init__(self, group: Watched, kind: str, reads: list[Tensor], writes: list[Tensor], args: Any = None):
        super().__init__()
        frame = sys._getframe(1)
        self.group, self.kind, self.reads, self.writes, self.args = group, kind, reads, writes, args
        self.line = candidate_line(frame)
        # a functional collective is waited for by torch, so only what the candidate holds itself
        # can be forgotten
        self.explicit = _called_from_c10d(frame)
        self.peer, self.tag, self.seq, self.sent = None, 0, 0, 0
        self.sizes = [x.numel() for x in reads or writes]
        self.dtypes = [str(x.dtype)[6:] for x in reads or writes]
        self.waited = False
        self.spans = [(_span(x), False) for x in reads if x.numel()]
        self.spans += [(_span(x), True) for x in writes if x.numel()]
        self.real: Any = None

    def facts(self) -> dict[str, Any]:
        """Plain data about this operation."""
        return {
            "kind": self.kind,
            "group": self.group.name,
            "members": self.group.members,
            "peer": self.peer,
            "tag": self.tag,
            "seq": self.seq,
            "sizes": self.sizes,
            "dtypes": self.dtypes,
            "line": self.line,
            "phase": self.phase,
            "hop": self.hop,
            "waited": self.waited,
        }

    def launch(self) -> None:
        """Hand the operation to the real group, reading what is sent now."""

    def block(self) -> None:
        """Wait until the real group has done it."""

    def settle(self) -> None:
        """Give the candidate what arrived, and check that it kept its side."""

    def wait(self, timeout: Any = None) -> bool:
        if not self.waited:
            LEDGER.flush()
            LEDGER.waiting = self
            self.block()
            LEDGER.waiting = None
            LEDGER.ticks += 1
            LEDGER.has_waited = True
            with torch.no_grad(), _disable_current_modes():
                self.settle()
            self.waited = True
            # the record lives on, the candidate's tensors must not: their bytes are measured
            self.reads, self.writes, self.args = [], [], None
            self.payload = self.results = self.given = None
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        # gloo's own messages are never complete before somebody waits, so that polling is waiting
        # here
        return self.wait()

    def is_success(self) -> bool:
        return self.waited

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self.writes

    def get_future(self) -> torch.futures.Future:
        writes = self.writes
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(writes)
        return future


def _called_from_c10d(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename.endswith("ringref/sanitizer.py"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.endswith("distributed_c10d.py")


def _span(x: Tensor) -> tuple[int, int]:
    """First and last byte of a tensor in memory."""
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


class Send(Post):
    """A header leaves at once, so that the receiver's post is known; the content leaves when this
    rank blocks.
    """

    is_message = True

    def __init__(self, group: Watched, x: Tensor, peer: int, tag: int):
        super().__init__(group, "send", [x], [])
        self.peer, self.tag, self.seq = group.members[peer], tag, group.next("send", peer, tag)
        self.to, self.sent = peer, x.numel() * x.element_size()
        with _disable_current_modes():
            self.before = as_bytes(x).clone()
            header = torch.tensor([x.numel(), DTYPES.index(x.dtype)])
            self.real, self.header = (group.real.send([header], peer, group.wire(tag, self.seq)), header)

    def launch(self) -> None:
        with _disable_current_modes():
            self.payload = self.reads[0].detach().clone()
        if self.payload.numel():
            self.leaving = self.group.real.send([self.payload], self.to, self.group.wire(self.tag, self.seq) + 1)

    def block(self) -> None:
        self.real.wait()

    def settle(self) -> None:
        if not torch.equal(as_bytes(self.reads[0]), self.before):
            text = "the buffer was written between isend and its wait"
            LEDGER.note("send-overwritten", text, self)
        self.before = None


class Recv(Post):
    """Receives into a buffer of its own; the candidate's holds NaN until `wait`."""

    is_message = True

    def __init__(self, group: Watched, x: Tensor, peer: int, tag: int):
        super().__init__(group, "recv", [], [x])
        self.peer, self.tag, self.seq = group.members[peer], tag, group.next("recv", peer, tag)
        self.source = peer
        poison(x)
        with _disable_current_modes():
            self.header = torch.zeros(2, dtype=torch.int64)
        self.real = group.real.recv([self.header], peer, group.wire(tag, self.seq))

    def block(self) -> None:
        self.real.wait()
        with _disable_current_modes():
            numel, dtype = self.header.tolist()
            self.payload = torch.empty(numel, dtype=DTYPES[dtype])
            if numel:
                self.group.real.recv([self.payload], self.source, self.group.wire(self.tag, self.seq) + 1).wait()

    def settle(self) -> None:
        # a wrong size or dtype is named by the parent, which sees both sides; here only nothing may
        # crash
        into, came = self.writes[0].detach(), self.payload
        whole = came.numel() == into.numel() and came.dtype == into.dtype
        if whole:
            into.copy_(came.view(into.shape))

    def _source_rank(self) -> int:
        return self.source

    source_rank = _source_rank


class Collective(Post):
    """Any collective: inputs are read when this rank blocks, outputs hold NaN until `wait`."""

    def __init__(self, group: Watched, kind: str, args: tuple, options: dict, outs: Any, ins: Any, in_place: bool):
        writes, reads = _tensors(outs), _tensors(ins)
        self.in_place = in_place
        super().__init__(group, kind, [] if in_place else reads, writes, (args, options))
        self.seq = group.next("collective", 0, 0)
        size = sum(x.numel() * x.element_size() for x in reads)
        self.sent = int(size * _SHARE.get(kind.strip("_").split("_")[0], lambda p: (p - 1) / p)(len(group.members)))
        with _disable_current_modes():
            self.given = [x.detach().clone() for x in reads] if in_place else None
        for x in writes:
            if not in_place or kind.startswith("allreduce"):
                poison(x)

    def launch(self) -> None:
        args, options = self.args
        with _disable_current_modes():
            copies = {
                id(x): y
                for x, y in zip(self.writes, self.given or [torch.empty_like(x) for x in self.writes], strict=False)
            }
            if not self.in_place:
                copies |= {id(x): x.detach().clone() for x in self.reads}
            mine = [tree_map(lambda x: copies.get(id(x), x) if isinstance(x, Tensor) else x, a) for a in args]
            self.results = [copies[id(x)] for x in self.writes]
            self.real = getattr(self.group.real, self.kind)(*mine, **options)

    def block(self) -> None:
        self.real.wait()

    def settle(self) -> None:
        for mine, theirs in zip(self.results, self.writes, strict=True):
            theirs.detach().copy_(mine)


def _tensors(nested: Any) -> list[Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


_SHARE = {
    "allgather": lambda p: p - 1,
    "all": lambda p: p - 1,
    "allreduce": lambda p: 2 * (p - 1) / p,
    "broadcast": lambda p: 1,
    "reduce": lambda p: (p - 1) / p,
}


class Watched(dist.ProcessGroup):
    """A process group that records, defers and poisons; `real` carries the messages."""

    def __init__(self, store: Any, rank: int, size: int, members: list[int], name: str):
        super().__init__(rank, size)
        self.me, self.count, self.name, self.counters = rank, size, name, Counter()
        self.members = members or list(range(size))
        self.real = dist.ProcessGroup(store, rank, size)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = FOREVER
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        gloo = dist.ProcessGroupGloo(store, rank, size, options)
        self.real._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self.real._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)

    def next(self, kind: str, peer: int, tag: int) -> int:
        """How many operations of this kind went before: both sides count alike."""
        self.counters[kind, peer, tag] += 1
        return self.counters[kind, peer, tag] - 1

    @staticmethod
    def wire(tag: int, seq: int) -> int:
        """The tag on the wire: one per message, so that a late message never meets another's
        buffer.
        """
        return 2 * ((tag % 1000) * 1_000_000 + seq)

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> Post:
        self._usable(to, "send", tensors[0])
        return LEDGER.post(Send(self, tensors[0], to, tag))

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Post:
        self._usable(source, "recv", tensors[0])
        return LEDGER.post(Recv(self, tensors[0], source, tag))

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Post:
        raise NotImplementedError("ringref's sanitizer cannot watch a receive from any source: name the source")

    def _usable(self, peer: int, kind: str, x: Tensor) -> None:
        """What gloo and NCCL refuse, refused by name."""
        for wrong, name, text in (
            (peer == self.me, "self-send", f"{kind} with rank {peer}, which is this rank"),
            (not x.is_contiguous(), "non-contiguous", f"{kind} of a tensor with strides {tuple(x.stride())}"),
        ):
            if wrong:
                op = Post(self, kind, [], [])
                op.phase, op.hop = LEDGER.phase, LEDGER.hop
                LEDGER.note(name, text, op)
                raise RuntimeError(f"{text}: gloo and NCCL refuse it")

    def rank(self) -> int:
        return self.me

    def size(self) -> int:
        return self.count

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        return "watched"

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def __repr__(self) -> str:
        return f"Watched(rank={self.me}, size={self.count}, ranks={self.members})"


def _collective(kind: str, in_place: bool) -> Any:
    def call(self: Watched, *args: Any, **options: Any) -> Post:
        outs = args[0] if args else None
        ins = outs if in_place or len(args) < 2 else args[1]
        return LEDGER.post(Collective(self, kind, args, options, outs, ins, in_place))

    call.__name__ = kind
    return call


# both the names of torch 2.13 and those before it
_OUT_IN = """allgather allgather_coalesced _allgather_base all_gather_single
allgather_into_tensor_coalesced all_gather_single_coalesced reduce_scatter _reduce_scatter_base
reduce_scatter_single reduce_scatter_tensor_coalesced reduce_scatter_single_coalesced
alltoall alltoall_base all_to_all_single gather scatter"""
_IN_PLACE = "allreduce allreduce_coalesced broadcast reduce barrier"
for _name in _OUT_IN.split():
    setattr(Watched, _name, _collective(_name, in_place=False))
for _name in _IN_PLACE.split():
    setattr(Watched, _name, _collective(_name, in_place=True))


def _create(options: Any, _: Any = None) -> Watched:
    return Watched(
        options.store, options.group_rank, options.group_size, list(options.global_ranks_in_group), options.group_id
    )


def group_ranks(group: Any) -> list[int]:
    """The world's ranks that are in a group."""
    return dist.get_process_group_ranks(group)


def entered(group: Any, rotate: str, n: int) -> Any:
    """PyTorch's context_parallel over a group, for n tokens whose shards are already cut."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import _attention as experimental

    experimental.set_rotate_method(rotate)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ring",))
    # it wants something to cut, and learns from it how the sequence is laid out
    return experimental.context_parallel(mesh, buffers=[torch.zeros(1, n)], buffer_seq_dims=[1])


# ------------------------------------------------------------------------------------ peak of bytes


class LiveBytes(TorchDispatchMode):
    """Peak bytes of live tensor storage created while the mode is on; a kernel's own scratch is not
    seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


# ----------------------------------------------------------------------------------------- one case


class Runner:
    """Runs the cases of a sweep on this rank; keeps the process group while consecutive cases can
    share it.
    """

    def __init__(self, rank: int, store: Any, backend: str = "gloo"):
        self.rank, self.store, self.backend, self.key, self.device = (rank, store, backend, None, "cpu")
        self.retired: list[Any] = []
        if backend == "gloo" and "WATCHED" not in dist.Backend._plugins:
            dist.Backend.register_backend("watched", _create, extended_api=True, devices=["cpu"])
        if backend == "nccl":
            self.device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
            torch.cuda.set_device(self.device)

    def groups(self, world: int, groups: list[list[int]], epoch: int) -> Any:
        """The group that this rank belongs to in a world of `world` ranks; made anew when `epoch`
        changes.
        """
        if self.key != epoch:
            if dist.is_initialized():
                # kept alive: taking gloo down while a neighbour still starts breaks the neighbour's
                # connections
                self.retired += list(dist.distributed_c10d._world.pg_map)
                dist.destroy_process_group()
            dist.init_process_group(
                "watched" if self.backend == "gloo" else "nccl",
                store=dist.PrefixStore(f"{epoch}", self.store),
                rank=self.rank,
                world_size=world,
                timeout=FOREVER,
            )
            self.mine = dist.group.WORLD
            if groups != [list(range(world))]:
                made = [(ranks, dist.new_group(ranks)) for ranks in groups]
                self.mine = next((group for ranks, group in made if self.rank in ranks), None)
            self.key = epoch
        return self.mine

    def run(self, fn: Any, job: dict[str, Any]) -> dict[str, Any]:
        """Run one case; whatever happens becomes part of the result."""
        LEDGER.reset(job.get("poison", math.nan))
        steps: list[dict[str, Any]] = [{} for _ in job["steps"]]
        result: dict[str, Any] = {"steps": steps, "error": None, "written": []}
        meter = LiveBytes() if job.get("measure") else None
        try:
            group = self.groups(job["world"], job["groups"], job["epoch"])
            if group is not None:
                torch.manual_seed(0)
                if meter:
                    with meter:
                        self.program(fn, job, group, steps, result)
                    result["peak"] = meter.peak
                else:
                    self.program(fn, job, group, steps, result)
        except BaseException as error:
            result["error"] = _describe(error)
        for step in steps:
            step.pop("live", None)
        LEDGER.waiting = None
        result["clean"] = LEDGER.finish() and result["error"] is None
        return result | LEDGER.dump()

    def program(self, fn: Any, job: dict, group: Any, steps: list, result: dict) -> None:
        """Forward and backward passes in the order that the case asks for."""
        before = _versions(job["call"].get("mask_mod"))
        call = job["call"] | ({} if job.get("positions") is None else {"positions": job["positions"]})
        for what, i in job["program"]:
            given, done = job["steps"][i], steps[i]
            LEDGER.enter(what)
            if what == "backward":
                self.backward(given, done)
            else:
                leaves = [given[name].to(self.device).clone() for name in "qkv"]
                for x in leaves:
                    x.requires_grad_(what == "forward")
                with torch.set_grad_enabled(what == "forward"):
                    handed = (
                        torch.cat(leaves, 2).split([x.shape[2] for x in leaves], 2) if job.get("packed") else leaves
                    )
                    returned = fn(*handed, group=group, **call)
                out, lse = returned if isinstance(returned, (tuple, list)) else (returned, None)
                if not isinstance(out, Tensor):
                    raise TypeError(f"the candidate returned {type(out).__name__}, not a tensor or (out, lse)")
                done.update(live=(leaves, out, lse), out=_plain(out), lse=_plain(lse), differentiable=out.requires_grad)
            leaves = done["live"][0]
            for name, x in zip("qkv", leaves, strict=True):
                if not torch.equal(as_bytes(x.cpu()), as_bytes(given[name])) and name not in result["written"]:
                    result["written"].append(name)
        after = _versions(job["call"].get("mask_mod"))
        # a tensor that the mask made during the call is new: any write to it came from outside
        if any(version != (before[key][1] if key in before else 0) for key, (_, version) in after.items()):
            result["written"].append("mask")

    def backward(self, given: dict, done: dict) -> None:
        """Backward through out, and through lse too when it is differentiable and the case has a
        gradient for it.
        """
        leaves, out, lse = done["live"]
        roots, grads = [out], [given["do"].to(out)]
        b, h, s = given["dlse"].shape
        if isinstance(lse, Tensor) and lse.requires_grad and given["use_dlse"]:
            dlse = given["dlse"].to(lse)
            if lse.shape in ((b, h, s), (b, s, h)):
                roots.append(lse)
                grads.append(dlse if lse.shape == (b, h, s) else dlse.transpose(1, 2))
                done["dlse_used"] = True
        if out.requires_grad:
            torch.autograd.backward(roots, [g.expand_as(x) for g, x in zip(grads, roots, strict=True)])
        done.update({f"d{name}": _plain(x.grad) for name, x in zip("qkv", leaves, strict=True)})


def _plain(x: Any) -> Any:
    return x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else None


def _versions(mask: Any) -> dict[int, tuple[Tensor, int]]:
    """Tensors that a mask function holds, and how often each was written: inputs too, so nobody
    may.
    """
    cells = [cell.cell_contents for cell in getattr(mask, "__closure__", None) or ()]
    return {id(x): (x, x._version) for x in _tensors([cells, list(getattr(mask, "args", ()))])}


def _describe(error: BaseException) -> dict[str, Any]:
    at, tb = None, error.__traceback__
    while tb is not None:
        at = candidate_line(tb.tb_frame) and (tb.tb_frame.f_code.co_filename, tb.tb_lineno, tb.tb_frame.f_code.co_name)
        if at and not at[0].startswith(SKIPPED):
            line = at
        tb = tb.tb_next
    text = "".join(traceback.format_exception(error))[-4000:]
    return {
        "type": type(error).__name__,
        "text": str(error)[:600],
        "line": locals().get("line"),
        "traceback": text,
        "refused": isinstance(error, NotImplementedError),
    }


# ------------------------------------------------------------------------------------------ workers

# Imports torch once and forks on request; not ringref, which somebody may be editing. It never
# becomes a rank itself.
NURSERY = """
import os, signal, sys
import cloudpickle, torch, torch._dynamo, torch.distributed.tensor, torch.multiprocessing.reductions
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
while line := sys.stdin.buffer.readline():
    if os.fork() == 0:
        port, key, rank, home = line.decode().split(None, 3)
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        sys.path.insert(0, home.strip())
        from ringref.sanitizer import serve
        serve(int(port), key, int(rank))
        os._exit(0)
"""
_nursery: subprocess.Popen | None = None


def _fork(line: str) -> None:
    global _nursery
    if _nursery is None or _nursery.poll() is not None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        _nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd="/"
        )
        atexit.register(_nursery.kill)
        _nursery.stdout.readline()
    _nursery.stdin.write(line.encode() + b"\n")
    _nursery.stdin.flush()


def serve(port: int, key: str, rank: int) -> None:
    """A worker's life: take cases from the parent, run them, answer; a second thread answers when
    this one cannot.
    """
    torch.set_num_threads(1)
    lines = []
    for what in ("work", "talk"):
        lines.append(connection.Client(("127.0.0.1", port), authkey=key.encode()))
        lines[-1].send((rank, what, os.getpid()))
    work, talk = lines
    main = threading.get_ident()

    def answer() -> None:
        try:
            while talk.recv():
                talk.send_bytes(pickle.dumps(LEDGER.dump(main)))
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone

    threading.Thread(target=answer, daemon=True).start()
    setup = pickle.loads(work.recv_bytes())
    sys.path[:] = setup["path"] + [p for p in sys.path if p not in setup["path"]]
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(setup["size"])})
    if os.path.isdir(setup["cwd"]):
        os.chdir(setup["cwd"])
    runner = Runner(rank, dist.TCPStore("127.0.0.1", setup["store"], is_master=False), setup["backend"])
    candidates: dict[int, Any] = {}
    while True:
        try:
            job = pickle.loads(work.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        work.send_bytes(pickle.dumps(_run_job(runner, job, candidates)))


def _run_job(runner: Runner, job: dict, candidates: dict[int, Any]) -> dict[str, Any]:
    try:
        if job["fn"] is not None:
            candidates.clear()
            importlib.invalidate_caches()
            candidates[job["fn_id"]] = cloudpickle.loads(job["fn"])
        if isinstance(job["call"], bytes):
            job["call"] = cloudpickle.loads(job["call"])
    except Exception as error:
        return {"steps": [], "error": _describe(error), "written": [], "clean": True} | Ledger().dump()
    return runner.run(candidates[job["fn_id"]], job)


class Crew:
    """The processes of one world size, each one rank."""

    def __init__(self, world: int, store: Any, backend: str):
        key, home = secrets.token_hex(16), os.path.dirname(HERE)
        self.work, self.talk, self.pids = {}, {}, {}
        self.sent_fn, self.groups, self.epoch = None, None, 0
        with connection.Listener(("127.0.0.1", 0), backlog=4 * world, authkey=key.encode()) as door:
            for rank in range(world):
                _fork(f"{door.address[1]} {key} {rank} {home}")
            for _ in range(2 * world):
                line = door.accept()
                rank, what, self.pids[rank] = line.recv()
                getattr(self, what)[rank] = line
        setup = {"path": [p or os.getcwd() for p in sys.path], "cwd": os.getcwd(), "size": world}
        setup |= {"store": store.port, "backend": backend}
        for rank in range(world):
            self.work[rank].send_bytes(pickle.dumps(setup))

    def close(self) -> None:
        """End every process."""
        for rank, pid in self.pids.items():
            self.work[rank].close()
            self.talk[rank].close()
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def ask(self, ranks: list[int]) -> dict[int, dict]:
        """What these ranks are doing, from the thread that is not busy with the case."""
        answers: dict[int, dict] = {}
        for rank in ranks:
            try:
                self.talk[rank].send(True)
                silent = not self.talk[rank].poll(5.0)
                answers[rank] = Ledger().dump() if silent else pickle.loads(self.talk[rank].recv_bytes())
            except (EOFError, OSError):
                answers[rank] = Ledger().dump()
        return answers


class Pool:
    """Worker processes on this machine for worlds of up to `size` ranks, started when first needed.

    One pool serves many sweeps. A process keeps its rank and its world size for life, as any real
    one does (published code caches both), so there is a crew for each world size; a crew is
    replaced only after a hang or a crash.

    Usage: `with Pool(8) as pool: results = pool.run(fn, jobs, deadline=30)`; `jobs` maps a rank to
    its part of a case.
    """

    def __init__(self, size: int = 8, backend: str = "gloo"):
        self.size, self.backend, self.epoch = size, backend, 0
        self.crews: dict[int, Crew] = {}
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End every worker."""
        while self.crews:
            self.crews.popitem()[1].close()

    def run(self, fn: bytes, jobs: dict[int, dict], deadline: float = 30.0) -> dict[int, dict[str, Any]]:
        """Run one case on ranks 0 … len(jobs)−1; every rank's result, or what it was waiting for
        when it hung.
        """
        world = len(jobs)
        if world > self.size:
            raise ValueError(f"jobs: {world} ranks on a pool of {self.size}")
        if world not in self.crews:
            self.crews[world] = Crew(world, self.store, self.backend)
        crew = self.crews[world]
        if crew.groups != jobs[0]["groups"]:
            # new process groups need a name that the store has not seen
            self.epoch += 1
            crew.groups, crew.epoch = jobs[0]["groups"], self.epoch
        for rank, job in jobs.items():
            job = job | {"fn": fn if crew.sent_fn != fn else None, "fn_id": 0, "epoch": crew.epoch}
            crew.work[rank].send_bytes(cloudpickle.dumps(job))
        crew.sent_fn = fn
        results = self._collect(crew, list(jobs), deadline)
        if any("hang" in r or "crash" in r for r in results.values()):
            self.crews.pop(world).close()
        elif not all(r["clean"] for r in results.values()):
            crew.groups = None  # the groups hold messages that nobody took: the next case gets new ones
        return dict(sorted(results.items()))

    def _collect(self, crew: Crew, ranks: list[int], deadline: float) -> dict[int, dict[str, Any]]:
        results: dict[int, dict] = {}
        last, seen, started = None, time.monotonic(), time.monotonic()
        while len(results) < len(ranks):
            lines = {crew.work[r]: r for r in ranks if r not in results}
            for line in connection.wait(list(lines), timeout=0.2):
                try:
                    results[lines[line]] = pickle.loads(line.recv_bytes())
                except (EOFError, OSError):
                    results[lines[line]] = {"steps": [], "crash": True, "error": None, "ops": [], "written": []}
                seen = time.monotonic()
            if len(results) < len(ranks) and time.monotonic() - seen > 0.5:
                seconds = time.monotonic() - started
                now = crew.ask([r for r in ranks if r not in results])
                if seconds > deadline or (last is not None and stuck(now, last, results)):
                    gone = {"hang": seconds, "steps": [], "error": None, "written": []}
                    results |= {rank: facts | gone for rank, facts in now.items()}
                last, seen = now, time.monotonic()
        return results


def stuck(now: dict[int, dict], before: dict[int, dict], done: dict[int, dict]) -> bool:
    """True when every unfinished rank waits and nobody can ever be served: a deadlock, known
    without a clock.
    """
    if set(now) != set(before) or any(now[r]["waiting"] is None for r in now):
        return False
    if any(now[r]["ticks"] != before[r]["ticks"] for r in now):
        return False
    known = {r: _index(facts["ops"]) for r, facts in (now | done).items()}
    return not any(_served(rank, now[rank]["waiting"], known) for rank in now)


def _index(ops: list[dict]) -> set[tuple]:
    return {
        (op["group"], op["kind"] if op["peer"] is not None else "all", op["peer"], op["tag"], op["seq"]) for op in ops
    }


def _served(rank: int, op: dict, known: dict[int, set]) -> bool:
    if op["peer"] is None:
        key = (op["group"], "all", None, 0, op["seq"])
        return all(key in known.get(r, ()) for r in op["members"])
    other = "send" if op["kind"] == "recv" else "recv"
    return (op["group"], other, rank, op["tag"], op["seq"]) in known.get(op["peer"], ())


class Ranks:
    """The pool's `run` for ranks that `torchrun` started: rank 0 leads, the others follow until
    told to stop.
    """

    def __init__(self, backend: str = "gloo"):
        store, self.rank, self.size = next(dist.rendezvous("env://"))
        self.store, self.backend, self.epoch, self.turn, self.shape = store, backend, 0, 0, None
        self.runner = Runner(self.rank, dist.PrefixStore("oracle", store), backend)
        self.candidates: dict[int, Any] = {}
        torch.set_num_threads(1)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let the followers go, and wait for them: this rank hosts the store that they talk to."""
        if self.rank == 0:
            for rank in range(1, self.size):
                self.store.set(f"job/{self.turn}/{rank}", pickle.dumps(None))
            for rank in range(1, self.size):
                self.store.get(f"bye/{rank}")

    def follow(self) -> None:
        """A rank other than 0: run what rank 0 sends."""
        while (job := pickle.loads(self.store.get(f"job/{self.turn}/{self.rank}"))) is not None:
            answer = self._guarded(job)
            self.store.set(f"done/{self.turn}/{self.rank}", pickle.dumps(answer))
            self.turn += 1
        self.store.set(f"bye/{self.rank}", b"1")

    def run(self, fn: bytes, jobs: dict[int, dict], deadline: float = 30.0) -> dict[int, dict[str, Any]]:
        """As `Pool.run`. A hang ends the job, because only the launcher could start these processes
        again.
        """
        if self.shape != (jobs[0]["world"], jobs[0]["groups"]):
            self.shape, self.epoch = (jobs[0]["world"], jobs[0]["groups"]), self.epoch + 1
        jobs = {r: jobs[r] | {"fn": fn, "fn_id": 0, "epoch": self.epoch, "deadline": deadline} for r in jobs}
        for rank in range(1, self.size):
            idle = {"idle": True}
            self.store.set(f"job/{self.turn}/{rank}", cloudpickle.dumps(jobs.get(rank, idle)))
        results = {0: self._guarded(jobs[0])}
        for rank in range(1, self.size):
            answer = pickle.loads(self.store.get(f"done/{self.turn}/{rank}"))
            if rank in jobs:
                results[rank] = answer
        self.turn += 1
        if not all(r["clean"] for r in results.values()):
            self.shape = None
        return results

    def _guarded(self, job: dict) -> dict[str, Any]:
        if "idle" in job:
            return {}
        main = threading.get_ident()

        def give_up() -> None:
            facts = LEDGER.dump(main)
            op = facts["waiting"]
            doing = f"waiting in {op['kind']} with rank {op['peer']}" if op else "computing"
            print(
                f"ringref check: rank {self.rank} hung, {doing}, at {where(facts['line'])}", file=sys.stderr, flush=True
            )
            os._exit(1)

        timer = threading.Timer(job["deadline"], give_up)
        timer.daemon = True
        timer.start()
        try:
            return _run_job(self.runner, job, self.candidates)
        finally:
            timer.cancel()
