"""Training engines of others around a ring: DeepSpeed's ZeRO and FairScale's OSS, on the ring's own ranks.

Both shard state over data-parallel ranks and *average* gradients over them. A ring's ranks hold shares of one mean, so
their gradients must be summed: multiply the loss by the ring's size, and the average is the sum. Neither divides
activations, which the ring does. Needs the extra `engines`; each rank must be a process (`launch`).
"""

from __future__ import annotations

import json
import os
import time
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from ..comm.launch import launch
from ..ring import ring_attention
from ..shard import partition
from .model import ByteLM, loss, sum_gradients, text


def steps_of(shard, tokens: int, steps: int):
    """This rank's inputs and targets, step by step, from consecutive pieces of the text."""
    data = text()
    for step in range(steps):
        piece = data[step * tokens : (step + 1) * tokens + 1][None]
        yield shard.take(piece[:, :-1]), shard.take(piece[:, 1:])


def train(ring, engine: str, tokens: int = 64, steps: int = 3, **how) -> list[float]:
    """This rank's share of the loss at every step; the shares sum to the loss of the whole sequence.

    Args:
        ring: a ring of processes that is the whole world.
        engine: "torch" (one rank, or a sum by hand), "deepspeed" (`stage` 0 … 3) or "fairscale" (`set_to_none`).
    """
    shard = partition(tokens, ring, "zigzag")
    attend = partial(ring_attention, causal=True, shard=shard)
    model = ByteLM(layers=2, width=32, heads=4, kv_heads=2)
    forward, backward, step = {"torch": _torch, "deepspeed": _deepspeed, "fairscale": _fairscale}[engine](
        model, ring, **how
    )
    losses = []
    for inputs, targets in steps_of(shard, tokens, steps):
        mine = loss(forward(inputs, shard.positions, attend), targets, tokens)
        backward(mine * ring.size)  # the engine divides by it
        step()
        losses.append(mine.item())
    return losses


def _torch(model, ring):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward(value):
        optimiser.zero_grad()
        (value / ring.size).backward()
        sum_gradients(model, ring)

    return model, backward, optimiser.step


def _joined(ring):
    """DeepSpeed on the ring's ranks, without its operator for shared memory: at first use that is compiled, which takes
    minutes, and a run that is killed meanwhile leaves a lock for which every later one waits for ever.
    """
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(ring.rank), RANK=str(ring.rank), WORLD_SIZE=str(ring.size))
    import deepspeed

    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _deepspeed(model, ring, stage: int, clipping: float = 0.0):
    """`clipping`: the gradient's largest norm. DeepSpeed 0.19's own default is 1, which changes every step here."""
    deepspeed = _joined(ring)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": clipping,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    return engine, engine.backward, engine.step


def _fairscale(model, ring, set_to_none: bool = False):
    """FairScale collects small gradients in buckets and leaves views of them in `grad`. `zero_grad()` of torch 2 drops
    the views, so from the second step on the buckets are sent with the first step's gradients: set_to_none=True.
    """
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim.oss import OSS

    optimiser = OSS(model.parameters(), torch.optim.SGD, lr=0.1)
    wrapped = ShardedDataParallel(model, optimiser)

    def backward(value):
        optimiser.zero_grad(set_to_none=set_to_none)
        value.backward()

    return wrapped, backward, optimiser.step


def compare(steps: int = 3) -> dict:
    """Every engine on a ring of two processes, beside one rank: losses of the whole sequence, step by step."""
    (dense,) = launch(partial(train, engine="torch", steps=steps), 1)
    hows = {f"DeepSpeed, ZeRO stage {stage}": {"engine": "deepspeed", "stage": stage} for stage in range(4)}
    hows["DeepSpeed, default clipping"] = {"engine": "deepspeed", "stage": 0, "clipping": 1.0}
    hows["FairScale, OSS"] = {"engine": "fairscale"}
    hows["FairScale, torch 2's zero_grad()"] = {"engine": "fairscale", "set_to_none": True}
    rows = []
    for name, how in {"a sum by hand": {"engine": "torch"}, **hows}.items():
        losses = [sum(x) for x in zip(*launch(partial(train, steps=steps, **how), 2), strict=True)]
        worst = max(abs(a - b) / b for a, b in zip(losses, dense, strict=True))
        rows.append({"engine": name, "losses": losses, "worst": worst})
    versions = {name: version(name) for name in ("torch", "deepspeed", "fairscale")}
    told = {"date": date.today().isoformat(), "versions": versions, "command": "python -m ringref.lab.zero"}
    return {**told, "dense": dense, "rows": rows, "asynchronous": launch(posting, 2)[0]}


def posting(ring, late: float = 0.5) -> list[str]:
    """Whether DeepSpeed's point-to-point calls wait: rank 1 receives, and later sends, `late` seconds after rank 0."""
    comm = _joined(ring).comm
    from deepspeed.runtime.pipe import p2p

    said = []
    for name, post, other in (("isend", comm.isend, comm.irecv), ("irecv", comm.irecv, comm.isend)):
        x = torch.full((1 << 20,), float(ring.rank))  # more than a socket would take without a receiver
        comm.barrier()
        began = time.perf_counter()
        if ring.rank == 1:
            time.sleep(late)
            other(x, 0).wait()
            continue
        posted = post(x, 1)
        returned = 1e3 * (time.perf_counter() - began)
        posted.wait()
        done = 1e3 * (time.perf_counter() - began)
        said.append(f"deepspeed.comm.{name} returned after {returned:.0f} ms and was complete after {done:.0f} ms")
    if ring.rank == 0:
        try:
            p2p.recv(x, 1, async_op=True)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            said.append(f"pipe.p2p.recv(async_op=True) refuses: {type(error).__name__} {error}")
    return said


if __name__ == "__main__":
    Path("figures/data/engines-cpu.json").write_text(json.dumps(compare(), indent=1) + "\n")
