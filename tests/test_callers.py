"""Where people call from: torch.compile, a default device, other kinds of tensor, checkpointing, autocast, decoding."""

import ast
import doctest
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from common import METHODS, Inputs, Results, Seen, Split, assert_close, both_ways, inputs, layout
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ringref
from ringref import Dilation, Shard, dense_attention, launch, partition, simulate, sink
from ringref.engine import plan, route, visits

# ------------------------------------------------------------------------------------- real processes


def compiled(ring):
    """Every method between other operations, twice each, forward and backward: the same as without the compiler."""
    shard, breaks = partition(12, ring, "zigzag"), {}
    for name, method in METHODS.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

        def layer(x, logits, method=method):
            x = x * 2
            return shard.gather(sink(method(x, x, x, causal=True, shard=shard), logits).out.sin())

        fast = torch.compile(layer, backend="eager")
        for seed in range(2):
            x = shard.take(inputs(12, h=2, g=2, dtype=torch.float32, seed=seed).q)
            ends = []
            for function in (layer, fast):
                leaves = [x.clone().requires_grad_(), torch.zeros(2, requires_grad=True)]
                out = function(*leaves)
                out.square().sum().backward()
                ends.append((out.detach(), *(leaf.grad for leaf in leaves)))
            assert all(map(torch.allclose, *ends)), (name, seed)
        breaks[name] = dict(torch._dynamo.utils.counters["stats"]), dict(torch._dynamo.utils.counters["graph_break"])
    return breaks


def other_tensors(ring):
    """What a DTensor and a nested tensor are told, on every rank; one rank's is every rank's error."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor import distribute_tensor

    shard, mesh, seen = partition(8, ring), init_device_mesh("cpu", (ring.size,)), []
    q, k, v = inputs(8, h=2, g=2)[:3]
    spread = distribute_tensor(q, mesh, [Split(1)])
    nested = torch.nested.nested_tensor([q[0], k[0][:5]], layout=torch.jagged)
    mine = [shard.take(x) for x in (q, k, v)]
    for method in METHODS.values():
        for wrong in ((spread, *mine[1:]), (mine[0], spread, spread), (nested, *mine[1:])):
            try:
                method(*(wrong if ring.rank == 0 else mine), shard=shard)
            except (TypeError, ValueError) as error:
                seen.append(f"{type(error).__name__}: {error}")
        found = method(spread.to_local(), *mine[1:], shard=shard)
        assert found.out.equal(method(*mine, shard=shard).out)
    return seen


def forgotten(ring):
    """Calls without a shard, and with the shard that says that it is meant."""
    given, heard = inputs(4)[:3], []
    for shards in ([Shard(torch.arange(4), None)], [None], [None, None]):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for shard in shards:
                for method in METHODS.values():
                    method(*given, shard=shard)
        heard.append([str(x.message) for x in said])
    return heard


def test_processes_compile_and_other_tensors_and_a_shard_forgotten():
    def on(ring):
        return compiled(ring), other_tensors(ring), forgotten(ring)

    for rank, (breaks, seen, heard) in enumerate(launch(on, 2)):
        for stats, reasons in breaks.values():
            # one graph before and one after, and none again for other data
            assert stats["unique_graphs"] == 2 and all("disable" in reason for reason in reasons), (stats, reasons)
        first, second, third = seen[:3]
        if rank == 0:
            assert "TypeError: q is a DTensor: pass this rank's rows, q.to_local()" in first
            assert "k is a DTensor" in second
            assert "TypeError: q is a nested tensor: pass its rows packed, q.values()[None] with cu_seqlens" in third
        assert len(seen) == 3 * len(METHODS) and (rank == 0 or all("rank 0 rejected" in x for x in seen))
        meant, once, again = heard
        assert not meant and len(once) == 1 and not again, heard
        assert "shard is None on one of 2 ranks" in once[0] and "Shard(positions, None)" in once[0]


def test_nobody_is_warned_where_nobody_shares(recwarn):
    for method in METHODS.values():
        method(*inputs(3)[:3])
    assert not recwarn.list


def test_import_leaves_the_compiler_alone():
    """Dynamo takes as long to import as all of torch."""
    import subprocess
    import sys

    ask = "import sys, ringref; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0


# --------------------------------------------------------------------------------- the default device


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dilation", [None, Dilation([5, 40], [2, 3])])
def test_default_device(method, dilation):
    """Positions are made on the CPU, whatever tensors are made on by default; meta stands for any other device."""
    n = 14 + list(METHODS).index(method)  # no other test's plans, which are remembered
    given, split = inputs(n), Split(layout("zigzag", n, 3))
    true = split.true(given, causal=True, dilation=dilation)
    ringref.shard.counted.cache_clear()

    def on(ring):
        with torch.device("meta"):
            shard = partition(n, ring, "zigzag")
            mine = given.cut(*split.rows[ring.rank])
            METHODS[method](*mine[:3])
            assert shard.gather(mine.q).device == mine.q.device
            return both_ways(METHODS[method], mine, shard=shard, causal=True, dilation=dilation, q_chunk=3)

    for rank, (one, other) in enumerate(zip(simulate(on, 3, adversarial=True), true)):
        assert_close(one, other, f"rank {rank}")


def test_default_device_does_not_hide_errors():
    def on(ring):
        with torch.device("meta"), pytest.raises(ValueError, match="positions leave gaps"):
            dense_attention(*mine, shard=Shard(positions[ring.rank], ring))
        return True

    mine, positions = inputs(2)[:3], [torch.tensor([0, 1]), torch.tensor([3, 4])]
    assert all(simulate(on, 2))


MAKERS = set("arange tensor as_tensor empty zeros ones full eye linspace rand randn randperm".split())


def without_a_device(source):
    """Calls that make a tensor on whatever device is the default."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
            made = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if made and not any(word.arg in ("device", "like", None) for word in node.keywords):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_no_room_leaves_a_device_to_chance():
    folder, found = Path(ringref.__file__).parent, {}
    for path in [*folder.glob("*.py"), *folder.glob("engine/*.py"), *folder.glob("comm/*.py")]:
        found[path.name] = list(without_a_device(path.read_text()))
    assert not {name: lines for name, lines in found.items() if lines}
    assert list(without_a_device("import torch\nx = torch.arange(3)\ny = torch.zeros(3, device=x.device)\n"))


# ---------------------------------------------------------------------------- checkpointing, autocast


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("keep", [("mm",), ("mm", "bmm"), ("bmm", "exp", "flash", "addcmul", "logaddexp")], ids=str)
def test_selective_activation_checkpointing(method, adversarial, backend, keep):
    """Some products are kept and the rest is recomputed, messages and all; attention as a whole, whatever is kept."""
    given, split = inputs(16), Split(layout("zigzag", 16, 3))

    def on(ring):
        def policy(_, op, *__, **___):
            kept = any(f"aten.{name}." in f"{op}." or (name == "flash" and name in str(op)) for name in keep)
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        def layer(q, k, v):
            mixed = [(x.flatten(0, 2) @ weight).view(x.shape) for x in (q, k, v)]
            return METHODS[method](*mixed, causal=True, shard=split.shard(ring), backend=backend)

        weight = torch.eye(3, dtype=torch.float64)
        mine = given.cut(*split.rows[ring.rank])
        kept = partial(checkpoint, layer, use_reentrant=False)
        return both_ways(partial(kept, context_fn=partial(create_selective_checkpoint_contexts, policy)), mine)

    found = simulate(on, 3, adversarial=adversarial)
    for rank, (one, true) in enumerate(zip(found, split.true(given, causal=True))):
        assert_close(one, true, f"rank {rank}")


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_message_does_not_show_to_the_modes_of_whoever_waits_first(adversarial):
    def on(ring):
        x = torch.full((3,), float(ring.rank))
        with Seen() as mode:
            pending = ring.rotate((x,), (torch.empty(3),))
            del mode.ops[:]
            (got,) = pending.wait()
            return mode.ops, got

    for rank, (ops, got) in enumerate(simulate(on, 4, adversarial)):
        assert not ops and got.eq((rank - 1) % 4).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"window": (4, 3)}, {"cu_seqlens": torch.tensor([0, 3, 17, 18, 31])}, {"dilation": Dilation([8, 16], [1, 2])}],
    ids=["causal", "window", "documents", "dilation"],
)
def test_a_first_call_looks_like_a_second(method, arguments):
    """To a mode that looks on, which counts operators or replays them: plans are made unseen."""
    given, split = inputs(31), Split(layout("zigzag", 31, 3))
    forget_plans()

    def on(ring):
        mine, seen = given.cut(*split.rows[ring.rank]), []
        for _ in range(2):
            with Seen() as mode:
                both_ways(METHODS[method], mine, shard=split.shard(ring), causal=True, **arguments)
            seen.append(mode.ops)
        return seen

    for first, second in simulate(on, 3):
        assert first == second


def forget_plans():
    for room in (plan, route, visits):
        for cached in vars(room).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_score_mod_alone(dtype):
    """What a caller's own function multiplies keeps the precision of the scores."""
    given = inputs(12, dtype=dtype)
    mix = torch.randn(12, 12)

    def product(score, b, h, q_idx, kv_idx):
        return score + (mix @ mix)[q_idx, kv_idx]

    def cast(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return dense_attention(*args, score_mod=product)

    plain, mixed = both_ways(partial(dense_attention, score_mod=product), given), both_ways(cast, given)
    assert all(map(torch.equal, plain, mixed))


# --------------------------------------------------------------------------------- decoding, examples


def test_examples_of_shard():
    """Rotary embedding in every layout, decoding, chunked prefill, and a query that every rank has."""
    ran = doctest.testmod(ringref.shard)
    assert ran.attempted > 10 and not ran.failed


def positions_of(n, p, queries):
    """Keys in runs, and these queries, of which each rank has some."""
    keys = torch.arange(n).tensor_split(p)
    return Split(list(zip(queries.tensor_split(p), keys)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("p", [1, 3, 4])
def test_fewer_queries_than_keys_on_every_rank(method, count, p):
    """One query on one rank, decoding; a chunk of prefill, cut over the ranks; forward and backward."""
    n = 19
    split = positions_of(n, p, torch.arange(n - count, n))
    given = inputs(count, n)
    queries = torch.arange(n - count, n)
    true = both_ways(dense_attention, given, causal=True, shard=Shard(queries, None, torch.arange(n)))
    last = inputs(count, n)
    scores = torch.einsum("bqhd,bkhd->bhqk", last.q, last.k.repeat_interleave(2, 2)) / 3**0.5
    scores = scores.masked_fill(torch.arange(n) > queries[:, None], -torch.inf)
    assert (true.lse - scores.logsumexp(-1)).abs().max() < 1e-12
    for one, (q, k) in zip(split.found(METHODS[method], given, causal=True), split.rows):
        mine = Results(true.out[:, q], true.lse[:, :, q], true.dq[:, q], true.dk[:, k], true.dv[:, k])
        assert_close(one, mine, f"{method}, {count} of {n}, p = {p}")


@pytest.mark.parametrize("method", METHODS)
def test_replicated_queries_say_what_to_do(method):
    def on(ring):
        shard = Shard(torch.tensor([5]), ring, torch.arange(6).tensor_split(2)[ring.rank])
        given = Inputs(*inputs(1, 3))
        with pytest.raises(ValueError, match=r"positions overlap.*\[5\] are held twice; let one rank ask \(see Shard"):
            METHODS[method](*given[:3], shard=shard)
        return True

    assert all(simulate(on, 2, adversarial=True))
