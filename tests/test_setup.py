"""Pip's and conda's set-ups bring the same things, and the README's commands are the real ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("not in a checkout", allow_module_level=True)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = (ROOT / "environment.yml").read_text()
README = (ROOT / "README.md").read_text()


def package(requirement):
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower()


def drift(project, conda):
    """How environment.yml differs from what pyproject.toml says, as a list of sentences."""
    # other people's packages, of which each wants versions of its own: no user's set-up needs them
    others = ("peers", "engines")
    extras = {name: asked for name, asked in project["optional-dependencies"].items() if name not in others}
    install = re.search(r"^ +- -e \.\[([\w,-]+)\]$", conda, re.M)
    asked = set(install[1].split(",")) if install else set()
    wrong = [f"extra {name} is not installed" for name in sorted(set(extras) - asked)]
    wrong += [f"extra {name} does not exist" for name in sorted(asked - set(extras))]
    python = re.search(r"^ +- python(.*)$", conda, re.M)
    if not python or python[1] != project["requires-python"]:
        wrong.append(f"python is not {project['requires-python']}")
    arriving = [*project["dependencies"], *(r for name in asked & set(extras) for r in extras[name])]
    for name in ("torch", "jupyterlab", "nbval", "matplotlib", "einops", "xformers"):
        if name not in map(package, arriving):
            wrong.append(f"{name} does not arrive")
    return wrong


def test_conda_and_pip_bring_the_same():
    assert drift(PROJECT, CONDA) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (",xformers", "", "xformers does not arrive"),
        ("test,", "tests,", "extra tests does not exist"),
        ("python>=3.10", "python>=3.9", "python is not >=3.10"),
    ],
)
def test_drift_would_be_seen(old, new, expected):
    assert old in CONDA and expected in drift(PROJECT, CONDA.replace(old, new))


def test_what_is_installed_can_be_named_in_one_place():
    """Every package in two extras asks for the same version in both."""
    asked = {}
    for requirement in (r for rs in PROJECT["optional-dependencies"].values() for r in rs):
        asked.setdefault(package(requirement), set()).add(requirement)
    assert [versions for versions in asked.values() if len(versions) > 1] == []


def test_the_readmes_commands_are_the_ones_that_ci_runs():
    block = re.search(r"<!-- test command -->\n```\w*\n(.+?)\n```\n<!-- end -->", README, re.S)
    assert block and "pytest" in block[1] and ".[test]" in block[1]
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


def test_licence_and_typing_travel_along():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert (ROOT / "ringref" / "py.typed").exists()


def test_the_top_level_holds_what_a_reader_looks_for():
    """And nothing that was left lying about: a wheel came in once with `git add -A`."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    known = {"notebooks", "ringref", "tests", "figures", "environment.yml", "README.md", "pyproject.toml", "LICENSE"}
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} == known | {".ci", ".gitignore"}
