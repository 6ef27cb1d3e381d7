"""One compiling process for the tests of a session."""

from collections.abc import Iterator

import pytest

from ptx.compiler import Compiler
from ptx.launches import Executor


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest) -> Iterator[Compiler]:
    """Compiles with the Triton that is installed; what it compiled stays in pytest's cache."""
    found = Compiler(request.config.cache.mkdir("ptx"))
    yield found
    found.close()


@pytest.fixture
def executor(compiler: Compiler) -> Executor:
    """Runs every launch once."""
    return Executor(compiler)
