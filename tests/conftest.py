"""One deterministic hypothesis profile, and what the swap test took and skipped."""

import gc

import hypothesis
import pytest
import torch._dynamo  # a second in every rank that checkpoints or measures, which here fork from what has it

hypothesis.settings.register_profile("exact", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("exact")

torch.set_num_threads(1)  # the tensors are tiny, and rank threads take turns anyway

taken: list[str] = []  # the combinations that the swap test compared
skipped: list[str] = []


@pytest.fixture(scope="session")
def pool():
    """One set of worker processes for every sweep of the oracle."""
    from ringref.oracle import Pool

    with Pool(8) as workers:
        yield workers


def pytest_collection_finish():
    gc.freeze()  # torch, its compiler and the tests stay: no collection need look at them again


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist tells the one that prints
        session.config.workeroutput["swap"] = taken, skipped


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for mine, theirs in zip((taken, skipped), getattr(node, "workeroutput", {}).get("swap", ())):
        mine.extend(theirs)


def pytest_terminal_summary(terminalreporter):
    if taken or skipped:
        terminalreporter.write_line(f"swap test: {len(taken)} compared, {len(skipped)} skipped")
    for what in skipped:
        terminalreporter.write_line(f"  skipped: {what}")
