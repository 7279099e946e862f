"""A rank that dies in mid-ring: the others get an error that names the hop, in seconds."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import ringref


def test_survivors_of_a_killed_rank_name_the_hop(tmp_path):
    def fn(ring, folder=str(tmp_path)):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the survivors; not yet
        shard = ringref.partition(12, ring)
        q = torch.randn(1, 4, 2, 8)
        ringref.ring_attention(q, q, q, shard=shard)  # all alive
        if ring.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            ringref.ring_attention(q, q, q, shard=shard)
            ring.rotate(q).wait()
        except RuntimeError as error:
            Path(folder, str(ring.rank)).write_text(str(error))
            raise

    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 3 died with SIGKILL") as died:
        ringref.launch(fn, 3)
    for rank in range(3):  # also those that a transport would have ended without a word
        assert f"rank {rank}, hop" in str(died.value)
    assert time.monotonic() - start < 60
    for rank in (0, 2):
        assert f"rank {rank}, hop" in Path(tmp_path, str(rank)).read_text()
