"""Readable, exact long-context attention across devices, and the oracle that judges yours.

Dense, dilated, collective and ring attention share one signature and one meaning: swap the word, keep the result.

The way in, and what each room adds to the one before:

    dense.py             the definition, by which all else is judged
    block.py             attention on one block of keys, its backward, and the merge: the one idea
    shard.py             who holds which positions
    ring.py, collective.py, dilated.py     the order in which keys travel
    engine/              attend.py is the loop that drives them; visits.py says where queries meet keys
    comm/, oracle/, lab/                   messages; the judge; memory, speed, figures

One call:  ring_attention → attend: agree on a Call with all ranks
               rotating(Trip) yields Blocks of keys, one a hop
               a Strand's queries meet a Block in Visits: full, causal or masked
               kernels.forward(visit) → block.forward, merged as they come; the backward is the same walk
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
