"""The process group that watches: what correct code may do, what incorrect code is told, and how
soon a hang is known.
"""

import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist

from ringref.comm.launch import pickled
from ringref.oracle import Pool


def jobs(p, groups=None):
    tensors = {name: torch.randn(1, 4, 2, 3) for name in ("q", "k", "v", "do")}
    step = tensors | {"dlse": torch.zeros(1, 2, 4)}
    one = {"groups": groups or [list(range(p))], "steps": [step], "program": [("forward", 0)]}
    return {rank: one | {"call": pickled({"causal": False})} for rank in range(p)}


def kinds(results):
    return {f["kind"] for r in results.values() for f in r["findings"]}


def run(pool, fn, p, **told):
    return pool.run(pickled(fn), jobs(p, **told), deadline=20)


def peers(group):
    rank, p = dist.get_rank(group), dist.get_world_size(group)
    return [dist.get_global_rank(group, (rank + step) % p) for step in (1, -1)]


@pytest.mark.parametrize("p", [1, 2, 3])
def test_every_collective_gives_what_gloo_gives(pool, p):
    def fn(q, k, v, *, causal, group):
        rank, p = dist.get_rank(group), dist.get_world_size(group)
        x = torch.full((2,), float(rank))
        ranks = torch.arange(p, dtype=torch.float32)
        parts = [torch.empty(2) for _ in range(p)]
        dist.all_gather(parts, x, group=group)
        assert torch.equal(torch.stack(parts)[:, 0], ranks)
        flat = torch.empty(2 * p)
        dist.all_gather_into_tensor(flat, x, group=group)
        assert torch.equal(flat, torch.cat(parts))
        total = x.clone()
        dist.all_reduce(total, group=group)
        assert (total == ranks.sum()).all()
        mine = torch.empty(2)
        dist.reduce_scatter_tensor(mine, flat, group=group)
        assert (mine == p * rank).all()
        swapped = torch.empty(p)
        dist.all_to_all_single(swapped, 10.0 * rank + ranks, group=group)
        assert torch.equal(swapped, 10 * ranks + rank)
        root = x.clone()
        dist.broadcast(root, dist.get_global_rank(group, p - 1), group=group)
        assert (root == p - 1).all()
        work = dist.all_gather_into_tensor(flat, x + 1, group=group, async_op=True)
        assert flat.isnan().all()
        work.wait()
        assert torch.equal(flat, torch.cat(parts) + 1)
        objects = [None] * p
        dist.all_gather_object(objects, {"rank": rank}, group=group)
        assert [o["rank"] for o in objects] == list(range(p))
        dist.barrier(group)
        return q

    results = run(pool, fn, p)
    assert [r["error"] for r in results.values()] == [None] * p
    assert not kinds(results)


def test_functional_collectives_and_their_gradients_pass_through(pool):
    def fn(q, k, v, *, causal, group):
        import torch.distributed._functional_collectives as functional

        whole = functional.all_gather_tensor_autograd(k, 0, group)
        part = functional.reduce_scatter_tensor_autograd(whole * 1.0, "sum", 0, group)
        assert torch.allclose(part, dist.get_world_size(group) * k)
        return q + part

    results = run(pool, fn, 2)
    assert [r["error"] for r in results.values()] == [None, None]
    assert {op["kind"].split("_")[0] for op in results[0]["ops"]} <= {"all", "reduce", "allgather"}
    assert len(results[0]["ops"]) >= 2 and results[0]["sent"] > 0


def test_a_receive_holds_nan_until_its_wait_and_a_send_is_read_late(pool):
    def fn(q, k, v, *, causal, group):
        to, source = peers(group)
        x, y, z = torch.ones(3), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
        sends = [dist.isend(x, to, group=group), dist.isend(torch.arange(3), to, group=group)]
        works = [dist.irecv(y, source, group=group), dist.irecv(z, source, group=group)]
        assert y.isnan().all() and (z < 0).all()
        x.fill_(7)  # what a sender must not do
        for work in works + sends:
            work.wait()
        assert (y == 7).all() and z.tolist() == [0, 1, 2]
        return q

    results = run(pool, fn, 2)
    assert [r["error"] for r in results.values()] == [None, None]
    assert kinds(results) == {"send-overwritten"}
    assert all(f["line"][0].endswith("test_sanitizer.py") for r in results.values() for f in r["findings"])


@pytest.mark.parametrize(
    "bug, kind",
    [
        ("two", "two-into-one"),
        ("same", "receive-into-send"),
        ("early", "sent-unreceived"),
        ("forget", "unfinished"),
        ("self", "self-send"),
        ("strided", "non-contiguous"),
    ],
)
def test_misuse_is_named(pool, bug, kind):
    def fn(q, k, v, *, causal, group):
        to, source = peers(group)
        x, y = torch.ones(4, 4), torch.empty(4, 4)
        if bug == "self":
            me = dist.get_rank()
            dist.batch_isend_irecv([dist.P2POp(dist.isend, x, me), dist.P2POp(dist.irecv, y, me)])
        if bug == "strided":
            x = x.t()[:2]
        works = [dist.isend(x, to, group=group), dist.irecv(x if bug == "same" else y, source, group=group)]
        if bug == "early":
            works.append(dist.isend(y, to, group=group))
            works.append(dist.irecv(torch.empty(4, 4), source, group=group))
        if bug == "two":
            works += [dist.isend(x, to, group=group), dist.irecv(y, source, group=group)]
        for work in works[1 if bug == "forget" else 0 :]:
            work.wait()
        return q

    assert kind in kinds(run(pool, fn, 2))


def test_out_of_order_waits_and_polling_do_not_hang(pool):
    def fn(q, k, v, *, causal, group):
        to, source = peers(group)
        out = [torch.full((2,), float(i)) for i in range(3)]
        into = [torch.empty(2) for _ in range(3)]
        sends = [dist.isend(x, to, group=group) for x in out]
        works = [dist.irecv(x, source, group=group) for x in into]
        for work in reversed(works):
            while not work.is_completed():
                pass
        for work in sends:
            work.wait()
        assert [x[0].item() for x in into] == [0, 1, 2]
        return q

    results = run(pool, fn, 3)
    assert all(r["error"] is None and "hang" not in r for r in results.values())
    assert not kinds(results)


def test_a_deadlock_is_known_without_a_deadline(pool):
    def fn(q, k, v, *, causal, group):
        to, source = peers(group)
        dist.send(k.detach(), to, group=group)
        dist.recv(torch.empty_like(k), source, group=group)
        return q

    began = time.monotonic()
    results = pool.run(pickled(fn), jobs(2), deadline=1000)
    assert time.monotonic() - began < 30
    assert all(r["waiting"]["kind"] == "send" for r in results.values())
    assert all(r["waiting"]["line"][2] == "fn" for r in results.values())


def test_a_hang_that_is_no_deadlock_ends_at_the_deadline_and_the_pool_recovers(pool):
    def loops(q, k, v, *, causal, group):
        while True:
            pass

    run(pool, lambda q, k, v, **_: q, 2)  # a rank that still starts is not in the loop yet
    results = pool.run(pickled(loops), jobs(2), deadline=3.0)
    assert all(r["hang"] >= 3.0 and r["line"][2] == "loops" for r in results.values())
    assert run(pool, lambda q, k, v, **_: q, 2)[0]["error"] is None


def test_a_dead_process_is_a_result(pool):
    def dies(q, k, v, *, causal, group):
        import os

        os._exit(3)

    assert "crash" in run(pool, dies, 1)[0]


def test_what_is_left_over_does_not_reach_the_next_case(pool):
    def leaves(q, k, v, *, causal, group):
        dist.isend(torch.full((3,), 7.0), peers(group)[0], group=group)
        return q

    def sends(q, k, v, *, causal, group):
        to, source = peers(group)
        got = torch.empty(3)
        work = [dist.isend(torch.ones(3), to, group=group), dist.irecv(got, source, group=group)]
        [w.wait() for w in work]
        assert (got == 1).all()
        return q

    def forgets(q, k, v, *, causal, group):
        to, source = peers(group)
        dist.isend(torch.full((3,), 7.0), to, group=group)
        dist.recv(torch.empty(3), source, group=group)
        return q

    for bad in (leaves, forgets):
        assert kinds(run(pool, bad, 2)) == {"unfinished"}
        crew = pool.crews.get(2)
        assert (crew is not None) == (bad is forgets)  # what was taken is no reason to start new processes
        results = run(pool, sends, 2)
        assert [r["error"] for r in results.values()] == [None, None] and not kinds(results)
    assert pool.crews[2] is crew


def test_an_interrupted_case_does_not_answer_for_the_next(pool):
    def slow(q, k, v, *, causal, group):
        time.sleep(2.0)
        return q

    def interrupt(*_):
        raise KeyboardInterrupt

    run(pool, lambda q, k, v, **_: q, 2)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            run(pool, slow, 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    results = run(pool, lambda q, k, v, **_: q + 1, 2)
    assert all(len(r["steps"]) == 1 and r["error"] is None for r in results.values())


@pytest.mark.slow
@pytest.mark.parametrize("name, code, says", [("right", 0, "passes"), ("hangs", 1, "unequal hop counts")])
def test_torchrun_lends_its_ranks(tmp_path, name, code, says):
    script = """
        import torch, torch.distributed as dist, torch.distributed.nn

        def right(q, k, v, *, causal, group):
            k, v = (torch.cat(torch.distributed.nn.functional.all_gather(x, group=group), 1) for x in (k, v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

        def hangs(q, k, v, *, causal, group):
            dist.recv(torch.empty(1), 1 - dist.get_rank(group), group=group)
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(script))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = ["-m", "ringref", "check", "mine.py:" + name, "--ranks", "2", "--quick"]
    done = subprocess.run([*torchrun, *told], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in " ".join(done.stdout.split())


def test_subgroups_keep_their_own_ranks(pool):
    def fn(q, k, v, *, causal, group):
        ranks = [torch.empty(1) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, torch.tensor([float(dist.get_rank())]), group=group)
        return q * 0 + torch.stack(ranks).sum()

    results = run(pool, fn, 4, groups=[[0, 2], [1, 3]])
    assert [r["steps"][0]["out"].mean().item() for r in results.values()] == [2.0, 4.0, 2.0, 4.0]


@pytest.mark.slow
def test_a_pool_starts_quickly_once_torch_is_loaded():
    Pool(1).close()
    began = time.monotonic()
    Pool(8).close()
    assert time.monotonic() - began < 10
