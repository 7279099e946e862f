"""Measure: speed, memory, overlap and length; methods are checked against float64 before they are timed.

`python -m ringref bench` runs on all GPUs of the machine (or a few CPU ranks), `torchrun … -m ringref bench` on the
ranks that there are. Times are medians after warm-up, of the slower rank, between events on ranks that start together.
Every section prints its rows as they are measured and writes them to `figures/data/SECTION-MACHINE-xP.json` with
machine, versions, date, command, and prints a table at the end.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from .. import collective_attention, dense_attention, dilated_attention, ring_attention
from ..comm.launch import MOST, from_env, launch
from ..comm.process import ProcessRing
from ..comm.ring import Pending, Unheard
from ..comm.simulate import simulate
from ..engine import kernels
from ..shard import Attended, Dilation, Shard, partition, wide
from .memory import measured, predicted, unheard
from .shell import folder, whole

METHODS = {"ring": ring_attention, "collective": collective_attention}
HEADS, HEAD_DIM, REPEATS = 16, 128, 10
BUDGET = 3.0  # times the error that the definition makes in the same dtype on the same inputs
LSE_BUDGET = 1e-5  # lse is float32 whatever the inputs are


def main(argv):
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(prog="python -m ringref bench", description=__doc__.split("\n\n")[0])
    add = partial(parser.add_argument, type=whole(1))
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    add("--ranks", default=gpus or 2, type=whole(1, MOST), help="default: every GPU, or 2 CPU ranks")
    add("--tokens", nargs="+", default=[8192, 32768] if gpus else [256], help="per rank, of ring and overlap")
    lengths = [2**i for i in range(15, 30)] if gpus else [1024]
    add("--dilated-tokens", nargs="+", default=lengths, type=whole(64), help="in all")
    add("--longest", default=2**20 if gpus else 512, type=whole(0), help="tokens beyond which long only allocates")
    add("--data", default="figures/data", type=folder, help="where the JSON goes")
    args = parser.parse_args(argv)
    args.command = "python -m ringref bench " + " ".join(argv)
    if dist.is_torchelastic_launched():
        return int(not _run(args, from_env()))
    return int(not all(launch(partial(_run, args), args.ranks, "nccl" if gpus >= args.ranks else "gloo")))


def _run(args, ring):
    """Every section on one rank; true if all checks held."""
    torch.manual_seed(ring.rank)
    bench, good = Bench(ring), True
    for name in args.sections:
        rows = []
        for row in SECTIONS[name](bench, args):
            rows.append(row)
            if ring.rank == 0:
                _record(bench, name, rows, args)
            bench.say(f"{name}: {', '.join(f'{c} {x}' for c, x in _cells(row).items())}")
        good &= all(row.get("checked", True) for row in rows)
        if ring.rank == 0 and rows:
            _show(bench, name, rows)
    return good


def _record(bench, section, rows, args):
    """Write the rows that there are, so that a run that is ended loses none."""
    record = {"section": section, "machine": bench.machine, "versions": bench.versions()}
    record |= {"command": args.command, "date": datetime.date.today().isoformat()}
    record |= {"transport": bench.ring.transport, "rows": rows}
    slug = "-".join(bench.device_name.lower().removeprefix("nvidia ").split()[:2])
    (args.data / f"{section}-{slug}-x{bench.ring.size}.json").write_text(json.dumps(record, indent=1) + "\n")


def _show(bench, section, rows):
    """Print a table."""
    cells = [_cells(row) for row in rows]
    columns = list(dict.fromkeys(c for row in cells for c in row))
    table = Table(*columns, title=f"{section} on {bench.machine}", title_justify="left")
    for row in cells:
        table.add_row(*(row.get(c, "") for c in columns))
    Console(width=180).print(table)


def _cells(row):
    """What of a row is shown."""
    shown = {c: x for c, x in row.items() if not isinstance(x, (dict, list))}
    return {c.replace("_", " "): f"{x:.4g}" if isinstance(x, float) else str(x) for c, x in shown.items()}


class Bench:
    """One rank's clock, allocator and inputs."""

    def __init__(self, ring):
        self.ring, self.cuda = ring, torch.cuda.device_count() >= ring.size
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.device_name = torch.cuda.get_device_name() if self.cuda else f"{platform.machine()} CPU"
        self.machine = f"{ring.size} × {self.device_name}"

    def say(self, what):
        """A line of progress, once."""
        if self.ring.rank == 0:
            print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)

    def inputs(self, s, h, d):
        """q, k, v that need gradients, and dO: b s h d with b = 1."""
        q, k, v, dout = (torch.randn(1, s, h, d, device=self.device, dtype=self.dtype) for _ in range(4))
        return [x.requires_grad_() for x in (q, k, v)], dout

    def worst(self, *values):
        """Each value's largest over the ranks; NaN where any is."""
        mine = torch.tensor(values, dtype=torch.float64).view(torch.int64)
        every = self.ring.share(mine, [len(mine)] * self.ring.size)
        return torch.stack(every).view(torch.float64).amax(0).tolist()

    def synchronise(self):
        self.ring.announce([0])
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, step):
        """Median over repeats of the slower rank's time, and the spread (max − min) around it.

        Steps are queued one behind the other, as in training, each between two marks of its own.
        """
        for _ in range(3):
            step()
        self.synchronise()
        marks = [self._mark()]
        for _ in range(REPEATS):
            step()
            marks.append(self._mark())
        self.synchronise()
        pairs = zip(marks, marks[1:], strict=False)
        slower = self.worst(*(a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in pairs))
        return statistics.median(slower), max(slower) - min(slower)

    def host(self, step):
        """Seconds of a step on the host of the slower rank, when the device does not hold it up."""
        self.synchronise()
        start = time.perf_counter()
        for _ in range(REPEATS):
            step()
        (taken,) = self.worst((time.perf_counter() - start) / REPEATS)
        return taken

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def peak(self, step):
        """Bytes above what was there before, of the fuller rank."""
        self.synchronise()
        with measured(self.device) as usage:
            step()
        return int(self.worst(usage.peak)[0])

    def measure(self, fn, inputs, dout, captured=False):
        """Times, and peaks in units of q's shard, of fn(q, k, v) -> out, forward and forward+backward; also those of a
        CUDA graph's replay, if asked.
        """

        def forward():
            with torch.no_grad():
                return fn(*inputs)

        def both():
            return torch.autograd.grad(fn(*inputs), inputs, dout)

        row = {}
        for name, step in (("forward", forward), ("both", both)):
            row[f"{name}_ms"], row[f"{name}_spread_ms"] = self.milliseconds(step)
            row[f"peak_{name}_q"] = self.peak(step) / inputs[0].nbytes
            if captured:
                with self.captured(step) as replay:
                    row[f"{name}_captured_ms"] = self.milliseconds(replay)[0]
        return row

    @contextmanager
    def captured(self, step):
        """What replays a step that has run before: a CUDA graph, which the host launches in one go."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        yield graph.replay
        torch.cuda.synchronize()
        graph.reset()
        del found

    def plain(self, causal):
        """PyTorch's attention on one device: cuDNN on a GPU."""

        def fn(q, k, v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.cuda else nullcontext():
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

        return fn

    def versions(self):
        found = {"torch": torch.__version__, "python": platform.python_version()}
        if not self.cuda:
            return found
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return {**found, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": nccl}

    def attempt(self, row, run, method, h, d, **how):
        """The row with what run(inputs, dout) finds, if row["n"] tokens fit.

        Several ranks believe the prediction, for one that runs out of memory leaves the others waiting.
        """
        n, p, kernel = row["n"], self.ring.size, "cudnn" if self.cuda else "cpu_flash"
        row["predicted_bytes"] = predicted(method, n, p, h, d, dtype=self.dtype, causal=True, kernel=kernel, **how)
        row["fits"] = True
        self.say(f"{row['method']}, {n} tokens: {row['predicted_bytes'] / 2**20:.0f} MiB above the inputs predicted")
        if self.cuda and p > 1:
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            inputs = 4 * n // p * h * d * self.dtype.itemsize
            row["fits"] = inputs + row["predicted_bytes"] < 0.95 * -self.worst(-free)[0]
        try:
            if row["fits"]:
                row |= run(*self.inputs(n // p, h, d))
        except torch.OutOfMemoryError as error:
            self.say(f"{row['method']}, {n} tokens: {error}")
            row["fits"] = False
        torch.cuda.empty_cache()
        return row


# ---------------------------------------------------------------------------------------- the judge


def _results(fn, inputs, dout):
    """Everything that can be wrong, all b s h d."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = fn(*inputs)
    grads = torch.autograd.grad(out, inputs, dout)
    found = dict(zip(("dq", "dk", "dv"), grads, strict=True), out=out.detach())
    lse = lse.detach().transpose(1, 2)[..., None]
    return {**found, "lse": lse.masked_fill(lse == -torch.inf, 0.0)}  # a query that saw nothing


def _errors(given, true):
    """Relative to the truth, of the worst head."""
    norm = partial(torch.linalg.vector_norm, dim=(1, 3))
    return {name: float((norm(x.double() - true[name]) / norm(true[name])).max()) for name, x in given.items()}


_SCORES, _CHUNK = 2**28, 2**24  # that the definition computes for a judgement, a head, in all and at a time


def _judged(bench, fn, shard, how, inputs, dout):
    """Against the definition in float64, on some of this rank's query rows, so that it takes as long for any n: dO is
    0 on the others, and dK and dV, whole, are these rows' alone.
    """
    ring, s, device = bench.ring, len(shard.positions), bench.device
    n = s * ring.size
    rows = torch.randperm(s)[: max(1, _SCORES // n)].sort().values
    some = torch.zeros_like(dout).index_copy_(1, rows.to(device), dout[:, rows])
    every = torch.cat(ring.share(shard.positions, [s] * ring.size))
    theirs = Shard(shard.positions[rows], None, every)
    define = partial(dense_attention, **how, shard=theirs, q_chunk=max(1, _CHUNK // n))
    q, k, v = (x.detach() for x in inputs)
    k, v = (torch.cat(ring.gather(x, [x.shape] * ring.size), 1) for x in (k, v))

    def defined(dtype):
        found = _results(define, [x.to(dtype) for x in (q[:, rows], k, v)], dout[:, rows].to(dtype))
        for name in ("dk", "dv"):  # a sum over the ranks' rows, and mine of it
            (found[name],) = ring.reduce([(x.to(dtype=wide(dtype), copy=True),) for x in found[name].split(s, 1)])
        found["dq"] = torch.zeros_like(q, dtype=found["dq"].dtype).index_copy_(1, rows.to(device), found["dq"])
        return found

    true, plain = defined(torch.float64), defined(bench.dtype)
    ours = {name: x[:, rows] if name in ("out", "lse") else x for name, x in _results(fn, inputs, some).items()}
    # where it multiplies in float32, its error is the dtype's own rounding and no more
    floor = torch.finfo(bench.dtype).eps / 2
    errors, budgets = _errors(ours, true), {name: BUDGET * max(x, floor) for name, x in _errors(plain, true).items()}
    errors, budgets = (dict(zip(x, bench.worst(*x.values()), strict=True)) for x in (errors, budgets))
    budgets |= {"lse": LSE_BUDGET}
    return {"errors": errors, "budgets": budgets, "checked": all(errors[x] <= budgets[x] for x in budgets)}


# ----------------------------------------------------------------------------------------- sections


def ring_section(bench, args):
    """Ring and collective beside the ideal, which is one device's time for the whole work, divided, beside the ceiling,
    which is the ring's own blocks, merges and sums without any message, and beside PyTorch's context_parallel.
    """
    for s, causal in product(args.tokens, (True, False)):
        p, plain = bench.ring.size, bench.plain(causal)
        shard, facts = partition(s * p, bench.ring, "zigzag"), {"tokens_per_gpu": s, "p": p, "causal": causal}
        bench.say(f"ring: {s} tokens a rank, causal {causal}: judged")
        mine = bench.inputs(s, HEADS, HEAD_DIM)
        ours = {name: partial(method, causal=causal, shard=shard) for name, method in METHODS.items()}
        verdicts = {name: _judged(bench, fn, shard, {"causal": causal}, *mine) for name, fn in ours.items()}
        runs = {"ideal": (nullcontext, plain, *bench.inputs(s * p, HEADS, HEAD_DIM))}
        runs |= {name: (nullcontext, partial(_out, fn), *mine, bench.cuda) for name, fn in ours.items()}
        if p > 1 and isinstance(bench.ring, ProcessRing):  # what is unheard is so for a whole process
            alone = [partition(s * p, Echo(rank, p), "zigzag") for rank in range(p)]
            fn = partial(ring_attention, causal=causal, shard=alone[bench.ring.rank])
            runs["ceiling"] = partial(unheard, alone), partial(_out, fn), *mine, bench.cuda
        for rotation in ("allgather", "alltoall") if bench.cuda and p > 1 else ():
            runs[f"context_parallel {rotation}"] = partial(_context_parallel, bench, rotation, causal), plain, *mine
        rounds = [{}, {}]
        for found, (name, (scope, *run)) in product(rounds, runs.items()):  # in turns, for a GPU slows as it warms
            round = "first" if found is rounds[0] else "second"
            bench.say(f"ring: {s} tokens a rank, causal {causal}: {name}, the {round} time")
            try:
                with scope():
                    found[name] = bench.measure(*run)
            except Exception as error:  # a peer, a prototype, may fail as it likes
                if name in (*ours, "ideal"):
                    raise
                found[name] = {"failed": str(error)[:100]}
        rows = {name: _mean(*(found[name] for found in rounds)) for name in runs}
        whole = rows.pop("ideal")
        ideal = {way: whole[f"{way}_ms"] / p for way in ("forward", "both")}
        yield {**facts, "method": "ideal", **{f"{way}_ms": x for way, x in ideal.items()}}
        for name, row in rows.items():
            ways = {x: ideal[x.split("_")[0]] for x in (*ideal, *(f"{x}_captured" for x in ideal)) if f"{x}_ms" in row}
            share = {f"share_{way}": 100 * x / row[f"{way}_ms"] for way, x in ways.items()}
            yield {**facts, "method": name, **row, **share, **verdicts.get(name, {})}


def _mean(one, other):
    return one if "failed" in one else other if "failed" in other else {x: (one[x] + other[x]) / 2 for x in one}


def _out(fn, *inputs):
    return fn(*inputs).out


@contextmanager
def _context_parallel(bench, rotation, causal):
    """PyTorch's own context parallelism, which replaces F.scaled_dot_product_attention: its load balance is the zigzag
    layout, for causal attention only.
    """
    from ..oracle.sanitizer import entered  # the oracle comes with it

    untouched = mock.patch.object(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    with untouched, entered(bench.ring.group, rotation, causal, 2 * bench.ring.size, bench.device):
        yield


class Echo(Unheard):
    """A ring without messages in which what a rank sends is what it gets: data to compute with, and no time."""

    def exchange(self, outgoing, into):
        return Pending(None, into | dict(zip(into, outgoing.values(), strict=False)))

    def numbered(self, number):
        return self

    def release(self):
        """Nothing is held back."""


def overlap_section(bench, args):
    """For each transport: a hop of K and V alone, the attention kernel on them alone (a causal zigzag's: half the
    queries), and both together, launched one by one and captured (a short hop takes the host longer than the device);
    and from which shard length on a hop hides, launched one by one, which is to take no more than 3 % of the kernel's
    time. Where `--tokens` asks for it also a training step, both ways; exposed is message time with no compute.
    """
    for transport in ("peer", "nccl") if bench.cuda and bench.ring.size > 1 else ():
        try:
            ring = ProcessRing(bench.ring.group, transport)
        except RuntimeError as error:  # on all ranks alike
            yield {"transport": transport, "failed": str(error)[:100]}
            continue
        lengths = sorted({*args.tokens, *(2**i for i in range(10, max(args.tokens).bit_length()))})
        rows = [
            {"transport": transport, "tokens_per_gpu": s, "p": bench.ring.size, **_hop(bench, ring, s)} for s in lengths
        ]
        for row in rows:
            row["hides_from"] = hides_from(rows)
            if row["tokens_per_gpu"] in args.tokens:
                for name in ("", "_captured"):
                    row[f"kernels{name}"] = kernels = traced(bench, ring, row["tokens_per_gpu"], captured=bool(name))
                    exposed, length = exposed_time(kernels)
                    (row[f"exposed_percent{name}"],) = bench.worst(100 * exposed / length)
            yield row


def hides_from(rows):
    """The shard length from which on a hop hides, as far as was measured."""
    found = "not here"
    for row in reversed(rows):
        if row["together_ms"] > 1.03 * row["kernel_ms"]:
            break
        found = row["tokens_per_gpu"]
    return found


def _hop(bench, ring, s):
    (q, k, v), _ = bench.inputs(s, HEADS, HEAD_DIM)
    into, attention = (torch.empty_like(k), torch.empty_like(v)), partial(bench.plain(False), q[:, : s // 2], k, v)

    def post():
        return ring.rotate((k, v), into)

    def together():
        posted = post()
        attention()
        posted.wait()

    steps = {"hop": lambda: post().wait(), "kernel": attention, "together": together}
    with torch.no_grad(), ExitStack() as replays:
        for step in steps.values():  # the first hop maps memory, or makes NCCL's connections
            step()
        host = {"host_us": 1e6 * bench.host(steps["hop"])}
        for name, step in list(steps.items()):
            steps[f"{name}_captured"] = replays.enter_context(bench.captured(step))
        # in turns, for a GPU slows as it warms
        rounds = [{name: bench.milliseconds(step)[0] for name, step in steps.items()} for _ in range(4)]
    row = {f"{name}_ms": statistics.mean(x[name] for x in rounds[1:]) for name in steps} | host
    return {**row, "gb_per_s": sum(x.nbytes for x in into) / row["hop_ms"] / 1e6}


def traced(bench, ring, s, captured=False):
    """The kernels of one training step of a causal ring, which may be captured; NCCL's and copies between GPUs are
    messages.
    """
    inputs, dout = bench.inputs(s, HEADS, HEAD_DIM)
    attention = partial(ring_attention, causal=True, shard=partition(s * ring.size, ring, "zigzag"))

    def step():
        torch.autograd.grad(_out(attention, *inputs), inputs, dout)

    step()
    with bench.captured(step) if captured else nullcontext(step) as run:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(2):  # profilers start at different times; after a step the ranks are together
                run()
                torch.cuda.synchronize()
    skipped = ("Memcpy DtoD", "Memcpy HtoD", "Memcpy DtoH", "Memset", "nccl:")  # the last are notes around kernels
    events = [e for e in trace.events() if e.device_type.name == "CUDA" and not e.name.startswith(skipped)]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    spans = spans[len(spans) // 2 :]
    kinds = {True: "message", False: "compute"}
    return [
        {"name": name[:60], "kind": kinds["nccl" in name.lower() or "PtoP" in name], "start_us": a - spans[0][0],
         "duration_us": b - a}
        for a, b, name in spans
    ]  # fmt: skip


def exposed_time(kernels):
    """How long message kernels ran with no compute kernel beside them, and the step's length."""
    spans = [(k["start_us"], k["start_us"] + k["duration_us"], k["kind"]) for k in kernels]
    edges = sorted(edge for a, b, kind in spans for edge in ((a, kind, 1), (b, kind, -1)))
    running, exposed, last = {"message": 0, "compute": 0}, 0.0, 0.0
    for at, kind, change in edges:
        if running["message"] and not running["compute"]:
            exposed += at - last
        running[kind] += change
        last = at
    return exposed, edges[-1][0] - edges[0][0]


def dilated_section(bench, args):
    """LongNet's setting (h = 12, d = 64, causal, w = 2k … 32k, r = 1, 2, 4, 6, 12), n doubling until it does not fit.

    On several ranks also with a last branch over the whole sequence, which crosses them. Results are checked up to 1M
    tokens; at the largest such n the head-grouped convention runs beside its best-known port.
    """
    p, lengths, rates = bench.ring.size, [(2048 if bench.cuda else 16) << i for i in range(5)], [1, 2, 4, 6, 12]
    largest = max((n for n in args.dilated_tokens if n <= 2**20), default=0)
    for n in args.dilated_tokens:
        kinds = {"LongNet": Dilation(lengths, rates)}
        if p > 1:
            kinds["LongNet + w = n, r = 64"] = Dilation([*lengths, n], [*rates, 64])
        if n == largest:
            kinds["grouped"] = Dilation(lengths, rates, heads="grouped")
        shard, fits = partition(n, bench.ring), True
        for name, dilation in kinds.items():
            run = partial(_dilated, bench, shard, {"causal": True, "dilation": dilation}, n <= 2**20)
            row = bench.attempt({"n": n, "p": p, "method": name}, run, "dilated", 12, 64, dilation=dilation)
            fits &= row["fits"]
            yield row
        if n == largest and p == 1 and (peer := _dilated_peer(lengths, rates)):
            row = {"n": n, "p": p, "method": "dilated-attention-pytorch"}
            row = bench.attempt(row, partial(bench.measure, peer), "dilated", 12, 64, dilation=kinds["grouped"])
            yield {key: x for key, x in row.items() if key != "predicted_bytes"}  # which is ours
        if not fits:
            return


def _dilated(bench, shard, how, judged, inputs, dout):
    fn = partial(dilated_attention, **how, shard=shard)
    verdict = _judged(bench, fn, shard, how, inputs, dout) if judged else {}
    before = bench.ring.traffic.received
    fn(*inputs)
    received = int(bench.worst(bench.ring.traffic.received - before)[0])
    return {"received_forward_bytes": received, **bench.measure(partial(_out, fn), inputs, dout), **verdict}


def _dilated_peer(lengths, rates):
    try:
        from dilated_attention_pytorch.dilated_attention import DilatedAttention
    except ImportError:
        return None
    return partial(DilatedAttention(lengths, rates), is_causal=True)


def flat_section(bench, args):
    """One device plays p ranks, for fixed tokens per rank: the fullest one's peak of a training step, counted as
    tensors live and die, without what a kernel takes and gives back.
    """
    for s, p, name in product(args.tokens, (1, 2, 3, 4, 8), METHODS) if bench.ring.size == 1 else ():

        def rank(ring, s=s, name=name):
            inputs, dout = bench.inputs(s, HEADS, HEAD_DIM)
            fn = partial(METHODS[name], causal=True, shard=partition(s * ring.size, ring, "zigzag"))
            for _ in range(2):  # the first time also makes the plans
                with measured(bench.device, tensors=True) as usage:
                    torch.autograd.grad(_out(fn, *inputs), inputs, dout)
            return usage.peak / dout.nbytes

        how = {"dtype": bench.dtype, "causal": True, "layout": "zigzag", "kernel": "cudnn", "scratch": False}
        expected = predicted(name, s * p, p, HEADS, HEAD_DIM, **how) / (s * HEADS * HEAD_DIM * bench.dtype.itemsize)
        facts = {"tokens_per_gpu": s, "p": p, "simulated": True, "method": name}
        yield {**facts, "peak_both_q": max(simulate(rank, p)), "predicted_q": expected}


def long_section(bench, args):
    """Peak bytes for n doubling until it does not fit; beyond `--longest` tokens the kernels only allocate."""
    p, chunk = bench.ring.size, 8192 if bench.cuda else 64
    methods = {"dense": (dense_attention, None), **{name: (fn, None) for name, fn in METHODS.items()}}
    methods[f"ring, q_chunk {chunk}"] = ring_attention, chunk
    for name, (fn, c) in methods.items():
        for n in (2**i for i in (range(12, 40) if bench.cuda else range(7, 10))):
            step = partial(fn, causal=True, shard=partition(n, bench.ring, "zigzag"), q_chunk=c)
            row = {"n": n, "p": p, "method": name, "computed": n <= args.longest}
            run, how = partial(_long, bench, step, row["computed"]), {"layout": "zigzag", "c": c}
            row = bench.attempt(row, run, name.split(",")[0], HEADS, HEAD_DIM, **how)
            yield row
            if not row["fits"]:
                break


def _long(bench, fn, computed, inputs, dout):
    with nullcontext() if computed else mock.patch.multiple(kernels, **ONLY_ALLOCATE):
        return {"peak_bytes": bench.peak(lambda: torch.autograd.grad(_out(fn, *inputs), inputs, dout))}


def _allocate_forward(q, k, v, seen, call):
    return Attended(torch.empty_like(q), q.new_empty(q.shape[:4], dtype=torch.float32))


def _allocate_backward(dout, dlse, q, k, v, out, lse, seen, call):
    own = q.new_empty(q.shape, dtype=torch.float32) if q.is_cuda else None
    gradients = tuple(torch.empty_like(x) for x in (q, k, v))
    del own  # cuDNN's dQ, which lives beside what it returns
    return gradients


ONLY_ALLOCATE = {"forward": _allocate_forward, "backward": _allocate_backward}
SECTIONS = {
    "ring": ring_section, "overlap": overlap_section, "dilated": dilated_section, "flat": flat_section,
    "long": long_section,
}  # fmt: skip
