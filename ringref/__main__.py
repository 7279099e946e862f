"""Run four versions of attention on a real text over processes; judge each against float64.

python -m ringref [TEXT]       the main job: a table and a figure; exit code 1 if over budget
python -m ringref check ...    judge your own attention (see check --help)
python -m ringref bench ...    measure speed, memory and overlap (see bench --help)
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import ringref
from ringref import Dilation, draw, launch, partition
from ringref.memory import METHODS, measured, predicted
from ringref.model import ByteLM, text

TENSORS = ("out", "lse", "dq", "dk", "dv")
WIDTH = 112
MULTIPLE, FLOOR = (3.0, 2.0)  # an error may be 3 times plain PyTorch's, which counts as 2 eps at least
DTYPES = ("float64", "float32", "bfloat16", "float16")


def options(argv):
    parser = argparse.ArgumentParser(
        prog="python -m ringref",
        description=__doc__.replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("text", nargs="?", type=Path, help="file to read; default: Python's own help topics")
    add("--ranks", type=int, help="processes (default: one per GPU if there are several, else 4)")
    add("--tokens", type=int, help="bytes of the text (default: 1024, on GPUs 4096)")
    add("--heads", type=int, default=4, help="query heads, an even number; half as many for K, V")
    add("--head-dim", type=int, default=16, help="numbers per head (default: 16)")
    add("--dtype", default="float32", choices=DTYPES, help="of q, k, v (default: float32)")
    add("--layout", default="zigzag", choices=("contiguous", "zigzag", "striped"), help="who holds which tokens")
    add("--q-chunk", type=int, help="query rows in work at a time on a rank (default: all)")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--figure", type=Path, default=Path("figures/main_job.svg"), help="where the figure goes")
    told = parser.parse_args(argv)
    gpus = torch.cuda.device_count()
    if told.ranks is None:
        told.ranks = gpus if gpus > 1 else 4
    told.backend = "nccl" if gpus >= told.ranks else "gloo"
    if told.tokens is None:
        told.tokens = 4096 if told.backend == "nccl" else 1024
    for name in ("ranks", "tokens", "heads", "head_dim"):
        if getattr(told, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(told, name)}")
    if told.heads % 2 or told.head_dim % 2:
        parser.error(f"--heads, --head-dim: expected even numbers, got {told.heads}, {told.head_dim}")
    if told.text is not None and not told.text.is_file():
        parser.error(f"text: {told.text} is not a file")
    told.where = f"{told.ranks} processes over gloo on the CPU"
    if told.backend == "nccl":
        told.where = f"{told.ranks} processes with a GPU each, over NCCL"
    elif gpus:  # too few: say what happens instead
        told.where += f" (NCCL takes one rank per GPU, here {gpus}: see --ranks)"
    return told


# The inputs, their float64 truth, and what plain PyTorch makes of them


def main_inputs(told):
    """q, k, v of the model's first layer on the text, and random gradients dO and dlse."""
    tokens = text(told.text)[: told.tokens][None]
    dtype, n = getattr(torch, told.dtype), tokens.shape[1]
    model = ByteLM(1, told.heads * told.head_dim, told.heads, told.heads // 2, dtype=torch.float64)
    qkv = [x.to(dtype) for x in model.qkv(tokens, torch.arange(n))]
    random = torch.Generator().manual_seed(0)
    dout = torch.randn(qkv[0].shape, generator=random, dtype=torch.float64).to(dtype)
    return (*qkv, dout, torch.randn((1, told.heads, n), generator=random, dtype=torch.float64))


def forward_backward(attention, q, k, v, dout, dlse):
    """{name: tensor} of everything that can be wrong."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v)
    torch.autograd.backward((out, lse), (dout.to(out.dtype), dlse.to(lse.dtype)))
    return dict(zip(TENSORS, (out.detach(), lse.detach(), q.grad, k.grad, v.grad), strict=True))


def plain(dilation):
    """Causal attention by torch's own math kernel, in the inputs' dtype throughout."""

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        i = torch.arange(q.shape[2])
        times = (i[:, None] >= i).double()[None]
        if dilation is not None:
            head, branches = torch.arange(q.shape[1])[:, None], 0
            for w, r in zip(dilation.segment_lengths, dilation.dilation_rates, strict=True):
                kept = i % w % r == head % r
                branches += kept[:, :, None] & kept[:, None] & (i[:, None] // w == i // w)
            times = times * branches
        # exact in every dtype but for rounding log m; a query that no branch keeps is not compared
        bias = times.log().to(q.dtype)
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        lse = (q @ k.mT * q.shape[-1] ** -0.5 + bias).logsumexp(-1)
        return out.transpose(1, 2), lse

    return attention


def ranks_job(ring, inputs, cases, told, steps):
    """One rank of the main job: every case by every method -> [(facts, tensors)]."""
    device = torch.device("cuda", ring.rank) if told.backend == "nccl" else torch.device("cpu")
    q, k, v, dout, dlse = inputs
    shard = partition(q.shape[1], ring, told.layout)
    mine = [shard.take(x).to(device) for x in (q, k, v, dout)] + [shard.take(dlse, 2).to(device)]

    def clock():
        ring.announce([0])  # start and stop together
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    done = []
    for name, dilation in cases.items():
        for method in METHODS:

            def attention(q, k, v, method=method, dilation=dilation):
                function = getattr(ringref, f"{method}_attention")
                chunk = {"q_chunk": told.q_chunk}
                return function(q, k, v, causal=True, dilation=dilation, shard=shard, **chunk)

            tensors = forward_backward(attention, *mine)  # warm: plans are made, buffers pinned
            sent = ring.traffic.sent
            with measured(device) as usage:
                forward_backward(attention, *mine)
            sent = ring.traffic.sent - sent
            start = clock()
            forward_backward(attention, *mine)
            facts = {"case": name, "method": method, "peak": usage.peak, "sent": sent}
            done.append(({**facts, "seconds": clock() - start}, tensors))
            if ring.rank == 0:
                with steps.open("a") as file:
                    file.write(".")
    return shard.positions, done


def run(told, console):
    """The whole job as a list of rows, one per case and method."""
    inputs = main_inputs(told)
    n = inputs[0].shape[1]
    lengths, rates = [max(1, n // 16), max(2, n // 4), max(4, n)], [1, 2, 4]
    cases = {"causal": None, "LongNet": Dilation(lengths, rates)}
    with tempfile.TemporaryDirectory() as folder, progress(console) as bar:
        steps, total = Path(folder, "steps"), len(cases) * (1 + len(METHODS))
        task = bar.add_task("float64 truth", total=total)
        judges = {}
        for name, dilation in cases.items():
            judges[name] = Judge(inputs, dilation)
            bar.advance(task)
        bar.update(task, description=f"{told.ranks} ranks")
        over = threading.Event()

        def follow():
            while not over.wait(0.1):
                count = steps.stat().st_size if steps.exists() else 0
                bar.update(task, completed=len(cases) + count)

        follower = threading.Thread(target=follow)
        follower.start()
        try:
            ranks = launch(lambda ring: ranks_job(ring, inputs, cases, told, steps), told.ranks, told.backend)
        finally:
            over.set()
            follower.join()
        bar.update(task, completed=total, description="done")
    rows = []
    for i, (facts, _) in enumerate(ranks[0][1]):
        every = [done[i] for _, done in ranks]
        worst = {key: max(f[key] for f, _ in every) for key in ("peak", "sent", "seconds")}
        pieces = [(positions, done[i][1]) for positions, done in ranks]
        sizes = {"g": told.heads // 2, "dtype": inputs[0].dtype, "c": told.q_chunk}
        parts = predicted(
            facts["method"], n, told.ranks, told.heads, told.head_dim, **sizes,
            dilation=cases[facts["case"]], kernel="cudnn" if told.backend == "nccl" else "cpu_flash",
        )  # fmt: skip
        row = {**facts, **worst, "layout": told.layout, "predicted": sum(parts.values())}
        rows.append({**row, **judges[facts["case"]](pieces)})
    return rows


class Judge:
    """The float64 truth of a case, and the errors that plain PyTorch makes in the inputs' dtype."""

    def __init__(self, inputs, dilation):
        self.dtype, doubles = inputs[0].dtype, [x.double() for x in inputs]

        def dense(q, k, v):
            return ringref.dense_attention(q, k, v, causal=True, dilation=dilation, q_chunk=512)

        self.truth = forward_backward(dense, *doubles)
        self.plain = forward_backward(plain(dilation), *inputs)

    def __call__(self, pieces):
        """Each rank's (positions, tensors) -> the worst errors, and the worst share of a budget."""
        errors, used = dict.fromkeys(TENSORS, 0.0), 0.0
        for positions, tensors in pieces:
            for name, x in tensors.items():
                truth, yard = (
                    y[name].index_select(2 if name == "lse" else 1, positions).double()
                    for y in (self.truth, self.plain)
                )
                scale = truth.norm()
                error = float((x.double() - truth).norm() / scale) if scale else float(x.norm())
                allowed = float((yard - truth).norm() / scale) if scale else 0.0
                budget = MULTIPLE * max(allowed, FLOOR * torch.finfo(self.dtype).eps)
                error = error if error == error else float("inf")
                errors[name], used = max(errors[name], error), max(used, error / budget)
        return {"errors": errors, "budget_used": used}


# What a person sees


def progress(console):
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def as_table(rows, told):
    sizes = f"{told.tokens} tokens, {told.heads} heads of {told.head_dim}, {told.dtype}"
    table = Table(title=f"{sizes}; {told.where}", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("case", "method", "layout"):
        table.add_column(name, no_wrap=True)
    for name in (*TENSORS, "budget", "peak", "predicted", "sent", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        errors = [f"{row['errors'][name]:.0e}" for name in TENSORS]
        budget = f"{row['budget_used']:.0%}"
        budget = f"[red]{budget}[/]" if row["budget_used"] > 1 else budget
        sizes = [draw.short(row[key]) for key in ("peak", "predicted", "sent")]
        start = (row["case"], row["method"], row["layout"])
        table.add_row(*start, *errors, budget, *sizes, f"{row['seconds'] * 1e3:.0f}")
        if row["method"] == METHODS[-1]:
            table.add_section()
    scratch = "" if told.backend == "nccl" else "; scratch inside CPU kernels is not seen"
    table.caption = (
        "out to dv: error relative to float64, on the worst rank. budget: the largest share used\n"
        f"of {MULTIPLE:.0f} times plain PyTorch's error in this dtype ({FLOOR:.0f} eps or more).\n"
        f"peak: bytes on the fullest rank above its inputs, both ways{scratch}."
    )
    return table


def as_figure(rows, path):
    cases = list(dict.fromkeys(row["case"] for row in rows))
    fig, axes = draw.figure(9, 3, columns=len(cases), sharey=True)
    for case, ax in zip(cases, axes, strict=True):
        some = [row for row in rows if row["case"] == case]
        keys = {"measured peak": "peak", "predicted": "predicted", "sent": "sent"}
        groups = {label: {row["method"]: row[key] / 1024 for row in some} for label, key in keys.items()}
        draw.bars(groups, ax=ax, title=case, y="KiB per rank" if ax is axes[0] else "", log=True)
        if ax is not axes[-1]:
            ax.get_legend().remove()
    return draw.save(fig, path.stem, path.parent)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["check"]:
        from ringref import oracle

        return oracle.main(argv[1:])
    if argv[:1] == ["bench"]:
        from ringref import bench

        return bench.main(argv[1:])
    told = options(argv)
    console = Console(stderr=told.json)
    console.width = max(console.width, WIDTH)  # a wrapped table is worse than a wide one
    told.tokens = min(told.tokens, len(text(told.text)))
    rows = run(told, console)
    saved = as_figure(rows, told.figure)
    if told.json:
        print(json.dumps({"options": {k: str(v) for k, v in vars(told).items()}, "rows": rows}))
    else:
        console.print(as_table(rows, told))
    console.print(f"figure: {saved}")
    return int(any(row["budget_used"] > 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
