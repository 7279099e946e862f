"""Messages between ranks: one primitive, `exchange`, and rotate, gather and reduce in a few lines each on top of it.

Post some sends and some receives, compute, `wait()`. A message is a tuple of tensors that leave together (one batch,
so NCCL launches one kernel for K and V). Both sides know every size, so an empty tensor is never sent, and a message
to oneself never leaves. A transport is one `_post`: threads of one process (simulate.py), `torch.distributed`
(process.py), copy engines between GPUs (peer.py).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Message = Sequence[Tensor]
log = logging.getLogger(__name__)  # at DEBUG: every hop, so that a survivor's log names its last
watchers: list[Callable[[str], Any]] = []  # told the same, whatever is logged
HEADER = 16  # integers in a header
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


@dataclass
class Traffic:
    """What a rank has moved, in bytes and messages; headers and positions (metadata) are not
    counted.
    """

    sent: int = 0
    received: int = 0
    messages: int = 0

    def add(self, other: Traffic) -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


class Pending:
    """A posted exchange. Neither its sends may be written nor its receives read before `wait()`
    returns.
    """

    def __init__(self, finish: Callable[[], None], value: Any = None):
        self._finish, self.value = finish, value

    @property
    def arrived(self) -> bool:
        """Whether nothing is waited for any more."""
        return self._finish is None

    def wait(self) -> Any:
        """Block until everything posted has arrived and left; returns what came."""
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self.value


class Ring:
    """Ranks 0 … size−1, each of which sends to the next one round. `traffic` counts what this rank
    has moved.
    """

    rank: int
    size: int
    traffic: Traffic
    transport = "threads"  # how messages travel

    def _post(self, outgoing: dict[int, Message], into: dict[int, Message]) -> Callable[[], None]:
        """Post sends to and receives from other ranks; returns the function that waits for all of
        them.
        """
        raise NotImplementedError

    def numbers(self, outgoing: dict[int, Message], into: dict[int, Message]) -> bool:
        """Whether `_post` says with these messages which pass they are of, its third argument; its fourth is what
        `moment` returned, if the messages are to follow no more than was queued then.
        """
        return False

    def moment(self) -> Any:
        """What the device's stream holds now; None where messages need not know."""

    def space(self, make: Callable[[], Any]) -> Any:
        """What `make` makes to receive in, where this transport wants it."""
        return make()

    def exchange(self, outgoing: dict[int, Message], into: dict[int, Message]) -> Pending:
        """Send `outgoing[peer]` and receive `into[peer]`, contiguous buffers that the peer's tensors match one
        by one.

        `wait()` returns `into`, filled.
        """
        given, outgoing, into = into, _solid(outgoing), _solid(into)
        for there, here in zip(outgoing.pop(self.rank, ()), into.pop(self.rank, ()), strict=True):
            here.copy_(there)
        if not all(x.is_contiguous() for message in into.values() for x in message):
            raise ValueError("into: what is received from another rank must be contiguous")
        self.traffic.messages += len(outgoing)
        self.traffic.sent += sum(x.nbytes for message in outgoing.values() for x in message)
        self.traffic.received += sum(x.nbytes for message in into.values() for x in message)
        return Pending(self._post(outgoing, into) if outgoing or into else None, given)

    def share(self, row: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Every rank's 1-D int64 CPU tensor, in rank order; lengths are known. Metadata: not
        counted as traffic.
        """
        if self.size == 1:
            return [row]
        rows = [row if r == self.rank else row.new_empty(lengths[r]) for r in range(self.size)]
        others = [r for r in range(self.size) if r != self.rank]
        outgoing, into = _solid(dict.fromkeys(others, (row,))), _solid({r: (rows[r],) for r in others})
        if outgoing or into:
            self._post(outgoing, into)()
        return rows

    def announce(self, row: Sequence[int]) -> list[list[int]]:
        """Every rank's row of integers, in rank order: the one fixed-size header of a call.

        One size for all calls, so that ranks that are not in the same one get an error and not a
        short message.
        """
        return self.announcing(row).wait()

    def announcing(self, row: Sequence[int]) -> Pending:
        """Post what `announce` returns; where hosts speak to each other it travels while this one goes on."""
        if len(row) >= HEADER:
            raise ValueError(f"row: at most {HEADER - 1} integers can be announced, got {len(row)}")
        told, said = self._tell([len(row), *row, *[0] * (HEADER - 1 - len(row))]), []

        def hear():
            rows = told.wait()
            if len({x[0] for x in rows}) > 1:
                raise ValueError(f"the ranks are not in the same call: they announce {[x[0] for x in rows]} integers")
            said.extend(x[1 : 1 + len(row)] for x in rows)

        posted = Pending(hear, said)
        if told.arrived:
            posted.wait()
        return posted

    def _tell(self, row: list[int]) -> Pending:
        """Send every rank a header; `wait()` returns every rank's."""
        mine = torch.tensor(row, dtype=torch.int64, device="cpu")
        return Pending(None, [x.tolist() for x in self.share(mine, [HEADER] * self.size)])

    def _shapes(self, x: Tensor) -> list[tuple[int, ...]]:
        if x.dim() > 8:
            raise ValueError(f"x has {x.dim()} dimensions; at most 8 can be announced")
        if x.dtype not in DTYPES:
            raise TypeError(f"x: only {', '.join(map(str, DTYPES))} can be announced, got {x.dtype}")
        row = [DTYPES.index(x.dtype), x.dim(), *x.shape, *[0] * (8 - x.dim())]
        rows = self.announce(row)
        if len({r[0] for r in rows}) > 1:
            raise ValueError(f"x: dtypes differ between ranks: {[DTYPES[r[0]] for r in rows]}")
        return [tuple(r[2 : 2 + r[1]]) for r in rows]

    def rotate(self, x: Tensor | Message, into: Message | None = None) -> Pending:
        """Post `x` to rank + 1 and a receive from rank − 1; `wait()` returns what came.

        With `into` (buffers that fit what comes) nothing else is said; without it `x` is one tensor
        and its shape is announced first, so uneven shards rotate as well. At size 1 what comes is
        `x` itself.
        """
        if self.size == 1:
            return Pending(None, x)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        if into is not None:
            posted = self.exchange({after: x}, {before: into})
            return Pending(posted.wait, into)
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor (several want buffers, `into`), got {type(x).__name__}")
        shape = self._shapes(x)[before]
        arriving = self.space(lambda: x.new_empty(shape))
        return Pending(self.exchange({after: (x,)}, {before: (arriving,)}).wait, arriving)

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """Every rank's `x`, in rank order; shapes may differ, and are announced where they are not
        given.
        """
        shapes = shapes or self._shapes(x)
        every = self.space(lambda: [x if r == self.rank else x.new_empty(shapes[r]) for r in range(self.size)])
        others = [r for r in range(self.size) if r != self.rank]
        self.exchange(dict.fromkeys(others, (x,)), {r: (every[r],) for r in others}).wait()
        return every

    def scatter(self, parts: dict[int, Message], into: Callable[[int], Message]) -> Iterator[tuple[int, Message]]:
        """Send `parts[r]` to rank r and yield (r, what r had for me), in buffers that `into(r)` makes.

        Neighbour by neighbour, so that one part is in flight at a time; `parts` is empty afterwards.
        """
        for step in range(1, self.size):
            to, come = (self.rank + step) % self.size, (self.rank - step) % self.size
            arriving = into(come)
            self.exchange({to: parts.pop(to)}, {come: arriving}).wait()
            yield come, arriving

    def reduce(self, parts: Sequence[Message]) -> Message:
        """The sum over ranks of what each holds for me (reduce-scatter): `parts[r]` is this rank's
        share for rank r. My own part is added to in place.
        """
        total = parts[self.rank]

        def into(_):
            return self.space(lambda: tuple(x.new_empty(x.shape) for x in total))

        for _, arrived in self.scatter(dict(enumerate(parts)), into):
            for x, y in zip(total, arrived, strict=True):
                x += y
        return total

    def numbered(self, number: int | Callable[[], int]) -> NumberedRing:
        """This ring for one pass of one call, which `number` stands for on all ranks: the first message to each rank
        carries it, and the first from each must, or the two ranks are in different passes and the exchange raises.
        A number that must be asked for holds messages back until `release`, which asks.

        On the CPU the number goes ahead, a hop of its own, for gloo ends a process that is sent more than it expects;
        over NCCL it rides along, costs no wait of the host, and is compared by the device, whose error then ends the
        process. Between copy engines the hosts say it with every message.
        """
        return NumberedRing(self, number)

    def _report(self, words: str) -> None:
        """Have the errors of ranks that wait in vain say this as well."""

    def __deepcopy__(self, memo: dict) -> Ring:
        return self  # a place among the ranks, of which there is one

    def __reduce__(self):
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it is this process's place among the ranks; "
            "make the ring and its shards anew where they are loaded"
        )

    def among(self, members: Sequence[int]) -> Ring:
        """The smaller ring of these ranks, in this order; I must be one of them."""
        try:
            members = [operator.index(r) for r in members]
        except TypeError:
            raise TypeError(f"members must be a list of ranks, got {type(members).__name__}") from None
        if self.rank not in members or sorted(set(members) & set(range(self.size))) != sorted(members):
            raise ValueError(f"members must be different ranks of {self.size}, {self.rank} among them, got {members}")
        return self if members == list(range(self.size)) else SubRing(self, members)


class SubRing(Ring):
    """Some ranks of a ring as a ring of their own; traffic is counted by the whole."""

    def __init__(self, whole: Ring, members: Sequence[int]):
        self.whole, self.members = whole, list(members)
        self.rank, self.size, self.transport = self.members.index(whole.rank), len(self.members), whole.transport

    @property
    def traffic(self) -> Traffic:
        return self.whole.traffic

    def _post(self, outgoing, into, *number):
        return self.whole._post(*({self.members[r]: m for r, m in x.items()} for x in (outgoing, into)), *number)

    def numbers(self, outgoing, into):
        return self.whole.numbers(outgoing, into)

    def moment(self):
        return self.whole.moment()

    def space(self, make):
        return self.whole.space(make)

    def _report(self, words):
        self.whole._report(words)


class Unheard(Ring):
    """A ring that sends nothing: what arrives in a buffer without data is already there."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.traffic = rank, size, Traffic()

    def _post(self, outgoing, into):
        def finish():
            outgoing.clear()  # until here a sender keeps what it sends

        return finish


class NumberedRing(Ring):
    """A ring whose first messages carry a number (see `numbered`); traffic is counted by the whole, once it leaves."""

    def __init__(self, whole: Ring, number: int | Callable[[], int]):
        self.whole, self.number = whole, number
        self.rank, self.size = whole.rank, whole.size
        self.traffic = Traffic() if callable(number) else whole.traffic  # what is held back may never leave
        self._held: list[tuple] = []  # what is to be sent, and where to put what waits for it; no cycle with this ring
        self._told: set[int] = set()
        self._heard: set[int] = set()

    def space(self, make):
        return self.whole.space(make)

    def release(self) -> None:
        """Ask for the number, and post what has been held back."""
        if callable(self.number):
            self.number, held, self._held = self.number(), self._held, []
            self.whole.traffic.add(self.traffic)
            self.traffic = self.whole.traffic
            for posted, *exchange in held:
                posted.append(self._send(*exchange))

    def _post(self, outgoing, into):
        if not callable(self.number):
            return self._send(outgoing, into)
        moment, posted = self.whole.moment(), []
        self._held.append((posted, outgoing, into, moment))

        def finish():
            self.release()
            posted[0]()

        return finish

    def _send(self, outgoing, into, moment=None):
        if self.whole.numbers(outgoing, into):
            return self.whole._post(outgoing, into, self.number, *([] if moment is None else [moment]))
        first_to, first_from = outgoing.keys() - self._told, sorted(into.keys() - self._heard)
        self._told |= first_to
        self._heard.update(first_from)
        if not first_to and not first_from:
            return self.whole._post(outgoing, into)
        like = next(iter((outgoing or into).values()))[0]
        mine = like.new_full((1,), self.number, dtype=torch.int64)
        came = like.new_empty(len(first_from), dtype=torch.int64)
        marks = dict(zip(first_from, came.split(1), strict=False))
        if type(came) is Tensor and came.is_cpu:
            self.whole._post(dict.fromkeys(first_to, (mine,)), {r: (mark,) for r, mark in marks.items()})()
            wrong = [r for r, number in zip(first_from, came.tolist(), strict=True) if number != self.number]
            if wrong:
                words = _WORDS.format(rank=self.rank, messages=f"the messages of rank {wrong[0]}")
                self.whole._report(words)
                raise MixedUp(words)
            return self.whole._post(outgoing, into)
        outgoing = {r: (*m, mine) if r in first_to else m for r, m in outgoing.items()}
        into = {r: (*m, marks[r]) if r in marks else m for r, m in into.items()}
        finish = self.whole._post(outgoing, into)

        def checked():
            finish()
            if came.is_cuda and first_from:  # else it is one without data, which predicts memory
                words = _WORDS.format(rank=self.rank, messages="these messages")
                torch._assert_async((came == self.number).all(), words)

        return checked


_WORDS = (
    "rank {rank}: {messages} are of another pass than mine; all ranks must run backward of the same calls in the same "
    "order, and change what a call returned in place on all of them or on none"
)


def _solid(messages: dict[int, Message]) -> dict[int, Message]:
    """Drop empty tensors and then empty messages."""
    kept = {r: tuple(x for x in message if x.numel()) for r, message in messages.items()}
    return {r: message for r, message in kept.items() if message}


def _tell(what: str) -> None:
    log.debug("%s", what)
    for watch in watchers:
        watch(what)


class Elsewhere(ValueError):
    """Another rank's mistake, in that rank's own words. `rank` is the one that made it."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class MixedUp(RuntimeError):
    """Ranks are in different passes; the words are those of a rank that noticed."""


class BrokenOff(RuntimeError):
    """A message did not come or did not leave: a rank is gone, or the way to it, or it is somewhere else."""
