"""Fixtures of the server's tests."""

from collections.abc import Callable, Iterator

import pytest

from tests.serve.server.hostile import corpus


@pytest.fixture(scope="session")
def hostile_corpus() -> Callable[[int, int], Iterator[tuple[str, bytes]]]:
    """corpus(count, seed): damaged and hostile images."""
    return corpus
