"""Readable, exact long-context attention across devices, and the oracle that judges yours.

Dense, dilated, collective and ring attention share one signature and one meaning: swap the word,
keep the result.
"""

from .block import merge
from .collective import collective_attention
from .comm import ProcessRing, simulate
from .dense import dense_attention
from .dilated import dilated_attention
from .launch import launch
from .layout import Attended, Dilation, Shard, partition
from .ring import ring_attention

__all__ = [
    "Attended",
    "Dilation",
    "ProcessRing",
    "Shard",
    "collective_attention",
    "dense_attention",
    "dilated_attention",
    "launch",
    "merge",
    "partition",
    "ring_attention",
    "simulate",
]
