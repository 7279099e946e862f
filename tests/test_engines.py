"""Engines start as ranks and leave nothing behind, also where the block raises."""

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
