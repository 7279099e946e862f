"""Who may speak of what: the design's rooms, read from the source; a planted breach must show."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

import ringref

SOURCE = Path(ringref.__file__).parent
MODULES = {path.stem: path.read_text() for path in SOURCE.glob("*.py")}
STANDARD = set(sys.stdlib_module_names)
PACKAGES = {"cloudpickle", "einops", "matplotlib", "numpy", "rich", "torch"}

UNSPOKEN = {  # whole identifiers that a room has no use for
    "block": {"rank", "group"},
    "backends": {"rank", "group"},
    "layout": {"softmax", "exp"},
    "comm": {"q", "k", "v"},
    "dilated": {"einsum"},
    "collective": {"einsum"},
    "ring": {"einsum"},
}
DISTRIBUTED = {"comm", "launch", "sanitizer", "bench"}
METHODS = {"attend", "backends", "block", "collective", "dilated", "ring"}
DEFINITION = {"Attended", "Call", "Dilation", "Shard", "agree", "exactly", "wide"}  # vocabulary, no arithmetic
OPTIONAL = {"backends": {"xformers"}, "bench": {"dilated_attention_pytorch"}}


def identifiers(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def imports(source):
    """Absolute dotted names of everything imported, `from .x import y` read as ringref.x.y."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = [*(["ringref"] if node.level else []), *([node.module] if node.module else [])]
            found |= {".".join([*parts, alias.name]) for alias in node.names}
    return found


def reaches(source):
    """Whether torch.distributed is used through torch alone, without an import of its own."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
        for node in ast.walk(ast.parse(source))
    )


def breaches(modules):
    for name, source in sorted(modules.items()):
        imported = imports(source)
        for word in sorted(UNSPOKEN.get(name, set()) & identifiers(source)):
            yield f"{name}: speaks of {word}"
        uses = any(x.startswith("torch.distributed") for x in imported) or reaches(source)
        if name not in DISTRIBUTED and uses:
            yield f"{name}: imports torch.distributed"
        own = {x.removeprefix("ringref.") for x in imported if x.startswith("ringref.")}
        if name == "dense":
            for what in sorted(own):
                module, _, leaf = what.partition(".")
                if module in METHODS or (module == "layout" and leaf not in DEFINITION):
                    yield f"dense: takes {what} from those that it judges"
        elif name in METHODS and any(x.split(".")[0] == "dense" for x in own):
            yield f"{name}: takes from dense, which is its judge"
        foreign = {x.split(".")[0] for x in imported} - {"ringref", "__future__"}
        for package in sorted(foreign - PACKAGES - STANDARD - OPTIONAL.get(name, set())):
            yield f"{name}: imports {package}, which is not a dependency"


def test_every_room_keeps_to_its_vocabulary():
    assert list(breaches(MODULES)) == []


@pytest.mark.parametrize(
    ("room", "planted", "expected"),
    [
        ("block", "def f(x, rank):\n    return x\n", "block: speaks of rank"),
        ("backends", "group = None\n", "backends: speaks of group"),
        ("layout", "import torch\ny = torch.exp(torch.ones(1))\n", "layout: speaks of exp"),
        ("comm", "def send(q):\n    return q\n", "comm: speaks of q"),
        ("ring", "from torch import einsum\n", "ring: speaks of einsum"),
        ("ring", "import torch.distributed as dist\n", "ring: imports torch.distributed"),
        ("draw", "import torch\ntorch.distributed.barrier()\n", "draw: imports torch.distributed"),
        ("attend", "from torch import distributed\n", "attend: imports torch.distributed"),
        ("dense", "from .block import merge\n", "dense: takes block.merge from those"),
        ("dense", "from .layout import visits\n", "dense: takes layout.visits from those"),
        ("dense", "from . import backends\n", "dense: takes backends from those"),
        ("ring", "from .dense import dense_attention\n", "ring: takes from dense"),
        ("model", "import xformers\n", "model: imports xformers, which is not a dependency"),
    ],
)
def test_a_planted_breach_is_found(room, planted, expected):
    found = list(breaches({room: planted + MODULES.get(room, "")}))
    assert any(line.startswith(expected) for line in found), found


def test_words_in_prose_and_parts_of_words_are_free():
    harmless = '"""The rank of a group."""\nranked = "rank"  # group\n'
    assert list(breaches({"block": harmless})) == []
