"""The bug zoo: correct context-parallel attention as users write it, and small named mistakes.

A candidate is f(q, k, v, *, causal, group) -> out | (out, lse) on local shards b s h d; a declared
feature may add mask_mod, window, dilation or positions to the call. Nothing here imports ringref.

    CORRECT[name]   the sources, one file each, with the layout and features they declare
    MUTANTS         (base, old, new) changes of one place in a base, with what is wrong in words
    build(name)     a callable that pickles by value and names its own lines in a traceback
    info(name)      layout, features, cause, slug, family
"""

import linecache
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Source:
    name: str
    layout: str
    features: frozenset
    family: str
    ranks: int = 8  # the most ranks it is written for; 1 is a module for one device

    @property
    def text(self):
        return (HERE / f"{self.name}.py").read_text()


def _source(name, layout, features, family, ranks=8):
    return Source(name, layout, frozenset(features.split()), family, ranks)


CORRECT = {
    source.name: source
    for source in (
        _source("rotating", "contiguous", "causal gqa mask window uneven empty lse subgroup", "ring"),
        _source("zigzag", "zigzag", "causal gqa lse subgroup", "ring"),
        _source("striped", "striped", "causal gqa subgroup", "ring"),
        _source("gathering", "contiguous", "causal gqa mask window uneven empty lse subgroup", "ring"),
        _source("collective", "zigzag", "causal gqa mask subgroup", "collective"),
        _source("ulysses", "contiguous", "causal gqa window lse subgroup", "ulysses"),
        _source(
            "serving", "contiguous", "causal gqa window cu_seqlens kv sink score_mod scale value_dim lse", "serving"
        ),
        _source("tiled", "contiguous", "causal gqa scale value_dim lse subgroup", "tiles"),
        _source("tree", "contiguous", "causal gqa uneven kv lse subgroup", "tree"),
        _source("packet", "contiguous", "causal gqa window cu_seqlens scale value_dim sink lse subgroup", "ring"),
        _source("halves", "zigzag", "causal gqa lse subgroup", "ring"),
        _source("dilated_local", "contiguous", "causal gqa dilation lse", "dilated", ranks=1),
        _source("dilated_ring", "contiguous", "causal gqa dilation lse subgroup", "dilated"),
        _source("dilated_collective", "contiguous", "causal gqa dilation lse subgroup", "dilated"),
    )
}


class Info(NamedTuple):
    layout: str
    features: frozenset
    cause: str | None
    slug: str | None
    family: str
    ranks: int


class Candidate:
    """A source text that compiles where it is first called, so that it travels as text."""

    def __init__(self, name, text):
        self.name, self.text, self._attention = name, text, None
        # launchers ask a callable for these
        self.__name__ = self.__qualname__ = name

    @property
    def filename(self):
        return f"<zoo:{self.name}>"

    def __getstate__(self):
        return {**self.__dict__, "_attention": None}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __call__(self, q, k, v, **options):
        if self._attention is None:
            lines = self.text.splitlines(keepends=True)
            linecache.cache[self.filename] = (len(self.text), None, lines, self.filename)
            namespace = {"__name__": f"zoo_{self.name}"}
            exec(compile(self.text, self.filename, "exec"), namespace)
            self._attention = namespace["attention"]
        return self._attention(q, k, v, **options)

    def __repr__(self):
        return f"Candidate({self.name})"


try:
    # workers need not be able to import this package
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
except ImportError:
    pass


def text_of(name):
    if name in CORRECT:
        return CORRECT[name].text
    mutant = BY_NAME[name]
    text = CORRECT[mutant.base].text
    if text.count(mutant.old) != 1:
        raise ValueError(f"{name}: its old text occurs {text.count(mutant.old)} times in its base")
    return text.replace(mutant.old, mutant.new)


def build(name):
    return Candidate(name, text_of(name))


def info(name):
    if name in CORRECT:
        base, cause, slug, family = CORRECT[name], None, None, CORRECT[name].family
    else:
        mutant = BY_NAME[name]
        base, cause, slug, family = CORRECT[mutant.base], mutant.cause, mutant.slug, mutant.family
    return Info(base.layout, base.features, cause, slug, family, base.ranks)


from .mutants import MUTANTS  # noqa: E402

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
