"""`launch`: real processes behave like a function call, also when one of them does not behave."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import METHODS

from ringref import ProcessRing, from_env, partition, ring_attention, simulate
from ringref.comm import launch as room
from ringref.comm.launch import RankError, launch
from ringref.oracle import cli


def test_results_come_back_in_rank_order_with_their_uneven_tensors():
    def fn(ring):
        return ring.rank, ring.size, {"x": torch.arange(ring.rank)}

    results = launch(fn, 4)
    assert [r[:2] for r in results] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [r[2]["x"].tolist() for r in results] == [[], [0], [0, 1], [0, 1, 2]]


def test_uneven_tensors_rotate():
    def fn(ring):
        return ring.rotate(torch.full((ring.rank + 1,), float(ring.rank))).wait().tolist()

    assert launch(fn, 3) == [[2.0, 2.0, 2.0], [0.0], [1.0, 1.0]]


def test_a_function_that_no_module_holds():
    cell = {}
    exec(compile("factor = 3\ndef fn(ring):\n    return ring.rank * factor\n", "<cell>", "exec"), cell)
    assert launch(cell["fn"], 2) == [0, 3]


def test_what_gloo_cannot_send_is_an_error_and_no_crash():
    """It takes a GPU's address for one of the host's, and the process ends without a word."""

    def fn(ring):
        class Far(torch.Tensor):
            device = torch.device("cuda:0")

        with pytest.raises(ValueError, match="gloo cannot send tensors on cuda:0; .*'nccl'"):
            ring.rotate((torch.ones(2).as_subclass(Far),), (torch.empty(2),))
        return float(ring.rotate((torch.ones(2),), (torch.empty(2),)).wait()[0].sum())

    assert launch(fn, 2) == [2.0, 2.0]


def test_a_ring_of_some_ranks_counts_its_own_ranks():
    def fn(ring):
        group = dist.new_group([1, 3])
        if ring.rank not in (1, 3):
            return None
        part = ProcessRing(group)
        return part.rank, part.size, part.rotate(torch.tensor([10.0 * ring.rank])).wait().item()

    assert launch(fn, 4) == [None, (0, 2, 30.0), None, (1, 2, 10.0)]


def test_one_rank_and_the_threads_it_may_use(monkeypatch):
    assert launch(lambda ring: torch.get_num_threads(), 1) == [int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("RINGREF_TEST", "set after the fork server started")
    assert (
        launch(lambda ring: (torch.get_num_threads(), os.environ["RINGREF_TEST"]), 2)
        == [(3, "set after the fork server started")] * 2
    )


def test_the_rank_that_raised_first_is_the_one_shown():
    def helper(ring):
        raise ValueError(f"planted in rank {ring.rank}")

    def fn(ring):
        if ring.rank == 2:
            time.sleep(0.3)  # the neighbours are waiting by now, and will complain about a closed connection
            helper(ring)
        return ring.rotate(torch.zeros(3)).wait()

    with pytest.raises(RankError, match="rank 2 of 4 raised") as caught:
        launch(fn, 4)
    assert caught.value.rank == 2
    for part in ("in fn", "in helper", "helper(ring)", "ValueError: planted in rank 2"):
        assert part in str(caught.value)
    assert "Connection closed" not in str(caught.value)


def test_a_cells_own_lines_are_quoted():
    import linecache

    source = "def fn(ring):\n    wrong = 1 / (ring.rank - 1)\n    return wrong\n"
    linecache.cache["<cell 7>"] = (len(source), None, source.splitlines(True), "<cell 7>")  # as IPython does
    cell = {}
    exec(compile(source, "<cell 7>", "exec"), cell)
    with pytest.raises(RankError, match=r"wrong = 1 / \(ring.rank - 1\)"):
        launch(cell["fn"], 2)


def test_a_rank_that_was_killed_is_named():
    def fn(ring):
        if ring.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return ring.rotate(torch.zeros(3)).wait()

    with pytest.raises(RankError, match="rank 1 of 3 died with SIGKILL"):
        launch(fn, 3)


def test_leaving_and_unpicklable_results_are_errors():
    with pytest.raises(RankError, match="SystemExit: 3"):
        launch(lambda ring: sys.exit(3), 1)
    with pytest.raises(RankError, match="cannot pickle 'generator' object"):
        launch(lambda ring: (i for i in range(3)), 1)


def test_waiting_for_a_rank_that_has_returned_ends(monkeypatch):
    def fn(ring):
        import ringref.comm.launch

        ringref.comm.launch.GRACE = 0.5
        if ring.rank == 1:
            dist.recv(torch.zeros(1), 0)

    start = time.monotonic()
    with pytest.raises(RankError, match=r"by then fn had returned on rank \[0\]"):
        launch(fn, 2)
    assert time.monotonic() - start < 60  # not the 600 s of a message


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_signal_handlers_and_environment_stay(fails):
    def mine(number, frame):
        raise AssertionError("not sent in this test")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        environ, main = dict(os.environ), sys.modules["__main__"]
        interrupt = signal.getsignal(signal.SIGINT)
        if fails:
            with pytest.raises(RankError):
                launch(lambda ring: 1 / 0, 2)
        else:
            launch(lambda ring: None, 2)
        assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGINT) is interrupt
        assert dict(os.environ) == environ and sys.modules["__main__"] is main
    finally:
        signal.signal(signal.SIGTERM, before)


def running(pid):
    """Not one that has ended and that nobody has asked about: its server may have gone before it."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("after", [0.0, 0.05, 0.2, 0.5, 1.5])
def test_ctrl_c_reaches_the_caller_and_ends_the_ranks(after, tmp_path):
    def fn(ring, folder=str(tmp_path)):
        with open(os.path.join(folder, str(os.getpid())), "w"):
            time.sleep(60)

    # a shell starts what runs in the background with SIGINT ignored, which would be this test's, too
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            launch(fn, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 50
    while any(map(running, os.listdir(tmp_path))):
        assert time.monotonic() - start < 50
        time.sleep(0.1)


def test_a_signal_that_the_caller_ignores_or_handles_is_no_end():
    came = []
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: came.append(number)),
    }
    timers = [threading.Timer(1.0, os.kill, (os.getpid(), number)) for number in before]
    try:
        for timer in timers:
            timer.start()
        assert launch(lambda ring: time.sleep(3) or ring.rank, 2) == [0, 1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert came == [signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_that_ends_the_caller_ends_the_ranks(number, tmp_path, request):
    """And their folder: before the caller goes, or soon after it where it cannot handle the signal; and quietly."""
    script = """
        import os, signal, time
        from ringref.comm.launch import launch

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

        def fn(ring):
            with open(str(os.getpid()), "w"):
                time.sleep(60)

        launch(fn, 2)
    """
    (tmp_path / "job.py").write_text(textwrap.dedent(script))
    inside = tempfile.mkdtemp(dir="/tmp")  # a short name: a fork server's socket lies in it
    request.addfinalizer(lambda: shutil.rmtree(inside, ignore_errors=True))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": inside}
    said = (tmp_path / "said").open("w+")
    job = subprocess.Popen([sys.executable, "job.py"], cwd=tmp_path, env=env, stderr=said)
    while len(ranks := [x for x in os.listdir(tmp_path) if x.isdigit()]) < 2:
        assert job.poll() is None
        time.sleep(0.1)

    def left():
        folders = [x for x in os.listdir(inside) if x.startswith("ringref_")]
        return folders + list(filter(running, ranks))

    assert len(left()) == 3
    job.send_signal(number)
    assert job.wait(30) == -number
    end = time.monotonic() + (20 if number == signal.SIGKILL else 1)  # for whoever reaps them
    while left() and time.monotonic() < end:
        time.sleep(0.1)
    assert left() == []
    text = (tmp_path / "said").read_text()
    assert "Logging error" not in text and ("KeyboardInterrupt" in text) == (number == signal.SIGINT), text


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_rank_that_ends_without_returning(all_of_them):
    """Its exit code says that all is well, and its result never comes."""
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2 ended|rank 0 of 2 ended without returning") as caught:
        launch(lambda ring: os._exit(0) if ring.rank or all_of_them else 1, 2)
    assert caught.value.rank == 0 if all_of_them else 1
    assert time.monotonic() - start < 60


def test_the_rank_whose_argument_was_bad_is_the_one_shown():
    """And not the others, which only say that it was."""

    def fn(ring):
        shard, x = partition(8, ring), torch.randn(1, 2, 1, 4)
        try:
            ring_attention(x, x, x, shard=shard, q_chunk=0 if ring.rank == 1 else None)
        except ValueError:
            time.sleep(0.3 * (ring.rank == 1))  # so the others are there first
            raise

    with pytest.raises(RankError, match="ValueError: q_chunk must be a positive number .* got 0") as caught:
        launch(fn, 4)
    assert caught.value.rank == 1


def test_a_timeout_says_who_did_not_come():
    def fn(ring):
        shard, x = partition(6, ring), torch.randn(1, 2, 1, 4)
        ring_attention(x, x, x, shard=shard)
        if ring.rank == 1:
            time.sleep(60)
        ring_attention(x, x, x, shard=shard)

    with pytest.raises(RankError, match=r"of ranks \[1\] nothing was heard: they did not come") as caught:
        launch(fn, 3, timeout=3.0)
    assert caught.value.rank in (0, 2)
    # its last: a number ahead, and two hops
    assert "rank 1, hop 3: the exchange with ranks [0, 2] is done" in str(caught.value)
    assert f"rank {2 - caught.value.rank}, hop 3" in str(caught.value) and "broke off too" in str(caught.value)


def test_a_rank_without_a_shard_is_named():
    def fn(ring):
        shard, x = partition(4, ring), torch.randn(1, 2, 1, 4)
        for _ in range(2):
            ring_attention(x, x, x, shard=shard if ring.rank else None)
        time.sleep(60 * (ring.rank == 0))  # at work elsewhere

    with pytest.raises(RankError, match=r"they did not come; rank 0 of 2 has attended without a shard"):
        launch(fn, 2, timeout=3.0)


def test_two_threads_with_one_ring():
    """An error in one of them, on every rank, where messages would be taken for each other's; and nothing that was
    under way is left by a call, or the backward of it in another thread would be refused.
    """

    def fn(ring):
        shard = partition(4 * ring.size, ring)
        for method in METHODS.values():
            q = torch.randn(1, 4, 2, 4, requires_grad=True)
            out = method(q, q, q, shard=shard, causal=True).out.sum()
            assert ring._under_way == 0
            with ThreadPoolExecutor(1) as other:
                other.submit(out.backward).result()
            assert ring._under_way == 0
        ring.announce([0])
        ring._under_way += 1  # as while a message of this thread's is waited for
        with ThreadPoolExecutor(1) as other:
            error = other.submit(ring_attention, q, q, q, shard=shard).exception()
        return str(error)

    for rank, text in enumerate(launch(fn, 3)):
        assert f"two threads of rank {rank} use its ring at once; give each its own group" in text


def test_ranks_in_different_passes():
    """All are told, also the one that only waits for those that noticed; and gloo, which ends a process that is sent
    more than it expects, is not tried.
    """

    def fn(ring):
        outs = []
        for n in (6, 12):
            x = torch.randn(1, n // 3, 1, 4, requires_grad=True)
            outs.append(ring_attention(x, x, x, shard=partition(n, ring)).out)
        try:
            for out in outs if ring.rank else outs[::-1]:
                out.sum().backward()
        except RuntimeError as error:
            return str(error)

    for text in launch(fn, 3, timeout=4.0):
        assert "of another pass than mine; all ranks must run backward of the same calls" in text


ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in ENVIRONMENT),
        *(("RANK", value) for value in ("", "x", "-1", "1", "7")),
        *(("WORLD_SIZE", value) for value in ("", "x", "-1", "0", "2.0")),
        *(("LOCAL_WORLD_SIZE", value) for value in ("x", "0")),
        *(("MASTER_PORT", value) for value in ("", "x", "-1")),
    ],
)
def test_half_an_environment(name, value, monkeypatch, capsys):
    """A rank that there is not would wait for its like till the timeout; the oracle's shell joins in the same way."""
    for key, good in ENVIRONMENT.items():
        monkeypatch.setenv(key, good)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError if value is None else ValueError, match=f"{name}: (not set|expected)"):
        from_env("gloo")
    if "RANK" in os.environ:
        with pytest.raises(SystemExit) as left:
            cli.main(["math:sqrt"])
        assert (
            left.value.code == 2
            and f"error: {'from_env: ' if value is None else ''}{name}: " in capsys.readouterr().err
        )


def test_the_timeout_of_from_env(monkeypatch):
    """An argument, else the environment, else 600 s."""
    asked = []
    monkeypatch.setattr(room, "_join_group", lambda backend, timeout: asked.append(timeout))
    monkeypatch.setattr(room, "ProcessRing", lambda: None)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from_env("gloo")
    monkeypatch.setenv("RINGREF_TIMEOUT", "12.5")
    from_env("gloo")
    from_env("gloo", timeout=3)
    assert asked == [600.0, 12.5, 3]
    monkeypatch.setenv("RINGREF_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="RINGREF_TIMEOUT must be a number of seconds, got 'soon'"):
        from_env("gloo")
    with pytest.raises(ValueError, match="timeout: expected seconds"):
        from_env("gloo", timeout=0)


@pytest.mark.parametrize("timeout", [None, 0, -1, True, "60", float("nan"), float("inf"), 10**400])
def test_a_timeout_that_is_none(timeout):
    with pytest.raises(ValueError, match="timeout: expected seconds greater than 0"):
        launch(print, 1, timeout=timeout)


def test_threads_of_openmp(monkeypatch):
    """A list is one number for each level of nesting."""
    for text, threads in (("4,2", 4), (" 3 ", 3), ("", max(1, room._cores() // 2))):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert room._threads(2) == threads
    for text in ("many", "0", "-1", "1.5"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        with pytest.raises(ValueError, match="OMP_NUM_THREADS: expected a number of threads"):
            launch(print, 1)


def test_a_function_that_cannot_travel():
    with pytest.raises(TypeError, match="fn: cannot travel to the ranks.*cannot pickle '_thread.lock'"):
        lock = threading.Lock()
        launch(lambda ring: lock, 1)
    ring = simulate(lambda ring: ring, 1)[0]
    with pytest.raises(TypeError, match="fn: cannot travel.*ThreadRing cannot be pickled"):
        launch(lambda _: ring.rank, 1)


def test_failures_are_quiet(capfd):
    with pytest.raises(RankError):
        launch(lambda ring: 1 / 0, 3)
    out, err = capfd.readouterr()
    assert out + err == ""


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((None, 2), TypeError, "fn: expected a function of one argument"),
        ((print, 0), ValueError, "p: expected a number of ranks of at least 1, got 0"),
        ((print, 10**9), ValueError, "p: expected at most 4096 ranks"),
        ((print, 1.5), ValueError, "p: .* got 1.5"),
        ((print, 2, "mpi"), ValueError, "backend: expected one of gloo, nccl, got 'mpi'"),
        ((print, 1000, "nccl"), ValueError, "(p: nccl needs a CUDA device per rank|backend: 'nccl' is not part)"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        launch(*arguments)


def run(*command, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_same_function_under_torchrun(tmp_path):
    script = """
        import atexit
        import time
        from pathlib import Path

        import torch
        from ringref.comm.launch import from_env

        def threads():  # gloo's; one that lives while the interpreter ends may abort the process
            try:
                return sum("gloo" in name.read_text() for name in Path("/proc/self/task").glob("*/comm"))
            except OSError:  # one ended meanwhile
                return threads()

        def last():  # after what is registered later
            end = time.monotonic() + 5
            while threads() and time.monotonic() < end:  # a thread that was joined is listed for a moment more
                time.sleep(0.05)
            left = not torch.distributed.is_initialized() and threads() == 0 < before
            said = f"rank {ring.rank} of {ring.size} got {came.item():.0f} and leaves: {left}"
            print(f"{said}\\n", end="", flush=True)  # at once, for torchrun's ranks share a pipe

        atexit.register(last)
        ring = from_env("gloo")
        came = ring.rotate(torch.tensor([float(ring.rank)])).wait()
        before = threads()
    """
    (tmp_path / "job.py").write_text(textwrap.dedent(script))
    out = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "job.py", cwd=tmp_path)
    assert sorted(out.splitlines()) == [f"rank {i} of 2 got {1 - i} and leaves: True" for i in range(2)]


def test_a_script_needs_no_main_guard(tmp_path):
    script = """
        from ringref.comm.launch import launch

        class Mine:
            def __init__(self, rank):
                self.rank = rank

        results = launch(lambda ring: Mine(ring.rank), 2)
        print("once", [r.rank for r in results], all(isinstance(r, Mine) for r in results))
    """
    (tmp_path / "job.py").write_text(textwrap.dedent(script))
    assert run("job.py", cwd=tmp_path) == "once [0, 1] True\n"
