"""What ringref relies on though its dependencies do not promise it: one test for each, which says what it guards and
where that is used. A release that takes one away turns one named test red, instead of a verdict wrong.

What could be carried is carried in ringref: file names and lines of what travels (comm/launch.py), the answers of the
watching group (oracle/sanitizer.py). For the rest pyproject.toml bounds torch by the newest that these tests were run
on; `.ci/run` runs them on the newest of everything and, torch aside, on the lowest.
"""

import ast
import functools
import gc
import importlib.util
import inspect
import linecache
import multiprocessing.spawn
import pickle
import signal
import sys
import traceback
import types
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from common import Seen
from test_sanitizer import kinds, peers, run
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.weak import WeakIdKeyDictionary

import ringref
from ringref import dense_attention, launch
from ringref.comm.launch import Pickler, RankError, pickled
from ringref.engine.call import _selective
from ringref.engine.kernels import aten
from ringref.oracle import pool

SOURCE = Path(ringref.__file__).parent
DOCUMENTED = {"_current_frames", "_exit", "_getframe", "_replace"}  # underscored, and yet promised by Python

# ------------------------------------------------------------------------------------- the list is whole


def private(sources):
    """Underscored names that these sources take from elsewhere: attributes and imports that none of them defines."""
    taken, own = set(), set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            taken |= {
                part for name in node.names for part in f"{node.__dict__.get('module', '')}.{name.name}".split(".")
            }
        elif isinstance(node, ast.Attribute):
            (taken if isinstance(node.ctx, ast.Load) else own).add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    return {name for name in taken - own - DOCUMENTED if name.startswith("_") and not name.endswith("__")}


def test_every_private_name_is_told_here():
    """Whatever with a leading underscore ringref takes from elsewhere is named in this file."""
    assert private(["from a._b import c\nfrom ._d import e\n_f = 1\nx._g(x._f)\n"]) == {"_b", "_g"}
    here = Path(__file__).read_text()
    assert sorted(x for x in private(path.read_text() for path in SOURCE.rglob("*.py")) if x not in here) == []


# ------------------------------------------------------------------------- torch: the private operators


OPERATORS = {  # what engine/kernels.py gives by position, and how many results it takes by position
    "flash_attention_for_cpu": ("query key value dropout_p is_causal", 2),
    "flash_attention_for_cpu_backward": ("grad_out query key value out logsumexp dropout_p is_causal", 3),
    "flash_attention": ("query key value dropout_p is_causal", 2),
    "flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k "
        "dropout_p is_causal philox_seed philox_offset",
        3,
    ),
    "cudnn_attention": ("query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask", 2),
    "cudnn_attention_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias "
        "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal",
        3,
    ),
    "efficient_attention": ("query key value attn_bias compute_log_sumexp dropout_p is_causal", 2),
    "efficient_attention_backward": (
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset "
        "dropout_p grad_input_mask is_causal",
        3,
    ),
}


RAGGED = {  # for segments of many lengths: by position, by name, and the results that are taken
    "_flash_attention_forward": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask", 2
    ),
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused",
        3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RAGGED)
def test_signature_of_the_ragged_operator(name):
    """engine/kernels.py calls FlashAttention for segments of many lengths, and windows, by _flash_attention_forward
    and _flash_attention_backward: rows total h d, an lse of h total.
    """
    given, results = RAGGED[name]
    schema = getattr(aten, name).default._schema
    assert [x.name for x in schema.arguments if not x.kwarg_only] == given.split()
    named = {x.name: x for x in schema.arguments if x.kwarg_only}
    assert named.keys() >= {"scale", "window_size_left", "window_size_right"}
    assert all(x.has_default_value() for x in named.values())
    assert [str(x.type) for x in schema.returns[:results]] == ["Tensor"] * results
    q, ends = torch.empty(10, 2, 8, dtype=torch.float16, device="meta"), torch.zeros(3, dtype=torch.int32)
    told = ends, ends, 7, 7, 0.0, False
    out, lse, *_ = aten._flash_attention_forward(q, q, q, *told, False, window_size_left=3, window_size_right=None)
    assert out.shape == q.shape and lse.shape == (2, 10) and lse.dtype == torch.float32
    grads = aten._flash_attention_backward(out, q, q, q, out, lse, *told, ends, ends, window_size_left=3)
    assert [x.shape for x in grads] == [q.shape] * 3


@pytest.mark.parametrize("name", OPERATORS)
def test_signature_of_the_operator(name):
    """engine/kernels.py calls aten's private fused attention, whose arguments have changed between releases.

    _scaled_dot_product_flash_attention_for_cpu, _scaled_dot_product_flash_attention_for_cpu_backward,
    _scaled_dot_product_flash_attention, _scaled_dot_product_flash_attention_backward,
    _scaled_dot_product_cudnn_attention, _scaled_dot_product_cudnn_attention_backward,
    _scaled_dot_product_efficient_attention, _scaled_dot_product_efficient_attention_backward
    """
    given, results = OPERATORS[name]
    schema = getattr(aten, f"_scaled_dot_product_{name}").default._schema
    positions = [x for x in schema.arguments if not x.kwarg_only]
    named = {x.name for x in schema.arguments if x.kwarg_only}
    rest = [*positions[len(given.split()) :], *(x for x in schema.arguments if x.kwarg_only)]
    assert [x.name for x in positions[: len(given.split())]] == given.split()
    assert "scale" in named and all(x.has_default_value() for x in rest)
    assert [str(x.type) for x in schema.returns[:results]] == ["Tensor"] * results
    if not name.endswith("backward"):
        assert schema.returns[1].name.replace("_", "") == "logsumexp"


def test_the_cpu_kernel_goes_backward_from_a_merged_result():
    """engine/kernels.py: lse is the natural logarithm, and the backward believes the out and lse that it is given."""
    q, k, v, dout = torch.randn(4, 1, 2, 6, 8, dtype=torch.float64)
    forward = functools.partial(aten._scaled_dot_product_flash_attention_for_cpu, q, scale=0.3)
    out, lse = forward(k, v)
    assert torch.allclose(lse, (0.3 * q @ k.mT).logsumexp(-1))
    whole = [x.transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    dense_attention(*whole, scale=0.3).out.backward(dout.transpose(1, 2))
    part = k[:, :, 4:], v[:, :, 4:]
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    _, dk, dv = backward(dout, q, *part, out, lse, 0.0, False, scale=0.3)
    assert torch.allclose(dk, whole[1].grad.transpose(1, 2)[:, :, 4:])
    assert torch.allclose(dv, whole[2].grad.transpose(1, 2)[:, :, 4:])


def test_an_active_flash_implementation_can_be_asked_for():
    """engine/kernels.py puts FlashAttention-3 or -4 first where it is active; it must not be overlooked unseen."""
    attention = torch.nn.attention
    if hasattr(attention, "activate_flash_attention_impl"):
        assert attention.current_flash_attention_impl() is None


# ------------------------------------------------------------------ torch: what looks into a computation


def test_a_dispatch_mode_sees_operators_and_steps_aside():
    """lab/memory.py counts in a TorchDispatchMode; oracle/sanitizer.py and shard.py hide their own work by
    _disable_current_modes; engine/kernels.py and shard.py ask _len_torch_dispatch_stack whether there is one.
    """
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        x = torch.ones(2)
        before = len(seen)
        with _disable_current_modes():
            assert not torch._C._len_torch_dispatch_stack()
            x + x
        assert before and len(seen) == before and torch._C._len_torch_dispatch_stack() == 1
        x + x
    assert len(seen) == before + 1


def test_the_modes_of_selective_checkpointing_are_known_by_their_names():
    """engine/call.py looks for _CachingTorchDispatchMode and _CachedTorchDispatchMode among the modes, of which
    _get_current_dispatch_mode_stack knows the order.
    """
    found = []

    def layer(x):
        modes = _get_current_dispatch_mode_stack()
        found.append(([type(mode).__name__ for mode in modes], [_selective(mode) for mode in modes]))
        return x.exp()

    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    x = torch.ones(2, requires_grad=True)
    with Seen():
        checkpoint(layer, x, use_reentrant=False, context_fn=contexts).sum().backward()
    names = ["_CachingTorchDispatchMode", "_CachedTorchDispatchMode"]
    assert found == [(["Seen", name], [False, True]) for name in names]


def test_a_storage_is_one_object_that_ends_with_its_bytes():
    """lab/memory.py keys storages by identity, in torch.utils.weak, and hears of their end by weakref.finalize."""
    x, ended, seen = torch.ones(4), [], WeakIdKeyDictionary()
    seen[x.untyped_storage()] = True
    weakref.finalize(x.untyped_storage(), ended.append, 1)
    y = x.view(2, 2)
    gc.collect()
    assert y.untyped_storage() in seen and torch.ones(4).untyped_storage() not in seen
    del x
    assert not ended
    del y
    assert ended == [1]


def test_writes_are_counted():
    """oracle/sanitizer.py knows by _version that a candidate wrote to a tensor that a mask function holds."""
    x = torch.ones(2)
    before = x._version
    x.view(1, 2).add_(1)
    assert x._version > before


def test_a_view_can_be_told_from_its_base():
    """engine/attend.py asks _is_view, so that a method's result is never a view and its caller may write to it."""
    x = torch.ones(2)
    assert x[:1]._is_view() and not x._is_view()
    assert not x.new_empty(0).set_(x[:1])._is_view()


def test_a_failed_assertion_can_be_put_in_a_stream():
    """comm/peer.py loses a device on purpose by _assert_async of a false tensor; a CPU raises at once."""
    torch._assert_async(torch.ones((), dtype=torch.bool))
    with pytest.raises(RuntimeError):
        torch._assert_async(torch.zeros((), dtype=torch.bool))


def test_nested_arguments_are_walked():
    """oracle/sanitizer.py exchanges the tensors in a collective's nested lists by torch.utils._pytree."""
    x, options = torch.ones(1), dist.AllreduceOptions()
    assert [y is x for y in tree_leaves([[x], options])] == [True, False]
    assert tree_map(lambda y: 0 if y is x else y, ([[x]], options)) == ([[0]], options)


# --------------------------------------------------------------------- torch: a process group of our own


def kinds_of_operations(results):
    assert [r["error"] for r in results.values()] == [None] * len(results)
    return [op["kind"] for op in results[0]["ops"]]


def test_a_group_of_our_own_is_asked_for_each_message(pool):
    """oracle/sanitizer.py: Watched subclasses ProcessGroup; isend, irecv and a batch of them reach its send and recv.

    From 2.14 on torch asks _get_backend whether the group coalesces; Watched answers for itself that it does not.
    """

    def fn(q, k, v, *, causal, group):
        to, source = peers(group)
        x, y = torch.ones(2), torch.empty(2)
        for work in [dist.isend(x, to, group=group), dist.irecv(y, source, group=group)]:
            work.wait()
        assert group._get_backend(x.device) is group  # gloo behind it is nobody's to ask
        ops = [dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, y, source, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return q

    assert kinds_of_operations(run(pool, fn, 2)) == ["send", "recv"] * 2


def test_a_group_of_our_own_is_found_by_its_name(pool):
    """oracle/sanitizer.py: functional collectives find a group by group_name, which is in distributed_c10d's _world."""

    def fn(q, k, v, *, causal, group):
        import torch.distributed._functional_collectives as functional

        return q + functional.all_gather_tensor(k, 0, group).sum()

    (kind,) = kinds_of_operations(run(pool, fn, 2))
    assert kind.replace("_", "").startswith("allgather")


def test_a_group_of_our_own_is_told_its_place(pool):
    """oracle/sanitizer.py: a registered backend of the extended interface is given store, rank, size, name and members.

    With _set_default_backend and _register_backend it puts gloo under a group that carries the messages.
    """

    def fn(q, k, v, *, causal, group):
        assert group.members == dist.get_process_group_ranks(group)
        assert (group.rank(), group.size()) == (dist.get_rank(group), dist.get_world_size(group))
        dist.all_reduce(torch.ones(1), group=group)
        return q

    assert kinds_of_operations(run(pool, fn, 3, groups=[[0, 2], [1]])) == ["allreduce"]


def test_who_waits_for_a_collective_is_told_by_a_file_name(pool):
    """oracle/sanitizer.py: what comes through distributed_c10d.py is the candidate's to wait for; torch waits for the
    functional collectives itself. It passes over torch's frames by where their files lie.
    """

    def fn(q, k, v, *, causal, group, functional=False):
        import torch.distributed._functional_collectives as collectives

        if functional:
            collectives.all_reduce(torch.ones(1), "sum", group)
        else:
            dist.all_reduce(torch.ones(1), group=group, async_op=True)
        return q

    assert kinds(run(pool, fn, 2)) == {"unfinished"}
    assert kinds(run(pool, functools.partial(fn, functional=True), 2)) == set()


def test_every_collective_of_this_torch_is_known():
    """oracle/sanitizer.py knows collectives by how their names begin: a new one would go past the watching group."""
    other = {
        "abort", "boxed", "bound_device_id", "get_group_store", "get_reconfigure_handle", "group_desc",
        "group_name", "merge_remote_group", "monitored_barrier", "name", "new_window", "rank", "reconfigure", "recv",
        "recv_anysource", "send", "set_timeout", "shutdown", "size", "split_group", "unbox",
        "use_pg_for_symm_mem_rendezvous",
    }  # fmt: skip
    from ringref.oracle.sanitizer import Watched

    public = {x for x in dir(dist.ProcessGroup) if x[0] != "_" and x != "BackendType" and not x.isupper()}
    public = {x for x in public if not x.startswith(("register_", "unregister_", "supports_"))}
    assert sorted(x for x in public - other if x not in vars(Watched)) == []


def test_an_assertion_that_the_host_does_not_wait_for():
    """comm/ring.py compares the numbers of messages on a GPU by torch._assert_async, which takes a tensor and words."""
    torch._assert_async(torch.tensor([1, 1]).eq(1).all(), "all is well")
    with pytest.raises(RuntimeError, match="of another pass"):
        torch._assert_async(torch.tensor([1, 2]).eq(1).all(), "of another pass")


def test_a_change_in_place_is_a_new_version():
    """engine/call.py tells by x._version, and a module's _buffers, that what a mask uses has changed; engine/attend.py
    that a result has: a detached tensor shares its versions, also with other data, and what x.data gives does not.
    """
    module = torch.nn.BatchNorm1d(2)
    version = module._buffers["running_mean"]._version
    module.running_mean[0].add_(1)
    assert module._buffers["running_mean"]._version == version + 1
    for device in ("cpu", "meta"):
        x = torch.zeros(3, device=device)
        mark, own = x.detach(), x.data
        mark.data = x.new_empty(0)
        before, alone = mark._version, own._version
        x[:1].add_(1)
        x.detach().add_(1)
        assert mark._version == before + 2 and own._version == alone and not mark.numel()


def test_tensors_that_a_transform_wraps_are_told_from_others():
    """engine/call.py refuses them by torch._C._functorch.is_functorch_wrapped_tensor."""
    wrapped, found = torch._C._functorch.is_functorch_wrapped_tensor, []
    torch.func.vmap(lambda x: found.append(wrapped(x)) or x)(torch.zeros(2))
    torch.func.grad(lambda x: found.append(wrapped(x)) or x)(torch.zeros(()))
    assert found == [True, True] and not wrapped(torch.zeros(2))


# --------------------------------------------------------------------------- torch: the elastic launcher


def test_the_launcher_takes_what_it_is_told():
    """comm/launch.py: the fields of LaunchConfig, and of what is raised when a rank fails."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

    told = "min_nodes max_nodes nproc_per_node run_id rdzv_backend rdzv_endpoint local_addr max_restarts"
    told = {*told.split(), "monitor_interval", "start_method", "logs_specs"}
    assert told <= set(inspect.signature(LaunchConfig).parameters)
    assert "log_dir" in inspect.signature(DefaultLogsSpecs).parameters
    failure = ProcessFailure(local_rank=1, pid=0, exitcode=-9, error_file="none")
    assert ChildFailedError("", {1: failure}).get_first_failure() == (1, failure)
    assert failure.signal_name() == "SIGKILL"


def test_the_launcher_handles_no_signal_in_a_thread_of_its_own():
    """comm/launch.py itself handles what would end the caller at once; Ctrl-C stays KeyboardInterrupt."""
    fatal = {x for x in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(x) is signal.SIG_DFL}
    with mock.patch("signal.signal", side_effect=signal.signal) as handle:
        launch(lambda ring: None, 1)
    assert {x for (x, handler), _ in handle.call_args_list if handler is not signal.SIG_DFL} == fatal


def test_the_launcher_logs_where_it_can_be_silenced():
    """comm/launch.py: a failure's hundreds of lines come from loggers below torch's own names."""
    for module in ("launcher.api", "elastic.multiprocessing.api", "elastic.agent.server.api"):
        name = importlib.import_module(f"torch.distributed.{module}").logger.name
        assert name.startswith(("torch.distributed", "torch.multiprocessing", "torchelastic"))


def test_a_rank_finds_its_place_and_the_launchers_store():
    """comm/launch.py: RANK is set, dist.rendezvous("env://") yields store, rank and size, and the store can be checked;
    comm/process.py: get_backend_config names the devices, and get_group_store has what ranks that wait in vain tell,
    the whole world's what a rank notes of itself.
    """

    def fn(ring):
        import os

        store, rank, size = next(dist.rendezvous("env://"))
        ring.group.get_group_store().set("told", "")
        whole = dist.group.WORLD.get_group_store()
        known = [store.check(["never set"]), whole.check(["told"])]
        return int(os.environ["RANK"]), rank, size, *known, dist.get_backend_config(ring.group)

    ((*found, config),) = launch(fn, 1)
    assert found == [0, 0, 1, False, True] and "cpu" in config


def test_a_process_without_a_main_module_runs_no_script():
    """comm/launch.py and oracle/pool.py put an empty __main__ in place while ranks start, so no script runs twice."""
    with mock.patch.dict(sys.modules, __main__=types.ModuleType("__main__")):
        told = multiprocessing.spawn.get_preparation_data("a rank")
    assert not {"init_main_from_name", "init_main_from_path"} & set(told)


def test_what_a_worker_is_to_find_imported_is_there():
    """oracle/pool.py: a fork server passes in silence over what it cannot import, and each worker then takes longer."""
    assert all(map(importlib.util.find_spec, pool.NEEDED + pool.ASKED))


# --------------------------------------------------------------------------- torch: context parallelism


def test_context_parallel_is_where_it_was():
    """oracle/sanitizer.py enters it: the module _attention and its _cp_options."""
    from torch.distributed.tensor.experimental import _attention

    assert {"mesh", "buffers", "buffer_seq_dims"} <= set(inspect.signature(_attention.context_parallel).parameters)
    assert callable(_attention.set_rotate_method)
    assert isinstance(_attention._cp_options.enable_load_balance, bool)


# ------------------------------------------------------------------------ cloudpickle, IPython: names of code


def test_code_passes_through_our_pickler():
    """comm/launch.py: cloudpickle asks reducer_override for the code of a function and of a class's methods."""
    passed = []

    class Spy(Pickler):
        def reducer_override(self, obj):
            passed.extend([obj.co_name] if isinstance(obj, types.CodeType) else [])
            return super().reducer_override(obj)

    class Mine:
        def method(self):
            return helper

    def helper():
        return lambda: 1 / 0

    pickled((helper, Mine), Spy)
    assert {"helper", "method"} <= set(passed)


def test_a_function_keeps_its_file_name_and_its_cell_keeps_its_lines():
    """comm/launch.py: what cloudpickle makes of names (<dynamic-code> from 3.1.3 on) does not reach a traceback."""
    source, cell = "def fn(x):\n    return [1 / y for y in x]  # a cell\n", {}
    linecache.cache["<cell>"] = len(source), None, source.splitlines(True), "<cell>"
    exec(compile(source, "<cell>", "exec"), cell)
    sent = pickled((cell["fn"], lambda: 1 / 0))
    linecache.cache.pop("<cell>")
    for fn, where in zip(pickle.loads(sent), [("<cell>", "# a cell"), (__file__, "lambda: 1 / 0")]):
        with pytest.raises(ZeroDivisionError) as caught:
            fn([0]) if where[0] == "<cell>" else fn()
        told = "".join(traceback.format_exception(caught.value))
        assert where[0] in told and where[1] in told and "dynamic" not in told


def test_ipython_leaves_the_lines_of_a_cell_where_they_are_looked_for():
    """comm/launch.py: a cell's lines are in linecache, four entries under a name that is no file."""
    compilerop = pytest.importorskip("IPython.core.compilerop")
    name = compilerop.CachingCompiler().cache("1 / 0\n")
    linecache.checkcache(name)
    assert not Path(name).exists() and len(linecache.cache[name]) == 4 and linecache.cache[name][2] == ["1 / 0\n"]


def test_an_error_of_a_rank_can_be_told_whole():
    """comm/launch.py: results and errors come back through elastic as a dict of ranks, whatever its own error files."""
    assert launch(lambda ring: ring.rank, 1) == [0]
    with pytest.raises(RankError, match="ZeroDivisionError"):
        launch(lambda ring: 1 / 0, 1)


# ------------------------------------------------------------------------------------------------ Triton


def test_triton_compiles_once_for_all_shapes_and_has_a_barrier():
    """engine/fused.py: do_not_specialize takes names, debug_barrier lets a block's threads wait for each other, and a
    maximum can be asked to keep NaN.
    """
    triton = pytest.importorskip("triton")

    assert "do_not_specialize" in inspect.signature(triton.jit).parameters
    assert callable(triton.language.debug_barrier)
    assert "propagate_nan" in inspect.signature(triton.language.maximum).parameters
    assert triton.language.PropagateNan.ALL is not None
