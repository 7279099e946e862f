"""Messages by copy engines, between GPUs that reach each other: they take no multiprocessor from a running kernel.

A sender maps the receiver's memory into its own address space and copies straight from where a tensor is to where it
is wanted: no buffer lies between. The hosts agree on the addresses, the streams on the moment:

    receiver's host     offers the addresses of `into`, and for memory that is new to the sender a handle to map it
    sender's host       takes the offer, and checks that it is for this message of this pass
    receiver's stream   ready = 1 at the sender · wait full == 1 · full = 0
    sender's stream     wait ready == 1 · ready = 0 · copy · full = 1 at the receiver

Hosts offer when they post and take offers when they have come, at the latest in `wait`: meanwhile they launch what is
computed under the message, and need not be in step. A thread takes the offers of who is long in coming to that, so that
others do not wait for what it does in between; what nobody has offered in time breaks its ring, and no other. Signals
are integers in GPU memory that streams write and wait for, two for each pair of ranks and direction. A rank queues the
exchanges of all its rings in the order in which it posted them, each ring's on one stream, first what others wait for:
so its waits are for the same exchange on other ranks, and ranks that post alike cannot lock each other, whatever
hardware queue a stream is in. All that a stream is told is constant: a captured exchange can be replayed, as long as
its ring lives, though nobody looks at the clock then. NCCL hides nothing under an attention kernel, be its stream of
high priority or its CTA policy zero (four H200, NCCL 2.28), unless both are captured: then its kernel can come first,
and takes processors from attention, which at 8k tokens a hop slows by 27 %, a copy engine by 5. `Peers` is this
protocol, `Mailbox` carries what hosts say, and `Cuda` is what is asked of a device; the tests have a device of their
own.
"""

from __future__ import annotations

import ctypes
import json
import logging
import select
import socket
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from .ring import Message

log = logging.getLogger(__name__)
_abandoned: list = []  # memory of rings that were dropped in the middle of an exchange
_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32 and …_WRITE_VALUE_32


class Unreachable(RuntimeError):
    """These ranks cannot write to each other's memory."""


class Peers:
    """One rank's end of the messages. Making one is collective: it raises `Unreachable` on all ranks or on none."""

    def __init__(self, rank: int, size: int, store, make_device: Callable, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        self.broken, self._signals, self._unheard = None, None, 0
        self._others = [r for r in range(size) if r != rank]
        self._told = {r: set() for r in self._others}  # the segments of mine that a rank knows
        self._maps = {r: {} for r in self._others}  # where its segments are for me
        self._offered, self._accepted = dict.fromkeys(self._others, 0), dict.fromkeys(self._others, 0)
        self._prepared: dict = {}
        self._flying: deque = deque()  # (mark, what it keeps alive, since when, what it is)
        self._reach(store, make_device)
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    def _reach(self, store, make_device: Callable) -> None:
        """Map everybody's signals and exchange something; that it worked everywhere is what all ranks know then."""

        def offer():
            self._device, self._mailbox = make_device(), Mailbox(self.timeout)
            self._line = self._device.line
            self._signals = self._device.signals(2 * self.size)
            key, offset = self._device.locate(self._signals.data_ptr())
            return json.dumps([self._mailbox.name, key, self._device.export(key).hex(), offset])

        def accept():
            for peer in self._others:
                name, key, handle, offset = json.loads(offers[peer])
                self._mailbox.meet(peer, name)
                self._maps[peer][key] = self._device.open(bytes.fromhex(handle))
                self._pages[peer] = self._maps[peer][key] + offset
                self._told[peer].add(json.loads(offers[self.rank])[1])

        def prove():
            mine, into = (
                self._signals.new_full((9,), self.rank),
                {r: (self._signals.new_zeros(9),) for r in self._others},
            )
            self.post(dict.fromkeys(self._others, (mine,)), into, 0, f"rank {self.rank}'s first exchange")()
            if wrong := [r for r, (x,) in into.items() if x.tolist() != [r] * 9]:
                raise RuntimeError(f"what ranks {wrong} wrote did not arrive")

        offers = together(self.rank, self.size, store, "offer", offer)
        self._pages = {self.rank: self._signals.data_ptr()}
        together(self.rank, self.size, store, "accept", accept)
        together(self.rank, self.size, store, "prove", prove)

    def _ready(self, sender: int, receiver: int) -> int:
        """Where the sender is told that a receiver's memory may be written."""
        return self._pages[sender] + 8 * receiver

    def _full(self, sender: int, receiver: int) -> int:
        """Where the receiver is told that a sender has written it."""
        return self._pages[receiver] + 8 * sender + 4

    def moment(self) -> Any:
        """What the current stream holds now, for an exchange that is posted later and need not follow more."""
        return self._device.begin()

    def space(self, make: Callable[[], Any]) -> Any:
        """What `make` makes to receive in, of memory from which nothing else is cut where there is other: ranks map it
        whole, and what they map is not free again before they are told.
        """
        return self._device.space(make)

    def post(
        self, outgoing: dict[int, Message], into: dict[int, Message], number: int, what: str, moment: Any = None
    ) -> Callable[[], None]:
        """Post an exchange that follows what the current stream holds, or held at a moment; the returned function lets
        that stream wait for it. `number` must be the same on both sides of a message.
        """
        self._check()
        solid = {r: tuple(x.contiguous() for x in message) for r, message in outgoing.items()}
        if any(x is not y for r, message in outgoing.items() for x, y in zip(message, solid[r], strict=True)):
            moment = None  # a copy has been made just now
        one = _Exchange(self, solid, into, number, what, moment)
        with self._line.lock:
            with self._or_broken():
                for peer, message in into.items():
                    self._offer(peer, message, number)
            self._line.posted.append(one)
            self._line.take_offers(self)

        def finish():
            self._serve(lambda: one.mark is not None)
            one.mark.join()
            one.kept.clear()

        return finish

    def look_after(self) -> None:
        """What must not wait for this rank's host, which may be busy, or held up by its device."""
        if self._line.lock.acquire(timeout=0.05):
            try:
                self._mailbox.late((), "offer")  # a place in it for who is ahead
                self._line.take_offers(captured=False)
            finally:
                self._line.lock.release()
        self.overdue()

    def _serve(self, done: Callable[[], bool], captured: bool = True) -> None:
        """Queue what can be queued until `done`, which may wait for any of it on another rank."""
        while True:
            with self._line.lock:
                self._check()
                self._line.take_offers(self, captured)
                if done():
                    return
                first = self._line.posted[0].peers if captured and self._line.posted else self
                came = first._mailbox.take(0.02)
            if not came:
                time.sleep(0.001)  # who waits for the lock gets it

    def _due(self, one: _Exchange) -> bool:
        """Whether an exchange need not be waited for, or no longer."""
        expired = time.monotonic() - one.since > self.timeout
        return bool(self.broken) or not self._mailbox.late(one.outgoing, "offer") or expired

    def _queue(self, one: _Exchange) -> None:
        """Take the offers for an exchange, and queue it."""
        device = self._device
        with self._or_broken():
            self._come(one.outgoing, "offer", one.since)
            copies = [x for peer, message in one.outgoing.items() for x in self._accept(peer, message, one.number)]
            first, last = self._signals_of(tuple(one.outgoing), tuple(one.into))
            try:
                device.follow(one.start)
                device.signal(first)
                device.copy(copies)
                device.signal(last)
                one.mark = device.end()
            except BaseException:
                _abandoned.append(one.kept)  # others may have been told to write to it
                raise
        if not one.captured:  # a mark in a graph cannot be looked at
            self._flying.append((one.mark, one.kept, time.monotonic(), one.what))
        one.outgoing = one.into = None

    def tell(self, row: list[int]) -> Callable[[], list[list[int]]]:
        """Tell all ranks a row of a few integers; the returned function waits for every rank's, in rank order."""
        self._check()
        since, text = time.monotonic(), json.dumps([self.rank, "row", row])
        with self._or_broken(), self._line.lock:
            for peer in self._others:
                self._mailbox.send(peer, text)
        self._unheard += 1

        def hear():
            with self._or_broken():
                while self._unheard:  # first what this rank was interrupted before it waited for
                    self._serve(lambda: self._come(self._others, "row", since), captured=False)
                    rows = [row if r == self.rank else self._mailbox.receive(r, "row")[0] for r in range(self.size)]
                    self._unheard -= 1
                return rows

        return hear

    def _come(self, peers: Iterable[int], kind: str, since: float) -> bool:
        """Whether each of these ranks has sent such a message; raises if one has not in time."""
        late = self._mailbox.late(peers, kind)
        if late and time.monotonic() - since > self.timeout:
            raise TimeoutError(f"rank {late[0]} did not post its side within {self.timeout:g} s")
        return not late

    def _signals_of(self, to: tuple[int, ...], sources: tuple[int, ...]) -> tuple:
        """What a stream is told before and after the copies of an exchange."""
        if (to, sources) not in self._prepared:
            me, prepare = self.rank, self._device.prepare
            first = [(_WRITE, self._ready(peer, me), 1) for peer in sources]
            first += [(op, self._ready(me, peer), value) for peer in to for op, value in ((_WAIT, 1), (_WRITE, 0))]
            last = [(_WRITE, self._full(me, peer), 1) for peer in to]
            last += [(op, self._full(peer, me), value) for peer in sources for op, value in ((_WAIT, 1), (_WRITE, 0))]
            self._prepared[to, sources] = prepare(first), prepare(last)
        return self._prepared[to, sources]

    def _offer(self, peer: int, message: Message, number: int) -> None:
        places = [(*self._device.locate(x.data_ptr()), x.nbytes) for x in message]
        used, told, gone = {key for key, *_ in places}, self._told[peer], []
        fresh = used - told
        if fresh:  # mapping is slow, and seldom: the time to say what need not be mapped any more
            gone = [key for key in told - used if not self._device.alive(key)]
            told |= fresh
            told -= set(gone)
        self._offered[peer] += 1
        handles = [(key, self._device.export(key).hex()) for key in fresh]
        self._mailbox.send(peer, json.dumps([self.rank, "offer", number, self._offered[peer], places, handles, gone]))

    def _accept(self, peer: int, message: Message, number: int) -> list[tuple[int, int, int]]:
        """(to, from, bytes) of each tensor of a message, once the peer has said where it wants them."""
        its_number, count, places, handles, gone = self._mailbox.receive(peer, "offer")
        self._accepted[peer] += 1
        mine = number, self._accepted[peer], [x.nbytes for x in message]
        its = its_number, count, [size for *_, size in places]
        if mine != its:
            raise RuntimeError(
                "the ranks are not in the same exchange: (pass, message, bytes of its tensors) "
                f"are {mine} on rank {self.rank} and {its} on rank {peer}; all ranks must make the same calls, and run "
                "backward of the same, in the same order"
            )
        maps = self._maps[peer]
        for key in gone:
            self._device.close(maps.pop(key))
        maps |= {key: self._device.open(bytes.fromhex(handle)) for key, handle in handles}
        return [
            (maps[key] + offset, x.data_ptr(), count)
            for (key, offset, count), x in zip(places, message, strict=True)
        ]  # fmt: skip

    @contextmanager
    def _or_broken(self):
        """After an error between hosts, offers and messages would no longer belong together."""
        try:
            yield
        except BaseException as error:
            self.broken = self.broken or f"an exchange of this ring broke off before: {error}"
            raise

    def _check(self) -> None:
        if self.broken:
            raise RuntimeError(self.broken)

    def overdue(self) -> None:
        """Let go of what has arrived; fail if the oldest exchange under way is older than the timeout."""
        while self._flying and self._flying[0][0].done():
            self._flying.popleft()
        if self._flying and not self.broken and time.monotonic() - self._flying[0][2] > self.timeout:
            self.broken = f"{self._flying[0][3]} was not done after {self.timeout:g} s: another rank is late or gone"
            log.error("%s", self.broken)
            self._device.fail()

    def __del__(self):
        if self.broken or not all(mark.done() for mark, *_ in self._flying):
            _abandoned.append((self._signals, self._flying))  # others may still write to it
            return
        for maps in self._maps.values():
            for base in maps.values():
                self._device.close(base)


class _Exchange:
    """What has been posted; `mark` is set when it is queued, `kept` emptied when the stream that may reuse that memory
    waits for the mark.
    """

    def __init__(self, peers: Peers, outgoing: dict, into: dict, number: int, what: str, moment: Any):
        self.peers, self.outgoing, self.into, self.number, self.what = peers, outgoing, into, number, what
        self.start, self.captured = moment or peers._device.begin(), peers._device.capturing()
        self.kept, self.mark, self.since = [outgoing, into], None, time.monotonic()


class Line:
    """The exchanges of a device's rings that have been posted and not queued, in order. One at a time speaks with other
    hosts, and holds the lock.
    """

    def __init__(self):
        self.lock, self.posted = threading.Lock(), deque()

    def take_offers(self, mine: Peers | None = None, captured: bool = True) -> None:
        """Queue the exchanges that need not be waited for. What breaks another ring than mine is for who uses that."""
        while self.posted and captured >= self.posted[0].captured and self.posted[0].peers._due(self.posted[0]):
            one = self.posted.popleft()
            if one.peers.broken:
                continue
            try:
                one.peers._queue(one)
            except Exception:
                if one.peers is mine:
                    raise
                log.error("%s: %s", one.what, one.peers.broken)


def together(rank: int, size: int, store, what: str, step: Callable[[], str | None]) -> list[str]:
    """Take a step that may fail; if it did on any rank all raise, else all know what it returned."""
    try:
        mine = f"+{step() or ''}"
    except (OSError, RuntimeError, AttributeError) as error:  # the last: a driver without it
        mine = f"-rank {rank} ({what}): {error}"
    store.set(f"{what} {rank}", mine)
    every = [store.get(f"{what} {r}").decode() for r in range(size)]
    if problems := [x[1:] for x in every if x.startswith("-")]:
        raise Unreachable("; ".join(problems))
    return [x[1:] for x in every]


def _watch(reference: weakref.ref) -> None:
    """Look after exchanges that hosts have posted and left; keeps no ring alive, and holds no lock that a ring's end
    wants: that may come in this very thread, by garbage collection.
    """
    peers, pause = reference(), 0.0
    if peers is not None:
        peers._device.watch_only()
        pause = min(0.05, peers.timeout / 10)
    del peers
    while True:
        time.sleep(pause)
        peers = reference()
        if peers is None:
            return
        try:
            peers.look_after()
        except RuntimeError:  # the device is lost, and says so wherever it is used next
            return
        del peers


class Mailbox:
    """Short messages between processes of one machine, in order from each and of each kind."""

    def __init__(self, timeout: float):
        self.name, self._timeout = f"\0ringref-{uuid.uuid4().hex}", timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.name)
        self._socket.setblocking(False)
        self._arrival = select.poll()
        self._arrival.register(self._socket, select.POLLIN)
        self._names: dict[int, str] = {}
        self._backlog: dict[tuple[int, str], deque] = {}

    def meet(self, peer: int, name: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trial:
            trial.connect(name)
        self._names[peer] = name
        self._backlog |= {(peer, kind): deque() for kind in ("offer", "row")}

    def send(self, peer: int, text: str) -> None:
        end = time.monotonic() + self._timeout
        while True:
            try:
                self._socket.sendto(text.encode(), self._names[peer])
                return
            except BlockingIOError:  # the peer's queue is full: it may wait for a place in mine
                if not self.take(0.01) and time.monotonic() > end:
                    raise TimeoutError(f"rank {peer} took no message for {self._timeout:g} s") from None
            except OSError as error:
                raise RuntimeError(f"rank {peer} is gone: {error}") from error

    def receive(self, peer: int, kind: str) -> list:
        """The next message of this rank, which has come."""
        return self._backlog[peer, kind].popleft()

    def late(self, peers: Iterable[int], kind: str) -> list[int]:
        """Those of these ranks of which no such message has come."""
        while self.take(0.0):
            pass
        return [r for r in peers if not self._backlog[r, kind]]

    def take(self, seconds: float) -> bool:
        """Put the next message where it belongs, if one comes in time."""
        if not self._arrival.poll(1e3 * seconds):
            return False
        peer, kind, *rest = json.loads(self._socket.recv(2**18))
        self._backlog[peer, kind].append(rest)
        return True

    def __del__(self):
        self._socket.close()


# ---------------------------------------------------------------------------------------- the device


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class _Mark:
    def __init__(self, event: torch.cuda.Event, device: int):
        self.done = event.query
        self.join = lambda: torch.cuda.current_stream(device).wait_event(event)


@cache
def _pool(device: int) -> tuple[torch.cuda.MemPool, threading.Lock]:
    """The pool of the current device that all its rings receive in, and its lock. It outlives all Python objects: its
    end frees memory, and PyTorch ends the process where that fails, be it that some thread captures a graph or uses a
    pool just then, be it that the device is lost.
    """
    pool = torch.cuda.MemPool(use_on_oom=True)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
    return pool, threading.Lock()


class Cuda:
    """What `Peers` asks of a GPU: memory that other processes map, and copies and signals queued on a stream."""

    line = Line()  # of all rings of this process, whose streams may share a hardware queue

    def __init__(self):
        self._index, self._driver = torch.cuda.current_device(), ctypes.CDLL("libcuda.so.1")
        self._stream = torch.cuda.Stream(priority=-1)
        self._queue = ctypes.c_void_p(self._stream.cuda_stream)
        self._bases: dict[int, int] = {}
        self._pool = _pool(self._index)
        # what `fail` needs is loaded now: nothing can be loaded while a stream waits
        self._false = torch.zeros((), dtype=torch.bool, device=self._index)
        torch._assert_async(~self._false)
        torch.cuda.synchronize()

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()} ({status})")

    def signals(self, count: int) -> torch.Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=self._index)
        torch.cuda.synchronize()
        return zeros

    def space(self, make: Callable[[], Any]) -> Any:
        if self.capturing():  # a graph has a pool of its own
            return make()
        pool, lock = self._pool

        def inside():
            with torch.cuda.use_mem_pool(pool, self._index):
                return make()

        with lock:  # one thread at a time may use it
            try:
                return inside()
            except torch.OutOfMemoryError:  # what PyTorch keeps for itself is free for this pool once it is given back
                torch.cuda.empty_cache()
                return inside()

    def locate(self, address: int) -> tuple[int, int]:
        """The segment that an address is in, by a number that is never used twice, and the offset in it."""
        base, key, at = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64(address)
        self._call("cuPointerGetAttribute", ctypes.byref(key), 7, at)  # CU_POINTER_ATTRIBUTE_BUFFER_ID
        if key.value not in self._bases:
            self._call("cuMemGetAddressRange_v2", ctypes.byref(base), None, at)
            self._bases[key.value] = base.value
        return key.value, address - self._bases[key.value]

    def alive(self, key: int) -> bool:
        try:
            return self.locate(self._bases[key]) == (key, 0)
        except RuntimeError:
            return False

    def export(self, key: int) -> bytes:
        handle = _Handle()
        with self._unordered():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self._bases[key]))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        base = ctypes.c_uint64()
        with self._unordered():
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(base), _Handle.from_buffer_copy(handle), ctypes.c_uint(1))
        return base.value

    def close(self, base: int) -> None:
        with self._unordered():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    @contextmanager
    def _unordered(self):
        """Calls that are no part of a capture that may be going on."""
        mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def begin(self) -> torch.cuda.Event:
        """What the current stream holds now."""
        return torch.cuda.current_stream(self._index).record_event()

    def follow(self, start: torch.cuda.Event) -> None:
        self._stream.wait_event(start)

    def prepare(self, operations: list[tuple[int, int, int]]) -> tuple:
        """Waits and writes (which, address, value), one after the other, for `signal`."""
        # CUstreamBatchMemOpParams is six words; flag 1 of a wait is: until equal
        words = [word for op, address, value in operations for word in (op, address, value, int(op == _WAIT), 0, 0)]
        return ctypes.c_uint(len(operations)), (ctypes.c_uint64 * len(words))(*words), ctypes.c_uint(0)

    def signal(self, prepared: tuple) -> None:
        self._call("cuStreamBatchMemOp_v2", self._queue, *prepared)

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        for to, source, count in copies:
            to, source, count = ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(count)
            self._call("cuMemcpyAsync", to, source, count, self._queue)

    def end(self) -> _Mark:
        return _Mark(self._stream.record_event(), self._index)

    def watch_only(self) -> None:
        """This thread looks at marks while others may capture."""
        torch.cuda.set_device(self._index)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(2)))

    def fail(self) -> None:
        """A stream's wait has no end of its own: lose the device, so that whoever waits for it gets an error."""
        with torch.cuda.stream(torch.cuda.Stream(self._index)):
            torch._assert_async(self._false)
