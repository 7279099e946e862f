"""The main job: four versions of attention on a real text over processes, each judged against float64."""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import ringref
from ringref import Dilation, Shard, launch, partition

from ..comm.launch import MOST
from . import draw
from .memory import METHODS, measured, predicted
from .model import ByteLM, text
from .shell import folder, whole

_ABOUT = """Run four versions of attention on a real text over processes; judge each against float64.

python -m ringref [TEXT]       the main job: a table and a figure; exit code 1 if over budget
python -m ringref check ...    judge your own attention (see check --help)
python -m ringref bench ...    measure speed, memory and overlap (see bench --help)
"""
TENSORS = ("out", "lse", "dq", "dk", "dv")
WIDTH = 112
MULTIPLE, FLOOR = (3.0, 2.0)  # an error may be 3 times plain PyTorch's, which counts as 2 eps at least
DTYPES = ("float64", "float32", "bfloat16", "float16")


def options(argv):
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        prog="python -m ringref", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("text", nargs="?", type=Path, help="file to read; default: Python's own help topics")
    ranks = "processes (default: one per GPU if several, else 4)"
    add("--ranks", type=whole(1, MOST), default=gpus if gpus > 1 else 4, help=ranks)
    add("--tokens", type=whole(1), help="bytes of the text (default: 1024, on GPUs 4096)")
    add("--heads", type=whole(1), default=4, help="query heads, an even number; half as many for K, V")
    add("--head-dim", type=whole(1), default=16, help="numbers per head (default: 16)")
    add("--dtype", default="float32", choices=DTYPES, help="of q, k, v (default: float32)")
    add("--layout", default="zigzag", choices=("contiguous", "zigzag", "striped"), help="who holds which tokens")
    add("--q-chunk", type=whole(1), help="query rows worked on at a time on a rank (default: all)")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--figure", type=_figure, default="figures/main_job.svg", help="where the figure goes")
    told = parser.parse_args(argv)
    told.backend = "nccl" if gpus >= told.ranks else "gloo"
    if told.tokens is None:
        told.tokens = 4096 if told.backend == "nccl" else 1024
    if told.heads % 2 or told.head_dim % 2:
        parser.error(f"--heads, --head-dim: expected even numbers, got {told.heads}, {told.head_dim}")
    if told.text is not None and not told.text.is_file():
        parser.error(f"text: {told.text} is not a file")
    try:
        told.text and text(told.text)
    except (OSError, ValueError) as error:  # it cannot be read, or is empty
        parser.error(f"text: {error}")
    how = "with a GPU each, over NCCL" if told.backend == "nccl" else "over gloo on the CPU"
    told.where = f"{told.ranks} processes {how}"
    if told.backend == "gloo" and gpus:  # too few: say what happens instead
        told.where += f" (NCCL takes one rank per GPU, here {gpus}: see --ranks)"
    return told


def _figure(given):
    path = Path(given)
    if not path.name:
        raise argparse.ArgumentTypeError(f"expected a file's name, got {given!r}")
    return folder(path.parent) / path.name


def main_inputs(told):
    """q, k, v of the model's first layer on the text, and random gradients dO and dlse."""
    tokens = text(told.text)[: told.tokens][None]
    told.tokens = tokens.shape[1]
    model = ByteLM(1, told.heads * told.head_dim, told.heads, told.heads // 2, dtype=torch.float64)
    q, k, v = (x.to(getattr(torch, told.dtype)) for x in model.qkv(tokens, torch.arange(told.tokens)))
    random = torch.Generator().manual_seed(0)
    dout = torch.randn(q.shape, generator=random, dtype=torch.float64).to(q.dtype)
    return q, k, v, dout, torch.randn((1, told.heads, told.tokens), generator=random, dtype=torch.float64)


def forward_backward(attention, q, k, v, dout, dlse):
    """{name: tensor} of everything that can be wrong; dlse may be None."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v)
    if dlse is None:  # its graph would live on through the backward
        lse = lse.detach()
    given = [(y, dy.to(y.dtype)) for y, dy in ((out, dout), (lse, dlse)) if dy is not None]
    torch.autograd.backward(*zip(*given, strict=True))
    return dict(zip(TENSORS, (out.detach(), lse.detach(), q.grad, k.grad, v.grad), strict=True))


def plain(q, k, v, dilation):
    """Causal attention by torch's own math kernel, in the inputs' dtype and on their device throughout."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    i, head = (torch.arange(x, device=q.device) for x in (q.shape[2], q.shape[1]))
    head = head[:, None]
    times = 1 if dilation is None else 0  # how often a key is seen
    for w, r in zip(dilation.segment_lengths, dilation.dilation_rates, strict=True) if dilation else ():
        kept = i % w % r == head % r
        times = times + (kept[:, :, None] & kept[:, None] & (i[:, None] // w == i // w)).double()
    # exact in every dtype but for rounding log m
    bias = (times * (i[:, None] >= i).double()[None]).log().to(q.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2), (q @ k.mT * q.shape[-1] ** -0.5 + bias).logsumexp(-1)


def ranks_job(ring, inputs, cases, told):
    """One rank: every case by every method -> its positions, {(case, method): facts}, {(case, method): tensors}."""
    device = torch.device("cuda", ring.rank) if told.backend == "nccl" else torch.device("cpu")
    shard, facts, tensors = partition(told.tokens, ring, told.layout), {}, {}
    mine = [shard.take(x, 2 if x.dim() == 3 else 1).to(device) for x in inputs]

    def clock():
        ring.announce([0])  # start and stop together
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for case, method in product(cases, METHODS):
        how = {"causal": True, "dilation": cases[case], "shard": shard, "q_chunk": told.q_chunk}
        attention = partial(getattr(ringref, f"{method}_attention"), **how)
        tensors[case, method] = forward_backward(attention, *mine)  # warm: plans are made, buffers pinned
        forward_backward(attention, *mine[:4], None)  # and kernels proved
        sent = ring.traffic.sent
        with measured(device) as usage:  # a training step, in which lse has no gradient
            forward_backward(attention, *mine[:4], None)
        sent, start = ring.traffic.sent - sent, clock()
        forward_backward(attention, *mine[:4], None)
        facts[case, method] = {"peak": usage.peak, "sent": sent, "seconds": clock() - start}
    return shard.positions, facts, tensors


def exact(dilation, *inputs):
    """The definition in float64, {name: tensor}; with its rows in another order than any other's, for sums that round
    alike would make one float64 look better than the next.
    """
    order = torch.randperm(inputs[0].shape[1], generator=torch.Generator().manual_seed(0))
    shard = Shard(order, None)
    dense = partial(ringref.dense_attention, causal=True, dilation=dilation, q_chunk=512, shard=shard)
    found = forward_backward(dense, *(shard.take(x.double(), 2 if x.dim() == 3 else 1) for x in inputs))
    back = order.argsort().to(inputs[0].device)
    return {name: x.index_select(2 if name == "lse" else 1, back) for name, x in found.items()}


def judge(pieces, truth, yard, eps):
    """Each rank's (positions, tensors) -> the worst errors, and the worst share of a budget."""
    errors, used = dict.fromkeys(TENSORS, 0.0), 0.0
    for positions, tensors in pieces:
        for name, x in tensors.items():
            true, plain = (y[name].index_select(2 if name == "lse" else 1, positions).double() for y in (truth, yard))
            scale = true.norm() or 1.0  # nothing but zeros: the error itself
            error = float((x.double() - true).norm() / scale)
            budget = MULTIPLE * max(float((plain - true).norm() / scale), FLOOR * eps)
            error = error if error == error else float("inf")
            errors[name], used = max(errors[name], error), max(used, error / budget)
    return {"errors": errors, "budget_used": used}


def run(told, console):
    """The whole job as a list of rows, one per case and method."""
    inputs = main_inputs(told)
    n, dtype, rows = told.tokens, inputs[0].dtype, []
    cases = {"causal": None, "LongNet": Dilation([max(1, n // 16), max(2, n // 4), max(4, n)], [1, 2, 4])}
    # plain attention on the ranks' kind of device: a GPU adds up a long row of products in another order than a CPU,
    # and its float32 is three times as wrong at 4,096 tokens
    here = [x.to("cuda" if told.backend == "nccl" else "cpu") for x in inputs]

    def known(dilation):
        both = exact(dilation, *here), forward_backward(partial(plain, dilation=dilation), *here)
        return [{name: x.cpu() for name, x in one.items()} for one in both]

    def held(method, dilation):
        how = {"g": told.heads // 2, "dtype": dtype, "c": told.q_chunk, "layout": told.layout, "causal": True}
        how |= {"kernel": "cudnn" if told.backend == "nccl" else "cpu_flash", "dilation": dilation}
        return predicted(method, n, told.ranks, told.heads, told.head_dim, **how)

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar, ThreadPoolExecutor(1) as beside:
        task = bar.add_task("float64 truth", total=2)
        truths = {case: beside.submit(known, dilation) for case, dilation in cases.items()}
        both = list(product(cases, METHODS))
        expected = {(case, method): beside.submit(held, method, cases[case]) for case, method in both}
        if told.backend == "gloo":  # the ranks want the cores; on GPUs it is done while they start
            wait([*truths.values(), *expected.values()])
        bar.update(task, advance=1, description=f"{told.ranks} ranks")
        ranks = launch(partial(ranks_job, inputs=inputs, cases=cases, told=told), told.ranks, told.backend)
        truths, expected = ({key: x.result() for key, x in some.items()} for some in (truths, expected))
    for case, method in both:
        row = {"case": case, "method": method, "layout": told.layout}
        row |= {key: max(facts[case, method][key] for _, facts, _ in ranks) for key in ("peak", "sent", "seconds")}
        row["predicted"] = expected[case, method]
        pieces = [(positions, tensors[case, method]) for positions, _, tensors in ranks]
        rows.append({**row, **judge(pieces, *truths[case], torch.finfo(dtype).eps)})
    return rows


def as_table(rows, told):
    sizes = f"{told.tokens} tokens, {told.heads} heads of {told.head_dim}, {told.dtype}"
    scratch = "" if told.backend == "nccl" else "; scratch inside CPU kernels is not seen"
    table = Table(title=f"{sizes}; {told.where}", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.caption = (
        "out to dv: error relative to float64, on the worst rank. budget: the largest share used\n"
        f"of {MULTIPLE:.0f} times plain PyTorch's error in this dtype, on such a device ({FLOOR:.0f} eps or more).\n"
        "peak to ms: of a training step, in which lse has no gradient. peak: bytes on the fullest\n"
        f"rank above its inputs{scratch}."
    )
    for name in ("case", "method", "layout"):
        table.add_column(name, no_wrap=True)
    for name in (*TENSORS, "budget", "peak", "predicted", "sent", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        errors = [f"{row['errors'][name]:.0e}" for name in TENSORS]
        budget = f"[{'red' if row['budget_used'] > 1 else 'default'}]{row['budget_used']:.0%}[/]"
        sizes = [draw.short(row[key]) for key in ("peak", "predicted", "sent")]
        start = (row["case"], row["method"], row["layout"])
        last = row["method"] == METHODS[-1]
        table.add_row(*start, *errors, budget, *sizes, f"{row['seconds'] * 1e3:.0f}", end_section=last)
    return table


def as_figure(rows, path):
    cases = list(dict.fromkeys(row["case"] for row in rows))
    fig, axes = draw.figure(9, 3, columns=len(cases), sharey=True)
    for case, ax in zip(cases, axes, strict=True):
        some = [row for row in rows if row["case"] == case]
        keys = {"measured peak": "peak", "predicted": "predicted", "sent": "sent"}
        groups = {label: {row["method"]: row[key] / 1024 for row in some} for label, key in keys.items()}
        y = "KiB per rank" if ax is axes[0] else ""
        draw.bars(groups, ax=ax, title=f"{case}, a step of each method (KiB)", y=y, log=True)
        if ax is not axes[-1]:
            ax.get_legend().remove()
    return draw.save(fig, path.stem, path.parent)


def main(argv=None):
    told = options(argv)
    console = Console(stderr=told.json)
    console.width = max(console.width, WIDTH)  # a wrapped table is worse than a wide one
    rows = run(told, console)
    saved = as_figure(rows, told.figure)
    if told.json:
        print(json.dumps({"options": {k: str(v) for k, v in vars(told).items()}, "rows": rows}))
    else:
        console.print(as_table(rows, told))
    console.print(f"figure: {saved}")
    return int(any(row["budget_used"] > 1 for row in rows))
