"""Measure: speed, memory, overlap and length, each result checked against float64 before it is
timed.

`python -m ringref bench` runs on all GPUs of the machine (or a few CPU ranks), `torchrun … -m
ringref bench` on the ranks that there are. Times are medians after warm-up, of the slower rank,
between events on ranks that start together; inputs are larger than the cache. Every section prints
a table and writes `figures/data/SECTION-MACHINE-xP.json` with machine, versions, date, command.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import backends
from .collective import collective_attention
from .comm import ProcessRing
from .dense import dense_attention
from .dilated import dilated_attention
from .launch import from_env, launch
from .layout import Attended, Dilation, Shard, partition
from .memory import predicted
from .ring import ring_attention

LONGNET = Dilation([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])
BUDGET = 3.0  # times the error that PyTorch's own attention makes in the same dtype on the same inputs
LSE_BUDGET = 1e-5  # lse is float32 whatever the inputs are


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ringref bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--ranks", type=int, help="default: every GPU, or 2 CPU ranks")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per rank of the ring section")
    parser.add_argument("--dilated-tokens", nargs="+", type=int, help="tokens in all, dilated section")
    parser.add_argument("--longest", type=int, default=2**20, help="where the long section stops computing")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--data", type=Path, default=Path("figures/data"), help="where the JSON goes")
    args = parser.parse_args(argv)
    args.command = "python -m ringref bench " + " ".join(argv)
    gpus = torch.cuda.device_count()
    args.tokens = args.tokens or ([8192, 32768] if gpus else [256])
    args.dilated_compared = [x for x in args.dilated_tokens or [2**20] if x <= 2**20]
    args.dilated_tokens = args.dilated_tokens or ([2**i for i in range(15, 30)] if gpus else [8192])
    if dist.is_torchelastic_launched():
        return int(not _run(args, from_env()))
    p = args.ranks or gpus or 2
    return int(not all(launch(partial(_run, args), p, "nccl" if gpus >= p else "gloo")))


def _run(args: argparse.Namespace, ring: ProcessRing) -> bool:
    """Every section on one rank; true if all checks held."""
    torch.manual_seed(ring.rank)
    bench, good = Bench(args, ring), True
    for name in args.sections:
        rows = SECTIONS[name](bench)
        good &= all(row.get("checked", True) for row in rows)
        if ring.rank == 0 and rows:
            bench.report(name, rows)
    return good


class Bench:
    """One rank's clock, allocator and inputs."""

    def __init__(self, args: argparse.Namespace, ring: ProcessRing):
        self.args, self.ring = args, ring
        self.cuda = torch.cuda.is_available() and torch.cuda.device_count() >= ring.size
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.machine = torch.cuda.get_device_name() if self.cuda else f"{platform.machine()} CPU"

    def inputs(self, s: int, h: int, d: int) -> tuple[list[Tensor], Tensor]:
        """q, k, v that need gradients, and dO: b s h d with b = 1."""
        q, k, v, dout = (torch.randn(1, s, h, d, device=self.device, dtype=self.dtype) for _ in range(4))
        return [x.requires_grad_() for x in (q, k, v)], dout

    def synchronise(self) -> None:
        self.ring.announce([0])
        if self.cuda:
            torch.cuda.synchronize()

    def slowest(self, x: float) -> float:
        return max(row[0] for row in self.ring.announce([int(x * 1e6)])) / 1e6

    def milliseconds(self, step: Callable[[], Any], repeats: int | None = None) -> tuple[float, float]:
        """Median over repeats of the slower rank's time, and the spread (max − min) around it.

        Steps are queued one behind the other, as in training, each between two events of its own.
        """
        marks, count = [], (repeats or self.args.repeats) + 3
        for i in range(count):
            if i in (0, 3):
                self.synchronise()
            marks.append(self._mark())
            step()
        marks.append(self._mark())
        self.synchronise()
        times = [self._between(a, b) for a, b in zip(marks[3:], marks[4:], strict=False)]
        every = self.ring.announce([int(x * 1e6) for x in times])
        slower = [max(row) / 1e6 for row in zip(*every, strict=True)]
        return statistics.median(slower), max(slower) - min(slower)

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) if self.cuda else 1e3 * (b - a)

    def peak(self, step: Callable[[], Any]) -> int | None:
        """Peak bytes above what was allocated before, of the fuller rank (None on the CPU)."""
        if not self.cuda:
            return None
        self.synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return int(self.slowest(torch.cuda.max_memory_allocated() - before))

    def measure(self, fn: Callable, inputs: list[Tensor], dout: Tensor, scope=nullcontext) -> dict[str, Any]:
        """Times and peaks of fn(q, k, v) -> out, forward and forward+backward; peaks in units of
        q's shard.
        """
        unit = inputs[0].nbytes

        def forward():
            with torch.no_grad(), scope():
                fn(*inputs)

        def both():
            for x in inputs:
                x.grad = None
            with scope():
                fn(*inputs).backward(dout)

        row = {}
        for name, step in (("forward", forward), ("both", both)):
            row[f"{name}_ms"], row[f"{name}_spread_ms"] = self.milliseconds(step)
            for x in inputs:
                x.grad = None
            peak = self.peak(step)
            row[f"peak_{name}_q"] = None if peak is None else peak / unit
        return row

    def plain(self, causal: bool) -> Callable:
        """PyTorch's attention on one device: cuDNN on a GPU."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def fn(q, k, v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.cuda else nullcontext():
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

        return fn

    # ------------------------------------------------------------------------------------ the judge

    def judge(
        self, fns: dict[str, Callable], shard: Shard, causal: bool, inputs: list[Tensor], dout: Tensor
    ) -> dict[str, dict]:
        """Worst error over heads of out, lse, dq, dk, dv on this rank's rows, against float64, and
        the budgets.

        Head by head and in query chunks: each rank computes its own query rows against all keys,
        and the partial dK, dV are summed over ranks.
        """
        ring, s = self.ring, inputs[0].shape[1]
        results = {}
        for name, fn in fns.items():
            for x in inputs:
                x.grad = None
            out = fn(*inputs)
            out, lse = out if isinstance(out, Attended) else (out, None)
            out.backward(dout)
            results[name] = [out.detach(), None if lse is None else lse.detach(), *(x.grad.clone() for x in inputs)]
            del out
        tensors = ("out", "lse", "dq", "dk", "dv")
        worst = {name: dict.fromkeys(tensors, 0.0) for name in (*fns, "plain")}
        here = Shard(shard.positions, None, torch.cat(ring.share(shard.positions, [s] * ring.size)))
        order = here.kv_positions.argsort().to(self.device)
        for head in range(inputs[0].shape[2]):
            q, k, v, do = (x.detach()[:, :, head : head + 1] for x in (*inputs, dout))
            every = [torch.cat(ring.gather(x.contiguous(), [x.shape] * ring.size), 1) for x in (q, k, v, do)]
            wide = [x.double().requires_grad_() for x in (q, *every[1:3])]
            out, lse = dense_attention(*wide, causal=causal, shard=here, q_chunk=512)
            out.backward(do.double())
            grads = [ring.reduce([(y.contiguous(),) for y in x.grad.split(s, 1)])[0] for x in wide[1:]]
            truth = [out.detach(), lse.detach(), wide[0].grad, *grads]
            whole = [x[:, order].requires_grad_() for x in every[:3]]
            plain = self.plain(causal)(*whole)
            plain.backward(every[3][:, order])
            rows = shard.positions.to(self.device)
            one = slice(head, head + 1)
            given = {
                name: [x if x is None else x[:, one] if i == 1 else x[:, :, one] for i, x in enumerate(result)]
                for name, result in results.items()
            }
            given["plain"] = [plain.detach()[:, rows], None, *(x.grad[:, rows] for x in whole)]
            for name, values in given.items():
                for tensor, value, true in zip(tensors, values, truth, strict=True):
                    if value is not None:
                        error = float((value.double() - true).norm() / true.norm())
                        worst[name][tensor] = max(worst[name][tensor], error if error == error else float("inf"))
        worst = {name: {x: self.slowest(e * 1e3) / 1e3 for x, e in errors.items()} for name, errors in worst.items()}
        budgets = {x: LSE_BUDGET if x == "lse" else BUDGET * worst["plain"][x] for x in tensors}
        return {
            name: {"errors": errors, "budgets": budgets, "checked": all(errors[x] <= budgets[x] for x in tensors)}
            for name, errors in worst.items()
            if name != "plain"
        }

    # ----------------------------------------------------------------------------------- the report

    def report(self, section: str, rows: list[dict]) -> None:
        """Print a table and write the JSON; rank 0 only."""
        columns = list(dict.fromkeys(c for row in rows for c, x in row.items() if not isinstance(x, (dict, list))))
        table = Table(title=f"{section} on {self.ring.size} × {self.machine}", title_justify="left")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(
                *(f"{row.get(c):.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
            )
        Console(width=180).print(table)
        slug = "-".join(self.machine.lower().removeprefix("nvidia ").split()[:2])
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        if self.cuda:
            versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        record = {
            "section": section,
            "machine": f"{self.ring.size} × {self.machine}",
            "versions": versions,
            "date": datetime.date.today().isoformat(),
            "command": self.args.command,
            "rows": rows,
        }
        self.args.data.mkdir(parents=True, exist_ok=True)
        (self.args.data / f"{section}-{slug}-x{self.ring.size}.json").write_text(json.dumps(record, indent=1) + "\n")
        sys.stdout.flush()


# ----------------------------------------------------------------------------------------- sections


def ring_section(bench: Bench) -> list[dict]:
    """Ring and collective beside the ideal (one device's time for the whole work, divided) and
    PyTorch's context_parallel.
    """
    args, ring, rows = bench.args, bench.ring, []
    for s in args.tokens:
        shard = partition(s * ring.size, ring, "zigzag")
        for causal in (True, False):
            whole = bench.measure(bench.plain(causal), *bench.inputs(s * ring.size, args.heads, args.head_dim))
            ideal = {x: whole[f"{x}_ms"] / ring.size for x in ("forward", "both")}
            facts = {"tokens_per_gpu": s, "p": ring.size, "causal": causal}
            rows.append({**facts, "method": "ideal", "forward_ms": ideal["forward"], "both_ms": ideal["both"]})
            inputs, dout = bench.inputs(s, args.heads, args.head_dim)
            ours = {name: partial(fn, causal=causal, shard=shard) for name, fn in METHODS.items()}
            verdicts = bench.judge(ours, shard, causal, inputs, dout)
            runs = {name: (partial(_out, fn), nullcontext) for name, fn in ours.items()}
            runs |= _context_parallel(bench, causal)
            for name, (fn, scope) in runs.items():
                try:
                    row = bench.measure(fn, inputs, dout, scope)
                except (RuntimeError, TypeError) as error:
                    rows.append({**facts, "method": name, "failed": str(error).splitlines()[0][:100]})
                    continue
                share = {f"share_{x}": 100 * ideal[x] / row[f"{x}_ms"] for x in ideal}
                rows.append({**facts, "method": name, **row, **share, **verdicts.get(name, {})})
            if ring.size > 1:  # the price of the ring's own code where nothing travels
                alone = partial(_out, partial(ring_attention, causal=causal))
                for name, fn in (("plain", bench.plain(causal)), ("ring", alone)):
                    rows.append({**facts, "p": 1, "method": f"{name}, one rank", **bench.measure(fn, inputs, dout)})
    return rows


def _out(fn: Callable, *inputs: Tensor) -> Tensor:
    return fn(*inputs).out


def _context_parallel(bench: Bench, causal: bool) -> dict[str, tuple[Callable, Callable]]:
    """PyTorch's own context parallelism on this process group; its head-tail load balance is the
    zigzag layout.
    """
    if not bench.cuda or bench.ring.size == 1:
        return {}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import _attention, context_parallel

    mesh = init_device_mesh("cuda", (bench.ring.size,))

    def scope(method):
        _attention.set_rotate_method(method)
        return context_parallel(mesh)

    names = {"allgather": "context_parallel all-gather", "alltoall": "context_parallel all-to-all"}
    return {name: (bench.plain(causal), partial(scope, method)) for method, name in names.items()}


class Impatient(ProcessRing):
    """A ring that waits for every message as soon as it is posted: what overlap is worth."""

    def exchange(self, outgoing, into):
        posted = super().exchange(outgoing, into)
        posted.wait()
        return posted


def overlap_section(bench: Bench) -> list[dict]:
    """Message and compute kernels of one training step from a profiler trace; exposed is message
    time with no compute under it.
    """
    args, ring, rows = bench.args, bench.ring, []
    if not bench.cuda or ring.size == 1:
        return rows
    from torch.profiler import ProfilerActivity, profile

    for s in args.tokens:
        inputs, dout = bench.inputs(s, args.heads, args.head_dim)
        row = {"tokens_per_gpu": s, "p": ring.size}
        for name, kind in (("exposed_percent", ProcessRing), ("exposed_percent_waits_first", Impatient)):
            shard = partition(s * ring.size, kind(ring.group), "zigzag")
            for _ in range(3):
                ring_attention(*inputs, causal=True, shard=shard).out.backward(dout)
            bench.synchronise()
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                ring_attention(*inputs, causal=True, shard=shard).out.backward(dout)
                torch.cuda.synchronize()
            kernels = sorted(
                (e.time_range.start, e.time_range.end, e.name) for e in trace.events() if e.device_type.name == "CUDA"
            )
            kernels = [k for k in kernels if not k[2].startswith(("Memcpy", "Memset"))]
            exposed, step = exposed_time(kernels)
            row[name] = bench.slowest(100 * exposed / step)
            if kind is ProcessRing:
                row["kernels"] = [
                    {"name": x[:60], "kind": "message" if "nccl" in x.lower() else "compute",
                     "start_us": a - kernels[0][0], "duration_us": b - a} for a, b, x in kernels
                ]  # fmt: skip
        rows.append(row)
    return rows


def exposed_time(kernels: list[tuple[float, float, str]]) -> tuple[float, float]:
    """How long message kernels ran with no compute kernel beside them, and the step's length."""
    edges = []
    for start, end, name in kernels:
        message = "nccl" in name.lower()
        edges += [(start, message, 1), (end, message, -1)]
    running, exposed, last = {True: 0, False: 0}, 0.0, None
    for at, message, change in sorted(edges):
        if running[True] and not running[False]:
            exposed += at - last
        running[message] += change
        last = at
    return exposed, max(k[1] for k in kernels) - min(k[0] for k in kernels)


def long_section(bench: Bench) -> list[dict]:
    """Peak bytes for n doubling, computed up to `--longest` tokens, then allocated only, until it
    does not fit.
    """
    args, ring, rows = bench.args, bench.ring, []
    if not bench.cuda:
        return rows
    chunked = partial(ring_attention, q_chunk=8192)
    for name, fn in (
        (*METHODS.items(), ("ring, q_chunk 8192", chunked)) if ring.size > 1 else (("ring", ring_attention),)
    ):
        n = 2**17
        while True:
            shard = partition(n, ring, "zigzag")
            computed = n <= args.longest
            row = {"p": ring.size, "method": name, "n": n, "computed": computed}
            try:
                inputs, dout = bench.inputs(n // ring.size, args.heads, args.head_dim)
                with nullcontext() if computed else _allocations_only():
                    took: list[float] = []

                    def step(fn=fn, inputs=inputs, dout=dout, shard=shard, took=took):
                        start = time.perf_counter()
                        fn(*inputs, causal=True, shard=shard).out.backward(dout)
                        torch.cuda.synchronize()
                        took.append(time.perf_counter() - start)

                    row["peak_bytes"] = bench.peak(step)
                row["ms"] = 1e3 * took[0] if computed else None
                row["fits"] = True
            except torch.OutOfMemoryError:
                row["fits"] = False
            row["fits"] = all(x[0] for x in ring.announce([int(row["fits"])]))
            row["predicted_bytes"] = sum(
                predicted(
                    name.split(",")[0],
                    n,
                    ring.size,
                    args.heads,
                    args.head_dim,
                    dtype=bench.dtype,
                    c=8192 if "q_chunk" in name else None,
                    kernel="cudnn",
                ).values()
            )
            rows.append(row)
            inputs = dout = None
            torch.cuda.empty_cache()
            if not row["fits"]:
                break
            n *= 2
    return rows


class _allocations_only:
    """Replace the block's kernels by their allocations, so that what fits is known without
    computing it.
    """

    def __enter__(self):
        self.kept = backends.forward, backends.backward

        def forward(q, k, v, seen, call):
            return Attended(torch.empty_like(q), q.new_empty(q.shape[:4], dtype=torch.float32))

        def backward(dout, dlse, q, k, v, out, lse, seen, call):
            q.new_empty(q.shape, dtype=torch.float32)  # cuDNN's own accumulator of dQ
            return tuple(torch.empty_like(x) for x in (q, k, v))

        backends.forward, backends.backward = forward, backward

    def __exit__(self, *_):
        backends.forward, backends.backward = self.kept


def dilated_section(bench: Bench) -> list[dict]:
    """LongNet's setting: h = 12, d = 64, causal, w = 2k … 32k, r = 1, 2, 4, 6, 12, for n doubling
    until it does not fit.

    On several ranks also with a last branch over the whole sequence, which crosses them; at the
    longest n that `--dilated-tokens` names, the head-grouped convention beside its best-known port.
    """
    rows, ring, p = [], bench.ring, bench.ring.size
    for n in bench.args.dilated_tokens:
        over_all = Dilation([*LONGNET.segment_lengths, n], [*LONGNET.dilation_rates, 64])
        kinds = {"LongNet": LONGNET, "LongNet + w = n, r = 64": over_all if p > 1 and n // p >= 64 else None}
        grouped = Dilation(LONGNET.segment_lengths, LONGNET.dilation_rates, heads="grouped")
        kinds["grouped"] = grouped if n == max(bench.args.dilated_compared) and p == 1 else None
        runs = {x: partial(dilated_attention, causal=True, dilation=y) for x, y in kinds.items() if y is not None}
        for name, fn in runs.items():
            shard = partition(n, ring, "contiguous")
            rows.append({"n": n, "p": p, "method": name, **_dilated(bench, n // p, partial(fn, shard=shard), name)})
        peer = _dilated_peer(grouped) if kinds["grouped"] else None
        if peer:
            rows.append(
                {"n": n, "p": p, "method": "dilated-attention-pytorch", **_dilated(bench, n // p, peer, "peer")}
            )
        if not all(row["fits"] for row in rows):
            break
    return rows


def _dilated(bench: Bench, s: int, fn: Callable, name: str) -> dict:
    row: dict[str, Any] = {}
    try:
        inputs, dout = bench.inputs(s, 12, 64)
        whole = s * bench.ring.size == max(bench.args.dilated_compared, default=0) and s >= 32768
        if name == "LongNet" and whole:
            row = _judge_windows(bench, fn, inputs, dout)
        before = bench.ring.traffic.received
        fn(*inputs)
        row["received_forward_bytes"] = bench.ring.traffic.received - before
        row |= bench.measure(fn if name == "peer" else partial(_out, fn), inputs, dout)
        row["fits"] = True
    except torch.OutOfMemoryError:
        row["fits"] = False
    row["fits"] = all(x[0] for x in bench.ring.announce([int(row["fits"])]))
    inputs = dout = None
    if bench.cuda:
        torch.cuda.empty_cache()
    return row


def _dilated_peer(grouped: Dilation) -> Callable | None:
    try:
        from dilated_attention_pytorch.dilated_attention import DilatedAttention
    except ImportError:
        return None
    return partial(DilatedAttention(list(grouped.segment_lengths), list(grouped.dilation_rates)), is_causal=True)


def _judge_windows(bench: Bench, fn: Callable, inputs: list[Tensor], dout: Tensor) -> dict:
    """float64 on whole windows of the largest segment: the first, a random one and the last;
    gradients included.
    """
    w, s = max(LONGNET.segment_lengths), inputs[0].shape[1]
    out, lse = fn(*inputs)
    out.backward(dout)
    given = [out.detach(), lse.detach().transpose(1, 2), *(x.grad for x in inputs)]
    windows = {0, int(torch.randint(s // w, ())), s // w - 1}
    worst = dict.fromkeys(("out", "lse", "dq", "dk", "dv"), 0.0)
    plain = dict(worst)
    for i in windows:
        rows = slice(i * w, (i + 1) * w)
        truth = None
        for dtype in (torch.float64, bench.dtype):
            few = [x.detach()[:, rows].to(dtype).requires_grad_() for x in inputs]
            out, lse = dense_attention(*few, causal=True, dilation=LONGNET, q_chunk=256)
            out.backward(dout[:, rows].to(dtype))
            values = [out.detach(), lse.detach().transpose(1, 2), *(x.grad for x in few)]
            truth = values if truth is None else truth
            for into, ours in ((worst, [x[:, rows] for x in given]), (plain, values)):
                for name, value, true in zip(worst, ours, truth, strict=True):
                    into[name] = max(into[name], float((value.double() - true).norm() / true.norm()))
    # `plain` is the definition in this dtype, whose products are float32: the dtype's own rounding,
    # no more
    budgets = {x: LSE_BUDGET if x == "lse" else BUDGET * max(plain[x], torch.finfo(bench.dtype).eps / 2) for x in worst}
    worst = {x: bench.slowest(e * 1e3) / 1e3 for x, e in worst.items()}
    return {"errors": worst, "budgets": budgets, "checked": all(worst[x] <= budgets[x] for x in worst)}


METHODS = {"ring": ring_attention, "collective": collective_attention}
SECTIONS = {"ring": ring_section, "overlap": overlap_section, "dilated": dilated_section, "long": long_section}
