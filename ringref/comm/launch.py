"""Ranks as processes, started through torch's own elastic launcher, the engine under torchrun.

    launch(fn, p, backend="gloo" | "nccl") -> [fn(ring) of rank 0, of rank 1, ...]

`fn` travels by cloudpickle, so it may be a lambda, a closure, or a function of a notebook cell.
Ranks fork from a server that has imported torch but not ringref, so a second launch takes well
under a second and an edited ringref is read afresh. Under torchrun the ranks exist
already, and `ring = from_env()` joins them.
"""

import atexit
import ctypes
import fcntl
import gc
import io
import linecache
import logging
import marshal
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
import uuid
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import cloudpickle
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .process import ProcessRing
from .ring import BrokenOff, Elsewhere, watchers

BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}  # nccl ranks may exchange CPU tensors too
PRELOAD = ["torch.distributed.launcher.api", "torch.fx.experimental.symbolic_shapes", "numpy", "cloudpickle", "einops"]
LARGE = ["torch._dynamo", "torch.distributed.tensor"]  # a second to import; an optimiser does
SIGNALS = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")]
ELASTIC_ENV = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
MOST = 4096  # ranks: each is a process
GRACE = 10.0  # seconds that a finished rank keeps its connections open for messages under way
_one_at_a_time = threading.Lock()


class RankError(RuntimeError):
    """A rank failed. `rank` is the one that raised first, and the message carries its traceback."""

    def __init__(self, rank, message):
        super().__init__(message)
        self.rank = rank


def launch(fn, p, backend="gloo", *, timeout=600.0):
    """Call `fn(ring)` on `p` new processes of this machine and return the p results, in rank order.

    fn: takes a `ProcessRing`; it and its result travel pickled. CUDA tensors in a result arrive on
        the CPU.
    p: number of ranks, at least 1. With "nccl", rank i owns CUDA device i, so p is at most the
        number of devices.
    timeout: seconds that one message may take before its rank raises.

    CPU threads per rank: OMP_NUM_THREADS if it is set, else cores // p, at least 1. Changes that
    the caller made to `os.environ` reach the ranks. A signal does to this call what it does to any
    other: Ctrl-C raises KeyboardInterrupt, what the caller ignores is ignored; the ranks end with it.

    Raises RankError with the traceback of the rank that raised first, TypeError and ValueError for
    bad arguments.
    """
    _check(fn, p, backend, timeout)
    environ = {name: x for name, x in os.environ.items() if not name.startswith(ELASTIC_ENV)}
    threads = _threads(p)
    try:
        job = pickled((fn, backend, timeout, threads))
    except Exception as error:
        raise TypeError(f"fn: cannot travel to the ranks, for what it holds cannot be pickled: {error}") from error

    start_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if start_method == "forkserver":
        multiprocessing.set_forkserver_preload(preloaded())  # no effect on a server that runs already
    with (
        _undisturbed_caller(),
        tempfile.TemporaryDirectory(prefix="ringref_", ignore_cleanup_errors=True) as folder,  # a late rank may write
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=p,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.03,
            start_method=start_method,
            logs_specs=DefaultLogsSpecs(log_dir=os.path.join(folder, "logs")),
        )
        try:
            results = _watched(lambda: elastic_launch(config, _rank_main)(job, environ, folder), p, folder)
        except ChildFailedError as error:
            raise _first_failure(error, p, folder) from None
    return [pickle.loads(results[rank]) for rank in range(p)]


def from_env(backend=None, *, timeout=None):
    """The ring of all ranks that torchrun started; joins the process group if that is not done yet.

    backend: "gloo", "nccl", or None: nccl if this machine has a GPU per local rank, else gloo.
    timeout: seconds that one message may take before its rank raises; None: the environment's RINGREF_TIMEOUT, or 600.
    """
    if not dist.is_initialized():
        _, local_world = torchrun()
        backend = backend or ("nccl" if torch.cuda.device_count() >= local_world else "gloo")
        if timeout is None:
            text = os.environ.get("RINGREF_TIMEOUT") or "600"
            try:
                timeout = float(text)
            except ValueError:
                raise ValueError(f"timeout: RINGREF_TIMEOUT must be a number of seconds, got {text!r}") from None
        _check(from_env, local_world, backend, timeout)
        _join_group(backend, timeout)
        atexit.register(_leave_group)
    elif not (backend is None and timeout is None):
        raise ValueError("backend, timeout: the process group has been initialised already, with its own")
    return ProcessRing()


def torchrun():
    """How many ranks torchrun's environment says there are, in all and on this machine; an error names what it lacks,
    or what would have this rank wait for others that do not exist.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(f"from_env: {', '.join(missing)}: not set; use torchrun, or launch(fn, p)")
    numbers = {"LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], **os.environ}
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("MASTER_PORT", 0)):
        if not numbers[name].isdecimal() or int(numbers[name]) < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {numbers[name]!r}")
    size = int(numbers["WORLD_SIZE"])
    if int(numbers["RANK"]) >= size:
        raise ValueError(f"RANK: expected less than WORLD_SIZE, which is {size}, got {numbers['RANK']}")
    return size, int(numbers["LOCAL_WORLD_SIZE"])


def _leave_group():
    """Leave the group that `from_env` joined, as torch asks; but after an error at once, for others may wait for us."""
    if dist.is_initialized() and not hasattr(sys, "last_type"):  # the interpreter sets it for an error that ended it
        dist.destroy_process_group()


def _check(fn, p, backend, timeout):
    if not callable(fn):
        raise TypeError(f"fn: expected a function of one argument, the ring, got {type(fn).__name__}")
    if not isinstance(p, int) or isinstance(p, bool) or p < 1:
        raise ValueError(f"p: expected a number of ranks of at least 1, got {p!r}")
    if p > MOST:
        raise ValueError(f"p: expected at most {MOST} ranks of one machine, got {p!r}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError("backend: 'nccl' is not part of this build of torch; use 'gloo'")
    if backend == "nccl" and p > torch.cuda.device_count():
        devices = torch.cuda.device_count()
        raise ValueError(f"p: nccl needs a CUDA device per rank, got p={p} for {devices} devices")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9:
        raise ValueError(f"timeout: expected seconds greater than 0, at most 1e9, got {timeout!r}")


def _threads(p):
    """CPU threads of each of p ranks; OpenMP takes a list, one number for each level of nesting."""
    given = os.environ.get("OMP_NUM_THREADS")
    if not given:
        return max(1, _cores() // p)
    first = given.split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise ValueError(f"OMP_NUM_THREADS: expected a number of threads of at least 1, got {given!r}")
    return int(first)


def preloaded():
    """Modules that ranks find imported: what all need, and what is large and the caller has needed."""
    return PRELOAD + [name for name in LARGE if name in sys.modules]


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The caller's side


class _Signalled(BaseException):
    """A signal that ends the caller has come."""


def _signalled(number, frame):
    raise _Signalled(number)


@contextmanager
def _undisturbed_caller():
    """Keep from the caller what the elastic launcher does to it: log floods, its variable, __main__.

    A signal that would end the caller at once ends the ranks first; all others are the caller's own.
    """
    quiet = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if name.startswith(("torch.distributed", "torch.multiprocessing", "torchelastic"))
        and isinstance(logger, logging.Logger)
    ]
    with _one_at_a_time:
        were_disabled = [logger.disabled for logger in quiet]
        in_main_thread = threading.current_thread() is threading.main_thread()
        fatal = [s for s in SIGNALS if in_main_thread and signal.getsignal(s) is signal.SIG_DFL]
        handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
        main, received = sys.modules["__main__"], None
        try:
            for number in fatal:
                signal.signal(number, _signalled)
            for logger in quiet:
                logger.disabled = True
            # fn travels by value, so no rank needs __main__: a script without a guard runs once
            sys.modules["__main__"] = types.ModuleType("__main__")
            yield
        except _Signalled as signalled:
            received = signal.Signals(signalled.args[0])
        finally:
            for number in fatal:
                signal.signal(number, signal.SIG_DFL)
            sys.modules["__main__"] = main
            for logger, was_disabled in zip(quiet, were_disabled, strict=True):
                logger.disabled = was_disabled
            os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
            if handled is not None:
                os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = handled
    if received is not None:  # the ranks are gone; what came was meant for the caller
        signal.raise_signal(received)  # which a container's first process survives
        raise RankError(None, f"launch was ended by {received.name}")


def _watched(work, p, folder):
    """What `work`, the elastic launcher, returns or raises, in a thread of its own: so signals stay the caller's, and
    somebody sees that a rank has ended without a result and without an error, for which elastic waits for ever.
    """
    outcome, done = {}, threading.Event()  # a join that Ctrl-C breaks into takes the thread for ended, before 3.13

    def run():
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    thread, silent = threading.Thread(target=run, daemon=True, name="ringref launch"), 0
    try:
        thread.start()
        while not done.wait(0.1):
            states = [_state(rank, folder) for rank in range(p)]
            silent = silent + 1 if "gone" in states and not {"alive", None} & set(states) else 0
            if silent == 10:  # a second: elastic has had its time to see it
                rank = states.index("gone")
                raise RankError(rank, f"rank {rank} of {p} ended without returning (exit code 0){_hops(folder)}")
    finally:
        if thread.ident and not done.is_set():
            notes = [file.open("r+") for file in Path(folder).glob("hop.*")]
            shutil.rmtree(folder, ignore_errors=True)  # which every rank watches
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            done.wait(2 * GRACE)
            end = time.monotonic() + GRACE
            while any(map(_held, notes)) and time.monotonic() < end:  # one that elastic did not know yet
                time.sleep(0.02)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _state(rank, folder):
    """What it said, "returned" or "failed"; else None before it begins, "alive" while its lock is held, then "gone"."""
    for word in ("returned", "failed"):
        if Path(folder, f"{word}.{rank}").exists():
            return word
    try:
        with open(Path(folder, f"hop.{rank}"), "r+") as note:
            return "alive" if _held(note) else "gone"
    except FileNotFoundError:
        return None


def _held(note):
    """Whether another process holds the lock of this file."""
    try:
        fcntl.lockf(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True


def _hops(folder):
    """The last hop of every rank, which outlives it."""
    hops = [file.read_text().strip() for file in sorted(Path(folder).glob("hop.*"))]
    return "".join(f"\n  {hop}" for hop in hops if hop)


def _first_failure(error, p, folder):
    rank, failure = error.get_first_failure()
    reports = {int(file.suffix[1:]): pickle.loads(file.read_bytes()) for file in Path(folder).glob("failed.*")}
    if rank in reports:
        rank = min(reports, key=lambda r: reports[r][:2])
        left = sorted(int(file.suffix[1:]) for file in Path(folder).glob("left.*"))
        note = f"\n(by then fn had returned on rank {left}, {GRACE:.0f} s before)" if left else ""
        if reports[rank][0]:  # it only met what another rank did, or did not do
            note += f"\nThe last that each rank told of itself:{_hops(folder)}"
        return RankError(rank, f"rank {rank} of {p} raised:\n\n{reports[rank][2]}{note}")
    cause = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return RankError(rank, f"rank {rank} of {p} died with {cause} and left no Python traceback{_hops(folder)}")


# A rank's side


def _rank_main(job, environ, folder):
    gc.freeze()  # a collection would touch, and so copy, all pages that came by the fork
    rank = int(os.environ["RANK"])
    threading.Thread(target=_leave_with, args=(folder,), daemon=True).start()
    try:
        os.environ.update(environ)  # the fork server may be older than the caller's changes
        fn, backend, timeout, threads = pickle.loads(job)
        torch.set_num_threads(threads)
        _keep_a_note(rank, folder)
        store = _join_group(backend, timeout)
        result = pickled(fn(ProcessRing()), _ToCpu)
        _wait_for_the_others(store, folder)
        dist.destroy_process_group()
        Path(folder, f"returned.{rank}").touch()
        return result
    except BaseException as error:
        when, kind = time.time_ns(), 0
        if isinstance(error, (BrokenOff, Elsewhere)):  # what another rank did, whose report is the one to show
            kind = 1
            end = time.monotonic() + (GRACE if isinstance(error, Elsewhere) else 0.0)
            while not list(Path(folder).glob("failed.*")) and time.monotonic() < end:
                time.sleep(0.01)
        # Leave at once, and the group with the process: an orderly goodbye could wait for ever for
        # a rank that waits for us. The pause lets the launcher see a rank that was killed before it
        # sees the neighbours complain.
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__.tb_next))
        draft = Path(folder, f"draft.{rank}")
        draft.write_bytes(pickle.dumps((kind, when, text)))
        draft.rename(Path(folder, f"failed.{rank}"))
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.2)
        os._exit(1)


def _keep_a_note(rank, folder):
    """Keep this rank's last hop in a file, which outlives a rank that NCCL's watchdog or a signal ends; a lock on it
    that ends with the process says that it lives.
    """
    draft = Path(folder, f"draft.{rank}")
    note = os.open(draft, os.O_CREAT | os.O_RDWR)
    fcntl.lockf(note, fcntl.LOCK_EX)
    draft.rename(Path(folder, f"hop.{rank}"))
    watchers.append(lambda hop: os.pwrite(note, hop.encode()[:400].ljust(400), 0))


def _leave_with(folder):
    """End this rank when the launch is over, or when its caller is: somebody may have killed that, or the rank was
    being started when Ctrl-C came, and is in nobody's list.
    """
    caller = multiprocessing.parent_process()
    while os.path.exists(folder):
        if connection.wait([caller.sentinel], 0.5):
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _join_group(backend, timeout):
    """Initialise the default process group from the launcher's environment; return its store."""
    device = None
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    patience = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    group = {"store": store, "rank": rank, "world_size": size, "timeout": patience}
    dist.init_process_group(BACKENDS[backend], **group, device_id=device)
    return store


def _wait_for_the_others(store, folder):
    """Keep connections open until all ranks returned, or for GRACE: one may wait for us in vain."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    store.set(f"returned {dist.get_rank()}", "")
    all_ranks = [f"returned {rank}" for rank in range(dist.get_world_size())]
    end = time.monotonic() + GRACE
    while not store.check(all_ranks):
        others = [_state(rank, folder) for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
        if "gone" in others or time.monotonic() > end:  # closing turns the other's endless wait into an error
            Path(folder, f"left.{dist.get_rank()}").touch()
            return
        time.sleep(0.02)


# What travels


class Pickler(cloudpickle.Pickler):
    """cloudpickle's, but code keeps its file's name, and a notebook cell's, which is in no file, brings its lines.

    So a traceback quotes them and the oracle names them, whatever this cloudpickle makes of names (`<dynamic-code>`).
    """

    def reducer_override(self, obj):
        if not isinstance(obj, types.CodeType):
            return super().reducer_override(obj)
        entry = linecache.cache.get(obj.co_filename, ())
        typed = entry if len(entry) == 4 and not os.path.exists(obj.co_filename) else None
        return _arrived, (marshal.dumps(obj), obj.co_filename, typed)


def _arrived(code, name, typed):
    if typed:
        linecache.cache[name] = typed
    return marshal.loads(code)


class _ToCpu(Pickler):
    def reducer_override(self, obj):
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            return obj.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


def pickled(obj, pickler=Pickler):
    """`cloudpickle.dumps`, with file names and lines."""
    buffer = io.BytesIO()
    pickler(buffer).dump(obj)
    return buffer.getvalue()
