import pytest


@pytest.fixture(scope="session")
def pool():
    from ringref.sanitizer import Pool

    with Pool(8) as workers:
        yield workers
