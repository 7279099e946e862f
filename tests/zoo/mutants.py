"""Small named mistakes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    base: str
    old: str
    new: str
    cause: str
    slug: str
    family: str
    hangs: bool = False
    racy: bool = False


MUTANTS = []
