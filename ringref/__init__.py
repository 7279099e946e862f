"""Readable, exact long-context attention across devices, and the oracle that judges yours.

Dense, dilated, collective and ring attention share one signature and one meaning: swap the word,
keep the result.
"""

from .block import merge, sink
from .collective import collective_attention
from .comm.launch import from_env, launch
from .comm.process import ProcessRing
from .comm.simulate import simulate
from .dense import dense_attention
from .dilated import dilated_attention
from .engine.explain import explain
from .ring import ring_attention
from .shard import Attended, Dilation, Shard, partition

__all__ = [
    "Attended",
    "Dilation",
    "ProcessRing",
    "Shard",
    "collective_attention",
    "dense_attention",
    "dilated_attention",
    "explain",
    "from_env",
    "launch",
    "merge",
    "partition",
    "ring_attention",
    "simulate",
    "sink",
]
