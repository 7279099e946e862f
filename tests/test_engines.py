"""Engines start as ranks and leave nothing behind, also where the block raises."""

import time

import psutil
import pytest

from ringref.lab.engines import Engines


def test_engines_know_who_they_are_and_are_gone_after_an_error():
    with pytest.raises(RuntimeError, match="a mistake in a cell"), Engines(2) as ranks:
        assert ranks.view["me"] == [0, 1] and ranks.view["p"] == [2, 2]
        ranks.view.execute("import os; pid = os.getpid()")
        pids = ranks.view["pid"]
        assert len(set(pids)) == 2
        raise RuntimeError("a mistake in a cell")
    left = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert not left


@pytest.mark.parametrize("p", [0, True, 1.5])
def test_a_number_of_engines_is_asked_for(p):
    with pytest.raises(ValueError, match="p must be a number of engines"):
        Engines(p)


class Deaf:
    """An engine that hears from a message on: the first, the second or none."""

    def __init__(self, hears):
        self.hears, self.facts = hears, {}

    def push(self, facts, block):
        self.hears -= 1
        self.facts |= facts if self.hears < 1 else {}
        return self

    def wait(self, seconds):
        return self.hears < 1


def test_an_engine_that_misses_a_message_is_told_again():
    ranks = Engines(3)
    ranks.client = [Deaf(1), Deaf(2), Deaf(1)]
    ranks._greet({"p": 3}, time.monotonic() + 60)
    assert [engine.facts for engine in ranks.client] == [{"p": 3, "me": i} for i in range(3)]
    ranks.client[1] = Deaf(1e9)
    with pytest.raises(TimeoutError, match=r"engines \[1\] of 3 have started and do not answer"):
        ranks._greet({"p": 3}, time.monotonic() + 0.1)
