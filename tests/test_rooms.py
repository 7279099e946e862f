"""Who may speak of what, and on whom a room may stand: the house, read from the source; planted breaches show."""

import ast
import io
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

import ringref

SOURCE = Path(ringref.__file__).parent
STANDARD = set(sys.stdlib_module_names)
PACKAGES = {"cloudpickle", "einops", "matplotlib", "numpy", "rich", "torch"}
OPTIONAL = {
    "engine.fused": {"triton"},
    "engine.kernels": {"xformers"},
    "lab.bench": {"dilated_attention_pytorch"},
    "lab.engines": {"ipyparallel", "psutil"},
    "lab.zero": {"deepspeed", "fairscale"},
    "oracle.plugin": {"pytest"},
}

FLOORS = (  # from the ground up: a room imports from floors below its own, and from nobody beside it
    {"comm.ring"},
    {"comm.peer", "comm.simulate"},
    {"comm.process"},
    {"comm.launch", "shard"},
    {"block", "engine.call", "engine.fused", "engine.visits"},
    {"dense", "engine.kernels", "engine.route", "engine.sums"},
    {"engine.plan"},
    {"engine.attend"},
    {"collective", "dilated", "ring", "engine.explain"},
    {"ringref"},
    {"lab.draw", "lab.engines", "lab.exercise", "lab.memory", "lab.model", "lab.shell", "oracle.cases"},
    {"lab.main_job", "lab.zero", "oracle.sanitizer", "oracle.scene"},
    {"lab.bench", "oracle.causes", "oracle.truth"},
    {"oracle.readoff"},
    {"oracle.diagnose"},
    {"oracle.adapt", "oracle.pool", "oracle.report"},
    {"oracle.judge"},
    {"oracle"},
    {"oracle.cli", "oracle.plugin"},
    {"__main__"},
)
EMPTY = {"comm", "engine", "lab"}  # packages that only say what is in them
UNSPOKEN = {  # whole identifiers that a room has no use for
    "block": {"rank", "group"},
    "engine.kernels": {"rank", "group"},
    "shard": {"softmax", "exp"},
    "engine.visits": {"softmax", "exp"},
    "dilated": {"einsum"},
    "collective": {"einsum"},
    "ring": {"einsum"},
    **{f"comm.{room}": {"q", "k", "v"} for room in ("ring", "process", "peer", "simulate", "launch")},
}
DISTRIBUTED = {"comm", "oracle.sanitizer", "oracle.pool", "lab.bench"}
DEFINITION = {"engine.call", "shard"}  # all that the judge may share with those it judges: no arithmetic in either


def read():
    """{room: source}: ringref/engine/plan.py is engine.plan, ringref/oracle/__init__.py is oracle."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = [x for x in path.relative_to(SOURCE).with_suffix("").parts if x != "__init__"]
        found[".".join(parts) or "ringref"] = path.read_text()
    return found


ROOMS = read()


@cache  # a planted breach changes one room of many
def identifiers(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


@cache
def nodes(source):
    return [*ast.walk(ast.parse(source))]


def imports(room, source, rooms):
    """What a room imports: foreign packages by name, and its own house's rooms as they are named here."""
    foreign, own = set(), set()
    package = room.split(".")[:-1] if room not in ("oracle", *EMPTY) else [room]

    def add(name, leaf=None):
        if name[:1] != ["ringref"]:
            foreign.add(".".join([*name, *([leaf] if leaf else [])]))
            return
        inside = ".".join(name[1:])
        deeper = f"{inside}.{leaf}" if inside and leaf else leaf
        own.add(deeper if deeper in rooms else inside or "ringref")

    for node in nodes(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name.split("."))
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - (node.level - 1)] if node.level else None
            name = [*(["ringref", *above] if node.level else []), *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                add(name, alias.name)
    return foreign, own


def reaches(source):
    """Whether torch.distributed is used through torch alone, without an import of its own."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
        for node in nodes(source)
    )


def breaches(rooms):
    floor = {room: level for level, some in enumerate(FLOORS) for room in some}
    for room, source in sorted(rooms.items()):
        foreign, own = imports(room, source, rooms)
        for word in sorted(UNSPOKEN.get(room, set()) & identifiers(source)):
            yield f"{room}: speaks of {word}"
        uses = any(x.startswith("torch.distributed") for x in foreign) or reaches(source)
        if uses and not {room, room.split(".")[0]} & DISTRIBUTED:
            yield f"{room}: imports torch.distributed"
        if room not in floor and (room not in EMPTY or len(ast.parse(source).body) > 1):
            yield f"{room}: has no floor"
        for below in sorted(own - EMPTY if room in floor else ()):
            if floor.get(below, -1) >= floor[room]:
                yield f"{room}: stands on {below}, which is not below it"
        if room == "dense":
            for below in sorted(own - DEFINITION):
                yield f"dense: takes from {below}, which it judges"
        elif floor.get(room, 0) < floor["ringref"] and "dense" in own:
            yield f"{room}: takes from dense, which is its judge"
        for package in sorted({x.split(".")[0] for x in foreign} - {"__future__"}):
            if package not in PACKAGES | STANDARD | OPTIONAL.get(room, set()):
                yield f"{room}: imports {package}, which is not a dependency"


def test_every_room_keeps_to_its_vocabulary_and_its_floor():
    assert list(breaches(ROOMS)) == []


@pytest.mark.parametrize(
    ("room", "planted", "expected"),
    [
        ("block", "def f(x, rank):\n    return x\n", "block: speaks of rank"),
        ("engine.kernels", "group = None\n", "engine.kernels: speaks of group"),
        ("shard", "import torch\ny = torch.exp(torch.ones(1))\n", "shard: speaks of exp"),
        ("comm.ring", "def send(q):\n    return q\n", "comm.ring: speaks of q"),
        ("ring", "from torch import einsum\n", "ring: speaks of einsum"),
        ("ring", "import torch.distributed as dist\n", "ring: imports torch.distributed"),
        ("lab.draw", "import torch\ntorch.distributed.barrier()\n", "lab.draw: imports torch.distributed"),
        ("engine.attend", "from torch import distributed\n", "engine.attend: imports torch.distributed"),
        ("comm.ring", "from ..shard import Shard\n", "comm.ring: stands on shard"),
        ("engine.kernels", "from .explain import explain\n", "engine.kernels: stands on engine.explain"),
        ("engine.plan", "from ..lab import memory\n", "engine.plan: stands on lab.memory"),
        ("shard", "import ringref.oracle.judge\n", "shard: stands on oracle.judge"),
        ("engine.sums", "from ringref import merge\n", "engine.sums: stands on ringref"),
        ("engine", "from .attend import attend\n", "engine: has no floor"),
        ("lab", "def folder(text):\n    return text\n", "lab: has no floor"),
        ("engine.attend_v2", "x = 1\n", "engine.attend_v2: has no floor"),
        ("dense", "from .block import merge\n", "dense: takes from block"),
        ("dense", "from .engine.visits import visits\n", "dense: takes from engine.visits"),
        ("dense", "from .engine import kernels\n", "dense: takes from engine.kernels"),
        ("ring", "from .dense import dense_attention\n", "ring: takes from dense"),
        ("lab.model", "import xformers\n", "lab.model: imports xformers, which is not a dependency"),
    ],
)
def test_a_planted_breach_is_found(room, planted, expected):
    found = list(breaches({**ROOMS, room: planted + ROOMS.get(room, "")}))
    assert any(line.startswith(expected) for line in found), found


def test_words_in_prose_and_parts_of_words_are_free():
    harmless = '"""The rank of a group."""\nranked = "rank"  # group\n'
    assert list(breaches({"block": harmless})) == []


def test_every_floor_has_its_rooms():
    """A room that left the house must leave its floor."""
    assert {room for some in FLOORS for room in some} | EMPTY == set(ROOMS)
