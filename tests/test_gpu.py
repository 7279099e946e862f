"""On CUDA devices: every kernel, every method over simulated ranks, NCCL, copy engines. Run with `pytest -m gpu`; the
last recorded runs are figures/data/tests-*.xml, of one GPU and of the tests that want several.
"""

import time
import warnings
from itertools import product

import pytest
import torch
from common import everything, sweep

import ringref
from ringref import block
from ringref.comm.launch import RankError
from ringref.engine import kernels, sums
from ringref.engine.call import Call
from ringref.engine.visits import Rows
from ringref.shard import Table, alone, counted

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
METHODS = [ringref.dilated_attention, ringref.collective_attention, ringref.ring_attention]
# awkward: more offsets than heads, rates that do not divide, and at 513 tokens tails of one and w > n
AWKWARD, LONGNET = 513, ringref.Dilation([64, 256, 1024], [1, 3, 8])
GROUPED = ringref.Dilation([64, 256, 1024], [1, 3, 8], heads="grouped")
BUDGET = 5.0  # times the error of attention written out, in the same dtype on the same inputs


@pytest.fixture(scope="module", autouse=True)
def machine(record_testsuite_property):
    """What a recorded run (`--junitxml`) says of where it ran."""
    record_testsuite_property("machine", f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}")
    record_testsuite_property("torch", torch.__version__)


def relative(x, true):
    finite = true.isfinite()
    assert torch.equal(finite, x.isfinite())
    return float((x.double() - true)[finite].norm() / true[finite].norm().clamp_min(1e-30))


def plain(q, k, v, dout, dlse, causal):
    """out, dq, dk, dv of attention written out, in the inputs' dtype."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) * q.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(group, 2))
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (scores.logsumexp(-1).transpose(1, 2) * dlse).sum()
    loss.backward()
    return out.detach(), q.grad, k.grad, v.grad


def able():
    every = []
    for kernel in kernels.KERNELS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for d in (64, 128):
                every.append(pytest.param(kernel, dtype, d, id=f"{kernel.name}-{str(dtype)[6:]}-{d}"))
    return every


@pytest.mark.parametrize(("kernel", "dtype", "d"), able())
@pytest.mark.parametrize("lse_gradient", [False, True])
def test_kernel_equals_einsum(kernel, dtype, d, lse_gradient, monkeypatch):
    reason = kernel.why_not(kernels.Task("cuda", dtype, d, "causal", lse_gradient))
    if reason:
        pytest.skip(f"{kernel.name} {reason}")
    monkeypatch.setattr(kernels, "choose", lambda *_: kernel)
    table = Table((counted(4),), (counted(4),))
    call = Call(True, None, None, d**-0.5, None, "auto", alone(), table, None)
    torch.manual_seed(0)
    for m, c, n, h, g, kind in (
        (1, 256, 256, 4, 4, "causal"), (3, 100, 100, 4, 2, "causal"),
        (2, 37, 53, 4, 4, "full"), (1, 300, 7, 4, 1, "full"), (1, 5, 2000, 4, 4, "full"),
    ):  # fmt: skip
        # every other head of a wider tensor: kernels must take strides
        q, dout = torch.randn(2, 2, m, c, 2 * h, d, device="cuda", dtype=dtype)[:, :, :, :, ::2]
        k, v = torch.randn(2, 2, m, n, g, d, device="cuda", dtype=dtype)
        dlse = torch.randn(2, m, c, h, device="cuda") if lse_gradient else None
        seen = kernels.Seen(kind)
        keep = kernels._keep(q, k, seen)
        wide = [x.double() for x in (q, k, v)]
        true = block.forward(*wide, call.scale, keep)
        wide_dlse = None if dlse is None else dlse.double()
        grads = block.backward(dout.double(), wide_dlse, *wide, *true, call.scale, keep)
        out, lse = kernels.forward(q, k, v, seen, call)
        ours = kernels.backward(dout, dlse, q, k, v, out, true.lse.float(), seen, call)
        folded = [None if x is None else x.flatten(0, 1) for x in (q, k, v, dout, dlse)]
        theirs = plain(*folded, kind == "causal")
        assert relative(lse, true.lse) < 1e-5
        for x, true_x, other in zip((out, *ours), (true.out, *grads), theirs, strict=True):
            assert relative(x, true_x) <= BUDGET * relative(other, true_x.flatten(0, 1))


QUERIES = (1, 2, 37, 64, 128, 192, 300, 1216)
KEYS = (1, 7, 63, 64, 65, 127, 128, 129, 192, 256, 320, 576, 1000, 1216)


@pytest.mark.parametrize(("kernel", "dtype", "d"), [x for x in able() if x.values[1] != torch.float16])
def test_kernels_are_right_whatever_the_lengths_and_scores(kernel, dtype, d):
    if reason := kernel.why_not(kernels.Task("cuda", dtype, d, "full")):
        pytest.skip(f"{kernel.name} {reason}")
    calls, wrong = sweep(kernel, dtype, d, "cuda", QUERIES, KEYS)
    assert calls > 400 and not wrong, (calls, len(wrong), dict(list(wrong.items())[:20]))


@pytest.mark.parametrize("d", [64, 128])
def test_no_kernel_that_is_used_here_is_found_wrong(d):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* is passed over")
        for dtype, kind, backward, lse_gradient in product(
            (torch.bfloat16, torch.float16, torch.float32), ("full", "causal"), (False, True), (False, True)
        ):
            task = kernels.Task("cuda", dtype, d, kind, lse_gradient and backward, backward=backward)
            assert kernels.choose("auto", task) is not None


@pytest.mark.parametrize("s", [64, 192, 1216])
def test_scores_far_below_zero_give_finite_gradients(s):
    """cuDNN's backward, left alone, returns NaN here."""

    def on_a_rank(ring):
        torch.manual_seed(ring.rank)
        q, k, v = ((torch.randn(1, s, 2, 64, device="cuda") + x).bfloat16().requires_grad_() for x in (3.5, -3.5, 0))
        out = ringref.ring_attention(q, k, v, shard=ringref.partition(s * ring.size, ring)).out
        out.backward(torch.randn_like(out))
        return all(bool(x.grad.isfinite().all()) for x in (q, k, v))

    for p in (1, 2, 3):
        assert all(ringref.simulate(on_a_rank, p))


def test_a_captured_call_is_not_held_up_by_a_proof(monkeypatch):
    monkeypatch.setattr(kernels, "_faults", {})
    q = torch.randn(1, 1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    task = kernels.Task("cuda", q.dtype, 64, "full")
    kernel = next(kernel for kernel in kernels._ranked("auto") if kernel.why_not(task) is None)
    kernels._forward(kernel, q, q, q, kernels.Seen("full"), 0.125)  # loaded, and its plan made
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        taken = kernels.choose("auto", task)
        out, _ = kernels._forward(taken, q, q, q, kernels.Seen("full"), 0.125)
    assert taken is kernel and not kernels._faults
    graph.replay()
    torch.cuda.synchronize()
    assert out.isfinite().all() and kernels.choose("auto", task) is kernel and kernels._faults


PACKED = torch.tensor([0, 1, 2, 130, 133, 193, 257, 258, 388, 513])
PLAIN = {
    "plain": {"causal": True}, "dilated": {"causal": True, "dilation": LONGNET},
    "grouped": {"causal": True, "dilation": GROUPED},
}  # fmt: skip
RAGGED = {
    "window": {"window": (40, 13)}, "causal window": {"window": (100, 0)}, "full documents": {"cu_seqlens": PACKED},
    "documents": {"cu_seqlens": PACKED, "causal": True}, "both": {"cu_seqlens": PACKED, "window": (20, 5)},
    "all": {"cu_seqlens": PACKED, "window": (9, 9), "dilation": LONGNET},
}  # fmt: skip


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [
        *(pytest.param(torch.float32, x, id=f"float32-{name}") for name, x in PLAIN.items()),
        *(pytest.param(torch.bfloat16, x, id=f"bfloat16-{name}") for name, x in (PLAIN | RAGGED).items()),
    ],
)
def test_methods_over_simulated_ranks(p, dtype, arguments):
    torch.manual_seed(0)
    n, h, g, d = AWKWARD, 6, 3, 64
    q, dout = torch.randn(2, 2, n, h, d, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 2, n, g, d, device="cuda", dtype=dtype)
    dlse = torch.randn(2, h, n, device="cuda")
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = ringref.dense_attention(*inputs, **arguments)
    torch.autograd.backward([out, lse], [dout.double(), dlse.double()])
    true = [out.detach(), lse.detach().transpose(1, 2), *(x.grad for x in inputs)]

    def on_a_rank(ring, method, layout):
        shard = ringref.partition(n, ring, layout)
        mine = [shard.take(x).requires_grad_() for x in (q, k, v)]
        out, lse = method(*mine, shard=shard, **arguments)
        torch.autograd.backward([out, lse], [shard.take(dout), shard.take(dlse, 2)])
        got = [out.detach(), lse.detach().transpose(1, 2), *(x.grad for x in mine)]
        return [relative(x, shard.take(y)) for x, y in zip(got, true, strict=True)]

    for method in METHODS:
        for layout in ("contiguous", "zigzag", "striped"):
            for errors in ringref.simulate(lambda ring: on_a_rank(ring, method, layout), p):  # noqa: B023
                # plain attention makes 2.5 eps of error; merged blocks round a few times more
                assert max(errors) < 8 * torch.finfo(dtype).eps, (method.__name__, layout, errors)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_the_kernel_for_many_segments_stands_its_proof(dtype, d):
    flash = next(kernel for kernel in kernels.KERNELS if kernel.name == "flash")
    for lse_gradient, backward in ((False, False), (False, True), (True, True)):
        task = kernels.Task("cuda", dtype, d, "ragged", lse_gradient, backward=backward)
        assert flash.why_not(task) is None and kernels.fault(flash, task) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_blocks_merge_and_add_in_one_pass(dtype):
    """And come out alike each time: several threads read what one of them writes."""
    torch.manual_seed(0)
    out, lse = torch.randn(2, 4096, 8, 128, device="cuda").to(dtype), torch.randn(2, 4096, 8, device="cuda")
    rows = {
        "all": torch.arange(4096)[None], "the later half": torch.arange(2048, 4096)[None],
        "every third of segments": torch.arange(4095).view(5, 273, 3)[..., 1],
    }  # fmt: skip
    for name, index in rows.items():
        some, heads = Rows(index), slice(None) if name == "all" else slice(1, 8, 2)
        view = some.of(out, heads)
        piece, other = torch.randn_like(view, dtype=torch.bfloat16), torch.randn_like(some.of(lse, heads))
        found = []
        for way in (sums._PLAIN, *[sums._way(2**20, view, piece)] * 10):
            mine, its = out.clone(), lse.clone()
            total = torch.empty_like(view, dtype=torch.float32)
            into = some.of(mine, heads), some.of(its, heads)
            way.merge(*into, (0, *into), (0, piece, other), (1, piece[:, :, :-1], other[:, :, 1:]))
            way.add(total, (0, view), (0, piece), (1, piece[:, :, 1:]))
            found.append((mine, its, total))
        assert way is sums._proofs[out.device] is not None, name
        for again in found[2:]:
            assert all(map(torch.equal, again, found[1])), name
        for x, y in zip(found[0], found[1], strict=True):
            assert relative(y, x.double()) < 2 * torch.finfo(x.dtype).eps, name
        assert torch.equal(found[0][2], found[1][2]), name  # one sum, rounded once


def test_forward_repeats_to_the_bit():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2048, 4, 64, device="cuda", dtype=torch.bfloat16)

    def on_a_rank(ring):
        shard = ringref.partition(2048, ring, "zigzag")
        mine = [shard.take(x) for x in (q, k, v)]
        return [ringref.ring_attention(*mine, causal=True, shard=shard) for _ in range(2)]

    for first, second in ringref.simulate(on_a_rank, 3):
        assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


def test_one_rank_takes_what_the_kernel_takes():
    q, k, v = (torch.randn(1, 4096, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def peak(step):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention
    ours = peak(lambda: ringref.ring_attention(q, k, v, causal=True))
    # the lse, kept for the backward, is what is more
    assert ours <= peak(lambda: theirs(*heads_first, is_causal=True)) + 4 * 4 * q.shape[1] * q.shape[2]


def _nccl(ring):
    torch.manual_seed(0)
    n, p = 300, ring.size
    q, k, v, dout = torch.randn(4, 1, n, 4, 64, dtype=torch.float64).cuda()
    cuts = sorted(torch.randperm(n - 1, generator=torch.Generator().manual_seed(1))[: p - 1].add(1).tolist())
    mine = torch.arange(n).tensor_split(cuts)[ring.rank]
    errors = []
    for shard in (ringref.Shard(mine, ring), ringref.partition(n, ring, "zigzag")):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        ringref.dense_attention(*inputs, causal=True, dilation=LONGNET).out.backward(dout)
        for method in METHODS:
            local = [shard.take(x).requires_grad_() for x in (q, k, v)]
            method(*local, causal=True, dilation=LONGNET, shard=shard).out.backward(shard.take(dout))
            errors += [relative(x.grad, shard.take(y.grad)) for x, y in zip(local, inputs, strict=True)]
    return max(errors)


def _over(transport):
    return lambda ring: _nccl(ringref.ProcessRing(transport=transport))


@pytest.mark.parametrize("transport", ["nccl", "peer"])
def test_processes_with_uneven_shards(transport):
    for p in {1, torch.cuda.device_count()}:
        assert max(ringref.launch(_over(transport), p, "nccl")) < 1e-10


def _subgroup(ring):
    import torch.distributed as dist

    group = dist.new_group([1])
    return _nccl(ringref.ProcessRing(group)) if ring.rank == 1 else 0.0


two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two
def test_nccl_on_a_subgroup():
    assert max(ringref.launch(_subgroup, torch.cuda.device_count(), "nccl")) < 1e-10


# ------------------------------------------------------------------------------------ copy engines


def _exchanges(ring):
    """Changing shapes, two rings alive at once, memory that torch gives back in between, and a ring that ends."""
    other = ringref.ProcessRing()
    for _ in range(3):
        posted = other.rotate(
            (torch.full((1000,), ring.rank, device="cuda"),), (torch.empty(1000, device="cuda").long(),)
        )
        everything(ring, "cuda")
        assert (posted.wait()[0] == (ring.rank - 1) % ring.size).all()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return ring.transport, other.transport


@two
def test_gpus_that_reach_each_other_use_copy_engines():
    assert set(ringref.launch(_exchanges, torch.cuda.device_count(), "nccl")) == {("peer", "peer")}


def _memory_of_messages(ring):
    """A pool of their own, which gets what PyTorch has cached for itself, and gives where that finds nothing else."""

    def pool(x):
        segments = torch.cuda.memory_snapshot()
        (found,) = (s for s in segments if 0 <= x.data_ptr() - s["address"] < s["total_size"])
        return tuple(found["segment_pool_id"])

    torch.cuda.empty_cache()
    few = torch.cuda.mem_get_info()[0] // 8
    cached = torch.empty(7 * few, dtype=torch.uint8, device="cuda")
    pools = [pool(cached)]
    del cached
    arriving = ring.space(lambda: torch.empty(3 * few, dtype=torch.uint8, device="cuda"))
    pools.append(pool(arriving))
    del arriving
    rest = [torch.empty(x * few, dtype=torch.uint8, device="cuda") for x in (4, 3)]
    return [*pools, *map(pool, rest)]


@two
def test_messages_have_a_pool_of_their_own():
    for cached, arriving, rest, lent in ringref.launch(_memory_of_messages, 2, "nccl"):
        assert cached == rest == (0, 0) != arriving == lent


def _same_over_both(ring):
    """Forward and forward+backward, repeatedly, in float64: out, lse and gradients are the same to the last bit."""
    torch.manual_seed(0)
    rings = [ringref.ProcessRing(transport=x) for x in ("nccl", "peer")]
    for n in (300, 4096, 70):
        q, k, v, dout = torch.randn(4, 1, n, 4, 64, dtype=torch.float64).cuda()
        for method in METHODS:
            found = []
            for one in rings:
                shard = ringref.partition(n, one, "zigzag")
                mine = [shard.take(x).requires_grad_() for x in (q, k, v)]
                method(*mine, causal=True, shard=shard)  # a forward whose backward never comes
                out, lse = method(*mine, causal=True, shard=shard)
                out.backward(shard.take(dout))
                found.append([out.detach(), lse.detach(), *(x.grad for x in mine)])
            for ours, theirs in zip(*found, strict=True):
                assert torch.equal(ours, theirs), (method.__name__, n)
    return [(one.transport, one.traffic) for one in rings]


@two
def test_transports_give_the_same_results():
    for (_, nccl), (name, peer) in ringref.launch(_same_over_both, torch.cuda.device_count(), "nccl"):
        assert name == "peer" and nccl == peer


def _captured(ring):
    a, b = torch.zeros(2, 1 << 20, device="cuda")

    def step():
        posted = ring.rotate((a,), (torch.empty_like(a),))
        once = a * 2  # under the message
        return ring.rotate((posted.wait()[0] + 1,), (b,)).wait()[0] + once

    def right(out, i):
        return bool((out == (ring.rank - 2) % ring.size + i + 1 + 2 * (ring.rank + i)).all())

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    found = []
    for i in range(5):
        a.fill_(ring.rank + i)
        graph.replay()
        found.append(right(out, i))
        a.fill_(ring.rank - i)  # and as it comes, in between
        found.append(right(step(), -i))
    torch.cuda.synchronize()
    del graph
    return all(found)


@two
def test_an_exchange_can_be_captured():
    assert all(ringref.launch(_captured, torch.cuda.device_count(), "nccl"))


def _captured_step(ring):
    """What `torch.cuda.graph` and `make_graphed_callables` make of a method after an ordinary call."""
    worst = []
    for method in METHODS:
        shard = ringref.partition(384 * ring.size, ring, "zigzag")

        def attention(q, k, v, method=method, shard=shard):
            return method(q, k, v, causal=True, shard=shard).out

        def draw():
            return [torch.randn(1, 384, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]

        def step(inputs, attention=attention):
            out = attention(*inputs)
            return out, *torch.autograd.grad(out, inputs, out.detach())

        mine = draw()
        step(mine)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(mine)
        graphed = torch.cuda.make_graphed_callables(attention, tuple(draw()))
        for _ in range(3):
            fresh = draw()
            with torch.no_grad():
                for x, y in zip(mine, fresh, strict=True):
                    x.copy_(y)
            true = step(fresh)
            graph.replay()
            for given in (found, step(fresh, graphed)):
                worst += [relative(x, y.double()) for x, y in zip(given, true, strict=True)]
        torch.cuda.synchronize()
        del graph, graphed, found
    return max(worst)


@two
def test_a_whole_step_can_be_captured():
    """Kernels add dQ up in any order; all else is the same."""
    assert max(ringref.launch(_captured_step, torch.cuda.device_count(), "nccl")) < 0.01


def _stands_still(ring):
    """Rank 1 takes what is sent to it and sends nothing: on the host all is well."""
    x, y = torch.ones(1000, device="cuda"), torch.empty(1000, device="cuda")
    if ring.rank == 1:
        ring.exchange({}, {0: (y,)}).wait()
        torch.cuda.synchronize()
        time.sleep(60)
    elif ring.rank == 0:
        y.sum().item()
        ring.exchange({1: (x,)}, {1: (y,)}).wait()
        y.sum().item()


@two
def test_a_message_that_never_comes_is_an_error_in_time():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of .* raised:(.|\n)*device-side assert"):
        ringref.launch(_stands_still, 2, "nccl", timeout=5)
    assert time.monotonic() - start < 40


def _stumbles(ring):
    """An exception that all ranks meet in the middle of a call, and another call."""

    def mask(b, h, i, j):
        raise KeyError("in the caller's mask")

    for _ in range(3):
        shard = ringref.partition(256, ring)
        mine = [x.requires_grad_() for x in torch.randn(3, 1, len(shard.positions), 2, 64, device="cuda")]
        with pytest.raises(KeyError):
            ringref.ring_attention(*mine, mask_mod=mask, shard=shard)
        everything(ring, "cuda", rounds=1)
    return True


@two
def test_an_exception_in_the_middle_leaves_a_ring_of_use():
    assert all(ringref.launch(_stumbles, 2, "nccl"))
