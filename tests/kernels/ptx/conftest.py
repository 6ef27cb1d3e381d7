"""One compiling process for the tests of a session."""

import pathlib
from collections.abc import Iterator

import pytest

from ptx.compiler import Compiler
from ptx.launches import Executor


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where compiled kernels stay: in pytest's cache, if it has one."""
    lasting = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("ptx") if lasting is None else lasting.mkdir("ptx")


@pytest.fixture(scope="session")
def compiler(cache: pathlib.Path) -> Iterator[Compiler]:
    """Compiles with the Triton that is installed."""
    found = Compiler(cache)
    yield found
    found.close()


@pytest.fixture
def executor(compiler: Compiler) -> Executor:
    """Runs every launch once."""
    return Executor(compiler)


@pytest.fixture
def hopper(compiler: Compiler) -> Executor:
    """Runs every launch once, compiled for sm_90."""
    return Executor(compiler, target="sm_90")
