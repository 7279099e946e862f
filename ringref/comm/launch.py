"""Ranks as processes, started through torch's own elastic launcher, the engine under torchrun.

    launch(fn, p, backend="gloo" | "nccl") -> [fn(ring) of rank 0, of rank 1, ...]

`fn` travels by cloudpickle, so it may be a lambda, a closure, or a function of a notebook cell.
Ranks fork from a server that has imported torch but not ringref, so a second launch takes well
under a second and an edited ringref is read afresh. Under torchrun the ranks exist
already, and `ring = from_env()` joins them.
"""

import atexit
import io
import linecache
import logging
import marshal
import multiprocessing
import os
import pickle
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
from pathlib import Path

import cloudpickle
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .process import ProcessRing
from .ring import watchers

BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}  # nccl ranks may exchange CPU tensors too
PRELOAD = ["torch.distributed.launcher.api", "numpy", "cloudpickle", "einops"]
SIGNALS = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")]
ELASTIC_ENV = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
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
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, _cores() // p))
    job = pickled((fn, backend, timeout, threads))

    start_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if start_method == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOAD)  # no effect on a server that runs already
    with (
        tempfile.TemporaryDirectory(prefix="ringref_", ignore_cleanup_errors=True) as folder,  # a late rank may write
        _undisturbed_caller() as fatal,
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
            signals_to_handle=",".join(s.name for s in fatal),
            logs_specs=DefaultLogsSpecs(log_dir=os.path.join(folder, "logs")),
        )
        try:
            results = elastic_launch(config, _rank_main)(job, environ, folder)
        except ChildFailedError as error:
            raise _first_failure(error, p, folder) from None
    return [pickle.loads(results[rank]) for rank in range(p)]


def from_env(backend=None):
    """The ring of all ranks that torchrun started; joins the process group if that is not done yet.

    backend: "gloo", "nccl", or None: nccl if this machine has a GPU per local rank, else gloo.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise RuntimeError("from_env: RANK, WORLD_SIZE: not set; use torchrun, or launch(fn, p)")
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        backend = backend or ("nccl" if torch.cuda.device_count() >= local_world else "gloo")
        _check(from_env, local_world, backend, 600.0)
        _join_group(backend, timeout=600.0)
        atexit.register(_leave_group)
    return ProcessRing()


def _leave_group():
    """Leave the group that `from_env` joined, as torch asks; but after an error at once, for others may wait for us."""
    if dist.is_initialized() and not hasattr(sys, "last_type"):  # the interpreter sets it for an error that ended it
        dist.destroy_process_group()


def _check(fn, p, backend, timeout):
    if not callable(fn):
        raise TypeError(f"fn: expected a function of one argument, the ring, got {type(fn).__name__}")
    if not isinstance(p, int) or isinstance(p, bool) or p < 1:
        raise ValueError(f"p: expected a number of ranks of at least 1, got {p!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError("backend: 'nccl' is not part of this build of torch; use 'gloo'")
    if backend == "nccl" and p > torch.cuda.device_count():
        devices = torch.cuda.device_count()
        raise ValueError(f"p: nccl needs a CUDA device per rank, got p={p} for {devices} devices")
    if not timeout > 0:
        raise ValueError(f"timeout: expected seconds greater than 0, got {timeout!r}")


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The caller's side


@contextmanager
def _undisturbed_caller():
    """Undo what the elastic launcher does to its caller: signal handlers, log floods, __main__.

    Yields the signals that would end the caller at once. Only they are the launcher's to handle: for Ctrl-C it raises
    an Exception, which anybody may swallow, and it takes what the caller ignores, as shells have background jobs do.
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
            for logger in quiet:
                logger.disabled = True
            # fn travels by value, so no rank needs __main__: a script without a guard runs once
            sys.modules["__main__"] = types.ModuleType("__main__")
            yield fatal
        except SignalException as signalled:
            received = signalled.sigval
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


def _first_failure(error, p, folder):
    rank, failure = error.get_first_failure()
    reports = {int(file.suffix[1:]): pickle.loads(file.read_bytes()) for file in Path(folder).glob("failed.*")}
    if rank in reports:
        rank = min(reports, key=lambda r: reports[r][0])
        left = sorted(int(file.suffix[1:]) for file in Path(folder).glob("left.*"))
        note = f"\n(by then fn had returned on rank {left}, {GRACE:.0f} s before)" if left else ""
        return RankError(rank, f"rank {rank} of {p} raised:\n\n{reports[rank][1]}{note}")
    cause = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    hops = [file.read_text().strip() for file in sorted(Path(folder).glob("hop.*"))]
    told = "".join(f"\n  {hop}" for hop in hops if hop)
    return RankError(rank, f"rank {rank} of {p} died with {cause} and left no Python traceback{told}")


# A rank's side


def _rank_main(job, environ, folder):
    rank = int(os.environ["RANK"])
    threading.Thread(target=_leave_with, args=(folder,), daemon=True).start()
    try:
        os.environ.update(environ)  # the fork server may be older than the caller's changes
        fn, backend, timeout, threads = pickle.loads(job)
        torch.set_num_threads(threads)
        # the last hop outlives a rank that NCCL's watchdog or a signal ends
        note = os.open(Path(folder, f"hop.{rank}"), os.O_CREAT | os.O_WRONLY)
        watchers.append(lambda hop: os.pwrite(note, hop.ljust(160).encode(), 0))
        store = _join_group(backend, timeout)
        result = pickled(fn(ProcessRing()), _ToCpu)
        _wait_for_the_others(store, folder)
        dist.destroy_process_group()
        return result
    except BaseException as error:
        when = time.time_ns()
        # Leave at once, and the group with the process: an orderly goodbye could wait for ever for
        # a rank that waits for us. The pause lets the launcher see a rank that was killed before it
        # sees the neighbours complain.
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__.tb_next))
        draft = Path(folder, f"draft.{rank}")
        draft.write_bytes(pickle.dumps((when, text)))
        draft.rename(Path(folder, f"failed.{rank}"))
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.2)
        os._exit(1)


def _leave_with(folder):
    """End this rank when the launch is over: one that was being started when Ctrl-C came is in nobody's list."""
    while os.path.exists(folder):
        time.sleep(0.5)
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
        if time.monotonic() > end:  # closing turns the other's endless wait into an error
            Path(folder, f"left.{dist.get_rank()}").touch()
            return
        time.sleep(0.01)


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
